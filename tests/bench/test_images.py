import io

import pytest
from PIL import Image

from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.errors import ImageError
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
    assert Images()(1).startswith(b"\xff\xd8")
    with pytest.raises(ImageError, match=r"notes\.txt: "):
        Images(b"no image", "notes.txt")
