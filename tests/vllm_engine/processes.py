"""The same requests in an engine with processes, or an environment, of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(
    model: str, environment: dict[str, str], architecture_is_refused: bool = False, esamp: Any = (), **options: Any
) -> Any:
    """run_engine.py's answer.  Greedy and sampled rows, uneven lengths; one row, a greedy one, is the engine's own.

    esamp: the settings; () is {}, None leaves them to the environment.
    """
    sampling = [
        {
            "max_tokens": 6 + 3 * i % 7,
            "seed": 5 * i,
            "ignore_eos": True,
            "temperature": 0.0 if i % 2 else 0.9,
            "min_p": 0.01,
            "logprobs": 0,
            "extra_args": None if i == 3 else {"esamp": {"beta": 1.0}},
        }
        for i in range(6)
    ]
    settings = {} if esamp == () else esamp
    request = {"model": model, "esamp": settings, "options": options, "sampling": sampling, "distillers": True}
    path = f"{HERE.parent}:{environment.get('PYTHONPATH', '')}"
    environment = {"ESAMP_VLLM": "", **environment, "PYTHONPATH": path}
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
