"""From a converted checkpoint to a quantized one, with a report of what was lost."""

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import device, mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.checkpoint.safetensors import Tensor
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.compare.agreement import Agreement, Probes, Reference, picture_files
from fastvlm_mlx.convert.conversion import LICENCES, Meter, Progress
from fastvlm_mlx.convert.quantize.gptq import Packed
from fastvlm_mlx.convert.quantize.report import REPORT_FILE, Gate, LossReport, Squares, folder_bytes, part_losses
from fastvlm_mlx.convert.quantize.scheme import AUTO, Assignment, Quantization, Settings
from fastvlm_mlx.convert.source.source import Source, open_source
from fastvlm_mlx.convert.source.weights import float32
from fastvlm_mlx.convert.write import shards as writer
from fastvlm_mlx.convert.write.card import card
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.machine import cpu_threads
from fastvlm_mlx.model.cpu.quantized import column_slices

_CHUNK = 2**22
"""Weights quantized at a time on each stream."""


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    wanted: Quantization,
    *,
    calibration: Iterable[str | Path] = (),
    gates: Sequence[str] = (),
    progress: Progress | None = None,
) -> LossReport:
    """Writes the converted checkpoint `source` to the folder `destination`, quantized; returns what was lost.

    The folder appears when it is complete and meets the gates. The source is only read.

    Args:
        source: A folder in this project's format, not quantized.
        destination: A folder that does not exist yet or is empty.
        wanted: What is asked for.
        calibration: Pictures, or folders of them, to measure on beside the built-in ones.
        gates: Conditions on the report, such as `top1>=0.95`.
        progress: Called with bytes done, bytes in all and what is being done.

    Raises:
        CheckpointError: If the source is incomplete or damaged.
        ConversionError: If something cannot be done as asked, or a gate is not met.
        ImageError: If a calibration picture cannot be read.
    """
    conditions = [Gate.parse(text) for text in gates]
    pictures = picture_files(map(Path, calibration))
    folder, target = Path(source).expanduser(), vacant(destination)
    config = ModelConfig.from_path(folder)
    if config.quantization:
        raise ConversionError(
            f"{folder}: is quantized already ({config.quantization.default.bits} bits); quantize what it was made "
            "from, or dequantize it first (fastvlm quantize --dequantize)"
        )
    assignment = wanted.assign(config)
    with open_source(folder) as opened, partial_folder(target, opened.nbytes) as out:
        meter = Meter(opened.nbytes, progress or (lambda *_: None))
        probes = Probes.of(FastVLMProcessor.from_folder(folder), pictures)
        reference = Reference.of(folder, probes, lambda label: meter.advance(0, label))
        mx.clear_cache()
        if wanted.preset == AUTO:
            from fastvlm_mlx.convert.quantize.auto_bits import allot

            assert wanted.target_bpw is not None
            assignment = allot(folder, assignment, wanted.target_bpw, probes, lambda label: meter.advance(0, label))
        packed: Mapping[str, tuple[Packed, Squares]] = {}
        if wanted.method == "gptq":
            from fastvlm_mlx.convert.quantize.calibrated import compensate

            packed = compensate(folder, assignment, pictures, lambda label: meter.advance(0, label))
        squares = write_weights(opened, out, config, assignment, packed, meter)
        quantized = replace(config, quantization=assignment.config())
        copy_small_files(folder, out)
        write_json(out / "config.json", quantized.to_dict())
        meter.advance(0, "comparing with the source")
        with open_source(out) as result:
            parts = part_losses(opened, result, squares)
        report = LossReport(
            quantization=wanted.name,
            parts=parts,
            kept=assignment.kept,
            agreement=Agreement.of(load_model(out), probes, reference),
            folder_bytes_before=folder_bytes(folder),
            folder_bytes_after=folder_bytes(out),
        )
        for condition in conditions:
            condition.check(report)
        write_json(out / REPORT_FILE, report.to_dict())
        licences = sorted(path.name for path in out.iterdir() if LICENCES.match(path.name))
        parameters = {
            part: sum(tensor.size for name, tensor in opened.tensors.items() if name.startswith(part))
            for part in ("vision_tower", "mm_projector", "language_model")
        }
        layout = str(config.source.get("layout", ""))
        text = card(quantized, parameters, layout, target.name, licences, report.markdown())
        (out / "README.md").write_text(text, encoding="utf-8")
    return report


def write_weights(
    source: Source,
    folder: Path,
    config: ModelConfig,
    assignment: Assignment,
    packed: Mapping[str, tuple[Packed, Squares]],
    meter: Meter,
) -> dict[str, Squares]:
    """Writes the weights of `source` to `folder`, quantized; returns what that changed, by path.

    Args:
        source: The checkpoint.
        folder: Where to.
        config: Of the checkpoint.
        assignment: What each layer gets.
        packed: Layers that are quantized already, and what that changed.
        meter: Told how far it is.
    """
    files = writer.shards(dict(_planned(source, config, assignment)))
    squares: dict[str, Squares] = {}
    with writer.ShardWriter(folder, files) as out:
        for name, tensor in source.tensors.items():
            path = name.removesuffix(".weight")
            if path not in assignment.layers:
                values = tensor.read()
                squares[path] = 0.0, float(np.square(float32(values, tensor.dtype)).sum())
                out.copy(name, [values], lambda count: meter.advance(count, "quantizing"))
                continue
            settings = assignment.layers[path]
            parts, squares[path] = packed[path] if path in packed else rounded(tensor, settings)
            for part, values in parts.items():
                out.copy(f"{path}.{part}", [values], lambda _: None)
            meter.advance(tensor.nbytes, "quantizing")
    write_json(folder / "model.safetensors.index.json", writer.index(files))
    return squares


def _planned(source: Source, config: ModelConfig, assignment: Assignment) -> Iterator[tuple[str, writer.Stored]]:
    """What is going to be written, in order."""
    for name, tensor in source.tensors.items():
        path = name.removesuffix(".weight")
        settings = assignment.layers.get(path)
        if settings is None:
            yield name, writer.Stored(tensor.dtype, tensor.shape)
            continue
        rows, columns = tensor.shape
        groups = (rows, columns // settings.group_size)
        yield name, writer.Stored("U32", (rows, columns * settings.bits // 32))
        if settings.mode == "affine":
            yield f"{path}.scales", writer.Stored(writer.DTYPES[config.dtype], groups)
            yield f"{path}.biases", writer.Stored(writer.DTYPES[config.dtype], groups)
        else:
            yield f"{path}.scales", writer.Stored("U8", groups)


def rounded(tensor: Tensor, settings: Settings) -> tuple[Packed, Squares]:
    """A layer, each weight rounded to the nearest level, and what that changed; a part of the rows on each stream."""
    streams = _streams()
    rows, columns = tensor.shape
    step = max(1, min(_CHUNK // columns, -(-rows // len(streams))))
    parts: dict[str, list[npt.NDArray[np.generic]]] = {}
    change = norm = 0.0
    for first in range(0, rows, step * len(streams)):
        work = []
        for stream, start in zip(streams, range(first, rows, step), strict=False):
            exact = tensor.read(start, min(step, rows - start))
            with mx.stream(stream):
                work.append(_rounded(_array(exact, tensor.dtype), settings))
        mx.eval(work)
        for arrays, squares in work:
            for name, value in zip(("weight", "scales", "biases"), arrays, strict=False):
                parts.setdefault(name, []).append(_stored(value))
            change, norm = change + float(squares[0]), norm + float(squares[1])
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}, (change, norm)


def _array(values: npt.NDArray[np.generic], dtype: str) -> mx.array:
    return mx.array(values).view(mx.bfloat16) if dtype == "BF16" else mx.array(values)


def _stored(value: mx.array) -> npt.NDArray[np.generic]:
    return np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)


@functools.cache
def _streams() -> list[mx.Stream]:
    """A CPU stream of MLX is one thread."""
    return [mx.new_stream(mx.default_device()) for _ in range(cpu_threads() if device() == "cpu" else 1)]


def _rounded(exact: mx.array, settings: Settings) -> tuple[Sequence[mx.array], tuple[mx.array, mx.array]]:
    """The arrays of quantized weights, and the squares of the change and of the weights."""
    wide = exact.astype(mx.float32)  # a CPU is slow in half precision
    weight, *companions = mx.quantize(wide, settings.group_size, settings.bits, settings.mode)
    if settings.mode == "affine":
        stored = [companion.astype(exact.dtype) for companion in companions]
        companions = [companion.astype(mx.float32) for companion in stored]
    else:
        stored = companions
    scales, biases = companions[0], companions[1] if len(companions) > 1 else None
    slices = column_slices(weight, scales, biases, **asdict(settings))
    errors = [_square(wide[:, i :: len(slices)] - values) for i, values in enumerate(slices)]
    return (weight, *stored), (functools.reduce(mx.add, errors), _square(wide))


def _square(values: mx.array) -> mx.array:
    """The sum of the squares, as a product that the BLAS computes."""
    flat = values.reshape(1, -1)
    return (flat @ flat.T)[0, 0]


def copy_small_files(source: Path, target: Path) -> None:
    """Everything but weights and what is written anew."""
    anew = {"config.json", "README.md", "model.safetensors.index.json", REPORT_FILE}
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in anew:
            shutil.copyfile(file, target / file.name)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Writes a file as the other JSON files of a checkpoint are written."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
