"""Files of a benchmark: saving after every prompt, and going on where a killed run stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.bench.measure import Record
from accel.bench.summary import VERSION
from accel.errors import AccelError, OptionError


class ResultsError(AccelError, ValueError):
    """A results file that cannot be read, written or continued."""


def write(path: Path, text: str) -> None:
    """Replace ``path`` in one step, so that a run killed while saving leaves the previous file whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from error


def dump(document: Mapping[str, Any]) -> str:
    """JSON text of a document; times are rounded to microseconds, far below what a clock here can tell."""
    return json.dumps(_rounded(document), ensure_ascii=False, allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def load(path: Path) -> dict[str, Any]:
    """Read a document that ``dump`` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"cannot read results from {path}: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION or "settings" not in found:
        raise ResultsError(f"{path} is not a results file of this version of accel bench")
    return found


def resume(found: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> list[Record]:
    """The records of an unfinished run with the same ``settings``; anything else is refused with the differences."""
    before = found["settings"]
    differing = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in differing)
        raise OptionError(f"cannot resume {path}: {changes}. Repeat the first run's options or use another --output")
    if "records" not in found:
        raise OptionError(f"{path} is complete: there is nothing to resume; leave out --resume to measure again")
    names = {field.name for field in dataclasses.fields(Record)}
    try:
        return [Record(**{key: row[key] for key in names}) for row in found["records"]]
    except (KeyError, TypeError) as error:
        raise ResultsError(f"{path}: its records cannot be read ({error!r})") from error
