"""Independent oracles: what the ops must compute, written from the documented rules and sharing no code with them.

Candidate sets come from transformers' own warpers, distributions from float64 numpy, random bits from uint64 numpy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from esamp_core.base.tensors import Head

NEG_INF = float("-inf")


# The one table of tolerances: how far a float32 computation on inputs of this dtype may be from float64.
# rtol and atol are of values in logit units or nats; the inputs are exact in float64, so the dtype of the logits does
# not matter, the accumulation in float32 does.
@dataclass(frozen=True)
class Tolerance:
    rtol: float
    atol: float


TOLERANCE = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.bfloat16: Tolerance(rtol=1e-5, atol=1e-5),  # inputs only: accumulation is float32
    torch.float16: Tolerance(rtol=1e-5, atol=1e-5),
}
# Gumbel noise: relative error of the float32 exponential variable that it is the logarithm of.
GUMBEL_TOLERANCE = 1e-5
# A replayed log-probability against the drawn one: the same formula, dot products in another order.
REPLAY_TOLERANCE = 1e-6
# Tokens whose float64 cumulative mass is this close to the top-p threshold may be kept or not.
TOP_P_EDGE = 1e-5


def assert_near(actual: Tensor, expected: Tensor | np.ndarray | float, dtype: torch.dtype, what: str = "") -> None:
    """actual within the table's tolerance for dtype; NaN never passes, infinities must be equal."""
    want = torch.as_tensor(expected, dtype=torch.float64)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.detach().double().cpu(), want, rtol=tolerance.rtol, atol=tolerance.atol, msg=lambda m: f"{what}: {m}"
    )


_U32 = np.uint64(0xFFFFFFFF)


def philox_numpy(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 on uint64 arrays holding 32-bit words: counter [..., 4], key [..., 2] -> [..., 4]."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [key[..., i].astype(np.uint64) for i in range(2)]
    shift = np.uint64(32)
    with np.errstate(over="ignore"):
        for _ in range(10):
            a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
            c = [(b >> shift) ^ c[1] ^ k[0], b & _U32, (a >> shift) ^ c[3] ^ k[1], a & _U32]
            k = [(k[0] + np.uint64(0x9E3779B9)) & _U32, (k[1] + np.uint64(0xBB67AE85)) & _U32]
    return np.stack(c, -1)


def token_bits_numpy(seed: int, position: int, token: int, domain: int = 0) -> int:
    """The 32 random bits of one token, from the documented layout of counter and key."""
    counter = np.array([token // 4, domain, position % 2**32, (position // 2**32) % 2**32], dtype=np.uint64)
    key = np.array([seed % 2**32, (seed // 2**32) % 2**32], dtype=np.uint64)
    return int(philox_numpy(counter, key)[token % 4])


def gumbel_float64(bits: np.ndarray) -> np.ndarray:
    v = np.minimum((bits.astype(np.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -np.log(-np.log1p(-v))


def make_rows(kind: str, rows: int, vocab: int, seed: int = 0) -> Tensor:
    """float32 logits [rows, vocab] of one kind; see KINDS."""
    g = torch.Generator().manual_seed(seed * 1000 + vocab)
    x = torch.randn(rows, vocab, generator=g) * 3
    pick = torch.rand(rows, vocab, generator=g)
    if kind == "random":
        return x
    if kind == "ties":
        return x.round()
    if kind == "all_equal":
        return torch.full_like(x, 1.5)
    if kind == "clustered":  # far more tokens within a fraction of a logit than any sort width
        return 5 + x * 1e-4
    if kind == "one_hot":
        return torch.zeros_like(x).scatter_(1, pick.argmax(1, keepdim=True), 30.0)
    if kind == "bf16":
        return (x * 4).bfloat16().float()
    if kind == "nan":
        return x.masked_fill(pick < 0.3, float("nan"))
    if kind == "neg_inf":
        return x.masked_fill(pick < 0.6, NEG_INF)
    if kind == "neg_zero":
        return torch.where(pick < 0.5, -0.0, 0.0).where(pick < 0.8, x - 6)
    if kind == "empty":
        return torch.full_like(x, NEG_INF).masked_fill(pick < 0.2, float("nan"))
    if kind == "pos_inf":
        x = x.masked_fill(pick < 0.1, float("inf")).masked_fill(pick > 0.95, float("nan"))
        x[:, vocab // 2] = float("inf")
        return x
    raise ValueError(kind)


KINDS = ("random", "ties", "all_equal", "clustered", "one_hot", "bf16", "nan", "neg_inf", "neg_zero", "empty")


def clean(logits: Tensor) -> Tensor:
    """NaN is -inf; beside +inf only the +inf tokens count, equally; -0.0 is +0.0."""
    x = torch.where(torch.isnan(logits), NEG_INF, logits.float())
    x = torch.where(x == 0, torch.zeros_like(x), x)
    inf = x == float("inf")
    return torch.where(inf.any(-1, keepdim=True), torch.where(inf, 0.0, NEG_INF), x)


def warper_sets(
    logits: Tensor, t: float, k: int, p: float, m: float, order: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """bool [R, V]: what transformers' own warpers keep of each row.  Temperature 0 filters like temperature 1.

    dtype: what top-k, top-p and min-p compute in; the temperature divides in float32 always, since that makes ties.
    """
    temperature = TemperatureLogitsWarper(float(t)) if t > 0 else None
    top_k = TopKLogitsWarper(top_k=k) if k > 0 else None
    top_p = TopPLogitsWarper(top_p=p) if p < 1 else None
    min_p = MinPLogitsWarper(min_p=m) if m > 0 else None
    chain = {"transformers": (temperature, top_k, top_p, min_p), "vllm": (temperature, min_p, top_k, top_p)}[order]
    scores = clean(logits)
    # The warpers sort unstably, and torch's vectorised sort then orders ties by chance: the rule is the stable sort.
    with mock.patch("torch.sort", functools.partial(torch.sort, stable=True)):
        for warper in chain:
            if warper is not None:
                scores = warper(torch.zeros(logits.shape[0], 1, dtype=torch.long), scores)
            if warper is temperature:
                scores = scores.to(dtype)
    return scores > NEG_INF


def top_p_edges(logits: Tensor, t: float, k: int, p: float, m: float, order: str) -> Tensor:
    """bool [R, V]: tokens whose float64 cumulative mass is within TOP_P_EDGE of the top-p threshold."""
    if p >= 1:
        return torch.zeros(logits.shape, dtype=torch.bool)
    before = warper_sets(logits, t, k, 1.0, m if order == "vllm" else 0.0, order)
    z = (clean(logits) / (t if t > 0 else 1.0)).masked_fill(~before, NEG_INF)
    # Ascending and stable: of equal tokens the lowest id goes first, so it has the least mass below it.
    z, places = z.sort(dim=-1, stable=True)
    mass = torch.exp(z.double() - z[:, -1:].double()).nan_to_num(0.0)
    cumulative = mass.cumsum(-1) / mass.sum(-1, keepdim=True)
    edge = (cumulative - (1 - p)).abs() < TOP_P_EDGE
    return torch.zeros_like(edge).scatter(-1, places, edge) & before


@dataclass(frozen=True)
class Setting:
    """One row's sampling problem; the arguments of ``exact_step`` and of the op under test."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    beta: float = 0.25
    order: str = "transformers"
    cap: int = 256
    model_weight: float = 1.0
    edited: bool = False  # logits differ from model_logits
    head: dict[str, float] = field(default_factory=dict)


@dataclass
class Exact:
    probability: np.ndarray  # [V] float64
    logprob: np.ndarray  # [V], -inf outside the support
    base_logprob: np.ndarray  # [V]
    novelty: np.ndarray  # [V], 0 where not scored
    new: np.ndarray  # [V] reweighted logits, -inf outside the support
    kl: float
    count: int
    scored: np.ndarray  # bool [V]


def exact_head(head: Head, direction: np.ndarray) -> np.ndarray:
    """clip(softcap(scale * ((W - center) v + bias))) for the whole vocabulary, float64."""
    w = head.weight.double().numpy()
    if head.center is not None:
        w = w - head.center.double().numpy()
    x = w @ direction
    if head.bias is not None:
        x = x + head.bias.double().numpy()
    x = x * head.scale
    if head.softcap is not None:
        x = head.softcap * np.tanh(x / head.softcap)
    return x if head.clip is None else np.clip(x, -head.clip, head.clip)


def log_sum_exp(x: np.ndarray) -> float:
    top = x.max()
    return top if top == NEG_INF else float(top + np.log(np.exp(x - top).sum()))


def exact_step(
    logits: Tensor, setting: Setting, distilled: np.ndarray | None = None, model_logits: Tensor | None = None
) -> Exact:
    """The whole sampling step for one row of float32 logits [V], from the design's text, in float64."""
    s = setting
    kept = warper_sets(logits[None], s.temperature, s.top_k, s.top_p, s.min_p, s.order)[0].numpy()
    x = clean(logits[None])[0].double().numpy()
    raw = x if model_logits is None else clean(model_logits[None])[0].double().numpy()
    t = s.temperature if s.temperature > 0 else 1.0
    by_rank = np.lexsort((np.arange(len(x)), -x))  # most likely first, then lowest id
    scored = np.zeros_like(kept)
    scored[[c for c in by_rank if kept[c]][: s.cap]] = True

    new, novelty = np.where(kept, x, NEG_INF), np.zeros_like(x)
    if s.beta != 0 and distilled is not None:
        novelty[scored] = s.model_weight * raw[scored] - distilled[scored]
        new[scored] = x[scored] + s.beta * novelty[scored]
        if kept.sum() > s.cap and s.temperature > 0:
            new[scored] += t * (log_sum_exp(x[scored] / t) - log_sum_exp(new[scored] / t))
    logprob = new / t - log_sum_exp(new / t)
    before = np.where(kept, x, NEG_INF) / t
    before = before - log_sum_exp(before)
    probability = np.exp(logprob)
    if s.temperature == 0:
        best = int(np.argmax(np.where(scored, new, NEG_INF)))
        probability, logprob = np.eye(len(x))[best], np.zeros_like(x)
        kl = 0.0
    else:
        kl = float((probability[kept] * (logprob[kept] - before[kept])).sum())
    return Exact(probability, logprob, raw - log_sum_exp(raw), novelty, new, kl, int(kept.sum()), scored)


def chi_square_p_value(tokens: Tensor, probability: np.ndarray) -> float:
    """p-value of drawn tokens [N] against probabilities [V]; bins that expect fewer than 5 are merged."""
    from scipy.stats import chi2

    observed = np.bincount(tokens.numpy(), minlength=len(probability)).astype(np.float64)
    expected = probability * observed.sum()
    small = expected < 5
    o, e = observed[~small], expected[~small]
    if expected[small].sum() >= 5:
        o, e = np.append(o, observed[small].sum()), np.append(e, expected[small].sum())
    if len(e) < 2:
        return 1.0
    return float(chi2.sf(((o - e) ** 2 / e).sum(), len(e) - 1))
