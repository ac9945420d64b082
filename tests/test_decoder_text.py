"""What goes in and comes out: prompts, texts, streams, progress, and errors of one line."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from esamp_core.decoder import Decoder, Generation, Token, generate
from esamp_core.decoder.output import TextStream
from esamp_core.models.parts import find_parts
from esamp_core.sample import ArgumentError, DistillerConfig, EsampError, Explorer, SamplingParams
from tests.test_decoder_models import PROMPTS, VOCAB, build, expected_greedy, greedy, one_thread  # noqa: F401


@functools.cache
def words() -> Any:
    """One token per word: <0> <1> <2>, which are special, w3 w4 w5 ..."""
    names = {f"<{i}>" if i < 3 else f"w{i}": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(names, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<0>", bos_token="<1>", eos_token="<2>", clean_up_tokenization_spaces=False
    )


def text_of(token_ids: Any) -> str:
    return " ".join(f"w{i}" for i in token_ids if i > 2)


def draws(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [g.token_ids for g in generations]


def test_all_kinds_of_prompts() -> None:
    prompts = PROMPTS[:3]
    length = max(map(len, prompts))
    left = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    right = torch.tensor([p + [0] * (length - len(p)) for p in prompts])
    masks = [(torch.tensor([len(p) for p in prompts])[:, None] > torch.arange(length)).long()]
    masks.append(masks[0].flip(1))
    options: dict[str, Any] = {"params": SamplingParams(seed=1), "max_new_tokens": 4, "stop_token_ids": ()}
    want = generate(build("llama"), prompts, words(), **options)
    assert [g.prompt_token_ids for g in want] == [tuple(p) for p in prompts] and want[0].prompt is None
    assert generate(build("llama"), right, words(), attention_mask=masks[0], **options) == want
    assert generate(build("llama"), left, words(), attention_mask=masks[1].bool(), **options) == want
    texts = generate(build("llama"), [text_of(p) for p in prompts], words(), **options)
    assert draws(texts) == draws(want) and texts[1].prompt == text_of(prompts[1])
    assert texts[1].text == text_of(texts[1].token_ids)
    single = generate(build("llama"), text_of(prompts[0]), words(), **options)
    assert draws(single) == draws(want)[:1]
    assert generate(build("llama"), prompts, **options)[0].text is None
    assert generate(build("llama"), [], **options) == []


def test_stop_and_special_tokens_are_not_in_the_text() -> None:
    want = expected_greedy("llama", 6)[0]
    got = generate(build("llama"), PROMPTS[:1], words(), params=greedy(), max_new_tokens=6, stop_token_ids=[want[2]])[0]
    cut = want.index(want[2])
    assert got.text == text_of(want[:cut]) and len(got.token_ids) == cut + 1


@pytest.mark.parametrize("stop", [(), ("w20 w3", "w4", "zzzzz")])
def test_streamed_pieces_add_up(stop: tuple[str, ...]) -> None:
    tokens: dict[tuple[int, int], list[Token]] = {}
    finished: list[Generation] = []
    got = generate(
        build("llama"), PROMPTS, words(), n=2, params=SamplingParams(seed=3, distinct=False), max_new_tokens=9,
        max_batch_rows=4, stop_strings=stop,
        on_token=lambda t: tokens.setdefault((t.prompt_index, t.sample_index), []).append(t),
        on_result=finished.append,
    )  # fmt: skip
    assert sorted(finished, key=lambda g: (g.prompt_index, g.sample_index)) == got
    for g in got:
        seen = tokens[(g.prompt_index, g.sample_index)]
        assert tuple(t.token_id for t in seen) == g.token_ids
        assert tuple(t.novelty for t in seen) == g.novelty
        assert "".join(t.text for t in seen) == g.text


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("seed", range(20))
def test_text_stream_with_characters_of_several_tokens(seed: int) -> None:
    rng, tokenizer = random.Random(seed), byte_tokenizer()
    text = "".join(rng.choice("ab é€😀") for _ in range(30))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    stop = text[20:22]
    for stops in ((), (stop,), (stop, "never")):
        stream, shown, found = TextStream(tokenizer, stops), "", None
        for end in range(1, len(ids) + 1):
            found = stream.add(ids[:end])
            if found is not None:
                break
            shown += stream.piece(final=False)
            assert text.startswith(shown)
        if found is None:
            stream.finish(ids)
        shown += stream.piece(final=True)
        want = text.split(stop)[0] if stops else text
        assert stream.text == shown == want


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    hf.utils.logging.enable_progress_bar()  # transformers' switch, which loading a model quietly may have turned off
    generate(build("llama"), PROMPTS, max_new_tokens=2, progress=True)
    assert "4/4" in capsys.readouterr().err
    generate(build("llama"), PROMPTS, max_new_tokens=2)
    assert capsys.readouterr().err == ""


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n must be an integer >= 1, got 0"),
    ({"n": True}, "n must be"),
    ({"n": 5, "max_batch_rows": 4}, "max_batch_rows must be an integer >= n=5, got 4"),
    ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
    ({"cache": "paged"}, "cache must be"),
    ({"prompts": ["w5"]}, "tokenizer must be given for prompts of text"),
    ({"stop_strings": "x"}, "tokenizer must be given for stop_strings"),
    ({"stop_strings": [""], "tokenizer": words}, "stop_strings must be texts"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be"),
    ({"stop_token_ids": 2}, "stop_token_ids must be integers >= 0, got 2"),
    ({"stop_token_ids": "12"}, "stop_token_ids must be"),
    ({"prompts": [[]]}, r"prompts\[0\] must have at least one token"),
    ({"prompts": [""], "tokenizer": words}, r"prompts\[0\] must have at least one token"),
    ({"prompts": [[5], [3] * 64]}, r"prompts\[1\] must leave room in the model's context of 64 tokens, got 64"),
    ({"prompts": [[5, VOCAB]]}, r"prompts\[0\] must hold token ids in 0..119, got 5..120"),
    ({"prompts": [5, 6]}, r"prompts\[0\] must be a text or a list of token ids, got 5"),
    ({"prompts": 5}, "prompts must be"),
    ({"prompts": torch.ones(2, 3)}, "prompts must be an integer tensor"),
    ({"prompts": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)}, "attention_mask of the same shape"),
    ({"attention_mask": torch.ones(2, 2)}, "attention_mask must go with a tensor"),
    ({"params": [SamplingParams()]}, r"params must be one SamplingParams or one per prompt \(4\)"),
    ({"filter_order": "other"}, "filter_order must be"),
    ({"max_candidates": 0}, "max_candidates must be"),
    ({"shallow_layer": 3}, "shallow_layer must be a block index below 3, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    arguments = {"prompts": PROMPTS, **arguments}
    if "tokenizer" in arguments:
        arguments["tokenizer"] = arguments["tokenizer"]()
    with pytest.raises(ArgumentError, match=message) as error:
        generate(build("llama"), **arguments)
    assert "\n" not in str(error.value)


def test_explorer_brings_its_own_limits() -> None:
    parts = find_parts(build("llama"))
    explorer = Explorer(parts.head, parts.hidden_size, max_rows=4)
    with pytest.raises(ArgumentError, match="config and neutral must be left out"):
        Decoder(build("llama"), explorer=explorer, config=DistillerConfig())
    for options in ({"n": 5}, {"n": 1, "max_batch_rows": 8}):
        with pytest.raises(EsampError, match="max_batch_rows must be <= the explorer's max_rows=4"):
            Decoder(build("llama"), explorer=explorer).generate(PROMPTS, **options)
