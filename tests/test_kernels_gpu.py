"""What only a GPU can show: no wait for the device, and CUDA graphs that see new values at replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernel_cases import ROW_KINDS, equal_bits, make_head, make_params, make_rows, to

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from esamp_core import triton_backend  # noqa: E402

VOCAB, HIDDEN, ROWS = 5003, 64, 2 * len(ROW_KINDS)


def inputs(seed: int) -> list[Any]:
    logits = make_rows(ROW_KINDS * 2, VOCAB, seed, torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**62, (2, ROWS), generator=generator)
    active = torch.rand(ROWS, generator=generator) < 0.8
    direction = torch.randn(ROWS, HIDDEN, generator=generator)
    return to("cuda", logits, make_params(seed, ROWS, VOCAB), numbers[0], numbers[1], direction, active)


def step(head: Any, logits: Any, params: Any, seed: Any, position: Any, direction: Any, active: Any) -> Any:
    return triton_backend.explore(
        logits, params, seed, position, direction=direction, head=head, active=active, max_candidates=16
    )


@pytest.fixture
def head() -> Any:
    cpu_head, _ = make_head(VOCAB, HIDDEN, 0)
    return type(cpu_head)(cpu_head.weight.cuda())


def test_nothing_waits_for_the_device(head: Any) -> None:
    values = inputs(1)
    step(head, *values)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(head, *values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_sees_new_values(head: Any) -> None:
    static = inputs(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(head, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = step(head, *static)
    for seed in (1, 2, 3):
        for old, new in zip(static, inputs(seed), strict=True):
            pairs = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
            for a, b in pairs:
                a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        assert equal_bits(drawn, step(head, *inputs(seed)))


def test_rows_beyond_32_bit_offsets() -> None:
    """R * V > 2^31: the last rows are read where they are."""
    vocab, rows = 152064, 14200
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB")
    logits = torch.full((rows, vocab), -5.0, dtype=torch.bfloat16, device="cuda")
    winners = torch.randint(0, vocab, (rows,), device="cuda")
    logits[torch.arange(rows, device="cuda"), winners] = 20.0
    params = make_params(0, rows, vocab, beta=0.0)._replace(temperature=torch.zeros(rows))
    zero = torch.zeros(rows, dtype=torch.int64, device="cuda")
    drawn = triton_backend.explore(logits, *to("cuda", params), zero, zero, max_candidates=8)
    assert torch.equal(drawn.token_ids, winners)
