"""Where a measurement was made: versions, commit and machine, as plain JSON values."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from accel.artifacts.resolve import compiled_folder
from accel.kernels import row_step


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """What a reader needs to repeat a run on ``device``."""
    found: dict[str, Any] = {
        "accel": package_version("accel-runtime"),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": str(device) if device else "cpu",
        "compiled_kernels": compiled_kernels(),
    }
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit this file is at, with "+" when the work tree differs; None outside its own checkout."""
    here = Path(__file__).resolve()
    # an installed copy may lie inside somebody else's repository: ask whether git tracks this very file
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here.parent, "rev-parse", "--short=12", "HEAD")
    dirty = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if dirty else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def compiled_kernels() -> bool | str:
    """Whether llama-like models decode on this CPU with compiled kernels, or why not."""
    found = row_step.attempt(compiled_folder())
    return True if isinstance(found, row_step.Compiled) else str(found)


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
