"""What is measured of a case: every op as calls on rotating inputs, what each moves at the least, and is it right."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench import peers
from bench.cases import DistillerCase, SamplingCase, make_sampling_inputs
from bench.measure import Call
from esamp_core import reference, sample
from esamp_core.explorer.bank import DistillerBank
from esamp_core.reference.distiller import learning_rates
from esamp_core.sample import (
    DistillerConfig,
    RowParams,
    Tree,
    distiller_forward,
    distiller_step_,
    draw,
    explore,
    explore_children,
    gauge_,
    group_rows,
    grow,
    reweight,
    root_noise,
    score_candidates,
    select_candidates,
)

Case = SamplingCase | DistillerCase
Costs = dict[str, tuple[float, float]]  # by op: bytes, operations
SETS = 3  # inputs that the rounds rotate through
MAX_CANDIDATES = 256
SIBLINGS = 16


def sampling_ops(case: SamplingCase, device: str) -> tuple[dict[str, list[Call]], Costs]:
    """Calls by name on SETS inputs, and what each must move and compute at the least: (bytes, operations)."""
    calls: dict[str, list[Call]] = {}
    rows, width, hidden = case.rows, MAX_CANDIDATES, case.shape.hidden
    for given in make_sampling_inputs(case, device, SETS):
        select = functools.partial(select_candidates, given.logits, given.params, max_candidates=width)
        found = select()
        score = functools.partial(score_candidates, given.direction, given.head, found.token_ids)
        projection = score()
        weigh = functools.partial(reweight, found, projection, given.params)
        new = weigh()
        options: dict[str, Any] = {"direction": given.direction, "head": given.head, "max_candidates": width}
        codes = torch.linspace(0, 0.999, 2 * rows, dtype=torch.float64, device=device).view(rows, 2)
        for name, call in {
            "select_candidates": select,
            "score_candidates": score,
            "reweight": weigh,
            "draw": functools.partial(draw, found, new, given.logits, given.params, given.seed, given.position),
            "explore": functools.partial(explore, *given[:4], **options),
            "explore, stratified": functools.partial(explore, *given[:4], codes=codes, **options),
            "explore, distinct": Branching(given, options),
            "vanilla": functools.partial(explore, *given[:4], max_candidates=width),
        }.items():
            calls.setdefault(name, []).append(call)
    # The filters leave fewer candidates than top-k allows; how many head rows are gathered is counted, not assumed.
    gathered = int((found.token_ids >= 0).sum())
    listing, heads = rows * width * 12, gathered * hidden * 2
    scan = case.scan_bytes
    moved = {
        "select_candidates": scan + listing,
        "score_candidates": heads + rows * (4 * hidden + 12 * width),
        "reweight": rows * width * 24,
        "draw": scan + listing + rows * width * 8,  # the scan is for base_logprob
        "explore": scan + heads + rows * 4 * hidden,
        "explore, stratified": scan + heads + rows * 4 * hidden,
        "explore, distinct": 2 * scan + heads + rows * 4 * hidden,  # the second scan is for base_logprob
        "vanilla": scan,
    }
    return calls, {name: (float(size), 2.0 * gathered * hidden * (size > heads)) for name, size in moved.items()}


class Branching:
    """The step of distinct siblings, 16 a set: the ops, and who goes on with what."""

    def __init__(self, given: Any, options: dict[str, Any]) -> None:
        self._given, self._options = given[:4], options
        logits, _, self._seed, self._position = given[:4]
        rows, device = len(logits), logits.device
        self._width = min(SIBLINGS, rows)
        every = torch.arange(rows // self._width * self._width, device=device)
        self._families = every.view(-1, self._width)
        self._active = torch.ones(rows, dtype=torch.bool, device=device)
        self._tree = Tree(torch.zeros(rows, dtype=torch.float64, device=device), root_noise(self._seed))

    def __call__(self) -> Any:
        _, children = explore_children(*self._given, self._width, **self._options)
        return grow(children, self._tree, self._families, self._active, self._seed, self._position)


class DistillerInputs:
    """A bank whose slots have learned a little, rows of it, and the calls."""

    def __init__(self, case: DistillerCase, device: str, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)
        hidden, rows = case.shape.hidden, case.rows
        self.config = DistillerConfig(rank=case.rank, deep_scale=1.0)
        bank = DistillerBank(hidden, self.config, case.slots, torch.device(device))
        for slot in range(case.slots):
            bank.reset(slot, slot)
        self.state, self.scale, self._gauge = bank.state, bank.scale, bank.gauge
        self.state.weights.down.normal_(0, 0.02, generator=g)
        self.shallow = torch.randn(rows, hidden, generator=g, device=device)
        self.target = torch.randn(rows, hidden, generator=g, device=device)
        self.slots = torch.arange(rows, device=device) % case.slots
        self.groups = group_rows(self.slots, case.slots)
        self.deep = self.target.bfloat16()  # as an engine has it
        self.beta = torch.full((rows,), 0.25, device=device)
        self.saved = self.forward()
        self.rates = tuple(float(r) for r in learning_rates(self.config, hidden))

    def forward(self) -> Any:
        return distiller_forward(self.shallow, self.groups, self.state.weights, self.scale)

    def step(self) -> None:
        distiller_step_(self.state, self.saved, self.target, self.groups, self.scale, self.config)

    def gauge(self) -> None:
        gauge_(self._gauge, self.saved, self.target, self.groups, self.state.weights, self.scale)

    def mix(self) -> sample.Mixed:
        return sample.mix(self.deep, self.saved, self.groups, self.state.weights, self.scale, self.beta)

    def peer_mix(self) -> torch.Tensor:
        """The same in PyTorch's own operations, from weights of every row."""
        weights, at = self.state.weights, self.slots
        normed = torch.nn.functional.layer_norm(self.saved.y, self.saved.y.shape[1:])
        pred = self.scale * (weights.norm_weight[at] * normed + weights.norm_bias[at])
        beta = self.beta[:, None]
        return ((1 + beta) * self.deep.float() - beta * pred).to(self.deep.dtype)

    def peer_forward(self) -> peers.PerRow:
        return peers.per_row_forward(self.shallow, self.slots, self.state, self.scale)

    def peer_step(self) -> None:
        peers.per_row_step_(self.state, self.peer_forward(), self.target, self.scale, self.config, self.rates)


def distiller_ops(case: DistillerCase, device: str) -> tuple[dict[str, list[Call]], Costs]:
    inputs = [DistillerInputs(case, device, seed) for seed in range(SETS)]
    states = 4 * case.rows * case.shape.hidden
    norms = 8.0 * case.slots * case.shape.hidden
    costs = {
        "distiller_forward": (case.weight_bytes + 2.0 * states, float(case.forward_flops)),
        "distiller_step_": (2.0 * case.weight_bytes + 3.0 * states, float(case.step_flops)),
        "gauge_": (norms * 2.0 + 2.0 * states, 0.0),  # y and targets; norms and means, which are written too
        "mix": (norms + 2.0 * states, 0.0),  # y, and deep read and written in bfloat16
    }
    calls: dict[str, list[Call]] = {
        "distiller_forward": [i.forward for i in inputs],
        "distiller_step_": [i.step for i in inputs],
        "gauge_": [i.gauge for i in inputs],
        "mix": [i.mix for i in inputs],
        "peer torch mix": [i.peer_mix for i in inputs],
        "peer per_row forward": [i.peer_forward for i in inputs],
        "peer per_row forward and step": [i.peer_step for i in inputs],
    }
    return calls, costs


def ops(case: Case, device: str) -> tuple[dict[str, list[Call]], Costs]:
    """Calls by name, and their costs."""
    return sampling_ops(case, device) if isinstance(case, SamplingCase) else distiller_ops(case, device)


def check(case: Case, device: str) -> str | None:
    """What is wrong with the answers on this device, against the reference on the CPU; None if nothing is."""
    if isinstance(case, DistillerCase):
        here, there = DistillerInputs(case, device, 7), DistillerInputs(case, device, 7)
        want = reference.distiller_forward(there.shallow, there.groups, there.state.weights, there.scale)
        error = float((here.saved.pred - want.pred).norm() / want.pred.norm())
        peer = float((here.peer_forward().pred - want.pred).norm() / want.pred.norm())
        exact, mixed = there.peer_mix().float(), here.mix().hidden.float()
        mixing = float((mixed - exact).norm() / exact.norm())
        here.step()
        reference.distiller_step_(there.state, want, there.target, there.groups, there.scale, there.config)
        step = float((here.state.weights.down - there.state.weights.down).norm() / there.state.weights.down.norm())
        worst = max(error, peer, step, mixing / 8)  # a last bit of bfloat16 is 2^-7; the interpreter cuts it off
        said = f"relative errors: pred {error:.1e}, peer's pred {peer:.1e}, step {step:.1e}, mix {mixing:.1e}"
        return None if worst < 1e-3 else said
    given, n = make_sampling_inputs(case, device, 1)[0], min(case.rows, 8)
    some = [given.logits[:n], RowParams(*(p[:n] for p in given.params)), given.seed[:n], given.position[:n]]
    options: dict[str, Any] = {"direction": given.direction[:n], "head": given.head, "max_candidates": MAX_CANDIDATES}
    got, want_draw = explore(*some, **options), reference.explore(*some, **options)
    if not torch.equal(got.count, want_draw.count):
        return f"candidate counts {got.count.tolist()}, expected {want_draw.count.tolist()}"
    same = got.token_ids == want_draw.token_ids
    if int((~same).sum()) > 1:  # one close call in eight rows may be chance, two are not
        return f"tokens {got.token_ids.tolist()}, expected {want_draw.token_ids.tolist()}"
    error = float((got.logprob - want_draw.logprob)[same].abs().max()) if bool(same.any()) else 1.0
    return None if error < 1e-3 else f"log-probabilities differ by {error:.1e}"
