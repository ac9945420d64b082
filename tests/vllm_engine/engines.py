"""Real engines on tiny models, and what transformers and float64 say of the same tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from latent_oracle import chosen, expected_logits, forward
from torch import Tensor
from vllm import LLM, SamplingParams

from esamp_core.bindings import vllm_models
from esamp_core.bindings.vllm_mixing import Mixer

__all__ = ["chosen", "expected_logits", "forward"]  # and all below
MAX_LEN = 128
PROMPTS = ["hello", "world, abc", "x" * 20, "another prompt", "q", "long prompt number seven", "zz", "hello"]

_alive: list[LLM] = []  # an engine that goes away takes the process groups of all others in its process with it


class Row(NamedTuple):
    """What was mixed for one row of one step."""

    group: Any
    position: int  # of the token that was fed
    shallow: Tensor
    deep: Tensor
    mixed: Tensor
    teaches: bool


class CapturingMixer(Mixer):
    """Writes down what it mixes."""

    captured: ClassVar[list[Row]] = []
    resumed: ClassVar[int] = 0  # requests that came back with tokens drawn before

    def join(self, key: int, params: Any, prompt: Any, fed: int, adapter: int | None = None) -> None:
        CapturingMixer.resumed += fed > len(prompt or ())
        super().join(key, params, prompt, fed, adapter)

    def _step(self, keys: Any, present: Any, shallow: Tensor, deep: Tensor, position: Tensor, adapters: Any) -> Tensor:
        seen = shallow.clone().float(), deep.clone().float()
        self._rows: list[tuple[int, Any, int, Tensor, Tensor, Tensor]] = []
        mixed = super()._step(keys, present, shallow, deep, position, adapters)
        assert torch.equal(deep.float(), seen[1])  # the engine's own buffer is only read
        for i, request in enumerate(present):
            if request is not None and not request.plain and int(position[i]) + 1 >= request.fed:
                self._rows.append((i, request.asked.group, int(position[i]), seen[0][i], seen[1][i], mixed[i].clone()))
            else:
                assert torch.equal(mixed[i], deep[i])
        if not self.speculates:
            self._write([True] * len(present))
        return mixed

    def _learn(self, accepted: Tensor | None) -> None:
        if accepted is not None and self._staged is not None:
            of, ordinal = self._batch.sequence
            self._write((ordinal < accepted[of]).tolist())
        super()._learn(accepted)

    def _write(self, teaches: list[bool]) -> None:
        CapturingMixer.captured += [Row(*row, teaches[i]) for i, *row in self._rows]


vllm_models.Mixer = CapturingMixer  # type: ignore[misc]


def mixer() -> Mixer:
    """The latest engine's."""
    assert vllm_models._latest is not None
    return vllm_models._latest


def make_llm(model: str, esamp: Any = None, **options: Any) -> LLM:
    """An engine in this process.  esamp: the plugin's settings; None is an engine without it.

    Distillers are not gated unless esamp says so: of such small models they hardly beat a constant.
    """
    if esamp is not None:
        esamp = esamp | {"distiller": {"gate": False} | esamp.get("distiller", {})}
        options = {"additional_config": {"esamp": esamp}, **options}
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


def ask(llm: LLM, sampling: Sequence[SamplingParams], prompts: Sequence[str] | None = None, **given: Any) -> Any:
    """vLLM's own results."""
    texts = prompts or [PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))]
    inputs = [{"prompt_token_ids": tokenise(text)} for text in texts]
    return llm.generate(inputs, list(sampling), use_tqdm=False, **given)


def generate(
    llm: LLM, sampling: Sequence[SamplingParams], prompts: Sequence[str] | None = None
) -> list[list[list[int]]]:
    """Token ids of every sample of every prompt."""
    return [[list(sample.token_ids) for sample in output.outputs] for output in ask(llm, sampling, prompts)]


def check_rows(rows: list[Row], reference: Any, outputs: dict[Any, tuple[list[int], list[int]]]) -> None:
    """Every token of every output was drawn from a state that was mixed from what transformers has at its place, once.

    outputs: (prompt, output) of each group, which is of one request.
    """
    by_group = defaultdict(list)
    for row in rows:
        if row.teaches:
            by_group[row.group].append(row)
    assert set(by_group) == set(outputs)
    for group, (prompt, output) in outputs.items():
        # Of speculative decoding the last step may accept more than was asked for; the engine cuts it off.
        positions = [row.position for row in by_group[group]][: len(output)]
        assert positions == list(range(len(prompt) - 1, len(prompt) + len(output) - 1)), group
        shallow, deep, _ = forward(reference, prompt + output)
        for row in by_group[group][: len(output)]:
            for got, want in ((row.shallow, shallow), (row.deep, deep)):
                torch.testing.assert_close(got, want[row.position].float(), rtol=0, atol=1e-4)


def returned_logprobs(output: Any) -> Tensor:
    """float64 [steps]: what the engine says of the tokens that it drew."""
    chosen = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    return torch.tensor(chosen, dtype=torch.float64)
