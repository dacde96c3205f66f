"""Cartridges that a model holds: added and removed at any time, counted while in use, kept within a byte budget.

Knows names, references and bytes. What a cartridge is made of, and which rows read it, is others' business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.artifacts import MANIFEST_NAME, Artifact, file_digest, open_artifact, resolve
from accel.errors import AccelError, ArtifactError, OptionError, unknown_name
from accel.methods.cartridge.cartridge import Cartridge


@dataclass
class _Entry:
    """``artifact``: where it is read again from; None for a live cartridge, which stays until it is removed."""

    artifact: Artifact | None
    # of the manifest, which holds the digests of everything else
    digest: str | None
    cartridge: Cartridge | None
    nbytes: int
    users: int = 0
    last_used: int = 0


class CartridgeStore:
    """The cartridges of one model, by name, each in memory at most once.

    ``load`` reads an artifact. With ``max_bytes`` those that nobody uses are dropped, the least recently used first,
    before a budget would be passed, and read and verified again when they are asked for.
    """

    def __init__(self, load: Callable[[Artifact], Cartridge], max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise OptionError(f"cartridge_max_bytes={max_bytes}: must be 1 or more, or None for no bound")
        self._load = load
        self.max_bytes = max_bytes
        self._entries: dict[str, _Entry] = {}
        # removed while in use: gone for new users, in memory until the last one leaves
        self._leaving: list[_Entry] = []
        self._clock = 0
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies of an attached model: everything but the lock, which belongs to the original."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """The names that can be used, in the order they were added."""
        with self._lock:
            return list(self._entries)

    def nbytes(self) -> int:
        """Bytes of keys and values in memory now, whoever uses them."""
        with self._lock:
            return sum(each.nbytes for each in self._resident())

    def add(self, given: str | Path | Artifact | Cartridge, name: str | None = None) -> str:
        """Make a cartridge usable and return its name: by default the artifact's folder name, or its own.

        Adding the same one again does nothing; another one under a taken name is refused.
        """
        artifact = open_artifact(resolve(given)) if isinstance(given, str | Path) else given
        name = name or (artifact.name if isinstance(artifact, Cartridge) else artifact.path.name)
        with self._lock:
            known = self._entries.get(name)
            if known is not None:
                if _is_same(known, artifact):
                    return name
                raise OptionError(f"cartridge {name!r} is there already: remove it first, or give another name=")
            if isinstance(artifact, Cartridge):
                self._make_room(artifact.nbytes(), name)
                self._entries[name] = _Entry(None, None, artifact, artifact.nbytes())
            else:
                entry = _Entry(artifact, _digest(artifact), None, 0)
                self._read(entry, name)
                self._entries[name] = entry
            self._touch(self._entries[name])
        return name

    def remove(self, name: str) -> None:
        """Forget a cartridge; rows that read it finish, then its memory is free."""
        with self._lock:
            entry = self._entries.pop(self._checked(name))
            if entry.users:
                self._leaving.append(entry)

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[list[Cartridge]]:
        """The named cartridges in the order given, held in memory until the context ends."""
        with self._lock:
            entries = [self._entries[self._checked(name)] for name in names]
            # counted first, so that reading one does not drop another
            for entry in entries:
                entry.users += 1
            try:
                for name, entry in zip(names, entries, strict=True):
                    if entry.cartridge is None:
                        self._read(entry, name)
            except BaseException:
                self._release(entries)
                raise
            cartridges = [entry.cartridge for entry in entries if entry.cartridge is not None]
        try:
            yield cartridges
        finally:
            with self._lock:
                self._release(entries)

    def report(self) -> list[dict[str, Any]]:
        """One row a cartridge: name, bytes, whether it is in memory, how many use it."""
        with self._lock:
            return [
                {"name": name, "bytes": each.nbytes, "resident": each.cartridge is not None, "users": each.users}
                for name, each in self._entries.items()
            ]

    def _read(self, entry: _Entry, name: str) -> None:
        """Bring an artifact into memory; one that changed since it was added is refused."""
        assert entry.artifact is not None, "a live cartridge never leaves memory"
        artifact = open_artifact(entry.artifact.path)
        found = _digest(artifact)
        if found != entry.digest:
            raise ArtifactError(
                f"cartridge {name!r}: {artifact.path} changed since it was added ({MANIFEST_NAME} had sha256 "
                f"{entry.digest}, now {found}): remove it and add it again"
            )
        # what it will take is known only once it is read: at worst it stands beside what is dropped for it
        cartridge = self._load(artifact)
        self._make_room(cartridge.nbytes(), name)
        entry.cartridge, entry.nbytes = cartridge, cartridge.nbytes()

    def _make_room(self, nbytes: int, name: str) -> None:
        if self.max_bytes is None:
            return
        idle = [each for each in self._entries.values() if each.cartridge and each.artifact and not each.users]
        for entry in sorted(idle, key=lambda each: each.last_used):
            if self.nbytes() + nbytes <= self.max_bytes:
                return
            entry.cartridge = None
        if self.nbytes() + nbytes > self.max_bytes:
            raise AccelError(
                f"cartridge {name!r} takes {nbytes} bytes: {self.nbytes()} of the {self.max_bytes} allowed are in use; "
                "raise cartridge_max_bytes, remove another, or wait until rows that read one have ended"
            )

    def _release(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            entry.users -= 1
            self._touch(entry)
        self._leaving = [each for each in self._leaving if each.users]

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.last_used = self._clock

    def _resident(self) -> list[_Entry]:
        return [each for each in (*self._entries.values(), *self._leaving) if each.cartridge is not None]

    def _checked(self, name: str) -> str:
        if name not in self._entries:
            raise OptionError(unknown_name("cartridge", name, self._entries))
        return name


def _digest(artifact: Artifact) -> str:
    return file_digest(artifact.path / MANIFEST_NAME)


def _is_same(entry: _Entry, given: Artifact | Cartridge) -> bool:
    if isinstance(given, Cartridge):
        return entry.cartridge is given
    return entry.artifact is not None and entry.artifact.path == given.path and entry.digest == _digest(given)
