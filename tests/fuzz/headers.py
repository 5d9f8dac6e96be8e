"""Files of pictures whose headers were made up: sizes, depths and kinds that no program writes together."""

import struct
import zlib
from random import Random

from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import look_at

_PAGES = (
    *(b"", b"\0", bytes(4096), b"<html>\x1b[2J</html>", b"{}", b"%PDF-1.4\n", b"PK\3\4", b"\xff\xd8\xff", b"GIF89a"),
    *(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
        b"8BPS" + bytes(30),
    ),
    *(b"\0\0\0\x18ftypheic" + bytes(20), b"\0\0\0\x18ftypavif" + bytes(20), b"RIFF\x10\0\0\0WEBPVP8X" + bytes(8)),
    *(b"DDS " + bytes(124), b"SIMPLE  =" + b" " * 99, b"#define x_width 9\n#define x_height 9\n", b"<svg/>"),
)
"""What is no picture, or only begins like one."""


def _side(random: Random) -> int:
    if random.random() < 0.6:
        return random.choice((1, 2, 3, 8, 15))
    return random.choice((0, 1000, 13_377, 40_000, 65_535, 65_536, 178_956_971, 2**31 - 1, 2**31, 2**32 - 1))


def _short(random: Random) -> int:
    return _side(random) & 0xFFFF


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(random: Random) -> bytes:
    width, height = _side(random), _side(random)
    kinds = ((1, 0), (2, 0), (8, 0), (16, 0), (8, 2), (16, 2), (4, 3), (8, 4), (8, 6), (3, 5))
    head = struct.pack(">IIBBBBB", width, height, *random.choice(kinds), 0, 0, random.choice((0, 0, 1, 2)))
    more = (
        *(b"", _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20))), _chunk(b"eXIf", random.randbytes(60))),
        *(
            _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(999))),
            _chunk(b"PLTE", bytes(9)),
            _chunk(b"tRNS", bytes(300)),
        ),
        *(_chunk(b"gAMA", b""), _chunk(b"acTL", bytes(8)), _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x>")),
    )
    rows = bytes(min(10**6, (min(width, 10**6) * 8 + 1) * min(height, 100)))
    data = zlib.compress(rows) if random.random() < 0.8 else random.randbytes(50)
    chunks = _chunk(b"IHDR", head) + random.choice(more) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _bmp(random: Random) -> bytes:
    width, height = (min(_side(random), 2**31 - 1) * random.choice((1, 1, 1, -1)) for _ in range(2))
    bits, packed, colours = (
        random.choice((0, 1, 4, 8, 16, 24, 32, 64)),
        random.choice((0, 0, 1, 2, 3, 4, 9)),
        (0, 2, 2**31),
    )
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, packed, 0, 0, 0, random.choice(colours), 0)
    start = random.choice((54, 54, 0, 2**31))
    return b"BM" + struct.pack("<IHHI", random.choice((0, 999)), 0, 0, start) + head + bytes(500)


def _gif(random: Random) -> bytes:
    size = struct.pack("<HH", _short(random), _short(random)) + b"\x80\0\0" + bytes(6)
    frame = struct.pack("<HHHHB", *(_short(random) for _ in range(4)), random.choice((0, 0x40, 0x87)))
    return random.choice((b"GIF87a", b"GIF89a")) + size + b"," + frame + b"\x02" + random.randbytes(40) + b"\0;"


def _ppm(random: Random) -> bytes:
    kind = random.choice((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"Pf", b"PF"))
    numbers = [random.choice((_side(random), _side(random), -1, 10**30)) for _ in range(2)]
    largest = random.choice((1, 255, 256, 65_535, 0, 65_536, 10**30))
    separator = random.choice((b" ", b"\n", b"\n# comment\n", b""))
    text = separator.join([kind, *(str(number).encode() for number in (*numbers, largest))])
    return text + b"\n" + random.choice((b"", b"0 1 0 1" * 200, b"12 x", random.randbytes(900), b"9" * 5000))


def _tiff(random: Random) -> bytes:
    order = random.choice("<>")
    choices = {
        254: (0, 0, 0, 1, 4),
        256: (_side(random),),
        257: (_side(random),),
        258: (1, 8, 8, 10, 12, 14, 16, 24, 32, 64),
        259: (1, 1, 1, 2, 5, 6, 7, 8, 32773, 50000),
        262: (0, 1, 1, 2, 3, 5, 6, 8, 32803, 34892),
        273: (8, 200, 200, 2**31),
        274: (1, 6, 9),
        277: (1, 1, 3, 3, 2, 4, 5, 65_535),
        278: (15, 1, 0, 2**31),
        279: (100, 900, 0, 2**31),
        284: (1, 1, 2),
        317: (1, 1, 2, 3),
        339: (1, 1, 2, 3, 4, 5),
        50706: (0x0401,),
    }
    tags = [tag for tag in choices if random.random() < (0.9 if tag < 50000 else 0.1)]
    entries = [
        struct.pack(
            f"{order}HHII",
            tag,
            random.choice((4,) * 9 + (3, 1, 2, 5, 12, 99)),
            random.choice((1,) * 20 + (3, 2**31)),
            random.choice(choices[tag]),
        )
        for tag in tags
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", random.choice((42, 42, 42, 43)), 8)
    count, following = struct.pack(f"{order}H", len(tags)), struct.pack(f"{order}I", random.choice((0, 0, 0, 8)))
    return head + count + b"".join(entries) + following + bytes(1000)


def _tga(random: Random) -> bytes:
    kind, bits = random.choice((1, 2, 3, 9, 10, 11, 0, 32)), random.choice((1, 8, 15, 16, 24, 32))
    map_first = struct.pack("<BHHB", kind, 0, random.choice((0, 256)), 24)
    size = struct.pack("<HHHHBB", 0, 0, _short(random), _short(random), bits, random.choice((0, 0x20)))
    return bytes([random.choice((0, 5, 255)), random.choice((0, 1))]) + map_first + size + random.randbytes(900)


def _qoi(random: Random) -> bytes:
    size = struct.pack(">IIBB", _side(random), _side(random), random.choice((3, 4, 9)), 0)
    return b"qoif" + size + random.randbytes(random.choice((60, 900)))


def _jpeg(random: Random) -> bytes:
    data = bytearray(files()[next(name for name in files() if name.startswith("JPEG RGB"))])
    at = next(i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    data[at + 5 : at + 9] = struct.pack(">HH", _short(random), _short(random))
    data[at + 9] = random.choice((data[at + 9], data[at + 9], 0, 1, 4, 255))
    return bytes(data)


def _ico(random: Random) -> bytes:
    inner = random.choice((_png, _bmp))(random)
    size = struct.pack("<BBBBHH", random.randrange(256), random.randrange(256), 0, 0, 1, random.choice((1, 32)))
    place = struct.pack("<II", random.choice((len(inner), len(inner), 2**31)), 22)
    return struct.pack("<HHH", 0, 1, random.choice((1, 1, 1, 500, 65_535))) + size + place + inner


def _page(random: Random) -> bytes:
    return random.choice((*_PAGES, random.randbytes(300)))


def made_up(random: Random) -> bytes:
    """A file whose header was made up."""
    return random.choice((_png, _png, _bmp, _gif, _ppm, _tiff, _tiff, _tga, _qoi, _jpeg, _ico, _page))(random)


def header(random: Random, room: Room) -> None:
    """A file whose header was made up, as a picture."""
    look_at(made_up(random))
