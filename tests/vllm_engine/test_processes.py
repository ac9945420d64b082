"""The same requests on every way to run an engine: the same tokens, where the random numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import interpreted_triton
import torch
from processes import run


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
    # Its random numbers are others; greedy rows, which explore too, are the same, and so is what they cost.
    for i in (1, 3, 5):
        assert answer["outputs"][i] == single["outputs"][i]
        assert torch.allclose(*(torch.tensor(run["logprobs"][i]) for run in (answer, single)), atol=1e-3)
    assert sorted(answer["distillers"][0]["updates"]) == sorted(single["distillers"][0]["updates"])


def test_transformers_backend(qwen3: str, single: Any) -> None:
    answer = run(qwen3, {}, model_impl="transformers")
    assert answer["outputs"] == single["outputs"]


def test_architecture_without_the_interface_does_not_start(checkpoints_dir: Path) -> None:
    from checkpoints import make

    errors = run(make("opt", checkpoints_dir), {}, architecture_is_refused=True)
    assert "UnsupportedModelError: esamp does not work with OPTForCausalLM: vLLM gives no access" in errors
