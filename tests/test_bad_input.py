"""Wrong shapes, dtypes, devices and ranges raise ArgumentError at once, name the argument and show what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from visits import Visits

from esamp_core import sample
from esamp_core.sample import (
    Activations,
    ArgumentError,
    DistillerConfig,
    DistillerState,
    DistillerWeights,
    Gauge,
    Head,
    RowParams,
    SamplingParams,
)

R, V, H, C, RANK, S = 3, 11, 4, 5, 2, 2


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def good() -> dict[str, dict[str, Any]]:
    """Valid arguments of every public op."""
    logits, params, head = torch.randn(R, V), SamplingParams(top_k=3), Head(torch.randn(V, H))
    candidates = sample.select_candidates(logits, params, max_candidates=C)
    direction, seed = torch.randn(R, H), torch.arange(R)
    projection = sample.score_candidates(direction, head, candidates.token_ids)
    weights = DistillerWeights(
        torch.randn(S, H, RANK), torch.randn(S, H, RANK), torch.zeros(S, RANK, H), torch.ones(S, RANK),
        torch.ones(S, H), torch.zeros(S, H),
    )  # fmt: skip
    counts = {name: torch.zeros(S, dtype=torch.long) for name in ("seed", "updates", "nonfinite")}
    state = DistillerState(weights=weights, momentum=None, loss=torch.zeros(S), first_loss=torch.zeros(S), **counts)
    groups, scale = sample.group_rows(torch.tensor([0, 1, 0]), S), torch.tensor(1.0)
    activations = sample.distiller_forward(direction, groups, weights, scale)
    gauge = Gauge(torch.zeros(S, H), torch.zeros(S, dtype=torch.long), *(torch.zeros(S) for _ in range(3)))
    return {
        "select_candidates": dict(
            logits=logits, params=params, filter_order="vllm", max_candidates=C, active=torch.ones(R, dtype=torch.bool)
        ),
        "score_candidates": dict(direction=direction, head=head, token_ids=candidates.token_ids),
        "transform_scores": dict(dots=projection, head=head),
        "reweight": dict(
            candidates=candidates, projection=projection, params=params, model_logits=projection, model_weight=1.0,
            neutral=True,
        ),
        "draw": dict(
            candidates=candidates, reweighted=sample.reweight(candidates, projection, params), logits=logits,
            params=params, seed=seed, position=0, model_logits=logits,
        ),
        "explore": dict(
            logits=logits, params=params, seed=seed, position=seed, direction=direction, head=head, model_logits=logits,
            model_weight=1.0, neutral=True, filter_order="transformers", max_candidates=C,
            active=torch.ones(R, dtype=torch.bool),
        ),
        "replay": dict(
            logits=logits, distilled=logits, token_ids=seed, params=params, model_logits=logits, model_weight=1.0,
            neutral=True, filter_order="transformers", max_candidates=C,
        ),
        "group_rows": dict(slots=torch.tensor([0, 1, 0]), num_slots=S, rank=seed),
        "distiller_scratch": dict(weights=weights, rows=R),
        "distiller_forward": dict(
            shallow=direction, groups=groups, weights=weights, scale=scale, scratch=torch.zeros(0),
            out=Activations.empty(R, H, RANK, logits.device),
        ),
        "mix": dict(
            deep=direction, activations=activations, groups=groups, weights=weights, scale=scale, beta=torch.ones(R),
            active=torch.ones(R, dtype=torch.bool), out=torch.zeros(R, H), status=torch.zeros(R, dtype=torch.int32),
        ),
        "distiller_step_": dict(
            state=state, activations=activations, target=direction, groups=groups, scale=scale,
            config=DistillerConfig(rank=RANK), head=None, active=torch.ones(R, dtype=torch.bool),
            scratch=torch.zeros(0),
        ),
        "gauge_": dict(
            gauge=gauge, activations=activations, target=direction, groups=groups, weights=weights, scale=scale,
            active=torch.ones(R, dtype=torch.bool), scratch=torch.zeros(0),
        ),
    }  # fmt: skip


PARAMS = RowParams.of(SamplingParams(), R, "cpu")
HEAD = Head(torch.randn(V, H))
OK = good()

# Argument -> what is wrong with it, and what the message must show of it.
LOGITS = [
    ("x", "'x'"),
    (torch.zeros(V), rf"float32 \[{V}\] on cpu"),
    (torch.zeros(R, V, dtype=torch.long), rf"int64 \[{R}, {V}\]"),
    (torch.zeros(R, V, dtype=torch.float64), rf"float64 \[{R}, {V}\]"),
]
NO_VOCABULARY = [(torch.zeros(R, 0), rf"float32 \[{R}, 0\]")]
LIKE_LOGITS = [*LOGITS, (torch.zeros(R, V + 1), rf"\[{R}, {V + 1}\]"), (meta(R, V), "on meta")]
ROW_PARAMS = [
    (None, "None"),
    ("warm", "."),
    ([SamplingParams()] * 2, "2"),
    ([SamplingParams(), None, SamplingParams()], "NoneType"),
    (PARAMS._replace(top_p=torch.ones(R + 1)), rf"top_p .*\({R + 1},\)"),
    (PARAMS._replace(beta=meta(R)), "beta .*meta"),
    (PARAMS._replace(top_k=torch.full((R,), 2.5)), "top_k .*float32"),
    (PARAMS._replace(min_p=torch.full((R,), 2.0)), "min_p.*2.0"),
    (PARAMS._replace(temperature=torch.tensor(-1.0)), "temperature.*-1.0"),
]
ROW_INTEGERS = [
    (None, "None"),
    (1.5, "1.5"),
    (True, "True"),
    (2**63, str(2**63)),
    (torch.zeros(R + 1, dtype=torch.long), rf"int64 \[{R + 1}\]"),
    (torch.zeros(R), rf"float32 \[{R}\]"),
    (meta(R, dtype=torch.long), "on meta"),
]
ACTIVE = [
    (torch.ones(R), "float32"),
    (torch.ones(R + 1, dtype=torch.bool), rf"bool \[{R + 1}\]"),
    (meta(R, dtype=torch.bool), "on meta"),
]
OPTIONS = {
    "filter_order": [("hf", "'hf'"), (None, "None")],
    "max_candidates": [(0, "0"), (1025, "1025"), (2.0, "2.0"), (True, "True"), (None, "None")],
}
NEUTRAL = [(1, "1"), (None, "None")]
MODEL_WEIGHT = [(float("nan"), "nan"), ("1", "'1'"), (None, "None")]
HEADS = [(None, "NoneType"), (torch.zeros(V, H), "Tensor")]
DIRECTION = [
    (torch.zeros(R, H + 1), rf"\[{R}, {H + 1}\]"),
    (torch.zeros(R + 1, H), rf"\[{R + 1}, {H}\]"),
    (torch.zeros(R, H, dtype=torch.long), "int64"),
    (meta(R, H), "on meta"),
]
SCALE = [(1.0, "1.0"), (torch.ones(1), r"\[1\]"), (meta(), "on meta"), (torch.tensor(1), "int64")]
GROUPS = [
    (None, "NoneType"),
    (OK["distiller_forward"]["groups"]._replace(order=torch.zeros(R + 1, dtype=torch.int32)), rf"order .*\[{R + 1}\]"),
    (OK["distiller_forward"]["groups"]._replace(offsets=torch.zeros(1, dtype=torch.int32)), r"offsets .*\[1\]"),
    (OK["distiller_forward"]["groups"]._replace(slots=meta(S, dtype=torch.int32)), "slots .*on meta"),
]
CANDIDATES = [
    (None, "NoneType"),
    (tuple(OK["reweight"]["candidates"]), "tuple"),
    (OK["reweight"]["candidates"]._replace(logits=torch.zeros(R, C + 1)), rf"logits .*\[{R}, {C + 1}\]"),
    (OK["reweight"]["candidates"]._replace(status=meta(R, dtype=torch.int32)), "status .*on meta"),
]
WEIGHTS: DistillerWeights = OK["distiller_forward"]["weights"]
GAUGE: Gauge = OK["gauge_"]["gauge"]
OUT: Activations = OK["distiller_forward"]["out"]
SCRATCH = [("x", "'x'"), (torch.zeros(4, dtype=torch.float64), "float64"), (torch.zeros(8)[::2], r"\[4\]"),
           (meta(4), "on meta")]  # fmt: skip

CASES: dict[str, dict[str, list[tuple[Any, str]]]] = {
    "select_candidates": {
        "logits": LOGITS + NO_VOCABULARY, "params": ROW_PARAMS, "active": ACTIVE, **OPTIONS,
    },
    "score_candidates": {
        "direction": DIRECTION,
        "head": [*HEADS, (Head(meta(V, H)), "on meta")],
        "token_ids": [
            (torch.zeros(R, C), "float32"), (torch.zeros(R, dtype=torch.long), rf"int64 \[{R}\]"), (None, "None"),
        ],
    },
    "transform_scores": {"dots": [(None, "None"), (torch.zeros(R), r"\[3\]")], "head": HEADS},
    "reweight": {
        "candidates": CANDIDATES,
        "projection": [(None, "None"), (torch.zeros(R, C + 1), rf"\[{R}, {C + 1}\]"), (meta(R, C), "on meta")],
        "params": ROW_PARAMS,
        "model_logits": [(torch.zeros(R, V), rf"\[{R}, {V}\]"), (meta(R, C), "on meta")],
        "model_weight": MODEL_WEIGHT, "neutral": NEUTRAL,
    },
    "draw": {
        "candidates": CANDIDATES,
        "reweighted": [
            (None, "NoneType"),
            (OK["draw"]["reweighted"]._replace(logits=torch.zeros(R, C + 1)), rf"logits .*\[{R}, {C + 1}\]"),
            (OK["draw"]["reweighted"]._replace(novelty=meta(R, C)), "novelty .*on meta"),
        ],
        "logits": [*LOGITS, *NO_VOCABULARY, (torch.zeros(R + 1, V), rf"\[{R + 1}, {V}\]"), (meta(R, V), "on meta")],
        "params": ROW_PARAMS, "seed": ROW_INTEGERS, "position": ROW_INTEGERS, "model_logits": LIKE_LOGITS,
    },
    "explore": {
        "logits": LOGITS + NO_VOCABULARY, "params": ROW_PARAMS, "seed": ROW_INTEGERS, "position": ROW_INTEGERS,
        "direction": [*DIRECTION, (None, "together")],
        "head": [
            (None, "together"), HEADS[1], (Head(meta(V, H)), "on meta"),
            (Head(torch.zeros(V - 1, H)), str(V - 1)), (Head(torch.zeros(V, H), vocab_start=2), "2"),
        ],
        "model_logits": LIKE_LOGITS, "model_weight": MODEL_WEIGHT, "neutral": NEUTRAL, "active": ACTIVE, **OPTIONS,
    },
    "replay": {
        "logits": LOGITS, "distilled": LIKE_LOGITS, "token_ids": ROW_INTEGERS, "params": ROW_PARAMS,
        "model_logits": LIKE_LOGITS, "model_weight": MODEL_WEIGHT, "neutral": NEUTRAL, **OPTIONS,
    },
    "group_rows": {
        "slots": [(None, "None"), (torch.zeros(R), "float32"), (torch.zeros(1, R, dtype=torch.long), r"\[1, 3\]")],
        "num_slots": [(0, "0"), (2.0, "2.0"), (None, "None")],
        "rank": [(torch.zeros(R + 1, dtype=torch.long), r"\[4\]"), (torch.zeros(R), "float32"),
                 (meta(R, dtype=torch.long), "on meta")],
    },
    "distiller_forward": {
        "shallow": DIRECTION[:1] + DIRECTION[2:],
        "groups": GROUPS,
        "weights": [
            (None, "NoneType"),
            (WEIGHTS._replace(up=torch.zeros(H, RANK)), r"up .*\[4, 2\]"),
            (WEIGHTS._replace(down=torch.zeros(S, H, RANK)), r"down .*\[2, 4, 2\]"),
            (WEIGHTS._replace(norm_bias=meta(S, H)), "norm_bias .*on meta"),
        ],
        "scale": SCALE,
        "out": [
            ("x", "str"), (OUT._replace(gate=torch.zeros(R, RANK + 1)), rf"gate .*\[{R}, {RANK + 1}\]"),
            (OUT._replace(x=torch.zeros(R, H + 1)), rf"x .*\[{R}, {H + 1}\]"),
            (OUT._replace(y=meta(R, H)), "y .*on meta"),
            (OUT._replace(rstd=torch.zeros(R, dtype=torch.float64)), "rstd .*float64"),
            (OUT._replace(pred=torch.zeros(H, R).T), r"pred .*\(1, 3\)"),
        ],
        "scratch": SCRATCH,
    },
    "distiller_scratch": {
        "weights": [(None, "NoneType"), (WEIGHTS._replace(up=torch.zeros(H, RANK)), r"up .*\[4, 2\]")],
        "rows": [(-1, "-1"), (2.0, "2.0"), (None, "None")],
    },
    "mix": {
        "deep": [*DIRECTION, (torch.zeros(R, H, dtype=torch.float64), "float64")],
        "activations": [
            (None, "NoneType"), (OUT._replace(y=torch.zeros(R, H + 1)), r"y .*\[3, 5\]"),
            (OUT._replace(rstd=meta(R)), "rstd .*on meta"),
        ],
        "groups": GROUPS,
        "weights": [(None, "NoneType"), (WEIGHTS._replace(norm_bias=meta(S, H)), "norm_bias .*on meta")],
        "scale": SCALE,
        "beta": [(0.5, "0.5"), (torch.zeros(R + 1), r"\[4\]"), (torch.zeros(R, dtype=torch.long), "int64")],
        "active": ACTIVE,
        "out": [
            ("x", "'x'"), (torch.zeros(R, H + 1), r"\[3, 5\]"), (torch.zeros(R, H).bfloat16(), "bfloat16"),
            (torch.zeros(H, R).T, r"\(1, 3\)"), (meta(R, H), "on meta"),
        ],
        "status": [
            (torch.zeros(R), "float32"), (torch.zeros(R, dtype=torch.long), "int64"),
            (torch.zeros(R + 1, dtype=torch.int32), r"\[4\]"),
        ],
    },
    "distiller_step_": {
        "state": [(None, "NoneType"), (OK["distiller_step_"]["state"]._replace(weights=None), "weights .*NoneType")],
        "activations": [
            (None, "None"),
            (OK["distiller_step_"]["activations"]._replace(x=torch.zeros(R, H + 1)), r"x .*\[3, 5\]"),
        ],
        "target": DIRECTION, "groups": GROUPS, "scale": SCALE, "active": ACTIVE,
        "config": [(None, "NoneType")], "scratch": SCRATCH,
        "head": [
            (torch.zeros(V, H), "Tensor"), (Head(torch.zeros(V, H + 1)), rf"\[{V}, {H + 1}\]"),
            (Head(meta(V, H)), "on meta"), (Head(torch.zeros(V, H), vocab_start=2), "2"),
        ],
    },
    "gauge_": {
        "gauge": [
            (None, "NoneType"), (GAUGE._replace(mean=torch.zeros(S, H + 1)), r"mean .*\[2, 5\]"),
            (GAUGE._replace(steps=torch.zeros(S)), "steps .*float32"), (GAUGE._replace(trust=meta(S)), "on meta"),
            (GAUGE._replace(error=torch.zeros(S, dtype=torch.float64)), "error .*float64"),
            (GAUGE._replace(mean=torch.zeros(H, S).T), r"mean .*\(1, 2\)"),
        ],
        "activations": [(None, "None"), (OUT._replace(x=torch.zeros(R, H + 1)), r"x .*\[3, 5\]")],
        "target": DIRECTION, "groups": GROUPS, "scale": SCALE, "active": ACTIVE, "scratch": SCRATCH,
        "weights": [(None, "NoneType"), (WEIGHTS._replace(norm_bias=meta(S, H)), "norm_bias .*on meta")],
    },
}  # fmt: skip


@pytest.mark.parametrize("op", OK)
def test_an_argument_is_checked_once(op: str) -> None:
    with Visits() as visits:
        getattr(sample, op)(**OK[op])
    names = [name for name, _ in visits.checked]
    assert names and len(set(names)) == len(names)


@pytest.mark.parametrize("op", OK)
def test_good_arguments_are_good(op: str) -> None:
    getattr(sample, op)(**good()[op])


@pytest.mark.parametrize(
    ("op", "argument", "case"),
    [
        (op, argument, i)
        for op, arguments in CASES.items()
        for argument, cases in arguments.items()
        for i in range(len(cases))
    ],
)
def test_bad_argument(op: str, argument: str, case: int) -> None:
    value, shown = CASES[op][argument][case]
    arguments = good()[op] | {argument: value}
    with pytest.raises(ArgumentError, match=rf"(?s)\b{argument}.*{shown}|{shown}.*\b{argument}\b") as raised:
        getattr(sample, op)(**arguments)
    assert isinstance(raised.value, ValueError) and len(str(raised.value)) < 500


def test_every_argument_is_covered() -> None:
    assert set(CASES) == set(OK)
    for op, arguments in OK.items():
        assert set(CASES[op]) == set(arguments), op


def test_momentum_needs_its_buffer() -> None:
    arguments = good()["distiller_step_"] | {"config": DistillerConfig(rank=RANK, momentum=0.9)}
    with pytest.raises(ArgumentError, match=r"state.momentum .*0\.9.*None"):
        sample.distiller_step_(**arguments)


@pytest.mark.parametrize("choice", ["cuda", "", "Triton"])
def test_backend_switch(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESAMP_BACKEND", choice)
    with pytest.raises(ArgumentError, match=f"ESAMP_BACKEND .*{choice!r}"):
        sample.explore(torch.zeros(R, V), SamplingParams(), 0, 0)


NAN, INF = float("nan"), float("inf")
CONFIGS: list[tuple[Callable[..., Any], dict[str, list[Any]]]] = [
    (
        SamplingParams,
        dict(
            temperature=[-1, 1e-4, NAN, INF, "1", None, True], top_k=[-1, 2**31, 1.0, None, True],
            top_p=[0, -0.1, 1.1, NAN, None], min_p=[-0.1, 1.1, NAN, None], beta=[NAN, INF, None, "x"],
            seed=[2**64, -(2**63) - 1, 1.0, True, "7"],
        ),
    ),
    (
        DistillerConfig,
        dict(
            rank=[0, 1025, 8.0, None], lr=[-0.1, NAN, INF, "0.1"], momentum=[-0.1, 1, NAN], clip=[0, -1, INF, None],
            target=["shallow", None], weight_dtype=[torch.float16, "float32"], seed=[-1, 2**63, 1.5],
            deep_scale=[0, -1, NAN, "rms"], patience=[0, 1.5],
        ),
    ),
    (
        lambda **bad: Head(**({"weight": torch.zeros(V, H)} | bad)),
        dict(
            weight=[None, torch.zeros(V), torch.zeros(V, H, dtype=torch.long)],
            bias=[torch.zeros(H), meta(V), [0.0] * V, torch.zeros(V, dtype=torch.long)],
            center=[torch.zeros(V), meta(H), 1.0], scale=[NAN, INF, None, "1"], softcap=[0, -1, NAN, "x"],
            clip=[0, -3.0, INF, "x"], vocab_start=[-1, 1.5, None],
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [(make, field, value) for make, fields in CONFIGS for field, values in fields.items() for value in values],
)
def test_dataclasses_are_checked_when_made(make: Callable[..., Any], field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=field) as raised:
        make(**{field: value})
    message = str(raised.value)
    shown = (
        (repr(value), str(tuple(value.shape)), str(value.dtype)) if isinstance(value, torch.Tensor) else (repr(value),)
    )
    assert any(s in message for s in (*shown, type(value).__name__)), message


def test_dataclasses_are_frozen() -> None:
    for made, field in ((SamplingParams(), "beta"), (DistillerConfig(), "lr"), (HEAD, "scale")):
        with pytest.raises(AttributeError):
            setattr(made, field, 0.5)


def test_activations_come_from_the_forward() -> None:
    assert isinstance(OK["distiller_step_"]["activations"], Activations)
