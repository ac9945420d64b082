"""The study's batched Distillers against the library's reference, and relearn against the learning it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.learning_rule import Recipe, Recording, recipes, record, relearn, relearn_ridge
from bench.quality_decode import request_seeds
from bench.quality_distiller import STUDY_LR, DenseDistillers
from bench.quality_tasks import CountdownTask, Source, load_source
from esamp_core import countdown
from esamp_core.explorer.bank import DistillerBank
from esamp_core.sample import DistillerConfig, distiller_forward, distiller_step_, group_rows

HIDDEN, SCALE = 24, 1.7


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source("countdown")


def states(steps: int, groups: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shallow = torch.randn(steps, groups, n, HIDDEN, generator=generator) * 3
    deep = shallow.roll(1, -1) * 0.5 + torch.randn(steps, groups, n, HIDDEN, generator=generator)
    taught = torch.rand(steps, groups, n, generator=generator) < 0.6
    taught[2, 0] = False  # a whole group that does not learn in one step
    return shallow, deep, taught


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("clip", [1.0, 0.05])
@pytest.mark.parametrize("target", ["deep", "choice"])
def test_batched_distillers_learn_as_the_reference_does(momentum: float, clip: float, target: str) -> None:
    groups, n = 3, 5
    config = DistillerConfig(rank=4, lr=0.4, momentum=momentum, clip=clip, target=target)  # type: ignore[arg-type]
    dense = DenseDistillers(groups, HIDDEN, config, SCALE)
    bank = DistillerBank(HIDDEN, config, groups, torch.device("cpu"))
    slots = torch.arange(groups)
    for slot in slots.tolist():
        bank.reset(slot, 0)
    rows = group_rows(slots.repeat_interleave(n), groups)
    for shallow, deep, taught in zip(*states(6, groups, n), strict=True):
        theirs = distiller_forward(shallow.flatten(0, 1), rows, bank.state.weights, torch.tensor(SCALE))
        mine = dense.predict(shallow)
        torch.testing.assert_close(mine.flatten(0, 1), theirs.pred, atol=2e-4, rtol=2e-4)
        relative = (theirs.pred - deep.flatten(0, 1)).square().sum(-1) / deep.flatten(0, 1).square().sum(-1)
        torch.testing.assert_close(dense.errors(deep).flatten(), relative, atol=1e-3, rtol=1e-3)
        distiller_step_(
            bank.state, theirs, deep.flatten(0, 1), rows, torch.tensor(SCALE), config, active=taught.flatten()
        )
        dense.learn(deep, taught)
        for a, b in zip(dense.weights, bank.state.weights, strict=True):
            torch.testing.assert_close(a, b[slots], atol=2e-4, rtol=2e-3)


@pytest.fixture(scope="module")
def recording(source: Source) -> Recording:
    return record(source, CountdownTask(), 3, 4, seed=2)


def test_a_recording_holds_the_models_states_and_its_own_tokens(source: Source, recording: Recording) -> None:
    prompt = source.encode(countdown.held_out_problems("tune", 3)[1].prompt)
    on = recording.on[:, 1, 2]
    row = recording.tokens[on, 1, 2].tolist()
    with torch.no_grad():
        out = source.model(torch.tensor([prompt + row[:-1]]), output_hidden_states=True)
    at = slice(len(prompt) - 1, None)
    torch.testing.assert_close(recording.shallow[on, 1, 2], out.hidden_states[1][0, at], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(recording.deep[on, 1, 2], out.hidden_states[-1][0, at], atol=1e-3, rtol=1e-3)
    assert row[-1] in source.stop_ids or len(row) == countdown.MAX_NEW_TOKENS
    assert recording.setting.request_seeds.equal(request_seeds(2, 0, 3))


def test_replay_measures_before_it_learns(recording: Recording) -> None:
    learning, frozen = (relearn(recording, Recipe("", DistillerConfig(lr=lr, gate=False))) for lr in (0.3, 0.0))
    assert learning[0] == frozen[0]  # nothing was learned yet
    assert learning[20:].mean() < 0.9 * frozen[20:].mean()
    first = relearn(recording, Recipe("", DistillerConfig(lr=0.3), rows=1))
    assert first[0] == learning[0] and first[20:].mean() > learning[20:].mean()


def test_a_choice_distiller_that_knows_nothing_has_error_one(recording: Recording) -> None:
    frozen = relearn(recording, Recipe("", DistillerConfig(lr=0.0, target="choice")))
    torch.testing.assert_close(frozen, torch.ones_like(frozen))
    assert relearn_ridge(recording)[0] == pytest.approx(1.0)
    assert relearn(recording, Recipe("", DistillerConfig(lr=STUDY_LR, target="choice")))[10:25].mean() < 0.97


def test_one_thing_varies_per_group_of_recipes() -> None:
    groups = dict(recipes(str(countdown.DISTILLER)))
    assert set(groups) == {"rate", "momentum", "rows", "rank", "calibrated start", "choice target"}
    assert "calibrated start" not in dict(recipes(None))
    default = DistillerConfig(lr=STUDY_LR, gate=False)
    assert [r.config for r in groups["rows"]] == [default] * 3
    assert all(r.config == DistillerConfig(lr=r.config.lr, gate=False) for r in groups["rate"])
    assert default in [r.config for r in groups["rate"]]
