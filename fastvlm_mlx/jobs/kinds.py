"""Which files are pictures, by their names and first bytes."""

import os
import re

PICTURES = frozenset(
    "jpg jpeg jpe jfif png gif bmp dib ppm pgm pbm pnm webp tif tiff ico tga jp2 j2k jpx qoi avif heic heif hif".split()
)
"""Extensions of pictures. What is in such a file turns out when it is read."""
RAW = frozenset("dng cr2 cr3 crw nef nrw arw sr2 srf raf orf rw2 pef srw x3f rwl iiq 3fr erf mos mrw dcr kdc".split())
"""Extensions of cameras' raw files, of which a decoder would find only the preview."""
LIBRARY = ".photoslibrary"
"""The end of the name of a library of Apple's Photos, a folder."""
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|II\*\0|MM\0\*|P[1-6]\s+[0-9#]|qoif"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp(?:avi[fs]|hei[cxms]|hev[cx]|mif1|msf1)",
    re.DOTALL,
)


def in_library(path: str) -> bool:
    """Whether a path is in a library of Apple's Photos, where nothing may be written."""
    return LIBRARY in path.lower() or LIBRARY in os.path.realpath(os.path.dirname(path)).lower()


def is_picture(path: str) -> bool:
    """Whether a file begins like a picture."""
    with open(path, "rb", buffering=0) as file:
        return _MAGIC.match(file.read(32)) is not None
