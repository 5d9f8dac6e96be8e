"""Quantizes a converted checkpoint and reports what that cost."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.arguments import check_callable, check_kind, file_path, items
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.convert.arrays import DTYPES, Packed, float32
from fastvlm_mlx.convert.compare.agreement import Agreement, Reference
from fastvlm_mlx.convert.compare.gates import Gate
from fastvlm_mlx.convert.compare.probes import CALIBRATION_SEEDS, Probes, image_files
from fastvlm_mlx.convert.compare.weights import WeightError
from fastvlm_mlx.convert.conversion import check_converted
from fastvlm_mlx.convert.parts import by_part
from fastvlm_mlx.convert.progress import Meter, Progress
from fastvlm_mlx.convert.quantize.auto_bits import allocate_bits, sensitivities
from fastvlm_mlx.convert.quantize.calibrated import compensate
from fastvlm_mlx.convert.quantize.report import QuantizationReport, layers_report, part_reports
from fastvlm_mlx.convert.quantize.rounding import rounded
from fastvlm_mlx.convert.quantize.scheme import AUTO, BitAllocation, Quantization
from fastvlm_mlx.convert.source.layouts import describe
from fastvlm_mlx.convert.source.source import Source, open_source
from fastvlm_mlx.convert.write.card import card
from fastvlm_mlx.convert.write.destination import partial_folder, vacant
from fastvlm_mlx.convert.write.files import (
    INDEX_FILE,
    REPORT_FILE,
    REPORTS,
    copy_small_files,
    folder_bytes,
    licences,
    write_json,
)
from fastvlm_mlx.convert.write.shards import ShardWriter, index, shards
from fastvlm_mlx.convert.write.units import Stored, fused
from fastvlm_mlx.errors import CheckpointError, ConversionError
from fastvlm_mlx.inputs.processor import FastVLMProcessor
from fastvlm_mlx.streams import free_unused_memory, own_stream

Compensated = Mapping[str, tuple[Packed, WeightError]]
"""The layers that GPTQ has quantized, with their errors, by path."""


@own_stream()
def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    quantization: Quantization,
    *,
    calibration: Iterable[str | Path] = (),
    gates: Sequence[str] = (),
    progress: Progress | None = None,
) -> QuantizationReport:
    """Writes the converted checkpoint `source` to the folder `destination`, quantized; returns a report.

    The folder appears when it is complete and meets the gates. The source is only read.

    Args:
        source: A folder in this project's format, not quantized.
        destination: A folder that does not exist yet or is empty.
        quantization: The request.
        calibration: Images, or folders of them, to measure on in addition to the built-in ones.
        gates: Conditions on the report, such as `top1>=0.95`.
        progress: Called with the bytes done, the bytes in all and a label of the current step.

    Raises:
        CheckpointError: If the source is incomplete or damaged.
        ConversionError: If the request is impossible.
        GateError: If a gate is not met; nothing is written then.
        ImageError: If a calibration image cannot be read.
    """
    check_kind(quantization, "quantization", Quantization, "a Quantization")
    check_callable(progress, "progress")
    gates = items(gates, "gates", "a list of conditions")
    for gate in gates:
        Gate.parse(gate)
    images = image_files(calibration)
    folder, target = Path(os.path.expanduser(file_path(source, "source"))), vacant(destination)
    config = ModelConfig.from_path(folder)
    if config.quantization:
        raise ConversionError(
            f"{folder}: is quantized already ({config.quantization.default.bits} bits); quantize what it was made "
            "from, or dequantize it first (fastvlm quantize --dequantize)"
        )
    allocation = quantization.allocate(config)
    check_converted(folder)
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(folder)).in_parts(config.text_config)
        needed = sum(stored.nbytes for _, stored in _stored(opened, config.dtype, allocation))
        out = stack.enter_context(partial_folder(target, needed))
        meter = Meter(opened.nbytes, progress)
        processor = FastVLMProcessor.from_folder(folder)
        probes = [Probes.of(processor, images)]
        if quantization.method == "gptq":
            probes.append(Probes.of(processor, images, CALIBRATION_SEEDS))
        references = Reference.of(folder, probes, meter.notify)
        if not all(np.isfinite(reference.logits).all() for reference in references):
            raise CheckpointError(
                f"{folder}: gives no numbers (its logits are NaN or infinite), with which a quantization could be "
                "compared; convert it again, with another --dtype or from an undamaged source"
            )
        reference, answers = references[0], references[-1].answers
        del references  # the logits of long calibration answers take much memory
        free_unused_memory()
        allocation, compensated = _calibrated(folder, quantization, allocation, probes, answers, meter)
        errors = write_weights(opened, out, config.dtype, allocation, compensated, meter)
        del compensated
        quantized = replace(config, quantization=allocation.config())
        copy_small_files(folder, out)
        write_json(out / "config.json", quantized.to_dict())
        meter.notify("comparing with the source")
        with open_source(out) as written:
            result = written.in_parts(config.text_config)
            parts = part_reports(opened, result, errors)
            layers = layers_report(opened, result, errors, allocation.layers.keys())
        report = QuantizationReport(
            quantization=quantization.name,
            parts=parts,
            quantized_layers=layers,
            target_bpw=quantization.target_bpw,
            kept=allocation.kept,
            agreement=Agreement.of(load_model(out), probes[0], reference),
            folder_bytes_before=folder_bytes(folder, without=REPORTS),
            folder_bytes_after=folder_bytes(out, without=REPORTS),
            gates=tuple(gates),
        )
        report.check_gates()
        write_json(out / REPORT_FILE, report.to_dict())
        parameters = by_part({name: tensor.size for name, tensor in opened.tensors.items()})
        layout = describe(str(config.source.get("layout", "")))
        text = card(quantized, parameters, layout, target.name, licences(out), report.markdown())
        (out / "README.md").write_text(text, encoding="utf-8")
    return report


def _calibrated(
    folder: Path,
    quantization: Quantization,
    allocation: BitAllocation,
    probes: Sequence[Probes],
    answers: npt.NDArray[np.int32],
    meter: Meter,
) -> tuple[BitAllocation, Compensated]:
    """The allocation with measured bits where the preset asks for them, and the layers that GPTQ quantizes.

    Loads the exact model, in float32, if the request needs it. GPTQ calibrates on the last of `probes`, to which the
    exact model gave `answers` (B, T).
    """
    if quantization.preset != AUTO and quantization.method != "gptq":
        return allocation, {}
    exact = load_model(folder, dtype="float32", lazy=True, in_parts=True)
    if quantization.preset == AUTO:
        assert quantization.target_bpw is not None
        measured = meter.layers(len(allocation.layers), "measuring layers")
        effects = sensitivities(exact, allocation, probes[0], measured)
        allocation = allocate_bits(effects, allocation, quantization.target_bpw)
    if quantization.method != "gptq":
        return allocation, {}
    compensated = meter.layers(len(allocation.linears), "compensating layers")
    return allocation, compensate(exact, allocation, probes[-1], answers, compensated)


def write_weights(
    source: Source, folder: Path, dtype: str, allocation: BitAllocation, compensated: Compensated, meter: Meter
) -> dict[str, WeightError]:
    """Writes the weights of `source` to `folder`, quantized; returns the error of each tensor or layer by its path.

    Args:
        source: The checkpoint.
        folder: The folder of the result.
        dtype: The dtype of the scales: `float16`, `bfloat16` or `float32`.
        allocation: The scheme of each layer.
        compensated: The layers that are quantized already; others are rounded.
        meter: Counts the bytes read.
    """
    files = shards(fused(dict(_stored(source, dtype, allocation))))
    errors: dict[str, WeightError] = {}
    with ShardWriter(folder, files) as out:
        for name, tensor in source.tensors.items():
            path = name.removesuffix(".weight")
            scheme = allocation.layers.get(path)
            if scheme is None:
                values = tensor.read()
                errors[path] = WeightError(0.0, float(np.square(float32(values, tensor.dtype)).sum()))
                out.write(name, [values], lambda count: meter.advance(count, "quantizing"))
                continue
            parts, errors[path] = compensated[path] if path in compensated else rounded(tensor, scheme)
            for part, values in parts.items():
                out.write(f"{path}.{part}", [values], lambda _: None)
            meter.advance(tensor.nbytes, "quantizing")
    write_json(folder / INDEX_FILE, index(files))
    return errors


def _stored(source: Source, dtype: str, allocation: BitAllocation) -> Iterator[tuple[str, Stored]]:
    """The tensors of the result, in order."""
    for name, tensor in source.tensors.items():
        path = name.removesuffix(".weight")
        scheme = allocation.layers.get(path)
        if scheme is None:
            yield name, Stored(tensor.dtype, tensor.shape)
            continue
        rows, columns = tensor.shape
        groups = (rows, columns // scheme.group_size)
        yield name, Stored("U32", (rows, columns * scheme.bits // 32))
        if scheme.mode == "affine":
            yield f"{path}.scales", Stored(DTYPES[dtype], groups)
            yield f"{path}.biases", Stored(DTYPES[dtype], groups)
        else:
            yield f"{path}.scales", Stored("U8", groups)
