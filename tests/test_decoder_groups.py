"""Who shares a Distiller: prompts by the names of their groups, over waves, joins and calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esamp_core.bindings.hf import explore
from esamp_core.decoder import Decoder, Generation, generate
from esamp_core.models.parts import find_parts
from esamp_core.sample import ArgumentError, DistillerConfig, Explorer, SamplingParams
from tests.test_decoder_models import PROMPTS, build, one_thread  # noqa: F401
from tests.test_decoder_text import draws

P, N, STEPS = len(PROMPTS), 3, 8
PARAMS = [SamplingParams(seed=70 + i, beta=0.5, distinct=False) for i in range(P)]
CONFIG = DistillerConfig(gate=False)


def run(
    groups: Any = None, explorer: Explorer | None = None, which: Any = range(P), **options: Any
) -> list[Generation]:
    config = CONFIG if explorer is None else None
    given = {"max_batch_rows": N} | options  # one prompt after the other
    return generate(
        build("llama"), [PROMPTS[i] for i in which], n=N, params=[PARAMS[i] for i in which], config=config,
        groups=groups, explorer=explorer, max_new_tokens=STEPS, stop_token_ids=(), **given,
    )  # fmt: skip


def own(max_groups: int = 4) -> Explorer:
    parts = find_parts(build("llama"))
    return Explorer(parts.head, parts.hidden_size, parts.complete(CONFIG), max_groups=max_groups, max_rows=N)


def test_names_of_their_own_are_what_happens_without() -> None:
    assert draws(run([*"abcd"][:P])) == draws(run())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompts_of_one_name_share_a_distiller_that_goes_on(cache: str) -> None:
    """In one call as in one call a prompt with an Explorer that stays; and not as prompts with their own."""
    together = run(["all"] * P, cache=cache)
    explorer = own()
    apart = [g for i in range(P) for g in run(["all"], explorer, [i])]
    assert draws(together) == draws(apart) != draws(run())
    stats = explorer.stats()["all"]
    assert stats.rows == 0 and stats.updates == P * STEPS
    # The first prompt meets a fresh Distiller in any case.
    assert draws(together)[:N] == draws(run())[:N]


def test_prompts_in_one_batch_teach_the_same_distiller() -> None:
    explorer = own()
    decoder = Decoder(build("llama"), config=CONFIG)
    decoder.generate(PROMPTS, n=N, params=PARAMS, groups=["all"] * P, max_new_tokens=STEPS, stop_token_ids=())
    assert decoder.explorer is not None and explorer is not decoder.explorer
    assert {name: (s.rows, s.updates) for name, s in decoder.explorer.stats().items()} == {"all": (0, STEPS)}


def test_without_a_name_a_prompt_is_sampled_plainly() -> None:
    plain = [SamplingParams(seed=p.seed, beta=0.0, distinct=False) for p in PARAMS]
    want = generate(build("llama"), PROMPTS, n=N, params=plain, max_new_tokens=STEPS, stop_token_ids=())
    found = run([None] + ["g"] * (P - 1))
    assert draws(found)[:N] == draws(want)[:N] and draws(found)[N:] != draws(want)[N:]
    assert all(x == 0 for g in found[:N] for x in g.novelty) and any(x != 0 for g in found[N:] for x in g.novelty)


def test_names_that_come_and_go_keep_their_distillers() -> None:
    """a, b, a, b one after the other: nobody loses a slot on the way."""
    decoder = Decoder(build("llama"), config=CONFIG)
    names = ["a", "b"] * (P // 2)
    decoder.generate(
        PROMPTS[: len(names)], n=N, params=PARAMS[: len(names)], groups=names, max_new_tokens=STEPS, stop_token_ids=(),
        max_batch_rows=N,
    )  # fmt: skip
    assert decoder.explorer is not None
    assert {k: s.updates for k, s in decoder.explorer.stats().items()} == {n: names.count(n) * STEPS for n in "ab"}


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        (["a"] * (P + 1), f"groups must be one per prompt \\({P}\\), got {P + 1}"),
        ([["a"]] * P, r"groups\[0\] must be None or hashable"),
        ("abcd", "groups must be a list"),
    ],
)
def test_groups_are_checked(groups: Any, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        run(groups)


@pytest.mark.parametrize("apply", ["candidates", "latent"])
def test_named_groups_of_generate_go_on_with_an_explorer_that_stays(apply: Any) -> None:
    model, explorer = build("llama"), own()
    ids = torch.tensor([PROMPTS[0]])
    updates = []
    for _ in range(2):
        with explore(model, apply=apply, explorer=explorer, groups=["all"] * N) as exploration:
            model.generate(
                ids, do_sample=True, num_return_sequences=N, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=0,
                logits_processor=exploration.logits_processor,
            )  # fmt: skip
        updates.append(explorer.stats()["all"].updates)
    assert updates[0] >= STEPS - 1 and updates[1] == 2 * updates[0]
    with explore(model, apply=apply, explorer=explorer) as exploration:  # rows of prompts are not kept
        model.generate(
            ids, do_sample=True, num_return_sequences=N, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=0,
            logits_processor=exploration.logits_processor,
        )  # fmt: skip
    assert list(explorer.stats()) == ["all"]
