"""`accel.json`: what an artifact is, what it was made for, how, and which files belong to it.

Reads and writes the text strictly; knows nothing of folders, tensors, or what a kind does with its parameters.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.errors import ArtifactError

MANIFEST_NAME = "accel.json"
FORMAT_VERSION = 1
KINDS = ("cartridge", "demos", "dparallel", "draft", "lawcat", "model")
# those that any model may use: whoever they came from need not be known by digest
FREE_OF_WEIGHTS = ("demos",)
# data only: nothing here is ever executed or unpickled by a reader
FILE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".txt", ".jinja", ".md")

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class BaseModel:
    """The model an artifact was distilled for, by digest: a name alone proves nothing.

    Of demonstrations it is the model whose answers they are; where that is an endpoint it has no digest, and no
    vocabulary (0).
    """

    name: str
    revision: str | None
    config_digest: str | None
    # None where the base model has no tokenizer of its own
    tokenizer_digest: str | None
    vocab_size: int


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of `accel.json`.

    ``parameters`` and ``measured`` are the kind's own JSON objects. ``made`` says how the artifact came about; the
    keys in ``MADE_TYPES`` have fixed types there, others are free.
    """

    kind: str
    base: BaseModel
    parameters: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Sorted and indented, so that the same content is the same bytes."""
        try:
            return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{MANIFEST_NAME} holds a value that JSON cannot: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check every field; ``where`` opens each message."""
        try:
            raw = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not valid JSON: {' '.join(str(error).split())}") from error
        return _manifest(raw, where)


def check_file_name(name: str) -> str | None:
    """What is wrong with ``name`` as a file of an artifact, or None: relative, no '..', plain characters, data only."""
    if not _FILE_NAME.fullmatch(name) or len(name) > 200:
        return "is not a safe relative name (letters, digits, '.', '_', '-', with '/' between folders)"
    if name == MANIFEST_NAME:
        return "is the manifest itself"
    if not name.endswith(FILE_SUFFIXES):
        return f"is not a kind of file an artifact may hold ({', '.join(FILE_SUFFIXES)})"
    return None


# -- one checker per JSON type: value, path of the field -> the value, or ArtifactError naming the path --


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong(path: str, value: Any, wanted: str) -> ArtifactError:
    return ArtifactError(f"{path}: expected {wanted}, got {_show(value)}")


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(path, value, "a non-empty string")
    return value


def _count(value: Any, path: str) -> int:
    if type(value) is not int or value < 0:  # bool is an int and not a count
        raise _wrong(path, value, "an integer ≥ 0")
    return value


def _digest(value: Any, path: str) -> str:
    if not isinstance(value, str) or not _HEX_DIGEST.fullmatch(value):
        raise _wrong(path, value, "a sha256 of 64 lower-case hex digits")
    return value


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, value, "an object")
    return value


def _integer(value: Any, path: str) -> int:
    if type(value) is not int:
        raise _wrong(path, value, "an integer")
    return value


def _numbers(value: Any, path: str) -> list[float]:
    if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
        raise _wrong(path, value, "a list of numbers")
    return value


def _or_null(check: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, path: None if value is None else check(value, path)


MADE_TYPES: Mapping[str, Callable[[Any, str], Any]] = {
    "command": _or_null(_string),
    "commit": _or_null(_string),
    "data_digest": _or_null(_digest),
    "seed": _or_null(_integer),
    "losses": _or_null(_numbers),
}


def _made(value: Any, path: str) -> dict[str, Any]:
    for key, item in _object(value, path).items():
        if key in MADE_TYPES:
            MADE_TYPES[key](item, f"{path}.{key}")
    return value


def _fields(value: Any, path: str, checks: Mapping[str, Callable[[Any, str], Any]]) -> dict[str, Any]:
    """Exactly the fields of ``checks``, each checked; the path of a field is written base.vocab_size."""
    raw = _object(value, path or "(the whole file)")
    prefix = f"{path}." if path else ""
    for name in raw:
        if name not in checks:
            raise ArtifactError(f"{prefix}{_show(name).strip(chr(39))}: unknown field, known are {', '.join(checks)}")
    for name in checks:
        if name not in raw:
            raise ArtifactError(f"{prefix}{name}: missing")
    return {name: check(raw[name], prefix + name) for name, check in checks.items()}


def _base(value: Any, path: str) -> BaseModel:
    checks = {
        "name": _string,
        "revision": _or_null(_string),
        "config_digest": _or_null(_digest),
        "tokenizer_digest": _or_null(_digest),
        "vocab_size": _count,
    }
    return BaseModel(**_fields(value, path, checks))


def _files(value: Any, path: str) -> dict[str, FileEntry]:
    entries = {}
    for name, raw in _object(value, path).items():
        if (problem := check_file_name(name)) is not None:
            raise ArtifactError(f"{path}: {_show(name)} {problem}")
        entries[name] = FileEntry(**_fields(raw, f"{path}[{name}]", {"sha256": _digest, "bytes": _count}))
    return entries


def _kind(value: Any, path: str) -> str:
    if value not in KINDS:
        raise _wrong(path, value, f"one of {', '.join(KINDS)}")
    return value


def _manifest(raw: Any, where: str) -> Manifest:
    try:
        # before anything else: a newer format may differ in every other field
        version = _integer(_object(raw, "(the whole file)").get("format_version"), "format_version")
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"format_version: the artifact has {version}, this accel reads up to {FORMAT_VERSION}: upgrade accel"
            )
        if version < 1:
            raise _wrong("format_version", version, f"1 to {FORMAT_VERSION}")
        checks = {
            "format_version": _integer,
            "kind": _kind,
            "base": _base,
            "parameters": _object,
            "made": _made,
            "measured": _object,
            "files": _files,
        }
        manifest = Manifest(**_fields(raw, "", checks))
        if manifest.base.config_digest is None and manifest.kind not in FREE_OF_WEIGHTS:
            raise _wrong("base.config_digest", None, "a sha256 of 64 lower-case hex digits")
        return manifest
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_show(twice)} appears twice in one object")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
