"""The same requests on every way to run an engine: they must draw the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import interpreted_triton
import pytest

HERE = Path(__file__).parent


def run(model: str, environment: dict[str, str], architecture_is_refused: bool = False, **options: Any) -> Any:
    """run_engine.py's answer.  Greedy and sampled rows, uneven lengths; one row, a greedy one, is the engine's own."""
    sampling = [
        {
            "max_tokens": 6 + 3 * i % 7,
            "seed": 5 * i,
            "ignore_eos": True,
            "temperature": 0.0 if i % 2 else 0.9,
            "min_p": 0.01,
            "extra_args": None if i == 3 else {"esamp": {"beta": 1.0}},
        }
        for i in range(6)
    ]
    request = {"model": model, "esamp": {}, "options": options, "sampling": sampling, "distillers": True}
    command = [sys.executable, str(HERE / "run_engine.py"), json.dumps(request)]
    # Distillers are read by a function that is sent to the workers.
    full = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **environment}
    result = subprocess.run(command, env=full, capture_output=True, text=True, timeout=600)
    if architecture_is_refused:
        assert result.returncode != 0
        return result.stderr
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith('{"outputs"'))
    return json.loads(line)


@pytest.fixture(scope="module")
def single(qwen3: str) -> Any:
    """V1, one process."""
    answer = run(qwen3, {})
    (distillers,) = answer["distillers"]
    assert all(updates > 0 for updates in distillers["updates"])
    return answer


def test_tensor_parallel(qwen3: str, single: Any) -> None:
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    answer = run(qwen3, threads, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert answer["outputs"] == single["outputs"]
    first, second = answer["distillers"]
    assert first["vocab_start"] == 0 < second["vocab_start"]  # they have different rows of the head
    assert first["bits"] == second["bits"] and first["updates"] == single["distillers"][0]["updates"]


def test_v2_model_runner(qwen3: str, single: Any, tmp_path: Path) -> None:
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    answer = run(qwen3, {**environment, "PYTHONPATH": interpreted_triton.install(tmp_path)})
    assert answer["outputs"] == single["outputs"]
    assert sorted(answer["distillers"][0]["updates"]) == sorted(single["distillers"][0]["updates"])


def test_engine_process_and_torch_compile(qwen3: str, single: Any) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    answer = run(qwen3, environment, enforce_eager=False)
    assert answer["outputs"] == single["outputs"]
    assert answer["distillers"][0]["updates"] == single["distillers"][0]["updates"]


def test_transformers_backend(qwen3: str, single: Any) -> None:
    answer = run(qwen3, {}, model_impl="transformers")
    assert answer["outputs"] == single["outputs"]


def test_architecture_without_the_interface_does_not_start(checkpoints_dir: Path) -> None:
    from checkpoints import make

    errors = run(make("opt", checkpoints_dir), {}, architecture_is_refused=True)
    assert "UnsupportedModelError: esamp does not work with OPTForCausalLM: vLLM gives no access" in errors
