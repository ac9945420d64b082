"""Settings of the engine under test, made before vLLM is imported, and the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
# In this process and without compilation an engine starts in seconds; other files start real ones.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


@pytest.fixture(scope="session")
def checkpoints_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def qwen3(checkpoints_dir: Path) -> str:
    from checkpoints import make

    return make("qwen3", checkpoints_dir)


@pytest.fixture(scope="session")
def llama(checkpoints_dir: Path) -> str:
    from checkpoints import make

    return make("llama", checkpoints_dir)


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def reference(checkpoint: str) -> Any:
    """The same checkpoint in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").float().eval()


@pytest.fixture(scope="session")
def plain(checkpoint: str) -> Any:
    """vLLM's own engine: its own model class, no processor."""
    from engines import make_llm
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
    from vllm.plugins import load_general_plugins

    from esamp_core.bindings import vllm_models

    load_general_plugins()
    # vLLM remembers a checkpoint's class within a process: another engine's must not be found, nor this one's later.
    own, forgotten = patch.dict(ModelRegistry.models, vllm_models._bases), patch.dict(_MODEL_ARCH_BY_HASH, clear=True)
    with own, forgotten:
        llm = make_llm(checkpoint)
    assert llm.apply_model(lambda model: type(model).__module__.split(".")[0]) == ["vllm"]
    return llm


@pytest.fixture(scope="session")
def exploring(checkpoint: str) -> Any:
    from engines import CapturingProcessor, make_llm

    return make_llm(checkpoint, {}, logits_processors=[CapturingProcessor])


@pytest.fixture(scope="session")
def single(qwen3: str) -> Any:
    """The requests of :func:`processes.run` in one process, on V1: what every other way must draw."""
    from processes import run

    answer = run(qwen3, {})
    (distillers,) = answer["distillers"]
    assert all(updates > 0 for updates in distillers["updates"])
    return answer


@pytest.fixture
def captured() -> Iterator[list[Any]]:
    from engines import CapturingProcessor

    CapturingProcessor.captured.clear()
    yield CapturingProcessor.captured
    CapturingProcessor.captured.clear()
