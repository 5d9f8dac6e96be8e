import pytest
from typer.testing import CliRunner

from fastvlm_mlx.backend import mx, nn
from fastvlm_mlx.bench.costs import Chip, Cost, chips, costs
from fastvlm_mlx.bench.graph import Kernel, count_launches, kernels
from fastvlm_mlx.checkpoint.released import full_size
from fastvlm_mlx.cli import app


@pytest.fixture(scope="module")
def released() -> dict[tuple[str, int], Cost]:
    return {(cost.part, cost.resolution): cost for cost in costs(full_size("0.5b"), [256, 1024])}


def blank(*shape: int) -> mx.array:
    return mx.broadcast_to(mx.array(0, mx.float16), shape)


def names(*launched: Kernel) -> list[str]:
    return [kernel.name for kernel in launched]


def test_the_compiled_tower_launches_at_most_420_kernels(released: dict[tuple[str, int], Cost]) -> None:
    compiled = released["vision tower", 1024].compiled
    if compiled is None:
        pytest.skip("MLX cannot compile here")
    assert compiled <= 420


def test_our_count_of_fused_kernels_is_that_of_mlx(released: dict[tuple[str, int], Cost]) -> None:
    for (part, _), cost in released.items():
        if cost.compiled is not None:
            assert len(cost.kernels) == pytest.approx(cost.compiled, abs=2), part
            assert cost.eager is not None
            assert cost.eager >= cost.compiled


def test_flops_are_those_of_the_architecture(released: dict[tuple[str, int], Cost]) -> None:
    tower, projector = released["vision tower", 1024].flops, released["projector", 1024].flops
    assert tower + projector == pytest.approx(489e9, rel=0.01)  # design figure of FastViTHD with its projector
    assert projector == 2 * 256 * (3072 * 896 + 896 * 896)
    assert released["vision tower", 256].flops == pytest.approx(tower / 16, rel=0.05)


def test_a_decode_step_reads_all_weights_of_the_decoder_once(released: dict[tuple[str, int], Cost]) -> None:
    weights = 2 * 494e6
    assert weights < released["decode step", 1024].bytes < 1.05 * weights


def test_views_launch_nothing_and_a_reshape_of_a_transposed_array_copies() -> None:
    def views(x: mx.array) -> mx.array:
        return mx.split(x.reshape(2, 4, 8).transpose(1, 0, 2)[None], 2, axis=1)[0]

    assert kernels(views, blank(8, 8)) == []
    assert names(*kernels(lambda x: views(x).reshape(-1), blank(8, 8))) == ["Copy"]
    assert kernels(lambda x: x[None].swapaxes(0, 1).reshape(-1), blank(8, 8)) == []


def test_elementwise_operations_are_one_kernel_that_reads_and_writes_once() -> None:
    def fused(x: mx.array, y: mx.array) -> mx.array:
        return mx.sigmoid(x * y) * x

    (kernel,) = kernels(fused, blank(16, 16), blank(16, 16))
    assert kernel.bytes == 3 * 16 * 16 * 2
    assert kernel.flops == 0


def test_a_product_counts_its_flops_and_its_bytes() -> None:
    (kernel,) = kernels(lambda x, w: x @ w.T, blank(4, 32), blank(16, 32))
    assert kernel == Kernel(name="Matmul", flops=2 * 4 * 16 * 32, bytes=2 * (4 * 32 + 16 * 32 + 4 * 16))


def test_a_concatenation_launches_one_kernel_for_each_part() -> None:
    assert names(*kernels(lambda x, y: mx.concatenate([x, y]), blank(4, 4), blank(4, 4))) == ["Concatenate"] * 2


@pytest.mark.parametrize(
    ("head_dim", "expected"), [(64, ["Depends"]), (32, ["Multiply", "Matmul", "Softmax", "Matmul"])]
)
def test_attention_is_one_kernel_where_metal_has_one(head_dim: int, expected: list[str]) -> None:
    def attention(x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=0.5)

    launched = kernels(attention, blank(1, 2, 8, head_dim))
    assert names(*launched) == expected
    assert sum(kernel.flops for kernel in launched) == 4 * 2 * 8 * 8 * head_dim


def test_counting_leaves_mlx_as_it_was() -> None:
    layer_norm, norm = mx.fast.layer_norm, nn.LayerNorm(8)
    assert count_launches(norm, blank(4, 8), compiled=False) is None  # nothing is compiled in it
    assert mx.fast.layer_norm is layer_norm


def test_the_roofline_takes_the_longer_of_arithmetic_and_memory() -> None:
    chip = Chip(name="test", tflops=1, bandwidth_gb_s=1)
    parts = (Kernel(name="a", flops=10**12, bytes=1), Kernel(name="b", flops=0, bytes=2 * 10**9))
    assert Cost(part="", resolution=64, kernels=parts, eager=2, compiled=2).roofline(chip) == pytest.approx(3.0)


def test_every_chip_has_published_peaks_with_their_source() -> None:
    known, sources = chips()
    assert {"M1", "M2 Max", "M3", "M4 Pro", "M5"} <= {chip.name for chip in known}
    assert all(chip.tflops > 0 and chip.bandwidth_gb_s > 0 for chip in known)
    assert "none of them measured" in sources
    assert "Apple" in sources


def test_the_command_prints_costs_and_rooflines() -> None:
    result = CliRunner().invoke(app, ["bench", "--cost", "--random-weights", "0.5b", "--resolution", "256"])
    assert result.exit_code == 0, result.stderr
    assert "vision tower  256" in result.stdout
    assert "TTFT 256 px" in result.stdout
    assert "published peaks, not measurements" in result.stdout
