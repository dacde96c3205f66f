"""What the command groups share: options, the reading of ``-o KEY=VALUE``, progress and output.

Knows click and the shape of a command line; nothing of models or methods.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import click

from accel.errors import OptionError

Command = TypeVar("Command", bound=Callable[..., Any])

# the table's default (accel.models.aliases), repeated because reading it there would import torch
DEFAULT_MODEL = "smollm2-135m-instruct"
# the draft model that ships with accel for it
DEFAULT_DRAFT = "smollm2-135m-draft"
# and the cartridge
DEFAULT_CARTRIDGE = "smollm2-135m-handbook"
# the masked-diffusion model that ships with accel, and what it was distilled from
DEFAULT_MASKED = "arithmetic-5m-dparallel"
DEFAULT_MASKED_BASE = "arithmetic-5m-base"
# a small softmax model, and linear attention for it
DEFAULT_RETRIEVAL = "retrieval-1m"
DEFAULT_LAWCAT = "retrieval-1m-lawcat"

WORDS = {"true": True, "false": False, "none": None, "null": None}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_value(text: str) -> Any:
    """A literal from the command line: int, float, true / false / none, ``a,b`` a tuple, ``'5'`` the string 5."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if "," in text:
        return tuple(parse_value(part) for part in text.split(",") if part.strip())
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``["draft_length=5", "lenience=lin,0.5"]`` → ``{"draft_length": 5, "lenience": ("lin", 0.5)}``."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise OptionError(f"{pair!r} is not KEY=VALUE; write for example draft_length=5 or lenience=lin,0.5")
        if name in options:
            raise OptionError(f"option {name!r} is given twice; keep one")
        options[name] = parse_value(value)
    return options


def parse_bytes(text: str) -> int:
    """``2GB``, ``500 MB``, ``1.5g`` or a plain number → bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if found is None:
        raise OptionError(f"{text!r} is no size: write a number and a unit, as in 500MB or 2GB")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_layers(text: str) -> tuple[int, ...]:
    """``0,29`` → ``(0, 29)``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise OptionError(f"layers={text!r}: give the model's layers by number, as in 0,29")
    return tuple(int(part) for part in parts)


def _read_options(_context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    try:
        return parse_options(pairs)
    except OptionError as error:
        raise click.BadParameter(str(error)) from error


def model_option(command: Command) -> Command:
    """``-m/--model NAME`` → ``model: str | None``; None is the embedded default."""
    return click.option("-m", "--model", metavar="NAME", help="Model name or folder. [default: the embedded model]")(
        command
    )


def artifact_option(command: Command) -> Command:
    """``-a/--artifact NAME``, repeatable → ``artifact: tuple[str, ...]``."""
    return click.option("-a", "--artifact", multiple=True, metavar="NAME", help="Artifact to apply; repeatable.")(
        command
    )


def options_option(command: Command) -> Command:
    """``-o KEY=VALUE``, repeatable → ``options: dict[str, Any]``, already parsed."""
    return click.option(
        "-o",
        "--option",
        "options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_read_options,
        help="Option of the method, see `accel methods`; repeatable.",
    )(command)


def json_option(command: Command) -> Command:
    """``--json`` → ``as_json: bool``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def output_option(command: Command) -> Command:
    """``--output FILE`` → ``output: Path | None``."""
    return click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Also write the JSON document to FILE.",
    )(command)


def command_line(secret: str | None = None) -> str:
    """This call, as it may be typed again; ``secret`` is left out of it, because documents are passed on."""
    words = ["accel", *sys.argv[1:]]
    return shlex.join(word.replace(secret, "***") if secret else word for word in words)


def use_threads(threads: int | None) -> None:
    """Give torch so many CPU threads; None leaves it as it is."""
    if threads is not None:
        # it takes seconds to import: not for --help
        import torch

        torch.set_num_threads(threads)


def emit(document: Any, text: str, *, as_json: bool = False, output: Path | None = None) -> None:
    """Print ``text`` for people, or ``document`` for programs; ``output`` receives the document either way."""
    encoded = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(encoded + "\n", encoding="utf-8")
    click.echo(encoded if as_json else text)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Left-aligned columns under their header; the last column runs free."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


class Progress:
    """One line on stderr that rewrites itself, on a terminal only; elsewhere it stays silent.

    ``with Progress() as progress: progress("loading …")``. The line is wiped at the end.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._shown = self._stream.isatty()

    def __call__(self, message: str) -> None:
        if self._shown:
            # carriage return, then "erase to the end of the line"
            self._stream.write(f"\r\x1b[K{message}")
            self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self("")
