"""Work files of calibration that are broken, hostile, or of something else; and nothing is unpickled anywhere."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import Metadata, Tensors, like, read, refused, with_tensor
from floor_plan import files
from interrupts import interrupted
from safetensors.torch import save_file
from torch import nn

from esamp_core import countdown
from esamp_core.calibration import Calibration, CalibrationConfig, calibrate, save_start
from esamp_core.calibration.work import Work
from esamp_core.explorer.start import start_weights
from esamp_core.models.fingerprint import model_fingerprint
from esamp_core.sample import DistillerConfig

SMALL = CalibrationConfig(rank=2, samples=1, max_new_tokens=6, steps=200, batch=16)
PROMPTS = ["3 7 3 5 -> 41 :", "1 2 3 4 -> 10 :", "5 5 5 1 -> 20 :", "2 2 2 2 -> 8 :"]


def stopped_at(saves: int, model: Any, tokenizer: Any, work: Path) -> Path:
    """A work file of a run that Ctrl-C has ended after so many saves: one for the prompts, then one every 100 steps."""
    save, done = Work.save, 0

    def stopping(file: Work) -> None:
        nonlocal done
        save(file)
        done += 1
        if done == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, tokenizer, PROMPTS, SMALL, work)
    return work


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return countdown.load()


@pytest.fixture(scope="module")
def work(embedded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_at(2, *embedded, tmp_path_factory.mktemp("work") / "x.work")


class Reached(Exception):
    """The work file was taken, and calibration would go on."""


def take(
    model: Any, tokenizer: Any, path: Path, config: CalibrationConfig = SMALL, prompts: list[str] = PROMPTS
) -> None:
    """Calibrate as far as the first thing that is done with a work file."""

    def reached(*_: object) -> None:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esamp_core.calibration.pipeline.own_samples", reached)
        calibrate(model, tokenizer, prompts, config, path)


def test_a_work_file_is_taken_up(embedded: tuple[Any, Any], work: Path) -> None:
    with pytest.raises(Reached):
        take(*embedded, work)


def moved(model: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


OTHER_MODELS: dict[str, Callable[[Any], object]] = {
    "all weights": lambda m: [p.normal_(std=0.05, generator=torch.Generator().manual_seed(1)) for p in m.parameters()],
    "one block, and the same head": lambda m: m.model.layers[1].mlp.down_proj.weight.mul_(1.01),
    "one norm": lambda m: m.model.norm.weight.add_(1e-3),
    "another dtype": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_work_file_of_another_model_is_refused(name: str, embedded: tuple[Any, Any], work: Path) -> None:
    before = work.read_bytes()
    other = moved(embedded[0], OTHER_MODELS[name])
    assert model_fingerprint(other) != model_fingerprint(embedded[0])
    assert model_fingerprint(copy.deepcopy(embedded[0])) == model_fingerprint(embedded[0])
    message = refused(lambda: take(other, embedded[1], work))
    assert "another model" in message and work.read_bytes() == before


def test_a_work_file_of_other_settings_is_refused_with_the_difference(embedded: tuple[Any, Any], work: Path) -> None:
    assert "steps 200, now 300" in refused(lambda: take(*embedded, work, replace(SMALL, steps=300)))
    assert "rate 0.003, now 0.01" in refused(lambda: take(*embedded, work, replace(SMALL, rate=0.01)))
    assert "other prompts" in refused(lambda: take(*embedded, work, prompts=PROMPTS[::-1]))
    # A work file that was saved while prompts were still being drawn knows its model too.
    early = stopped_at(1, *embedded, work.with_name("early.work"))
    other = moved(embedded[0], OTHER_MODELS["all weights"])
    assert "another model" in refused(lambda: take(other, embedded[1], early))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def about_of(metadata: Metadata, **values: object) -> Metadata:
    return {**metadata, "about": json.dumps({**json.loads(metadata["about"]), **values})}


BROKEN_WORK: dict[str, Callable[[Tensors, Metadata], tuple[Tensors, Metadata]]] = {
    "no metadata": lambda t, m: (t, {}),
    "about not JSON": lambda t, m: (t, {**m, "about": "{"}),
    "about empty": lambda t, m: (t, {**m, "about": "{}"}),
    "steps beyond the end": lambda t, m: (t, about_of(m, step=201)),
    "step -1": lambda t, m: (t, about_of(m, step=-1)),
    "step 0 with weights": lambda t, m: (t, about_of(m, step=0)),
    "more prompts done than there are": lambda t, m: (t, about_of(m, prompts_done=5)),
    "fewer prompts done": lambda t, m: (t, about_of(m, prompts_done=3)),
    "no weights": lambda t, m: ({k: v for k, v in t.items() if not k.startswith("weights.")}, m),
    "weights NaN": with_tensor("weights.up", like(float("nan"))),
    "moments negative": with_tensor("square.up", like(-1.0)),
    "tokens short": with_tensor("tokens", lambda t: t[:-1].clone()),
    "tokens negative": with_tensor("tokens", like(-1)),
    "tokens of other prompts": with_tensor("tokens", lambda t: t.flip(0)),
    "tokens float": with_tensor("tokens", lambda t: t.float()),
    "sizes negative": with_tensor("sequences", like(-3)),
    "sizes huge": with_tensor("sequences", like(2**31 - 1)),
    "sizes flat": with_tensor("sequences", lambda t: t.flatten()),
}


@pytest.mark.parametrize("name", BROKEN_WORK)
def test_a_broken_work_file_is_refused(name: str, embedded: tuple[Any, Any], work: Path, tmp_path: Path) -> None:
    tensors, metadata = BROKEN_WORK[name](*read(work))
    broken = tmp_path / "x.work"
    save_file({k: t.contiguous() for k, t in tensors.items()}, broken, metadata=metadata)
    assert "remove" in refused(lambda: take(*embedded, broken))


def test_a_work_file_is_never_unpickled(embedded: tuple[Any, Any], work: Path, tmp_path: Path) -> None:
    raw = work.read_bytes()
    for number, content in enumerate((b"", b"abc" * 100, raw[: len(raw) // 2], raw[:500], pickle.dumps(Bomb()))):
        path = tmp_path / f"{number}.work"
        path.write_bytes(content)
        assert "remove" in refused(lambda: take(*embedded, path))  # noqa: B023
    torch.save({"identity": Bomb()}, tmp_path / "torch.work")
    refused(lambda: take(*embedded, tmp_path / "torch.work"))
    assert not Path("exploded").exists()


def test_nothing_of_ours_reads_pickles() -> None:
    unpickling = {
        file.module
        for file in files()
        if file.room != "tests" and any(w in file.source for w in ("torch.load(", "pickle"))
    }
    assert not unpickling


def test_a_start_is_written_whole_or_not_at_all(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    weights = start_weights(128, DistillerConfig(rank=2), torch.device("cpu"))
    found = Calibration(weights, 1.0, 1.0, 0.5, 0.9, torch.zeros(128), 10)
    path = tmp_path / "start"
    path.write_bytes(b"old")
    for _ in interrupted(lambda _: lambda: save_start(path, found, "countdown", embedded[0]), "/base/files"):
        assert os.listdir(tmp_path) == ["start"]
