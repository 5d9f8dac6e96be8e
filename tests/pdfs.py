"""PDFs for tests, written by hand: each page has the colour and the size that it is given."""

from collections.abc import Sequence

A4 = (595.0, 842.0)


def pdf(colours: Sequence[tuple[float, float, float]], size: tuple[float, float] = A4, *, extra: str = "") -> bytes:
    """A document with a page of each colour (0 to 1), with a black square in its left upper corner.

    Args:
        colours: Red, green and blue.
        size: Width and height in points.
        extra: More entries of each page, such as `/Rotate 90`.
    """
    width, height = size
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(colours)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(colours)}>>"]
    for number, (red, green, blue) in enumerate(colours):
        side = min(width, height) / 4
        drawing = f"{red} {green} {blue} rg 0 0 {width} {height} re f 0 g 0 {height - side} {side} {side} re f"
        place = f"/Parent 2 0 R/MediaBox[0 0 {width} {height}]/Contents {4 + 2 * number} 0 R{extra}"
        objects.append(f"<</Type/Page{place}>>")
        objects.append(f"<</Length {len(drawing)}>>stream\n{drawing}\nendstream")
    return assembled(objects)


def assembled(objects: Sequence[str], trailer: str = "") -> bytes:
    """The file of numbered objects, the first of which is the catalogue."""
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj{text}endobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return (
        data
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
            f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{len(data)}\n%%EOF"
        ).encode()
    )


def locked() -> bytes:
    """A document that nobody can open without its password."""
    key = "<" + "00" * 32 + ">"
    objects = ["<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[]/Count 0>>"]
    objects.append(f"<</Filter/Standard/V 1/R 2/O{key}/U{key}/P -4>>")
    return assembled(objects, "/Encrypt 3 0 R/ID[<00><00>]")
