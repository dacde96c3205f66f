"""Demonstrations and their vectors in one SQLite file that any number of processes and threads read and write.

Text and vectors are written by one transaction: what a reader sees is complete, and a writer that dies leaves nothing
of what it had begun. Knows tables; does not know what is similar to what, or how a text becomes a vector.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel.errors import AccelError, ArtifactError, first_line
from accel.methods.cascade.store.demonstration import FIELDS, STEP_FIELDS, TASK_FIELDS, Demonstration

# in the file's header, so that any tool can tell what it is
APPLICATION, FORMAT = 0x61636C64, 1
# a writer waits this long for another one to finish
BUSY_SECONDS = 60.0
# vectors on disk: normalised, two bytes a number, little-endian
VECTOR = np.dtype("<f2")

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE vectors (id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, vector BLOB NOT NULL);
CREATE TABLE demonstrations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, outcome REAL NOT NULL, episode TEXT, source TEXT,
    goal INTEGER REFERENCES vectors, plan INTEGER REFERENCES vectors, body TEXT NOT NULL
);
CREATE TABLE steps (
    demonstration INTEGER NOT NULL REFERENCES demonstrations ON DELETE CASCADE, position INTEGER NOT NULL,
    observation INTEGER REFERENCES vectors, reasoning INTEGER REFERENCES vectors,
    PRIMARY KEY (demonstration, position)
) WITHOUT ROWID;
CREATE INDEX by_episode ON demonstrations (episode);
"""


# connections that a process was born with: kept, so that nothing closes them
_INHERITED: list[sqlite3.Connection] = []


@dataclass(frozen=True)
class Rows:
    """Demonstrations behind a given one, in the order of their ids; vectors by id, None where there is no text."""

    # id, outcome, episode, source, goal, plan
    demonstrations: Sequence[tuple[int, float, str | None, str | None, int | None, int | None]]
    # demonstration, position, observation, reasoning
    steps: Sequence[tuple[int, int, int | None, int | None]]
    # how often demonstrations were taken out: a reader that knows another number has to begin again
    removals: int


class VectorGone(Exception):
    """A vector that was there when it was asked for was taken out before it was used."""


class Database:
    """The file. Connections are kept for the next one who needs one, and never used behind a fork."""

    def __init__(self, path: str | Path, embedder: str, digest: str, size: int, *, create: bool = True) -> None:
        """Open, or begin, a store of vectors of ``size`` numbers by the embedder of that name and digest."""
        self.path = Path(path).absolute()
        if not create and not self.path.is_file():
            raise ArtifactError(f"there is no store of demonstrations at {self.path}")
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        wanted = {"embedder": embedder, "digest": digest, "size": str(size)}
        self._prepare(wanted | {"removals": "0"})
        self._check(wanted)

    def close(self) -> None:
        """Give the file back; used again, the store opens it anew."""
        with self._lock:
            self._put_aside_inherited()
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def add(self, demonstrations: Sequence[Demonstration], vectors: Mapping[str, bytes]) -> int:
        """Write all that are new, together; returns how many were.

        ``vectors``: those of texts not known before. Where another text's has gone meanwhile, nothing is written and
        ``VectorGone`` raised.
        """
        with self._writing() as db:
            db.executemany(
                "INSERT OR IGNORE INTO vectors (digest, vector) VALUES (?, ?)",
                [(_text_digest(text), vector) for text, vector in vectors.items()],
            )
            return sum(self._add_one(db, each) for each in demonstrations)

    def remove(self, ids: Iterable[int]) -> int:
        """Take demonstrations out, and vectors that nothing else needs; returns how many there were."""
        with self._writing() as db:
            gone = db.executemany("DELETE FROM demonstrations WHERE id = ?", [(each,) for each in ids]).rowcount
            if gone > 0:
                used = " UNION ".join(
                    [f"SELECT {name} FROM demonstrations WHERE {name} IS NOT NULL" for name in TASK_FIELDS]
                    + [f"SELECT {name} FROM steps WHERE {name} IS NOT NULL" for name in STEP_FIELDS]
                )
                db.execute(f"DELETE FROM vectors WHERE id NOT IN ({used})")
                db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE name = 'removals'")
            return max(gone, 0)

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that have no vector yet, each once."""
        wanted = {_text_digest(text): text for text in texts}
        with self._connected() as db:
            for some in _chunks(list(wanted), 500):
                for (digest,) in db.execute(f"SELECT digest FROM vectors WHERE digest IN ({_marks(some)})", some):
                    del wanted[digest]
        return list(wanted.values())

    def rows(self, behind: int) -> Rows:
        """What was added behind the demonstration ``behind``, as one moment saw it."""
        with self._reading() as db:
            (removals,) = db.execute("SELECT value FROM meta WHERE name = 'removals'").fetchone()
            return Rows(
                db.execute(
                    "SELECT id, outcome, episode, source, goal, plan FROM demonstrations WHERE id > ? ORDER BY id",
                    (behind,),
                ).fetchall(),
                db.execute(
                    "SELECT demonstration, position, observation, reasoning FROM steps WHERE demonstration > ? "
                    "ORDER BY demonstration, position",
                    (behind,),
                ).fetchall(),
                int(removals),
            )

    def vectors(self, ids: Sequence[int], size: int) -> np.ndarray:
        """Vectors by id, fp16 [n, size]; zeros where one was taken out meanwhile."""
        out = np.zeros((len(ids), size), VECTOR)
        places = {each: index for index, each in enumerate(ids)}
        with self._connected() as db:
            for some in _chunks(list(ids), 500):
                for each, vector in db.execute(f"SELECT id, vector FROM vectors WHERE id IN ({_marks(some)})", some):
                    out[places[each]] = np.frombuffer(vector, VECTOR)
        return out

    def body(self, demonstration: int) -> str | None:
        """The line of JSON of one; None where it was taken out."""
        with self._connected() as db:
            row = db.execute("SELECT body FROM demonstrations WHERE id = ?", (demonstration,)).fetchone()
        return None if row is None else row[0]

    def bodies(self) -> Iterator[str]:
        """All of them as lines of JSON, oldest first, as one moment saw them."""
        with self._reading() as db:
            for (body,) in db.execute("SELECT body FROM demonstrations ORDER BY id"):
                yield body

    def count(self) -> int:
        with self._connected() as db:
            (number,) = db.execute("SELECT COUNT(*) FROM demonstrations").fetchone()
        return int(number)

    def ids(self, episode: str) -> list[int]:
        """The demonstrations of an episode."""
        with self._connected() as db:
            return [each for (each,) in db.execute("SELECT id FROM demonstrations WHERE episode = ?", (episode,))]

    def _prepare(self, meta: Mapping[str, str]) -> None:
        self._use_wal()
        with self._writing() as db:
            (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if tables:
                return
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {FORMAT}")

    def _use_wal(self) -> None:
        """Readers go on while somebody writes; kept in the file. SQLite does not wait for others who set it too."""
        last = time.monotonic() + BUSY_SECONDS
        with self._connected() as db:
            while db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                try:
                    db.execute("PRAGMA journal_mode = WAL")
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > last:
                        raise
                    time.sleep(0.01)

    def _check(self, wanted: Mapping[str, str]) -> None:
        with self._reading() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if application != APPLICATION:
                raise ArtifactError(f"{self.path} is a database, but no store of demonstrations: name another file")
            if version != FORMAT:
                raise ArtifactError(f"{self.path} is a store of format {version}, this accel reads {FORMAT}")
            found = dict(db.execute("SELECT name, value FROM meta"))
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ArtifactError(
                    f"{self.path} was made with {found.get('embedder')}, whose {name} is {found.get(name)}, this "
                    f"embedder's is {value}: use that embedder, or import the demonstrations into a new store"
                )

    def _add_one(self, db: sqlite3.Connection, demonstration: Demonstration) -> bool:
        """False where it is there already."""
        task = {name: _vector_id(db, demonstration.found_by(name)) for name in TASK_FIELDS}
        made = db.execute(
            "INSERT OR IGNORE INTO demonstrations (digest, outcome, episode, source, goal, plan, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                demonstration.digest(),
                demonstration.outcome,
                demonstration.episode,
                demonstration.source,
                task["goal"],
                task["plan"],
                demonstration.to_json(),
            ),
        )
        if made.rowcount < 1:
            return False
        db.executemany(
            "INSERT INTO steps (demonstration, position, observation, reasoning) VALUES (?, ?, ?, ?)",
            [
                (made.lastrowid, position, *(_vector_id(db, step.found_by(name)) for name in STEP_FIELDS))
                for position, step in enumerate(demonstration.steps)
            ],
        )
        return True

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._connected() as db:
            db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile; what goes wrong in it becomes one line."""
        try:
            db = self._take()
            try:
                yield db
            except sqlite3.Error:
                db.close()
                raise
            except BaseException:
                self._give(db)
                raise
            self._give(db)
        except sqlite3.OperationalError as error:
            raise AccelError(
                f"the store {self.path} cannot be used: {first_line(error)}; its folder must be there and writable, "
                f"and a writer waits {BUSY_SECONDS:.0f} s for others"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ArtifactError(f"{self.path} is no readable store of demonstrations: {first_line(error)}") from error

    def _take(self) -> sqlite3.Connection:
        with self._lock:
            self._put_aside_inherited()
            if self._idle:
                return self._idle.pop()
        # transactions are begun where they are needed; threads hand connections on, one at a time
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA foreign_keys = ON")
        # a commit survives the death of the process, and the file that of the machine
        db.execute("PRAGMA synchronous = NORMAL")
        return db

    def _put_aside_inherited(self) -> None:
        """Behind a fork: closing them here, or letting go of them, would disturb the process that they belong to."""
        if self._pid != os.getpid():
            _INHERITED.extend(self._idle)
            self._idle, self._pid = [], os.getpid()

    def _give(self, db: sqlite3.Connection) -> None:
        with self._lock:
            self._idle.append(db)


def texts_of(demonstration: Demonstration) -> Iterator[str]:
    """Every text that it is found by."""
    for name in FIELDS:
        for part in [demonstration] if name in TASK_FIELDS else demonstration.steps:
            if text := part.found_by(name):
                yield text


def _vector_id(db: sqlite3.Connection, text: str) -> int | None:
    if not text:
        return None
    row = db.execute("SELECT id FROM vectors WHERE digest = ?", (_text_digest(text),)).fetchone()
    if row is None:
        raise VectorGone
    return int(row[0])


def _text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
