"""Tile sizes per GPU generation, keyed by V, H, C, dtype and never by the number of rows.

A row's result must be the same bits whatever its batchmates are, so nothing here may look at R, and there is no
autotuning at run time.  The numbers are what `make check-kernels` compiles without spills; they were chosen from
bytes and registers, not from measurements.
"""

from dataclasses import dataclass

import torch
import triton

SMALLEST_BLOCK = 128
MOST_BLOCKS = 4096  # select holds all block maxima of a row at once
LARGEST_BLOCK = 4096


@dataclass(frozen=True)
class Config:
    """scan_*: block_max.  select_*: select, blocks read at a time.  sort_warps: finalise, children.  beyond_*: beyond,
    elements.  score_*: candidates and hidden units per tile.  tail_*: elements per program.
    draw_warps: reweight and draw.
    distiller_*: a tile of weights is hidden x ranks; hidden units per program where H is split; wide: of a row.
    max_registers: of a thread of select, beyond and children, 0 where the compiler takes no such bound."""

    scan_blocks: int = 32
    scan_warps: int = 8
    select_elements: int = 4096
    select_warps: int = 8
    sort_warps: int = 4
    beyond_elements: int = 2048
    beyond_warps: int = 8
    score_candidates: int = 8
    score_hidden: int = 512
    score_warps: int = 4
    tail_elements: int = 2048
    tail_warps: int = 4
    draw_warps: int = 4
    distiller_hidden: int = 32
    distiller_ranks: int = 64
    distiller_split: int = 128
    distiller_warps: int = 4
    distiller_stages: int = 3
    distiller_wide: int = 4096
    distiller_row_warps: int = 8
    max_registers: int = 255

    @property
    def register_bound(self) -> dict[str, int]:
        """A launch's option.  Unless a bound is said, some versions of ptxas give a thread fewer registers than it
        could have, to hold more programs at once, and spill: 128, or even 72."""
        return {"maxnreg": self.max_registers} if self.max_registers else {}


# (least V, least H, least C, itemsize of the logits or None for any) -> changes to the defaults.  All matching rules
# apply, in this order.  The Distiller asks with V = C = 0 and the itemsize of its weights.
Rule = tuple[tuple[int, int, int, int | None], dict[str, int]]
COMMON: tuple[Rule, ...] = (
    ((0, 0, 0, 4), {"scan_blocks": 16}),
    ((0, 0, 257, None), {"sort_warps": 8, "beyond_elements": 4096, "beyond_warps": 8}),
)
TABLE: dict[str, tuple[Rule, ...]] = {
    "sm_80": COMMON,
    "sm_90": COMMON,
    "sm_100": COMMON,
    # A wave's lane masks live in scalar registers, two each: smaller tiles and fewer stages, or they spill.
    "gfx942": (
        *COMMON,
        (
            (0, 0, 0, None),
            {"select_elements": 2048, "beyond_elements": 1024, "distiller_stages": 2, "max_registers": 0},
        ),
    ),
}


def config_for(generation: str, vocab: int, hidden: int, width: int, itemsize: int) -> Config:
    """The configuration of one generation; an unknown one gets sm_90's."""
    chosen: dict[str, int] = {}
    for (least_vocab, least_hidden, least_width, size), changes in TABLE.get(generation, TABLE["sm_90"]):
        if vocab >= least_vocab and hidden >= least_hidden and width >= least_width and size in (None, itemsize):
            chosen.update(changes)
    return Config(**chosen)


def generation_of(device: torch.device) -> str:
    if device.type == "meta":  # kernels are compiled and not launched: for the driver's target
        target = triton.runtime.driver.active.get_current_target()
        return _generation(target.arch) if target.backend == "cuda" else str(target.arch)
    if device.type != "cuda":
        return "sm_90"  # the interpreter
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return _generation(10 * major + minor)


def _generation(capability: int) -> str:
    """The newest in the table that is not newer than a GPU of this compute capability; else the oldest."""
    known = sorted(int(name[3:]) for name in TABLE if name.startswith("sm_"))
    below = [number for number in known if number <= capability]
    return f"sm_{below[-1] if below else known[0]}"


def power_of_2(n: int, least: int = 1) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Layout:
    """How a row of V logits is cut: blocks whose maxima are kept, and splits, one program of block_max each."""

    block: int  # logits per block
    blocks: int  # per row
    split_blocks: int  # blocks per program of block_max
    splits: int  # per row

    @staticmethod
    def of(vocab: int, config: Config) -> "Layout":
        block = max(SMALLEST_BLOCK, power_of_2(-(-vocab // MOST_BLOCKS)))
        assert block <= LARGEST_BLOCK, f"a vocabulary of {vocab} is more than {MOST_BLOCKS * LARGEST_BLOCK}"
        blocks = -(-vocab // block)
        split_blocks = max(1, config.scan_blocks * SMALLEST_BLOCK // block)
        return Layout(block, blocks, split_blocks, -(-blocks // split_blocks))


def sort_width(vocab: int, width: int) -> int:
    """How many survivors are sorted: the candidates and as many again for ties and neighbours, or the vocabulary."""
    return power_of_2(min(2 * width, vocab), 32)
