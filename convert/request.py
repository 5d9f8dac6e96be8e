"""Checks a whole request, from conversion to export, and plans it from headers alone, without MLX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.arguments import check_kind, items
from fastvlm_mlx.checkpoint.safetensors import ITEM_BYTES
from fastvlm_mlx.convert.arrays import DTYPES
from fastvlm_mlx.convert.compare.gates import Gate
from fastvlm_mlx.convert.conversion import plan
from fastvlm_mlx.convert.export.configs import check_exportable, check_readable
from fastvlm_mlx.convert.plan import Plan
from fastvlm_mlx.convert.quantize.scheme import BitAllocation, Quantization, kept_lines
from fastvlm_mlx.errors import ConversionError
from fastvlm_mlx.formatting import readable_bytes


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request that can be carried out; `str` gives it in a user's words.

    Attributes:
        conversion: The plan of the conversion.
        quantization: How to quantize; None to leave it out.
        allocation: The layers to quantize; None without quantization.
        mlx_vlm: Whether to write mlx-vlm's format.
    """

    conversion: Plan
    quantization: Quantization | None
    allocation: BitAllocation | None
    mlx_vlm: bool

    @property
    def output_bytes(self) -> float:
        """Bytes of the tensors written, apart from what mlx-vlm's format adds to them."""
        size: float = self.conversion.output_bytes
        if self.quantization is not None and self.allocation is not None:
            weights = {path: self.allocation.weights(path) for path in self.allocation.layers}
            size -= ITEM_BYTES[DTYPES[self.conversion.config.dtype]] * sum(weights.values())
            if self.quantization.target_bpw is not None:
                size += self.quantization.target_bpw * sum(weights.values()) / 8
            else:
                size += sum(map(self.allocation.bits, weights)) / 8
        return size

    def __str__(self) -> str:
        lines = [str(self.conversion)]
        if self.quantization is not None and self.allocation is not None:
            count, size = len(self.allocation.layers), readable_bytes(self.output_bytes)
            total = count + len(self.allocation.kept)
            lines.append(f"{'then quantize':<13} {self.quantization.name}: {count} of {total} layers, {size} in all")
            lines += [f"{'':<13} {line}" for line in kept_lines(self.allocation.kept)]
        if self.mlx_vlm:
            lines.append(f"{'then export':<13} for mlx-vlm and mlx-swift-lm")
        return "\n".join(lines)


def planned_request(
    source: str | Path,
    *,
    quantization: Quantization | None = None,
    mlx_vlm: bool = False,
    dtype: str = "float16",
    revision: str | None = None,
    vision_from: str | Path | None = None,
    dequantize: bool = False,
    tie_word_embeddings: bool | None = None,
    calibration: Sequence[str | Path] = (),
    gates: Sequence[str] = (),
) -> Planned:
    """Plans a request; arguments as for `convert_and_quantize`.

    Raises:
        CheckpointError: If the source is missing, incomplete, damaged or of an unknown layout.
        ConversionError: If the request is impossible, or a part of it would change nothing.
    """
    gates = items(gates, "gates", "a list of conditions")
    for gate in gates:
        Gate.parse(gate)
    if quantization is not None:
        check_kind(quantization, "quantization", Quantization, "a Quantization or None")
    if gates and quantization is None:
        raise ConversionError("a gate is a condition on what quantization costs, and nothing is to be quantized")
    if calibration and quantization is None and dtype != "float16":
        raise ConversionError(
            f"calibration images would change nothing: {dtype} needs no scaling, and nothing is to be quantized"
        )
    planned = plan(
        source,
        dtype=dtype,
        revision=revision,
        vision_from=vision_from,
        dequantize=dequantize,
        tie_word_embeddings=tie_word_embeddings,
    )
    if dequantize and not planned.dequantized:
        raise ConversionError(f"{source}: is not quantized; there is nothing to dequantize")
    allocation = None
    if quantization is not None:
        if planned.kept_quantized or planned.dequantized:
            raise ConversionError(
                f"{source}: is quantized already; quantize what it was made from, or dequantize it first"
            )
        allocation = quantization.allocate(planned.config)
        if mlx_vlm:
            check_exportable(allocation.layers)
    if mlx_vlm:
        check_readable(planned.config.vision_config)
    return Planned(conversion=planned, quantization=quantization, allocation=allocation, mlx_vlm=mlx_vlm)
