"""Faster language-model inference with artifacts distilled for your model. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.api import Model, attach, cartridges, cascade, detach, generate, load, stats
    from accel.artifacts import Artifact
    from accel.drafters.base import Ask, Draft, Drafter
    from accel.errors import AccelError
    from accel.methods.cartridge.cartridge import Cartridge
    from accel.methods.cartridge.store import CartridgeStore
    from accel.types import Stats

__version__ = "0.1.0"

_HOMES = {
    "attach": "accel.api",
    "cartridges": "accel.api",
    "cascade": "accel.api",
    "detach": "accel.api",
    "generate": "accel.api",
    "load": "accel.api",
    "stats": "accel.api",
    "Model": "accel.api",
    "Artifact": "accel.artifacts",
    "Ask": "accel.drafters.base",
    "Cartridge": "accel.methods.cartridge.cartridge",
    "CartridgeStore": "accel.methods.cartridge.store",
    "Draft": "accel.drafters.base",
    "Drafter": "accel.drafters.base",
    "AccelError": "accel.errors",
    "Stats": "accel.types",
}

__all__ = [
    "AccelError",
    "Artifact",
    "Ask",
    "Cartridge",
    "CartridgeStore",
    "Draft",
    "Drafter",
    "Model",
    "Stats",
    "attach",
    "cartridges",
    "cascade",
    "detach",
    "generate",
    "load",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'accel' has no attribute {name!r}: it offers {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
