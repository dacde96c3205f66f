"""What a user can get wrong. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class AccelError(Exception):
    """The parent of every error that accel raises on purpose; the CLI prints it as one line."""


class OptionError(AccelError, ValueError):
    """An option that does not exist or whose value is out of range."""


class ArtifactError(AccelError, ValueError):
    """An artifact that is missing, broken, unsafe, or made for another model."""


class IncompatibleError(AccelError, ValueError):
    """Two things that are each fine but cannot work together."""


class ModelError(AccelError, RuntimeError):
    """A model that cannot be found, verified or driven."""


def first_line(error: BaseException) -> str:
    """What another library's error says, as far as one line of ours can hold it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> str:
    """The one sentence for a name that is not in a table."""
    return f"unknown {kind} {given!r}: choose from {', '.join(sorted(allowed))}"
