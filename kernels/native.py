"""C sources for CPUs, compiled on first use by the machine's own compiler and kept for the next process; OpenMP."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-std=gnu11")
TIMEOUT = 120.0
_PAUSE_SOFT = 1


class NotCompiled(Exception):
    """Why a source has no library here, in one line."""


def library(source: Path, folder: Path) -> ctypes.CDLL:
    """The shared library of a C file, from ``folder`` or made there; ``NotCompiled`` where that cannot be.

    Its OpenMP symbols are those of the runtime that torch has loaded: a second one would fight it for the cores. The
    library's name holds what it was made of and the processor's abilities, so that no other machine's is taken.
    """
    made_of = "\0".join((source.read_text(encoding="utf-8"), *FLAGS, _processor()))
    name = f"{source.parent.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    target = folder / name
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(source, target)
    except OSError:
        # nothing can be kept there; a library that is loaded needs its file no more
        with tempfile.TemporaryDirectory() as own:
            _compile(source, Path(own) / name)
            return _loaded(Path(own) / name)
    return _loaded(target)


def release_workers() -> bool:
    """Give up the OpenMP workers of this thread; they come again with its next parallel loop. False where none can.

    Each thread that runs parallel loops gets workers of its own. With more of them than cores GNU's runtime no longer
    lets a worker spin for the next loop, and waking it takes longer than many a loop: whoever hands a model to another
    thread lets go of his own.
    """
    try:
        # OpenMP 5.0; torch loads its runtime for everyone to see
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (OSError, TypeError, AttributeError):
        return False
    return bool(pause(_PAUSE_SOFT) == 0)


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotCompiled(f"the compiled library cannot be loaded: {error}") from error


def _compile(source: Path, target: Path) -> None:
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        built, linked = Path(own) / "built.o", Path(own) / "linked.so"
        _run([*compiler, *FLAGS, "-c", str(source), "-o", str(built)])
        # without -fopenmp, so that no runtime is linked
        _run([*compiler, "-shared", str(built), "-lm", "-o", str(linked)])
        # several processes may be here at once: whoever is last wins, with the same bytes
        linked.replace(target)


def _compiler() -> list[str]:
    """CC, as it is usual, else the first of the usual names."""
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise NotCompiled(f"no C compiler ({', '.join(COMPILERS)}): install one, or name yours with CC")
    return [found]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCompiled(f"{command[0]}: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise NotCompiled(f"{command[0]}: {said[0] if said else f'exit code {done.returncode}'}")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
