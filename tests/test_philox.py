"""Random bits against published vectors and independent numpy code; Gumbel noise against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esamp_core.base.philox import SERIES_BELOW, gumbel, philox, token_bits, vocabulary_bits
from esamp_core.base.seeds import as_int64, row_seeds
from tests.oracles import GUMBEL_TOLERANCE, gumbel_float64, philox_numpy, token_bits_numpy

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = st.integers(0, 2**32 - 1)

# Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in values]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], result: str) -> None:
    seed = torch.tensor(as_int64(key[0] | key[1] << 32))
    got = philox(*_words(*counter), seed)
    assert " ".join(f"{int(w):08x}" for w in got) == result
    oracle = philox_numpy(np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64))
    assert " ".join(f"{int(w):08x}" for w in oracle) == result


@given(counter=st.tuples(WORD, WORD, WORD, WORD), seed=st.integers(-(2**63), 2**64 - 1))
def test_agrees_with_numpy(counter: tuple[int, ...], seed: int) -> None:
    got = [int(w) for w in philox(*_words(*counter), torch.tensor(as_int64(seed)))]
    key = np.array([seed % 2**32, (seed >> 32) % 2**32], dtype=np.uint64)
    assert got == philox_numpy(np.array(counter, dtype=np.uint64), key).tolist()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64 - 1])
def test_as_int64_keeps_the_bits(seed: int) -> None:
    assert -(2**63) <= as_int64(seed) < 2**63
    assert (as_int64(seed) - seed) % 2**64 == 0


@given(seed=INT64, position=st.integers(0, 2**63 - 1), token=st.integers(0, 2**31 - 2))
def test_token_bits_layout(seed: int, position: int, token: int) -> None:
    got = token_bits(torch.tensor([seed]), torch.tensor([position]), torch.tensor([[token]]))
    assert got.tolist() == [[token_bits_numpy(seed, position, token)]]


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 127, 1000])
def test_vocabulary_bits_is_token_bits(vocab: int) -> None:
    seed = torch.tensor([0, -1, 12345678901234567, 7])
    position = torch.tensor([0, 1, 2**40 + 3, 2**32])
    ids = torch.arange(vocab).expand(4, -1)
    bits = vocabulary_bits(seed, position, vocab)
    assert torch.equal(bits, token_bits(seed, position, ids))
    assert vocabulary_bits(seed[:0], position[:0], vocab).shape == (0, vocab)
    assert token_bits(seed[:0], position[:0], ids[:0]).shape == (0, vocab)


def test_every_bit_of_seed_and_position_matters() -> None:
    ones = torch.tensor([0] + [as_int64(1 << i) for i in range(64)])
    zeros, ids = torch.zeros_like(ones), torch.zeros(65, 1, dtype=torch.long)
    assert token_bits(ones, zeros, ids).unique().numel() == 65
    assert token_bits(zeros, ones, ids).unique().numel() == 65


def test_row_seeds() -> None:
    request = torch.tensor([0, 1, -1, 2**62]).repeat_interleave(64)
    sample = torch.arange(64).repeat(4)
    seeds = row_seeds(request, sample)
    assert seeds.dtype == torch.int64
    assert seeds.unique().numel() == 256
    for i in (0, 77, 140, 255):
        key = int(request[i]) % 2**64
        counter = np.array([int(sample[i]), 1, 0, 0], dtype=np.uint64)
        low, high, _, _ = philox_numpy(counter, np.array([key % 2**32, key >> 32], dtype=np.uint64)).tolist()
        assert int(seeds[i]) % 2**64 == low | high << 32
    # A sibling's stream shares no word with another's at the same position and token.
    bits = token_bits(seeds, torch.zeros_like(seeds), torch.zeros(256, 1, dtype=torch.long))
    assert bits.unique().numel() == 256


def test_gumbel_against_float64() -> None:
    edges = [0, 1, 2, 3, 2**8, 2**31, 2**32 - 1, 2**32 - 257, 2**32 - 129, 2**32 - 128]
    switch = int(SERIES_BELOW * 2**32)
    near = torch.arange(switch - 2000, switch + 2000)
    spread = torch.logspace(0, 32, 20001, base=2.0, dtype=torch.float64).long().clamp_max(2**32 - 1)
    bits = torch.cat([torch.tensor(edges), near, spread, 2**32 - 1 - spread])
    noise = gumbel(bits)
    assert noise.dtype == torch.float32
    assert torch.isfinite(noise).all()
    # An absolute error of the noise is a relative error of the exponential variable, so of the token's weight.
    # float32 steps of the noise itself (up to 2^-20 near 16) come on top.
    want = torch.from_numpy(gumbel_float64(bits.numpy()))
    error = (noise.double() - want).abs() - want.abs().clamp_min(1.0) * 2.0**-23
    assert error[bits < 2**31].max() < GUMBEL_TOLERANCE  # the half that winners come from
    # Near 1, where only losers live, float32 holds v in steps of 2^-24: off by half a step, and a hair (two roundings).
    v = torch.from_numpy(np.minimum((bits.numpy() + 0.5) * 2.0**-32, 1 - 2.0**-24))
    off = 1.01 * 2.0**-25
    high = -torch.log(-torch.log1p(-(v - off).clamp_min(2.0**-40)))
    low = -torch.log(-torch.log1p(-(v + off).clamp_max(1 - 2.0**-24)))
    late = bits >= 2**31
    assert (noise.double() - high)[late].max() < GUMBEL_TOLERANCE
    assert (low - noise.double())[late].max() < GUMBEL_TOLERANCE
    # Given the float32 v, the noise is good everywhere.
    v32 = ((bits.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24).double()
    assert (noise.double() + torch.log(-torch.log1p(-v32))).abs().max() < GUMBEL_TOLERANCE


def test_gumbel_extremes() -> None:
    largest, smallest = gumbel(torch.tensor([0, 2**32 - 1])).tolist()
    assert largest == pytest.approx(33 * np.log(2), abs=1e-5)  # 22.9, not the 16.6 of the other orientation
    assert smallest == pytest.approx(-np.log(24 * np.log(2)), abs=1e-5)


def test_gumbel_falls_with_the_bits() -> None:
    switch = int(SERIES_BELOW * 2**32)
    coarse = torch.logspace(0, 32, 5001, base=2.0, dtype=torch.float64).long().clamp_max(2**32 - 1)
    for bits in (torch.arange(5000), coarse, 2**32 - 1 - torch.arange(0, 2**20, 97).flip(0)):
        assert (gumbel(bits).diff() <= 0).all()
    # Across the seam between series and logarithm only rounding may go the wrong way.
    seam = gumbel(torch.arange(switch - 5000, switch + 5000))
    assert seam.diff().max() < GUMBEL_TOLERANCE


def test_gumbel_moments() -> None:
    """False-alarm rate 1e-4 each: |z| < 3.9.  Mean of Gumbel noise is Euler's constant, its variance pi^2 / 6."""
    n = 2**18
    noise = gumbel(vocabulary_bits(torch.tensor([5]), torch.tensor([9]), n))[0].double()
    mean_z = (float(noise.mean()) - np.euler_gamma) / np.sqrt(np.pi**2 / 6 / n)
    variance_z = (float(noise.var()) - np.pi**2 / 6) / (np.pi**2 / 6 * np.sqrt(4.4 / n))
    assert abs(mean_z) < 3.9
    assert abs(variance_z) < 3.9
