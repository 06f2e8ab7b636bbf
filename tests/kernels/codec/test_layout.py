import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.codec.layout import pack, unpack, words_for

MLX_BITS = (2, 3, 4, 5, 6, 8)


def stream_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """The layout by its definition: one little-endian bit stream, bit by bit."""
    n = codes.shape[-1]
    words = np.zeros((*codes.shape[:-1], words_for(n, bits)), dtype=np.uint64)
    for i in range(n):
        for bit in range(bits):
            at = i * bits + bit
            words[..., at // 32] |= ((codes[..., i].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(
                at % 32
            )
    return words.astype(np.uint32)


@given(bits=st.integers(1, 8), n=st.integers(1, 200), rows=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_packing_is_the_documented_bit_stream_and_unpacks_to_itself(bits: int, n: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, size=(rows, n)).astype(np.uint32)
    words = pack(mx.array(codes), bits)
    assert words.dtype == mx.uint32
    assert words.shape == (rows, words_for(n, bits))
    np.testing.assert_array_equal(np.array(words), stream_of(codes, bits))
    np.testing.assert_array_equal(np.array(unpack(words, n, bits)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 80, 96, 128, 255])
def test_extreme_codes_survive(bits: int, n: int) -> None:
    highest = (1 << bits) - 1
    for codes in (np.full(n, highest), np.zeros(n), np.arange(n) % 2 * highest):
        packed = pack(mx.array(codes.astype(np.uint32)), bits)
        np.testing.assert_array_equal(np.array(unpack(packed, n, bits)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_last_word_is_filled_with_zero_bits(bits: int) -> None:
    n = 33
    words = np.array(pack(mx.full((n,), (1 << bits) - 1, dtype=mx.uint32), bits))
    used = n * bits - 32 * (len(words) - 1)
    assert int(words[-1]) == (1 << used) - 1


@pytest.mark.parametrize("bits", MLX_BITS)
def test_bytes_are_those_of_mx_quantize(bits: int) -> None:
    rows = mx.random.normal((5, 192), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(rows, group_size=64, bits=bits)
    codes = unpack(words, 192, bits)
    np.testing.assert_array_equal(np.array(pack(codes, bits)), np.array(words))
    by_hand = codes.reshape(5, 3, 64) * scales[..., None] + biases[..., None]
    by_mlx = mx.dequantize(words, scales, biases, group_size=64, bits=bits)
    np.testing.assert_allclose(np.array(by_hand.reshape(5, 192)), np.array(by_mlx), atol=1e-6)


@pytest.mark.parametrize("bits", MLX_BITS)
def test_mx_dequantize_reads_packed_codes(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, size=(3, 64))
    ones, zeros = mx.ones((3, 1)), mx.zeros((3, 1))
    read = mx.dequantize(pack(mx.array(codes), bits), ones, zeros, group_size=64, bits=bits)
    np.testing.assert_array_equal(np.array(read), codes)


def test_packs_along_the_last_axis_of_any_shape() -> None:
    codes = np.random.default_rng(0).integers(0, 8, size=(2, 3, 4, 40))
    packed = pack(mx.array(codes), 3)
    assert packed.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(np.array(unpack(packed, 40, 3)), codes)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(mx.zeros((4,), dtype=mx.uint32), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(mx.zeros((4,), dtype=mx.uint32), 4, bits)


def test_a_wrong_word_count_is_refused() -> None:
    with pytest.raises(ValueError, match="lie in 2 words, not in 3"):
        unpack(mx.zeros((3,), dtype=mx.uint32), 16, 4)
