import pytest

from fastvlm_mlx.bench.images import Images
from fastvlm_mlx.errors import ImageError
from tests.checkpoints import APPLE


def test_images_differ_and_keep_the_format_of_their_source() -> None:
    source = APPLE / "images" / "landscape.png"
    images = Images(source.read_bytes())
    assert images(1) == images(1) != images(2)
    assert images(1).startswith(b"\x89PNG")
    assert Images()(1).startswith(b"\xff\xd8")
    with pytest.raises(ImageError, match=r"notes\.txt: "):
        Images(b"no image", "notes.txt")
