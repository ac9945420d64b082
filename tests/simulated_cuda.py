"""A CUDA device on the CPU: tensors that say "cuda:0" and behave so, with values that are computed by the CPU.

What a first run on a real GPU would stumble over fails here: an operation on tensors of both devices, a host that reads
a device's memory as its own, a wait where waits are forbidden or during a capture, a graph that holds what only the
Python of a step knew.  Streams are in order, one after the other; kernels run in Triton's interpreter; times are the
host's.  ``install()`` must come before anything asks torch whether there is a GPU (tests/rehearsal/sitecustomize.py).
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.simulated_graph import Recording, waits

DEVICE = torch.device("cuda", 0)
MEMORY = 4 * 2**30  # what a test may ask for; the CPU has to have it
COPIES = ("aten::_to_copy", "aten::copy_", "aten::to", "aten::copy", "aten::_copy_from")
# Take a CPU tensor of any shape beside one on the device: indices, and what copies.
MIXING = (*COPIES, "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::set_")


class CudaTensor(torch.Tensor):
    """Its values are in ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = real
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return simulate(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held!r})"


class _Factories(TorchDispatchMode):
    """Sees what makes a tensor on the device out of nothing, or out of a CPU tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return simulate(func, args, dict(kwargs or {}))


def on_device(tree: Any) -> bool:
    return any(isinstance(leaf, CudaTensor) for leaf in tree_leaves(tree))


def simulate(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU; its results are where they would be."""
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    given = on_device((args, kwargs))
    kwargs.pop("pin_memory", None)  # there is nothing to pin for
    if not given and (asked is None or asked.type != "cuda"):
        return func(*args, **kwargs)
    name = func._schema.name
    if name == "aten::_fused_sdp_choice":
        return 0  # the kind of attention that is made of ordinary operations
    _check_devices(name, (args, kwargs))
    to_host = (asked is not None and asked.type == "cpu") or _writes_to_host(name, args)
    _check_waits(func, args, kwargs, to_host)
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    if asked is not None:
        held_kwargs["device"] = torch.device("cpu")
    with launching():
        run = func if CUDAGraph.active is None else functools.partial(CUDAGraph.active.run, func)
        result = run(*held_args, **held_kwargs)
    if to_host:
        return args[0] if name == "aten::copy_" else result
    made = tree_map(lambda leaf: CudaTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, made) if given else made


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, CudaTensor) else leaf


def _writes_to_host(name: str, args: Any) -> bool:
    return name == "aten::copy_" and not isinstance(args[0], CudaTensor)


def _check_devices(name: str, given: Any) -> None:
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    on_host = [leaf for leaf in leaves if not isinstance(leaf, CudaTensor)]
    if len(on_host) == len(leaves) or name in MIXING:
        return
    if any(leaf.dim() > 0 or name.startswith("esamp") for leaf in on_host):
        raise RuntimeError(f"Expected all tensors to be on the same device, {name} got some on cuda:0 and some on cpu")


def _check_waits(func: Any, args: Any, kwargs: Any, to_host: bool) -> None:
    """What makes the host wait raises while a graph is captured, and else as torch.cuda.set_sync_debug_mode says."""
    name = func._schema.name
    wait = name != "aten::lift_fresh" and waits(func, tree_map(_held, args))
    if name in COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        non_blocking = args[2] if name == "aten::copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
        wait |= isinstance(source, CudaTensor) == to_host and not non_blocking and source.numel() > 0
    if wait:
        _wait(name)


def _wait(what: str) -> None:
    if CUDAGraph.active is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
    if Host.sync_debug == 1:
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=3)
    elif Host.sync_debug == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


class Stream:
    """Work on it is done when it is enqueued."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = DEVICE, priority
        self.cuda_stream = self.stream_id = id(self)

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait("Stream.synchronize")


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return max(1e-4, (end._at - self._at) * 1e3)


class Host:
    """What torch.cuda knows of the calling thread."""

    kept = ExitStack()  # what lasts as long as the process
    sync_debug = 0
    launching = 0  # operations that are running now
    default_stream = Stream()
    stream = default_stream


@contextmanager
def launching() -> Iterator[None]:
    """Operations on the device run: their kernels get the values' own memory."""
    Host.launching += 1
    try:
        yield
    finally:
        Host.launching -= 1


class CUDAGraph:
    active: Recording | None = None

    def __init__(self, keep_graph: bool = False) -> None:
        self._recording: Recording | None = None

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert CUDAGraph.active is None, "a capture is under way"
        self._recording = CUDAGraph.active = Recording()

    def capture_end(self) -> None:
        assert self._recording is not None
        CUDAGraph.active = None
        self._recording.finish()

    def replay(self) -> None:
        assert self._recording is not None
        with launching():
            self._recording.replay()

    def reset(self) -> None:
        self._recording = None

    def pool(self) -> tuple[int, int]:
        return (0, 0)


class _StreamContext:
    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = Host.stream
        Host.stream = self._stream or Host.stream

    def __exit__(self, *_: Any) -> None:
        Host.stream = self._before


class _DeviceContext:
    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def _set_sync_debug_mode(mode: int | str) -> None:
    Host.sync_debug = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode


def _set_stream(stream: Stream) -> None:
    Host.stream = stream


def _properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="simulated on the CPU", total_memory=MEMORY, multi_processor_count=132, major=9, minor=0, warp_size=32,
        gcnArchName="", L2_cache_size=50 * 2**20,
    )  # fmt: skip


def _cpu_generator(real: Any) -> Any:
    class Generator(real):  # type: ignore[misc]
        """Of any device; the device's is the CPU's."""

        def __new__(cls, device: Any = None) -> Any:
            made = real.__new__(cls, "cpu")
            made._named = torch.device(device or "cpu")
            return made

        @property
        def device(self) -> torch.device:
            return self._named  # type: ignore[no-any-return]

    return Generator


def install() -> None:
    """From now on torch has one CUDA device, in this process."""
    os.environ["TRITON_INTERPRET"] = os.environ["ESAMP_SIMULATED_CUDA"] = "1"
    # What torch itself does for tensors of devices that are not there, in FakeTensorMode.
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)  # else .cuda() leaves a parameter its CPU class
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _DeviceContext,
        "device_of": _DeviceContext,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "StreamContext": _StreamContext,
        "stream": _StreamContext,
        "set_stream": _set_stream,
        "current_stream": lambda device=None: Host.stream,
        "default_stream": lambda device=None: Host.default_stream,
        "is_current_stream_capturing": lambda: CUDAGraph.active is not None,
        "synchronize": lambda device=None: _wait("synchronize"),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "get_sync_debug_mode": lambda: Host.sync_debug,
        "get_device_name": lambda device=None: _properties().name,
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_stats": lambda device=None: defaultdict(int),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "_sleep": lambda cycles: None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None  # type: ignore[assignment]
    torch.cuda.graphs.CUDAGraph = CUDAGraph  # type: ignore[misc,assignment]
    torch.Generator = _cpu_generator(torch.Generator)  # type: ignore[misc]
    profile = torch.profiler.profile  # a GPU's own records are what only a GPU has
    torch.profiler.profile = lambda activities=None, **options: profile(  # type: ignore[misc,assignment]
        activities=[torch.profiler.ProfilerActivity.CPU], **options
    )
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()  # type: ignore[method-assign,assignment]
    _patch_interpreter()
    Host.kept.enter_context(_Factories())


def _patch_interpreter() -> None:
    """Kernels take the device's tensors only, like compiled ones."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, interpreter

    from tests.kernel_cases import quick_interpreter

    Host.kept.enter_context(quick_interpreter())
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))

    original = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not Host.launching and not all(isinstance(t, CudaTensor) for t in tensors):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        args, kwargs = tree_map(_held, (args, kwargs))
        return original(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call
