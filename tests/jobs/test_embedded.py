"""Descriptions inside pictures: nothing else in a file changes, and what cannot be kept whole is left alone."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs import embedded
from fastvlm_mlx.jobs.embedded import NotEmbeddedError, embed, read_embedded
from fastvlm_mlx.jobs.sidecars import Outcome
from fastvlm_mlx.jobs.xmp import read_xmp, with_description

GENERATOR = "fastvlm-mlx, demo"
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"http://ns.adobe.com/xap/1.0/\0"


def exif() -> bytes:
    data = Image.Exif()
    data[0x010F], data[0x0112] = "Canon", 6
    return data.tobytes()


def picture(mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (31, 22)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), np.uint8), "RGBA").convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def status(path: Path) -> tuple[int, ...]:
    """What a file's system knows of it, but for the time of the last access: reading may change that."""
    status = path.stat()
    return status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


JPEG = saved(picture(), "JPEG", exif=exif(), icc_profile=ICC)
PNG = saved(picture("RGBA"), "PNG", icc_profile=ICC)
WEBP = saved(picture(), "WEBP")
PALETTE = picture("RGB").quantize(16)


def random_picture(number: int, *, fill: bool = True) -> tuple[str, bytes]:
    """A JPEG, PNG or WebP file of a random structure; whether there may be fill bytes between segments."""
    rng = random.Random(number)
    extras: dict[str, Any] = {}
    if rng.random() < 0.5:
        extras["icc_profile"] = ICC
    if rng.random() < 0.5:
        extras["exif"] = exif()
    kind = ("JPEG", "PNG", "WEBP")[number % 3]
    if kind == "JPEG":
        options = {"progressive": rng.random() < 0.5, "restart_marker_blocks": rng.choice([0, 1]), "comment": b"by me"}
        data = saved(picture(rng.choice(["RGB", "L", "CMYK"]), number), kind, **options, **extras)
        for _ in range(rng.randint(0, 3)):
            content = rng.choice([b"FPXR\0", b"Ducky", b"Photoshop 3.0\0"]) + rng.randbytes(rng.randint(0, 99))
            place = 2 if rng.random() < 0.3 else data.index(b"\xff\xdb")
            data = (
                data[:place]
                + b"\xff" * (rng.randint(0, 2) * fill)
                + segment(rng.choice([0xE2, 0xEC, 0xED, 0xFE]), content)
                + data[place:]
            )
        return "jpg", data + rng.choice([b"", b"\0\0", b"\n"])
    if kind == "PNG":
        image = rng.choice([picture(rng.choice(["RGB", "RGBA", "L", "LA", "1"]), number), PALETTE])
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("Title", "Ä picture", zip=rng.random() < 0.5)
        options = {"save_all": True, "append_images": [image.copy()]} if rng.random() < 0.3 else {}
        return "png", saved(image, kind, pnginfo=texts, **options, **extras)
    mode = rng.choice(["RGB", "RGBA"])
    options = {"lossless": rng.random() < 0.5}
    if rng.random() < 0.3:
        options |= {"save_all": True, "append_images": [picture(mode, number + 1)]}
    return "webp", saved(picture(mode, number), kind, **options, **extras)


def frames(data: bytes) -> list[tuple[str, bytes]]:
    """The mode and the samples of each frame, and what else a decoder finds."""
    found = []
    with Image.open(io.BytesIO(data)) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            found.append((image.mode, image.tobytes()))
        found.append((repr(image.info.get("icc_profile")), image.getexif().tobytes()))
    return found


def riff(data: bytes) -> list[bytes]:
    """The chunks of a WebP file but those that the XMP changes."""
    chunks, place = [], 12
    while place < len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length + length % 2
        if name not in (b"VP8X", b"XMP "):
            chunks.append(data[place:end])
        place = end
    return chunks


def kept(before: bytes, after: bytes) -> bool:
    """Whether all bytes of a file are in another one, in their order, with something between them at one place."""
    if before[:4] == b"RIFF":
        return riff(before) == riff(after)
    return common(before, after) + common(before[::-1], after[::-1]) >= len(before)


def common(first: bytes, second: bytes) -> int:
    """How many bytes two files begin with both."""
    length = min(len(first), len(second))
    return next((place for place in range(length) if first[place] != second[place]), length)


def test_forty_random_pictures_keep_all_that_they_hold(tmp_path: Path) -> None:
    for number in range(40):
        name, before = random_picture(number)
        path = tmp_path / f"{number:02}.{name}"
        path.write_bytes(before)
        outcome, sha256 = embed(str(path), f"Ä “dog” & cat {number}.", generator=GENERATOR)
        after = path.read_bytes()
        assert (outcome, sha256) == (Outcome.WRITTEN, hashlib.sha256(after).hexdigest())
        assert kept(before, after)
        assert frames(before) == frames(after)
        assert read_xmp(read_embedded(after)).description == f"Ä “dog” & cat {number}."
        assert embed(str(path), f"Ä “dog” & cat {number}.", generator="a later version") == (Outcome.UNCHANGED, None)
        assert embed(str(path), "A bird.", generator=GENERATOR)[0] is Outcome.WRITTEN
        assert kept(before, path.read_bytes())
        assert read_xmp(read_embedded(path.read_bytes())).description == "A bird."
    assert len(list(tmp_path.iterdir())) == 40


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_exiftool_finds_the_descriptions(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
        for number in range(40):
            name, data = random_picture(number, fill=False)  # of which exiftool warns
            (folder / f"{number:02}.{name}").write_bytes(data)
    for number, path in enumerate(sorted(after.iterdir())):
        embed(str(path), f"Ä dog {number}.", generator=GENERATOR)
    command = ["exiftool", "-json", "-XMP:Description", "-Validate", "-Warning", "-Error", str(before), str(after)]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    found = {Path(each.pop("SourceFile")): each for each in report}
    for number, path in enumerate(sorted(after.iterdir())):
        assert found[path].pop("Description") == f"Ä dog {number}."
        assert found[path] == found[before / path.name]  # with the same warnings, and no new one


def with_xmp(kind: str, description: str) -> bytes:
    """A picture with XMP of somebody else."""
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:my="urn:my">'
        f"<my:rating>5</my:rating>{description}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()
    if kind == "jpg":
        return JPEG[:2] + segment(0xE1, XMP + packet) + JPEG[2:]
    if kind == "png":
        compressed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(packet)
        return PNG[:33] + chunk(b"iTXt", compressed) + PNG[33:]
    return saved(picture("RGBA"), "WEBP", xmp=packet)


HUMAN = '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">Mine.</rdf:li></rdf:Alt></dc:description>'


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_what_people_have_written_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(before := with_xmp(kind, HUMAN))
    assert embed(str(path), "A dog.", generator=GENERATOR) == (Outcome.KEPT, None)
    assert path.read_bytes() == before
    assert embed(str(path), "A dog.", generator=GENERATOR, overwrite=True)[0] is Outcome.WRITTEN
    assert read_xmp(read_embedded(path.read_bytes())).description == "A dog."
    path.write_bytes(with_xmp(kind, ""))
    assert embed(str(path), "A dog.", generator=GENERATOR)[0] is Outcome.WRITTEN
    assert frames(path.read_bytes()) == frames(before)
    assert b"<my:rating>5</my:rating>" in read_embedded(path.read_bytes())


def damaged(data: bytes, place: int = -30) -> bytes:
    return data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (JPEG[:-2], "damaged"),
        (JPEG[:-300], "damaged"),
        (JPEG[:40], "damaged"),
        (JPEG[:4] + b"\xff\xff" + JPEG[6:], "damaged"),
        (JPEG[:2] + b"\0" + JPEG[2:], "neither JPEG"),
        (JPEG + b"film", "have other data behind them"),
        (JPEG + JPEG, "have other data behind them"),
        (JPEG[:2] + segment(0xE2, b"MPF\0MM\0*") + JPEG[2:], r"several in one file \(MPF\)"),
        (JPEG[:2] + segment(0xEB, b"JP\0\1c2pa") + JPEG[2:], r"signed \(C2PA\)"),
        (JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0") + JPEG[2:], "several segments"),
        (JPEG[:2] + segment(0xE1, XMP + b"<a/>") * 2 + JPEG[2:], "XMP in several places"),
        (JPEG[:2] + segment(0xE1, XMP + b"<a/>") + JPEG[2:], "whose XMP cannot be read"),
        (
            JPEG[:2] + segment(0xE1, XMP + with_description(b"", "x" * 60000, generator="")[:9]) + JPEG[2:],
            "cannot be read",
        ),
        (PNG[:-12], "damaged"),
        (PNG[:-4], "damaged"),
        (damaged(PNG), "damaged"),
        (PNG + b"film", "have other data behind them"),
        (PNG[:33] + chunk(b"caBX", b"x") + PNG[33:], r"signed \(C2PA\)"),
        (PNG[:33] + chunk(b"zTXt", b"Raw profile type xmp\0\0x") + PNG[33:], "ImageMagick's form"),
        (PNG[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0x") + PNG[33:], "damaged"),
        (PNG[:33] + chunk(b"IHDR", PNG[16:29]) + PNG[33:], "damaged"),
        (PNG[:8] + PNG[33:], "damaged"),
        (WEBP[:-1], "damaged"),
        (WEBP + b"film", "damaged"),
        (WEBP[:4] + struct.pack("<I", len(WEBP) - 4) + WEBP[8:] + b"C2PA", "damaged"),
        (WEBP[:12] + b"ABCD" + WEBP[16:], "damaged"),
        (saved(picture(), "GIF"), "neither JPEG nor PNG nor WebP"),
        (b"", "neither JPEG"),
    ],
)
def test_what_cannot_be_kept_whole_is_left_alone(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    before = status(path)
    with pytest.raises(NotEmbeddedError, match=reason):
        embed(str(path), "A dog.", generator=GENERATOR)
    assert (path.read_bytes(), status(path)) == (data, before)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jpg"]


def test_damaged_pictures_are_never_made_worse(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "a.jpg"
    written = 0
    for number in range(150):
        data = bytearray(random_picture(number)[1])
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data))] if rng.random() < 0.2 else data
        path.write_bytes(data)
        try:
            embed(str(path), "A dog.", generator=GENERATOR)
        except NotEmbeddedError:
            assert path.read_bytes() == data
        else:
            written += 1
            assert kept(bytes(data), path.read_bytes())
    assert written > 10


def test_a_text_that_is_too_long_for_jpeg_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    with pytest.raises(NotEmbeddedError, match="too long for JPEG"):
        embed(str(path), "x" * 70000, generator=GENERATOR)
    assert path.read_bytes() == JPEG


def test_links_libraries_and_read_only_files_are_left_alone(tmp_path: Path) -> None:
    library = tmp_path / "My.photoslibrary"
    library.mkdir()
    for path in (tmp_path / "a.jpg", tmp_path / "two.jpg", library / "c.jpg", tmp_path / "fixed.jpg"):
        path.write_bytes(JPEG)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    os.link(tmp_path / "two.jpg", tmp_path / "three.jpg")
    (tmp_path / "fixed.jpg").chmod(0o444)
    for name, reason in {
        "link.jpg": "that are links",
        "two.jpg": "have several names",
        "My.photoslibrary/c.jpg": "in a Photos library",
        "fixed.jpg": "read-only",
    }.items():
        with pytest.raises(NotEmbeddedError, match=reason):
            embed(str(tmp_path / name), "A dog.", generator=GENERATOR)
        assert (tmp_path / name).read_bytes() == JPEG
    with pytest.raises(ConfigError, match=r"gone\.jpg: cannot be read \(No such file"):
        embed(str(tmp_path / "gone.jpg"), "A dog.", generator=GENERATOR)


def test_times_rights_and_attributes_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    path.chmod(0o640)
    os.utime(path, ns=(10**18, 10**18 + 123))
    try:
        os.setxattr(path, "user.tag", b"red")
    except (OSError, AttributeError):
        attributes = {}
    else:
        attributes = {"user.tag": b"red"}
    embed(str(path), "A dog.", generator=GENERATOR)
    assert path.read_bytes() != JPEG
    status = path.stat()
    assert (status.st_mtime_ns, status.st_mode & 0o777) == (10**18 + 123, 0o640)
    assert {name: os.getxattr(path, name) for name in attributes} == attributes


def test_a_picture_that_changes_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    shown = embedded._shown

    def meddle(data: bytes) -> tuple[object, ...]:
        path.write_bytes(PNG)
        return shown(data)

    monkeypatch.setattr(embedded, "_shown", meddle)
    with pytest.raises(ConfigError, match=r"a\.jpg: was changed by another program"):
        embed(str(path), "A dog.", generator=GENERATOR)
    assert path.read_bytes() == PNG
    assert [each.name for each in tmp_path.iterdir()] == ["a.jpg"]


def test_a_result_that_a_decoder_shows_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    monkeypatch.setattr(embedded, "_shown", lambda data: (hashlib.sha256(data).digest(),))
    with pytest.raises(NotEmbeddedError, match="would not be the same"):
        embed(str(path), "A dog.", generator=GENERATOR)
    assert path.read_bytes() == JPEG


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_picture_as_it_was(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ConfigError, match=r"a\.jpg: cannot be written \(No space left on device\)"):
        embed(str(path), "A dog.", generator=GENERATOR)
    assert path.read_bytes() == JPEG
    assert [each.name for each in tmp_path.iterdir()] == ["a.jpg"]


def test_a_kill_at_any_moment_leaves_a_whole_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(before := saved(picture(size=(600, 400)), "JPEG", exif=exif()))
    program = (
        "import itertools, sys; from fastvlm_mlx.jobs.embedded import embed; print('ready', flush=True)\n"
        "for n in itertools.count(): embed(sys.argv[1], f'Text {n}.', generator='')"
    )
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(number).uniform(0.01, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        after = path.read_bytes()
        assert kept(before, after)
        assert frames(before) == frames(after)
