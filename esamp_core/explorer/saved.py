"""What a bank's Distillers are outside of it: a dictionary, and a file.  Nothing is taken from either unchecked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from esamp_core.base.checks import check_hashables, require
from esamp_core.base.config import DistillerConfig, Recipe
from esamp_core.base.errors import ArgumentError
from esamp_core.base.files import read_safetensors, write_safetensors
from esamp_core.base.schema import INT64, POSITIVE, Kept, Within, check_tensors, parse, read_json
from esamp_core.base.tensors import Head
from esamp_core.explorer.bank import DistillerBank
from esamp_core.explorer.ledger import LARGEST_INDEX, Lease
from esamp_core.explorer.start import head_sample, same_head

FORMAT = "esamp-state-1"


@dataclass(frozen=True)
class SavedGroup:
    """A group with a Distiller.  group: any hashable; in a file a text or an integer."""

    group: Any
    next_sample_index: Annotated[int, Within(0, LARGEST_INDEX)]
    last_used: Annotated[int, Within(0, LARGEST_INDEX)]


@dataclass(frozen=True)
class SavedConfig:
    """What of a DistillerConfig says how weights are laid out."""

    recipe: Recipe
    rank: int
    target: str
    weight_dtype: str
    momentum: Annotated[float, Within(0.0, 1.0)]

    @staticmethod
    def of(config: DistillerConfig) -> SavedConfig:
        dtype, momentum = str(config.weight_dtype), float(config.momentum)
        return SavedConfig(config.recipe, config.rank, config.target, dtype, momentum)

    @property
    def layout(self) -> tuple[object, ...]:
        return self.recipe, self.rank, self.target, self.weight_dtype, self.momentum > 0


class Saved(NamedTuple):
    """A state that fits."""

    groups: list[SavedGroup]
    scale: Tensor  # float32 [], NaN before the first lesson
    tensors: dict[str, Tensor]  # a row per group


def state_dict(bank: DistillerBank, leases: Mapping[Hashable, tuple[Lease, int]], head: Head | None) -> dict[str, Any]:
    """Everything a resumed run needs: one row per leased group in every tensor, and the groups' names.

    head: the model's, of which some numbers are kept.
    """
    slots = torch.tensor([lease.slot for lease, _ in leases.values()], dtype=torch.long, device="cpu")
    return {
        "groups": [
            {"group": group, "next_sample_index": lease.next_sample_index, "last_used": lease.last_used}
            for group, (lease, _) in leases.items()
        ],
        "config": asdict(SavedConfig.of(bank.config)),
        "scale": bank.scale.clone(),
        "tensors": {name: t[slots.to(t.device)] for name, t in bank.named_tensors().items()},
        "head": None if head is None else head_sample(head.weight),
    }


def fitting(bank: DistillerBank, head: Head | None, saved: Any, where: str = "state") -> Saved:
    """What ``state_dict`` has given, checked against this bank and this model.  Raises ArgumentError."""
    require(isinstance(saved, Mapping), where, "be a dictionary that state_dict returned", type(saved).__name__)
    parts: tuple[tuple[str, type], ...] = (("groups", list), ("config", dict), ("scale", Tensor), ("tensors", Mapping))
    for name, kind in parts:
        require(isinstance(saved.get(name), kind), f"{where}.{name}", f"be a {kind.__name__}", saved.get(name))
    mine, theirs = SavedConfig.of(bank.config), parse(SavedConfig, saved["config"], f"{where}.config")
    if mine.layout != theirs.layout:
        raise ArgumentError(f"{where} must fit config {asdict(mine)}, got one saved with {asdict(theirs)}")
    groups = parse(list[SavedGroup], saved["groups"], f"{where}.groups")
    names = check_hashables(f"{where}.groups", [group.group for group in groups])
    wrong = [name for name, times in Counter(names).items() if times > 1 or name is None]
    require(not wrong, f"{where}.groups", "name each group once", wrong[:8])
    tensors = {name: t for name, t in saved["tensors"].items() if bank.config.gated or not name.startswith("gauge.")}
    if bank.config.gated and not any(name.startswith("gauge.") for name in tensors):
        raise ArgumentError(f"{where} must hold the gate's tensors (gauge.*), got one saved with gate=False")
    wanted = {
        name: Kept((len(names), *t.shape[1:]), t.dtype, _range_of(name)) for name, t in bank.named_tensors().items()
    }
    check_tensors(tensors, wanted, where)
    check_tensors(
        {"scale": saved["scale"]}, {"scale": Kept((), torch.float32, Within(POSITIVE.least, nan=True))}, where
    )
    _check_known(saved["scale"], tensors, where)
    known = saved.get("head")
    if head is not None and known is not None and not same_head(known, head_sample(head.weight)):
        raise ArgumentError(f"{where} must be of this model, got one saved with another head")
    return Saved(groups, saved["scale"], tensors)


def _check_known(scale: Tensor, tensors: Mapping[str, Tensor], where: str) -> None:
    """What is NaN before lessons is known after them.  Raises ArgumentError."""
    taught = tensors["updates"] > 0
    known = {"loss": taught, "first_loss": taught}
    if "gauge.steps" in tensors:
        known |= dict.fromkeys(("gauge.error", "gauge.baseline"), tensors["gauge.steps"] > 1)
    unknown = [name for name, groups in known.items() if bool(torch.isnan(tensors[name])[groups].any())]
    if bool(torch.isnan(scale)) and bool((taught | (tensors["nonfinite"] > 0)).any()):
        unknown.append("scale")
    require(not unknown, where, "know after lessons what is not known before them", ", ".join(unknown) + " NaN")


def _range_of(name: str) -> Within:
    """Of the numbers in a named tensor of the bank."""
    if name == "gauge.trust":
        return Within(0.0, 1.0)
    if name in ("loss", "first_loss", "gauge.error", "gauge.baseline"):
        return Within(0.0, nan=True)  # before the first lessons
    return Within(0) if name in ("updates", "nonfinite", "gauge.steps") else Within()


def _is_name(group: object) -> bool:
    """Whether a group can be named in a file."""
    return isinstance(group, str) or (isinstance(group, int) and not isinstance(group, bool) and group in INT64)


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """One safetensors file, whole or not at all.  Raises ArgumentError for groups without a name in it."""
    for entry in state["groups"]:
        require(_is_name(entry["group"]), "group", "be a string or an integer to be saved", entry["group"])
    tensors = {**state["tensors"], "scale": state["scale"]}
    if state["head"] is not None:
        tensors["head"] = state["head"]
    write_safetensors(path, tensors, {"format": FORMAT} | {k: json.dumps(state[k]) for k in ("groups", "config")})


def read_state(path: str | Path) -> dict[str, Any]:
    """What ``write_state`` wrote, not yet checked against a bank.  Raises ArgumentError."""
    tensors, metadata = read_safetensors(path)
    require(metadata.get("format") == FORMAT, "path", "be a file written by Explorer.save", str(path))
    groups, config = (read_json(metadata.get(name, ""), f"{name} in {str(path)!r}") for name in ("groups", "config"))
    for group in parse(list[SavedGroup], groups, f"groups in {str(path)!r}"):
        require(_is_name(group.group), f"group in {str(path)!r}", "be a string or an integer", group.group)
    return {
        "groups": groups,
        "config": config,
        "scale": tensors.pop("scale", None),
        "head": tensors.pop("head", None),
        "tensors": tensors,
    }
