"""An engine in a process of its own, compiled: a file by itself, because it takes as long as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from processes import run


def test_engine_process_and_torch_compile(qwen3: str, single: Any, tmp_path: Path) -> None:
    """By the switch alone, as a trainer's engine would be."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(tmp_path), "ESAMP_VLLM": "1"}
    answer = run(qwen3, environment, esamp=None, enforce_eager=False)
    assert answer["outputs"] == single["outputs"]
    assert answer["distillers"][0]["updates"] == single["distillers"][0]["updates"]
