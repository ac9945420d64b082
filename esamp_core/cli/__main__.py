"""``python -m esamp_core.cli`` is ``esamp``."""

from esamp_core.cli import main

main()
