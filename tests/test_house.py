"""House rules that no linter knows: what may not stand in a file, and how large one may be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

MAX_BYTES = 8_000_000
MAX_ZOO_BYTES = 60_000_000

# how input could run code; each is spelled in two parts so that this page does not find itself
UNSAFE = [
    "import " + "pickle",
    # torch's restricted unpickler builds tensors and plain containers alone
    "torch" + r"\.load\((?!.*weights_only" + "=True)",
    "weights_only" + "=False",
    "trust_remote_code" + "=True",
    "shell" + "=True",
]
UNFINISHED = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "pragma: " + "no cover"]
# paths of one machine, and hosts that belong into the reader's own settings
PLACES = [
    r"(?<![\w.{}/-])/(?:work|tmp|home|root)" + r"/\w",
    r"pypi\." + "org",
    "python" + "hosted",
    r"download\." + r"pytorch\." + "org",
]


def project_files(root: Path) -> list[Path]:
    """What git tracks, or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def finds(path: Path, patterns: list[str]) -> list[str]:
    """``file:line: text`` for each line of a text file that matches one of ``patterns``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    pattern = re.compile("|".join(patterns))
    return [f"{path}:{number}: {line.strip()}" for number, line in enumerate(lines, start=1) if pattern.search(line)]


def test_files_stay_small(root: Path) -> None:
    sizes = {path: path.stat().st_size for path in project_files(root)}
    # weights are few and large: they are bounded together
    zoo = {path for path in sizes if root / "accel" / "zoo" in path.parents and path.suffix == ".safetensors"}
    assert not [f"{path} has {size:,} bytes" for path, size in sizes.items() if size > MAX_BYTES and path not in zoo]
    assert sum(sizes[path] for path in zoo) <= MAX_ZOO_BYTES


def test_sources_run_no_input(root: Path) -> None:
    sources = [p for p in project_files(root) if p.suffix == ".py" and root / "tests" not in p.parents]
    found = [line for path in sources for line in finds(path, UNSAFE)]
    assert not found, "\n".join(found)


def test_nothing_is_left_for_later(root: Path) -> None:
    found = [line for path in project_files(root) if path.suffix != ".jsonl" for line in finds(path, UNFINISHED)]
    assert not found, "\n".join(found)


def test_no_file_names_a_machine_or_a_registry_host(root: Path) -> None:
    found = [line for path in project_files(root) if path.suffix != ".jsonl" for line in finds(path, PLACES)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        (UNSAFE, "import " + "pickle"),
        (UNSAFE, "state = torch" + ".load(path)"),
        (UNSAFE, "run(command, shell" + "=True)"),
        (UNFINISHED, "# TO" + "DO later"),
        (PLACES, "path = '/" + "tmp/x'"),
        (PLACES, "see https://pypi." + "org/p"),
    ],
)
def test_each_rule_can_fail(tmp_path: Path, patterns: list[str], line: str) -> None:
    (tmp_path / "file.py").write_text(f"fine = 1\n{line}\n", encoding="utf-8")
    assert finds(tmp_path / "file.py", patterns) == [f"{tmp_path}/file.py:2: {line}"]
