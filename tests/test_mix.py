"""mix and its kernel against float64, and bit for bit where nothing is mixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esamp_core import sample
from esamp_core.base.tensors import Activations, DistillerWeights, RowGroups
from esamp_core.reference.distiller import group_rows
from esamp_core.sample import Status
from tests.kernel_cases import quick_interpreter, to
from tests.test_distiller_ops import make_weights

pytest.importorskip("triton")
BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAG = int(Status.NONFINITE_NOVELTY)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ESAMP_BACKEND", request.param)
    return str(request.param)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN and the signs of zeros included."""
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


class Inputs:
    """Rows of some Distillers, and the exact answer, which uses nothing of the library."""

    def __init__(self, slot: Tensor, hidden: int, slots: int, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        rows = len(slot)
        self.weights = DistillerWeights(*(w.float() for w in make_weights(slots, hidden, 3, seed=seed)))
        self.groups: RowGroups = group_rows(slot, slots)
        self.slot, self.scale = slot, torch.tensor(1.7)
        self.deep = (torch.randn(rows, hidden, generator=g) * 2).to(dtype)
        self.beta = torch.tensor([0.0, 0.1, 0.5, -0.25, 2.0])[torch.arange(rows) % 5]
        self.active = torch.rand(rows, generator=g) < 0.8
        self.saved = Activations.empty(rows, hidden, 3, torch.device("cpu"))
        for field in self.saved:
            field.copy_(torch.randn(field.shape, generator=g))
        self.in_group = (slot >= 0) & (slot < slots)
        self.mixes = self.in_group & (self.beta != 0) & self.active

    def run(self, device: str, **given: Any) -> tuple[sample.Mixed, Activations]:
        arguments = dict(
            deep=self.deep, activations=self.saved, groups=self.groups, weights=self.weights, scale=self.scale,
            beta=self.beta, active=self.active,
        )  # fmt: skip
        names, values = zip(*(arguments | given).items(), strict=True)
        moved = dict(zip(names, to(device, *values), strict=True))
        moved["activations"] = Activations(*(field.clone() for field in moved["activations"]))
        return sample.mix(**moved), moved["activations"]

    def exact(self) -> Tensor:
        """float64 [R, H]."""
        y, at = self.saved.y.double(), self.slot.clamp(0, len(self.weights.up) - 1)
        normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        pred = self.scale.double() * (self.weights.norm_weight[at] * normed + self.weights.norm_bias[at])
        beta = self.beta.double()[:, None]
        return (1 + beta) * self.deep.double() - beta * pred

    def check(self, device: str, **given: Any) -> None:
        mixed, saved = self.run(device, **given)
        got, want = mixed.hidden.cpu(), self.exact()
        assert got.dtype == self.deep.dtype and mixed.status.tolist() == [0] * len(self.slot)
        assert same_bits(got[~self.mixes], self.deep[~self.mixes])
        # The prediction is a difference of numbers of y's size: its error is measured by theirs, and so is the sum's.
        eps = torch.finfo(torch.float32).eps
        size = (1 + self.beta.abs())[:, None] * self.deep.double().abs() + self.beta.abs()[:, None] * 1.7 * (
            4 + self.saved.y.double().abs().amax(-1, keepdim=True)
        ) * 4
        allowed = 32 * eps * size + torch.finfo(self.deep.dtype).eps * want.abs()
        assert ((got.double() - want).abs() <= allowed)[self.mixes].all()
        mean = self.saved.y.double().mean(-1)
        close = dict(atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(saved.mean.cpu().double()[self.in_group], mean[self.in_group], **close)
        rstd = (self.saved.y.double().var(-1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(saved.rstd.cpu().double()[self.in_group], rstd[self.in_group], **close)
        # All else of the activations is as it was, also where rows have no slot.
        assert all(same_bits(getattr(saved, n).cpu(), getattr(self.saved, n)) for n in ("x", "up", "gate", "y", "pred"))
        for name in ("mean", "rstd"):
            assert same_bits(getattr(saved, name).cpu()[~self.in_group], getattr(self.saved, name)[~self.in_group])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "slots"), [(0, 16, 2), (1, 17, 1), (9, 64, 3), (13, 333, 4), (5, 4111, 2)])
def test_is_the_formula(backend: str, device: str, rows: int, hidden: int, slots: int, dtype: torch.dtype) -> None:
    slot = torch.arange(rows) % (slots + 2) - 1 if rows > 1 else torch.zeros(rows, dtype=torch.long)
    Inputs(slot, hidden, slots, dtype, 3).check(device)


@settings(max_examples=30)
@given(
    slot=st.lists(st.integers(-1, 4), min_size=0, max_size=12),
    hidden=st.sampled_from((1, 17, 64, 90)),  # each is compiled by itself
    slots=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(BACKENDS),
    seed=st.integers(0, 100),
)
def test_any_rows(
    device: str, slot: list[int], hidden: int, slots: int, dtype: torch.dtype, name: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESAMP_BACKEND", name)
        Inputs(torch.tensor(slot, dtype=torch.long), hidden, slots, dtype, seed).check(device)


def test_strides_and_memory_given(backend: str, device: str) -> None:
    """Rows apart, columns apart, and memory to write into that is wider than the rows."""
    inputs = Inputs(torch.tensor([0, 1, -1, 0]), 24, 2, torch.bfloat16, 5)
    (want, _), deep = inputs.run(device), inputs.deep
    apart, across = torch.full((4, 50), 7.0).bfloat16(), torch.full((24, 4), 7.0).bfloat16()
    apart[:, 3:27], across.T[:] = deep, deep
    for tensor in (apart[:, 3:27], across.T):
        out, status = torch.full((4, 40), 7.0).bfloat16().to(device), torch.full((4,), 64, dtype=torch.int32).to(device)
        inside = out[:, 8:32]
        got, _ = inputs.run(device, deep=tensor, out=inside, status=status)
        assert got.status is status
        assert same_bits(out[:, 8:32].contiguous(), want.hidden) and status.tolist() == [64] * 4
        assert (out[:, :8] == 7).all() and (out[:, 32:] == 7).all()
    assert same_bits(apart[:, 3:27].contiguous(), deep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["y", "weight", "scale", "deep", "too large"])
def test_what_is_not_finite_stays_as_it_is_and_is_flagged(
    backend: str, device: str, fault: str, dtype: torch.dtype
) -> None:
    inputs = Inputs(torch.tensor([0, 1, 0, 1, 0, 1]), 40, 2, dtype, 1)
    inputs.beta, inputs.active = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5, 0.5]), torch.arange(6) != 4
    wrong, huge = torch.zeros(6, dtype=torch.bool), torch.finfo(dtype).max
    if fault == "y":
        inputs.saved.y[3, 7] = float("nan")
        wrong[3] = True
    elif fault == "weight":
        inputs.weights.norm_weight[0, 3] = float("inf")
        wrong[0] = True
    elif fault == "scale":
        inputs.scale = torch.tensor(float("nan"))
        wrong[[0, 1, 3, 5]] = True
    elif fault == "deep":
        inputs.deep[1, 2] = float("-inf")
        wrong[1] = True
    else:
        inputs.deep[5, 11] = huge  # (1 + beta) times it leaves the dtype
        wrong[5] = True
    (hidden, status), _ = inputs.run(device)
    assert status.tolist() == [FLAG * int(w) for w in wrong]
    still = wrong | (inputs.beta == 0) | ~inputs.active
    assert same_bits(hidden.cpu()[still], inputs.deep[still])
    others = hidden.cpu()[~still]
    assert torch.isfinite(others).all() and (others != inputs.deep[~still]).any(-1).all()


def test_rows_do_not_depend_on_their_batch(backend: str, device: str) -> None:
    inputs = Inputs(torch.tensor([2, 0, 2, 1, -1, 2]), 101, 3, torch.float32, 8)
    (together, _), order = inputs.run(device), torch.tensor([5, 3, 0])
    few = Inputs(inputs.slot[order], 101, 3, torch.float32, 8)
    few.deep, few.beta, few.active = inputs.deep[order], inputs.beta[order], inputs.active[order]
    few.saved = Activations(*(field[order] for field in inputs.saved))
    assert same_bits(few.run(device)[0].hidden.cpu(), together.hidden.cpu()[order])
