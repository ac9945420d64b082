"""Random problems for the sampling ops: finite logits of any size, and every filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from esamp_core.base.tensors import RowParams
from tests.fuzz_oracle import LARGEST
from tests.oracles import NEG_INF

EXTREMES = (0.0, -0.0, 1.5, -2.0, 1e-40, -1e-45, 9.2e-41, 1e4, -1e9, 1e20, 1e38, -1e38, LARGEST, -LARGEST, NEG_INF)


@dataclass(frozen=True)
class Numbers:
    """A row of numbers: a few values scattered over it, and perhaps noise on top."""

    values: tuple[float, ...]
    spread: float = 0.0
    seed: int = 0

    def make(self, vocab: int, dtype: torch.dtype, *, finite: bool = False) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        table = torch.tensor(self.values, dtype=torch.float64)
        x = table[torch.randint(len(table), (vocab,), generator=g)]
        x = x + self.spread * torch.randn(vocab, generator=g, dtype=torch.float64)
        largest = torch.finfo(dtype).max
        clamped = x.clamp(-largest, largest).to(dtype).clamp(-largest, largest)
        return clamped if finite else torch.where(x == NEG_INF, NEG_INF, clamped)


@dataclass(frozen=True)
class Problem:
    logits: tuple[Numbers, ...]
    temperature: tuple[float, ...] = (1.0,)
    top_k: tuple[int, ...] = (0,)
    top_p: tuple[float, ...] = (1.0,)
    min_p: tuple[float, ...] = (0.0,)
    beta: tuple[float, ...] = (1.0,)
    vocab: int = 2
    dtype: torch.dtype = torch.float32
    projection: Numbers | None = None
    model: Numbers | None = None
    model_weight: float = 1.0
    neutral: bool = False
    order: str = "transformers"
    cap: int = 256
    seed: int = 0

    def params(self) -> RowParams:
        rows, columns = len(self.logits), (self.temperature, self.top_k, self.top_p, self.min_p, self.beta)
        return RowParams(
            *(
                torch.tensor((column * rows)[:rows], dtype=dtype)
                for column, dtype in zip(columns, RowParams.dtypes().values(), strict=True)
            )
        )


extreme = st.one_of(
    st.sampled_from(EXTREMES),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-20, 20, width=32),
)
numbers = st.builds(
    Numbers,
    st.lists(extreme, min_size=1, max_size=5).map(tuple),
    st.sampled_from((0.0, 0.0, 0.0, 1e-3, 3.0, 1e5, 1e36)),
    st.integers(0, 999),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, vocab = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((1, 2, 127, 128, 129, 130, 257)))

    def each(*values: Any) -> tuple[Any, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(rows))

    return Problem(
        logits=tuple(draw(numbers) for _ in range(rows)),
        temperature=each(1.0, 0.0, 1e-3, 0.05, 0.7, 2.5, 1e3, 1e6),
        top_k=each(0, 0, 1, 50, max(1, vocab - 1), vocab, vocab + 5),
        top_p=each(1.0, 1.0, 1e-6, 0.5, 0.9, 0.999),
        min_p=each(0.0, 0.0, 0.05, 1.0, 1e-30),
        beta=each(1.0, 0.0, 1e-3, 0.1, 30.0, 1e3, 1e6, -1.0),
        vocab=vocab,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        projection=draw(st.none() | numbers),
        model=draw(st.none() | st.none() | numbers),
        model_weight=draw(st.sampled_from((1.0, 1.0, 0.0, -0.5))),
        neutral=draw(st.booleans()),
        order=draw(st.sampled_from(("transformers", "vllm"))),
        cap=draw(st.sampled_from((256, 1, 4, 50, 127))),
        seed=draw(st.integers(0, 2**31)),
    )
