"""The very commands that go to a GPU machine, run on this one first: python -m bench.rehearse (make rehearse-gpu)

A copy of the tree as it would be sent (what git tracks or does not ignore, and what is carried), without .git, and a
PATH on which there is little: python3, bash, timeout.  Only what calls CUDA is a stand-in (tests/simulated_cuda.py);
kernels run in Triton's interpreter, shapes are tiny (ESAMP_BENCH_DRY), limits of time are longer.  What is proven are
paths, carried files, the tests' and benchmarks' own code on a device, and that what comes back may come back.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.quality_plan import studies
from bench.results import ROOT, load, recorded_tests
from bench.run_gpu import CARRIED, RUNS, TOTAL, send_command

MIB = 2**20
# What a machine that takes a tree and one command allows.
COMMAND_CHARACTERS = 2000
COMMAND_SECONDS = 600
SENT_BYTES = 64 * MIB
FILES, FILE_BYTES, FILES_BYTES, FOLDERS = 8, 16 * MIB, 64 * MIB, 2
NAME = re.compile(r"[A-Za-z0-9._-]+")
TOOLS = ("bash", "env", "timeout")
PATIENCE = 6  # times the time that a part has on the card


def sent_files() -> Iterator[Path]:
    """Relative paths of what travels: tracked, or untracked and not ignored; and what is carried."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if (name and (ROOT / name).exists()) or (ROOT / name).is_symlink():
            yield Path(name)
    if CARRIED.exists():
        yield from (path.relative_to(ROOT) for path in CARRIED.rglob("*") if path.is_file())


def copy_tree(target: Path) -> int:
    """Copy what travels; returns its bytes."""
    size = 0
    for name in sent_files():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place, follow_symlinks=False)
        size += place.lstat().st_size
    return size


def make_path(folder: Path) -> str:
    """A PATH with this Python as python3, a few tools, and stand-ins for NVIDIA's memory checker and profiler."""
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (folder / tool).symlink_to(found)
    (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    checker = '#!/bin/sh\nshift 4  # its options: run_gpu.memcheck_command\nexec "$@"\n'
    (folder / "compute-sanitizer").write_text(checker)
    profiler = """#!/bin/sh
while [ "$#" -gt 0 ]; do case "$1" in */python*) exec "$@" ;; --import) exit 0 ;; esac; shift; done
"""
    (folder / "ncu").write_text(profiler)
    for script in ("python3", "compute-sanitizer", "ncu"):
        (folder / script).chmod(0o755)
    return str(folder)


def returned_faults(out: Path) -> list[str]:
    """What of the output folder could not come back."""
    files = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    faults = [] if len(files) <= FILES else [f"{len(files)} files come back, {FILES} at most"]
    for path in files:
        name, size = path.relative_to(out), path.lstat().st_size
        if path.is_symlink() or size > FILE_BYTES:
            faults.append(f"{name} is a link, or its {size} bytes are more than {FILE_BYTES}")
        if len(name.parts) > FOLDERS + 1 or not all(NAME.fullmatch(part) for part in name.parts):
            faults.append(f"{name} lies deeper than {FOLDERS} folders, or has odd characters in its name")
    total = sum(path.lstat().st_size for path in files)
    return faults + ([f"{total} bytes come back, {FILES_BYTES} at most"] if total > FILES_BYTES else [])


def result_faults(run: str, out: Path) -> list[str]:
    """What a run did not deliver."""
    faults = []
    if run == "first":
        os.environ["ESAMP_TEST_RECORD"] = str(out / "tests.jsonl")
        tests = recorded_tests()
        if tests is None or tests["failed"] or not tests["finished"] or tests["passed"] < 100:
            faults.append(f"tests: {tests}")
    if run == "quality":
        archive = out / "quality.tar.gz"
        if not archive.exists():
            return ["quality.tar.gz was not written"]
        with tarfile.open(archive) as packed:
            results = [name for name in packed.getnames() if name.endswith(".json")]
        return [] if len(results) == len(studies()["quick"]) else [f"quality.tar.gz holds {results}"]
    for kind in ("kernels", "decode"):
        if not (out / f"{kind}.json").exists():
            faults.append(f"{kind}.json was not written")
            continue
        body = load(out / f"{kind}.json")
        failed = [row for row in body["cases"] if row.get("failed")]
        faults += [f"{kind}: {row['name']}: {row['failed']}" for row in failed]
        # Peers that were carried can be imported; they cannot draw, as they call CUDA by themselves.
        absent = [why for why in body.get("peers_missing", {}).values() if "ImportError" in why or "NotFound" in why]
        faults += [f"a peer: {why}" for why in absent if CARRIED.exists()]
        if body["skipped"] or not body["cases"] or not body["dry"]:
            faults.append(f"{kind}: {len(body['cases'])} cases, skipped {body['skipped']}, dry {body['dry']}")
    return faults


def rehearse(run: str, folder: Path) -> list[str]:
    """Send, run and bring back; what is wrong."""
    tree, out, command = folder / "tree", folder / "out", send_command(run)
    for old in (tree, out):
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
    size, start = copy_tree(tree), time.monotonic()
    carried = f", with {CARRIED.name}" if CARRIED.exists() else ""
    print(f"{run}: {len(command)} characters, {size / MIB:.1f} MiB are sent{carried}:\n  {command}", flush=True)
    faults = [] if len(command) <= COMMAND_CHARACTERS else [f"the command has {len(command)} characters"]
    faults += [] if TOTAL < COMMAND_SECONDS else [f"all parts take {TOTAL} s"]
    faults += [] if size <= SENT_BYTES else [f"{size} bytes are sent, {SENT_BYTES} at most"]
    environment = {
        "PATH": make_path(folder / f"bin-{run}"),
        "HOME": str(folder),
        "OUT": str(out),
        "PYTHONPATH": str(tree / "tests" / "rehearsal"),
        "OMP_NUM_THREADS": "1",
        "ESAMP_BENCH_DRY": "1",
        "ESAMP_BENCH_PATIENCE": str(PATIENCE),
        "KERNEL_EXAMPLES": "2",
    }
    # The limit of the command itself is stretched like those of its parts.
    command = command.replace(f"timeout {TOTAL + 20:.0f}", f"timeout {TOTAL * PATIENCE:.0f}")
    done = subprocess.run(["bash", "-c", command], cwd=tree, env=environment)
    if done.returncode:
        log = (out / "run.log").read_text(errors="replace").splitlines() if (out / "run.log").exists() else []
        print("\n".join(log[-60:]))
        faults.append(f"exit status {done.returncode}")
    faults += returned_faults(out) + result_faults(run, out)
    print(f"{run}: {len(faults)} faults, {time.monotonic() - start:.0f} s", *faults, sep="\n  ", flush=True)
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[[], *RUNS], help="default all")
    runs = parser.parse_args(arguments).runs or [run for run in RUNS if run != "memcheck"]  # a part of the second
    with tempfile.TemporaryDirectory() as folder:
        faults = {run: rehearse(run, Path(folder)) for run in runs}
    print(json.dumps({run: len(found) for run, found in faults.items()}))
    return int(any(faults.values()))


if __name__ == "__main__":
    raise SystemExit(main())
