"""From a checkpoint in any layout to a folder in this project's format."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert.fold.float16 import Scaling, choose, factors
from fastvlm_mlx.convert.fold.modules import Recipe, copies, decoder_recipes, projector_recipes, vision_recipes
from fastvlm_mlx.convert.fold.operations import Array
from fastvlm_mlx.convert.plan import Plan, dropped_tensors
from fastvlm_mlx.convert.source import upstream_config as upstream
from fastvlm_mlx.convert.source.source import Source, open_source
from fastvlm_mlx.convert.source.upstream import EMBEDDING, Checkpoint
from fastvlm_mlx.convert.source.weights import Weight
from fastvlm_mlx.convert.write import shards as writer
from fastvlm_mlx.convert.write.card import card
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.errors import CheckpointError, ConversionError
from fastvlm_mlx.formatting import names
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.inputs.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being done."""

OTHER_PART_REASON = "only the vision tower of this source is used"

_PARTS = ("vision_tower", "mm_projector", "language_model")
LICENCES = re.compile(r"(licen[cs]e|notice|acknowledg|copying)", re.IGNORECASE)


_COPIED_BYTES = 2**24

_KEPT_PACKED = ("language_model.", "mm_projector.2.")
"""Where quantized weights can stay as they are: neither folded nor scaled, nor their columns permuted."""


def plan(
    source: str | Path,
    *,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
) -> Plan:
    """What `convert_checkpoint` would do; reads headers only, and the head where it may equal the embedding.

    Args:
        source: A folder, a .zip archive, a Hub id or an alias.
        dtype: `float16`, `bfloat16` or `float32`.
        revision: A branch, tag or commit of a Hub id.
        vision_from: The source of the vision tower, for a source that has none.
        dequantize: Whether quantized weights that could stay as they are are not to.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConfigError: If its config.json describes another architecture.
        ConversionError: If the options do not fit the source.
    """
    with _open(source, dtype, revision, vision_from, dequantize) as job:
        return job.plan


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    calibration_images: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> Plan:
    """Writes `source` to the folder `destination` in this project's format; returns what was done.

    The folder appears when it is complete. The source is only read.

    Args:
        source: A folder, a .zip archive, a Hub id or an alias.
        destination: A folder that does not exist yet or is empty.
        dtype: `float16`, `bfloat16` or `float32`.
        revision: A branch, tag or commit of a Hub id.
        vision_from: The source of the vision tower, for a source that has none.
        dequantize: Whether quantized weights that could stay as they are are not to.
        calibration_images: Pictures that the tower's range is measured on for float16, beside the built-in ones.
        progress: Called with bytes done, bytes in all and what is being done.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConfigError: If its config.json describes another architecture.
        ConversionError: If the destination exists, there is no room for it, or a weight does not fit `dtype`.
        ImageError: If a calibration image cannot be read.
    """
    target = vacant(destination)
    with (
        _open(source, dtype, revision, vision_from, dequantize) as job,
        partial_folder(target, job.plan.output_bytes) as folder,
    ):
        return job.write(folder, target.name, tuple(calibration_images), progress or (lambda *_: None))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """An open conversion.

    Attributes:
        plan: What is to be done.
        sources: The source, and that of the vision tower if it is another one.
        recipes: Of every parameter, in the order in which they are written.
        weights: The source's tensor at every place.
        unscale: What takes the scaling of a source in our own format out of its weights.
        kept: The quantized weights that stay as they are, by parameter.
    """

    plan: Plan
    sources: tuple[Source, ...]
    recipes: list[Recipe]
    weights: Mapping[str, Weight]
    unscale: Mapping[str, float]
    kept: Mapping[str, Weight]

    def write(self, folder: Path, title: str, pictures: tuple[str | Path, ...], progress: Progress) -> Plan:
        """Writes every file into `folder`."""
        reading = sum(source.nbytes for source in self.sources)
        meter = Meter(reading + self.plan.output_bytes, progress)
        digests = [source.sha256(lambda count: meter.advance(count, "reading")) for source in self.sources]
        keys = ("sha256", "vision_sha256")[: len(digests)]
        finished = self.plan.with_config(source={**self.plan.config.source, **dict(zip(keys, digests, strict=True))})
        tower: dict[str, Any] = {}
        scaling = Scaling.of(finished.config.vision_config.scales)
        if finished.config.dtype == "float16":
            tower, scaling = self._calibrated(pictures, meter)
            vision = replace(finished.config.vision_config, scales=scaling.scales)
            finished = finished.with_config(vision_config=vision)
        rescale = factors(scaling)
        with writer.ShardWriter(folder, finished.shards) as out:
            for recipe in self.recipes:
                if packed := self.kept.get(next(iter(recipe.outputs))):
                    self._copy(out, next(iter(recipe.outputs)), packed, meter)
                    continue
                outputs = {name: tower.pop(name) for name in recipe.outputs} if tower else self._rows(recipe)
                for name, rows in outputs.items():
                    factor = np.float32(rescale.get(name, 1.0))
                    values = rows if factor == 1 else (chunk * factor for chunk in rows)
                    out.write(name, values, lambda count: meter.advance(count, "writing"))
        self._write_small_files(folder, title, finished)
        return finished

    def _copy(self, out: writer.ShardWriter, name: str, weight: Weight, meter: "Meter") -> None:
        for part, tensor in weight.packed.items():
            step = max(1, _COPIED_BYTES * tensor.shape[0] // tensor.nbytes)
            rows = (tensor.read(first, min(step, tensor.shape[0] - first)) for first in range(0, tensor.shape[0], step))
            out.copy(_part(name, part), rows, lambda count: meter.advance(count, "writing"))

    def _rows(self, recipe: Recipe) -> dict[str, Iterator[Array]]:
        """The unscaled outputs of a recipe, each as chunks of rows."""
        if recipe.fold is None:
            (name,) = recipe.outputs
            return {name: self._unscaled(name, self.weights[name].chunks())}
        with np.errstate(all="ignore"):
            outputs = recipe.fold({place: self.weights[place].load() for place in recipe.inputs})
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                norms = [place for place in recipe.inputs if place.endswith("running_var")]
                tensors = [self.weights[place].tensor.name for place in norms or recipe.inputs]
                raise CheckpointError(f"{name}: folding gives NaN or infinite values; look at {names(tensors)}")
        return {name: self._unscaled(name, iter([values])) for name, values in outputs.items()}

    def _unscaled(self, name: str, rows: Iterator[Array]) -> Iterator[Array]:
        factor = np.float32(self.unscale.get(name, 1.0))
        return rows if factor == 1 else (chunk * factor for chunk in rows)

    def _calibrated(self, pictures: tuple[str | Path, ...], meter: "Meter") -> tuple[dict[str, Any], Scaling]:
        """The folded tower, unscaled and ready to be written, and the scaling that it needs in float16."""
        from fastvlm_mlx.convert.fold import peaks as calibration

        images = calibration.images(pictures)
        tower = {}
        for recipe in self.recipes:
            if next(iter(recipe.outputs)).startswith("vision_tower."):
                meter.advance(0, "folding")
                for name, rows in self._rows(recipe).items():
                    tower[name] = calibration.array(rows)
        peaks = calibration.peaks(self.plan.config.vision_config, tower, images, lambda label: meter.advance(0, label))
        return {name: iter([calibration.view(value)]) for name, value in tower.items()}, choose(peaks)

    def _write_small_files(self, folder: Path, title: str, finished: Plan) -> None:
        source, config = self.sources[0], finished.config
        licences: dict[str, Path] = {}
        for one in reversed(self.sources):  # where both have a file of that name, the decoder's is kept
            paths = [path for path in one.folder.iterdir() if path.is_file() and LICENCES.match(path.name)]
            licences |= {path.name: path for path in paths}
        for name, path in licences.items():
            shutil.copyfile(path, folder / name)
        FastVLMProcessor(Tokenizer(source.folder), config).save(folder)
        generation = {**(source.json("generation_config.json") or {}), "eos_token_id": list(config.eos_token_id)}
        files: dict[str, Mapping[str, Any]] = {
            "config.json": config.to_dict(),
            "generation_config.json": generation,
            "model.safetensors.index.json": writer.index(finished.shards),
        }
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        readme = card(config, dict(finished.parameters), finished.layout, title, sorted(licences))
        (folder / "README.md").write_text(readme, encoding="utf-8")


def _part(name: str, part: str) -> str:
    """The name of a part of the quantized layer with the weight `name`."""
    return f"{name.removesuffix('weight')}{part}"


class Meter:
    """Adds up bytes for a progress callback.

    Args:
        total: Bytes in all.
        progress: Told how far it is.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def advance(self, count: int, label: str) -> None:
        """Says what is being done, and how many bytes of it are done since the last call."""
        self._done += count
        self._progress(self._done, self._total, label)


@contextmanager
def _open(
    name: str | Path, dtype: str, revision: str | None, vision_from: str | Path | None, dequantize: bool
) -> Iterator[_Job]:
    if dtype not in writer.DTYPES:
        raise ConversionError(f"dtype must be {', '.join(writer.DTYPES)}, not {dtype!r}")
    with ExitStack() as stack:
        main = Checkpoint.of(stack.enter_context(open_source(name, revision)))
        if vision_from is None:
            if not main.has_tower:
                raise ConversionError(
                    f"{main.source.name} has no vision tower ({main.layout.description}); "
                    "name a checkpoint that has one with --vision-from"
                )
            yield _job(main, main, dtype, dequantize)
        elif main.has_tower:
            raise ConversionError(f"{main.source.name} has a vision tower of its own; leave --vision-from out")
        else:
            vision = Checkpoint.of(stack.enter_context(open_source(vision_from)))
            if not vision.has_tower:
                raise ConversionError(f"{vision.source.name} has no vision tower either; give another --vision-from")
            yield _job(main, vision, dtype, dequantize)


def _job(main: Checkpoint, vision: Checkpoint, dtype: str, dequantize: bool) -> _Job:
    """The conversion of `main`, with the tower of `vision` (mostly the same)."""
    text, tower = main.text_config(), vision.vision_config()
    parts = [
        (vision, vision_recipes(tower, vision.match.places)),
        (main, projector_recipes(tower.hidden_size, text.hidden_size)),
        (main, decoder_recipes(text)),
    ]
    recipes: list[Recipe] = []
    weights: dict[str, Weight] = {}
    for checkpoint, made in parts:
        used = copies(made) if checkpoint.layout.folded else made
        recipes += used
        weights |= {place: checkpoint.weight(place, shape) for recipe in used for place, shape in recipe.inputs.items()}
    packed = {place: weight for place, weight in weights.items() if weight.packing}
    kept = {} if dequantize else {place: weight for place, weight in packed.items() if _can_stay(place, weight)}
    sources = (main.source,) if vision is main else (main.source, vision.source)
    dropped = dropped_tensors(main.source, main.dropped(text))
    provenance = {"name": main.public_name, "revision": main.source.revision, "layout": main.layout.name}
    if vision is not main:
        unused = {**vision.match.dropped, **dict.fromkeys(vision.outside_tower, OTHER_PART_REASON)}
        dropped += dropped_tensors(vision.source, unused)
        provenance |= {
            "vision_name": vision.public_name,
            "vision_revision": vision.source.revision,
            "vision_layout": vision.layout.name,
        }
    config = ModelConfig(
        vision_config=tower,
        text_config=text,
        dtype=dtype,
        eos_token_id=main.end_tokens(),
        max_length=upstream.max_length(main.config),
        quantization=_quantization(kept),
        source=provenance,
    )
    shapes = {name: shape for recipe in recipes for name, shape in recipe.outputs.items()}
    stored: dict[str, writer.Stored] = {}
    for name, shape in shapes.items():
        if name in kept:
            stored |= {
                _part(name, part): writer.Stored(tensor.dtype, tensor.shape)
                for part, tensor in kept[name].packed.items()
            }
        else:
            stored[name] = writer.Stored(writer.DTYPES[dtype], shape)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    plan = Plan(
        source=main.source.name,
        layout=main.layout.description,
        vision_from=None if vision is main else (vision.source.name, vision.layout.description),
        config=config,
        source_bytes=sum(source.nbytes for source in sources),
        output_bytes=sum(tensor.nbytes for tensor in stored.values()),
        shards=tuple(writer.shards(stored)),
        parameters={part: sum(size for name, size in sizes.items() if name.startswith(part)) for part in _PARTS},
        dropped=tuple(dropped),
        kept_quantized=len(kept),
        dequantized=tuple(place.removesuffix(".weight") for place in packed if place not in kept),
    )
    unscale = {
        **{name: factor for name, factor in main.unscale().items() if name.startswith("mm_projector.")},
        **{name: factor for name, factor in vision.unscale().items() if name.startswith("vision_tower.")},
    }
    return _Job(plan=plan, sources=sources, recipes=recipes, weights=weights, unscale=unscale, kept=kept)


def _can_stay(place: str, weight: Weight) -> bool:
    """Whether a quantized weight can; MLX dequantizes an embedding to bfloat16 in every mode but affine."""
    affine = weight.packing is not None and weight.packing.mode == "affine"
    return place.startswith(_KEPT_PACKED) and (affine or place != EMBEDDING)


def _quantization(kept: Mapping[str, Weight]) -> QuantizationConfig | None:
    """How the weights that stay quantized are."""
    layers = {
        name.removesuffix(".weight"): LayerQuantization(
            group_size=weight.packing.group_size, bits=weight.packing.bits, mode=weight.packing.mode
        )
        for name, weight in kept.items()
        if weight.packing
    }
    return QuantizationConfig.of(layers) if layers else None
