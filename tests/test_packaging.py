"""The package mapping and the name that kernels/ shares with Hugging Face's package, tried from the repository root."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from setuptools import find_packages

MAPPED = {"accel.kernels": "kernels", "accel.drafters": "drafters", "accel.bench": "bench"}
BOTH = """
from transformers import LlamaForCausalLM
import accel.kernels, accel.drafters, accel.bench
print(accel.kernels.__name__, LlamaForCausalLM.__name__)
"""


def sources_of(root: Path, folder: str) -> list[Path]:
    """The package's Python files; the zoo's recipes are programs of their own and stay out of it."""
    found = (root / folder).rglob("*.py")
    return [path for path in found if (root / "accel" / "zoo" / "recipes") not in path.parents]


def python(root: Path, code: str, *flags: str, path: Path | None = None) -> str:
    """Run ``code`` with the root as the working directory, ``path`` first on PYTHONPATH; its stdout."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONSAFEPATH", "PYTHONPATH"}}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["root on the path", "root off the path"])
def test_model_class_and_kernels_both_import(root: Path, flags: tuple[str, ...]) -> None:
    assert python(root, BOTH, *flags) == "accel.kernels LlamaForCausalLM"


def test_hugging_face_kernels_is_not_shadowed(root: Path, tmp_path: Path) -> None:
    """With a version of it that transformers accepts, transformers imports names from it for every model class."""
    plant_stub(tmp_path)
    shown = python(root, f"{BOTH}\nimport kernels\nprint(kernels.__file__, kernels.CUDAProperties)", path=tmp_path)
    assert str(tmp_path) in shown
    assert "CUDAProperties" in shown


# whatever name transformers asks for is there (they differ from release to release), as a decorator where need be
STUB = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    keep = lambda self, decorated=None, *args, **kwargs: decorated
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": keep})
"""


def plant_stub(folder: Path) -> None:
    """A distribution named kernels of the lowest version that the installed transformers accepts."""
    source = Path(str(metadata.distribution("transformers").locate_file("transformers/utils/import_utils.py")))
    lowest = re.search(r"KERNELS_MIN_VERSION\s*=\s*\"([\d.]+)\"", source.read_text(encoding="utf-8"))
    assert lowest, "transformers no longer states its range of kernels there; look at is_kernels_available"
    info = folder / f"kernels-{lowest[1]}.dist-info"
    for path, text in (
        (folder / "kernels" / "__init__.py", STUB),
        (info / "METADATA", f"Metadata-Version: 2.1\nName: kernels\nVersion: {lowest[1]}\n"),
    ):
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")


def test_wheel_holds_every_package_and_no_bare_folder(root: Path, wheel: zipfile.ZipFile) -> None:
    """Every sub-package of the four folders, under its mapped name, with its data; nothing else at the top."""
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"accel"}
    sources = {"accel": "accel", **MAPPED}
    for package, folder in sources.items():
        for path in sources_of(root, folder):
            inside = path.relative_to(root / folder)
            if any(parent.is_symlink() for parent in path.parents):
                continue  # the links for type checkers
            assert f"{package.replace('.', '/')}/{inside.as_posix()}" in names, f"{path} is not in the wheel"
    for path in (root / "kernels").rglob("*.c"):
        assert f"accel/{path.relative_to(root).as_posix()}" in names
    for path in (root / "bench" / "data").iterdir():
        assert f"accel/bench/data/{path.name}" in names
    assert not [name for name in names if "/results/" in name or "/recipes/" in name]
    for path in (root / "accel" / "zoo").glob("*/accel.json"):
        assert f"accel/zoo/{path.parent.name}/{path.name}" in names


def test_every_folder_of_sources_is_a_package(root: Path) -> None:
    """setup.py finds packages by their __init__.py: a folder without one would silently stay behind."""
    for folder in ("accel", *MAPPED.values()):
        packages = {folder, *(f"{folder}.{name}" for name in find_packages(str(root / folder)))}
        for path in sources_of(root, folder):
            assert ".".join(path.parent.relative_to(root).parts) in packages, f"{path.parent} lacks an __init__.py"


def test_what_is_imported_is_declared(root: Path) -> None:
    """Every library that the sources import stands among the dependencies, and is pinned in constraints.txt."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {distribution(line) for line in [*project["dependencies"], *extras]}
    imported = set()
    for folder in ("accel", *MAPPED.values()):
        for path in sources_of(root, folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.split(".")[0])
    ours = {"accel"} | set(sys.stdlib_module_names)
    missing = {name for name in imported - ours if name.lower().replace("_", "-") not in declared}
    assert not missing, f"declare in pyproject.toml: {sorted(missing)}"
    pinned = {distribution(line) for line in (root / "constraints.txt").read_text().splitlines() if "==" in line}
    # the developers' own extra asks for the server's
    tested = [*project["optional-dependencies"]["dev"], *project["optional-dependencies"]["serve"]]
    needed = {distribution(line) for line in [*project["dependencies"], *tested]} - {"accel-runtime"}
    assert needed <= pinned, f"pin in constraints.txt: {sorted(needed - pinned)}"


def distribution(line: str) -> str:
    """``huggingface_hub>=1.0; …`` → ``huggingface-hub``."""
    match = re.match(r"[\w.-]+", line)
    assert match, line
    return match[0].lower().replace("_", "-")


def test_wheel_works_away_from_the_repository(tmp_path: Path, wheel: zipfile.ZipFile) -> None:
    wheel.extractall(tmp_path / "site")
    code = "import accel.kernels, accel.drafters.base; print(accel.kernels.__file__)"
    assert python(tmp_path, code, path=tmp_path / "site").startswith(str(tmp_path / "site"))


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources, so that no stale build/ leaks in and none is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "./src"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))
