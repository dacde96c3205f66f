"""Foreign files with the keys and values of a prefix: what they hold, read without running anything in them.

Every reader is a function of what the file holds and returns a ``Foreign``. None knows the model that the file was made
for, nor writes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.artifacts.foreign_files import MAX_BYTES, load_plain
from accel.errors import ArtifactError, OptionError, unknown_name
from accel.methods.cartridge.convert import attention_matching, hazy, kvpress
from accel.methods.cartridge.convert.foreign import Foreign

__all__ = ["FORMATS", "MAX_BYTES", "Foreign", "Reader", "read"]


@dataclass(frozen=True)
class Reader:
    """One row of the table: whether loaded content looks like the format, and (content, source) → Foreign."""

    recognises: Callable[[Any], bool]
    convert: Callable[[Any, str], Foreign]
    help: str


FORMATS: dict[str, Reader] = {
    "hazy": Reader(hazy.recognises, hazy.convert, "cartridges of HazyResearch/cartridges, layouts v1 and v2"),
    "attention-matching": Reader(
        attention_matching.recognises, attention_matching.convert, "(C1, beta, C2) a layer, of adamzweiger/compaction"
    ),
    "kvpress": Reader(kvpress.recognises, kvpress.convert, "a DynamicCache shortened by NVIDIA/kvpress"),
}


def read(path: str | Path, format: str = "auto", *, max_bytes: int = MAX_BYTES) -> Foreign:
    """Read a foreign file; "auto" goes by what it holds. ``details["format"]`` of the result names the format."""
    if format != "auto" and format not in FORMATS:
        raise OptionError(unknown_name("format", format, ["auto", *FORMATS]))
    path = Path(path)
    content = (
        kvpress.load_safetensors(path, max_bytes) if path.suffix == ".safetensors" else load_plain(path, max_bytes)
    )
    name = _detect(content, path) if format == "auto" else format
    return FORMATS[name].convert(content, str(path))


def _detect(content: Any, path: Path) -> str:
    names = [name for name, reader in FORMATS.items() if reader.recognises(content)]
    if len(names) == 1:
        return names[0]
    found = f"a {type(content).__name__}"
    if isinstance(content, dict):
        found += f" with {', '.join(sorted(map(repr, content)))[:200] or 'no entries'}"
    if names:
        raise ArtifactError(f"{path}: holds {found}, which could be {' or '.join(names)}: say which format it is")
    raise ArtifactError(f"{path}: holds {found}, which is none of the known formats: {', '.join(sorted(FORMATS))}")
