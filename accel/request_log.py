"""Finished rows as token ids, one JSON line each, in a file of bounded size that several processes may share.

Knows files and which model's tokens they hold. Does not know who decodes, or what is made of the rows.

The first line names the format and the model. Each other line is a row: its prompt without padding, and its new tokens
with the one that ended it. Token ids, because text that is encoded again need not be the same tokens.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel.artifacts import BaseModel
from accel.errors import OptionError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("accel")

VERSION = 1
DEFAULT_MAX_BYTES = 100_000_000
# half of it holds a header with the longest name that a model can have
LEAST_MAX_BYTES = 2**16

# the key that makes a JSON object a header; its value is the version
_FORMAT = "accel_request_log"
_PROMPT, _NEW = "prompt_tokens", "new_tokens"


@dataclass(frozen=True)
class Logged:
    """A row that was read back: token ids, the model whose they are, and the file."""

    prompt: tuple[int, ...]
    new: tuple[int, ...]
    base: BaseModel
    path: str


class RequestLog:
    """Appends rows. Processes and threads may share a path, with the same ``max_bytes``.

    When the file would pass half of ``max_bytes`` it becomes ``older(path)``, replacing the one before, so that the
    most recent rows are kept. Holds no open file and no lock between two rows.
    """

    def __init__(self, path: str | os.PathLike[str], base: BaseModel, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise OptionError(f"log={path!r}: give the path of a file, or None for no log")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < LEAST_MAX_BYTES:
            raise OptionError(f"log_max_bytes={max_bytes!r}: must be a whole number of bytes ≥ {LEAST_MAX_BYTES}")
        if sys.platform == "win32":
            raise OptionError("log= needs file locks that this system does not have: leave it out")
        # where the data lies: rotation renames the file and not a link to it, and no later chdir moves it
        self.path = Path(os.path.realpath(path))
        self.base = base
        self.max_bytes = max_bytes
        self._half = max_bytes // 2
        self._header = _line({_FORMAT: VERSION, "base": asdict(base)})
        try:
            with self._locked() as file:
                self._check_size(self.path, self._ready(file))
            if (before := older(self.path)).exists():
                self._check_model(before, _first_line(before))
                self._check_size(before, before.stat().st_size)
        except OSError as error:
            problem = error.strerror or error
            raise OptionError(f"log={str(path)!r}: {problem}: name a file that can be written") from None

    def append(self, prompt: Sequence[int], new: Sequence[int]) -> str | None:
        """Write one row. Never raises for the file's sake: says why the row is not there, or None."""
        line = _line({_PROMPT: list(prompt), _NEW: list(new)})
        if len(self._header) + len(line) > self._half:
            return f"not logged: a row takes more than half of log_max_bytes={self.max_bytes}"
        try:
            while not self._fits(line):
                pass
        except OSError as error:
            return f"not logged: {self.path}: {error.strerror or error}"
        except OptionError as error:
            return f"not logged: {error}"
        return None

    def _fits(self, line: bytes) -> bool:
        """Write the line, or put the full file aside."""
        with self._locked() as file:
            end = self._ready(file)
            if end + len(line) <= self._half:
                _write(file, line, end)
                return True
            os.replace(self.path, older(self.path))
            return False

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file at ``path``, made where there is none, while nobody else writes to it."""
        while True:
            # prompts are private; an existing file keeps its permissions
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise OSError(errno.EINVAL, "is not a regular file")
                fcntl.flock(file, fcntl.LOCK_EX)
                # while this one waited another may have put the file aside, or somebody deleted it
                if _is_at(file, self.path):
                    yield file
                    return
            finally:
                os.close(file)

    def _ready(self, file: int) -> int:
        """The end of a file that begins with a header and ends with a whole line; both are seen to."""
        end = os.fstat(file).st_size
        # a header that was torn when it was written is written again
        if self._header.startswith(os.pread(file, len(self._header) - 1, 0)) and end < len(self._header):
            os.ftruncate(file, 0)
            _write(file, self._header, 0)
            return len(self._header)
        if os.pread(file, len(self._header), 0) != self._header:
            first, newline, _ = os.pread(file, LEAST_MAX_BYTES, 0).partition(b"\n")
            self._check_model(self.path, first if newline else b"")
        if os.pread(file, 1, end - 1) != b"\n":
            # who tore it is gone, or would hold the lock; another line behind it would be lost with it
            end = os.pread(file, end, 0).rindex(b"\n") + 1
            os.ftruncate(file, end)
            log.warning("%s: cut off its last line, which a writer had left unfinished", self.path)
        return end

    def _check_model(self, path: Path, first: bytes) -> None:
        written = _base_of(first, str(path))
        if written is None:
            raise OptionError(f"{path} is no request log of accel: name another file, or move this one away")
        if (what := _difference(written, self.base, same_model=True)) is not None:
            raise OptionError(
                f"{path} was written with {written.name}, whose {what[0]} is {what[1]}, this model's is {what[2]}: "
                "name another file, or move this one away"
            )

    def _check_size(self, path: Path, size: int) -> None:
        if size > self._half:
            raise OptionError(
                f"{path} has {size} bytes, more than half of log_max_bytes={self.max_bytes}: allow more, or name "
                "another file"
            )


def older(path: Path) -> Path:
    """Where the rows before those of ``path`` are: ``log.jsonl`` → ``log.1.jsonl``."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def is_log(path: Path) -> bool:
    """Whether a file begins with a header."""
    try:
        return _base_of(_first_line(path), str(path)) is not None
    except OSError:
        return False


def read(path: Path) -> Iterator[Logged]:
    """The rows of one file, in order; a last line that was never finished is left out with a warning.

    Anything else that is wrong is an error with file and line. Files written one behind another may be joined.
    """
    lines = path.read_bytes().split(b"\n")
    base: BaseModel | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            raw = json.loads(line)
        except ValueError:
            # a whole line has its end, and then something follows it here, if only an empty string
            if number == len(lines):
                log.warning("%s: left out, because its writer was stopped in the middle of the line", where)
                return
            raise OptionError(f"{where}: not JSON: the file is damaged; delete the line to use the others") from None
        header = _base_of(line, where) if isinstance(raw, dict) and _FORMAT in raw else None
        if header is None and base is None:
            raise OptionError(f"{where}: no header of a request log before the first row")
        base = header or base
        if header is None and base is not None:
            yield Logged(_tokens(raw, _PROMPT, base, where), _tokens(raw, _NEW, base, where), base, str(path))


def check_tokens(rows: Iterable[Logged], model: BaseModel) -> None:
    """Refuse rows whose token ids are not those of ``model``."""
    for path, base in {(row.path, row.base): None for row in rows}:
        if (what := _difference(base, model, same_model=False)) is not None:
            raise OptionError(
                f"{path} was written with {base.name}, whose {what[0]} is {what[1]}, {model.name} has {what[2]}: its "
                "token ids mean other texts there; use the model that it was written with"
            )


def _difference(a: BaseModel, b: BaseModel, *, same_model: bool) -> tuple[str, object, object] | None:
    """The first thing that tells two models apart, or two vocabularies: (its name, of a, of b)."""
    pairs: list[tuple[str, object, object]] = [("vocabulary size", a.vocab_size, b.vocab_size)]
    known = a.tokenizer_digest is not None and b.tokenizer_digest is not None
    if known:
        pairs.append(("tokenizer digest", a.tokenizer_digest, b.tokenizer_digest))
    # who attaches a model without its tokenizer leaves nothing else to know the vocabulary by
    if same_model or not known:
        pairs.append(("config digest", a.config_digest, b.config_digest))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _base_of(line: bytes, where: str) -> BaseModel | None:
    """The model that a header names; None where the line is no header."""
    try:
        raw = json.loads(line)
    except ValueError:
        return None
    if not isinstance(raw, dict) or _FORMAT not in raw:
        return None
    if raw[_FORMAT] != VERSION:
        raise OptionError(f"{where}: a request log of format {raw[_FORMAT]!r}, this accel reads {VERSION}")
    try:
        base = BaseModel(**raw["base"])
    except (KeyError, TypeError):
        base = None
    if base is None or type(base.vocab_size) is not int:
        raise OptionError(f"{where}: the header does not say which model's tokens follow")
    return base


def _tokens(raw: Any, name: str, base: BaseModel, where: str) -> tuple[int, ...]:
    ids = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < base.vocab_size for t in ids):
        raise OptionError(f"{where}: {name} must be a list of token ids below {base.vocab_size}, one or more")
    return tuple(ids)


def _first_line(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.readline(LEAST_MAX_BYTES)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _write(file: int, data: bytes, end: int) -> None:
    """All of ``data`` behind ``end``, or none of it."""
    try:
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file, end)
        raise
