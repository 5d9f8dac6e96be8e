import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fastvlm_mlx.errors import ConfigError
from fastvlm_mlx.jobs.xmp import XMP, read_xmp, with_description

RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
DC = 'xmlns:dc="http://purl.org/dc/elements/1.1/"'
GENERATOR = "fastvlm-mlx 0.1.0, demo"


def sidecar(inside: str = "", attributes: str = "", before: str = "") -> bytes:
    """A sidecar as Lightroom writes it, with comments, processing instructions and odd spaces."""
    return f"""{before}<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<!-- kept -->
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF {RDF}>
  <rdf:Description rdf:about="uuid:1 &amp; 2"   xmlns:crs='http://ns.adobe.com/camera-raw-settings/1.0/'
    {DC}
   crs:Name="line&#10;two" {attributes}>
   <?odd instruction?>{inside}
   <dc:subject><rdf:Bag><rdf:li>beach</rdf:li><rdf:li>Zo\u00eb &lt;3</rdf:li></rdf:Bag></dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
""".encode()


def alternatives(**texts: str) -> str:
    items = "".join(f'<rdf:li xml:lang="{lang.replace("_", "-")}">{text}</rdf:li>' for lang, text in texts.items())
    return f"<dc:description><rdf:Alt>{items}</rdf:Alt></dc:description>"


def write(data: bytes, text: str, **options: bool) -> bytes:
    written = with_description(data, text, generator=GENERATOR, **options)
    assert written is not None
    return written


OTHERS = {
    "new": b"",
    "spaces": b" \n",
    "Lightroom": sidecar(),
    "an empty description": sidecar(alternatives(x_default=" ")),
    "a description without a text": sidecar("<dc:description/>"),
    "a byte order mark": sidecar(before="\ufeff"),
    "a text without an end": sidecar(
        '<dc:description><rdf:Alt><rdf:li xml:lang="x-default"/></rdf:Alt></dc:description>'
    ),
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_a_description_is_added_replaced_and_left_when_somebody_edits_it(data: bytes) -> None:
    first = write(data, "A dog & a <cat>, caf\u00e9 ]]>.")
    tags = read_xmp(data).tags if data.strip() else ()
    assert read_xmp(first) == XMP("A dog & a <cat>, caf\u00e9 ]]>.", True, tags)
    assert write(first, "A dog & a <cat>, caf\u00e9 ]]>.") == first
    second = write(first, "Two dogs.")
    assert read_xmp(second) == XMP("Two dogs.", True, tags)
    assert write(second, "A dog & a <cat>, caf\u00e9 ]]>.") == first
    edited = second.replace(b"Two dogs.</rdf:li></rdf:Alt>", b"My two dogs.</rdf:li></rdf:Alt>")
    assert read_xmp(edited) == XMP("My two dogs.", False, tags)
    assert with_description(edited, "Three dogs.", generator=GENERATOR) is None
    assert read_xmp(write(edited, "Three dogs.", overwrite=True)) == XMP("Three dogs.", True, tags)


def test_everything_else_stays_as_it_is_to_the_byte() -> None:
    data = sidecar()
    written = write(data, "A dog.")
    start = data.index(b"</rdf:RDF>")
    assert written.startswith(data[:start])
    assert written.endswith(data[start:])
    assert b'<rdf:Description rdf:about="uuid:1 &amp; 2"' in written[start:]
    filled = sidecar(alternatives(x_default=""))
    empty = alternatives(x_default="").encode()
    before, after = filled.split(empty)
    assert write(filled, "A dog.").startswith(before)
    assert write(filled, "A dog.").endswith(after[after.index(b"</rdf:RDF>") :])


HUMAN = {
    "default": (sidecar(alternatives(x_default="Mine")), "Mine"),
    "another language": (sidecar(alternatives(de="Meins", x_default="")), "Meins"),
    "several languages": (sidecar(alternatives(de="Meins", x_default="Mine")), "Mine"),
    "plain": (sidecar("<dc:description>Mine</dc:description>"), "Mine"),
    "attribute": (sidecar(attributes='dc:description="Mine"'), "Mine"),
    "CDATA": (sidecar(alternatives(x_default="<![CDATA[<Mine>]]>")), "<Mine>"),
    "qualified": (sidecar(alternatives(x_default="<rdf:value>Mine</rdf:value>")), "Mine"),
    "a second block": (
        sidecar().replace(
            b"</rdf:RDF>",
            f'<rdf:Description rdf:about="" {DC}>{alternatives(x_default="Mine")}</rdf:Description></rdf:RDF>'.encode(),
        ),
        "Mine",
    ),
}


@pytest.mark.parametrize(("data", "text"), HUMAN.values(), ids=HUMAN)
def test_a_persons_text_stays_whatever_its_form(data: bytes, text: str) -> None:
    assert read_xmp(data) == XMP(text, False, ("beach", "Zo\u00eb <3"))
    assert with_description(data, "Another.", generator=GENERATOR) is None


@pytest.mark.parametrize("name", [name for name in HUMAN if name != "attribute"])
def test_overwrite_replaces_a_persons_text(name: str) -> None:
    assert read_xmp(write(HUMAN[name][0], "Another.", overwrite=True)) == XMP(
        "Another.", True, ("beach", "Zo\u00eb <3")
    )


def test_an_attribute_is_not_overwritten() -> None:
    with pytest.raises(ConfigError, match="holds its description as an attribute, which is not replaced"):
        with_description(HUMAN["attribute"][0], "Another.", generator=GENERATOR, overwrite=True)


def test_a_persons_translation_of_our_text_stays() -> None:
    ours = write(sidecar(), "A dog.").replace(
        b"A dog.</rdf:li></rdf:Alt>", b'A dog.</rdf:li><rdf:li xml:lang="de">Ein Hund.</rdf:li></rdf:Alt>'
    )
    again = write(ours, "A big dog.")
    assert again == ours.replace(b"A dog.", b"A big dog.")


def test_our_text_is_known_again_after_another_program_has_put_all_into_one_block() -> None:
    inside = alternatives(x_default="A\n  dog.")
    own = (
        '<fvlm:caption xmlns:fvlm="urn:fastvlm-mlx:xmp:1.0:"><rdf:Seq><rdf:li>A dog.</rdf:li></rdf:Seq></fvlm:caption>'
    )
    written = write(sidecar(inside + own), "Two dogs.")
    assert read_xmp(written) == XMP("Two dogs.", True, ("beach", "Zo\u00eb <3"))
    assert b"A dog." not in written


def test_what_xml_cannot_hold_is_left_out() -> None:
    assert read_xmp(write(b"", "a\0b\x0b\ud83dc\r\nd\ufffe \U0001f600 ")).description == "abc\nd \U0001f600"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Dear diary", "is not XMP in UTF-8 (syntax error"),
        (b"<x", "is not XMP in UTF-8 (unclosed token"),
        (sidecar().replace(b"</rdf:RDF>", b""), "is not XMP in UTF-8 (mismatched tag"),
        (b"<a/>", "is not XMP: it holds no rdf:RDF"),
        (f"<rdf:RDF {RDF}/>".encode(), "is not XMP: it holds no rdf:RDF"),
        (b"<rdf:RDF/>", "is not XMP in UTF-8 (unbound prefix"),
        (sidecar().decode().encode("utf-16"), "is not XMP in UTF-8 ('utf-8' codec"),
        (b'<?xml version="1.0" encoding="ISO-8859-1"?>' + sidecar()[45:], "is not XMP in UTF-8 but in ISO-8859-1"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "has a document type, which XMP has not"),
    ],
)
def test_what_is_no_xmp_is_refused(data: bytes, message: str) -> None:
    for action in (lambda: read_xmp(data), lambda: write(data, "A dog.")):
        with pytest.raises(ConfigError) as raised:
            action()
        assert str(raised.value).startswith(message)


# Read and written by a program that was not made here.

exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")


def run_exiftool(*arguments: str | Path) -> str:
    done = subprocess.run(["exiftool", *arguments], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


def tags_of(path: Path) -> dict[str, object]:
    (tags,) = json.loads(run_exiftool("-json", "-G1", "-struct", "-warning", "-error", "-XMP:all", path))
    return dict(tags)


@exiftool
@pytest.mark.parametrize("data", [OTHERS["new"], OTHERS["Lightroom"]], ids=["new", "Lightroom"])
def test_exiftool_reads_the_description_and_its_edits_are_respected(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "photo.xmp"
    path.write_bytes(write(data, "A dog & a <cat>, caf\u00e9."))
    tags = tags_of(path)
    assert tags["XMP-dc:Description"] == "A dog & a <cat>, caf\u00e9."
    assert tags["XMP-fvlm:Generator"] == [GENERATOR] or tags["XMP-fvlm:Generator"] == GENERATOR
    assert not [name for name in tags if name.startswith("ExifTool:")]
    run_exiftool("-q", "-overwrite_original", "-XMP-xmp:Rating=4", path)  # writes the whole file anew
    path.write_bytes(write(path.read_bytes(), "Two dogs."))
    tags = tags_of(path)
    assert (tags["XMP-dc:Description"], tags["XMP-xmp:Rating"]) == ("Two dogs.", 4)
    run_exiftool("-q", "-overwrite_original", "-XMP-dc:Description=Mine", path)
    assert with_description(path.read_bytes(), "Three dogs.", generator=GENERATOR) is None
