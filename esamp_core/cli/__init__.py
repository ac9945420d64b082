"""The command line: ``esamp demo``, ``generate``, ``calibrate``, ``report``, ``doctor``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point."""
    try:
        from esamp_core.cli.app import run

        run()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "transformers"):
            raise
        print(f"esamp: error: the command line needs {error.name}: pip install 'esamp-core[cli]'", file=sys.stderr)
        sys.exit(2)
