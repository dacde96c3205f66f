"""``accel env``: what a bug report or a benchmark table must name about the machine.

Knows where each figure comes from; measures nothing.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import click

from accel.cli.common import emit, json_option
from accel.cli.main import accel_version


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, device, processor, memory and the folders that are read and written."""
    document = describe_environment()
    emit(document, _as_text(document), as_json=as_json)


def describe_environment() -> dict[str, dict[str, Any]]:
    """Section → name → value, ready for JSON."""
    return {"versions": _versions(), "machine": _machine(), "device": _device(), "models": _models()}


def _versions() -> dict[str, str | None]:
    from accel.bench.environment import package_version

    libraries = ("torch", "transformers", "triton", "numpy", "safetensors")
    return {
        "accel": accel_version(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in libraries},
    }


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    from accel.bench.environment import compiled_kernels, cpu_name

    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        # the widest vector instructions that torch's own kernels use here
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "compiled_kernels": compiled_kernels(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
    }


def _device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"name": "cpu", "torch_built_for_cuda": torch.version.cuda}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "torch_built_for_cuda": torch.version.cuda,
        "count": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _models() -> dict[str, Any]:
    from accel.artifacts import cache_folder, default_roots
    from accel.models.aliases import DEFAULT_MODEL

    return {
        "default_model": DEFAULT_MODEL,
        "cache": str(cache_folder()),
        "artifact_folders": [str(folder) for folder in default_roots()],
    }


def _as_text(document: dict[str, dict[str, Any]]) -> str:
    width = max(len(name) for section in document.values() for name in section)
    parts = []
    for title, section in document.items():
        parts.append("\n".join([title, *(f"  {name:<{width}}  {_shown(name, v)}" for name, v in section.items())]))
    return "\n\n".join(parts)


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
