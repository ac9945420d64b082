"""Where a model is tapped: an early block's output, and the input of its output head.  All hooks are set here.

What is tapped is checked on the first forward, so that a tap that never runs or a head that is read wrongly raises
instead of silently steering by noise.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esamp_core.base.atomic import whole
from esamp_core.base.errors import StateError, UnsupportedModelError
from esamp_core.base.tensors import Head
from esamp_core.models.parts import HEAD_TOLERANCE, ModelParts
from esamp_core.reference import transform_scores

_tapped_by: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Taps]] = weakref.WeakKeyDictionary()
"""By what a model is tapped now."""


class Tapped(NamedTuple):
    """One forward at the last position of every row."""

    shallow: Tensor  # [B, H], the block's output
    deep: Tensor  # [B, H], the input of the head
    logits: Tensor  # [B, V]


class Taps:
    """The two hooks, installed while the context is entered and removed when it is left, whatever happens.

    A compiled model's code is split at on_shallow, which is Python, so fullgraph=True is refused there.
    """

    def __init__(self, model: nn.Module, parts: ModelParts) -> None:
        self._model, self._parts = model, parts
        self._handles: list[RemovableHandle] = []
        self._thread = 0  # that entered
        self._shallow: list[Tensor] = []
        self._deep: list[Tensor] = []
        self._on_shallow: Callable[[Tensor], None] | None = None
        self._listener: Callable[[Tensor], None] | None = None
        self._places: int | slice = -1  # which positions are tapped: the last
        self._outside = torch.compiler.disable(self._tell)  # type: ignore[no-untyped-call]
        self._mixer: Callable[[Tensor], Tensor] | None = None
        self._mix_outside = torch.compiler.disable(self._replace_last)  # type: ignore[no-untyped-call]

    def _tell(self, shallow: Tensor) -> None:
        assert self._listener is not None
        self._listener(shallow)

    def __enter__(self) -> Taps:
        """Raises StateError where another thread has tapped the model: forwards would meet each other's taps."""
        try:
            self._thread = threading.get_ident()
            _tapped_by.setdefault(self._parts.model, weakref.WeakSet()).add(self)
            if {taps._thread for taps in _tapped_by[self._parts.model]} != {self._thread}:
                raise StateError(
                    f"{type(self._parts.model).__name__} is in use in another thread; give each its own, or let them "
                    "take turns"
                )
            self._handles.append(self._parts.block.register_forward_hook(self._tap_shallow))
            self._handles.append(self._parts.head_module.register_forward_pre_hook(self._tap_deep))
            self._enter_more()
            return self
        except BaseException:
            whole(self._remove)
            raise

    def _enter_more(self) -> None:
        """Other hooks of subclasses, into ``_handles``."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off, if any are there."""
        whole(self._remove)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()  # may be done again
        self._handles.clear()
        _tapped_by.get(self._parts.model, weakref.WeakSet[Taps]()).discard(self)

    def _tap_shallow(self, module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        self._shallow.append(hidden[:, self._places])
        # A block that runs twice in a forward is reported after it; predicting twice would hide the cause.
        if self._on_shallow is not None and len(self._shallow) == 1:
            self._on_shallow(self._shallow[0])

    def _tap_deep(self, module: nn.Module, inputs: Any) -> Any:
        self._deep.append(inputs[0][:, self._places])
        # Where a tap runs twice in a forward, or not, that is reported; to mix would hide the cause.
        if self._mixer is None or len(self._deep) != 1 or len(self._shallow) != 1:
            return None
        return (self._mix_outside(inputs[0]), *inputs[1:])

    def _replace_last(self, hidden: Tensor) -> Tensor:
        """The head's input [B, T, H] with its last position mixed."""
        assert self._mixer is not None
        deep = hidden[:, -1]
        mixed = self._mixer(deep)
        if mixed is deep:
            return hidden
        if hidden.shape[1] == 1:
            return mixed[:, None]
        hidden = hidden.clone()  # a model may use it for something else
        hidden[:, -1] = mixed
        return hidden

    def forward(
        self,
        on_shallow: Callable[[Tensor], None] | None = None,
        on_deep: Callable[[Tensor], Tensor] | None = None,
        **inputs: Any,
    ) -> Tapped:
        """Run the model and return what was tapped at the last position.

        on_shallow: called with the shallow state [B, H] as soon as the block has run, beside the rest of the forward.
        on_deep: called with the head's input [B, H]; returns what the head is to see instead.
        inputs: the model's own arguments.  Raises UnsupportedModelError if a tap did not run exactly once.
        """
        self._shallow, self._deep, self._listener = [], [], on_shallow
        self._on_shallow = None if on_shallow is None else self._outside
        self._mixer = on_deep
        try:
            logits = self._model(**inputs).logits[:, -1]
        except Exception as error:
            if type(error).__module__ == "torch._dynamo.exc" and "disable" in str(error):
                raise UnsupportedModelError(
                    f"{type(self._parts.model).__name__} is compiled with fullgraph=True, but the Distillers are "
                    "called in the middle of its forward: compile it without, or pass the uncompiled model"
                ) from error
            raise
        finally:
            self._on_shallow = self._listener = self._mixer = None
        for name, tapped in (("block", self._shallow), ("head", self._deep)):
            if len(tapped) != 1:
                module = self._parts.block if name == "block" else self._parts.head_module
                raise UnsupportedModelError(
                    f"the tap on {type(self._parts.model).__name__}'s {name} ({type(module).__name__}) ran "
                    f"{len(tapped)} times in a forward instead of once; code that was compiled or captured before the "
                    "taps were installed ignores them: call torch._dynamo.reset(), or pass the uncompiled model"
                )
        # Views into the whole forward's states: not kept longer than the caller needs them.
        return Tapped(self._shallow.pop(), self._deep.pop(), logits)

    def step(
        self,
        token_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: Any,
        on_shallow: Callable[[Tensor], None] | None = None,
        on_deep: Callable[[Tensor], Tensor] | None = None,
    ) -> Tapped:
        """:meth:`forward` with a cache; the arguments are those of ``ModelParts.inputs``."""
        return self.forward(on_shallow, on_deep, **self._parts.inputs(token_ids, mask, positions, cache))

    def states(self, token_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Shallow and deep states [B, T, H] of a forward without a cache.  token_ids, mask: int64 [B, T]."""
        self._places = slice(None)
        try:
            shallow, deep, _ = self.forward(input_ids=token_ids, attention_mask=mask, use_cache=False)
        finally:
            self._places = -1
        return shallow, deep


class ForeignTaps(Taps):
    """The taps of a model whose forward others call: where one begins is tapped too.

    Everything here may be traced by torch.compile, so it is assignments and lists, and nothing that grows.
    """

    def __init__(self, parts: ModelParts) -> None:
        super().__init__(parts.model, parts)
        self.ran = False
        self.float_inputs: list[str] = []
        """Names of the tensor inputs of the latest forward, seen uncompiled, that are numbers and not tokens."""

    def _enter_more(self) -> None:
        self._shallow, self._deep, self.ran = [], [], False
        model = self._parts.base_model
        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end))

    def _begin(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.ran = True
        self._shallow, self._deep = [], []
        if not torch.compiler.is_compiling():
            tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and n != "attention_mask"}
            self.float_inputs = [name for name, value in tensors.items() if value.is_floating_point()]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        pass

    def _check_once(self, **tapped: list[Tensor]) -> None:
        """Raises UnsupportedModelError if a tap did not run exactly once in the latest forward."""
        for what, states in tapped.items():
            if len(states) != 1:
                raise UnsupportedModelError(
                    f"the tap on {type(self._parts.model).__name__}'s {what} ran {len(states)} times in a forward "
                    "instead of once; a model that was compiled before its taps were installed ignores them: call "
                    "torch.compiler.reset() after entering explore(...), or compile there"
                )


class MixingTaps(ForeignTaps):
    """Taps of a model whose head is to see other states than its own.

    on_shallow: called with the shallow state [B, H] in the middle of a forward.
    on_deep: called with the head's input [B, H] of the last of ``positions``; returns what the head is to see instead.
    A compiled model's code is split at both.
    """

    def __init__(
        self, parts: ModelParts, on_shallow: Callable[[Tensor], None], on_deep: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(parts)
        self._listener, self._mixer = on_shallow, on_deep
        self._on_shallow = self._outside
        self._inside = False
        self.positions = 0

    def _begin(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        super()._begin(module, args, inputs)
        self._inside = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = False
        self._shallow, self._deep = [], []  # not kept longer than the forward

    def _tap_shallow(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._inside:
            super()._tap_shallow(module, inputs, output)

    def _tap_deep(self, module: nn.Module, inputs: Any) -> Any:
        if not self._inside:  # somebody asks the head alone
            return None
        self.positions = inputs[0].shape[1]
        given = super()._tap_deep(module, inputs)
        self._check_once(block=self._shallow, head=self._deep)
        return given


class PassiveTaps(ForeignTaps):
    """Taps of a model whose logits others sample from.  What is kept is that of the latest forward."""

    def __init__(self, parts: ModelParts, on_shallow: Callable[[Tensor], None]) -> None:
        super().__init__(parts)
        self._on_shallow = on_shallow
        self._logits: list[Tensor] = []
        self._skipped = False

    def _enter_more(self) -> None:
        super()._enter_more()
        self._logits, self._skipped = [], False

    def _begin(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        super()._begin(module, args, inputs)
        self._skipped = self._skipped or len(self._logits) > 0
        self._logits = []

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._logits.append((output.logits if hasattr(output, "logits") else output[0])[:, -1])

    def take(self) -> tuple[Tapped, bool]:
        """What the latest forward tapped, and whether forwards before it were not drawn from.

        Raises UnsupportedModelError if a tap did not run exactly once in it.
        """
        skipped, self._skipped = self._skipped, False
        self._check_once(block=self._shallow, head=self._deep, model=self._logits)
        return Tapped(self._shallow.pop(), self._deep.pop(), self._logits.pop()), skipped


@torch.no_grad()
def check_head(parts: ModelParts, head: Head | None, tapped: Tapped) -> bool:
    """Whether the head, applied to the tapped deep state, gives the model's logits; raises if it does not.

    head: what candidates are scored by; None is the model's own module, with adapters and all, as the latent form has.
    Returns False where no row has finite numbers to judge by.  Waits for the device.  Raises UnsupportedModelError.
    """
    name, rows, own = type(parts.model).__name__, slice(0, 2), head is None
    head = head or parts.head
    deep, logits = tapped.deep[rows], tapped.logits[rows].float()
    if deep.shape[1] != head.hidden_size or logits.shape[1] > head.vocab_size:
        raise UnsupportedModelError(
            f"{name}: the head is {list(head.weight.shape)}, but its input has {deep.shape[1]} features and the model "
            f"gives {logits.shape[1]} logits"
        )
    if own:
        expected = parts.logits(deep)[:, : logits.shape[1]]
    else:
        dots = nn.functional.linear(deep.to(head.weight.dtype), head.weight, head.bias)[:, : logits.shape[1]].float()
        expected = transform_scores(dots, head)
    finite = torch.isfinite(logits).all(-1) & torch.isfinite(expected).all(-1)
    if not bool(finite.any()):
        return False
    logits, expected = logits[finite], expected[finite]
    largest = logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    tolerance = max(HEAD_TOLERANCE[head.weight.dtype], HEAD_TOLERANCE.get(tapped.logits.dtype, 0.0))
    error = float((logits - expected).abs().max() / largest)
    if error > tolerance:
        ratio = float((logits * expected).sum() / expected.square().sum().clamp_min(1e-30))
        scaled = float((logits - ratio * expected).abs().max() / largest) <= tolerance
        hint = (
            f"they are {ratio:.4g} times it (scale)" if scaled else f"they differ by up to {error:.2g} of the largest"
        )
        raise UnsupportedModelError(
            f"{name}: the output head as read (scale {head.scale:.4g}, softcap {head.softcap}, "
            f"{'a' if head.bias is not None else 'no'} bias) does not give the model's logits from its input: {hint}"
        )
    return True
