"""Block formats against the ``gguf`` package, bit for bit."""

import gguf
import numpy as np
import pytest

from galley.model.quant.blocks import BLOCKS, DECODABLE, ENCODABLE, GGMLType, dequantize, quantize


@pytest.mark.parametrize("kind", sorted(DECODABLE))
def test_fmt_a_decoding_random_bytes_is_bit_exact(kind: GGMLType) -> None:
    block, nbytes = BLOCKS[kind]
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, size=(96, nbytes * (4 if block > 1 else 256)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(kind)))
    got = dequantize(raw.reshape(-1), kind, want.shape)
    assert got.dtype == np.float32 and got.shape == want.shape
    finite = ~np.isnan(want)
    assert np.array_equal(np.isnan(got), ~finite)
    assert np.array_equal(got.view(np.uint32)[finite], want.view(np.uint32)[finite])


@pytest.mark.parametrize("kind", sorted(ENCODABLE))
def test_fmt_b_encoding_equals_the_reference_bytes(kind: GGMLType) -> None:
    rng = np.random.default_rng(int(kind))
    x = (rng.standard_normal((128, 512)) * rng.lognormal(0, 3, size=(128, 1))).astype(np.float32)
    x[3] = 0
    x[4, 32:64] = 1.5
    with np.errstate(all="ignore"):
        want = gguf.quants.quantize(x, gguf.GGMLQuantizationType(int(kind))).view(np.uint8)
    assert np.array_equal(quantize(x, kind), want)


def test_block_sizes_agree_with_the_package() -> None:
    for kind, (block, nbytes) in BLOCKS.items():
        assert gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind))] == (block, nbytes)


def test_chunks_join_without_a_seam() -> None:
    x = np.random.default_rng(0).standard_normal((1 << 14, 96)).astype(np.float32)
    raw = quantize(x, GGMLType.Q8_0)
    whole = dequantize(raw.reshape(-1), GGMLType.Q8_0, x.shape)
    row = dequantize(raw[-1], GGMLType.Q8_0, (96,))
    assert np.array_equal(whole[-1], row)
    assert np.abs(whole - x).max() < 0.03


def test_wrong_sizes_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 18 bytes"):
        dequantize(np.zeros(17, np.uint8), GGMLType.Q4_0, (32,))
    with pytest.raises(ValueError, match="32"):
        dequantize(np.zeros(18, np.uint8), GGMLType.Q4_0, (31,))
    with pytest.raises(ValueError, match="IQ4_XS"):
        dequantize(np.zeros(136, np.uint8), GGMLType.IQ4_XS, (256,))
    with pytest.raises(ValueError, match="Q6_K"):
        quantize(np.zeros((1, 256), np.float32), GGMLType.Q6_K)
