"""The simulated GPU refuses what a real one refuses.  Runs where it stands in for one: `make rehearse-gpu`."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("ESAMP_SIMULATED_CUDA" not in os.environ, reason="about the simulated GPU"),
]


def test_tensors_say_where_they_are_and_keep_their_values() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == torch.device("cuda", 0) and x.is_cuda and x[1:].T.is_cuda and (x > 1).is_cuda
    y = x[0]
    y.add_(1)
    assert x.tolist() == [[1, 2, 3], [3, 4, 5]] and x.cpu().device.type == "cpu"
    assert all(
        t.is_cuda for t in (torch.zeros_like(x), x.new_empty(2), torch.ones(2).cuda(), torch.tensor([1], device="cuda"))
    )
    assert torch.nn.Linear(3, 2).cuda()(x).is_cuda
    with torch.device("cuda"):
        assert torch.empty(1).is_cuda
    assert not torch.empty(1).is_cuda


def test_devices_do_not_mix() -> None:
    x = torch.ones(3, device="cuda")
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a CPU number may stand beside anything
    for mix in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: torch.where(x > 0, x, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        x.numpy()


def test_kernels_take_the_devices_tensors_only() -> None:
    triton = pytest.importorskip("triton")
    from tests.test_kernels_draw import _noise_kernel

    del triton
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="cpu tensor"):
        _noise_kernel[(1,)](one, one, one, one, one, 0, N=4)


def test_waits_are_seen() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (x.sum().item, x.cpu, lambda: torch.ones(3).to("cuda"), lambda: x[x > 0], lambda: bool(x[0])):
            with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                wait()
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert (x * 2 + x.new_zeros(3)).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_runs_nothing_and_a_replay_runs_it() -> None:
    state, graph = torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    number = 1.0
    with torch.cuda.graph(graph):
        state += number
        double = state * 2
    assert state.tolist() == [0, 0] and double.isnan().all()
    number = 5.0  # a replay does not see what only Python knew
    graph.replay()
    graph.replay()
    assert state.tolist() == [2, 2] and double.tolist() == [4, 4]
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        state.sum().item()
    assert not torch.cuda.is_current_stream_capturing()
