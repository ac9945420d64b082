"""What is measured: the heads of real models, batch sizes, candidate counts, kinds of logits, and the targets.

A case says what a step must move at the least, so that a time can be put beside its floor.  Inputs are made on the
device from a seed; more than one set of them, so that a run can rotate through memory that no cache holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from esamp_core.sample import Head, RowParams, SamplingParams, row_seeds

LogitsKind = Literal["random", "clustered", "peaked"]
KINDS: tuple[LogitsKind, ...] = ("random", "clustered", "peaked")


@dataclass(frozen=True)
class Shape:
    """A model's output head."""

    name: str
    vocab: int
    hidden: int
    softcap: float | None = None


QWEN_0_5B = Shape("Qwen2.5-0.5B", 151_936, 896)
QWEN_1_5B = Shape("Qwen2.5-1.5B", 151_936, 1536)
QWEN_7B = Shape("Qwen2.5-7B", 152_064, 3584)
QWEN_32B = Shape("Qwen2.5-32B", 152_064, 5120)
LLAMA_8B = Shape("Llama-3-8B", 128_256, 4096)
LLAMA_7B = Shape("Llama-2-7B", 32_000, 4096)
GEMMA_9B = Shape("Gemma-2-9B", 256_000, 3584, softcap=30.0)
GEMMA_4B = Shape("Gemma-3-4B", 262_208, 2560)
SHAPES = (QWEN_0_5B, QWEN_1_5B, QWEN_7B, QWEN_32B, LLAMA_7B, LLAMA_8B, GEMMA_9B, GEMMA_4B)

ROWS = (1, 8, 32, 128, 512, 1024)
TOP_K = (20, 50, 256)
SLOTS = (1, 8, 32, 128)
DTYPES = (torch.bfloat16, torch.float32)
DRY_SHAPE = Shape("dry", 500, 32)


@dataclass(frozen=True)
class SamplingCase:
    """One exploratory sampling step."""

    shape: Shape
    rows: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    kind: LogitsKind = "random"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.name} R={self.rows} K={self.top_k} {dtype} {self.kind}"

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0.8, top_k=self.top_k, top_p=0.95, min_p=0.02, beta=0.25)

    @property
    def scan_bytes(self) -> int:
        """The logits once: the floor of select_candidates."""
        return self.rows * self.shape.vocab * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """The logits once and the candidates' bfloat16 head rows: the floor of the whole step."""
        return self.scan_bytes + self.rows * self.top_k * self.shape.hidden * 2


@dataclass(frozen=True)
class DistillerCase:
    """One Distiller forward, or one step, of float32 weights."""

    shape: Shape
    slots: int
    rows_per_slot: int
    rank: int = 64

    @property
    def name(self) -> str:
        return f"{self.shape.name} S={self.slots}x{self.rows_per_slot} r={self.rank}"

    @property
    def rows(self) -> int:
        return self.slots * self.rows_per_slot

    @property
    def forward_flops(self) -> int:
        """Three products per row: x A, x G and h B."""
        return 6 * self.rows * self.shape.hidden * self.rank

    @property
    def step_flops(self) -> int:
        """dy B', and the gradients of A, G and B."""
        return 8 * self.rows * self.shape.hidden * self.rank

    @property
    def weight_bytes(self) -> int:
        """All weights once: the floor of the forward; the step reads and writes them."""
        return 4 * self.slots * (3 * self.shape.hidden * self.rank + 2 * self.shape.hidden + self.rank)


class Target(NamedTuple):
    """An upper bound in microseconds, on one H200, under graph replay with a cold L2 cache."""

    case: SamplingCase | DistillerCase
    what: str
    microseconds: float


TARGETS = (
    Target(SamplingCase(QWEN_7B, 128, 50, torch.bfloat16), "select_candidates", 2 * 9.1),  # twice the one-pass floor
    Target(SamplingCase(QWEN_7B, 128, 50, torch.float32), "select_candidates", 2 * 18.1),
    Target(SamplingCase(QWEN_7B, 128, 50, torch.bfloat16), "explore", 45.0),
    Target(SamplingCase(QWEN_7B, 128, 50, torch.float32), "explore", 55.0),
    Target(DistillerCase(QWEN_7B, 8, 16), "distiller_forward", 15.0),
    Target(DistillerCase(QWEN_7B, 8, 16), "distiller_step_", 30.0),
    Target(DistillerCase(QWEN_7B, 8, 16), "mix", 2 * 2.5),  # twice a launch: its 3.9 MB are less
)
# And against peers in the same run, for the same rows: three times faster than FlashInfer's and ten times faster than
# PyTorch's top-k, top-p and min-p sampling without exploration; five times faster than the Distiller as batched
# products over per-row copies of its weights.


def kernel_cases(quick: bool = False) -> list[SamplingCase | DistillerCase]:
    """What bench_kernels measures, the most wanted first: each axis alone around one case, not their product."""
    base = SamplingCase(QWEN_7B, 128, 50)
    cases: list[SamplingCase | DistillerCase] = [base, DistillerCase(QWEN_7B, 8, 16)]
    cases += [SamplingCase(QWEN_7B, 128, 50, torch.float32), SamplingCase(QWEN_7B, 128, 50, kind="peaked")]
    if quick:
        return cases
    cases += [SamplingCase(QWEN_7B, rows, 50) for rows in (1, 8, 32, 512, 1024)]
    cases += [DistillerCase(QWEN_7B, slots, 16) for slots in SLOTS if slots != 8]
    cases += [SamplingCase(shape, 128, 50) for shape in SHAPES if shape != QWEN_7B]
    cases += [SamplingCase(QWEN_7B, 128, k) for k in (20, 256)]
    cases += [SamplingCase(QWEN_7B, 128, 50, kind="clustered")]
    cases += [DistillerCase(shape, 8, 16) for shape in (QWEN_0_5B, QWEN_1_5B, QWEN_32B)]
    return cases


class SamplingInputs(NamedTuple):
    """The arguments of ``explore``."""

    logits: Tensor  # [R, V]
    params: RowParams
    seed: Tensor  # int64 [R]
    position: Tensor  # int64 [R]
    direction: Tensor  # float32 [R, H]
    head: Head


@functools.cache
def decode_step_logits() -> Tensor:
    """float32 [steps, 113]: logits of real decode steps of the embedded model, largest first, relative to the largest.

    8 held-out problems, one sample each at temperature 1, every step up to the sample's end.
    """
    from esamp_core import countdown

    model, tokenizer = countdown.load()
    prompts = [problem.prompt for problem in countdown.held_out_problems("tune", 8)]
    inputs = tokenizer(prompts, return_tensors="pt")
    end = model.generation_config.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(
            **inputs, do_sample=True, max_new_tokens=40, output_logits=True,
            return_dict_in_generate=True, top_k=0, top_p=1.0,
        )  # fmt: skip
    logits = torch.stack(out.logits, 1)  # [rows, steps, 113]
    drawn = out.sequences[:, -logits.shape[1] :]
    ends = torch.tensor([end] if isinstance(end, int) else end)
    ended = torch.isin(drawn, ends).int()
    running = ended.cumsum(1) - ended == 0
    steps = logits[running].float().sort(-1, descending=True).values
    return steps - steps[:, :1]


def make_logits(case: SamplingCase, generator: torch.Generator) -> Tensor:
    """[R, V] of the case's dtype.

    random: normal, like an untrained head.  clustered: each row's likely tokens are neighbours, the worst case for
    selection by blocks.  peaked: every row has, at random token ids, all logits of one real decode step of the embedded
    model (113 tokens); the rest of the vocabulary, which that model does not have, is normal noise around its lowest.
    So the shape of the likely tokens is real, that of the far tail is made up.
    """
    rows, vocab, device = case.rows, case.shape.vocab, generator.device
    x = torch.randn(rows, vocab, generator=generator, device=device).mul_(2.0)
    if case.kind == "clustered":
        start = torch.randint(0, max(1, vocab - 512), (rows, 1), generator=generator, device=device)
        ids = (start + torch.arange(512, device=device)).clamp_max(vocab - 1)
        x.scatter_add_(1, ids, torch.full(ids.shape, 12.0, device=device))
    elif case.kind == "peaked":
        steps = decode_step_logits().to(device)
        chosen = steps[torch.randint(0, len(steps), (rows,), generator=generator, device=device)]
        first = torch.randint(0, vocab, (rows, 1), generator=generator, device=device)
        stride = vocab // chosen.shape[1]  # apart, so that no two fall on one id
        ids = (first + torch.arange(chosen.shape[1], device=device) * stride) % vocab
        x = (x + chosen[:, -1:]).scatter_(1, ids, chosen)
    return x.to(case.dtype)


def make_sampling_inputs(case: SamplingCase, device: torch.device | str, sets: int = 1) -> list[SamplingInputs]:
    """``sets`` independent inputs; they share the head, as steps of one model do."""
    generator = torch.Generator(device).manual_seed(0)
    shape, rows = case.shape, case.rows
    weight = torch.randn(shape.vocab, shape.hidden, generator=generator, device=device).mul_(shape.hidden**-0.5)
    head = Head(weight.bfloat16(), softcap=shape.softcap)
    index = torch.arange(rows, device=device)
    return [
        SamplingInputs(
            make_logits(case, generator),
            RowParams.of(case.params, rows, device),
            row_seeds(torch.full_like(index, number), index),
            torch.zeros_like(index),
            torch.randn(rows, shape.hidden, generator=generator, device=device),
            head,
        )
        for number in range(sets)
    ]
