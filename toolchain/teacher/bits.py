"""Numbers ↔ bits, a whole array at a time: fields of given widths, and exp-Golomb codes. NumPy only.

Bits are counted from the lowest of each byte on, and a field's lowest bit comes first. An exp-Golomb code of order k
(Teuhola 1978; the codes of H.264) writes x ≥ 0 as a class c = ⌊log2((x >> k) + 1)⌋ in unary, and x − ((2^c − 1) << k)
in c + k bits. It suits numbers that are mostly small and sometimes very large. Classes and remainders lie apart, so
that the place of every remainder is known as soon as the classes are: no loop over numbers is needed to read them.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_WIDEST = 57
"""Bits of a field that, from any bit of a byte on, lie within eight bytes."""


def fields(values: Array, widths: Array | int) -> Array:
    """Bits (uint8, 0 or 1) of `values`, `widths` of each: one after the other."""
    widths = np.broadcast_to(np.asarray(widths, np.int64), values.shape)
    within = np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)
    bits: Array = (np.repeat(values, widths) >> within) & 1
    return bits.astype(np.uint8)


def golomb(values: Array, orders: Array) -> Array:
    """Bits of the exp-Golomb codes: all classes, then all remainders."""
    classes = _classes(values, orders)
    unary = np.zeros(int(classes.sum()) + len(values), np.uint8)
    unary[np.cumsum(classes + 1) - 1] = 1
    remainders = values - (((1 << classes) - 1) << orders)
    return np.concatenate([unary, fields(remainders, classes + orders)])


def golomb_bits(values: Array, order: int) -> int:
    """How many bits the codes of this order take."""
    return int((2 * _classes(values, np.int64(order)) + 1 + order).sum())


def pack(*parts: Array) -> Array:
    """Bits → bytes, the last one filled with zeros."""
    return np.packbits(np.concatenate(parts), bitorder="little")


class BitReader:
    """Reads, in the order of writing, what `pack` wrote. Raises ValueError where the bytes do not hold it."""

    def __init__(self, packed: Array) -> None:
        self._size = 8 * len(packed)
        self._bytes = np.concatenate([packed, np.zeros(8, np.uint8)])
        # Eight bytes from every byte on: one look-up then gives any field.
        self._words = np.ndarray((len(packed) + 1,), "<u8", self._bytes, strides=(1,))
        self._at = 0

    def fields(self, number: int, width: int) -> Array:
        """`number` fields of one width, int64."""
        return self._fields(np.full(number, width))

    def golomb(self, orders: Array) -> Array:
        """As many exp-Golomb codes as there are orders, int64."""
        bits = np.unpackbits(self._bytes[self._at >> 3 :], bitorder="little")[self._at & 7 :]
        ones = np.flatnonzero(bits.view(bool))  # four times as fast as over numbers
        if len(ones) < len(orders):
            raise ValueError("fewer codes than entries")
        ones = ones[: len(orders)]
        classes = np.diff(ones, prepend=-1) - 1
        self._at += int(ones[-1]) + 1 if len(ones) else 0
        if len(classes) and int(classes.max()) > 32:
            raise ValueError(f"a code of class {classes.max()}")
        values: Array = self._fields(classes + orders) + (((1 << classes) - 1) << orders)
        return values

    def end(self) -> None:
        """Raises ValueError when more than the filling of the last byte is left."""
        if not 0 <= self._size - self._at < 8:
            raise ValueError(f"{self._size - self._at} bits left over")

    def _fields(self, widths: Array) -> Array:
        ends = self._at + np.cumsum(widths)
        if len(ends) == 0:
            return np.zeros(0, np.int64)
        if int(ends[-1]) > self._size or int(widths.max()) > _WIDEST:
            raise ValueError("a field reaches beyond the end")
        starts = ends - widths
        self._at = int(ends[-1])
        words: Array = self._words[starts >> 3] >> (starts & 7).astype(np.uint64)
        values: Array = words.astype(np.int64) & ((1 << widths) - 1)
        return values


def _classes(values: Array, orders: Array | np.int64) -> Array:
    # frexp gives 2^e > x ≥ 2^(e − 1): exact for integers below 2^53, which log2 is not.
    exponents: Array = np.frexp((values >> orders) + 1)[1]
    return exponents.astype(np.int64) - 1
