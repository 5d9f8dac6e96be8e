"""Products in blocks, padded and as they are: the values of plain products, whatever the sizes are."""

import numpy as np
import pytest

from fastvlm_mlx.backend import BLAS, mx, nn
from fastvlm_mlx.model.cpu import products
from fastvlm_mlx.model.cpu.products import FEW_ROWS, are_few, product
from fastvlm_mlx.model.rows import row_parts
from fastvlm_mlx.streams import turn


@pytest.mark.parametrize("rows", [1, 3, 16, FEW_ROWS, FEW_ROWS + 2, 95, 97])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(1, 7), (5, 64), (1152, 896), (3000, 896), (448, 4864), (70, 16_000), (40, 70_000)],
)
def test_every_form_gives_the_values_of_one_product(rows: int, outputs: int, inputs: int) -> None:
    """Several blocks on each stream, a block and a rest, a rest alone, no small block; more rows."""
    rng = np.random.default_rng(0)
    x, weight = (mx.array(rng.standard_normal(shape, np.float32)) for shape in ((rows, 1, inputs), (outputs, inputs)))
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T
    with turn():
        products = np.array(product(x, weight))
    assert products.shape == (rows, 1, outputs)
    # Rounding of sums of so many products, each of about 1.
    np.testing.assert_allclose(products, exact, rtol=1e-5, atol=2e-6 * inputs**0.5 * 4)


@pytest.mark.parametrize(
    ("name", "uses_blocks"), [("OpenBLAS", True), ("/opt/libopenblas.so", True), ("Accelerate", False)]
)
def test_only_few_rows_in_float32_are_multiplied_in_blocks(
    monkeypatch: pytest.MonkeyPatch, name: str, uses_blocks: bool
) -> None:
    monkeypatch.setattr(products, "blas", lambda: BLAS(name=name))
    assert are_few(mx.zeros((FEW_ROWS, 1, 4))) == uses_blocks
    assert not are_few(mx.zeros((1, FEW_ROWS + 1, 4)))
    assert not are_few(mx.zeros((1, 1, 4), mx.float16))


def test_the_parts_of_a_layer_compute_its_rows() -> None:
    layer = nn.Linear(64, 24)
    quantized = layer.to_quantized(64, 4)
    x = mx.random.normal((3, 64))
    for whole in (layer, quantized):
        parts = row_parts(whole, (16, 4, 4))
        np.testing.assert_allclose(mx.concatenate([part(x) for part in parts], axis=-1), whole(x), atol=1e-6)
