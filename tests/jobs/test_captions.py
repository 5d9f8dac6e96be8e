import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.jobs.captions import FIELDS, PromptTemplate, exif_values, opening_length, path_values, remove_opening


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("The image shows a man in a red coat.", "A man in a red coat."),
        ("This image depicts two dogs.", "Two dogs."),
        ("the picture features\na boat", "A boat"),
        ("The photograph captures the moment of a jump.", "The moment of a jump."),
        ("The image prominently displays: a sign.", "A sign."),
        ("The image shows that the shop is closed.", "The shop is closed."),
        ("The image is a photo of a cat.", "A cat."),
        ("The scene is of a market.", "A market."),
        ("This is a photo of an iPhone.", "An iPhone."),
        ("This is an image showing iPhone cases.", "iPhone cases."),
        ("A photo of 3 birds.", "3 birds."),
        ("A picture showing \u00e9clairs.", "\u00c9clairs."),
        ("In this image, there is a tree.", "There is a tree."),
        ("In the picture there are trees.", "There are trees."),
        ("In this photo, we can see that it rains.", "It rains."),
        ("In this photo you see a horse.", "A horse."),
        ("We can see a river.", "A river."),
        ("Sure! Here is a detailed description of the image: The image shows a lamp.", "A lamp."),
        ("Certainly, here\u2019s a caption: A lamp.", "A lamp."),
        ("**Caption:** The image shows a lamp. The image is dark.", "A lamp. The image is dark."),
        ("  The image shows a lamp.", "A lamp."),
    ],
)
def test_opening_phrases_are_removed(caption: str, expected: str) -> None:
    assert remove_opening(caption) == expected
    assert caption[opening_length(caption) :].casefold() == expected.casefold()


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat sleeps on a chair.",
        "A man holding a picture of his dog.",
        "A black and white photo of a bridge.",
        "A painting of a lighthouse.",
        "The picture frame shows dust.",
        "The image of a saint hangs above the door.",
        "This image is blurry.",
        "This is a photo booth.",
        "In the picture gallery, two people talk.",
        "There is a dog. The image shows nothing else.",
        "Of course, a dog.",
        "Description of a dog",
        "We can seek",
        "The image shows ...",
        "The image shows",
    ],
)
def test_what_is_no_opening_phrase_stays(caption: str) -> None:
    assert remove_opening(caption) == caption


def test_a_prompt_is_made_for_each_picture() -> None:
    template = PromptTemplate(" {name}, {directory}: {{as it is}} {tags} {existing} ")
    assert template.fields == {"name", "directory", "tags", "existing"}
    values = {"name": "IMG_1", "directory": "trip", "existing": "{date} and {name}", "camera": "unused"}
    assert template.render(values) == "IMG_1, trip: {as it is}  {date} and {name}"
    assert PromptTemplate("{{{name}}}").render(values) == "{IMG_1}"
    assert PromptTemplate("Describe it.").fields == frozenset()
    assert all(PromptTemplate(f"{{{field}}}").fields == {field} for field in FIELDS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Describe {nme}.", r"the prompt has \{nme\} at character 10; the fields are \{name\}, \{directory\}, "),
        ("{name.__class__}", r"has \{name\.__class__\} at character 1"),
        ("{name!r}", r"has \{name!r\}"),
        ("{}", r"has \{\} at character 1"),
        ("{name", r"has \{ at character 1; .* write \{\{ and \}\} for braces"),
        ("a } b", r"has \} at character 3"),
        (" ", "the prompt is empty"),
    ],
)
def test_a_field_that_does_not_exist_is_an_error_that_lists_those_that_do(prompt: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        PromptTemplate(prompt)


def test_a_path_gives_name_and_folder() -> None:
    assert path_values("/home/trip 2024/IMG_1.v2.jpg") == {"name": "IMG_1.v2", "directory": "trip 2024"}
    assert path_values("/caf\udce9/a\nb.jpg") == {"name": "a b", "directory": "caf?"}


GPS: dict[int, Any] = {1: "N", 2: (48.0, 51.0, 30.132), 3: "W", 4: (2.0, 17.0, 40.128)}
"""Latitude and longitude, each with its hemisphere."""


def encoded(
    kind: str = "JPEG", details: dict[int, str] | None = None, gps: dict[int, Any] | None = None, **tags: str
) -> bytes:
    exif = Image.Exif()
    for name, tag in {"make": 0x010F, "model": 0x0110, "changed": 0x0132}.items():
        if name in tags:
            exif[tag] = tags[name]
    for tag, value in (details or {}).items():
        exif.get_ifd(0x8769)[tag] = value
    for tag, value in (gps or {}).items():
        exif.get_ifd(0x8825)[tag] = value
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def test_exif_gives_date_and_camera() -> None:
    taken = {0x9003: "2024:05:01 12:30:00"}
    data = encoded(details=taken, make="Canon", model="Canon EOS R5\0", changed="2025:01:01 00:00:00")
    assert exif_values(data) == {"date": "2024-05-01", "camera": "Canon EOS R5"}
    assert exif_values(encoded("PNG", make="Apple", model="iPhone 15")) == {"camera": "Apple iPhone 15"}
    assert exif_values(encoded(changed="2025:01:01 00:00:00")) == {"date": "2025-01-01"}
    assert exif_values(encoded(changed="0000:00:00 00:00:00")) == {}
    assert exif_values(encoded(changed="?", make="NIKON CORPORATION", model="NIKON D5")) == {"camera": "NIKON D5"}
    assert exif_values(encoded(gps=GPS)) == {"gps": "48.85837, -2.29448"}
    for damaged in (b"", b"no picture", data[:40], data.replace(b"Exif\0\0", b"Exif\0\0??")):
        assert exif_values(damaged) == {}


@pytest.mark.parametrize(
    "change",
    [
        {1: "?"},
        {2: (91.0, 0.0, 0.0)},
        {2: (48.0, 51.0)},
        {4: (IFDRational(0, 0), 17.0, 40.0)},
        {2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)},
    ],
)
def test_a_place_that_cannot_be_is_none(change: dict[int, Any]) -> None:
    assert exif_values(encoded(gps={**GPS, **change})) == {}


def test_exif_of_an_iphones_picture_gives_date_and_camera() -> None:
    data = (Path(__file__).parent.parent / "data" / "heic" / "camera.heic").read_bytes()
    assert exif_values(data) == {"date": "2024-05-01", "camera": "Apple iPhone 15"}
