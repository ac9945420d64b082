"""An engine in a process of its own, compiled: a file by itself, because it takes as long as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from processes import run


def test_engine_process_and_torch_compile(qwen3: str, single: Any, tmp_path: Path) -> None:
    """By the switch alone, as a trainer's engine would be; its Distillers as those that it is compared with."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(tmp_path)}
    environment["ESAMP_VLLM"] = '{"distiller": {"gate": false}}'
    answer = run(qwen3, environment, esamp=None, enforce_eager=False)
    assert answer["outputs"] == single["outputs"]
    assert answer["distillers"][0]["updates"] == single["distillers"][0]["updates"]
