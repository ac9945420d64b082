"""lm-evaluation-harness on a tiny model: what is not sampled equals ``hf``; what is has the model's distribution."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import lm_eval
import torch
from harness import LETTERS, SAMPLED, SPECIAL, asked, exploring, letters, make_checkpoint, request, start_file
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from esamp_core.base.config import DistillerConfig, SamplingParams
from esamp_core.base.seeds import prompt_seed
from esamp_core.bindings.lm_eval import ExploringLM
from esamp_core.bindings.lm_eval_requests import find_siblings
from esamp_core.decoder import Decoder
from tests.oracles import chi_square_p_value

QUESTIONS = ("ab=", "c d=", "efg;h=", "a=", "jij ab=", "hh=", "b;c;d=", "gaf=")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


# Greedy, and log-likelihoods: as hf.


@pytest.fixture(scope="module")
def tasks(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the harness over local files: greedy, multiple choice, and sampled with repeats."""
    folder = tmp_path_factory.mktemp("tasks")
    hf = HFLM(checkpoint, device="cpu")
    right = asked(hf, [request(question, until=["\n"], max_gen_toks=8) for question in QUESTIONS])
    docs = [
        # Every other answer is right, so that scores are neither 0 nor 1.
        {"q": q, "a": answer if i % 2 else "nothing", "choices": ["a;", "bc", "j"], "gold": i % 3}
        for i, (q, answer) in enumerate(zip(QUESTIONS, right, strict=True))
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    exact = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
    files = {
        "greedy": f"""
output_type: generate_until
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
{exact}
""",
        "choice": """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
        "sampled": f"""
output_type: generate_until
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["<end>"], max_gen_toks: 1, do_sample: true, temperature: 0.8, top_k: 0}}
repeats: 64
{exact}
""",
    }
    for name, text in files.items():
        (folder / f"tiny_{name}.yaml").write_text(f"task: tiny_{name}\n{common}{text}", encoding="utf-8")
    return folder


def evaluated(
    model: str, names: Sequence[str], tasks: Path, checkpoint: str, model_args: str = "", **options: Any
) -> Any:
    with patch("lm_eval.evaluator.add_env_info"):  # takes a second to ask pip and the machine
        return lm_eval.simple_evaluate(
            model=model,
            model_args=f"pretrained={checkpoint},{model_args}",
            tasks=list(names),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
            **options,
        )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_and_texts_are_those_of_hf(batch_size: int, tasks: Path, checkpoint: str) -> None:
    names = ["tiny_greedy", "tiny_choice"]
    want = evaluated("hf", names, tasks, checkpoint, batch_size=batch_size)
    got = evaluated("esamp", names, tasks, checkpoint, "beta=0.5", batch_size=batch_size)
    assert got["results"] == want["results"]
    assert 0 < want["results"]["tiny_greedy"]["exact_match,none"] < 1
    assert 0 < want["results"]["tiny_choice"]["acc,none"] < 1
    for name in names:
        assert [one["resps"] for one in got["samples"][name]] == [one["resps"] for one in want["samples"][name]]
    assert got["config"]["model"] == "esamp"


def stops_of(hf: HFLM) -> list[list[str]]:
    """Stop strings that greedy texts reach: one letter, several, one that is a special token, none, two at once."""
    long = [request(question, until=[], max_gen_toks=20) for question in QUESTIONS[:4]]
    text = max(asked(hf, long), key=len)
    return [[text[2]], [text[3:7]], ["<end>"], ["<bos>"], [], [text[4:6], text[1:3]], ["=" + text[:1], "\n"]]


def test_greedy_texts_are_those_of_hf_whatever_ends_them(checkpoint: str) -> None:
    hf, lm = HFLM(checkpoint, device="cpu"), exploring(checkpoint, beta=0.5)
    requests = [
        request(question, doc, until=until, max_gen_toks=20)
        for until in stops_of(hf)
        for doc, question in enumerate(QUESTIONS[:4])
    ]
    want = asked(hf, requests)
    assert asked(lm, requests) == want
    assert len({len(text) for text in want}) > 5


LONG = [request(3 * question, until=["; "], max_gen_toks=16) for question in (*QUESTIONS[3:], "<bos>")]


@pytest.fixture(scope="module")
def plain(checkpoint: str) -> list[str]:
    """What hf makes of LONG when it is told nothing."""
    return asked(HFLM(checkpoint, device="cpu"), LONG)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 24},  # prompts lose their beginning
        {"add_bos_token": True},
        {"think_end_token": LETTERS[4]},
        {"think_end_token": str(len(SPECIAL) + 3)},  # an id
        {"mixed_precision_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"truncation": True},
        {"batch_size": "auto", "max_batch_size": 2},
    ],
    ids=str,
)
def test_what_hf_is_told_of_prompts_and_texts(arguments: dict[str, Any], plain: list[str], checkpoint: str) -> None:
    want = asked(HFLM(checkpoint, device="cpu", **arguments), LONG)
    assert asked(exploring(checkpoint, **arguments), LONG) == want
    if not arguments.keys() & {"truncation", "batch_size"}:  # the tokenizer has no limit
        assert want != plain


def test_greedy_prompts_are_drawn_once_and_plainly(checkpoint: str) -> None:
    lm = exploring(checkpoint, beta=3.0, stratified=True)
    requests = [request(q, doc, 5, max_gen_toks=4) for doc, q in enumerate(("ab=", "c=")) for _ in range(5)]
    with patch.object(Decoder, "generate", autospec=True, side_effect=Decoder.generate) as spy:
        texts = asked(lm, requests)
    assert texts == asked(HFLM(checkpoint, device="cpu"), requests)
    (call,) = spy.call_args_list
    assert call.kwargs["n"] == 1 and len(call.args[1]) == 2
    assert {(p.beta, p.temperature) for p in call.kwargs["params"]} == {(0.0, 0.0)}


def test_answers_are_cached(checkpoint: str, tasks: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = evaluated("esamp", ["tiny_greedy"], tasks, checkpoint, use_cache=cache)
    with patch.object(ExploringLM, "generate_until", side_effect=AssertionError):
        again = evaluated("esamp", ["tiny_greedy"], tasks, checkpoint, use_cache=cache)
    assert again["results"] == first["results"]


# Repeats: siblings of one prompt.


def first_probabilities(checkpoint: str, context: str, temperature: float) -> np.ndarray:
    """float64 [V]: the model's, for the token after a context."""
    model, ids = LlamaForCausalLM.from_pretrained(checkpoint).eval(), letters()(context, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double()
    return (logits / temperature).softmax(-1).numpy()


def divided(texts: Sequence[str], probability: np.ndarray) -> bool:
    """Whether each letter came floor(n p) or ceil(n p) times."""
    count, n = Counter(texts), len(texts)
    return all(
        math.floor(n * (p - 1e-5)) <= count[letter] <= math.ceil(n * (p + 1e-5))
        for letter, p in zip(LETTERS, probability[len(SPECIAL) :], strict=True)
    )


def test_repeats_of_a_task_divide_the_distribution(checkpoint: str, tasks: Path) -> None:
    samples = evaluated("esamp", ["tiny_sampled"], tasks, checkpoint)["samples"]["tiny_sampled"]
    independent = evaluated("esamp", ["tiny_sampled"], tasks, checkpoint, "stratified=False")["samples"]["tiny_sampled"]
    assert len(samples) == len(QUESTIONS)
    for sample, other in zip(samples, independent, strict=True):
        probability = first_probabilities(checkpoint, sample["doc"]["q"], 0.8)
        (texts,), (others,) = sample["resps"], other["resps"]
        assert len(texts) == 64 and len(set(texts)) > 4
        assert divided(texts, probability) and not divided(others, probability)


def test_documents_and_padding_are_sets_of_their_own(checkpoint: str) -> None:
    """Two documents of one text, and a document that fills up a rank: each has 32 siblings, evenly divided."""
    lm = exploring(checkpoint, sampling_seed=1)
    one, other = (request("ab=", doc, 32, **{**SAMPLED, "max_gen_toks": 1}) for doc in (0, 1))
    texts = asked(lm, [one] * 32 + [other] * 64)
    probability = first_probabilities(checkpoint, "ab=", 1.0)
    parts = [texts[:32], texts[32:64], texts[64:]]
    assert all(divided(part, probability) for part in parts)
    assert len({tuple(part) for part in parts}) == 3


def test_who_are_siblings() -> None:
    """Equal requests of one document, as many as it has repeats, wherever they stand; without a number all of them."""
    one, other, lonely = request("ab=", 0, 2), request("ab=", 1, 2), request("ab=", 2)
    asked_twice = request("ab=", 0, 2, temperature=0.5)
    lonely.repeats = None
    requests = [one, other, lonely, one, asked_twice, one, other, lonely, asked_twice, lonely]
    assert [s.places for s in find_siblings(requests)] == [[0, 3], [5], [1, 6], [2, 7, 9], [4, 8]]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stratified": False},
        {"distinct": True},
        {"beta": 2.0},
        {"beta": 2.0, "apply": "latent", "max_batch_rows": 7},
        {"beta": 2.0, "max_candidates": 3, "stratified": False},
        {"max_batch_rows": 5},
    ],
    ids=str,
)
def test_texts_are_the_decoders_samples_in_the_order_of_requests(
    arguments: dict[str, Any], checkpoint: str, tmp_path: Path
) -> None:
    """Prompts of several lengths, repeats and settings, shuffled, with a greedy one among them."""
    if "beta" in arguments:
        arguments = {**arguments, "start": start_file(checkpoint, tmp_path / "start.safetensors")}
    lm = exploring(checkpoint, sampling_seed=5, **arguments)
    kinds = [
        request("ab=", 0, 5, **SAMPLED),
        request("c d;e=", 1, 5, **SAMPLED),
        request("a=", 2, 3, **SAMPLED),
        request("gaf=", 3, 5),
        request("b;c;d=", 4, 2, **{**SAMPLED, "temperature": 0.5}),
    ]
    rest = [kind for kind in kinds for _ in range((kind.repeats or 0) - 1)]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(1)).tolist()
    requests = kinds + [rest[i] for i in order]
    texts = asked(lm, requests)

    options = {"apply": lm._decoder.apply, "max_candidates": arguments.get("max_candidates", 256)}
    decoder = Decoder(lm.model, letters(), config=DistillerConfig(start=arguments.get("start")), **options)
    distinct, beta = arguments.get("distinct", False), arguments.get("beta", 0.0)
    base = SamplingParams(beta=beta, stratified=arguments.get("stratified", not distinct), distinct=distinct)
    numbers = iter(range(1, 5))  # of prompts that are sampled
    for kind in kinds:
        context, gen_kwargs = kind.args
        params, n = SamplingParams(temperature=0.0, beta=0.0, seed=0), kind.repeats or 0
        if "temperature" in gen_kwargs:
            seed = prompt_seed(prompt_seed(5, 1), next(numbers))
            params = replace(base, temperature=gen_kwargs["temperature"], seed=seed)
        drawn = decoder.generate([context], n=n, params=[params], max_new_tokens=6, stop_token_ids=(1,))
        assert [text for text, r in zip(texts, requests, strict=True) if r is kind] == [g.text for g in drawn]


def test_exploration_changes_what_is_sampled(checkpoint: str, tmp_path: Path) -> None:
    start = start_file(checkpoint, tmp_path / "start.safetensors")
    requests = [request("ab=", 0, 16, **SAMPLED)] * 16
    plain, explored = (asked(exploring(checkpoint, beta=b, start=start, sampling_seed=1), requests) for b in (0, 2))
    assert plain != explored


# Seeds.


def test_no_prompt_has_the_samples_of_another(checkpoint: str) -> None:
    requests = [request("ab=", 0, 8, **SAMPLED)] * 8 + [request("ab=", 1, 8, **SAMPLED)] * 8
    lm, again = (exploring(checkpoint, sampling_seed=3) for _ in range(2))
    texts = asked(lm, requests)
    assert asked(again, requests) == texts
    other_rank = exploring(checkpoint, sampling_seed=3)
    other_rank._rank = 1
    calls = [texts[:8], texts[8:], asked(lm, requests[:8]), asked(other_rank, requests[:8])]
    calls.append(asked(exploring(checkpoint, sampling_seed=4), requests[:8]))
    assert len({tuple(call) for call in calls}) == 5
    assert all(len(set(call)) > 4 for call in calls)


def test_without_a_seed_the_harness_s_own_decides(checkpoint: str, tasks: Path) -> None:
    first, again, other = (
        evaluated("esamp", ["tiny_sampled"], tasks, checkpoint, torch_random_seed=seed)["samples"]["tiny_sampled"]
        for seed in (7, 7, 8)
    )
    resps = [[sample["resps"] for sample in run] for run in (first, again, other)]
    assert resps[0] == resps[1] != resps[2]


# The distribution.


def warped(checkpoint: str, context: str, gen_kwargs: dict[str, Any]) -> np.ndarray:
    """float64 [V]: what transformers' own warpers make of the model's logits."""
    logits = torch.tensor(np.log(first_probabilities(checkpoint, context, 1.0)))[None]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(gen_kwargs["temperature"])])
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if gen_kwargs.get(name):
            warpers.append(warper(gen_kwargs[name]))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits).softmax(-1)[0].numpy()


def visible(texts: Sequence[str], probability: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Letters as tokens, and their probabilities; special tokens, which have no text, are one more."""
    tokens = torch.tensor([LETTERS.index(text) if text else len(LETTERS) for text in texts])
    return tokens, np.append(probability[len(SPECIAL) :], probability[: len(SPECIAL)].sum())


@pytest.mark.parametrize(
    "filters",
    [{"temperature": 1.0, "top_k": 0}, {"temperature": 1.5, "min_p": 0.1, "top_k": 6, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["hf", "independent", "stratified", "explored, switched off"])
def test_samples_are_distributed_as_the_model_says(kind: str, filters: dict[str, Any], checkpoint: str) -> None:
    """Of stratified siblings one in each set: within a set they depend on each other."""
    gen_kwargs = {"do_sample": True, "max_gen_toks": 1, **filters}
    torch.manual_seed(0)
    if kind == "hf":
        texts = asked(HFLM(checkpoint, device="cpu", batch_size=3000), [request("ab=", **gen_kwargs)] * 3000)
    elif kind == "stratified":
        lm = exploring(checkpoint, batch_size=3000)
        texts = asked(lm, [request("ab=", doc, 3, **gen_kwargs) for doc in range(1000) for _ in range(3)])[1::3]
    else:  # a fresh Distiller that has not learned explores nothing
        lm = exploring(checkpoint, stratified=False, beta=0.0 if kind == "independent" else 1.0)
        texts = asked(lm, [request("ab=", 0, 3000, **gen_kwargs)] * 3000)
    assert chi_square_p_value(*visible(texts, warped(checkpoint, "ab=", gen_kwargs))) > 1e-4
    wrong = warped(checkpoint, "ab=", {**gen_kwargs, "temperature": 2 * gen_kwargs["temperature"]})
    assert chi_square_p_value(*visible(texts, wrong)) < 1e-4


# The command.


# What ``python -m`` does, but for reading the harness's own fourteen thousand tasks, which takes half a minute.
COMMAND = """
import functools, runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("esamp_core.bindings.lm_eval", run_name="__main__", alter_sys=True)
"""


def test_command(checkpoint: str, tasks: Path) -> None:
    arguments = ["run", "--model", "esamp", "--model_args", f"pretrained={checkpoint},beta=0.1,stratified=False"]
    arguments += ["--tasks", "tiny_greedy", "--include_path", str(tasks), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    score = evaluated("hf", ["tiny_greedy"], tasks, checkpoint)["results"]["tiny_greedy"]["exact_match,none"]
    (row,) = [line for line in run.stdout.splitlines() if line.startswith("|tiny_greedy")]
    assert "exact_match" in row and f"|{score:.4g}|" in row
    assert "'beta': 0.1, 'stratified': False" in run.stdout
