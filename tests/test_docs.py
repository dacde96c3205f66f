"""The pages keep their word: generated ones are fresh, links lead somewhere, code compiles, names exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from accel.cli.docs import render

# `accel.load(…)` in prose; `accel.json` is a file
NAME = re.compile(r"`(accel(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_cli_page_is_what_help_prints(root: Path) -> None:
    page = root / "docs" / "cli.md"
    assert page.is_file(), "docs/cli.md is missing: run `make docs`"
    assert page.read_text(encoding="utf-8") == render(), "docs/cli.md is stale: run `make docs`"


def documents(root: Path) -> Iterator[Path]:
    """The pages written for people: at the root, in docs/, and each method's own."""
    yield from sorted(root.glob("*.md"))
    yield from sorted((root / "docs").rglob("*.md"))
    for folder in ("accel/methods", "accel/zoo", "kernels", "drafters", "bench", "examples"):
        yield from sorted((root / folder).rglob("README.md"))


def blocks(text: str) -> list[str]:
    return [match[1] for match in BLOCK.finditer(text)]


def broken_links(path: Path) -> list[str]:
    """Relative links of a page whose target does not exist."""
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    return [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (path.parent / t).exists()]


def exists(dotted: str) -> bool:
    """Whether ``accel.a.b`` can be reached: by importing modules as far as they go, then by attributes."""
    parts = dotted.split(".")
    value = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:index]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def test_links_lead_somewhere(root: Path) -> None:
    broken = [f"{path.relative_to(root)}: {target}" for path in documents(root) for target in broken_links(path)]
    assert not broken, "\n".join(broken)


def test_python_blocks_compile(root: Path) -> None:
    for path in documents(root):
        for number, code in enumerate(blocks(path.read_text(encoding="utf-8")), start=1):
            compile(code, f"{path.relative_to(root)} block {number}", "exec")


def test_blocks_that_say_so_run(root: Path) -> None:
    """A block whose first line is ``# runs`` is executed as it stands."""
    for path in documents(root):
        for number, code in enumerate(blocks(path.read_text(encoding="utf-8")), start=1):
            if code.startswith("# runs"):
                exec(compile(code, f"{path.relative_to(root)} block {number}", "exec"), {"__name__": "__docs__"})


def test_names_in_prose_exist(root: Path) -> None:
    wrong = [
        f"{path.relative_to(root)}: {name}"
        for path in documents(root)
        for name in NAME.findall(path.read_text(encoding="utf-8"))
        if name != "accel.json" and not exists(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[gone](gone.md) [here](page.md#top) [web](https://example.org)\n`accel.errors.AccelError`, `accel.nothing()`\n"
        "```python\n# runs\nx = 1\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["gone.md"]
    names = NAME.findall(page.read_text(encoding="utf-8"))
    assert [exists(name) for name in names] == [True, False]
    assert blocks(page.read_text(encoding="utf-8")) == ["# runs\nx = 1\n"]
