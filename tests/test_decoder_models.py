"""The decoder against transformers itself: greedy tokens, tapped states and logits, on tiny random models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from esamp_core.base.seeds import row_seeds
from esamp_core.decoder import Decoder, Generation
from esamp_core.explorer import Explorer
from esamp_core.explorer.rows import Rows
from esamp_core.models.parts import find_parts
from esamp_core.sample import DistillerConfig, Draw, SamplingParams

VOCAB = 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
# Windows of 5 are much shorter than the sequences below, and the soft-cap of 2 bends the logits.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA, final_logit_softcapping=2.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2_SIZES)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=4.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.25)),
}
PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (4, 9, 1, 13)
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def build(name: str) -> Any:
    """A tiny model with weights large enough for its distributions not to be flat; the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, beta=0.0, seed=0, **changes)


@functools.cache
def expected_greedy(name: str, new_tokens: int, stop: tuple[int, ...] = ()) -> list[list[int]]:
    """transformers' own greedy continuation of PROMPTS, as one left-padded batch."""
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in PROMPTS])
    out = build(name).generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=list(stop) or VOCAB + 1,
    )
    result = []
    for row in out[:, length:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        result.append(row[:end])
    return result


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers_greedy(name: str, cache: Any) -> None:
    free = expected_greedy(name, 12)
    stop = (free[0][3], free[3][8])  # rows end at different times, most of them early
    want = expected_greedy(name, 12, stop)
    for rows in (None, 3):  # one batch; a queue that refills
        got = Decoder(build(name)).generate(
            PROMPTS, n=2, params=greedy(), max_new_tokens=12, stop_token_ids=stop, cache=cache, max_batch_rows=rows
        )
        assert [list(g.token_ids) for g in got] == [w for w in want for _ in range(2)]
        assert [g.prompt_index for g in got] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [g.finish_reason for g in got] == ["stop" if g.token_ids[-1] in stop else "length" for g in got]


class Spy(Explorer):
    """An Explorer that writes down every step of every row."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: dict[tuple[int, int], dict[str, Tensor]] = {}  # by row seed and position
        self.idle = 0  # rows that ran although they were finished
        self.sizes: list[int] = []

    def predict(self, shallow: Tensor, rows: Rows) -> None:
        super().predict(shallow, rows)
        self._note("shallow", shallow, rows)

    def sample(self, logits: Tensor, rows: Rows, *, model_logits: Tensor | None = None) -> Draw:
        self._note("logits", logits, rows)
        self._before = rows.positions.clone()
        draw = super().sample(logits, rows, model_logits=model_logits)
        self.idle += int((~rows.active).sum())
        self.sizes.append(len(rows))
        return draw

    def learn(self, deep: Tensor | None, rows: Rows) -> None:
        super().learn(deep, rows)
        assert deep is not None
        self._note("deep", deep, rows, self._before)

    def _note(self, name: str, states: Tensor, rows: Rows, positions: Tensor | None = None) -> None:
        where = zip(rows.seeds.tolist(), (rows.positions if positions is None else positions).tolist(), strict=True)
        for i, key in enumerate(where):
            if rows.active[i]:
                self.steps.setdefault(key, {})[name] = states[i].clone()


def spy_on(name: str, config: DistillerConfig | None = None) -> tuple[Decoder, Spy]:
    parts = find_parts(build(name))
    spy = Spy(parts.head, parts.hidden_size, config or DistillerConfig(deep_scale=parts.deep_scale), max_rows=64)
    return Decoder(build(name), explorer=spy), spy


@torch.no_grad()
def plain_forward(name: str, token_ids: list[int], layer: int = 0) -> dict[str, Tensor]:
    """Shallow, deep and logits at all positions of one sequence, from one forward without cache."""
    model, seen = build(name), []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    out = model(torch.tensor([token_ids]), output_hidden_states=True)
    handle.remove()
    return {"shallow": out.hidden_states[layer + 1][0], "deep": seen[0], "logits": out.logits[0]}


def seed_of(generation: Generation) -> int:
    return int(row_seeds(torch.tensor([generation.seed]), torch.tensor([generation.sample_index])))


STEPS = [(name, "dynamic", 5) for name in MODELS] + [(name, "static", 6) for name in ("llama", "gemma3", "gpt2")]


@pytest.mark.parametrize(("name", "cache", "rows"), STEPS)
def test_taps_see_what_a_plain_forward_gives(name: str, cache: Any, rows: int) -> None:
    decoder, spy = spy_on(name)
    params = SamplingParams(beta=0.25, seed=11, distinct=False)
    stop = tuple(range(3, 15))
    prompts = [*PROMPTS, *PROMPTS[::-2]]
    got = decoder.generate(
        prompts, n=2, params=params, max_new_tokens=10, stop_token_ids=stop, cache=cache, max_batch_rows=rows
    )
    assert len({len(g.token_ids) for g in got}) >= 3  # rows left at different times
    for generation in got:
        prompt, drawn = prompts[generation.prompt_index], list(generation.token_ids)
        plain = plain_forward(name, prompt + drawn)
        for t in range(len(drawn)):
            step = spy.steps.pop((seed_of(generation), t))
            for what in ("shallow", "deep", "logits"):
                torch.testing.assert_close(step[what], plain[what][len(prompt) - 1 + t], atol=1e-4, rtol=1e-4)
    assert not spy.steps  # nothing else was predicted, drawn or learned
    if cache == "dynamic":
        assert max(spy.sizes) <= rows and len(set(spy.sizes)) > 1
    else:
        assert spy.idle > 0


@pytest.mark.parametrize("layer", [1, -2])
def test_shallow_layer_is_the_output_of_that_block(layer: int) -> None:
    parts = find_parts(build("llama"))
    spy = Spy(parts.head, parts.hidden_size)
    got = Decoder(build("llama"), explorer=spy, shallow_layer=layer).generate(PROMPTS[:1], max_new_tokens=3)
    plain = plain_forward("llama", PROMPTS[0], 1)
    step = spy.steps[(seed_of(got[0]), 0)]
    torch.testing.assert_close(step["shallow"], plain["shallow"][-1], atol=1e-4, rtol=1e-4)


@functools.cache
def hybrid() -> Any:
    """A model with layers that keep one state per row instead of keys and values."""
    linear = {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**SIZES, **linear)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model


def test_hybrid_model_with_linear_attention() -> None:
    model, want = hybrid(), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        want.append(ids[0, len(prompt) :].tolist())
    for rows in (None, 2):
        got = Decoder(model).generate(
            PROMPTS, n=2, params=greedy(), max_new_tokens=8, stop_token_ids=(), max_batch_rows=rows
        )
        assert [list(g.token_ids) for g in got] == [w for w in want for _ in range(2)]


def test_model_without_position_ids() -> None:
    config = hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = hf.BloomForCausalLM(config).eval()
    got = Decoder(model).generate(PROMPTS, params=greedy(), max_new_tokens=6, stop_token_ids=())
    for prompt, generation in zip(PROMPTS, got, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(generation.token_ids) == ids[len(prompt) :]


class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations whose result the host must read, which on a GPU would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_step_reads_nothing_from_the_device(
    name: str, cache: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU's dispatcher; the Explorer's own part is left out, whose checks differ there."""
    from esamp_core.decoder import batch
    from esamp_core.models import taps

    reads, calls = HostReads(), set()

    def watched(original: Any) -> Any:
        def call(self: Any, *args: Any, **inputs: Any) -> Any:
            if args and isinstance(args[0], torch.Tensor) and args[0].shape[1] > 1:  # a prefill
                return original(self, *args, **inputs)
            inputs.pop("on_shallow", None)
            calls.add(original.__name__)
            with reads:
                return original(self, *args, **inputs)

        return call

    monkeypatch.setattr(taps.Taps, "step", watched(taps.Taps.step))
    monkeypatch.setattr(batch.Batch, "attention_mask", watched(batch.Batch.attention_mask))
    monkeypatch.setattr(batch.Batch, "advance", watched(batch.Batch.advance))
    config = DistillerConfig(lr=0.0, gate=False)
    Decoder(build(name), config=config).generate(prompts, n=2, params=greedy(), max_new_tokens=9, cache=cache)
    assert reads.found == [] and calls == {"step", "attention_mask", "advance"}
