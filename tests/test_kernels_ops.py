"""The kernels as torch ops: schemas, fakes, graphs, warm-up, and what is checked before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.kernel_cases import equal_bits, make_head, make_params, make_rows, off, quick_interpreter, to

triton = pytest.importorskip("triton")

from esamp_core.base.errors import ArgumentError  # noqa: E402
from esamp_core.kernels.sampling import ops  # noqa: E402
from esamp_core.kernels.tuning import TABLE, Config, Layout, config_for, sort_width  # noqa: E402
from esamp_core.kernels.warm_up import warm_up  # noqa: E402
from esamp_core.ops import triton_backend, triton_sampling  # noqa: E402
from esamp_core.sample import DistillerConfig, Explorer, Head  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VOCAB, WIDTH, HIDDEN, ROWS = 130, 8, 16, 2


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_interpreter():
        yield


@pytest.fixture
def arguments(device: str) -> dict[str, tuple[object, ...]]:
    logits, params = make_rows(["random", "clustered"], VOCAB, 1), make_params(1, ROWS, VOCAB)
    head, generator = make_head(VOCAB, HIDDEN, 1)
    direction = torch.randn(ROWS, HIDDEN, generator=generator)
    seed = torch.arange(ROWS)
    logits, params, weight, direction, seed = to(device, logits, params, head.weight, direction, seed)
    found = ops.select_op(logits, *params, None, WIDTH, False)
    ids, chosen, count, threshold, tie_id, status = found
    temperature, beta = params.temperature, params.beta
    head_arguments = (weight, None, None, 1.0, None, None, 0, 1.0, False)
    codes = torch.rand(ROWS, 2, dtype=torch.float64, device=device)
    return {
        "select": (logits, *params, None, WIDTH, False),
        "score": (direction, weight, ids, None, None, 1.0, None, None, 0, True),
        "reweight": (ids, chosen, status, chosen * 0.5, beta, temperature, None, 1.0, False),
        "draw": (
            ids, chosen, count, threshold, tie_id, status, chosen, chosen * 0, logits, None, temperature, beta, seed,
            seed, codes,
        ),
        "explore": (logits, *params, seed, seed, None, None, None, direction, *head_arguments, WIDTH, False),
        "explore coded": (logits, *params, seed, seed, codes, None, None, direction, *head_arguments, WIDTH, False),
    }  # fmt: skip


@pytest.mark.traced
@pytest.mark.parametrize("name", ["select", "score", "reweight", "draw", "explore", "explore coded"])
def test_opcheck(arguments: dict[str, tuple[object, ...]], name: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, f"{name.split()[0]}_op"), arguments[name], test_utils=checks)


@pytest.mark.traced
def test_fakes_have_the_shapes(arguments: dict[str, tuple[object, ...]]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, values in arguments.items():
        op = getattr(ops, f"{name.split()[0]}_op")
        real = op(*values)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in values))
        pairs = zip(*([t] if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True)
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs), name


@pytest.mark.traced
def test_one_opaque_op_in_a_graph(device: str, arguments: dict[str, tuple[object, ...]]) -> None:
    values = arguments["explore"]
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: ops.explore_op(x, *values[1:]), backend=keep, fullgraph=True)
    assert equal_bits(compiled(values[0]), ops.explore_op(*values))
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.esamp.explore.default in calls or ops.explore_op in calls


@pytest.mark.parametrize("with_head", [False, True])
def test_warm_up_runs_every_op(device: str, with_head: bool) -> None:
    head, _ = make_head(VOCAB, HIDDEN, 1)
    options = {"dtype": torch.bfloat16, "weight": head.weight.to(device), "softcap": 30.0} if with_head else {}
    warm_up(VOCAB, HIDDEN, WIDTH, device=device, **options)


@pytest.mark.parametrize("target", ["deep", "choice"])
def test_an_explorer_warms_up(device: str, target: Literal["deep", "choice"], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the kernels is what the Explorer has; the Distillers are not touched."""
    monkeypatch.setenv("ESAMP_BACKEND", "triton")
    head, _ = make_head(VOCAB, HIDDEN, 1)
    config = DistillerConfig(rank=4, target=target, momentum=0.5, weight_dtype=torch.bfloat16)
    explorer = Explorer(Head(head.weight.to(device)), HIDDEN, config, max_groups=2, max_rows=4, max_candidates=WIDTH)
    asked: list[dict[str, Any]] = []

    def spy(vocab: int, hidden: int, width: int, **rest: Any) -> None:
        asked.append({"vocab": vocab, "hidden": hidden, "width": width, **rest})
        warm_up(vocab, hidden, width, **rest)

    monkeypatch.setattr(triton_sampling, "warm_up_kernels", spy)
    rows = explorer.open(["a", "a"])
    before = [t.clone() for t in explorer._bank.state.weights]
    explorer.warm_up(torch.bfloat16)
    assert equal_bits(before, explorer._bank.state.weights) and len(rows) == 2
    (call,) = asked
    assert (call["vocab"], call["hidden"], call["width"], call["rank"]) == (VOCAB, HIDDEN, WIDTH, 4)
    assert call["dtype"] == call["distiller_dtype"] == torch.bfloat16 and call["momentum"]
    assert (call["center"] is not None) == (target == "choice")
    with pytest.raises(ArgumentError, match=r"dtype must be one of .*, got torch.int64"):
        explorer.warm_up(torch.int64)
    monkeypatch.setenv("ESAMP_BACKEND", "torch")
    explorer.warm_up()
    assert len(asked) == 1  # PyTorch compiles nothing


def test_tuning_never_looks_at_rows() -> None:
    assert "rows" not in config_for.__code__.co_varnames and "rows" not in Layout.of.__code__.co_varnames
    for generation in TABLE:
        for vocab in (1, 127, 128, 32003, 152064, 262144, 2**20, 2**24):
            for width in (1, 64, 1024):
                config = config_for(generation, vocab, 3584, width, 2)
                layout = Layout.of(vocab, config)
                assert layout.block * layout.blocks >= vocab > layout.block * (layout.blocks - 1)
                assert layout.splits * layout.split_blocks >= layout.blocks
                assert sort_width(vocab, min(width, vocab)) >= min(width, vocab)
    assert config_for("sm_999", 1, 1, 1, 2) == config_for("sm_90", 1, 1, 1, 2) and Config() == Config()


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(Exception, match="need a GPU, got tensors on cpu"):
        triton_backend.select_candidates(torch.zeros(1, 4), off(1))


def test_compile_checker_sees_faults() -> None:
    """The checker's own rules, on made-up lines (compiling is `make check-kernels`)."""
    program = """
import sys; sys.path.insert(0, "tests")
from check_kernels import Line, narrowest_load, programs_at_once
line = Line("sm_90", "k", "c", 32, 0, 1024, 16, 256, 640, 4096)
assert line.faults() == [] and line.per_logit == 40
assert len(Line("gfx942", "k", "c", 32, 4, 70000, None, 256, 1, None).faults()) == 2
assert len(Line("sm_80", "k", "c", 32, 0, 0, 8, 128, 1, None).faults()) == 1
assert narrowest_load("") is None
# Registers, warps, programs and shared memory each set a limit; figures of CUDA's occupancy calculator.
limits = ((3, (128, 138, 16)), (2, (256, 85, 128)), (8, (256, 32, 0)), (32, (32, 32, 0)), (4, (128, 32, 50000)))
for limit, arguments in limits:
    assert programs_at_once("sm_90", *arguments) == limit, (limit, arguments, programs_at_once("sm_90", *arguments))
assert programs_at_once("sm_80", 128, 32, 50000) == 3 and programs_at_once("gfx942", 256, 128, 40000) == 1
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
