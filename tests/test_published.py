"""Distillers as they were published: their networks against torch.nn, their learning against torch.optim."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from explorer_helpers import HIDDEN, logits_of, make, taps
from torch import Tensor, nn

from esamp_core.base.tensors import RowGroups
from esamp_core.explorer.learner import Learner
from esamp_core.reference.published import RECIPES
from esamp_core.sample import (
    PRESETS,
    ArgumentError,
    DistillerConfig,
    Explorer,
    SamplingParams,
    StateError,
    distiller_step_,
)

RANK = 6
CONFIGS = {name: DistillerConfig(recipe=name, rank=RANK, gate=False, seed=3) for name in RECIPES}  # type: ignore
PARAMS = SamplingParams(beta=0.5, seed=5)


class Gated(nn.Module):
    """One layer, of torch's own parts."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.gate, self.down = (
            nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(HIDDEN, RANK, bias=bias), nn.Linear(RANK, HIDDEN, bias=False)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.up(x) * nn.functional.silu(self.gate(x)))
        return found


class Oracle:
    """A Distiller of a recipe and torch's optimizer for it, in float64, from the weights in a slot."""

    def __init__(self, name: str, explorer: Explorer, group: str) -> None:
        self.name = name
        affine = name == "release"
        layers: list[nn.Module] = [Gated(affine) for _ in range(1 if affine else 2)]
        self.net = nn.Sequential(*layers, *([nn.LayerNorm(HIDDEN)] if affine else [])).double()
        self._take(explorer, group)
        parameters = self.net.parameters()
        self.optimizer = (
            torch.optim.SGD(parameters, lr=1e-3) if affine else torch.optim.Adam(parameters, lr=4e-4, eps=1e-4)
        )

    def named(self) -> Iterator[tuple[str, int, Tensor]]:
        """Field of the bank, layer, and the parameter as it lies there."""
        for number, layer in enumerate(self.net):
            if isinstance(layer, Gated):
                for field in ("up", "gate", "down"):
                    yield field, number, getattr(layer, field).weight.data.T
                if layer.gate.bias is not None:
                    yield "gate_bias", number, layer.gate.bias.data
            else:
                yield "norm_weight", -1, layer.weight.data
                yield "norm_bias", -1, layer.bias.data

    def _take(self, explorer: Explorer, group: str) -> None:
        for field, layer, parameter in self.named():
            parameter.copy_(weight_of(explorer, group, field, layer))

    def learn(self, shallow: Tensor, deep: Tensor) -> None:
        if self.name == "release":
            shallow, deep = shallow[:1], deep[:1]
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.net(shallow.double()), deep.double()).backward()
        if self.name == "paper":
            nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.optimizer.step()


def weight_of(explorer: Explorer, group: str, field: str, layer: int) -> Tensor:
    state = explorer.state_dict()
    place = [entry["group"] for entry in state["groups"]].index(group)
    found: Tensor = state["tensors"][f"weights.{field}"][place]
    return found if layer < 0 else found[layer]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [1.0, 30.0])  # states whose gradients are clipped, and not
def test_networks_and_learning_are_torchs_own(name: str, size: float) -> None:
    """Two groups of three rows, of which some are switched off: each learns from its own active rows alone."""
    torch.manual_seed(0)
    explorer = make(CONFIGS[name])
    rows = explorer.open(["a", "b", "a", "b", "a", "b"], PARAMS)
    oracles = {group: Oracle(name, explorer, group) for group in "ab"}
    clipped = 0
    for number in range(12):
        rows.active.copy_(torch.tensor([number % 3 != 0, True, True, number % 4 != 0, True, number != 5]))
        shallow, deep = (size * t for t in taps(6, number))
        deep = deep + 0.3 * size
        explorer.predict(shallow, rows)
        pred = explorer.prediction(rows)
        for group, oracle in oracles.items():
            members = [i for i in range(6) if rows.groups[i] == group]
            with torch.no_grad():
                want = oracle.net(shallow[members].double())
            torch.testing.assert_close(pred[members].double(), want, rtol=1e-4, atol=1e-4 * size)
            taught = [i for i in members if rows.active[i]]
            oracle.learn(shallow[taught], deep[taught])
            grads = [p.grad for p in oracle.net.parameters() if p.grad is not None]
            clipped += float(torch.stack([g.norm() for g in grads]).norm()) > 0.4999
        explorer.sample(logits_of(explorer, deep), rows)
        explorer.learn(deep, rows)
    if name == "paper":
        assert clipped == 24 if size > 1 else clipped < 24
    moved = 0.0
    start = make(CONFIGS[name])
    opened = start.open(["a"], PARAMS)
    for group, oracle in oracles.items():
        for field, layer, want in oracle.named():
            got = weight_of(explorer, group, field, layer).double()
            # A step of Adam is lr g / (sqrt(v) + eps): float32's 1e-6 of the gradients moves 12 of them by less.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6, msg=lambda m, f=field: f"{f}: {m}")
            moved = max(moved, float((want - weight_of(start, "a", field, layer)).abs().max()))
    assert moved > 1e-4 and len(opened) == 1
    stats = explorer.stats()
    assert all(s.updates == 12 and s.nonfinite == 0 and s.trust == 1 for s in stats.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_reported_loss_is_the_relative_error_of_the_rows_that_teach(name: str) -> None:
    explorer = make(CONFIGS[name])
    rows = explorer.open(["a"] * 4, PARAMS)
    shallow, deep = taps(4)
    explorer.predict(shallow, rows)
    taught = slice(0, 1) if name == "release" else slice(None)
    error = explorer.prediction(rows)[taught] - deep[taught]
    explorer.learn(deep, rows)
    want = (error.square().sum(-1) / deep[taught].square().sum(-1)).mean()
    assert explorer.stats()["a"].loss == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_state_that_is_not_finite_teaches_nothing(name: str) -> None:
    explorer = make(CONFIGS[name])
    rows = explorer.open(["a", "b"], PARAMS)
    before = weight_of(explorer, "a", "up", 0)
    shallow, deep = taps(2)
    deep[0, 3] = float("inf")
    explorer.predict(shallow, rows)
    explorer.learn(deep, rows)
    assert torch.equal(weight_of(explorer, "a", "up", 0), before)
    assert [explorer.stats()[g].nonfinite for g in "ab"] == [1, 0]
    assert [explorer.stats()[g].updates for g in "ab"] == [0, 1]


@pytest.mark.parametrize("name", RECIPES)
def test_novelty_and_mixing_are_the_methods(name: str) -> None:
    """(1 + beta) x - beta prediction, before the head or behind it."""
    explorer = make(CONFIGS[name])
    rows = explorer.open(["a"] * 3, PARAMS)
    shallow, deep = taps(3)
    explorer.predict(shallow, rows)
    mixed = explorer.mix(deep, rows)
    torch.testing.assert_close(mixed, 1.5 * deep - 0.5 * explorer.prediction(rows))
    headless = Explorer(None, HIDDEN, CONFIGS[name], max_groups=2, max_rows=4, device="cpu")
    headless.warm_up()
    others = headless.open(["a", None, "a"], PARAMS)
    others.active[2] = False
    headless.predict(shallow, others)
    mixed = headless.mix(deep, others)
    torch.testing.assert_close(mixed[0], 1.5 * deep[0] - 0.5 * headless.prediction(others)[0])
    assert torch.equal(mixed[1:], deep[1:])


def test_a_slot_starts_afresh_with_its_moments() -> None:
    explorer = make(CONFIGS["paper"], max_groups=1)
    drawn = []
    for _ in range(2):
        rows = explorer.open(["a"] * 3, PARAMS)
        for number in range(4):
            shallow, deep = taps(3, number)
            explorer.predict(shallow, rows)
            drawn.append(explorer.sample(logits_of(explorer, deep), rows))
            explorer.learn(deep, rows)
        explorer.close(rows)
    for first, second in zip(drawn[:4], drawn[4:], strict=True):
        assert torch.equal(first.logprob, second.logprob)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gate": True}, "gate must be False"),
        ({"target": "choice"}, "target must be 'deep'"),
        ({"momentum": 0.5}, "momentum must be 0"),
        ({"weight_dtype": torch.bfloat16}, "weight_dtype must be torch.float32"),
        ({"start": "x.safetensors"}, "start must be None"),
        ({"recipe": "other"}, "recipe must be one of default, paper, release"),
    ],
)
def test_what_a_recipe_does_not_know_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        DistillerConfig(**({"recipe": "paper", "gate": False} | change))  # type: ignore[arg-type]


def test_rates_are_the_recipes_own_unless_given() -> None:
    assert [CONFIGS[name].lr for name in ("paper", "release")] == [4e-4, 1e-3]
    assert dataclasses.replace(CONFIGS["paper"], lr=0.0).lr == 0


def test_states_of_another_recipe_are_refused() -> None:
    saved = make(CONFIGS["paper"])
    saved.open(["a"], PARAMS)
    for other in (CONFIGS["release"], DistillerConfig(rank=RANK, gate=False, deep_scale=1.0)):
        with pytest.raises(ArgumentError, match="must fit config"):
            make(other).load_state_dict(saved.state_dict())


def test_the_op_of_the_default_refuses_them() -> None:
    groups = RowGroups(*(torch.zeros(n, dtype=torch.int32) for n in (1, 1, 2)))
    with pytest.raises(ArgumentError, match=r"config\.recipe must be \"default\" here"):
        distiller_step_(None, None, taps(1)[1], groups, torch.ones(()), CONFIGS["paper"])  # type: ignore[arg-type]


def test_presets_are_what_they_say() -> None:
    paper, release = PRESETS["paper"], PRESETS["release"]
    assert (paper.config.recipe, paper.config.rank, paper.params.beta, paper.one_for_all) == ("paper", 384, 0.25, True)
    assert (paper.params.temperature, paper.params.top_k, paper.params.top_p, paper.params.min_p) == (1, 0, 1, 0)
    assert (release.config.recipe, release.config.rank, release.config.gate) == ("release", 64, False)
    assert PRESETS["default"].config == DistillerConfig()
    with pytest.raises(TypeError):
        PRESETS["mine"] = paper  # type: ignore[index]


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_not_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for the device; said before anything is enqueued, not by a broken capture."""
    explorer = make(CONFIGS[name])
    rows = explorer.open(["a"] * 3, PARAMS)
    monkeypatch.setattr(Learner, "_captured", property(lambda self: True))
    with pytest.raises(StateError, match="cannot be captured"):
        explorer.predict(taps(3)[0], rows)
