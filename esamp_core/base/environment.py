"""What this process runs on: versions, processor, GPU, commit.  Every record of a measurement takes them from here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("python", "torch", "triton", "transformers", "vllm")


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of these packages that are installed; "python" is one.  Default ``PACKAGES``."""
    found: dict[str, str] = {}
    for package in packages or PACKAGES:
        for name in (package, f"{package}-cpu"):  # vLLM's build for CPUs has a name of its own
            try:
                version = platform.python_version() if name == "python" else importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            found.setdefault(package, version)
    return found


def processor() -> str:
    """The processor's name: Linux knows a better one than the platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores and torch's threads; with CUDA also the GPU, its memory, the driver and torch's CUDA."""
    result: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        result |= {
            "gpu": p.name,
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30),
            "driver": driver or "unknown",
            "cuda": torch.version.cuda,
        }
    return result


def commit(folder: Path) -> str:
    """The commit of the tree in this folder, 12 digits, "+" where it has changes.

    Where ESAMP_COMMIT says something, that: whoever sends a tree away knows what it is, and the copy may hold a .git of
    another state.  "unknown" without either.
    """
    if told := os.environ.get("ESAMP_COMMIT"):
        return told
    head = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changes else "")


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
