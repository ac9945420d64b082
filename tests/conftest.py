"""Set-up of every test: Triton's interpreter without a GPU, poisoned memory, hypothesis' profiles, the device."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
collect_ignore = ["vllm_engine", "rl"]  # need environments of their own: make test-vllm, make test-rl

# Triton reads this when a kernel module is imported, and importing torch does not import Triton.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No test goes to the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
# Other examples, the same for the same seed: HYPOTHESIS_PROFILE=seeded make test PYTEST_ARGS=--hypothesis-seed=1
hypothesis.settings.register_profile("seeded", hypothesis.settings.get_profile("ci"), derandomize=False)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already fill the cores


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # keeps the setting known where pytest-timeout is not installed
        parser.addini("timeout", "seconds per test; needs pytest-timeout")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("traced") and "ESAMP_SIMULATED_CUDA" in os.environ:
            item.add_marker(pytest.mark.skip(reason="a simulated GPU's tensors cannot be traced"))
        if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="needs Triton's interpreter: its kernels get CPU tensors"))


def device_is_lost() -> bool:
    """After a fault in a kernel every later call of this process fails too."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    if HAS_CUDA and device_is_lost():
        # xdist reports this test as the one that crashed, and starts another worker for the others.
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the device is lost since {item.nodeid}", returncode=1)


@pytest.fixture(scope="session")
def device() -> str:
    """The device that kernels run on: "cuda", or "cpu" under Triton's interpreter.  Who takes it is marked `device`."""
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The embedded Countdown model and its tokenizer."""
    from esamp_core import countdown

    return countdown.load()


# torch's own switch for this (torch.utils.deterministic.fill_uninitialized_memory) works only together with
# use_deterministic_algorithms, which also exchanges the algorithms under test. So the allocating functions are wrapped.

ALLOCATORS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_permuted"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, the largest integer, or True: whatever is most likely to show up in a result."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype in INTEGERS:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
    return tensor


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poison_(allocate(*args, **kwargs))

    return allocate_poisoned


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported, so that `from torch import empty` gets the wrapper as well.
    with torch.device("cpu"):  # lets `with torch.device(...)` note the real functions first, or it would miss them
        torch.empty(0)
    for owner, name in ALLOCATORS:
        original = getattr(owner, name)
        setattr(owner, name, poisoned(original))
        config.add_cleanup(functools.partial(setattr, owner, name, original))
