"""A caller's torch.set_default_device and set_default_dtype change nothing.

"meta" stands in for a device: its tensors hold no numbers, so one that is made where the caller wants his, and not
where its neighbours are, fails at once.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from explorer_helpers import HIDDEN, PARAMS, VOCAB, make, step
from floor_plan import File, files

from esamp_core import countdown
from esamp_core.bindings.hf import explore as explore_generate
from esamp_core.decoder import generate
from esamp_core.sample import DistillerConfig, Draw, Explorer, Head, RowParams, SamplingParams, explore, row_seeds
from tests.test_decoder_text import draws

LIBRARY = [file for file in files() if file.room in ("esamp_core", "bindings", "kernels")]
# What a default is given to where none is named (torch.utils._device), as far as it is used.
OF_INTEGERS = {"arange", "randint", "randperm"}
OF_ANY = {"as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}
CONFIGS = {
    "default": DistillerConfig(rank=4),
    "bfloat16, momentum": DistillerConfig(rank=4, weight_dtype=torch.bfloat16, momentum=0.5, gate=False),
    "choice": DistillerConfig(rank=4, target="choice"),
    "paper": DistillerConfig(recipe="paper", rank=4, gate=False),
    "release": DistillerConfig(recipe="release", rank=4, gate=False),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def another(default: str) -> AbstractContextManager[Any]:
    return torch.device("meta") if default == "meta" else default_dtype(getattr(torch, default))


defaults = pytest.mark.parametrize("default", ["meta", "bfloat16", "float64"])


def test_every_tensor_that_is_made_says_where_and_of_what() -> None:
    def silent(file: File) -> Iterator[str]:
        for node in ast.walk(ast.parse(file.source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            needed = {"device"} | ({"dtype"} if node.func.attr in OF_ANY else set())
            if node.func.attr in OF_ANY | OF_INTEGERS and needed - {keyword.arg for keyword in node.keywords}:
                yield f"{file.module}:{node.lineno} torch.{node.func.attr}"

    assert [place for file in LIBRARY for place in silent(file)] == []


def drawn(config: DistillerConfig, params: SamplingParams) -> list[Draw]:
    torch.manual_seed(0)
    explorer = make(config)
    rows, found = explorer.open(["a", "b", "a", None], params), []
    for number in range(6):
        found.append(step(explorer, rows, number))
    rows = rows.keep([0, 2, 3]) + explorer.open(["c"], params)
    found.append(step(explorer, rows, 9))
    other = make(config)
    other.load_state_dict(explorer.state_dict())
    assert other.stats().keys() == explorer.stats().keys() == {"a", "c"}
    explorer.close(rows)
    return found


def same(one: Draw, other: Draw) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@defaults
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stratified", [False, True])
def test_an_explorer(default: str, name: str, stratified: bool) -> None:
    params = SamplingParams(temperature=0.9, min_p=0.01, beta=0.5, seed=5, stratified=stratified)
    want = drawn(CONFIGS[name], params)
    with another(default):
        found = drawn(CONFIGS[name], params)
    assert all(same(a, b) for a, b in zip(want, found, strict=True))


@defaults
@pytest.mark.parametrize(
    "options", [{}, {"apply": "latent"}, {"stratified": True}, {"start": True}, {"seed": None}], ids=str
)
def test_the_decoder(embedded: Any, default: str, options: dict[str, Any]) -> None:
    model, tokenizer = embedded
    options = dict(options)
    params = SamplingParams(min_p=0.05, beta=0.3, seed=options.pop("seed", 1), stratified="stratified" in options)
    config = DistillerConfig(start=str(countdown.DISTILLER)) if options.pop("start", False) else None
    options.pop("stratified", None)

    def run() -> list[Any]:
        torch.manual_seed(3)  # from which a seed is drawn where none is given
        prompts = ["3 7 3 5 -> 41 :", "2 9 4 -> 14 :"]
        made = generate(model, prompts, tokenizer, n=3, params=params, config=config, max_new_tokens=12, **options)
        return list(draws(made))

    want = run()
    with another(default):
        assert run() == want


@defaults
@pytest.mark.parametrize("apply", ["candidates", "latent"])
def test_inside_generate(embedded: Any, default: str, apply: Any) -> None:
    """transformers' own loop makes tensors of its own where the caller wants them: our part alone is run there."""
    model, tokenizer = embedded
    inputs = tokenizer(["3 7 3 5 -> 41 :"], return_tensors="pt")

    def run(default: str | None) -> torch.Tensor:
        torch.manual_seed(3)
        with explore_generate(model, apply=apply, beta=0.5) as exploration:
            for name in ("_draw", "_predict", "_mix"):
                if inner := getattr(exploration, name, None):
                    setattr(exploration, name, under(default, inner))
            found: torch.Tensor = model.generate(
                **inputs, do_sample=True, num_return_sequences=3, max_new_tokens=10,
                logits_processor=exploration.logits_processor,
            )  # fmt: skip
            return found

    assert torch.equal(run(default), run(None))


def under(default: str | None, call: Any) -> Any:
    def inside(*args: Any, **kwargs: Any) -> Any:
        if default is None:
            return call(*args, **kwargs)
        with another(default):
            return call(*args, **kwargs)

    return inside


@defaults
def test_the_functional_ops(default: str) -> None:
    logits, deep = (torch.randn(4, n, generator=torch.Generator().manual_seed(n)) for n in (VOCAB, HIDDEN))
    head = Head(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)))
    index = torch.arange(4)
    column = torch.full((4,), 0.9)

    def run() -> list[Draw]:
        of_numbers = RowParams(column, 7, 0.95, 0.01, 0.3)  # type: ignore[arg-type]  # numbers are taken too
        return [
            explore(logits, PARAMS, row_seeds(index, index), 3, direction=deep, head=head, neutral=True),
            explore(logits, SamplingParams(top_k=5, top_p=0.9), 1, 0, filter_order="vllm"),
            explore(logits, [SamplingParams(temperature=t) for t in (1, 0.7, 0, 1.1)], 1, 0),
            explore(logits, of_numbers, 1, 0, direction=deep, head=head),
        ]

    want = run()
    with another(default):
        found = run()
        assert Explorer(None, HIDDEN, device="cpu").open(["a"]).seeds.device.type == "cpu"
    assert all(same(a, b) for a, b in zip(want, found, strict=True))
