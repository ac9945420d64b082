"""Settings of the engine under test, made before vLLM is imported, and the checkpoints.

ESAMP_TEST_RUNNER=v2 runs the tests that are marked for both model runners on vLLM's V2 runner.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import interpreted_triton
import pytest

V2 = os.environ.get("ESAMP_TEST_RUNNER") == "v2"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
# In this process and without compilation an engine starts in seconds; other files start real ones.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(V2))
os.environ.pop("ESAMP_VLLM", None)
if V2:  # wants Triton, and a driver for it
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = interpreted_triton.install(Path(tempfile.mkdtemp())).split(":")


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    if V2:
        items[:] = [item for item in items if item.get_closest_marker("both_runners")]


@pytest.fixture(scope="session", autouse=True)
def _filters_in_torch() -> None:
    """vLLM's own kernel for top-k and top-p does not run in Triton's interpreter; its function in PyTorch does."""
    if V2:
        from vllm.v1.sample.ops import topk_topp_sampler

        topk_topp_sampler.HAS_TRITON = False


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


def in_transformers(checkpoint: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").float().eval()


@pytest.fixture(scope="session")
def reference(qwen3: str) -> Any:
    """The same checkpoint in transformers."""
    return in_transformers(qwen3)


@pytest.fixture(scope="session")
def plain(qwen3: str) -> Any:
    """vLLM's own engine: its own model class, no settings."""
    from engines import make_llm
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH
    from vllm.plugins import load_general_plugins

    from esamp_core.bindings import vllm_models

    load_general_plugins()
    # vLLM remembers a checkpoint's class within a process: another engine's must not be found, nor this one's later.
    own, forgotten = patch.dict(ModelRegistry.models, vllm_models._bases), patch.dict(_MODEL_ARCH_BY_HASH, clear=True)
    with own, forgotten:
        llm = make_llm(qwen3)
    assert llm.apply_model(lambda model: type(model).__module__.split(".")[0]) == ["vllm"]
    return llm


@pytest.fixture(scope="session")
def exploring(qwen3: str) -> Any:
    """An engine whose requests explore if they say so."""
    from engines import make_llm

    return make_llm(qwen3, {})


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
    from engines import CapturingMixer

    CapturingMixer.captured.clear()
    yield CapturingMixer.captured
    CapturingMixer.captured.clear()
