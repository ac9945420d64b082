"""Ctrl-C at many lines of a whole call: a given Explorer has its rows and slots back, and the model its hooks off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from interrupts import InterruptAt, interrupted
from test_threads_and_forks import PROMPTS, SAMPLING, explorer_of, hooks, in_thread, numbers
from torch import nn

from esamp_core import Decoder, countdown
from esamp_core.bindings.hf import explore
from esamp_core.models.parts import find_parts
from esamp_core.models.taps import MixingTaps, PassiveTaps, Taps


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return countdown.load()


def lines_of(run: Callable[[], object], only: str) -> int:
    with InterruptAt(10**9, only) as counting:
        run()
    return counting.lines


@pytest.mark.parametrize("apply", ["candidates", "latent"])
@pytest.mark.parametrize("room", ["/decoder/", "/explorer/", "/models/"])
def test_a_decoder(apply: Any, room: str, loaded: tuple[Any, Any]) -> None:
    """40 places in each room, evenly over a call in which prompts join and rows leave."""
    model, tokenizer = loaded
    options: dict[str, Any] = dict(n=2, params=SAMPLING, max_new_tokens=9, max_batch_rows=4)
    decoder = Decoder(model, tokenizer, apply=apply)
    want, before = numbers(decoder.generate(PROMPTS[:3], **options)), hooks(model)
    explorer = explorer_of(decoder)
    given = Decoder(model, tokenizer, apply=apply, explorer=explorer)

    def run() -> object:
        return given.generate(PROMPTS[:3], **options)

    every = max(1, lines_of(run, room) // 40)
    for where in interrupted(lambda _: run, room, every):
        assert explorer.open_rows == 0 and not explorer.stats(), where
        assert hooks(model) == before, where
    assert numbers(given.generate(PROMPTS[:3], **options)) == want


@pytest.mark.parametrize("kind", ["Taps", "PassiveTaps", "MixingTaps"])
def test_hooks_are_set_and_removed_whole(kind: str, loaded: tuple[Any, Any]) -> None:
    model = loaded[0]
    parts, before = find_parts(model, 0), hooks(model)

    def make() -> Taps:
        if kind == "Taps":
            return Taps(model, parts)
        return PassiveTaps(parts, print) if kind == "PassiveTaps" else MixingTaps(parts, print, lambda deep: deep)

    def run(taps: Taps) -> None:
        try:
            with taps:
                assert hooks(model) > before
        finally:  # as the decoder does
            taps.remove()

    places = 0
    for where in interrupted(lambda _: lambda: run(make()), "/models/taps"):
        places += 1
        assert hooks(model) == before, where
    assert places >= 10
    assert in_thread(lambda: run(make())) is None  # nobody is thought to be at work any more


@pytest.mark.parametrize("apply", ["candidates", "latent"])
def test_generate_inside_a_context(apply: Any, loaded: tuple[Any, Any]) -> None:
    """transformers' own loop: when the context has been left, everything has been given back."""
    model, tokenizer = loaded
    decoder, before = Decoder(model, tokenizer), hooks(model)
    explorer = explorer_of(decoder)
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")

    entered: list[Any] = []

    def run() -> None:
        entered.clear()
        with explore(model, seed=None if apply == "latent" else 1, apply=apply, explorer=explorer) as exploration:
            entered.append(exploration)
            model.generate(
                **inputs, do_sample=True, num_return_sequences=2, max_new_tokens=3,
                logits_processor=exploration.logits_processor,
            )  # fmt: skip

    for room in ("/explorer/", "/bindings/hf", "/models/taps"):
        every = max(1, lines_of(run, room) // 25)
        for where in interrupted(lambda _: run, room, every):
            for exploration in entered:  # an interrupt may have come while the context was being left
                exploration.leave()
            assert hooks(model) == before, where
            assert explorer.open_rows == 0 and not explorer.stats(), where
    run()
    assert isinstance(model, nn.Module) and explorer.open_rows == 0
