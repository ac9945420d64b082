"""Calibration: lower error on held-out tokens, the same function after balancing, resumable, and the bank's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esamp_core import countdown
from esamp_core.base.errors import ArgumentError
from esamp_core.calibration import Calibration, CalibrationConfig, calibrate, fit, save_start, states
from esamp_core.calibration.states import States
from esamp_core.calibration.work import Work
from esamp_core.explorer.bank import DistillerBank
from esamp_core.explorer.start import start_weights
from esamp_core.reference.gauge import WINDOW
from esamp_core.sample import DistillerConfig, DistillerWeights, distiller_forward, group_rows

CPU = torch.device("cpu")
SMALL = CalibrationConfig(rank=8, samples=2, max_new_tokens=26, held_out=0.25, steps=60, batch=128, rate=1e-2)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return countdown.load()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [p.prompt for p in countdown.held_out_problems("tune", 20)]


@pytest.fixture(scope="module")
def result(model: tuple[Any, Any], prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrate(*model, prompts, SMALL, tmp_path_factory.mktemp("c") / "w")


def test_the_error_falls_on_prompts_that_did_not_teach(result: Calibration) -> None:
    assert result.before > 1.0
    assert result.after < 0.8 * result.before
    assert result.held_out_tokens > 100


def test_states_are_those_of_decoding(model: tuple[Any, Any], prompts: list[str]) -> None:
    """One row at a time, without padding: what the model's own forward says at each generated position."""
    from esamp_core.decoder import Decoder

    network, tokenizer = model
    decoder = Decoder(network, tokenizer)
    ids = [tokenizer(p)["input_ids"] for p in prompts[:2]]
    drawn = [[20, 100, 7], [5, 103, 9, 104, 12, 3]]
    sequences = [(i, ids[i], drawn[i]) for i in range(2)]
    sizes: list[int] = []
    found = states.collect(decoder.parts, sequences, sizes.append)
    out = network(torch.tensor([ids[1] + drawn[1][:-1]]), output_hidden_states=True)
    at = slice(len(ids[1]) - 1, None)
    # Longest first, so the second sequence comes first; hidden_states[1] is what the first block puts out.
    torch.testing.assert_close(found.shallow[:6], out.hidden_states[1][0, at], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.deep[:6], out.hidden_states[-1][0, at], atol=1e-4, rtol=1e-4)
    assert len(found.deep) == 6 + 3


def test_balancing_changes_no_prediction(result: Calibration) -> None:
    torch.manual_seed(0)
    shallow = torch.randn(40, 128)
    lopsided = result.weights._replace(up=result.weights.up / 50, down=result.weights.down * 50)
    balanced = fit.balanced(lopsided, States(shallow, shallow), result.deep_scale)

    def predicted(weights: DistillerWeights) -> torch.Tensor:
        groups = group_rows(torch.zeros(40, dtype=torch.int64), 1)
        one = DistillerWeights(*(w[None] for w in weights))
        return distiller_forward(shallow, groups, one, torch.tensor(result.deep_scale)).pred

    torch.testing.assert_close(predicted(balanced), predicted(lopsided), atol=1e-4, rtol=1e-4)
    # Balanced weights do not depend on how lopsided they came.
    again = fit.balanced(result.weights, States(shallow, shallow), result.deep_scale)
    torch.testing.assert_close(again.up, balanced.up, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("stop_at", ["generate", "fit"])
def test_an_interrupted_run_ends_with_the_same_weights(
    model: tuple[Any, Any],
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    result: Calibration,
    stop_at: str,
) -> None:
    monkeypatch.setattr(fit, "SAVE_EVERY", 20)
    saves = 0
    save = Work.save

    def interrupting(work: Work) -> None:
        nonlocal saves
        save(work)
        saves += 1
        if saves == (1 if stop_at == "generate" else 4):  # 20 prompts are two saves; then one every 20 steps
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*model, prompts, SMALL, tmp_path / "w")
    monkeypatch.setattr(Work, "save", save)
    resumed = calibrate(*model, prompts, SMALL, tmp_path / "w")
    for a, b in zip(resumed.weights, result.weights, strict=True):
        assert a.equal(b)
    assert (resumed.before, resumed.after) == (result.before, result.after)
    with pytest.raises(ArgumentError, match="belongs to another run"):
        calibrate(*model, prompts[1:], SMALL, tmp_path / "w")


def test_the_bank_starts_from_the_file(result: Calibration, model: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    save_start(path, result, "countdown", model[0])
    config = DistillerConfig(rank=8, start=str(path))
    bank = DistillerBank(128, config, 3, CPU)
    slot = 1
    bank.reset(slot, 1)
    for pool, fitted in zip(bank.state.weights, result.weights, strict=True):
        torch.testing.assert_close(pool[slot], fitted, atol=0, rtol=0)
    # It is trusted as far as held-out states said, from the first token on, and that judgement is soon replaced.
    assert 0 < result.after < result.baseline < 1
    assert float(bank.gauge.trust[slot]) == pytest.approx(1 - result.after / result.baseline, rel=1e-6)
    assert bank.gauge.mean[slot].equal(result.mean) and int(bank.gauge.steps[slot]) == WINDOW + 1
    half = start_weights(128, DistillerConfig(rank=8, start=str(path), weight_dtype=torch.bfloat16), CPU)
    assert half.up.dtype == half.down.dtype == half.gate.dtype == torch.bfloat16
    assert half.gate_bias.dtype == torch.float32
    with pytest.raises(ArgumentError, match="H=128 and rank=16, got \\(128, 8\\)"):
        start_weights(128, DistillerConfig(rank=16, start=str(path)), CPU)
    with pytest.raises(ArgumentError, match="H=64"):
        start_weights(64, config, CPU)


def test_other_files_are_no_start(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="start cannot be read"):
        start_weights(8, DistillerConfig(start=str(tmp_path / "none")), CPU)
    with pytest.raises(ArgumentError, match="written by `esamp calibrate`"):
        start_weights(128, DistillerConfig(start=str(countdown.PATH / "model.safetensors")), CPU)
    with pytest.raises(ArgumentError, match='with target "deep"'):
        DistillerConfig(start="x", target="choice")


def test_the_shipped_start_is_better_than_the_plain_one(model: tuple[Any, Any]) -> None:
    """On held-out problems: before any lesson, and learning on from there at its rate."""
    from bench.learning_rule import Recipe, record, relearn
    from bench.quality_tasks import CountdownTask, Source

    recording = record(Source("countdown", *model), CountdownTask(), 6, 8, seed=3)
    plain = relearn(recording, Recipe("plain", DistillerConfig()))
    frozen = relearn(recording, Recipe("frozen", DistillerConfig(start=str(countdown.DISTILLER), lr=0.0, gate=False)))
    learning = relearn(recording, Recipe("learning", DistillerConfig(start=str(countdown.DISTILLER))))
    assert frozen.mean() < 0.7 * plain.mean()
    assert learning.mean() < frozen.mean()


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("held_out", 1.0), ("rate", 0.0), ("steps", True)])
def test_calibration_config_is_checked_when_made(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=field):
        CalibrationConfig(**{field: value})  # type: ignore[arg-type]


def test_a_calibrated_start_has_a_rate_of_its_own() -> None:
    assert DistillerConfig().lr == 0.1 and DistillerConfig(start="file").lr == 0.03
    assert DistillerConfig(start="file", lr=0.2).lr == 0.2


def test_one_prompt_is_too_few(model: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="at least two"):
        calibrate(*model, ["3 7 3 5 -> 41 :"], SMALL, tmp_path / "w")
