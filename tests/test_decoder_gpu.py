"""The decoder on a GPU: real graphs replay what an eager step does, and no step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from esamp_core.decoder import Decoder, loop
from esamp_core.sample import DistillerConfig, SamplingParams
from tests.kernel_cases import INTERPRETED, quick_interpreter
from tests.test_decoder_graph import STOP, run
from tests.test_decoder_models import MODELS, PROMPTS

pytestmark = pytest.mark.gpu

SIZE: dict[str, Any] = {"n": 4, "max_new_tokens": 30}
if INTERPRETED:  # a rehearsal: the interpreter takes a second per step
    SIZE = {"n": 1, "max_new_tokens": 6, "prompts": PROMPTS[:2]}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


def on_gpu(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = MODELS[name]().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model.cuda()


@pytest.mark.parametrize("target", ["deep", "choice"])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma3", "gpt2"])
def test_gpu_graph_is_eager(name: str, target: Any) -> None:
    config = DistillerConfig(target=target)
    want = run(on_gpu(name), False, config, max_batch_rows=12, **SIZE)
    assert run(on_gpu(name), True, config, max_batch_rows=12, **SIZE) == want


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gpu_distinct_siblings(name: str) -> None:
    """Caches and rows change places within a replay as they do eagerly, and the dynamic cache's with them."""
    params = SamplingParams(seed=3, beta=0.5, top_k=40)
    size = SIZE | {"n": max(2, SIZE["n"]), "params": params}
    want = run(on_gpu(name), False, **size)
    assert run(on_gpu(name), True, **size) == want
    dynamic = Decoder(on_gpu(name)).generate(**{"prompts": PROMPTS, "stop_token_ids": STOP} | size)
    for first in range(0, len(want), size["n"]):
        for found in (want, dynamic):
            assert len({g.token_ids for g in found[first : first + size["n"]]}) == size["n"]


@pytest.mark.parametrize("graph", [False, True])
def test_gpu_what_is_kept_tells_the_log_probability_again(graph: bool) -> None:
    """Copied to the host before the second stream writes the next prediction over it."""
    decoder = Decoder(on_gpu("llama"), config=DistillerConfig(gate=False, lr=0.5))
    params = SamplingParams(seed=3, beta=0.5, temperature=0.8, distinct=False)
    options: dict[str, Any] = {"prompts": PROMPTS, "params": params, "stop_token_ids": STOP} | SIZE
    for sample in decoder.generate(cache="static", graph=graph, return_distilled=True, **options):
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]], device="cuda")
        with torch.no_grad():
            logits = decoder.model(ids).logits[0, len(sample.prompt_token_ids) - 1 : -1]
        assert sample.distilled is not None and not sample.distilled.prediction.is_cuda
        got = decoder.replay(sample, logits).cpu()
        torch.testing.assert_close(got, torch.tensor(sample.logprobs), atol=2e-3, rtol=0)


def test_gpu_replayed_step_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    original, replayed = loop.Run._step, []

    def step(self: Any, *args: Any) -> Any:
        if not self._steps._captured:
            return original(self, *args)
        replayed.append(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Run, "_step", step)
    for distinct in (False, None):
        replayed.clear()
        params = SamplingParams(seed=3, beta=0.5, distinct=distinct)
        run(on_gpu("llama"), True, stop_token_ids=(), params=params, **SIZE)
        assert len(replayed) >= SIZE["max_new_tokens"] - 3


@pytest.mark.parametrize("wait", ["item", "synchronize"])
def test_gpu_fallback(wait: str) -> None:
    """A wait that the rehearsal sees, and one that only the capture does; afterwards all is as before."""
    model = on_gpu("llama")

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if wait == "item":
            float(inputs[0].sum())
        else:
            torch.cuda.current_stream().synchronize()

    handle = model.model.layers[1].register_forward_hook(hook)
    want = run(model, False, **SIZE)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert run(model, "auto", **SIZE) == want
    handle.remove()
    assert torch.randn(1000, device="cuda").isfinite().all()
    assert run(model, True, **SIZE) == want


def test_step_does_not_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Run._step

    def step(self: Any, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = MODELS["llama"]().eval().cuda()
    options: dict[str, Any] = {
        "prompts": PROMPTS,
        "params": SamplingParams(seed=3, distinct=False),
        "stop_token_ids": STOP,
    } | SIZE
    want = Decoder(model).generate(**options, max_batch_rows=8)
    monkeypatch.setattr(loop.Run, "_step", step)
    assert Decoder(model).generate(**options, max_batch_rows=8) == want


@pytest.mark.skipif(INTERPRETED, reason="autograd's engine wants a real device")
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_published_recipes_run_without_a_graph(recipe: Any) -> None:
    """Plain PyTorch waits: the rehearsal of a graph sees it, and the steps go on eagerly, with the same tokens."""
    config = DistillerConfig(recipe=recipe, rank=8, gate=False)
    want = run(on_gpu("llama"), False, config, **SIZE)
    with pytest.warns(UserWarning, match="a step of this model waits for the device"):
        assert run(on_gpu("llama"), "auto", config, **SIZE) == want
