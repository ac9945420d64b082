"""How siblings that depend on each other begin: stratified ones with codes, distinct ones as one tree."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from esamp_core.base.config import SamplingParams
from esamp_core.base.errors import ArgumentError
from esamp_core.base.seeds import root_noise, stratified_codes
from esamp_core.base.tensors import Tree


def members_of(wanted: Iterable[bool], sets: Sequence[Hashable | None]) -> list[list[int]]:
    """Row numbers of each set, of the rows that are wanted; a row whose set is None is one by itself."""
    found: dict[Hashable, list[int]] = {}
    for i, (want, name) in enumerate(zip(wanted, sets, strict=True)):
        if want:
            found.setdefault(i if name is None else (name,), []).append(i)
    return list(found.values())


def starting_codes(params: Sequence[SamplingParams], sets: Sequence[Hashable | None], row_seed: Tensor) -> Tensor:
    """Codes to begin with, float64 [R, 2]; negative in rows that are not stratified."""
    members = members_of((p.stratified for p in params), sets)
    places = torch.tensor(
        [(i, rows[0], at, len(rows)) for rows in members for at, i in enumerate(rows)],
        dtype=torch.int64,
        device=row_seed.device,
    ).view(-1, 4)
    row, first, ordinal, siblings = places.T
    codes = torch.full((len(params), 2), -1.0, dtype=torch.float64, device=row_seed.device)
    return codes.index_copy(0, row, stratified_codes(row_seed[first], ordinal, siblings))


def distinct_sets(params: Sequence[SamplingParams], sets: Sequence[Hashable | None]) -> list[list[int]]:
    """Row numbers of each set of distinct siblings, two at least.  Raises ArgumentError."""
    found = [rows for rows in members_of((bool(p.distinct) for p in params), sets) if len(rows) > 1]
    for rows in found:
        if len({(p.temperature, p.top_k, p.top_p, p.min_p, p.beta) for p in (params[i] for i in rows)}) > 1:
            raise ArgumentError("params must be equal, but for seed, in all rows of a set of distinct siblings")
    return found


def starting_tree(distinct: Sequence[Sequence[int]], row_seed: Tensor) -> tuple[Tree, Tensor]:
    """All of a set begins in its first row.  Second, bool [R]: which rows hold something."""
    waiting = [row for rows in distinct for row in rows[1:]]
    here = torch.ones(len(row_seed), dtype=torch.bool, device=row_seed.device)
    here = here.index_fill(0, torch.tensor(waiting, dtype=torch.int64, device=row_seed.device), False)
    noise = root_noise(row_seed)
    return Tree(torch.zeros_like(noise), torch.where(here, noise, -torch.inf)), here


def families_of(family: Sequence[int], device: torch.device) -> Tensor | None:
    """int64 [P, W]: row numbers of each number >= 0, -1 where there are fewer; None where there are none."""
    rows = members_of((number >= 0 for number in family), family)
    if not rows:
        return None
    width = max(map(len, rows))
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows], dtype=torch.int64, device=device)
