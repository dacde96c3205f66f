"""``accel methods``: what can be passed as a method, and each one's ``-o`` options with defaults and help.

Reads the table in ``accel.methods`` and the methods' options dataclasses; runs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from accel.cli.common import emit, json_option, table


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """Show the methods, the axis each plugs into, and their options for -o KEY=VALUE."""
    from accel.methods import TABLE

    document = [
        {"name": info.name, "axis": info.axis, "help": info.help, "options": describe_options(info.load_options())}
        for info in TABLE.values()
    ]
    emit(document, _as_text(document), as_json=as_json)


def describe_options(options: type | None) -> list[dict[str, Any]]:
    """Name, type, default and help of each field of an options dataclass."""
    if options is None:
        return []
    return [
        {
            "name": field.name,
            "type": str(field.type),
            "default": _default(field),
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(options)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required"


def _as_text(document: list[dict[str, Any]]) -> str:
    parts = [table(("METHOD", "AXIS", "WHAT IT DOES"), [(row["name"], row["axis"], row["help"]) for row in document])]
    for row in document:
        if row["options"]:
            options = [(f"  {o['name']}", as_argument(o["default"]), o["help"]) for o in row["options"]]
            parts.append(table((f"{row['name']} options", "DEFAULT", ""), options))
    return "\n\n".join(parts)


def as_argument(value: Any) -> str:
    """A default the way ``-o`` would take it: none, true, ``lin,0.5``."""
    if isinstance(value, tuple):
        return ",".join(as_argument(part) for part in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
