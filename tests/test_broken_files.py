"""Files that are broken, hostile, or of something else: refused in one line, and nothing has changed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import Metadata, Tensors, like, read, refused, with_tensor
from explorer_helpers import HIDDEN, PARAMS, VOCAB, make, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupts import interrupted
from safetensors.torch import save_file

from esamp_core.base import files
from esamp_core.sample import ArgumentError, CapacityError, DistillerConfig, Explorer, Head, StateError

CONFIG = DistillerConfig(rank=3)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups: one has learned, one has not yet."""
    explorer = make(CONFIG)
    rows = explorer.open(["g"] * 2, PARAMS, retain=True)
    for seed in range(3):
        step(explorer, rows, seed)
    explorer.close(rows + explorer.open([7], PARAMS, retain=True))
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    explorer.save(path)
    return path


def groups_of(metadata: Metadata, change: Callable[[list[Any]], object]) -> Metadata:
    groups = json.loads(metadata["groups"])
    return {**metadata, "groups": json.dumps(change(groups))}


def with_entry(name: str, value: object) -> Callable[[Tensors, Metadata], tuple[Tensors, Metadata]]:
    return lambda t, m: (t, groups_of(m, lambda groups: [{**groups[0], name: value}, *groups[1:]]))


def with_config(**values: object) -> Callable[[Tensors, Metadata], tuple[Tensors, Metadata]]:
    return lambda t, m: (t, {**m, "config": json.dumps({**json.loads(m["config"]), **values})})


STATE_TENSORS = ("weights.up", "weights.down", "weights.norm_bias", "gauge.mean", "gauge.error", "gauge.trust", "loss")
BROKEN_STATES: dict[str, Callable[[Tensors, Metadata], tuple[Tensors, Metadata]]] = {
    "no metadata": lambda t, m: (t, {}),
    "no format": lambda t, m: (t, {k: v for k, v in m.items() if k != "format"}),
    "another format": lambda t, m: (t, {**m, "format": "esamp-state-99"}),
    "no groups": lambda t, m: (t, {k: v for k, v in m.items() if k != "groups"}),
    "groups not JSON": lambda t, m: (t, {**m, "groups": "{"}),
    "groups a dict": lambda t, m: (t, {**m, "groups": '{"a": 1}'}),
    "groups null": lambda t, m: (t, {**m, "groups": "null"}),
    "groups deep": lambda t, m: (t, {**m, "groups": "[" * 100_000 + "]" * 100_000}),
    "groups empty": lambda t, m: (t, {**m, "groups": "[]"}),
    "one group more": lambda t, m: (t, groups_of(m, lambda g: [*g, {**g[0], "group": "more"}])),
    "one group less": lambda t, m: (t, groups_of(m, lambda g: g[:1])),
    "a group twice": lambda t, m: (t, groups_of(m, lambda g: [g[0], g[0]])),
    "an entry that is empty": lambda t, m: (t, groups_of(m, lambda g: [{}, g[1]])),
    "an entry that is a list": lambda t, m: (t, groups_of(m, lambda g: [[], g[1]])),
    "an unknown field": with_entry("colour", 1),
    "group null": with_entry("group", None),
    "group a list": with_entry("group", ["a"]),
    "group a float": with_entry("group", 1.5),
    "group true": with_entry("group", True),
    "group 2^70": with_entry("group", 2**70),
    "sample index 2^70": with_entry("next_sample_index", 2**70),
    "sample index 2^63 - 1": with_entry("next_sample_index", 2**63 - 1),
    "sample index -1": with_entry("next_sample_index", -1),
    "sample index a text": with_entry("next_sample_index", "0"),
    "sample index 0.5": with_entry("next_sample_index", 0.5),
    "sample index true": with_entry("next_sample_index", True),
    "sample index NaN": with_entry("next_sample_index", float("nan")),
    "last used 1e400": lambda t, m: (t, {**m, "groups": m["groups"].replace('"last_used": ', '"last_used": 1e400')}),
    "config empty": lambda t, m: (t, {**m, "config": "{}"}),
    "config a list": lambda t, m: (t, {**m, "config": "[]"}),
    "config of another rank": with_config(rank=4),
    "config with a text for rank": with_config(rank="3"),
    "config of another recipe": with_config(recipe="paper"),
    "config of no recipe": with_config(recipe="mine"),
    "config with momentum": with_config(momentum=0.5),
    "momentum NaN": with_config(momentum=float("nan")),
    "an unknown config field": with_config(colour="red"),
    "a tensor missing": lambda t, m: ({k: v for k, v in t.items() if k != "weights.up"}, m),
    "an unknown tensor": lambda t, m: ({**t, "weights.more": torch.ones(2)}, m),
    "no scale": lambda t, m: ({k: v for k, v in t.items() if k != "scale"}, m),
    "scale [5]": with_tensor("scale", lambda t: torch.ones(5)),
    "scale [1]": with_tensor("scale", lambda t: torch.ones(1)),
    "scale NaN after lessons": with_tensor("scale", like(float("nan"))),
    "loss NaN after lessons": with_tensor("loss", like(float("nan"))),
    "first loss NaN after lessons": with_tensor("first_loss", like(float("nan"))),
    "error NaN after lessons": with_tensor("gauge.error", like(float("nan"))),
    "scale 0": with_tensor("scale", like(0.0)),
    "scale -1": with_tensor("scale", like(-1.0)),
    "scale inf": with_tensor("scale", like(float("inf"))),
    "scale float64": with_tensor("scale", lambda t: t.double()),
    "updates bool": with_tensor("updates", lambda t: t.bool()),
    "updates float": with_tensor("updates", lambda t: t.float()),
    "updates -1": with_tensor("updates", like(-1)),
    "seed int32": with_tensor("seed", lambda t: t.int()),
    "trust 2": with_tensor("gauge.trust", like(2.0)),
    "trust NaN": with_tensor("gauge.trust", like(float("nan"))),
    "loss -1": with_tensor("loss", like(-1.0)),
    "a head of another model": with_tensor("head", lambda t: t.flip(0)),
    "a head of another size": with_tensor("head", lambda t: t[:-1]),
    "a head of NaN": with_tensor("head", like(float("nan"))),
    "a head of bool": with_tensor("head", lambda t: t.bool()),
    **{f"{name} inf": with_tensor(name, like(float("inf"))) for name in STATE_TENSORS},
    **{f"{name} NaN": with_tensor(name, like(float("nan"))) for name in STATE_TENSORS[:4]},
    **{f"{name} half": with_tensor(name, lambda t: t.half()) for name in STATE_TENSORS},
    **{f"{name} too short": with_tensor(name, lambda t: t[:1].clone()) for name in STATE_TENSORS},
    **{f"{name} deeper": with_tensor(name, lambda t: t[..., None].clone()) for name in STATE_TENSORS},
    **{f"{name} flat": with_tensor(name, lambda t: t.flatten()[:0].clone()) for name in STATE_TENSORS},
    **{f"{name} 0-d": with_tensor(name, lambda t: t.flatten()[0].clone()) for name in STATE_TENSORS},
}


def check_untouched(explorer: Explorer, good: Path) -> None:
    assert not explorer.stats() and bool(torch.isnan(explorer.state_dict()["scale"]))
    explorer.load(good)
    assert set(explorer.stats()) == {"g", 7}
    with explorer.open(["g", "g", 7], PARAMS) as rows:
        for seed in range(3):
            draw = step(explorer, rows, seed)
        assert all(s.nonfinite == 0 for s in explorer.stats().values()) and draw.status.eq(0).all()


@pytest.mark.parametrize("name", BROKEN_STATES)
def test_a_broken_state_is_refused(name: str, state: Path, tmp_path: Path) -> None:
    tensors, metadata = BROKEN_STATES[name](*read(state))
    broken = tmp_path / "broken"
    save_file({k: t.contiguous() for k, t in tensors.items()}, broken, metadata=metadata)
    explorer = make(CONFIG)
    refused(lambda: explorer.load(broken))
    check_untouched(explorer, state)


def test_a_state_that_does_not_fit_here(state: Path) -> None:
    refused(lambda: make(CONFIG, max_groups=1).load(state), CapacityError)
    explorer = make(CONFIG)
    rows = explorer.open(["a"], PARAMS)
    refused(lambda: explorer.load(state), StateError)
    assert rows.current
    head = Head(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)))
    other = Explorer(head, HIDDEN, CONFIG, max_groups=4)
    assert "another head" in refused(lambda: other.load(state))
    Explorer(None, HIDDEN, CONFIG, max_groups=4, device="cpu").load(state)  # has none to compare with


@pytest.mark.parametrize(
    "raw", [b"", b"hello world, hello world", b"\xff" * 64, b"\x80" + b"\0" * 7, "half", "missing", "folder"]
)
def test_what_is_no_safetensors_file(raw: bytes | str, state: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if raw == "folder":
        path.mkdir()
    elif raw != "missing":
        path.write_bytes(state.read_bytes()[: state.stat().st_size // 2] if isinstance(raw, str) else raw)
    explorer = make(CONFIG)
    refused(lambda: explorer.load(path))
    refused(lambda: make(DistillerConfig(rank=3, start=str(path))))
    check_untouched(explorer, state)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_of_a_state_may_be_others(data: st.DataObject, state: Path, tmp_path: Path) -> None:
    """Loaded, and then it works; or refused, and nothing has changed."""
    raw = bytearray(state.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    broken = tmp_path / "broken"
    broken.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw))
    explorer = make(CONFIG)
    try:
        explorer.load(broken)
    except ArgumentError as error:
        assert "\n" not in str(error)
        check_untouched(explorer, state)
    else:
        assert len(explorer.stats()) == 2


def test_a_state_of_before_the_first_lesson_learns_after_loading(tmp_path: Path) -> None:
    """Its scale is not known yet, and is measured then."""
    early = make(CONFIG)
    early.close(early.open(["g"], PARAMS, retain=True))
    early.save(tmp_path / "early")
    loaded, fresh = make(CONFIG), make(CONFIG)
    loaded.load(tmp_path / "early")
    draws = []
    for explorer in (loaded, fresh):
        rows = explorer.open(["g"] * 4, PARAMS, sample_index=range(4))
        draws.append([step(explorer, rows, seed) for seed in range(20)])
        stats = explorer.stats()["g"]
        assert (stats.updates, stats.nonfinite) == (20, 0)
    for mine, theirs in zip(*draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_state_dict_is_checked_like_a_file(state: Path) -> None:
    explorer = make(CONFIG)
    explorer.load(state)
    saved = explorer.state_dict()
    for change in (
        lambda s: s.pop("scale"),
        lambda s: s.pop("config"),
        lambda s: s["groups"].append({"group": [], "next_sample_index": 0, "last_used": 0}),
        lambda s: s["groups"].__setitem__(0, s["groups"][1]),
        lambda s: s["tensors"]["weights.up"].fill_(float("nan")),
        lambda s: s["tensors"].pop("seed"),
        lambda s: s.update(groups={}),
    ):
        broken = copy.deepcopy(saved)
        change(broken)
        other = make(CONFIG)
        refused(lambda: other.load_state_dict(broken))  # noqa: B023
        check_untouched(other, state)
    for nothing in (None, [], "state", {}):
        refused(lambda: make(CONFIG).load_state_dict(nothing))  # type: ignore[arg-type]  # noqa: B023


def test_saving_is_all_or_nothing(state: Path, tmp_path: Path) -> None:
    """Interrupted at any line, or on a full disk: the old file stands, and nothing else lies about."""
    explorer = make(CONFIG)
    explorer.load(state)
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    explorer.stats()
    for _ in interrupted(lambda _: lambda: explorer.save(path), "/base/files"):
        assert os.listdir(tmp_path) == ["kept"]
        if path.read_bytes() != b"old":
            make(CONFIG).load(path)
        path.write_bytes(b"old")
    path.write_bytes(b"old")  # the last one ran to its end
    with pytest.MonkeyPatch.context() as patch:

        def full(tensors: Tensors, target: Path, metadata: Metadata) -> None:
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        patch.setattr(files, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            explorer.save(path)
    assert os.listdir(tmp_path) == ["kept"] and path.read_bytes() == b"old"
    link = tmp_path / "link"
    link.symlink_to(path)
    explorer.save(link)
    assert link.is_symlink()
    make(CONFIG).load(path)


H, R = HIDDEN, 3
START: Tensors = {
    "up": torch.randn(H, R, generator=torch.Generator().manual_seed(0)),
    "gate": torch.randn(H, R, generator=torch.Generator().manual_seed(1)),
    "down": torch.zeros(R, H),
    "gate_bias": torch.ones(R),
    "norm_weight": torch.ones(H),
    "norm_bias": torch.zeros(H),
    "mean": torch.zeros(H),
}
ABOUT = {"format": "esamp-distiller-start-1", "target": "deep", "deep_scale": "1.0", "error": "0.5", "baseline": "0.9"}
BROKEN_STARTS: dict[str, tuple[Tensors, Metadata]] = {
    **{f"{k} NaN": ({**START, k: torch.full_like(t, float("nan"))}, ABOUT) for k, t in START.items()},
    **{f"{k} inf": ({**START, k: torch.full_like(t, float("inf"))}, ABOUT) for k, t in START.items()},
    **{f"{k} float64": ({**START, k: t.double()}, ABOUT) for k, t in START.items()},
    **{f"{k} half": ({**START, k: t.half()}, ABOUT) for k, t in START.items()},
    **{f"{k} bfloat16": ({**START, k: t.bfloat16()}, ABOUT) for k, t in START.items()},
    **{f"{k} int64": ({**START, k: t.long()}, ABOUT) for k, t in START.items()},
    **{f"{k} bool": ({**START, k: t.bool()}, ABOUT) for k, t in START.items()},
    **{f"{k} 0-d": ({**START, k: t.flatten()[0].clone()}, ABOUT) for k, t in START.items()},
    **{f"{k} [1]": ({**START, k: t.flatten()[:1].clone()}, ABOUT) for k, t in START.items()},
    **{f"{k} twice": ({**START, k: torch.cat([t, t])}, ABOUT) for k, t in START.items()},
    **{f"no {k}": ({n: t for n, t in START.items() if n != k}, ABOUT) for k in START if k != "mean"},
    "down transposed": ({**START, "down": torch.zeros(H, R)}, ABOUT),
    "an unknown tensor": ({**START, "more": torch.ones(1)}, ABOUT),
    "no metadata": (START, {}),
    "another format": (START, {**ABOUT, "format": "esamp-distiller-start-2"}),
    "another target": (START, {**ABOUT, "target": "choice"}),
    "a head of another model": ({**START, "head": torch.zeros(16, 16)}, ABOUT),
    "a head of bool": ({**START, "head": torch.zeros(16, 16).bool()}, ABOUT),
    "a head of NaN": ({**START, "head": torch.full((16, 16), float("nan"))}, ABOUT),
    "a head 0-d": ({**START, "head": torch.ones(())}, ABOUT),
    **{
        f"{name} {value}": (START, {**ABOUT, name: value})
        for name in ("error", "baseline", "deep_scale")
        for value in ("nan", "inf", "1e999", "-1", "..", "", "0x1", "1" * 5000)
    },
    "baseline 0": (START, {**ABOUT, "baseline": "0"}),
    "deep_scale 0": (START, {**ABOUT, "deep_scale": "0.0"}),
    "no error": (START, {k: v for k, v in ABOUT.items() if k != "error"}),
}


@pytest.mark.parametrize("name", BROKEN_STARTS)
def test_a_broken_start_is_refused_when_the_explorer_is_made(name: str, tmp_path: Path) -> None:
    tensors, metadata = BROKEN_STARTS[name]
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "start", metadata=metadata)
    config = DistillerConfig(rank=R, start=str(tmp_path / "start"))
    message = refused(lambda: make(config))
    assert "start" in message


def test_a_good_start_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "start"
    for tensors in (START, {k: t for k, t in START.items() if k != "mean"}):
        save_file(tensors, path, metadata=ABOUT)
        explorer = make(DistillerConfig(rank=R, start=str(path)))
        with explorer.open(["g"] * 2, PARAMS) as rows:
            for seed in range(3):
                assert step(explorer, rows, seed).status.eq(0).all()
