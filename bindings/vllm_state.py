"""What vLLM's V2 model runner tells its model state: who is in which slot, and the order of the rows of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def mixing_state(model: Any, vllm_config: Any, own: Callable[[], Any] | None) -> Any:
    """The model's class of state, told on to its Mixer.  own: what the model itself says of its class, if it does."""
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    # A module around it, which does not say of its class: vLLM then looks at the layers.
    base: Any = own() if own is not None else resolve_model_state_cls(vllm_config, torch.nn.ModuleList([model]))
    mixer = model.esamp_mixer

    class MixingState(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._slots: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            new = new_req_data
            self._slots[new.req_id] = req_index
            adapter = 0 if new.lora_request is None else new.lora_request.lora_int_id
            mixer.join(req_index, new.sampling_params, new.prompt_token_ids, len(new.prefill_token_ids), adapter)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            slot = self._slots.pop(req_id, None)
            if slot is not None:
                mixer.requests.pop(slot, None)

        def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
            super().preprocess_state(input_batch, *args, **kwargs)
            slots = input_batch.idx_mapping_np.tolist()
            ends = input_batch.cu_num_logits_np.tolist()
            rows = [slot for i, slot in enumerate(slots) for _ in range(ends[i + 1] - ends[i])]
            mixer.expect(lambda count: rows)

        def postprocess_state(self, idx_mapping: Any, num_sampled: Any, *args: Any, **kwargs: Any) -> None:
            super().postprocess_state(idx_mapping, num_sampled, *args, **kwargs)
            if mixer.speculates and isinstance(num_sampled, torch.Tensor):
                mixer.accept(num_sampled)

    return MixingState
