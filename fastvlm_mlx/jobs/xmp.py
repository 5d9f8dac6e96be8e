"""XMP: reads the description in a packet, and writes it without a change to anything else in it.

A description is `dc:description` in the language `x-default`, where Lightroom, darktable, digiKam and others look for
it. A copy in a namespace of our own says that the text is ours: once somebody has edited the description, the two
differ, and the text is that person's.
"""

import re
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from fastvlm_mlx.errors import ConfigError

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NAMESPACES = {"dc": "http://purl.org/dc/elements/1.1/", "fvlm": "urn:fastvlm-mlx:xmp:1.0:", "rdf": _RDF}
_DESCRIPTION, _TAGS, _CAPTION, _GENERATOR = "dc:description", "dc:subject", "fvlm:caption", "fvlm:generator"
_NAMES = {
    f"{_NAMESPACES[name.split(':')[0]]} {name.split(':')[1]}": name
    for name in (_DESCRIPTION, _TAGS, _CAPTION, _GENERATOR)
}
"""The properties that matter, by the names that expat gives them."""
_LANGUAGE = "http://www.w3.org/XML/1998/namespace lang"
_EMPTY = f"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{_RDF}">
 </rdf:RDF>
</x:xmpmeta>
""".encode()
EMPTY_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/">\n <rdf:RDF xmlns:rdf="{_RDF}">\n </rdf:RDF>\n</x:xmpmeta>\n'
    '<?xpacket end="w"?>'
).encode()
"""XMP that says nothing, as it is inside pictures."""
_FORBIDDEN = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold."""


@dataclass(frozen=True)
class XMP:
    """What a sidecar says about its picture.

    Attributes:
        description: In the default language, else in the first one; empty if there is none.
        is_own: Whether it is as `with_description` has written it.
        tags: Keywords.
    """

    description: str = ""
    is_own: bool = False
    tags: tuple[str, ...] = ()


def read_xmp(data: bytes) -> XMP:
    """Returns what a sidecar says.

    Raises:
        ConfigError: If it is not XMP in UTF-8.
    """
    packet = _Packet(data)
    texts = [item for item in packet.items(_DESCRIPTION) if item.text.strip()]
    default = [item for item in texts if item.is_default]
    tags = tuple(item.text.strip() for item in packet.items(_TAGS) if item.text.strip())
    return XMP((default or texts or [_Item()])[0].text.strip(), packet.own_description() is not None, tags)


def with_description(data: bytes, text: str, *, generator: str, overwrite: bool = False) -> bytes | None:
    """Returns a sidecar with a description in the place of our earlier one; None if it has somebody else's.

    Args:
        data: The sidecar; empty for a new one.
        text: The description.
        generator: The program and the model, for the record.
        overwrite: Whether to replace somebody else's, in all languages.

    Raises:
        ConfigError: If it is not XMP in UTF-8, or holds a description that cannot be replaced.
    """
    data = data if data.strip() else _EMPTY
    packet = _Packet(data)
    text = _FORBIDDEN.sub("", text.replace("\r\n", "\n")).strip()
    own = packet.own_description()
    if own is None and any(item.text.strip() for item in packet.items(_DESCRIPTION)) and not overwrite:
        return None
    edits, missing = [], []
    if own is not None:
        edits.append((own.start, own.end, escape(text)))
    for name, kind, content in (
        (_DESCRIPTION, "Alt", text),
        (_CAPTION, "Seq", text),
        (_GENERATOR, "Seq", _FORBIDDEN.sub("", generator)),
    ):
        if name == _DESCRIPTION and own is not None:
            continue
        places = [(prop.start, prop.end) for prop in packet.properties if prop.name == name]
        if any(start < 0 for start, _ in places):
            raise ConfigError("holds its description as an attribute, which is not replaced")
        if places:
            edits += [(*places[0], _element(name, kind, content)), *((*place, "") for place in places[1:])]
        else:
            missing.append(_element(name, kind, content))
    if missing:
        lines = "\n  ".join(missing)
        about = f"rdf:about={quoteattr(packet.about)}"
        block = f' <rdf:Description {about} xmlns:rdf="{_RDF}">\n  {lines}\n </rdf:Description>\n '
        edits.append((packet.end, packet.end, block))
    for start, end, replacement in sorted(edits, reverse=True):
        data = data[:start] + replacement.encode() + data[end:]
    return data


def _element(name: str, kind: str, text: str) -> str:
    """An array of one text as XML, with the namespaces that it needs."""
    prefix = name.partition(":")[0]
    language = ' xml:lang="x-default"' if kind == "Alt" else ""
    return (
        f'<{name} xmlns:{prefix}="{_NAMESPACES[prefix]}" xmlns:rdf="{_RDF}"><rdf:{kind}><rdf:li{language}>'
        f"{escape(text)}</rdf:li></rdf:{kind}></{name}>"
    )


@dataclass
class _Item:
    """A text of a property, and where in the file it is; nowhere if it is no plain text in an array."""

    language: str = ""
    text: str = ""
    start: int = -1
    end: int = -1

    @property
    def is_default(self) -> bool:
        return self.language.lower() in ("", "x-default")


@dataclass
class _Property:
    """A property of the picture, where in the file it is, and its texts; an attribute is nowhere."""

    name: str
    start: int = -1
    end: int = -1
    items: list[_Item] = field(default_factory=list)


class _Packet:
    """The properties in a sidecar, with their places in bytes.

    Attributes:
        about: What the descriptions are about, usually nothing.
        end: Where the last of them ends.
        properties: Those that matter.
    """

    def __init__(self, data: bytes) -> None:
        self.about = ""
        self.end = -1
        self.properties: list[_Property] = []
        self._data = data
        self._path: list[str] = []
        self._property: _Property | None = None
        self._item: _Item | None = None
        self._level = self._opened = -1
        self._waiting: list[tuple[Any, str]] = []
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.DefaultHandler = lambda _: self._place()
        self._parser.XmlDeclHandler = self._declaration
        self._parser.StartDoctypeDeclHandler = self._doctype
        try:
            data.decode()
            self._parser.Parse(data, True)
        except (expat.ExpatError, UnicodeDecodeError) as err:
            raise ConfigError(f"is not XMP in UTF-8 ({err})") from err
        if self.end < 0:
            raise ConfigError("is not XMP: it holds no rdf:RDF")

    def items(self, name: str) -> list[_Item]:
        """The texts of a property."""
        return [item for prop in self.properties if prop.name == name for item in prop.items]

    def own_description(self) -> _Item | None:
        """The description in the default language, if it is our own and nobody has changed it."""
        ours = {" ".join(item.text.split()) for item in self.items(_CAPTION)}
        default = [item for item in self.items(_DESCRIPTION) if item.is_default and item.text.strip()]
        if len(default) == 1 and default[0].start >= 0 and " ".join(default[0].text.split()) in ours:
            return default[0]
        return None

    def _place(self) -> int:
        """Where the current event begins, and what came before it ends."""
        place = self._parser.CurrentByteIndex
        for owner, attribute in self._waiting:
            setattr(owner, attribute, place)
        self._waiting.clear()
        return place

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        place = self._place()
        if self._property is None:
            if name == f"{_RDF} Description" and self._path[-1:] == [f"{_RDF} RDF"]:
                self.about = self.about or attributes.get(f"{_RDF} about") or attributes.get("about", "")
                for attribute, value in attributes.items():
                    if attribute in _NAMES:
                        self.properties.append(_Property(_NAMES[attribute], items=[_Item(text=value)]))
            elif name in _NAMES and self._path[-1:] == [f"{_RDF} Description"]:
                self._property = _Property(_NAMES[name], start=place)
                self.properties.append(self._property)
                self._level = len(self._path)
        elif self._item is None:
            if name == f"{_RDF} li" and len(self._path) == self._level + 2:
                self._item = _Item(language=attributes.get(_LANGUAGE, ""))
                self._property.items.append(self._item)
                self._waiting.append((self._item, "start"))
                self._opened = place
        else:
            self._opened = -1  # more than a text
        self._path.append(name)

    def _text(self, text: str) -> None:
        self._place()
        if self._item is not None:
            self._item.text += text
        elif self._property is not None and text.strip():
            self._property.items.append(_Item(text=text))

    def _end(self, name: str) -> None:
        place = self._place()
        self._path.pop()
        if name == f"{_RDF} RDF" and self._data.startswith(b"</", place):
            self.end = place
        if self._property is None:
            return
        if len(self._path) == self._level:
            self._waiting.append((self._property, "end"))
            self._property = None
        elif self._item is not None and len(self._path) == self._level + 2:
            self._item.end = place
            if self._opened in (-1, place):  # <rdf:li/> begins and ends at one place
                self._item.start = -1
            self._item = None

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding and encoding.upper() not in ("UTF-8", "UTF8", "US-ASCII", "ASCII"):
            raise ConfigError(f"is not XMP in UTF-8 but in {encoding}")

    def _doctype(self, *_: Any) -> None:
        raise ConfigError("has a document type, which XMP has not")
