"""Reading the fields of others' ``config.json`` strictly: what is missing or not computed here is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.errors import ModelError

# field → (what an absent one means, the values that can be computed)
Allowed = Mapping[str, tuple[Any, tuple[Any, ...]]]


def require(raw: Mapping[str, Any], fields: Allowed, where: str) -> None:
    """ModelError where a config's field has a value that another class would have to compute."""
    for field, (default, allowed) in fields.items():
        value = raw.get(field, default)
        if value not in allowed:
            raise ModelError(
                f"{where}: {field} is {value!r}, which is not computed here (only "
                f"{' or '.join(repr(each) for each in allowed)})"
            )


def rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain rotation with the config's base; newer configs state it in ``rope_parameters``."""
    stated = raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": raw.get("rope_theta")}
    if stated.get("rope_type", "default") != "default" or not isinstance(stated.get("rope_theta"), int | float):
        raise ModelError(f"{where}: rotary positions {stated!r} are not computed here (only default, with rope_theta)")
    return {"rope_type": "default", "rope_theta": float(stated["rope_theta"])}


def stated(raw: Mapping[str, Any], field: str, where: str) -> Any:
    """A field that no default may stand in for."""
    if raw.get(field) is None:
        raise ModelError(f"{where}: {field} is missing")
    return raw[field]


def count(raw: Mapping[str, Any], field: str, where: str) -> int:
    """A size."""
    value = stated(raw, field, where)
    if type(value) is not int or value < 1:
        raise ModelError(f"{where}: {field} is {value!r}, expected an integer ≥ 1")
    return value
