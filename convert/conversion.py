"""From a checkpoint in any layout to a folder in this project's format."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm_mlx.config import ModelConfig, TextConfig
from fastvlm_mlx.convert import layouts, upstream, writer
from fastvlm_mlx.convert.card import card
from fastvlm_mlx.convert.fold import Array
from fastvlm_mlx.convert.layouts import Layout
from fastvlm_mlx.convert.plan import Plan, dropped_tensors, readable_bytes
from fastvlm_mlx.convert.recipes import Recipe, copies, decoder_recipes, projector_recipes, vision_recipes
from fastvlm_mlx.convert.rescale import Scaling, choose, factors
from fastvlm_mlx.convert.source import Source, open_source
from fastvlm_mlx.convert.weights import Shape, Weight, weight
from fastvlm_mlx.errors import CheckpointError, ConversionError
from fastvlm_mlx.processing import FastVLMProcessor
from fastvlm_mlx.tokenizer import END_OF_TEXT, IM_END, Tokenizer

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is being done."""

LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TIED_REASON = "equal to the embedding, which the head uses"
OTHER_PART_REASON = "only the vision tower of this source is used"

_PARTS = ("vision_tower", "mm_projector", "language_model")
_LICENCES = re.compile(r"(licen[cs]e|notice|acknowledg|copying)", re.IGNORECASE)
_DEFAULT_MAX_LENGTH = 8192


def plan(
    source: str | Path, *, dtype: str = "float16", revision: str | None = None, vision_from: str | Path | None = None
) -> Plan:
    """What `convert_checkpoint` would do; reads headers only, and the head where it may equal the embedding.

    Args:
        source: A folder, a .zip archive, a Hub id or an alias.
        dtype: `float16`, `bfloat16` or `float32`.
        revision: A branch, tag or commit of a Hub id.
        vision_from: The source of the vision tower, for a source that has none.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConfigError: If its config.json describes another architecture.
        ConversionError: If the options do not fit the source.
    """
    with _open(source, dtype, revision, vision_from) as job:
        return job.plan


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
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
        calibration_images: Pictures that the tower's range is measured on for float16, beside the built-in ones.
        progress: Called with bytes done, bytes in all and what is being done.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConfigError: If its config.json describes another architecture.
        ConversionError: If the destination exists, there is no room for it, or a weight does not fit `dtype`.
        ImageError: If a calibration image cannot be read.
    """
    target = Path(destination).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"{target}: exists already; remove it or choose another destination")
    with _open(source, dtype, revision, vision_from) as job, _partial_folder(target, job.plan.output_bytes) as folder:
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
    """

    plan: Plan
    sources: tuple[Source, ...]
    recipes: list[Recipe]
    weights: Mapping[str, Weight]
    unscale: Mapping[str, float]

    def write(self, folder: Path, title: str, pictures: tuple[str | Path, ...], progress: Progress) -> Plan:
        """Writes every file into `folder`."""
        reading = sum(source.nbytes for source in self.sources)
        meter = _Meter(reading + self.plan.output_bytes, progress)
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
        with writer.ShardWriter(folder, finished.shards, finished.config.dtype) as out:
            for recipe in self.recipes:
                outputs = {name: tower.pop(name) for name in recipe.outputs} if tower else self._rows(recipe)
                for name, rows in outputs.items():
                    factor = np.float32(rescale.get(name, 1.0))
                    values = rows if factor == 1 else (chunk * factor for chunk in rows)
                    meter.advance(out.write(name, values), "writing")
        self._write_small_files(folder, title, finished)
        return finished

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
                raise CheckpointError(
                    f"{name}: folding gives NaN or infinite values; look at {layouts.listed(tensors)}"
                )
        return {name: self._unscaled(name, iter([values])) for name, values in outputs.items()}

    def _unscaled(self, name: str, rows: Iterator[Array]) -> Iterator[Array]:
        factor = np.float32(self.unscale.get(name, 1.0))
        return rows if factor == 1 else (chunk * factor for chunk in rows)

    def _calibrated(self, pictures: tuple[str | Path, ...], meter: "_Meter") -> tuple[dict[str, Any], Scaling]:
        """The folded tower, unscaled and ready to be written, and the scaling that it needs in float16."""
        from fastvlm_mlx.convert import calibration

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
        licences = sorted(
            path.name for path in source.folder.iterdir() if path.is_file() and _LICENCES.match(path.name)
        )
        for licence in licences:
            shutil.copyfile(source.folder / licence, folder / licence)
        FastVLMProcessor(Tokenizer(source.folder), config).save(folder)
        generation = {**(source.json("generation_config.json") or {}), "eos_token_id": list(config.eos_token_id)}
        files: dict[str, Mapping[str, Any]] = {
            "config.json": config.to_dict(),
            "generation_config.json": generation,
            "model.safetensors.index.json": writer.index(finished.shards, config.dtype),
        }
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        readme = card(config, dict(finished.parameters), finished.layout, title, licences)
        (folder / "README.md").write_text(readme, encoding="utf-8")


class _Meter:
    """Adds up bytes for a progress callback."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def advance(self, count: int, label: str) -> None:
        self._done += count
        self._progress(self._done, self._total, label)


@dataclass(frozen=True, kw_only=True)
class _Matched:
    """A source whose every tensor has its place."""

    source: Source
    config: Mapping[str, Any]
    layout: Layout
    places: Mapping[str, str]
    dropped: Mapping[str, str]
    packed: Mapping[str, tuple[str, ...]]

    def shape(self, place: str) -> Shape:
        """The shape of the tensor at a place, as it is stored."""
        return self.source.tensors[self.places[place]].shape

    def weight(self, place: str, shape: Shape) -> Weight:
        """The tensor at a place, in the shape in which it is used."""
        key = self.places[place]
        tensors = self.source.tensors
        return weight(
            tensors[key],
            shape,
            channels_last=self.layout.channels_last,
            companions=tuple(tensors[companion] for companion in self.packed.get(key, ())),
            quantization=self.config.get("quantization") or self.config.get("quantization_config"),
        )

    def count(self, prefix: str) -> int:
        """How many blocks or layers there are behind `prefix`."""
        return len({place[len(prefix) :].partition(".")[0] for place in self.places if place.startswith(prefix)})

    def unscale(self) -> dict[str, float]:
        """What takes the scaling of a checkpoint in our own format out of its weights."""
        if not self.layout.folded:
            return {}
        scales = ModelConfig.from_dict(self.config).vision_config.scales
        return {name: 1 / factor for name, factor in factors(Scaling.of(scales)).items()}


def _match(source: Source) -> _Matched:
    config = source.json("config.json")
    if config is None:
        raise CheckpointError(f"{source.name}: has no config.json")
    layout = layouts.OURS if "fastvlm_format" in config else layouts.recognise(source.tensors, source.name)
    if layout.folded:
        ModelConfig.from_dict(config)
    upstream.check(config)
    found = layouts.match(layout, source.tensors, source.name)
    return _Matched(
        source=source, config=config, layout=layout, places=found.places, dropped=found.dropped, packed=found.packed
    )


@contextmanager
def _open(name: str | Path, dtype: str, revision: str | None, vision_from: str | Path | None) -> Iterator[_Job]:
    if dtype not in writer.DTYPES:
        raise ConversionError(f"dtype must be {', '.join(writer.DTYPES)}, not {dtype!r}")
    with ExitStack() as stack:
        main = _match(stack.enter_context(open_source(name, revision)))
        has_tower = any(place.startswith("vision_tower.") for place in main.places)
        if has_tower and vision_from is not None:
            raise ConversionError(f"{main.source.name} has a vision tower of its own; leave --vision-from out")
        if vision_from is not None:
            vision = _match(stack.enter_context(open_source(vision_from)))
            if not any(place.startswith("vision_tower.") for place in vision.places):
                raise ConversionError(f"{vision.source.name} has no vision tower either; give another --vision-from")
        elif has_tower:
            vision = main
        else:
            raise ConversionError(
                f"{main.source.name} has no vision tower ({main.layout.description}); "
                "name a checkpoint that has one with --vision-from"
            )
        yield _job(main, vision, dtype)


def _job(main: _Matched, vision: _Matched, dtype: str) -> _Job:
    text, tied_head = _text_config(main)
    depths = tuple(vision.count(f"vision_tower.stages.{stage}.blocks.") for stage in range(5))
    tower = upstream.vision_config(vision.config, vision.shape, depths)
    parts = [
        (vision, vision_recipes(tower, vision.places)),
        (main, projector_recipes(tower.hidden_size, text.hidden_size)),
        (main, decoder_recipes(text)),
    ]
    recipes: list[Recipe] = []
    weights: dict[str, Weight] = {}
    for matched, made in parts:
        used = copies(made) if matched.layout.folded else made
        recipes += used
        weights |= {place: matched.weight(place, shape) for recipe in used for place, shape in recipe.inputs.items()}
    shapes = {name: shape for recipe in recipes for name, shape in recipe.outputs.items()}
    sources = (main.source,) if vision is main else (main.source, vision.source)
    dropped = dropped_tensors(main.source, {**main.dropped, **tied_head})
    if vision is not main:
        others = {
            key: OTHER_PART_REASON for place, key in vision.places.items() if not place.startswith("vision_tower.")
        }
        dropped += dropped_tensors(vision.source, {**vision.dropped, **others})
    config = ModelConfig(
        vision_config=tower,
        text_config=text,
        dtype=dtype,
        eos_token_id=_end_tokens(main),
        max_length=_max_length(main.config),
        source=_provenance(main, vision),
    )
    return _Job(
        plan=Plan(
            source=main.source.name,
            layout=main.layout.description,
            vision_from=None if vision is main else (vision.source.name, vision.layout.description),
            config=config,
            source_bytes=sum(source.nbytes for source in sources),
            output_bytes=sum(writer.nbytes(shape, dtype) for shape in shapes.values()),
            shards=tuple(writer.shards(shapes, dtype)),
            parameters={
                part: sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(f"{part}."))
                for part in _PARTS
            },
            dropped=tuple(dropped),
        ),
        sources=sources,
        recipes=recipes,
        weights=weights,
        unscale={
            **{name: factor for name, factor in vision.unscale().items() if name.startswith("vision_tower.")},
            **{name: factor for name, factor in main.unscale().items() if name.startswith("mm_projector.")},
        },
    )


def _text_config(main: _Matched) -> tuple[TextConfig, dict[str, str]]:
    """The decoder's architecture, and the head among the dropped tensors if it equals the embedding."""
    layers = main.count("language_model.model.layers.")
    text = upstream.text_config(main.config, main.shape, layers, tied=True)
    if LM_HEAD not in main.places:
        return text, {}
    shape = (text.vocab_size, text.hidden_size)
    if main.weight(LM_HEAD, shape).equals(main.weight(EMBEDDING, shape)):
        return text, {main.places[LM_HEAD]: TIED_REASON}
    return replace(text, tie_word_embeddings=False), {}


def _end_tokens(main: _Matched) -> tuple[int, ...]:
    """The tokens that end an answer: ChatML's, and what the configs name."""
    tokenizer = Tokenizer(main.source.folder)
    ends = {tokenizer.token_id(content) for content in (IM_END, END_OF_TEXT)}
    for values in (main.config, main.source.json("generation_config.json") or {}):
        named = values.get("eos_token_id")
        ends.update(named if isinstance(named, list) else [] if named is None else [named])
    return tuple(sorted(ends))


def _max_length(config: Mapping[str, Any]) -> int:
    """The longest sequence that the model was tuned for: our key, or LLaVA's."""
    length = config.get("max_length") or config.get("tokenizer_model_max_length") or _DEFAULT_MAX_LENGTH
    if not isinstance(length, int):
        raise CheckpointError(f"config.json: tokenizer_model_max_length must be a whole number, not {length!r}")
    return length


def _provenance(main: _Matched, vision: _Matched) -> dict[str, Any]:
    """Where the weights come from; of a local source the name only, since paths are nobody's business."""
    provenance: dict[str, Any] = {
        "name": _public_name(main.source),
        "revision": main.source.revision,
        "layout": main.layout.name,
    }
    if vision is not main:
        provenance |= {
            "vision_name": _public_name(vision.source),
            "vision_revision": vision.source.revision,
            "vision_layout": vision.layout.name,
        }
    return provenance


def _public_name(source: Source) -> str:
    return source.name if source.revision else Path(source.name).expanduser().resolve().name


@contextmanager
def _partial_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well and is removed otherwise.

    Raises:
        ConversionError: If there is no room, or the file system refuses.
    """
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        if (free := shutil.disk_usage(target.parent).free) < needed:
            raise ConversionError(
                f"{target}: the result takes {readable_bytes(needed)}, but only {readable_bytes(free)} are free there"
            )
        folder.mkdir()
        yield folder
        os.rename(folder, target)
    except BaseException as err:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(err, OSError):
            full = err.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"cannot be written: {err.strerror or err}"
            raise ConversionError(f"{target}: {what}; nothing was left there") from err
        raise


def _remove_leftovers(target: Path) -> None:
    """Removes what conversions to `target` left behind when they were killed."""
    for folder in target.parent.glob(f".{target.name}.partial-*"):
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process != os.getpid()
