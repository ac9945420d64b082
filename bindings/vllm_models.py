"""vLLM's model classes, tapped and mixing: the plugin's entry point, and the wrapper classes it registers.

``register`` re-registers every text-generation architecture under its own name, so that all of vLLM's tables for it
stay valid, with a subclass made when it is first asked for.  In an engine that is not configured to explore the
subclass changes nothing.  Otherwise the model also outputs its hidden state after an early block (vLLM's interface for
auxiliary hidden states) and each token's position, as further columns of its hidden state.  So they pass through
whatever the engine does to it, compiled or captured, and ``compute_logits`` finds them beside the rows to be sampled,
whose deep states it mixes before the head sees them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esamp_core.base.checks import require
from esamp_core.base.errors import UnsupportedModelError
from esamp_core.base.versions import release, tried_versions, untried
from esamp_core.bindings.vllm_config import PluginConfig, adopt_switch, check_engine, settings_of
from esamp_core.bindings.vllm_mixing import Mixer
from esamp_core.bindings.vllm_state import mixing_state

SUFFIXES = ("ForCausalLM", "LMHeadModel")
# A position as digits, each of them exact in any float format.
DIGIT, DIGITS = 128, 4

_bases: dict[str, Any] = {}  # architecture -> vLLM's own registry entry


_latest: Mixer | None = None


def mixer_of(vllm_config: Any) -> Mixer | None:
    """The one Mixer of an engine, whose parts are all given the same configuration object; None if it is not to
    explore."""
    global _latest
    if settings_of(vllm_config) is None:
        return None
    if _latest is None or _latest.vllm_config is not vllm_config:
        _latest = Mixer(vllm_config)
    return _latest


def register() -> None:
    """Entry point of ``vllm.general_plugins``: runs in each of the engine's processes, once or more often."""
    import vllm
    from vllm import ModelRegistry

    version = str(getattr(vllm, "__version__", ""))
    for architecture, entry in list(ModelRegistry.models.items()):
        # Another plugin's class may have another way to be made.
        is_vllms_own = getattr(entry, "module_name", "").startswith("vllm.")
        if architecture.endswith(SUFFIXES) and is_vllms_own and architecture not in _bases:
            _bases[architecture] = entry
            ModelRegistry.register_model(architecture, f"{__name__}:{_class_name(architecture, version)}")


def _class_name(architecture: str, version: str) -> str:
    # vLLM caches what it knows of a class under its name: with its version in it, an upgrade asks again.
    return f"Explored_{architecture}_{''.join(c if c.isalnum() else '_' for c in version)}"


def is_registered(architecture: str) -> bool:
    return architecture in _bases


def __getattr__(name: str) -> Any:
    for architecture, entry in _bases.items():
        if name.startswith(f"Explored_{architecture}_"):
            globals()[name] = explored(entry.load_model_cls(), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def explored(base: Any, name: str) -> Any:
    """A subclass of a vLLM model class that taps and mixes, in an engine that is configured to explore."""

    class Explored(base):
        esamp_mixer: Mixer | None = None  # stays None in an engine that is not configured to explore: all is vLLM's

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            # One with a prefix is part of another model, or the draft model beside it.
            if settings_of(vllm_config) is None or prefix:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                return
            check_engine(vllm_config)
            check_architecture(base)
            adopt_switch(vllm_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            model_config = vllm_config.model_config
            self.esamp_mixer = mixer_of(vllm_config)
            self.esamp_hidden = int(model_config.get_hidden_size())
            self.esamp_dtype = model_config.dtype
            layers, layer = model_config.get_total_num_hidden_layers(), PluginConfig.read(vllm_config).shallow_layer
            require(layer < layers - 1, "esamp.shallow_layer", f"be below {layers - 1}", layer)
            # vLLM counts the states between the blocks: 0 is the embedding, 1 the first block's output.
            self.set_aux_hidden_state_layers((layer + 1,))
            own = getattr(super(), "get_model_state_cls", None)
            # Of the instance: vLLM's V2 runner looks whether a model has one.
            self.get_model_state_cls = lambda: mixing_state(self, vllm_config, own)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if self.esamp_mixer is None or not isinstance(output, tuple):
                return output  # where the tap did not run, the mixer says so
            deep, (shallow,) = output
            positions = kwargs["positions"] if "positions" in kwargs else args[1]
            return torch.cat((deep, shallow.to(deep.dtype), _digits(positions, deep.dtype)), dim=-1)

        def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            mixer = self.esamp_mixer
            if mixer is None or hidden_states.shape[-1] != 2 * self.esamp_hidden + DIGITS:
                return super().compute_logits(hidden_states, *args, **kwargs)
            deep, shallow, digits = torch.split(hidden_states, [self.esamp_hidden, self.esamp_hidden, DIGITS], dim=-1)
            mixed = mixer.mix(self, shallow, deep.contiguous(), _position(digits), partial(_adapters, self, len(deep)))
            return super().compute_logits(mixed, *args, **kwargs)

        def load_weights(self, *args: Any, **kwargs: Any) -> Any:
            loaded = super().load_weights(*args, **kwargs)
            if self.esamp_mixer is not None:
                self.esamp_mixer.forget()  # what Distillers learned is of the weights before
            return loaded

        def eval(self) -> Any:
            # The loader calls this last, when the weights are what they will be, and before memory is measured.
            if self.esamp_mixer is not None and self.esamp_mixer.explorer is None:
                self.esamp_mixer.start(self, next(self.parameters()).device, self.esamp_dtype)
            return super().eval()

    Explored.__name__ = Explored.__qualname__ = name
    Explored.__module__ = __name__
    return Explored


def _adapters(model: Any, rows: int) -> Sequence[int] | None:
    """The LoRA adapter of every row, 0 for none: the V1 runner tells it to nobody else.  None without adapters."""
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        return None
    mapping: Sequence[int] = manager._last_mapping.prompt_mapping
    assert len(mapping) >= rows, f"vLLM mapped {len(mapping)} rows to adapters, {rows} are sampled"
    return mapping[:rows]


def _digits(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, DIGITS] of positions [T], least first."""
    powers = DIGIT ** torch.arange(DIGITS, device=positions.device)
    return (positions[:, None] // powers % DIGIT).to(dtype)


def _position(digits: Tensor) -> Tensor:
    powers = DIGIT ** torch.arange(DIGITS, device=digits.device)
    return (digits.long() * powers).sum(-1)


def check_architecture(base: Any) -> None:
    """Raises UnsupportedModelError for a model class without auxiliary hidden states; warns of another vLLM."""
    import vllm
    from vllm.model_executor.models.interfaces import supports_eagle3

    if not supports_eagle3(base):
        raise UnsupportedModelError(
            f"esamp does not work with {base.__name__}: vLLM gives no access to its early hidden states (it lacks "
            "set_aux_hidden_state_layers); --model-impl transformers may have it"
        )
    version = str(vllm.__version__)
    tried = ", ".join("{}.{}".format(*release(v)) for v in tried_versions("vllm"))
    if untried({"vllm": version}):
        warnings.warn(f"esamp was tried with vLLM {tried}, this is {version}; watch its log lines", stacklevel=2)
