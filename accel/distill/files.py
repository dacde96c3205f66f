"""Text files that people hand over, read whole; what cannot be read is refused in one line."""

from __future__ import annotations

from pathlib import Path

from accel.errors import OptionError


def read_text(path: Path, what: str) -> str:
    """The text (UTF-8) of a file; ``what`` stands before its name where it is refused, as in "the document"."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read {what} {path}: {error}") from error


def read_document(path: Path, what: str) -> str:
    """The same of a file that must not be empty."""
    text = read_text(path, what)
    if not text.strip():
        raise OptionError(f"{path}: {what} is empty")
    return text
