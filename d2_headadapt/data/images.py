"""What goes wrong with the file of an image: one list of exceptions, and one sentence for each."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

UNREADABLE = (
    *(OSError, ValueError, EOFError, MemoryError, OverflowError, struct.error, zlib.error),
    SyntaxError,  # Pillow's for a broken PNG.
    Image.DecompressionBombError,
)
"""What Pillow and mappers raise for a file that is no image, is damaged, or is larger than Pillow opens."""


def why_unreadable(error: BaseException) -> str:
    """Say in one line why an image cannot be read."""
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than the {limit} pixels that Pillow opens: cut it into tiles, or scale it down"
    return " ".join(str(error).split()) or type(error).__name__
