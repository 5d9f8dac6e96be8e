"""Writes the README.md of a converted checkpoint: a model card for the Hub."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.formatting import printable

_TEMPLATE = """\
---
library_name: mlx
pipeline_tag: image-text-to-text
{licence_tags}{base_model}tags:
- mlx
- fastvlm
{tags}---

# {title}

[FastVLM](https://arxiv.org/abs/2412.13303) for [MLX](https://github.com/ml-explore/mlx), converted from {origin}
with fastvlm-mlx{form}, the weights are {dtype}.

{usage}

| | |
|---|---|
| parameters | {tower:.1f} M vision tower, {projector:.1f} M projector, {decoder:.1f} M decoder |
| resolution | {size} px: {tokens} visual tokens |
| decoder | Qwen2, {layers} layers, {hidden} wide, {vocabulary} tokens{tied} |
| source layout | {layout} |
| source SHA-256 | `{digest}` |

{report}## Licence

{licence}
"""


class Reader(NamedTuple):
    """A program that loads a checkpoint.

    Attributes:
        tags: Of the model card, besides `mlx` and `fastvlm`.
        form: The form of the checkpoint; continues "converted with fastvlm-mlx".
        usage: How to use it, as Markdown.
    """

    tags: tuple[str, ...]
    form: str
    usage: str


FASTVLM = Reader(
    tags=("fastvlm-mlx",),
    form=": the vision tower is folded into its inference form",
    usage="""\
With fastvlm-mlx installed (`uv tool install .` in a clone of it):

```bash
fastvlm generate photo.jpg --model PATH
```

```python
from fastvlm_mlx import load, generate
model, processor = load("PATH")
print(generate(model, processor, image="photo.jpg", prompt="Describe the image.").text)
```

PATH is this folder or the id of its repository on the Hub.""",
)

_PATH_LINE = "PATH is this folder or the id of its repository on the Hub."


def card(
    config: ModelConfig,
    parameters: Mapping[str, int],
    layout: str,
    title: str,
    licences: Collection[str],
    report: str = "",
    reader: Reader = FASTVLM,
) -> str:
    """The text of the model card.

    Args:
        config: The config of the converted checkpoint.
        parameters: The number of parameters of each part.
        layout: The layout of the source.
        title: The name of the checkpoint.
        licences: The licence files that were copied.
        report: The section on what quantization cost.
        reader: The program that the checkpoint is for.
    """
    source = config.source
    name, revision = source.get("name") or "a checkpoint without a name", source.get("revision")
    vision, text = config.vision_config, config.text_config
    apple = name.startswith("apple/")
    origin = f"[{name}](https://huggingface.co/{name}) at `{revision}`" if revision else f"`{name}`"
    base_model = f"base_model: {name}\n" if revision else ""
    if revision and config.quantization:
        base_model += "base_model_relation: quantized\n"
    millions = {part: count / 1e6 for part, count in parameters.items()}
    if licences:
        terms = (
            f"The weights keep the licence of the source: see {', '.join(f'[{file}]({file})' for file in licences)}."
        )
    else:
        terms = "The weights keep the licence of the source, which came without a licence file."
    if apple:
        terms += " Apple's released weights are for research only."
    return _TEMPLATE.format(
        licence_tags="license: apple-amlr\n" if apple else "",
        base_model=base_model,
        tags="".join(f"- {tag}\n" for tag in reader.tags),
        form=reader.form,
        usage=reader.usage,
        title=printable(title),
        origin=origin,
        dtype="quantized" if config.quantization else config.dtype,
        report=f"{report}\n" if report else "",
        tower=millions["vision"],
        projector=millions["projector"],
        decoder=millions["decoder"] + millions["embed"],
        size=vision.image_size,
        tokens=(vision.image_size // vision.patch_size) ** 2,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        tied=", embedding and head tied" if text.tie_word_embeddings else "",
        layout=layout,
        digest=source.get("sha256") or "not recorded",
        licence=terms,
    )


def for_repository(text: str, repository: str) -> str:
    """The text of a model card that names its repository where it said `PATH`."""
    text = text.replace(f"{_PATH_LINE}\n\n", "")
    return text.replace("--model PATH", f"--model {repository}").replace('load("PATH")', f'load("{repository}")')
