"""A CUDA graph on the CPU: records a step's operations without running them, and repeats them without its Python.

Like the real one it refuses whatever the host would have to wait for, leaves memory as it was when a step is recorded,
and writes the results of every replay into the tensors of the recording.  What a step changes in Python alone is
missing from a replay, and shows up as a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esamp_core import reference
from esamp_core.decoder import cuda_graph
from esamp_core.explorer import learner

# The host reads the result, or the result's shape; or values come from the host's memory.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "bincount", "equal", "lift_fresh")
LAUNCHES = (
    *("explore", "select_candidates", "score_candidates", "reweight", "draw", "children"),
    *("distiller_forward", "distiller_norm_", "distiller_step_", "gauge_", "mix"),
)
READS = ("tolist", "numpy", "__array__", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Kernel:
    """A function that is one launch on a GPU, whatever it does on the CPU: recorded whole, its inside unseen."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __str__(self) -> str:
        return self._function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = _Watch.active
        if watch is None or watch.inside:
            return self._function(*args, **kwargs)
        return watch.call(self, args, kwargs)


def waits(func: Any, args: Any) -> bool:
    """Whether this operation makes the host wait on a GPU."""
    if isinstance(func, Kernel):
        return False
    name = func._schema.name
    if name in ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::index"):
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
    if name == "aten::repeat_interleave":
        return True
    return any(part in name.removeprefix("aten::") for part in WAITS)


class _Watch(TorchDispatchMode):
    """Calls ``on_call(func, args, kwargs)`` for every operation, and is deaf to what happens inside of it."""

    active: _Watch | None = None

    def __init__(self, on_call: Callable[[Any, Any, Any], Any], on_read: Callable[[str], None]) -> None:
        super().__init__()
        self._on_call, self._reads = on_call, _Reads(self, on_read)
        self.inside = False

    def __enter__(self) -> Any:
        self._reads.__enter__()
        _Watch.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _Watch.active = None
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) if self.inside else self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.inside = True
        try:
            return self._on_call(func, args, kwargs)
        finally:
            self.inside = False


class _Reads(TorchFunctionMode):
    """Sees the reads of CPU memory that are no operations."""

    def __init__(self, watch: _Watch, on_read: Callable[[str], None]) -> None:
        super().__init__()
        self._watch, self._on_read = watch, on_read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and not self._watch.inside:
            self._on_read(name)
        return func(*args, **(kwargs or {}))


class SimulatedGraph:
    """A ``cuda_graph.StepGraph``."""

    def __init__(self) -> None:
        self._recording: Recording | None = None
        self.replays = 0

    @property
    def names(self) -> set[str]:
        """The operations, like "aten.copy_"."""
        calls = [] if self._recording is None else self._recording.calls
        return {str(getattr(func, "overloadpacket", func)) for func, *_ in calls}

    def rehearse(self, step: Callable[[], None]) -> str | None:
        found: list[str] = []

        def call(func: Any, args: Any, kwargs: Any) -> Any:
            if waits(func, args):
                found.append(str(func))
            return func(*args, **kwargs)

        with _Watch(call, found.append):
            step()
        return f"a step waits: {found[0]}" if found else None

    def capture(self, step: Callable[[], None]) -> None:
        self._recording = Recording()
        try:
            with _Watch(self._recording.call, refuse):
                step()
        finally:
            self._recording.finish()

    def replay(self) -> None:
        assert self._recording, "nothing was captured"
        self.replays += 1
        self._recording.replay()


class Recording:
    """Operations as they are recorded: none leaves a trace in memory that was there before."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._fresh: dict[int, Any] = {}  # storages made by the step
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that was there, as it was

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if waits(func, args):
            refuse(str(func))
        for tensor in written(func, args, kwargs):
            place = _place(tensor)
            if place and place not in self._fresh and place not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[place] = (whole, whole.clone())
        result = func(*args, **kwargs)
        given = {_place(t) for t in _tensors((args, kwargs))}
        outputs = _tensors(result)
        for tensor in outputs:
            if (place := _place(tensor)) and place not in given:
                self._fresh[place] = tensor.untyped_storage()
        self.calls.append((func, args, kwargs, outputs))
        return result

    def run(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call(func, args, kwargs)

    def finish(self) -> None:
        for whole, was in self._before.values():
            whole.copy_(was)
        for storage in self._fresh.values():
            storage.fill_(255)  # NaN, or a number that is no token: nothing was computed yet
        self._before, self._fresh = {}, {}

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if _place(old) != _place(new):
                    old.copy_(new)


def refuse(name: str) -> None:
    raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation writes into, by its schema; of a kernel perhaps any."""
    if isinstance(func, Kernel):
        yield from _tensors((args, kwargs))
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def like_cuda(patch: pytest.MonkeyPatch, kernels: bool) -> None:
    """Let the decoder capture on the CPU; ``kernels``: the reference's ops count as one launch each."""
    patch.setattr(cuda_graph, "step_graph", lambda device: SimulatedGraph())
    if kernels:
        launches = {name: Kernel(getattr(reference, name)) for name in LAUNCHES}
        patch.setattr(learner, "backend", lambda device: SimpleNamespace(**vars(reference) | launches))
