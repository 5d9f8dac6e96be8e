from pathlib import Path

from PIL import Image

from fastvlm_mlx.jobs.duplicates import find_duplicates, pixels_digest


def test_duplicates_are_found_by_content(tmp_path: Path) -> None:
    for name, content in (("a", b"xx"), ("b", b"yy"), ("c", b"xx"), ("d", b"xxx"), ("e", b"yy"), ("f", b"xx")):
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in ("a", "b", "c", "d", "e", "f", "gone")]
    a, b, c, _, e, f, _ = paths
    assert find_duplicates(paths) == {c: a, f: a, e: b}


def test_equal_pixels_have_one_digest_whatever_the_file(tmp_path: Path) -> None:
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    digests = {pixels_digest(Image.open(tmp_path / name)) for name in ("a.png", "a.bmp")}
    assert len(digests) == 1
    assert pixels_digest(image.transpose(Image.Transpose.ROTATE_90)) not in digests
    assert pixels_digest(Image.frombytes("RGB", (30, 40), image.tobytes())) not in digests
