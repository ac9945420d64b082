"""The command line, as a newcomer meets it: real runs of the embedded model, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Esamp, command, refuse_to_load
from torch import Tensor

from esamp_core import countdown
from esamp_core.decoder import Decoder
from esamp_core.sample import PRESETS, Draw, Explorer, Rows, Status


@pytest.fixture
def esamp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Esamp:
    return command(monkeypatch, capsys)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_demo_quick_reports_what_it_measured(esamp: Esamp) -> None:
    run = esamp("demo", "--quick")
    assert run.returncode == 0, run.stderr
    for expected in ("pass@1 (%)", "pass@8 (%)", "distinct correct solutions", "Distiller error", "novelty"):
        assert expected in run.stdout
    rates = re.findall(r"pass@\d+ \(%\)\s+│\s+([\d.]+)\s+│\s+([\d.]+)", run.stdout)
    assert len(rates) == 3 and all(0 < float(v) <= 100 for pair in rates for v in pair)
    errors = re.search(r"([\d.]+) at its first step,\s+([\d.]+) at its last", run.stdout)
    assert errors and float(errors[2]) < float(errors[1])
    assert "Traceback" not in run.stderr


def test_demo_repeats_itself(esamp: Esamp) -> None:
    def numbers(text: str) -> list[str]:
        return [line for line in text.splitlines() if "│" in line or "Distiller" in line]

    first, second = (esamp("demo", "--problems", "2", "--samples", "4").stdout for _ in range(2))
    assert numbers(first) and numbers(first) == numbers(second)


@pytest.mark.parametrize("command", [(), ("demo",), ("generate",), ("doctor",)])
def test_help_explains_every_option(command: tuple[str, ...], esamp: Esamp) -> None:
    run = esamp(*command, "--help")
    assert run.returncode == 0 and "Usage" in run.stdout
    options = re.findall(r"(?:│|\|)\s*\*?\s*(--[\w-]+)", run.stdout)
    assert options


def test_doctor_says_which_backend_and_why(esamp: Esamp) -> None:
    run = esamp("doctor")
    assert run.returncode == 0
    assert "backend on cpu" in run.stdout and "the tensors are on the CPU" in run.stdout
    assert re.search(r"vllm\s+not installed", run.stdout) and "Versions that were tried together" in run.stdout
    assert "ESAMP_BACKEND=torch" in esamp("doctor", ESAMP_BACKEND="torch").stdout


def test_generate_writes_one_line_per_sample(tmp_path: Path, esamp: Esamp) -> None:
    out, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    prompts.write_text("3 7 3 5 -> 41 :\n\n1 2 3 4 -> 24 :\n", encoding="utf-8")
    run = esamp("generate", "--prompts", str(prompts), "-n", "3", "--seed", "1", "--out", str(out))
    assert run.returncode == 0, run.stderr
    entries = lines_of(out)
    assert sorted((e["prompt_index"], e["sample_index"]) for e in entries) == [
        (p, s) for p in (0, 1) for s in (0, 1, 2)
    ]
    for e in entries:
        assert e["finish_reason"] in ("stop", "length")
        assert len(e["token_ids"]) == len(e["logprobs"]) == len(e["novelty"]) > 0  # type: ignore[arg-type]
    static = esamp("generate", "-n", "3", "--seed", "1", "--cache", "static", "3 7 3 5 -> 41 :", "1 2 3 4 -> 24 :")
    drawn = {
        (e["prompt_index"], e["sample_index"]): e["token_ids"] for e in map(json.loads, static.stdout.splitlines())
    }
    assert drawn == {(e["prompt_index"], e["sample_index"]): e["token_ids"] for e in entries}
    piped = esamp("generate", "-n", "3", "--seed", "1", stdin="3 7 3 5 -> 41 :\n1 2 3 4 -> 24 :\n")
    assert sorted(piped.stdout.splitlines()) == sorted(out.read_text(encoding="utf-8").splitlines())


def test_a_start_explores_from_the_first_token(esamp: Esamp) -> None:
    """A fresh Distiller is not listened to yet; without the gate it is, and neutral novelty is another."""

    def novelty(*options: str) -> list[float]:
        run = esamp("generate", "3 7 3 5 -> 41 :", "-n", "2", "--seed", "1", "--max-new-tokens", "4", *options)
        assert run.returncode == 0, run.stderr
        return [json.loads(line)["novelty"][0] for line in run.stdout.splitlines()]

    start = str(countdown.DISTILLER)
    plain, started, neutral = novelty(), novelty("--start", start), novelty("--start", start, "--neutral")
    assert plain == [0.0, 0.0] and all(started) and all(novelty("--no-gate")) and started != neutral
    other = esamp("generate", "3 7 3 5 -> 41 :", "--start", start, "--rank", "8")
    assert other.returncode == 2 and "start must be for H=128 and rank=8" in other.stderr


def test_presets_and_what_wins_over_them(tmp_path: Path, esamp: Esamp) -> None:
    """The command draws what the library draws with the preset; options that are given win, defaults do not."""
    model, tokenizer = countdown.load()
    prompts = ["3 7 3 5 -> 41 :", "1 2 3 4 -> 24 :"]

    def drawn(*options: str) -> list[list[int]]:
        run = esamp("generate", *prompts, "-n", "2", "--seed", "1", "--max-new-tokens", "12", *options)
        assert run.returncode == 0, run.stderr
        found = sorted(map(json.loads, run.stdout.splitlines()), key=lambda e: (e["prompt_index"], e["sample_index"]))
        return [e["token_ids"] for e in found]

    def library(name: str, **change: float) -> list[list[int]]:
        preset = PRESETS[name]
        groups = ["one"] * 2 if preset.one_for_all else None
        params = replace(preset.params, seed=1, **change)  # type: ignore[arg-type]
        made = Decoder(model, tokenizer, config=preset.config).generate(
            prompts, n=2, params=params, groups=groups, max_new_tokens=12
        )
        return [list(g.token_ids) for g in made]

    assert drawn() == drawn("--preset", "default") == library("default")
    for name in ("paper", "release"):
        assert drawn("--preset", name) == library(name)
    assert drawn("--preset", "paper", "--beta", "2", "--min-p", "0.05") == library("paper", beta=2.0, min_p=0.05)
    assert drawn("--preset", "paper", "--beta", "0") == library("paper", beta=0.0)
    wrong = {
        ("--preset", "other"): "--preset must be one of default, paper, release",
        ("--preset", "paper", "--gate"): "gate must be False",
        ("--preset", "paper", "--resume", "--out", str(tmp_path / "x")): "--resume cannot go on",
    }
    for options, message in wrong.items():
        run = esamp("generate", *prompts, *options)
        assert run.returncode == 2 and message in run.stderr


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, esamp: Esamp) -> None:
    prompts = ["3 7 3 5 -> 41 :", "1 2 3 4 -> 24 :", "5 5 5 5 -> 50 :"]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ("-n", "2", "--seed", "3", "--batch-rows", "2")
    assert esamp("generate", *prompts, *options, "--out", str(whole)).returncode == 0
    lines = whole.read_text(encoding="utf-8").splitlines()
    # Interrupted: one prompt whole, one sample of another, half a line of a third.
    first = [line for line in lines if json.loads(line)["prompt_index"] == 1]
    cut.write_text("\n".join([*first, lines[0], lines[-1][:40]]), encoding="utf-8")
    resumed = esamp("generate", *prompts, *options, "--out", str(cut), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(cut.read_text(encoding="utf-8").splitlines()) == sorted(lines)
    again = esamp("generate", *prompts, *options, "--out", str(cut), "--resume")
    assert again.returncode == 0 and "all 3 prompts are finished" in again.stderr
    other = esamp("generate", "something else", *options, "--out", str(cut), "--resume")
    assert other.returncode == 2 and "another prompt list" in other.stderr


MISTAKES = [
    (("generate", "x", "--temperature", "-1"), "temperature must"),
    (("generate", "x", "--top-p", "0"), "top_p must"),
    (("generate", "x", "--top-p", "1.5"), "top_p must"),
    (("generate", "x", "--min-p", "2"), "min_p must"),
    (("generate", "x", "--top-k", "-3"), "top_k must"),
    (("generate", "x", "-n", "0"), "n must"),
    (("generate", "1 2 3 4 -> 24 :", "--max-new-tokens", "0"), "max_new_tokens must"),
    (("generate", "x", "--model", "/no/such/model"), "--model '/no/such/model' cannot be loaded"),
    (("generate", "x", "--prompts", "also.txt"), "not both"),
    (("generate", "--prompts", "/no/such/file"), "--prompts cannot be read"),
    (("generate", "--prompts", os.devnull), "prompts must not be empty"),
    (("generate",), "prompts must not be empty"),
    (("generate", "x", "--out", "/no/such/folder/out.jsonl"), "--out cannot be written"),
    (("generate", "x", "--resume"), "--resume needs --out"),
    (("generate", "x", "--dtype", "int3"), "--dtype must"),
    (("generate", "x", "--cache", "elastic"), 'cache must be "dynamic" or "static"'),
    (("generate", "x", "--device", "abacus"), "--device must"),
    (("generate", "1 2 3 4 -> 24 : " + "1 " * 200), "prompt"),
    (("demo", "--beta", "nan"), "beta must"),
    (("generate", "Hello"), "the embedded model reads '3 7 3 5 -> 41 :'"),
    (("generate", "3 7 3 5 -> 41 :", "2 + 2 is", "-n", "2"), "prompts[1] must be a text that the tokenizer can encode"),
    (("generate", "3 7 3 5 -> 41 :", "--stop", ""), "stop_strings must"),
]
# What cannot be written is said before a model is loaded.
UNWRITABLE = [
    (("generate", "3 7 3 5 -> 41 :", "--run-json", "no/such/folder/run.json"), "--run-json cannot be written"),
    (("generate", "3 7 3 5 -> 41 :", "--run-json", "."), "--run-json cannot be written: .: is a folder"),
    (("generate", "3 7 3 5 -> 41 :", "--out", "no/such/folder/out.jsonl"), "--out cannot be written"),
    (("calibrate", "--prompts", __file__, "--out", "no/such/folder/d.safetensors"), "--out cannot be written"),
    (("calibrate", "--prompts", __file__, "--out", os.curdir), "--out cannot be written: .: is a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_clear_line(arguments: tuple[str, ...], message: str, esamp: Esamp) -> None:
    run = esamp(*arguments)
    assert run.returncode == 2
    assert run.stderr.startswith("esamp: error: ") and run.stderr.count("\n") == 1, run.stderr
    assert message in run.stderr


@pytest.mark.parametrize(("arguments", "message"), UNWRITABLE)
def test_unwritable_files_are_said_first(
    arguments: tuple[str, ...], message: str, esamp: Esamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    run = esamp(*arguments)
    assert run.returncode == 2 and run.stderr.startswith(f"esamp: error: {message}") and run.stderr.count("\n") == 1


def test_a_warning_is_one_clear_line(esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Explorer.sample

    def spoiled(self: Explorer, logits: Tensor, rows: Rows) -> Draw:
        logits[:, -1] = float("nan")
        return original(self, logits, rows)

    monkeypatch.setattr(Explorer, "sample", spoiled)
    run = esamp("generate", "3 7 3 5 -> 41 :", "-n", "2", "--no-distinct", "--max-new-tokens", "3")
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 2
    assert (
        run.stderr.startswith("esamp: warning: of 2 samples 2 had logits that are NaN") and run.stderr.count("\n") == 1
    )
    assert json.loads(run.stdout.splitlines()[0])["status"] == [int(Status.NAN_LOGITS)] * 3


def test_wrong_backend_is_one_clear_line(esamp: Esamp) -> None:
    run = esamp("doctor", ESAMP_BACKEND="quantum")
    assert run.returncode == 2 and run.stderr.startswith("esamp: error: ESAMP_BACKEND must be one of")


def test_a_mistake_on_the_real_command_line() -> None:
    command = [sys.executable, "-m", "esamp_core.cli", "generate", "x", "--temperature", "-1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert run.returncode == 2
    assert run.stderr.startswith("esamp: error: temperature must") and run.stderr.count("\n") == 1
