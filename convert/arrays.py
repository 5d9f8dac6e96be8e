"""Arrays as the converter handles them: float32 to compute with, and the forms in which safetensors files hold them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fastvlm_mlx.backend import mx

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Packed = dict[str, npt.NDArray[np.generic]]
"""The `weight`, `scales` and, where there are any, `biases` of a quantized layer, as stored."""

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""The dtypes a checkpoint can be stored in, and their names in safetensors."""


def float32(stored: npt.NDArray[Any], dtype: str) -> Array:
    """Float32 copies of values as a file holds them; `dtype` is safetensors' name, and BF16 comes as uint16 bits."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def to_mlx(stored: npt.NDArray[Any], dtype: str) -> "mx.array":
    """An MLX array of values as a file holds them; `dtype` is safetensors' name."""
    from fastvlm_mlx.backend import mx

    return mx.array(stored).view(mx.bfloat16) if dtype == "BF16" else mx.array(stored)


def from_mlx(value: "mx.array") -> npt.NDArray[np.generic]:
    """Values as a file holds them: bfloat16 as the uint16 of its bits."""
    from fastvlm_mlx.backend import mx

    return np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)


def dequantize(weight: "mx.array", scales: "mx.array", biases: "mx.array | None", **settings: Any) -> "mx.array":
    """The float32 weights that packed ones stand for.

    Args:
        weight: Packed, (O, I · bits / 32).
        scales: One per group.
        biases: One per group; None in the modes that have none.
        settings: `group_size`, `bits` and `mode`.
    """
    from fastvlm_mlx.backend import mx

    def wide(part: mx.array) -> mx.array:
        # affine scales in float32, or MLX would round the result to their dtype
        return part if part.dtype == mx.uint8 else part.astype(mx.float32)

    biases = None if biases is None else wide(biases)
    return mx.dequantize(weight, wide(scales), biases, **settings).astype(mx.float32)
