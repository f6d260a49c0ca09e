"""LZMA2 as a section of a container: raw, with a dictionary of a size that its content tells."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from typing import Any

from deploykit.core.errors import DeploykitError

SETTINGS: tuple[dict[str, int], ...] = (
    {"lc": 3, "lp": 0, "pb": 2},
    {"lc": 0, "lp": 0, "pb": 0},
    {"lc": 4, "lp": 0, "pb": 0},
    {"lc": 4, "lp": 0, "pb": 0, "nice_len": 32},
    {"lc": 0, "lp": 2, "pb": 2},
)
"""Bits of context from the byte before, of the place of a literal, of the place of a match; from how long on a match is
taken as it is: weights have few that are worth a search."""
TRIED = 1 << 21
"""Bytes up to which all settings are tried."""
PIECE = 1 << 20
"""Bytes of a section that are held at once, read or decoded."""
UNEQUAL = "this .dkz is damaged: a section has another size than its front says"


def squeezed(data: bytes) -> bytes:
    """By the best of some settings: weights are no text, and a decoder need not know which it was."""
    return min((compressed(data, **own) for own in SETTINGS[: None if len(data) < TRIED else 1]), key=len)


def compressed(data: bytes, **settings: int) -> bytes:
    """By those settings, or the usual ones."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[own | settings for own in _filters(len(data))])


def window(size: int) -> int:
    """Bytes of the dictionary for so many bytes."""
    return 1 << min(26, max(12, size.bit_length()))


def _filters(size: int) -> list[dict[str, Any]]:
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window(size)}]


def spread(section: memoryview, parts: Sequence[int]) -> Iterator[bytes]:
    """What is in an LZMA2 section, piece by piece, none of which has bytes of two parts.

    Raises:
        DeploykitError: it is damaged, or there is less or more than all parts take.
    """
    reader, at = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(sum(parts))), 0

    def some(most: int) -> bytes:
        """A byte at least, or none at the end."""
        nonlocal at
        found = b""
        while not found and not reader.eof and (at < len(section) or not reader.needs_input):
            fed = section[at : at + PIECE] if reader.needs_input else b""
            at += len(fed)
            try:
                found = reader.decompress(fed, min(most, PIECE))
            except lzma.LZMAError as error:
                raise DeploykitError(f"this .dkz is damaged: {error}") from None
        return found

    for left in parts:
        while left:
            piece = some(left)
            if not piece:
                raise DeploykitError(UNEQUAL)
            left -= len(piece)
            yield piece
    if some(1) or not reader.eof or at < len(section) or reader.unused_data:
        raise DeploykitError(UNEQUAL)
