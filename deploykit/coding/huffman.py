"""Canonical Huffman codes (Huffman 1952, "A Method for the Construction of Minimum-Redundancy Codes"), in lanes.

Codes are numbered by length, then by symbol, so that the lengths say all (Schwartz & Kallick 1964, "Generating a
canonical prefix encoding"). None is longer than 12 bits, by package-merge (Larmore & Hirschberg 1990, "A fast algorithm
for optimal length-limited Huffman codes"): one look at a table then decodes a symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding.lanes import LENGTH, WORD, lanes, room
from deploykit.core.errors import DeploykitError

LONGEST = 12
NONE = np.zeros(0, np.int64)


def table(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Bits of every symbol's code, the least in all of those within LONGEST; 0 where it does not occur.

    Args:
        counts: by symbol ``[n]``; at most 2¹² symbols occur.
    """
    present = np.flatnonzero(counts)
    found = np.zeros(len(counts), np.uint8)
    if len(present) < 2:
        found[present] = 1
        return found
    order = present[np.argsort(counts[present], kind="stable")]
    levels, packages = [], counts[:0]
    for _ in range(LONGEST):
        coins = np.concatenate([counts[order], packages])
        rising = np.argsort(coins, kind="stable")
        levels.append(rising < len(order))
        coins = coins[rising]
        packages = coins[: len(coins) // 2 * 2].reshape(-1, 2).sum(1)
    taken = 2 * len(order) - 2
    for single in reversed(levels):  # the cheapest coins; packages among them are two of the level below
        leaves = int(np.count_nonzero(single[:taken]))
        found[order[:leaves]] += 1
        taken = 2 * (taken - leaves)
    return found


def size(counts: NDArray[np.int64]) -> float:
    """Bits of a stream with these counts, without its table."""
    return float((counts * table(counts)).sum())


def codes(length: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The canonical code of every symbol.

    Raises:
        DeploykitError: no prefix code has these lengths.
    """
    used = length[length > 0]
    if not len(used) or used.max() > LONGEST or (2.0 ** -used.astype(float)).sum() > 1.0:
        raise DeploykitError("a table of code lengths is no prefix code")
    found, code = np.zeros(len(length), np.int64), 0
    for bits in range(1, LONGEST + 1):
        own = np.flatnonzero(length == bits)
        found[own] = code + np.arange(len(own))
        code = (code + len(own)) << 1
    return found


def encode(streams: Sequence[NDArray[Any]], tables: Sequence[NDArray[np.uint8]], length: int = LENGTH) -> bytes:
    """The words, little-endian uint16, in the order in which `decode` asks for them.

    Args:
        streams: symbols, ``[n]`` each.
        tables: of `table`, for each.
        length: symbols of a lane, at most.
    """
    deal = lanes([len(s) for s in streams], length)
    pairs = [(s, own.astype(np.int64), codes(own)) for s, own in zip(streams, tables, strict=True) if len(s)]
    bits = np.concatenate([own[s] for s, own, _ in pairs] or [NONE])
    code = np.concatenate([code[s] for s, _, code in pairs] or [NONE])
    words, steps = [NONE], [NONE]  # of one lane after the other
    for lane, (start, stride) in enumerate(zip(deal.start, deal.stride, strict=True)):
        at = start + stride * np.arange(np.count_nonzero(deal.active > lane))
        before = np.cumsum(bits[at]) - bits[at]
        place, shifted = before // WORD, code[at] << (2 * WORD - bits[at] - before % WORD)
        laid = np.bincount(place, shifted >> WORD, place[-1] + 2)  # bits that lie beside each other add up
        laid += np.bincount(place + 1, shifted & ((1 << WORD) - 1))
        asked = -(-before // WORD)  # the last word a lane has: with it, there are 16 bits or more
        steps.append(np.flatnonzero(np.diff(asked, prepend=-1)))
        words.append(laid[asked[steps[-1]]].astype(np.int64))
    order = np.argsort(np.concatenate(steps), kind="stable")
    return np.concatenate(words)[order].astype("<u2").tobytes()


def decode(data: bytes | memoryview, tables: Sequence[NDArray[np.uint8]], counts: Sequence[int]) -> list[NDArray[Any]]:
    """The streams, of bytes where those can tell all symbols apart, else of 16 bits.

    Args:
        data: of `encode`.
        tables: of `table`, for each.
        counts: of the symbols of each.

    Raises:
        DeploykitError: lengths are no prefix code, or the data too short or too long, or not of that code.
    """
    deal = lanes(counts)
    if len(data) % 2:
        raise DeploykitError("a coded stream is cut off")
    words, found = np.frombuffer(data, "<u2"), room(tables, counts)
    symbol, taken = (np.zeros(len(tables) << LONGEST, kind) for kind in (found.dtype, np.uint8))
    for i, (length, count) in enumerate(zip(tables, counts, strict=True)):
        code = codes(length) if count else NONE
        for s in np.flatnonzero(length) if count else ():
            spare = LONGEST - int(length[s])
            own = slice((i << LONGEST) + (code[s] << spare), (i << LONGEST) + (code[s] + 1 << spare))
            symbol[own], taken[own] = s, length[s]
    table = (deal.stream << LONGEST).astype(np.uint32)
    held, have = np.zeros(len(table), np.uint32), np.zeros(len(table), np.uint32)
    read, holes = 0, not taken.all()
    for at in deal.steps():
        n = len(at)
        (low,) = (have[:n] < WORD).nonzero()
        if read + len(low) > len(words):
            raise DeploykitError("a coded stream is cut off")
        left = have[low]
        held[low] |= words[read : read + len(low)] << (WORD - left)
        have[low] = left + WORD
        read += len(low)
        key = held[:n] >> (2 * WORD - LONGEST)
        key += table[:n]
        found[at] = symbol[key]
        used = taken[key]
        if holes and not used.all():
            raise DeploykitError("a coded stream has a code that its table has not")
        held[:n] <<= used
        have[:n] -= used
    if read != len(words):
        raise DeploykitError("a coded stream does not end where its encoder did")
    return np.split(found, np.cumsum(counts)[:-1])
