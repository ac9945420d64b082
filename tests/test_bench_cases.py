"""The benchmark's cases are what they say, and every op takes their inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.cases import QWEN_7B, SHAPES, TARGETS, DistillerCase, SamplingCase, Shape, make_sampling_inputs
from esamp_core.sample import explore

TINY = Shape("tiny", 3000, 24, softcap=30.0)


@pytest.mark.parametrize("kind", ["random", "clustered", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_run(kind: str, dtype: torch.dtype) -> None:
    case = SamplingCase(TINY, 5, 20, dtype, kind)  # type: ignore[arg-type]
    first, second = make_sampling_inputs(case, "cpu", sets=2)
    assert not torch.equal(first.logits, second.logits) and first.head is second.head
    assert first.logits.numel() * first.logits.element_size() == case.scan_bytes
    for inputs in (first, second):
        draw = explore(*inputs[:4], direction=inputs.direction, head=inputs.head)
        assert (draw.token_ids >= 0).all() and (draw.status == 0).all()
    widest = first.logits.float().topk(20).indices.sort(-1).values
    neighbours = bool((widest[:, -1] - widest[:, 0] < 512).all())
    assert neighbours == (kind == "clustered")


def test_floors_are_the_bytes_moved() -> None:
    case = SamplingCase(QWEN_7B, 128, 50)
    assert case.scan_bytes / 4.3e12 == pytest.approx(9.1e-6, rel=0.01)  # at an H200's copy rate
    assert dataclasses.replace(case, dtype=torch.float32).scan_bytes / 4.3e12 == pytest.approx(18.1e-6, rel=0.01)
    assert (case.bytes - case.scan_bytes) / 4.3e12 == pytest.approx(10.7e-6, rel=0.01)
    assert 2 * DistillerCase(QWEN_7B, 8, 16).weight_bytes / 4.3e12 == pytest.approx(10.2e-6, rel=0.02)
    assert {t.what for t in TARGETS} == {"select_candidates", "explore", "distiller_forward", "distiller_step_", "mix"}
    assert len({s.name for s in SHAPES}) == len(SHAPES) == 8
