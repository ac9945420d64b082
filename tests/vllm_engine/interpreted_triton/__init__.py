"""A Triton backend that does nothing, under the name "cpu": with TRITON_INTERPRET=1 nothing is ever compiled.

vLLM's V2 model runner starts only where Triton has an active driver.  ``install`` announces this one as an entry point.
"""

from __future__ import annotations

from pathlib import Path


def install(folder: Path) -> str:
    """Write the metadata of a package with this entry point; returns what PYTHONPATH needs."""
    info = folder / "interpreted_triton-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted-triton\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = interpreted_triton\n")
    return f"{folder}:{Path(__file__).parent.parent}"
