"""Finding taps and heads: what is read from a model is right, and what cannot be trusted is refused."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from esamp_core.base.errors import UnsupportedModelError
from esamp_core.decoder import Decoder, generate
from esamp_core.models.parts import cache_argument, find_parts
from esamp_core.models.taps import Tapped, Taps, check_head
from esamp_core.sample import ArgumentError, Explorer, Head, SamplingParams
from tests.test_decoder_models import (  # noqa: F401
    MODELS,
    PROMPTS,
    SIZES,
    VOCAB,
    build,
    expected_greedy,
    greedy,
    one_thread,
)


def run(model: Any, parts: Any) -> Tapped:
    with torch.no_grad(), Taps(model, parts) as taps:
        return taps.forward(input_ids=torch.tensor([PROMPTS[1], PROMPTS[1][::-1]]))


@pytest.mark.parametrize("name", MODELS)
def test_head_gives_the_models_logits(name: str) -> None:
    parts = find_parts(build(name))
    assert check_head(parts, parts.head, run(build(name), parts))
    assert parts.hidden_size == 32 and parts.vocab_size == VOCAB and parts.context == 64
    assert parts.block is (build(name).transformer.h if name == "gpt2" else build(name).model.layers)[0]
    want = {"gemma2": (1.0, 2.0), "granite": (0.25, None), "cohere": (0.25, None)}
    assert (parts.head.scale, parts.head.softcap) == want.get(name, (1.0, None))


WRONG = [
    ("cohere", {"scale": 1.0}, "they are 0.25 times it"),
    ("granite", {"scale": 4.0}, "they are 0.0625 times it"),
    ("llama", {"scale": -1.0}, "they are -1 times it"),
    ("gemma2", {"softcap": None}, "they differ by up to"),
    ("gemma2", {"softcap": 30.0}, "they differ by up to"),
    ("llama", {"bias": torch.arange(float(VOCAB))}, "a bias"),
    ("llama", {"weight": torch.randn(VOCAB, 32)}, "they differ by up to"),
    ("llama", {"weight": torch.randn(VOCAB - 1, 32)}, "gives 120 logits"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_wrong_head_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    parts = find_parts(build(name))
    head: Head = dataclasses.replace(parts.head, **change)
    with pytest.raises(UnsupportedModelError, match=message):
        check_head(parts, head, run(build(name), parts))
    explorer = Explorer(head, 32)
    with pytest.raises(UnsupportedModelError, match=message):
        Decoder(build(name), explorer=explorer).generate(PROMPTS, max_new_tokens=2)
    assert explorer.stats() == {}


def test_config_that_lies_about_the_scale_is_refused() -> None:
    model = hf.CohereForCausalLM(hf.CohereConfig(**SIZES)).eval()
    model.config.logit_scale = 0.5  # the model kept the first one
    with pytest.raises(UnsupportedModelError, match="times it"):
        generate(model, PROMPTS, max_new_tokens=2)


def test_numbers_that_are_not_finite_prove_nothing() -> None:
    parts = find_parts(build("llama"))
    tapped = run(build("llama"), parts)
    assert not check_head(parts, parts.head, tapped._replace(logits=tapped.logits * float("nan")))


@pytest.mark.parametrize(("name", "rms"), [("llama", 2.0), ("gemma2", 3.0), ("gemma3", 3.0), ("cohere", 2.0)])
def test_deep_scale_is_the_rms_of_the_effective_norm_weight(name: str, rms: float) -> None:
    model: Any = MODELS[name]().eval()
    nn.init.constant_(model.model.norm.weight, 2.0)  # Gemma multiplies by 1 + weight
    assert find_parts(model).deep_scale == pytest.approx(rms, rel=1e-3)
    assert Decoder(model).config.deep_scale == pytest.approx(rms, rel=1e-3)


def test_deep_scale_is_unknown_without_a_norm_weight() -> None:
    model = hf.OlmoForCausalLM(hf.OlmoConfig(**SIZES)).eval()
    assert find_parts(model).deep_scale is None
    assert len(generate(model, PROMPTS, n=2, max_new_tokens=3, stop_token_ids=())) == 8


def test_hooks_live_as_long_as_the_context() -> None:
    parts = find_parts(build("llama"))
    modules = (parts.block._forward_hooks, parts.head_module._forward_pre_hooks)
    before = [len(m) for m in modules]
    with pytest.raises(RuntimeError, match="inside"), Taps(build("llama"), parts):
        assert [len(m) for m in modules] == [n + 1 for n in before]
        raise RuntimeError("inside")
    assert [len(m) for m in modules] == before


class Bypass(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Does not call its head as a module, or calls it twice, or skips a block.

    Code that was compiled or captured before the taps were installed looks like the first: it runs no hooks.
    """

    mode = "none"

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        layers = self.model.layers
        if self.mode == "skip":
            self.model.layers = layers[1:]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        self.model.layers = layers
        if self.mode == "none":
            return hf.modeling_outputs.CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)
        if self.mode == "twice":
            self.lm_head(hidden)
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


@pytest.mark.parametrize(
    ("mode", "message"),
    [("none", "head .* ran 0 times"), ("twice", "head .* ran 2 times"), ("skip", "block .* ran 0 times")],
)
def test_tap_that_does_not_run_once_raises(mode: str, message: str) -> None:
    model = Bypass(hf.LlamaConfig(**SIZES)).eval()
    model.mode = mode
    with pytest.raises(UnsupportedModelError, match=message):
        generate(model, PROMPTS[:1], max_new_tokens=2)
    assert not model.lm_head._forward_pre_hooks


class Renamed(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Its forward as transformers up to 5.23 has it, or as code that comes with a model may."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None
    ) -> Any:
        return self.as_installed(input_ids, attention_mask, position_ids, past_key_values)

    def as_installed(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any) -> Any:
        name = cache_argument(build("llama"))
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **{name: cache}
        )


class RenamedAnew(Renamed):
    """As transformers has it from 5.24 on."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: hf.Cache | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        return self.as_installed(input_ids, attention_mask, position_ids, cache)


@pytest.mark.parametrize("kind", [Renamed, RenamedAnew])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_cache_has_the_name_that_the_forward_gives_it(kind: Any, cache: Any) -> None:
    model = kind(build("llama").config).eval()
    model.load_state_dict(build("llama").state_dict())
    options: dict[str, Any] = {"params": greedy(), "max_new_tokens": 8, "stop_token_ids": ()}
    got = generate(model, PROMPTS, **options, cache=cache)
    assert [list(g.token_ids) for g in got] == expected_greedy("llama", 8)


def forward_with(**annotations: Any) -> Any:
    """A Llama whose forward has just these arguments, and anything else as keywords."""
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a) for n, a in annotations.items()]
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()

    def forward(**kwargs: Any) -> Any:
        raise AssertionError("is refused before it runs")

    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    model.forward = forward
    return model


CACHE = "key-value cache"


@pytest.mark.parametrize(
    ("annotations", "lacks"),
    [
        (
            {"input_ids": Any, "attention_mask": Any, "cache": "dict[str, Tensor] | None"},
            "key-value cache",
        ),  # XLM before 5.24
        ({"input_ids": Any, "attention_mask": Any, "cache_params": Any}, CACHE),  # Mamba before 5.24
        ({"input_ids": Any, "cache": "Cache | None"}, "attention_mask"),
        ({"attention_mask": Any, "cache": "transformers.Cache"}, "input_ids"),
    ],
)
def test_forward_that_takes_too_little_is_refused(annotations: dict[str, Any], lacks: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM.forward takes no {lacks}"):
        find_parts(forward_with(**annotations))


class Forgetful(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Takes a cache and does not use it: every step would begin anew."""

    def forward(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


class Narrow(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Takes no positions, and no mask that is wider than its input."""

    def forward(self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * attention_mask[:, :, None])


def columns_as_positions() -> Any:
    """Bart's decoder places a token by how many columns come before it, padding or not."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4}
    return hf.BartForCausalLM(hf.BartConfig(vocab_size=VOCAB, decoder_ffn_dim=48, max_position_embeddings=64, **sizes))


def test_cache_that_stays_empty_is_refused() -> None:
    model = Forgetful(hf.LlamaConfig(**SIZES)).eval()
    with pytest.raises(UnsupportedModelError, match="Forgetful was given a cache as past_key_values and left it empty"):
        generate(model, PROMPTS, max_new_tokens=2)


def test_positions_that_padding_moves_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"BartForCausalLM.* no position_ids, and padding on the left"):
        Decoder(columns_as_positions().eval())
    with pytest.raises(UnsupportedModelError, match=r"Narrow.* no position_ids, and fails on a row that is padded"):
        Decoder(Narrow(hf.LlamaConfig(**SIZES)).eval())


def one_layer() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"num_hidden_layers": 1})).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_first", [False, True], ids=["taps first", "compiled first"])
def test_compiled_model(compiled_first: bool, fresh_compiler: None) -> None:
    """backend="eager" traces as the others do and leaves the code as it is; rounding differs a little."""
    options: dict[str, Any] = {"n": 2, "params": SamplingParams(seed=3, beta=0.5, distinct=False), "max_new_tokens": 4}
    want = generate(one_layer(), PROMPTS[:1], stop_token_ids=(), cache="static", **options)
    model = torch.compile(one_layer(), backend="eager")
    if compiled_first:
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
    for _ in range(2):  # the taps were removed in between
        got = generate(model, PROMPTS[:1], stop_token_ids=(), cache="static", **options)
        assert [g.token_ids for g in got] == [g.token_ids for g in want]
        for name in ("logprobs", "novelty"):
            for mine, theirs in zip(got, want, strict=True):
                assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("compiled_first", [False, True], ids=["taps first", "compiled first"])
def test_model_compiled_as_one_graph_is_refused(compiled_first: bool, fresh_compiler: None) -> None:
    model = torch.compile(one_layer(), backend="eager", fullgraph=True)
    if compiled_first:
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is compiled with fullgraph=True"):
        generate(model, PROMPTS[:1], max_new_tokens=2, cache="static")
    assert not model._orig_mod.lm_head._forward_pre_hooks


def test_encoder_decoder_is_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        find_parts(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)).eval())


def test_model_without_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
        find_parts(build("llama").model)


def test_model_without_cache_is_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(UnsupportedModelError, match="takes no key-value cache"):
        find_parts(hf.BertForMaskedLM(hf.BertConfig(vocab_size=20, **sizes)).eval())


def test_training_mode_is_refused() -> None:
    with pytest.raises(ArgumentError, match="eval mode"):
        find_parts(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).train())


def test_no_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match="model must be a transformers model, got Linear"):
        find_parts(nn.Linear(2, 2))


def test_offloaded_and_scattered_models_are_refused() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        find_parts(model)


class PackedHead(nn.Module):
    """As quantised heads are: the weight is packed into bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize(("shape", "dtype"), [((VOCAB, 32), torch.uint8), ((VOCAB * 16,), torch.float32)])
def test_quantised_head_is_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    model.lm_head = PackedHead(shape, dtype)
    with pytest.raises(UnsupportedModelError, match="leave the head unquantised"):
        find_parts(model)


def test_ambiguous_blocks_are_refused() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    model.model.others = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(UnsupportedModelError, match=r"several lists of 3 decoder blocks.*layers \(3\), others \(3\)"):
        find_parts(model)
    del model.model.others
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match=r"no list of 5 decoder blocks.*layers \(3\)"):
        find_parts(model)


def test_layers_that_cannot_be_joined_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from esamp_core.decoder import kv_cache

    monkeypatch.setattr(kv_cache, "_JOINABLE", ("DynamicLayer",))
    with pytest.raises(UnsupportedModelError, match=r'rows of DynamicSlidingWindowLayer .* cache="static"'):
        generate(build("gemma3"), PROMPTS, max_new_tokens=2)


def test_static_cache_needs_position_ids() -> None:
    config = hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2)
    with pytest.raises(UnsupportedModelError, match="needs a model that takes position_ids, got BloomForCausalLM"):
        generate(hf.BloomForCausalLM(config).eval(), PROMPTS, max_new_tokens=2, cache="static")
