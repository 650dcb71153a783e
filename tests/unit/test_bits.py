"""Bit fields and exp-Golomb codes: what goes in comes out, and cut-off bytes are refused."""

import numpy as np
import pytest

from toolchain.teacher.bits import BitReader, fields, golomb, golomb_bits, pack


def test_fields_and_codes_of_any_size_come_back_in_their_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        width = int(rng.integers(1, 31))
        plain = rng.integers(0, 1 << width, int(rng.integers(0, 40)))
        orders = rng.integers(0, 17, int(rng.integers(0, 60)))
        codes = (rng.random(len(orders)) ** 8 * 300_000).astype(np.int64)
        packed = pack(fields(plain, width), golomb(codes, orders), fields(plain, width))
        reader = BitReader(packed)
        assert (reader.fields(len(plain), width) == plain).all()
        assert (reader.golomb(orders) == codes).all()
        assert (reader.fields(len(plain), width) == plain).all()
        reader.end()


def test_the_bits_of_a_code_are_those_of_the_textbook() -> None:
    # Order 0: 0 → 1, 1 → 01|0, 2 → 01|1, 3 → 001|00, with the classes of all codes before their remainders.
    assert golomb(np.array([0, 1, 2, 3]), np.zeros(4, np.int64)).tolist() == [1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0]
    # Order 2: 5 = 0b101 → class 1 (5 >> 2 is 1), remainder 5 − 4 in 3 bits, lowest first.
    assert golomb(np.array([5]), np.array([2])).tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("order", [0, 3, 16])
def test_the_counted_bits_are_the_written_ones(order: int) -> None:
    values = np.array([0, 1, 2, 3, 7, 8, 255, 256, 151_935])
    assert golomb_bits(values, order) == len(golomb(values, np.full(len(values), order)))


def test_bytes_that_end_early_or_late_are_refused() -> None:
    values = np.array([3, 900, 17, 0, 65])
    orders = np.full(5, 2)
    packed = pack(golomb(values, orders))
    for cut in range(len(packed)):
        with pytest.raises(ValueError, match=r"fewer codes|beyond the end"):
            BitReader(packed[:cut]).golomb(orders)
    longer = BitReader(np.concatenate([packed, packed[:1]]))
    longer.golomb(orders)
    with pytest.raises(ValueError, match="bits left over"):
        longer.end()
    with pytest.raises(ValueError, match="a code of class"):
        BitReader(np.array([0, 0, 0, 0, 0, 0, 1], np.uint8)).golomb(orders[:1])
