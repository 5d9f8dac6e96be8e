"""Scaling by powers of two keeps float16 in range and changes nothing."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from safetensors.numpy import load_file

from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import ActivationScales, StageScales, VisionConfig
from fastvlm_mlx.convert import conversion, convert_checkpoint
from fastvlm_mlx.convert.fold import peaks as calibration
from fastvlm_mlx.convert.fold.float16 import FLOAT16_MAX, MARGIN, Scaling, choose, factors, power_of_two
from fastvlm_mlx.model.vision import FastViTHD
from tests.checkpoints import GOLDEN, SOURCES, tensors

HOT = load_file(GOLDEN / "apple_hot" / "expected.safetensors")
IMAGES = ("landscape", "large", "portrait", "square", "tiny")


def projected(folder: Path, image: str, dtype: str) -> npt.NDArray[np.float32]:
    pixels = mx.array(np.moveaxis(HOT[f"{image}.pixel_values"], 0, -1)[None]).astype(getattr(mx, dtype))
    return np.array(load_model(folder, dtype=dtype).encode_image(pixels).astype(mx.float32))[0]


def test_a_hot_tower_stays_in_range_in_float16(tmp_path: Path) -> None:
    done = convert_checkpoint(SOURCES["apple-hot"], tmp_path / "out", dtype="float16")
    assert max(stage.stream for stage in done.config.vision_config.scales.stages) > 1
    for image in IMAGES:
        expected = HOT[f"{image}.projected"]
        # 1%: float16 keeps 11 bits, through some thirty layers
        np.testing.assert_allclose(
            projected(tmp_path / "out", image, "float16"), expected, rtol=0, atol=0.01 * np.abs(expected).max()
        )


def test_without_scaling_a_hot_tower_overflows_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "choose", lambda _: Scaling.of(ActivationScales.ones((1, 1, 1, 1, 2))))
    convert_checkpoint(SOURCES["apple-hot"], tmp_path / "out", dtype="float16")
    assert not np.isfinite(projected(tmp_path / "out", "landscape", "float16")).all()


def test_an_ordinary_tower_is_not_scaled(tmp_path: Path) -> None:
    done = convert_checkpoint(SOURCES["apple"], tmp_path / "out", dtype="float16")
    assert done.config.vision_config.scales == ActivationScales.ones((1, 2, 2, 1, 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_hot_tower_is_not_scaled_where_the_exponent_is_wide(tmp_path: Path, dtype: str) -> None:
    done = convert_checkpoint(SOURCES["apple-hot"], tmp_path / "out", dtype=dtype)
    assert done.config.vision_config.scales == ActivationScales.ones((1, 1, 1, 1, 2))


def test_converting_a_scaled_checkpoint_again_takes_the_scales_out(tmp_path: Path) -> None:
    convert_checkpoint(SOURCES["apple-hot"], tmp_path / "half", dtype="float16")
    done = convert_checkpoint(tmp_path / "half", tmp_path / "full", dtype="float32")
    assert done.config.vision_config.scales == ActivationScales.ones((1, 1, 1, 1, 2))
    convert_checkpoint(SOURCES["apple-hot"], tmp_path / "direct", dtype="float32")
    restored, direct = tensors(tmp_path / "full"), tensors(tmp_path / "direct")
    for name, value in direct.items():
        # float16's rounding, and its subnormals where a scaled weight is small
        np.testing.assert_allclose(restored[name], value, rtol=1e-3, atol=1e-3 * np.abs(value).max(), err_msg=name)


def test_calibrated_scales_are_the_same_after_a_second_conversion(tmp_path: Path) -> None:
    first = convert_checkpoint(SOURCES["apple-hot"], tmp_path / "first", dtype="float16")
    second = convert_checkpoint(tmp_path / "first", tmp_path / "second", dtype="float16")
    assert first.config.vision_config.scales == second.config.vision_config.scales
    once, twice = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    for name, value in once.items():
        np.testing.assert_array_equal(twice[name], value, err_msg=name)


def random_scaling(depths: tuple[int, ...]) -> Scaling:
    """Another power of two wherever there may be one."""
    exponents = iter(range(1, 100))

    def draw() -> float:
        return 2.0 ** (next(exponents) % 3 * 2)

    stages = []
    stem = (draw(), draw(), draw())
    for stage, depth in enumerate(depths):
        stream = draw() if stage else stem[2]
        downsample = (draw(), stream) if stage else ()
        stages.append(StageScales(stream=stream, downsample=downsample, hidden=tuple(draw() for _ in range(depth))))
    scales = ActivationScales(stem=stem, stages=tuple(stages), conv_exp=draw())
    return Scaling(scales, tuple(tuple(draw() for _ in range(depth)) for depth in depths))


def test_any_scaling_leaves_the_features_as_they_are() -> None:
    depths = (1, 2, 1, 2, 1)
    config = VisionConfig(embed_dims=(8, 16, 32, 64, 128), depths=depths, scales=ActivationScales.ones(depths))
    scaling = random_scaling(depths)
    plain, scaled = FastViTHD(config), FastViTHD(replace(config, scales=scaling.scales))
    generator = np.random.default_rng(0)
    weights = {
        name: mx.array(generator.standard_normal(value.shape).astype(np.float32) * (value[0].size + 1.0) ** -0.5)
        for name, value in tree_flatten(plain.parameters())
    }
    multiplied = factors(scaling)
    assert {f"vision_tower.{name}" for name in weights} >= {name for name in multiplied if "conv_exp.conv" in name}
    plain.update(tree_unflatten(list(weights.items())))
    scaled.update(
        tree_unflatten([(name, value * multiplied.get(f"vision_tower.{name}", 1.0)) for name, value in weights.items()])
    )
    pixels = mx.array(generator.random((1, 128, 192, 3), np.float32))
    expected = np.array(plain(pixels))
    # powers of two are exact; LayerNorm's eps differs in the last bits
    np.testing.assert_allclose(
        np.array(scaled(pixels)) * scaling.scales.conv_exp, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    peaks, divided = plain.activation_peaks(pixels), scaled.activation_peaks(pixels)
    for stage in range(5):
        name = f"stages.{stage}.blocks.0"
        stream = scaling.scales.stages[stage].stream
        assert divided[name].item() * stream == pytest.approx(peaks[name].item(), rel=1e-4)
        hidden = scaling.scales.stages[stage].hidden[0]
        inside = f"{name}.conv_ffn.fc1"
        assert divided[inside].item() * hidden == pytest.approx(peaks[inside].item(), rel=1e-4)


def test_every_scale_brings_its_own_activations_into_range() -> None:
    depths = (1, 2, 1, 2, 1)
    config = VisionConfig(embed_dims=(8, 16, 32, 64, 128), depths=depths, scales=ActivationScales.ones(depths))
    names = FastViTHD(config).activation_peaks(mx.zeros((1, 64, 64, 3)))
    assert choose(dict.fromkeys(names, 1.0)).scales == ActivationScales.ones(depths)
    for name in names:
        chosen = choose({**dict.fromkeys(names, 1.0), name: 1e6})
        values = [*chosen.scales.stem, chosen.scales.conv_exp, *(value for row in chosen.convolutions for value in row)]
        for stage in chosen.scales.stages:
            values += [stage.stream, *stage.downsample, *stage.hidden]
        # the tower's output is its last activation divided by the same scale; nothing else goes unscaled
        assert set(values) == ({1.0} if name == "conv_exp" else {1.0, 128.0}), name


@pytest.mark.parametrize(
    ("peak", "expected"),
    [(0.0, 1), (1.0, 1), (FLOAT16_MAX / MARGIN, 1), (FLOAT16_MAX / MARGIN * 1.01, 2), (6e5, 128), (1e30, 2.0**87)],
)
def test_the_smallest_power_of_two_is_taken(peak: float, expected: float) -> None:
    assert power_of_two(peak) == expected


def test_calibration_images_are_the_same_every_time_and_take_the_users() -> None:
    images = calibration.images([GOLDEN / "apple" / "images" / "portrait.png"])
    assert images.shape == (5, 256, 256, 3)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    np.testing.assert_array_equal(images[:4], calibration.images())
