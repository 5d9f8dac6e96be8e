import pytest

from fastvlm_mlx.bench.images import Pictures
from fastvlm_mlx.errors import ImageError
from tests.checkpoints import APPLE


def test_pictures_differ_and_keep_the_format_of_their_source() -> None:
    source = APPLE / "images" / "landscape.png"
    pictures = Pictures(source.read_bytes())
    assert pictures(1) == pictures(1) != pictures(2)
    assert pictures(1).startswith(b"\x89PNG")
    assert Pictures()(1).startswith(b"\xff\xd8")
    with pytest.raises(ImageError, match=r"notes\.txt: "):
        Pictures(b"no picture", "notes.txt")
