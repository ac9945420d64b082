"""The Countdown model: training that can be repeated, and the embedded weights and their card."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esamp_core import countdown
from esamp_core.countdown import (
    Problem,
    attempt_text,
    check,
    draw_problem,
    held_out_problems,
    is_held_out,
    solutions,
)
from esamp_core.countdown.data import retried, sort_attempts, supervised_batch, to_tensors, training_stream
from esamp_core.countdown.evaluate import evaluate, sample_words
from esamp_core.countdown.model import ModelShape, load_folder
from esamp_core.countdown.task import EOS, PROMPT_TOKENS, WORDS
from esamp_core.countdown.train import TrainConfig, train


def drawn(seed: int) -> Problem:
    return draw_problem(random.Random(seed))[0]


TINY = TrainConfig(
    supervised_steps=8,
    supervised_batch=8,
    supervised_rate=2e-2,
    attempt_problems=6,
    attempt_samples=2,
    attempt_steps=6,
    attempt_tokens=400,
    checkpoint_every=3,
    threads=torch.get_num_threads(),
    shape=ModelShape(hidden_size=32, intermediate_size=32, layers=1, heads=2, kv_heads=1, head_dim=16),
)


class Interrupted(Exception):
    pass


def test_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    losses: dict[tuple[str, int], float] = {}
    whole = train(TINY, tmp_path / "whole", lambda phase, done, loss: losses.update({(phase, done): loss}))
    again: dict[tuple[str, int], float] = {}
    for stop in [("supervised", 5), ("supervised", 8), ("sampling", 6), ("attempts", 1), ("attempts", 4)]:

        def on_step(phase: str, done: int, loss: float, stop: tuple[str, int] = stop) -> None:
            again[phase, done] = loss
            if (phase, done) == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            train(TINY, tmp_path / "parts", on_step)
    parts = train(TINY, tmp_path / "parts")
    assert all(torch.equal(whole.model[name], parts.model[name]) for name in whole.model)
    saved = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert saved[0] == saved[1]
    assert all(losses[key] == loss for key, loss in again.items())
    assert losses["supervised", 8] < losses["supervised", 1] - 0.3  # it does learn
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="seed"):
        train(TrainConfig(seed=5, threads=threads + 1), tmp_path / "parts")
    assert torch.get_num_threads() == threads  # the caller's, whatever happens


def test_another_seed_without_phase_two_is_another_model(tmp_path: Path) -> None:
    changes = {"supervised_steps": 2, "attempt_steps": 0}
    runs = [train(TrainConfig(**{**vars(TINY), **changes, "seed": seed}), tmp_path / str(seed)) for seed in (0, 1)]
    assert [run.phase for run in runs] == ["supervised", "supervised"]
    assert not torch.equal(runs[0].model["lm_head.weight"], runs[1].model["lm_head.weight"])
    model, _ = load_folder(tmp_path / "1")
    assert torch.equal(model.lm_head.weight, runs[1].model["lm_head.weight"].bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": -1}, "seed"), ({"supervised_rate": 0.0}, "supervised_rate"), ({"threads": 1.5}, "threads")],
)
def test_training_settings_are_checked_when_made(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(**changes)


def test_own_attempts_become_honest_training_data() -> None:
    problem = Problem((4, 7, 8, 9), 64)
    words = attempt_text(problem, solutions(problem)[0], "ok").split()[:-1]
    wishful = "9 + 7 = 16 , 4 8 16 ; 16 * 4 = 64 , 8 64 ; 64 - 8 = {}"  # with the target instead of the truth
    illegal = ["3", *words[1:]]
    right, wrong = sort_attempts(problem, [words, wishful.format(64).split(), illegal])
    assert right == [words] and wrong == [wishful.format(56).split()]
    ids, labels = to_tensors([retried(problem, wrong, words)])
    learned = [WORDS[token] for token in labels[0].tolist() if token >= 0]
    assert learned == ["56", "no", ":", *words, "ok", EOS]
    text = " ".join(WORDS[token] for token in ids[0].tolist())
    assert text.startswith(f"<s> {problem.prompt} 9 + 7")
    assert check(problem, text.removeprefix(f"<s> {problem.prompt}")).correct


CARD = countdown.PATH / "README.md"


def card_value(name: str) -> str:
    """The second cell of the card's table row that starts with this name."""
    match = re.search(rf"^\| {re.escape(name)} \| `?(.*?)`? \|$", CARD.read_text(encoding="utf-8"), re.MULTILINE)
    assert match, f"the card has no row {name!r}"
    return match[1]


def card_pass_at_1(problems: str) -> tuple[int, int, float, float]:
    """Problems, samples each, pass@1 and its 95 % half-width, as shares."""
    cells = card_value(problems).split(" | ")
    value, half_width = (float(part.strip(" %")) / 100 for part in cells[2].split("±"))
    return int(cells[0]), int(cells[1]), value, half_width


def test_training_never_sees_held_out_problems() -> None:
    config = TrainConfig(seed=int(card_value("seed")))
    held_out = {problem.canonical for pool in ("tune", "report") for problem in held_out_problems(pool, 300)}
    seen = set()
    for step in range(0, config.supervised_steps, 15):
        ids, _ = supervised_batch(config.seed, step, config.supervised_batch)
        prompts = [" ".join(WORDS[token] for token in row[1:PROMPT_TOKENS]) for row in ids.tolist()]
        seen |= {Problem.parse(prompt).canonical for prompt in prompts}
    stream = training_stream(config.seed, "attempts", 0)
    seen |= {next(stream)[0].canonical for _ in range(config.attempt_problems)}
    assert len(seen) > 10_000
    assert not seen & held_out
    assert not any(map(is_held_out, seen))


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, esamp_core.countdown as c; c.check(c.held_out_problems('tune', 1)[0], 'x'); "
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'triton') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_embedded_model_is_small_and_loads_like_any_other(embedded: tuple[Any, Any]) -> None:
    model, _ = embedded
    assert (countdown.PATH / "model.safetensors").stat().st_size <= 3_000_000
    assert model.dtype == torch.float32 and not model.training
    plain = AutoModelForCausalLM.from_pretrained(countdown.PATH)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain.lm_head.weight.float(), model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(countdown.PATH).decode([1, 2]) == "1 2"


def test_sampling_agrees_with_generate(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    problems = held_out_problems("tune", 6)
    ours = sample_words(model, problems, 1, seed=0, temperature=1e-4)  # so cold that it is greedy
    batch = tokenizer([problem.prompt for problem in problems], return_tensors="pt")
    theirs = model.generate(**batch, do_sample=False, temperature=None, top_p=None, top_k=None)[:, PROMPT_TOKENS:]
    assert [" ".join(row[0]) for row in ours] == [text.split(" <pad>")[0] for text in tokenizer.batch_decode(theirs)]


def test_embedded_model_is_as_good_as_its_card_says(embedded: tuple[Any, Any]) -> None:
    measured = evaluate(embedded[0], held_out_problems("report", 48, seed=2), samples=4, seed=1)
    _, _, stated, half_width = card_pass_at_1("all")
    # both sides measured on problems of their own: four standard errors of each
    assert abs(measured.pass_at_1 - stated) < 4 * math.hypot(measured.standard_error, half_width / 1.96)
    assert measured.valid > 0.5


def test_card_states_its_numbers() -> None:
    config = TrainConfig()
    text = CARD.read_text(encoding="utf-8")
    assert card_value("command").endswith("python -m esamp_core.countdown.train --out DIR")  # so: the default settings
    assert card_value("seed") == str(config.seed)
    assert f"{config.supervised_steps} steps of {config.supervised_batch} " in text
    assert f"{config.attempt_steps} steps of {config.attempt_tokens} " in text
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", card_value("started"))
    assert re.search(r"[1-9][\d.]* min wall-clock", card_value("training time"))
    assert all(word in card_value("versions") for word in ("Python 3.", "torch 2.", "transformers 5."))
    assert card_value("CPU")
    problems, samples, value, half_width = card_pass_at_1("all")
    assert problems >= 256 and samples >= 4
    assert 0.15 <= value <= 0.45 and 0 < half_width < 0.05
    hard = card_pass_at_1("hard")
    assert hard[2] <= value
