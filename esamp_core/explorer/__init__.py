"""The stateful face: Explorer, the rows of a running batch, and the Distillers that learn beside it."""

from esamp_core.explorer.bank import GroupStats
from esamp_core.explorer.explorer import Explorer
from esamp_core.explorer.rows import Rows
from esamp_core.explorer.start import check_start

__all__ = ["Explorer", "GroupStats", "Rows", "check_start"]
