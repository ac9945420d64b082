"""``esamp generate --resume``: goes on with the same settings, model and prompts, or says in one line what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Esamp, command, is_one_line, mutated, refuse_to_load
from hypothesis import given
from hypothesis import strategies as st

from esamp_core import countdown
from esamp_core.base.errors import ArgumentError
from esamp_core.cli.inputs import Asked, read_prompts
from esamp_core.cli.outputs import OF_A_MODEL, OutputLine, keep_only, read_finished
from esamp_core.decoder import Generation
from esamp_core.sample import DistillerConfig, SamplingParams

LINES = [
    {"prompt": "3 7 3 5 -> 41 :", "id": "a", "level": json.loads("[" * 63 + "]" * 63)},  # the deepest there may be
    {"prompt": "1 2 3 4 -> 24 :\u2028", "id": 2},
    {"prompt": "5 5 5 5 -> 50 :", "tags": ["\x85"]},
]
# A prompt at a time, so that it is computed in the same batch in every run.
OPTIONS = ("-n", "2", "--seed", "3", "--batch-rows", "2", "--max-new-tokens", "6")


@pytest.fixture
def esamp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Esamp:
    return command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and what an uninterrupted run wrote of them."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["esamp", "generate", "--prompts", "p.jsonl", *OPTIONS, "--out", "o.jsonl"])
        from esamp_core import cli

        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resumed(esamp: Esamp, *options: str, out: str = "o.jsonl") -> Any:
    prompts = () if "--prompts" in options else ("--prompts", "p.jsonl")
    return esamp("generate", *prompts, *OPTIONS, "--out", out, "--resume", *options)


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write(path: Path, lines: list[dict[str, Any]]) -> bytes:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path.read_bytes()


@pytest.mark.parametrize("edited", ["as it is", "mark and CRLF", "blank lines"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(edited: str, folder: Path, esamp: Esamp) -> None:
    out = folder / "o.jsonl"
    before = out.read_bytes()
    lines = before.split(b"\n")
    # One prompt whole, one sample of another, and a line that ends within a character.
    kept = b"\n".join([*lines[2:4], lines[0], '{"prompt_index": 2, "text": "é'.encode()[:-1]])
    if edited == "mark and CRLF":
        kept = b"\xef\xbb\xbf" + kept.replace(b"\n", b"\r\n")
    if edited == "blank lines":
        kept = b"\n" + kept.replace(b"\n", b"\n\n") + b"\n\n"
    out.write_bytes(kept)
    assert resumed(esamp).returncode == 0
    assert sorted(out.read_bytes().split(b"\n")) == sorted(lines)
    said = resumed(esamp)
    assert said.returncode == 0 and "all 3 prompts are finished" in said.stderr
    assert sorted(out.read_bytes().split(b"\n")) == sorted(lines)
    assert [path.name for path in folder.glob("*partial*")] == []


@given(at=st.integers(0, 10**6))
def test_wherever_it_was_cut(at: int, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = (whole / "o.jsonl").read_bytes()
    out = tmp_path_factory.mktemp("cut") / "o.jsonl"
    cut = raw[: at % (len(raw) + 1)]
    out.write_bytes(cut)
    found = read_finished(out, *asked_of(whole))
    there = [json.loads(line)["prompt_index"] for line in raw.split(b"\n")[:-1] if line in cut.split(b"\n")]
    assert found.prompts == {index for index in there if there.count(index) == 2}
    keep_only(out, found.places)
    kept = entries(out)
    assert [(e["prompt_index"], e["sample_index"]) for e in kept] == [
        (i, s) for i in sorted(found.prompts) for s in (0, 1)
    ]
    assert all(line in raw.split(b"\n") for line in out.read_bytes().split(b"\n"))


def asked_of(folder: Path) -> tuple[list[Asked], dict[str, Any], None]:
    settings = entries(folder / "o.jsonl")[0]["settings"]
    return read_prompts([], folder / "p.jsonl"), {k: v for k, v in settings.items() if k not in OF_A_MODEL}, None


DIFFERENT = [
    (("--temperature", "0.7"), "was written with temperature 1.0, now 0.7"),
    (("-n", "4", "--temperature", "0.5"), "n 2, now 4; temperature 1.0, now 0.5"),
    (("--top-k", "5"), "top_k 0, now 5"),
    (("--top-p", "0.9"), "top_p 1.0, now 0.9"),
    (("--min-p", "0.1"), "min_p 0.05, now 0.1"),
    (("--beta", "0"), "beta 0.1, now 0.0"),
    (("--seed", "4"), "seed 3, now 4"),
    (("--stratified",), "stratified false, now true"),
    (("--no-distinct",), "distinct null, now false"),
    (("--rank", "8"), "distiller.rank 64, now 8"),
    (("--no-gate",), "distiller.gate true, now false"),
    (("--start", str(countdown.DISTILLER)), 'distiller.lr 0.1, now 0.03; distiller.start null, now "sha256 '),
    (("--preset", "release"), 'distiller.recipe "default", now "release"'),
    (("--neutral",), "neutral false, now true"),
    (("--stop", "7"), 'stop [], now ["7"]'),
    (("--max-new-tokens", "7"), "max_new_tokens 6, now 7"),
    (("--model", "another"), 'model "countdown", now "another"'),
]


@pytest.mark.parametrize(("options", "message"), DIFFERENT)
def test_other_settings_are_refused_before_a_model_is_loaded(
    options: tuple[str, ...], message: str, folder: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    before = (folder / "o.jsonl").read_bytes()
    is_one_line(resumed(esamp, *options), message)
    assert (folder / "o.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "options", [("--batch-rows", "3"), ("--cache", "static"), ("--device", "cpu"), ("--min-p", ".05")]
)
def test_what_changes_no_draw_is_no_setting(options: tuple[str, ...], folder: Path, esamp: Esamp) -> None:
    before = entries(folder / "o.jsonl")
    write(folder / "o.jsonl", before[:2])
    assert resumed(esamp, *options).returncode == 0
    after = entries(folder / "o.jsonl")
    assert sorted((e["prompt_index"], e["token_ids"]) for e in after) == sorted(
        (e["prompt_index"], e["token_ids"]) for e in before
    )


def test_a_start_is_known_by_what_it_holds(folder: Path, esamp: Esamp) -> None:
    shutil.copy(countdown.DISTILLER, folder / "here")
    shutil.copy(countdown.DISTILLER, folder / "there")
    assert resumed(esamp, "--start", "here", out="s.jsonl").returncode == 0
    write(folder / "s.jsonl", entries(folder / "s.jsonl")[:2])
    assert resumed(esamp, "--start", "there", out="s.jsonl").returncode == 0
    assert len(entries(folder / "s.jsonl")) == 6
    (folder / "there").write_bytes(b"another")
    is_one_line(resumed(esamp, "--start", "there", out="s.jsonl"), 'distiller.start "sha256 ')
    is_one_line(resumed(esamp, "--start", "nowhere", out="s.jsonl"), "start cannot be read from 'nowhere'")


def test_another_model_of_the_same_name_is_refused(folder: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "o.jsonl"
    before = write(out, entries(out)[:3])
    model, tokenizer = countdown.load()
    changed = model.to(torch.float64)
    monkeypatch.setattr("esamp_core.cli.generate.load_model", lambda *_: (changed, tokenizer))
    is_one_line(resumed(esamp), 'dtype "float32", now "float64"')
    with torch.no_grad():
        changed = model.float()
        changed.lm_head.weight += 0.01
    is_one_line(resumed(esamp), f"{out.name} was written with another model: fingerprint")
    assert out.read_bytes() == before  # nothing was thrown away yet


def change(entry: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {**entry, **other}


def without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


# Of three whole lines, the second is made into this.
SPOILED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda e: without(e, "settings"), "has no settings, as files of an earlier version"),
    (lambda e: change(e, settings=5), "settings in line 2 of o.jsonl must be an object"),
    (lambda e: change(e, settings=without(e["settings"], "n")), "n unknown, now 2"),
    (lambda e: change(e, settings=change(e["settings"], new=1)), "new 1, now unknown"),
    (lambda e: change(e, sample_index=2), "sample_index and copy_of in line 2 of o.jsonl must be in 0..1"),
    (lambda e: change(e, copy_of=2), "sample_index and copy_of in line 2 of o.jsonl must be in 0..1"),
    (lambda e: change(e, sample_index=-1), "sample_index must be an integer >= 0"),
    (lambda e: change(e, sample_index=True), "sample_index must be an integer >= 0"),
    (lambda e: change(e, sample_index="1"), "sample_index must be an integer >= 0"),
    (lambda e: change(e, sample_index=0), "must be another sample, got that of line 1 again"),
    (lambda e: change(e, prompt_index=1), "is of another prompt list (prompt_index 1"),
    (lambda e: change(e, prompt_index=9), "is of another prompt list (prompt_index 9"),
    (lambda e: change(e, prompt="x"), "is of another prompt list"),
    (lambda e: change(e, id="b"), "is of another prompt list (prompt_index 0: '3 7 3 5 -> 41 :', id 'b')"),
    (lambda e: without(e, "id"), "is of another prompt list"),
    (lambda e: change(e, metadata={}), "is of another prompt list"),
    (lambda e: change(e, seed=5), "was drawn with seed 5, now 3"),
    (lambda e: change(e, logprobs=e["logprobs"][1:]), "logprobs must be one per token (6), got 5"),
    (lambda e: change(e, novelty=["x"] * 6), "novelty[0] must be a number"),
    (lambda e: change(e, kl=[float("nan")] * 6), "NaN is no number of JSON"),
    (lambda e: change(e, finish_reason="bored"), "finish_reason must be"),
    (lambda e: change(e, more=1), "must have only"),
    (lambda e: [e], "must be an object"),
    (lambda e: None, "must be an object"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_lines_that_are_wrong_are_refused(
    spoil: Callable[[dict[str, Any]], Any], message: str, folder: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    lines = sorted(entries(folder / "o.jsonl"), key=lambda e: (e["prompt_index"], e["sample_index"]))[:3]
    before = write(folder / "o.jsonl", [lines[0], spoil(lines[1]), lines[2]])
    run = resumed(esamp)
    is_one_line(run, message)
    assert "o.jsonl" in run.stderr and (folder / "o.jsonl").read_bytes() == before


@pytest.mark.parametrize("raw", [b'{"a": ', b"\xff", b"\0\0\0", b"x"])
def test_a_line_in_the_middle_that_is_broken(
    raw: bytes, folder: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_load(monkeypatch)
    lines = (folder / "o.jsonl").read_bytes().split(b"\n")
    (folder / "o.jsonl").write_bytes(b"\n".join([*lines[:2], raw, *lines[2:]]))
    is_one_line(resumed(esamp), "line 3 of o.jsonl must be")


def test_what_is_no_file(folder: Path, esamp: Esamp, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_load(monkeypatch)
    is_one_line(resumed(esamp, out="/dev/null"), "--resume needs --out to be a file, got /dev/null")


@given(data=st.data())
def test_any_change_of_a_line_is_read_or_refused(
    data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = entries(whole / "o.jsonl")
    at = data.draw(st.integers(0, len(lines) - 1))
    out = tmp_path_factory.mktemp("changed") / "o.jsonl"
    lines[at] = data.draw(mutated(lines[at]))
    write(out, lines)
    try:
        found = read_finished(out, *asked_of(whole))
    except ArgumentError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 4000
    else:
        assert found.prompts <= {0, 1, 2} and len(found.places) == 2 * len(found.prompts)


def test_a_line_has_the_fields_of_a_generation(whole: Path) -> None:
    names = {f.name for f in fields(OutputLine)}
    assert names == {f.name for f in fields(Generation)} | {"settings", "id", "metadata"}
    entry = entries(whole / "o.jsonl")[0]
    assert names >= set(entry) >= names - {"id", "metadata"}


def test_settings_hold_everything_that_decides(whole: Path) -> None:
    """A field that is new must be a setting, or be named here as one that decides nothing."""
    settings = entries(whole / "o.jsonl")[0]["settings"]
    assert set(settings["params"]) == {f.name for f in fields(SamplingParams)}
    assert set(settings["distiller"]) == {f.name for f in fields(DistillerConfig)} - {"patience"}
    assert set(settings) - {"params", "distiller"} == {
        "model", "fingerprint", "dtype", "n", "max_new_tokens", "stop", "neutral", "one_for_all",
    }  # fmt: skip
