"""Converts a checkpoint in any layout to a folder in this project's format."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.arguments import check_callable, check_kind, choice, flag
from fastvlm_mlx.checkpoint.released import parse_name
from fastvlm_mlx.config import LayerQuantization, ModelConfig, QuantizationConfig
from fastvlm_mlx.convert.arrays import DTYPES, Array
from fastvlm_mlx.convert.fold.float16 import Scaling, choose, factors
from fastvlm_mlx.convert.fold.modules import Fold, copies, decoder_folds, projector_folds, vision_folds
from fastvlm_mlx.convert.parts import EMBEDDING, by_part
from fastvlm_mlx.convert.plan import Dropped, Plan, dropped_tensors
from fastvlm_mlx.convert.progress import Meter, Notify, Progress
from fastvlm_mlx.convert.source import upstream_config
from fastvlm_mlx.convert.source.source import open_source
from fastvlm_mlx.convert.source.upstream import UpstreamCheckpoint
from fastvlm_mlx.convert.source.weights import Weight
from fastvlm_mlx.convert.write.card import card
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.convert.write.files import INDEX_FILE, copy_licences, licences, write_json
from fastvlm_mlx.convert.write.shards import ShardWriter, index, shards
from fastvlm_mlx.convert.write.units import Stored, fused
from fastvlm_mlx.errors import CheckpointError, ConversionError
from fastvlm_mlx.formatting import names
from fastvlm_mlx.inputs.processor import FastVLMProcessor

if TYPE_CHECKING:
    from fastvlm_mlx.backend import mx

OTHER_PART_REASON = "only the vision tower of this source is used"

_PACKED_MODULES = ("language_model.", "mm_projector.2.")
"""Where quantized weights can stay packed: they are neither folded nor scaled, nor are their columns permuted."""


def plan(
    source: str | Path,
    *,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    tie_word_embeddings: bool | None = None,
) -> Plan:
    """The plan of `convert_checkpoint`; reads headers only, and the head where it may equal the embedding.

    Of a checkpoint on the Hub it fetches the headers, a few hundred kilobytes, and a few rows of that head.

    Args:
        source: A folder, a .zip archive, a Hub id or an alias.
        dtype: `float16`, `bfloat16` or `float32`.
        revision: A branch, tag or commit of a Hub id.
        vision_from: The source of the vision tower, for a source that has none.
        dequantize: Whether to dequantize weights that could stay quantized.
        tie_word_embeddings: As for `convert_checkpoint`.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConfigError: If its config.json describes another architecture.
        ConversionError: If the options do not fit the source.
    """
    with open_conversion(
        source,
        dtype=dtype,
        revision=revision,
        vision_from=vision_from,
        dequantize=dequantize,
        tie_word_embeddings=tie_word_embeddings,
        headers_only=True,
    ) as conversion:
        return conversion.plan()


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    tie_word_embeddings: bool | None = None,
    calibration_images: Iterable[str | Path] = (),
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Writes `source` to the folder `destination` in this project's format; returns the plan that was carried out.

    The folder appears when it is complete. The source is only read.

    Args:
        source: A folder, a .zip archive, a Hub id or an alias.
        destination: A folder that does not exist yet or is empty.
        dtype: `float16`, `bfloat16` or `float32`.
        revision: A branch, tag or commit of a Hub id.
        vision_from: The source of the vision tower, for a source that has none.
        dequantize: Whether to dequantize weights that could stay quantized.
        tie_word_embeddings: Whether the head is tied to the embedding, where config.json and tensors contradict each
            other; by default that is an error.
        calibration_images: Images to measure the tower's range on for float16, in addition to the built-in ones.
        notify: Called with a line before a download.
        progress: Called with the bytes done, the bytes in all and a label of the current step.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConfigError: If its config.json describes another architecture.
        ConversionError: If the destination exists, there is no room for it, or a weight does not fit `dtype`.
        ImageError: If a calibration image cannot be read.
    """
    from fastvlm_mlx.streams import own_stream

    target = vacant(destination)
    with (
        own_stream(),
        open_conversion(
            source,
            dtype=dtype,
            revision=revision,
            vision_from=vision_from,
            dequantize=dequantize,
            tie_word_embeddings=tie_word_embeddings,
            notify=notify,
            progress=progress,
        ) as conversion,
    ):
        return conversion.write(target, calibration_images=calibration_images, progress=progress)


@contextmanager
def open_conversion(
    source: str | Path,
    *,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    tie_word_embeddings: bool | None = None,
    headers_only: bool = False,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Iterator["Conversion"]:
    """The conversion of `source`, whose files stay open for the duration of a `with` block.

    Arguments as for `plan` and `open_source`.
    """
    choice(dtype, "dtype", DTYPES, ConversionError)
    if revision is not None:
        check_kind(revision, "revision", str, "a text or None")
    dequantize = flag(dequantize, "dequantize")
    if tie_word_embeddings is not None:
        tie_word_embeddings = flag(tie_word_embeddings, "tie_word_embeddings")
    check_callable(notify, "notify")
    check_callable(progress, "progress")
    if vision_from is not None:
        parse_name(vision_from)  # a mistake in it costs no download of the other one

    def opened(name: str | Path, revision: str | None = None) -> UpstreamCheckpoint:
        source = open_source(name, revision, headers_only=headers_only, notify=notify, progress=progress)
        return UpstreamCheckpoint.of(stack.enter_context(source))

    with ExitStack() as stack:
        main = tower = opened(source, revision)
        if vision_from is not None:
            if main.has_tower:
                raise ConversionError(f"{main.source.label} has a vision tower of its own; leave --vision-from out")
            tower = opened(vision_from)
            if not tower.has_tower:
                raise ConversionError(f"{tower.source.label} has no vision tower either; give another --vision-from")
        elif not main.has_tower:
            raise ConversionError(
                f"{main.source.label} has no vision tower ({main.layout.description}); "
                "name a checkpoint that has one with --vision-from"
            )
        yield Conversion(main, tower, dtype=dtype, dequantize=dequantize, tie=tie_word_embeddings)


def check_converted(folder: Path) -> None:
    """Checks that a converted folder has exactly the tensors that its config describes, and reads them all.

    Raises:
        CheckpointError: If it has others, or a value is not finite.
        ConfigError: If its config.json cannot be used.
    """
    with open_conversion(folder) as conversion:
        conversion.check_values()


class Conversion:
    """One source on its way to one folder in this project's format.

    Args:
        main: The source of the decoder and the projector.
        tower: The source of the vision tower; usually the same.
        dtype: `float16`, `bfloat16` or `float32`.
        dequantize: Whether to dequantize weights that could stay quantized.
        tie: Whether the head is tied to the embedding; see `convert_checkpoint`.

    Attributes:
        folds: The way to every parameter, in the order in which they are written.

    Raises:
        CheckpointError: If a tensor does not have the shape that the model needs.
        ConfigError: If a config.json describes another architecture.
    """

    def __init__(
        self,
        main: UpstreamCheckpoint,
        tower: UpstreamCheckpoint,
        *,
        dtype: str,
        dequantize: bool = False,
        tie: bool | None = None,
    ) -> None:
        self._main, self._tower, self._dtype = main, tower, dtype
        self._text, self._vision = main.text_config(tie), tower.vision_config()
        self.folds: list[Fold] = []
        self._weights: dict[str, Weight] = {}
        for checkpoint, folds in (
            (tower, vision_folds(self._vision, tower.match.targets)),
            (main, projector_folds(self._vision.hidden_size, self._text.hidden_size)),
            (main, decoder_folds(self._text)),
        ):
            self._add(checkpoint, copies(folds) if checkpoint.layout.folded else folds)
        packed = {target: weight for target, weight in self._weights.items() if weight.packing}
        kept = {} if dequantize else {name: weight for name, weight in packed.items() if _can_stay_packed(name, weight)}
        self._kept: dict[str, Weight] = kept
        self._dequantized = [target.removesuffix(".weight") for target in packed if target not in self._kept]
        self._folded_tower: dict[str, mx.array] = {}

    def _add(self, checkpoint: UpstreamCheckpoint, folds: Sequence[Fold]) -> None:
        """Adds folds and the weights of `checkpoint` that they need, without the scaling of our own format."""
        unscale: dict[str, float] = {}
        if checkpoint.layout.folded:
            scales = ModelConfig.from_dict(checkpoint.config).vision_config.scales
            unscale = {name: 1 / factor for name, factor in factors(Scaling.of(scales)).items()}
        self.folds += folds
        for fold in folds:
            for target, shape in fold.inputs.items():
                self._weights[target] = checkpoint.weight(target, shape, unscale.get(target, 1.0))

    def check_values(self) -> None:
        """Reads every tensor.

        Raises:
            CheckpointError: If a file is truncated or a value is not finite.
        """
        for weight in self._weights.values():
            stored = [weight.stored(part) for part in weight.packed] if weight.packing else [weight.chunks()]
            for _ in chain.from_iterable(stored):
                pass

    def plan(self) -> Plan:
        """The plan of `write`, derived from headers."""
        main, tower = self._main, self._tower
        other = tower is not main
        shapes = {name: shape for fold in self.folds for name, shape in fold.outputs.items()}
        tensors: dict[str, Stored] = {}
        for name, shape in shapes.items():
            if name in self._kept:
                parts = self._kept[name].packed.items()
                tensors |= {_part_name(name, part): Stored(tensor.dtype, tensor.shape) for part, tensor in parts}
            else:
                tensors[name] = Stored(DTYPES[self._dtype], shape)
        config = ModelConfig(
            vision_config=self._vision,
            text_config=self._text,
            dtype=self._dtype,
            eos_token_id=main.end_tokens(),
            max_length=upstream_config.max_length(main.config),
            quantization=_quantization(self._kept),
            source=self._provenance(),
        )
        return Plan(
            source=main.source.label,
            layout=main.layout.description,
            vision_from=(tower.source.label, tower.layout.description) if other else None,
            config=config,
            source_bytes=sum(checkpoint.source.nbytes for checkpoint in self._checkpoints),
            output_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            shards=tuple(shards(fused(tensors))),
            parameters=by_part({name: int(np.prod(shape)) for name, shape in shapes.items()}),
            dropped=tuple(self._dropped()),
            kept_quantized=len(self._kept),
            dequantized=tuple(self._dequantized),
        )

    @property
    def _checkpoints(self) -> tuple[UpstreamCheckpoint, ...]:
        return (self._main,) if self._tower is self._main else (self._main, self._tower)

    def _provenance(self) -> dict[str, Any]:
        """The `source` entry of the config, without hashes."""
        provenance: dict[str, Any] = {}
        for prefix, checkpoint in zip(("", "vision_"), self._checkpoints, strict=False):
            provenance |= {
                f"{prefix}name": checkpoint.public_name,
                f"{prefix}revision": checkpoint.source.revision,
                f"{prefix}layout": checkpoint.layout.name,
            }
        return provenance

    def _dropped(self) -> list[Dropped]:
        """The tensors that are not used."""
        main, tower = self._main, self._tower
        dropped: list[Dropped] = dropped_tensors(main.source, main.dropped(self._text))
        if tower is not main:
            unused = {**tower.match.dropped, **dict.fromkeys(tower.outside_tower, OTHER_PART_REASON)}
            dropped += dropped_tensors(tower.source, unused)
        return dropped

    def calibrate(self, images: Iterable[str | Path], notify: Notify) -> Scaling:
        """The scaling that keeps the tower within float16 on calibration images; `tensors` reuses the folded tower.

        Args:
            images: Images of the user, in addition to the built-in ones.
            notify: Called with a label of the current step.
        """
        from fastvlm_mlx.convert.fold import peaks

        pixels = peaks.images(images)
        for fold in self.folds:
            if next(iter(fold.outputs)).startswith("vision_tower."):
                notify("folding")
                self._folded_tower |= {name: peaks.array(rows) for name, rows in self._outputs(fold).items()}
        return choose(peaks.activation_peaks(self._vision, self._folded_tower, pixels, notify))

    def tensors(self, scaling: Scaling) -> Iterator[tuple[str, Iterable[npt.NDArray[Any]]]]:
        """Every tensor of the output, in its order, as chunks of rows: float32, or as stored if it stays quantized.

        Args:
            scaling: Folded into the weights.
        """
        scale = factors(scaling)
        for fold in self.folds:
            for name, rows in self._outputs(fold).items():
                if name in self._kept:
                    weight = self._kept[name]
                    yield from ((_part_name(name, part), weight.stored(part)) for part in weight.packed)
                else:
                    factor = np.float32(scale.get(name, 1.0))
                    yield name, rows if factor == 1 else (chunk * factor for chunk in rows)

    def _outputs(self, fold: Fold) -> dict[str, Iterable[Array]]:
        """The outputs of a fold in float32, unscaled, each in chunks of rows."""
        if fold.outputs.keys() <= self._folded_tower.keys():
            from fastvlm_mlx.convert.fold.peaks import view

            return {name: [view(self._folded_tower.pop(name))] for name in fold.outputs}
        if fold.function is None:
            (name,) = fold.outputs
            return {name: self._weights[name].chunks()}
        with np.errstate(all="ignore"):
            outputs = fold.function({target: self._weights[target].load() for target in fold.inputs})
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                norms = [target for target in fold.inputs if target.endswith("running_var")]
                tensors = [self._weights[target].tensor.name for target in norms or fold.inputs]
                raise CheckpointError(f"{name}: folding gives NaN or infinite values; look at {names(tensors)}")
        return {name: [values] for name, values in outputs.items()}

    def write(
        self, target: Path, *, calibration_images: Iterable[str | Path] = (), progress: Progress | None = None
    ) -> Plan:
        """Writes the folder `target`; returns the plan with its scales and hashes filled in.

        Args:
            target: A folder that does not exist yet or is empty.
            calibration_images: Images to measure the tower's range on for float16.
            progress: Called with the bytes done, the bytes in all and a label of the current step.

        Raises:
            CheckpointError: If the source is damaged.
            ConversionError: If there is no room for the folder, or a weight does not fit the dtype.
            ImageError: If a calibration image cannot be read.
        """
        planned = self.plan()
        with partial_folder(target, planned.output_bytes) as folder:
            return self._write(folder, target.name, planned, calibration_images, progress)

    def _write(
        self, folder: Path, title: str, planned: Plan, images: Iterable[str | Path], progress: Progress | None
    ) -> Plan:
        """Writes every file into `folder`."""
        meter = Meter(planned.source_bytes + planned.output_bytes, progress)
        hashes = {
            f"{prefix}sha256": checkpoint.source.sha256(lambda count: meter.advance(count, "reading"))
            for prefix, checkpoint in zip(("", "vision_"), self._checkpoints, strict=False)
        }
        scaling = Scaling.of(self._vision.scales)
        if self._dtype == "float16":
            scaling = self.calibrate(images, meter.notify)
        finished = planned.with_config(
            source={**planned.config.source, **hashes}, vision_config=replace(self._vision, scales=scaling.scales)
        )
        with ShardWriter(folder, finished.shards) as out:
            for name, rows in self.tensors(scaling):
                out.write(name, rows, lambda count: meter.advance(count, "writing"))
        self._write_small_files(folder, title, finished)
        return finished

    def _write_small_files(self, folder: Path, title: str, finished: Plan) -> None:
        """Writes the config, the processor's files, licences and the model card."""
        source, config = self._main.source, finished.config
        copy_licences((checkpoint.source.folder for checkpoint in self._checkpoints), folder)
        terms = licences(folder)
        FastVLMProcessor(self._main.tokenizer, config).save(folder)
        generation = {**(source.json("generation_config.json") or {}), "eos_token_id": list(config.eos_token_id)}
        write_json(folder / "config.json", config.to_dict())
        write_json(folder / "generation_config.json", generation)
        write_json(folder / INDEX_FILE, index(finished.shards))
        readme = card(config, finished.parameters, finished.layout, title, terms)
        (folder / "README.md").write_text(readme, encoding="utf-8")


def _part_name(name: str, part: str) -> str:
    """The name of a part of the quantized layer with the weight `name`."""
    return f"{name.removesuffix('weight')}{part}"


def _can_stay_packed(target: str, weight: Weight) -> bool:
    """Whether a quantized weight can stay as it is."""
    # MLX dequantizes an embedding to bfloat16 in every mode but affine.
    affine = weight.packing is not None and weight.packing.mode == "affine"
    return target.startswith(_PACKED_MODULES) and (affine or target != f"{EMBEDDING}.weight")


def _quantization(kept: dict[str, Weight]) -> QuantizationConfig | None:
    """The quantization of the weights that stay quantized."""
    layers = {
        name.removesuffix(".weight"): LayerQuantization(
            group_size=weight.packing.group_size, bits=weight.packing.bits, mode=weight.packing.mode
        )
        for name, weight in kept.items()
        if weight.packing
    }
    return QuantizationConfig.of(layers) if layers else None
