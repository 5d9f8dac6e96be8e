import io
import sys
from importlib.util import find_spec

import pytest
from PIL import Image

from fastvlm_mlx.bench.images import HEIF, Images
from fastvlm_mlx.errors import ConfigError, ImageError
from fastvlm_mlx.inputs.images import load_image
from tests.checkpoints import APPLE


@pytest.mark.parametrize(("megapixels", "size"), [(1.2, (1280, 960)), (12, (4032, 3024)), (0.01, (128, 96))])
def test_synthetic_images_have_the_size_of_a_camera(megapixels: float, size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(Images(megapixels=megapixels)(0))) as image:
        assert image.size == size


def test_images_differ_and_keep_the_format_of_their_source() -> None:
    source = APPLE / "images" / "landscape.png"
    images = Images(source.read_bytes())
    assert images(1) == images(1) != images(2)
    assert images(1).startswith(b"\x89PNG")
    synthetic = Images()
    assert synthetic(1) == Images()(1) != synthetic(2)
    assert synthetic(1).startswith(b"\xff\xd8")
    assert Images(form="WEBP")(1)[8:12] == b"WEBP"
    with pytest.raises(ImageError, match=r"notes\.txt: "):
        Images(b"no image", "notes.txt")


def test_images_in_heic_need_a_program_that_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ConfigError, match=r"written by pillow-heif, which is not installed: pip install pillow-heif$"):
        Images(form=HEIF)


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="pillow-heif is not installed")
def test_images_in_heic_are_what_the_package_reads() -> None:
    images = Images(megapixels=0.01, form=HEIF)
    assert images(1)[4:12] == b"ftypheic"
    assert load_image(images(1)).size == (128, 96)
