"""The README.md of a converted checkpoint: a model card for the Hub."""

from collections.abc import Collection

from fastvlm_mlx.config import ModelConfig

_TEMPLATE = """\
---
library_name: mlx
pipeline_tag: image-text-to-text
{licence_tags}{base_model}tags:
- mlx
- fastvlm
- fastvlm-mlx
---

# {title}

[FastVLM](https://arxiv.org/abs/2412.13303) for [MLX](https://github.com/ml-explore/mlx), converted from {origin}
with fastvlm-mlx: the vision tower is folded into its inference form, the weights are {dtype}.

```bash
fastvlm generate photo.jpg --model .
```

```python
from fastvlm_mlx import load, generate
model, processor = load(".")
print(generate(model, processor, image="photo.jpg", prompt="Describe the image.").text)
```

| | |
|---|---|
| parameters | {tower:.1f} M vision tower, {projector:.1f} M projector, {decoder:.1f} M decoder |
| resolution | {size} px: {tokens} visual tokens |
| decoder | Qwen2, {layers} layers, {hidden} wide, {vocabulary} tokens{tied} |
| source layout | {layout} |
| source SHA-256 | `{digest}` |

{loss}## Licence

{licence}
"""


def card(
    config: ModelConfig, parameters: dict[str, int], layout: str, title: str, licences: Collection[str], loss: str = ""
) -> str:
    """The model card.

    Args:
        config: Of the converted checkpoint.
        parameters: How many each part has.
        layout: The layout of the source.
        title: The name of the checkpoint.
        licences: The licence files that were copied.
        loss: The section on what quantization cost.
    """
    name, revision = config.source["name"], config.source["revision"]
    vision, text = config.vision_config, config.text_config
    apple = name.startswith("apple/")
    quantized = "base_model_relation: quantized\n"
    origin = f"[{name}](https://huggingface.co/{name}) at `{revision}`" if revision else f"`{name}`"
    millions = {part: count / 1e6 for part, count in parameters.items()}
    terms = "The weights keep the licence of the source" + (
        f": see {', '.join(f'[{file}]({file})' for file in licences)}."
        if licences
        else ", which came without a licence file."
    )
    return _TEMPLATE.format(
        licence_tags="license: apple-amlr\n" if apple else "",
        base_model=(f"base_model: {name}\n" + quantized * bool(config.quantization)) if revision else "",
        title=title,
        origin=origin,
        dtype="quantized" if config.quantization else config.dtype,
        loss=f"{loss}\n" if loss else "",
        tower=millions["vision_tower"],
        projector=millions["mm_projector"],
        decoder=millions["language_model"],
        size=vision.image_size,
        tokens=(vision.image_size // vision.patch_size) ** 2,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        tied=", embedding and head tied" if text.tie_word_embeddings else "",
        layout=layout,
        digest=config.source["sha256"],
        licence=terms + " Apple's released weights are for research only." * apple,
    )
