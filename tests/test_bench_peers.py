"""The samplers that ours is measured against: what they draw, and what is said of those that cannot run here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from esamp_core.sample import RowParams, SamplingParams

# At temperature .5 these tokens have the probabilities below.  Top-k leaves four of them; of those, not of all five,
# top-p leaves three; min-p, where there is one, two.
TOKENS, P = torch.tensor([3, 11, 40, 41, 63]), torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
PARAMS = SamplingParams(temperature=0.5, top_k=4, top_p=0.8, min_p=0.7)
KEPT = {"eager": 2, "transformers": 2, "flashinfer": 3, "vllm": 3}
ROWS = 4000


@pytest.fixture(autouse=True)
def made_anew() -> Iterator[None]:
    """What a test changes is seen, and is not kept."""
    peers._made.cache_clear()
    yield
    peers._made.cache_clear()


def sampler(name: str) -> peers.Sampler:
    if name in peers.missing():
        pytest.skip(peers.missing()[name])
    return peers.available()[name]


def logits_of(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    row = torch.full((64,), -20.0)
    row[TOKENS] = P.log().float() / 2
    return row.repeat(ROWS, 1).to(device, dtype)


def in_stead(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module for others to import, and the packages that it is in."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    while "." in name:
        name = name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


@pytest.mark.parametrize(("name", "min_p"), [(name, min_p) for name in KEPT for min_p in (0.0, 0.7)])
def test_draws_have_the_filtered_frequencies(name: str, min_p: float, device: str) -> None:
    from scipy.stats import chisquare

    draw, logits = sampler(name), logits_of(device)
    given = logits.clone()
    torch.manual_seed(0)
    params = RowParams.of(dataclasses.replace(PARAMS, min_p=min_p), ROWS, device)
    counts = torch.bincount(draw(logits, params).cpu().long(), minlength=64)
    assert torch.equal(logits, given)
    kept = KEPT[name] if min_p else 3
    assert counts[TOKENS[:kept]].sum() == ROWS
    assert chisquare(counts[TOKENS[:kept]].numpy(), (ROWS * P[:kept] / P[:kept].sum()).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", list(KEPT))
def test_draws_take_half_precision(name: str, device: str) -> None:
    drawn = sampler(name)(logits_of(device, torch.bfloat16), RowParams.of(PARAMS, ROWS, device))
    assert drawn.shape == (ROWS,) and drawn.dtype in (torch.int32, torch.int64)
    assert set(drawn.tolist()) == set(TOKENS[: KEPT[name]].tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(KEPT))
def test_a_replayed_graph_draws_anew(name: str) -> None:
    """As they are measured: what is drawn from is on the device, the host is not asked."""
    from bench.measure import GraphClock

    draw, logits, params = sampler(name), logits_of("cuda"), RowParams.of(PARAMS, ROWS, "cuda")
    out = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    clock = GraphClock("cuda", 1024)
    replay = clock.prepare(lambda: out.copy_(draw(logits, params)))
    assert clock.captured(replay)
    drawn = []
    for _ in range(2):
        replay()
        drawn.append(out.tolist())
    assert drawn[0] != drawn[1] and set(drawn[0]) == set(drawn[1]) == set(TOKENS[: KEPT[name]].tolist())


def test_flashinfer_is_given_new_noise_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's replay reads both again: they must be the same tensors, with another offset in them."""
    calls: list[dict[str, Any]] = []

    def draw(logits: Tensor, top_k: Tensor, top_p: Tensor, **options: Any) -> Tensor:
        calls.append({**options, "logits": logits, "top_k": top_k, "top_p": top_p, "at": options["offset"].item()})
        return logits.argmax(-1)

    in_stead(monkeypatch, "flashinfer.sampling", top_k_top_p_sampling_from_logits=draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sample = sampler("flashinfer")
    calls.clear()  # of the draw that loads its library
    logits, params = logits_of("cpu", torch.bfloat16), RowParams.of(PARAMS, ROWS, "cpu")
    sample(logits, params)
    sample(logits, params)
    first, second = calls
    assert first["offset"] is second["offset"] and first["seed"] is second["seed"]
    assert second["at"] - first["at"] >= 32 and first["offset"].dtype == first["seed"].dtype == torch.int64
    assert first["top_k"].dtype == torch.int32 and first["top_k"].tolist() == [4] * ROWS
    assert first["filter_apply_order"] == "top_k_first" and torch.equal(first["top_p"], params.top_p)
    torch.testing.assert_close(first["logits"], logits.float() * 2)


def test_vllm_masks_what_temperature_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(logits: Tensor, k: Tensor, p: Tensor) -> Tensor:
        assert k.dtype == torch.int32 and k.tolist() == [4] * ROWS and p[0] == torch.tensor(0.8)
        torch.testing.assert_close(logits.softmax(-1)[0, TOKENS], P.float())
        return logits.masked_fill_(logits < logits[:, TOKENS[1], None], float("-inf"))

    class Platform:
        gpu = True

        def is_cuda_alike(self) -> bool:
            return self.gpu

    platform = Platform()
    in_stead(monkeypatch, "vllm.platforms", current_platform=platform)
    in_stead(monkeypatch, "vllm.triton_utils", HAS_TRITON=True)
    in_stead(monkeypatch, "vllm.v1.sample.ops.topk_topp_triton", apply_top_k_top_p_triton=mask)
    logits = logits_of("cpu")
    drawn = sampler("vllm")(logits, RowParams.of(PARAMS, ROWS, "cpu"))
    assert set(drawn.tolist()) == set(TOKENS[:2].tolist()) and torch.equal(logits, logits_of("cpu"))
    platform.gpu = False
    peers._made.cache_clear()
    assert "vLLM finds no GPU" in peers.missing()["vllm"]


def test_what_cannot_run_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> peers.Sampler:
        raise OSError("libpeer.so: no such file\nand a long trace")

    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(peers.MAKERS, "broken", broken)
    assert peers.missing()["broken"] == "OSError: libpeer.so: no such file"
    assert peers.missing()["flashinfer"].startswith("ModuleNotFoundError: ") and "eager" not in peers.missing()
    assert {"eager", "transformers"} <= set(peers.available()) and "broken" not in peers.available()
    assert set(peers.available()) | set(peers.missing()) == set(peers.MAKERS)
