"""Who may import whom, read from the sources with ``ast``: the direction that CONTRIBUTING.md draws.

Imports inside functions count like those at the top; imports for the type checker alone do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import accel

FOLDERS = {"accel": "accel", "kernels": "accel.kernels", "drafters": "accel.drafters", "bench": "accel.bench"}
LEAVES = {"types", "errors", "sampling", "axes", "artifacts", "request_log"}
# a module imports its own layer and those before it; "" is accel/__init__.py, the public names
ORDER = ["kernels", "models", "drafters", "distill", "methods", "engine", "api", "", "server", "bench", "cli"]
BENCH_MAY = {
    "accel.errors",
    "accel.types",
    "accel.kernels",
    # the suites `drafts` and `lenience` hold drafts against theory: they load them as attach() does, read what their
    # manifests say, and ask the divergences that they were distilled with, because a second copy could differ
    "accel.artifacts",
    "accel.distill",
    "accel.drafters.small_lm",
    "accel.engine.drafts",
    "accel.engine.given",
    # an arm is attached again for each of its runs, as what it was before
    "accel.engine.attached",
    # the suite `cartridge` reads documents as recipes do, and proves the path before it measures
    "accel.methods.cartridge",
    # the suite `cascade` runs the cascade, compares answers as it does, and is asked as it asks
    "accel.methods.cascade",
    # the suite `lawcat` reads a conversion for its model before it attaches it
    "accel.methods.lawcat.artifact",
    # the suite `dparallel` opens models, decodes, counts and sweeps as calibration does
    "accel.methods.dparallel.distill.calibrate",
    "accel.methods.dparallel.distill.opened",
    "accel.methods.dparallel.options",
    "accel.methods.speculative.distill",
    "accel.methods.speculative.options",
}

Import = tuple[str, int]


def imports(source: str, package: str) -> Iterator[Import]:
    """Every module or name that ``source`` imports, dotted and absolute, with its line."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((a.value, node.lineno) for a in node.args if isinstance(a, ast.Constant))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "accel":
            yield f"accel.{node.attr}", node.lineno


def layer(name: str) -> str:
    """``accel.methods.plain`` → ``methods``; ``accel`` and its public names → the empty layer."""
    first = name.split(".")[1] if "." in name else ""
    return first if first in LEAVES or first in ORDER else ""


def refusal(importer: str, imported: str, methods: set[str], public: set[str]) -> str | None:
    """Why module ``importer`` may not import ``imported``; None where it may."""
    if imported.split(".")[0] in {"kernels", "drafters", "bench"}:
        return f"a mapped folder is imported as accel.{imported}"
    if imported.split(".")[0] != "accel" or imported.startswith(importer + "."):
        return None
    here, there = layer(importer), layer(imported)
    if here == "" and importer != "accel":
        return f"{importer} stands in no layer: give it one in tests/test_layers.py"
    if here == there == "kernels" or importer == "accel":
        return None
    if here == "kernels":
        return "kernels import nothing of accel"
    if here == "bench" and there != "bench":
        known = (
            imported == "accel" or imported.split(".")[1] in public or any(imported.startswith(m) for m in BENCH_MAY)
        )
        return None if known else "bench imports public names of accel, and what BENCH_MAY lists, only"
    if there in LEAVES:
        return None
    if here in LEAVES:
        # kernels import nothing back, so no circle can close
        return None if there == "kernels" else "a leaf imports leaves and kernels only"
    if ORDER.index(there) > ORDER.index(here):
        return f"{here} stands below {there or 'the public names'}"
    if here == there == "methods":
        own, other = importer.split(".")[2:3], imported.split(".")[2:3]
        if own and other and own != other and own[0] in methods and other[0] in methods - {"plain"}:
            return "a method imports no other method but plain"
    return None


def violations(root: Path, public: set[str]) -> list[str]:
    """``file:line: importer imports imported: why not``, for the four folders under ``root``."""
    methods = {path.name for path in (root / "accel" / "methods").glob("*") if path.is_dir()}
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue  # accel/kernels and its like, read under their own folder
            if root / "accel" / "zoo" in path.parents:
                continue  # recipes: programs that use the package
            parts = path.relative_to(root / folder).with_suffix("").parts
            inside = parts[:-1] if parts[-1] == "__init__" else parts
            module = ".".join([package, *inside])
            parent = module if parts[-1] == "__init__" else module.rpartition(".")[0]
            for imported, line in imports(path.read_text(encoding="utf-8"), parent):
                why = refusal(module, imported, methods, public)
                if why:
                    found.append(f"{path.relative_to(root)}:{line}: {module} imports {imported}: {why}")
    return found


def test_imports_follow_the_direction(root: Path) -> None:
    found = violations(root, set(accel.__all__))
    assert not found, "\n".join(found)


BAD = {
    "kernels/verify/__init__.py": "from accel.errors import AccelError",
    "kernels/bare.py": "import kernels.verify",
    "drafters/lm.py": "from accel.methods.speculative import rule",
    "accel/models/loading.py": "def load():\n    from accel.engine import loop",
    "accel/methods/speculative/rule.py": "from ..cartridge import prefix",
    "accel/methods/cartridge/prefix.py": "import accel.cli.main",
    "accel/engine/loop.py": "from importlib import import_module\nimport_module('accel.server.app')",
    "accel/server/app.py": "from accel.cli import main",
    "accel/errors.py": "import accel.models",
    "accel/engine/run.py": "from accel import load",
    "accel/stray.py": "from accel.engine import loop",
    "bench/run.py": "import accel\naccel.engine.loop",
    "bench/arms.py": "from accel.models import loading",
    "bench/theory.py": "from accel.methods.speculative import decoder",
}
GOOD = {
    "accel/__init__.py": "from accel.api import load",
    "accel/api.py": "from accel.engine import loop\nfrom accel.methods import TABLE",
    "accel/cli/bench.py": "from accel.bench import runner\nfrom accel.server import app\nimport accel",
    "accel/engine/loop.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from accel.api import load",
    "accel/methods/speculative/rule.py": "from accel.methods.plain import step\nfrom . import tree",
    "accel/methods/plain/__init__.py": "import accel.kernels.verify\nfrom accel.drafters.base import Drafter",
    "accel/sampling.py": "from accel.kernels.verify import draw",
    "accel/artifacts/manifest.py": "from accel.errors import ArtifactError",
    "kernels/verify/__init__.py": "from accel.kernels.verify.reference import verify\nfrom .reference import verify",
    "bench/run.py": "import accel\naccel.load\nfrom accel import load, errors\nfrom . import arms",
    "bench/theory.py": "from accel.methods.speculative.distill.measure import measure",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("name", BAD)
def test_each_wrong_import_is_found(tmp_path: Path, name: str) -> None:
    plant(tmp_path, GOOD | {"accel/methods/cartridge/prefix.py": "", name: BAD[name]})
    found = violations(tmp_path, {"load"})
    assert len(found) == 1 and found[0].startswith(f"{name}:{len(BAD[name].splitlines())}:"), found


def test_right_imports_pass(tmp_path: Path) -> None:
    plant(tmp_path, GOOD)
    assert violations(tmp_path, {"load"}) == []
