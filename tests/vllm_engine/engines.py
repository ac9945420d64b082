"""Real engines on tiny models, and the transformers forward that they are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm import LLM, SamplingParams

from esamp_core.bindings.vllm_plugin import ExploratoryProcessor

PROCESSOR = "esamp_core.bindings.vllm_plugin:ExploratoryProcessor"
MAX_LEN = 128
PROMPTS = ["hello", "world, abc", "x" * 20, "another prompt", "q", "long prompt number seven", "zz", "hello"]

_alive: list[LLM] = []  # an engine that goes away takes the process groups of all others in its process with it


class Row(NamedTuple):
    """What reached the draw for one row of one step."""

    group: Any
    position: int  # of the token that was fed
    shallow: Tensor
    deep: Tensor
    logits: Tensor  # as they came to us
    model_logits: Tensor | None  # the untouched ones, where the engine edits them
    token: int


class CapturingProcessor(ExploratoryProcessor):
    """Writes down what it draws from."""

    captured: ClassVar[list[Row]] = []
    resumed: ClassVar[int] = 0  # requests that came back with tokens drawn before

    def _request(self, asked: Any, prompt_length: int, drawn: int, read_prompt: Any) -> Any:
        CapturingProcessor.resumed += drawn > 0
        return super()._request(asked, prompt_length, drawn, read_prompt)

    def _draw(self, explorer: Any, logits: Any, tapped: Any, index: Any) -> Any:
        edited = None if tapped.logits is None else tapped.logits.clone()
        seen = logits.clone()
        draw = super()._draw(explorer, logits, tapped, index)
        places = list(range(len(seen))) if index is None else index.tolist()
        for i, (place, request) in enumerate(zip(places, self._batch.requests, strict=True)):
            if draw.token_ids[i] >= 0:
                states = [t[place].clone().float() for t in (tapped.shallow, tapped.deep, seen)]
                model_logits = None if edited is None else edited[place]
                group, position = request.asked.group, int(tapped.position[place])
                row = Row(group, position, *states, model_logits, int(draw.token_ids[i]))
                self.captured.append(row)
        return draw


def make_llm(model: str, esamp: dict[str, Any] | None = None, **options: Any) -> LLM:
    """An engine in this process.  esamp: the plugin's settings; None is an engine without it."""
    if esamp is not None:
        options = {"logits_processors": [PROCESSOR], "additional_config": {"esamp": esamp}, **options}
    defaults = {
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "num_gpu_blocks_override": 64,
        "distributed_executor_backend": "uni",
        "seed": 0,
    }
    llm = LLM(model, **{**defaults, **options})
    _alive.append(llm)
    return llm


def tokenise(text: str) -> list[int]:
    from checkpoints import byte_tokenizer

    return list(byte_tokenizer()(text)["input_ids"])


def params(i: int, **given: Any) -> SamplingParams:
    """Uneven lengths; every third greedy, the others with all filters that the engine has."""
    sampled = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    common = {"max_tokens": 4 + 5 * i % 17, "seed": 100 * i, "ignore_eos": True}
    return SamplingParams(**{**common, **({"temperature": 0.0} if i % 3 == 1 else sampled), **given})


def generate(
    llm: LLM, sampling: Sequence[SamplingParams], prompts: Sequence[str] | None = None
) -> list[list[list[int]]]:
    """Token ids of every sample of every prompt."""
    texts = prompts or [PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))]
    inputs = [{"prompt_token_ids": tokenise(text)} for text in texts]
    outputs = llm.generate(inputs, list(sampling), use_tqdm=False)
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


@torch.no_grad()
def forward(model: Any, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' shallow state, deep state and logits, each [T, ...], of a sequence."""
    seen: dict[str, Tensor] = {}

    def keep_shallow(module: Any, inputs: Any, output: Any) -> None:
        seen["shallow"] = (output[0] if isinstance(output, tuple) else output)[-len(tokens) :]

    def keep_deep(module: Any, inputs: Any) -> None:
        seen["deep"] = inputs[0]

    hooks = [
        model.model.layers[0].register_forward_hook(keep_shallow),
        model.lm_head.register_forward_pre_hook(keep_deep),
    ]
    logits = model(torch.tensor([list(tokens)])).logits[0]
    for hook in hooks:
        hook.remove()
    return seen["shallow"].reshape(len(tokens), -1), seen["deep"].reshape(len(tokens), -1), logits


def check_rows(rows: list[Row], reference: Any, outputs: dict[Any, tuple[list[int], list[int]]]) -> None:
    """Every token of every output was drawn from exactly the states that transformers has at its place.

    outputs: (prompt, output) of each group, which is of one request.
    """
    by_group = defaultdict(list)
    for row in rows:
        by_group[row.group].append(row)
    assert set(by_group) == set(outputs)
    for group, (prompt, output) in outputs.items():
        positions = [row.position for row in by_group[group]]
        assert positions == list(range(len(prompt) - 1, len(prompt) + len(output) - 1)), group
        assert [row.token for row in by_group[group]] == output
        shallow, deep, logits = forward(reference, prompt + output)
        for row in by_group[group]:
            for got, want in ((row.shallow, shallow), (row.deep, deep), (row.logits, logits)):
                torch.testing.assert_close(got, want[row.position], rtol=0, atol=1e-4)
