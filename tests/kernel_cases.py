"""Rows, parameters and comparisons for the tests of the kernels against the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from esamp_core import reference
from esamp_core.base.config import SamplingParams
from esamp_core.base.philox import gumbel, token_bits
from esamp_core.base.tensors import Candidates, Draw, Head, RowParams, Status
from esamp_core.reference.candidates import filter_temperature

T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

ROW_KINDS = (
    "random",
    "tie-heavy",
    "all-equal",
    "clustered",
    "one-hot",
    "nan",
    "+inf",
    "-inf",
    "all -inf",
    "zeros of both signs",
    "bfloat16",
    "huge",
)


EXAMPLES = int(os.environ.get("KERNEL_EXAMPLES", "40"))  # of a property test, over all its numbers
NUMBERS = 6  # items that a property test is cut into: compiled, they take their time side by side


def some_of(values: Sequence[T], number: int) -> Sequence[T]:
    """All values in the interpreter.  Compiled, where every combination takes a second to compile, a third of them, and
    all over the numbers 0, 1, 2."""
    return values if INTERPRETED else values[number % min(3, len(values)) :: 3]


def make_row(kind: str, vocab: int, generator: torch.Generator) -> Tensor:
    """One float32 row of logits."""
    x = torch.randn(vocab, generator=generator) * 3

    def some(share: float) -> Tensor:
        return torch.rand(vocab, generator=generator) < share

    if kind == "tie-heavy":
        x = x.round()
    elif kind == "all-equal":
        x = torch.full((vocab,), 1.5)
    elif kind == "clustered":
        start = int(torch.randint(vocab, (), generator=generator))
        x[start : start + 300] += 15
    elif kind == "one-hot":
        x[int(torch.randint(vocab, (), generator=generator))] = 60
    elif kind == "nan":
        x[some(0.1)] = float("nan")
        x[0] = float("nan")
    elif kind == "+inf":
        x[some(0.05)] = float("inf")
        x[vocab // 2] = float("inf")
        x[some(0.05)] = float("nan")
    elif kind == "-inf":
        x[some(0.9)] = float("-inf")
    elif kind == "all -inf":
        x = torch.full((vocab,), float("-inf"))
        x[some(0.1)] = float("nan")
    elif kind == "zeros of both signs":
        x = torch.where(some(0.5), 0.0, -0.0)
    elif kind == "bfloat16":
        x = x.bfloat16().float()
    elif kind == "huge":
        x *= 1e37
    return x


def make_rows(kinds: Sequence[str], vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [make_row(kind, vocab, generator) for kind in kinds]
    return torch.stack(rows).to(dtype) if rows else torch.empty(0, vocab, dtype=dtype)


def make_params(seed: int, rows: int, vocab: int, *, beta: float | None = None) -> RowParams:
    """Every filter on and off, alone and together; some rows greedy, some unexplored."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        table = torch.tensor(values, dtype=dtype)
        return table[torch.randint(len(values), (rows,), generator=generator)]

    return RowParams(
        temperature=pick((0.0, 0.3, 0.7, 1.0, 1.0, 1.7)),
        top_k=pick((0, 0, 1, 3, 20, max(1, vocab // 2), vocab, vocab + 5), torch.int64),
        top_p=pick((1.0, 1.0, 0.05, 0.5, 0.9, 0.999)),
        min_p=pick((0.0, 0.0, 0.01, 0.1, 1.0)),
        beta=pick((0.0, 0.25, 1.0)) if beta is None else torch.full((rows,), beta),
    )


def off(rows: int, **values: float) -> RowParams:
    """Parameters of a row that nothing filters, with what is given changed."""
    return RowParams.of(SamplingParams(**{"beta": 0.25, **values}), rows, "cpu")  # type: ignore[arg-type]


def to(device: str, *things: Any) -> list[Any]:
    """Tensors, and tuples of them, on a device."""
    return [
        type(t)(*to(device, *t)) if isinstance(t, tuple) else t.to(device) if isinstance(t, Tensor) else t
        for t in things
    ]


def near_top_p(logits: Tensor, params: RowParams, filter_order: str) -> Tensor:
    """bool [R]: rows in which some cumulative mass lies within 1e-5 of top_p, so that one token may go either way."""
    x, _ = reference.clean_logits(logits)
    scaled = reference.scale_logits(x, params)
    base = reference.kept_mask(scaled, params._replace(top_p=torch.ones_like(params.top_p)), "transformers")
    if filter_order == "transformers":  # top-p comes before min-p
        base = reference.kept_mask(
            scaled,
            params._replace(top_p=base.new_ones(()).float().expand(len(x)), min_p=torch.zeros_like(params.min_p)),
            "transformers",
        )
    mass = scaled.masked_fill(~base, float("-inf")).double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return ((mass - params.top_p[:, None].double()).abs() < 1e-5).any(-1) & (params.top_p < 1)


def same_candidates(got: Candidates, want: Candidates, may_differ: Tensor) -> int:
    """All fields equal, except in rows that may differ by a token; returns how many did."""
    differs = torch.zeros_like(may_differ)
    for name, a, b in zip(Candidates._fields, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        unequal = (a.cpu() != b.cpu()).reshape(len(a), -1).any(-1)
        assert not (unequal & ~may_differ).any(), (name, unequal.nonzero()[:, 0].tolist(), a, b)
        differs |= unequal
    return int(differs.sum())


def close_call(candidates: Candidates, new: Tensor, params: RowParams, seed: Tensor, position: Tensor) -> Tensor:
    """bool [R]: rows whose two best perturbed scores, among the listed candidates, are within 1e-4."""
    greedy = params.temperature == 0
    noise = gumbel(token_bits(seed, position, candidates.token_ids.clamp_min(0)))
    z = new / filter_temperature(params) + noise
    z = torch.where(greedy[:, None], new, z).masked_fill(candidates.token_ids < 0, float("-inf"))
    if z.shape[1] < 2:
        return torch.zeros(len(z), dtype=torch.bool)
    best = z.topk(2).values
    return (best[:, 0] - best[:, 1]).abs() < 1e-4


def same_draw(got: Draw, want: Draw, may_differ: Tensor, tolerance: float = 2e-4) -> int:
    """Same tokens, counts and flags, and close numbers, except in rows that may differ; returns how many did."""
    token_differs = got.token_ids.cpu() != want.token_ids
    assert not (token_differs & ~may_differ).any(), (got.token_ids, want.token_ids)
    same = ~token_differs & ~may_differ
    for name in ("count", "status"):
        a, b = getattr(got, name).cpu(), getattr(want, name)
        assert a.dtype == b.dtype and torch.equal(a[same], b[same]), (name, a, b)
    for name in ("logprob", "base_logprob", "novelty", "kl"):
        a, b = getattr(got, name).cpu(), getattr(want, name)
        scale = 1 + b.abs()
        close = ((a - b).abs() <= tolerance * scale) | (a == b) | (a.isnan() & b.isnan())
        assert close[same].all(), (name, a, b)
    return int(token_differs.sum())


def bits(result: tuple[Tensor, ...]) -> list[Tensor]:
    """For bitwise comparison: NaN equals NaN."""
    return [t.view(torch.int32) if t.dtype == torch.float32 else t for t in result]


def equal_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def make_head(vocab: int, hidden: int, seed: int, **extra: Any) -> tuple[Head, Tensor]:
    """A head, and a function's worth of weights with the spread of a trained one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    return Head(weight, **extra), generator


def is_capped(draw: Draw) -> Tensor:
    return draw.status & Status.CAPPED != 0


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter without its two slowest habits; on a GPU nothing changes.

    It patches triton.language anew at every call of a device function (here: once), and sorts by numpy's element-wise
    Python loops (here: np.sort; `test_kernels_select.py` runs the real one too).
    """
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patched: set[int] = set()
    real_call, real_sort = interpreter.InterpretedFunction.__call__, tl.sort

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def sort(x: Any, dim: int | None = None, descending: bool = False) -> Any:
        data = np.sort(x.handle.data)
        data = data[::-1].copy() if descending else data
        return tl.core.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    interpreter.InterpretedFunction.__call__, tl.sort = call, sort
    try:
        yield
    finally:
        interpreter.InterpretedFunction.__call__, tl.sort = real_call, real_sort


def padded(t: Tensor) -> Tensor:
    """The same rows in bfloat16, within those of a wider tensor."""
    whole = torch.full((len(t), t.shape[1] + 5), float("nan"), dtype=torch.bfloat16, device=t.device)
    whole[:, : t.shape[1]] = t
    return whole[:, : t.shape[1]]


def stepped(t: Tensor) -> Tensor:
    """The same rows in float32, as every second column of a wider tensor."""
    whole = torch.full((len(t), 2 * t.shape[1]), float("nan"), device=t.device)
    whole[:, ::2] = t
    return whole[:, ::2]
