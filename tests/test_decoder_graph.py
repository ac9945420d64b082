"""The decoder's graph mode: a replayed step does what an eager one does, and where it cannot, it is not used.

A simulated graph stands in for CUDA's (tests/simulated_graph.py); tests/test_decoder_gpu.py has the real one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import StaticLayer

from esamp_core.base.errors import ArgumentError, UnsupportedModelError
from esamp_core.decoder import Decoder, Generation, Token, cuda_graph, kv_cache, loop
from esamp_core.sample import DistillerConfig, SamplingParams
from tests.simulated_graph import SimulatedGraph, like_cuda
from tests.test_decoder_models import MODELS, PROMPTS, SIZES, build, one_thread  # noqa: F401
from tests.test_decoder_text import text_of, words

STOP = tuple(range(3, 15))
EXPLORE = SamplingParams(seed=3, beta=0.5, distinct=False)


class Graphs(list[SimulatedGraph]):
    """Every graph that the decoder made."""

    kind: type[SimulatedGraph] = SimulatedGraph

    def make(self, device: Any) -> SimulatedGraph:
        self.append(self.kind())
        return self[-1]

    @property
    def replays(self) -> list[int]:
        return [graph.replays for graph in self]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    like_cuda(monkeypatch, kernels=True)
    made = Graphs()
    monkeypatch.setattr(cuda_graph, "step_graph", made.make)
    return made


def run(model: Any, graph: Any, config: DistillerConfig | None = None, **options: Any) -> list[Generation]:
    defaults: dict[str, Any] = {"n": 2, "params": EXPLORE, "max_new_tokens": 14, "stop_token_ids": STOP}
    decoder = Decoder(model, words(), config=config)
    return decoder.generate(options.pop("prompts", PROMPTS), cache="static", graph=graph, **(defaults | options))


def check_same(model: Any, config: DistillerConfig | None = None, **options: Any) -> list[Generation]:
    """Tokens, log-probabilities and novelty, bit for bit; no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = run(model, False, config, **options)
        assert run(model, "auto", config, **options) == want
    return want


@pytest.mark.parametrize("name", MODELS)
def test_graph_is_eager(name: str, graphs: Graphs) -> None:
    """Two waves, prompts of uneven lengths, rows that end at different steps."""
    got = check_same(build(name), max_batch_rows=6)
    assert len({len(g.token_ids) for g in got}) >= 3
    # Drawn eagerly: the first token and the rehearsal's; after the last row ended the host launched one step too many.
    longest = [max(len(g.token_ids) for g in got if (g.prompt_index < 3) == first) for first in (True, False)]
    assert all(most - 2 <= count <= most - 1 for most, count in zip(longest, graphs.replays, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_distinct_siblings(name: str, graphs: Graphs) -> None:
    """Caches and rows that change places within a replay."""
    got = check_same(build(name), n=4, params=replace(EXPLORE, distinct=None), max_batch_rows=8)
    assert len({g.token_ids for g in got}) == 4 * len(PROMPTS) and min(graphs.replays) > 5


@pytest.mark.parametrize("distinct", [False, True])
def test_what_is_kept_for_replay(distinct: bool, graphs: Graphs) -> None:
    """Copied out of every replay before the next one overwrites it, and following rows that change places."""
    options: dict[str, Any] = {
        "n": 4, "params": replace(EXPLORE, distinct=distinct), "max_batch_rows": 8, "return_distilled": True,
        "config": DistillerConfig(gate=False),
    }  # fmt: skip
    pairs = list(zip(run(build("llama"), False, **options), run(build("llama"), "auto", **options), strict=True))
    assert min(graphs.replays) > 5
    for want, got in pairs:
        assert want.distilled is not None and got.distilled is not None
        assert len(want.distilled.strength) == len(want.token_ids) and (want.distilled.strength[1:] > 0).all()
        assert all(torch.equal(a, b) for a, b in zip(want.distilled, got.distilled, strict=True))
        assert len(want.distilled.prediction.unique(dim=0)) > len(want.token_ids) // 2


CONFIGS = {
    "lr0": DistillerConfig(lr=0.0, gate=False),
    "no gate": DistillerConfig(gate=False),
    "choice": DistillerConfig(target="choice"),
    "momentum": DistillerConfig(momentum=0.9),
    "bfloat16": DistillerConfig(weight_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_distiller_configs(config: str, graphs: Graphs) -> None:
    check_same(build("llama"), CONFIGS[config])
    assert graphs.replays[0] > 8


def test_learning_goes_on_in_replays(graphs: Graphs) -> None:
    """Every replayed step teaches once, and what the last one staged is learned when the group ends."""
    results = []
    for graph in (False, "auto"):
        decoder, stats = Decoder(build("llama")), {}

        def note(generation: Generation, decoder: Decoder = decoder, stats: dict[Any, Any] = stats) -> None:
            assert decoder.explorer is not None
            stats.update(decoder.explorer.stats())

        options: dict[str, Any] = {"params": EXPLORE, "stop_token_ids": (), "cache": "static", "on_result": note}
        drawn = decoder.generate(PROMPTS[:1], n=2, max_new_tokens=14, graph=graph, **options)
        assert stats[("prompt", 0)].updates == 14
        results.append((drawn, stats))
    assert results[0] == results[1]
    assert graphs.replays == [12]


def test_scale_measured_by_the_first_step(graphs: Graphs) -> None:
    model = hf.OlmoForCausalLM(hf.OlmoConfig(**SIZES)).eval()
    assert Decoder(model).config.deep_scale is None
    got = check_same(model, DistillerConfig(gate=False))
    assert graphs.replays[0] > 8 and any(g.novelty[-1] != 0 for g in got)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [PROMPTS[1], PROMPTS[1][::-1]]], ids=["one", "even"])
def test_without_padding(prompts: Any, graphs: Graphs) -> None:
    check_same(build("llama"), DistillerConfig(gate=False), prompts=prompts)
    assert graphs.replays[0] > 8


def test_waves_with_and_without_exploration(graphs: Graphs) -> None:
    params = [
        SamplingParams(seed=i, beta=beta, temperature=0.5 + i, distinct=False)
        for i, beta in enumerate((0.5, 0.0, 0.0, 0.25))
    ]
    for rows in (2, 4):
        check_same(build("llama"), params=params, max_batch_rows=rows)
    assert len(graphs.replays) == 6 and min(graphs.replays) > 0


def test_stratified_siblings(graphs: Graphs) -> None:
    check_same(build("llama"), params=[EXPLORE, *[SamplingParams(seed=3, beta=0.5, stratified=True)] * 3])


@pytest.mark.parametrize("new", [1, 2, 3])
def test_short_waves(new: int, graphs: Graphs) -> None:
    check_same(build("gpt2"), max_new_tokens=new, stop_token_ids=())
    assert graphs.replays == [max(0, new - 2)]


def test_stop_strings(graphs: Graphs) -> None:
    """The host ends a row in the middle of a wave."""
    free = run(build("llama"), False, stop_token_ids=())
    stop = [text_of(free[0].token_ids[3:5]), text_of(free[5].token_ids[6:8])]
    got = check_same(build("llama"), stop_token_ids=(), stop_strings=stop)
    assert sum(g.finish_reason == "stop" for g in got) >= 2


def test_tokens_stream_in_order(graphs: Graphs) -> None:
    streams: list[list[Token]] = []
    for graph in (False, "auto"):
        streams.append([])
        run(build("llama"), graph, on_token=streams[-1].append)
    assert streams[0] == streams[1] and graphs.replays[0] > 8


def test_reading_stats_between_steps(graphs: Graphs) -> None:
    """It enqueues what was staged: the next step cannot be a replay, which would learn that again."""
    results = []
    for graph in (False, "auto"):
        decoder, seen = Decoder(build("llama")), []

        def note(token: Token, decoder: Decoder = decoder, seen: list[Any] = seen) -> None:
            seen.append(token)
            if len(seen) % 10 == 1:  # every fifth step
                assert decoder.explorer is not None
                seen.append(decoder.explorer.stats())

        options: dict[str, Any] = {"params": EXPLORE, "stop_token_ids": (), "cache": "static", "on_token": note}
        decoder.generate(PROMPTS[:1], n=2, max_new_tokens=24, graph=graph, **options)
        results.append(seen)
    assert results[0] == results[1]
    assert 10 < graphs.replays[0] < 22


def test_explorer_that_is_given_is_left_in_order(graphs: Graphs) -> None:
    from esamp_core.explorer import Explorer
    from esamp_core.models.parts import find_parts

    parts = find_parts(build("llama"))
    results = []
    for graph in (False, "auto"):
        explorer = Explorer(parts.head, parts.hidden_size, max_groups=2, max_rows=4)
        decoder = Decoder(build("llama"), explorer=explorer)
        options: dict[str, Any] = {"n": 2, "params": EXPLORE, "max_new_tokens": 9, "stop_token_ids": STOP}
        for cache in ("static", "dynamic", "static"):
            results.append(
                decoder.generate(PROMPTS, cache=cache, graph="auto" if cache == "dynamic" else graph, **options)
            )
        assert explorer.stats() == {} and "0/4 rows" in repr(explorer)
    assert results[:3] == results[3:]


@pytest.mark.interpreter
def test_triton_ops_are_captured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops that a GPU runs, in Triton's interpreter: nothing that they do escapes the recording."""
    pytest.importorskip("triton")
    monkeypatch.setenv("ESAMP_BACKEND", "triton")
    like_cuda(monkeypatch, kernels=False)
    made = Graphs()
    monkeypatch.setattr(cuda_graph, "step_graph", made.make)
    results = []
    for graph in (False, "auto"):
        decoder = Decoder(build("llama"), config=DistillerConfig(rank=8, gate=False), max_candidates=8)
        params = SamplingParams(seed=3, beta=0.5, top_k=8, distinct=False)
        options: dict[str, Any] = {"params": params, "stop_token_ids": (), "cache": "static"}
        results.append(decoder.generate(PROMPTS[2:3], n=2, max_new_tokens=4, graph=graph, **options))
    assert results[0] == results[1] and all(g.novelty[-1] != 0 for g in results[0])
    assert made.replays == [2]


def check_fallback(model: Any, reason: str, **options: Any) -> None:
    """Says so once for all waves, and gives what it would have given anyway; or raises, if it was asked for."""
    want = run(model, False, max_batch_rows=2, **options)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert run(model, "auto", max_batch_rows=2, **options) == want
    assert sum("without a CUDA graph" in str(w.message) for w in caught) == 1
    with pytest.raises(UnsupportedModelError, match=f"graph=True, but .*{reason}"):
        run(model, True, **options)


class CountedLayer(StaticLayer):  # type: ignore[misc]
    """Counts its columns on the host, as transformers' static sliding layer does."""

    columns = 0

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start, self.columns = self.columns, self.columns + keys.shape[2]
        self.keys[:, :, start : self.columns] = keys
        self.values[:, :, start : self.columns] = values
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.columns


def counted_cache(config: Any, length: int) -> Any:
    cache = kv_cache.static_cache(config, length)
    cache.layers = [CountedLayer(max_cache_len=length) for _ in cache.layers]
    return cache


def test_cache_that_counts_on_the_host(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run(build("llama"), False, max_batch_rows=2)
    monkeypatch.setattr(loop, "static_cache", counted_cache)
    assert run(build("llama"), False, max_batch_rows=2) == want
    check_fallback(build("llama"), "CountedLayer.columns of layer 0 changes on the host")
    assert sum(graphs.replays) == 0


def test_the_simulation_notices_what_a_replay_lacks(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without the check: every replay writes the same column."""
    monkeypatch.setattr(loop, "static_cache", counted_cache)
    monkeypatch.setattr(cuda_graph, "host_state", lambda cache: {})
    want = run(build("llama"), False, stop_token_ids=())
    assert run(build("llama"), "auto", stop_token_ids=()) != want
    assert graphs.replays == [12]


def test_model_that_waits(graphs: Graphs) -> None:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    handle = model.model.layers[1].register_forward_hook(lambda module, inputs, output: float(inputs[0].sum()) and None)
    check_fallback(model, "a step waits: ")
    handle.remove()
    check_same(model)


def test_refused_once_per_decoder(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "static_cache", counted_cache)
    decoder = Decoder(build("llama"))
    options: dict[str, Any] = {"params": EXPLORE, "max_new_tokens": 4, "cache": "static"}
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        want = decoder.generate(PROMPTS, **options)
    made = len(graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoder.generate(PROMPTS, **options) == want
    assert len(graphs) == made
    monkeypatch.undo()
    like_cuda(monkeypatch, kernels=True)
    assert decoder.generate(PROMPTS, graph=True, **options) == want  # asked for again


@pytest.mark.parametrize("where", ["block", "head"])
def test_capture_that_fails(where: str, graphs: Graphs) -> None:
    """After predict, half-way: what was staged before it is still learned, once."""

    class Failing(SimulatedGraph):
        capturing = False

        def capture(self, step: Any) -> None:
            Failing.capturing = True
            try:
                super().capture(step)
            finally:
                Failing.capturing = False

    def fail(module: Any, inputs: Any) -> None:
        if Failing.capturing:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()
    handle = (model.model.layers[1] if where == "block" else model.lm_head).register_forward_pre_hook(fail)
    graphs.kind = Failing
    check_fallback(model, "RuntimeError: operation not permitted when stream is capturing")
    handle.remove()


def test_interrupt_in_a_capture(graphs: Graphs) -> None:
    class Interrupted(SimulatedGraph):
        def capture(self, step: Any) -> None:
            super().capture(step)
            raise KeyboardInterrupt

    graphs.kind = Interrupted
    decoder = Decoder(build("llama"))
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(PROMPTS, n=2, params=EXPLORE, max_new_tokens=9, cache="static")
    assert decoder.explorer is not None and decoder.explorer.stats() == {} and "0/8 rows" in repr(decoder.explorer)


def test_arguments() -> None:
    for options, message in [
        ({"graph": "yes"}, "graph must be True, False or"),
        ({"graph": True}, 'graph=True needs cache="static"'),
        ({"graph": True, "cache": "static"}, "graph=True needs a model on CUDA, got one on cpu"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            Decoder(build("llama")).generate(PROMPTS, **options)  # type: ignore[arg-type]


def test_cpu_has_no_graph_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run(build("llama"), "auto")) == 8
