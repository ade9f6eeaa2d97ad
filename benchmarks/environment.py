"""What a result was measured on: without it a number says nothing."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import ewa_kernels

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str | int]:
    """Commit, device and versions."""
    return {
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ewa_kernels": ewa_kernels.__version__,
    }


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
