"""Gate three: every kernel in every configuration compiles for GPUs that are not here, and none of them spills.

The compiler runs in its own process: in this one, kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from accel.kernels.ahead_of_time import FAMILIES, TARGETS

GREEDY_KERNEL = """
import triton, triton.language as tl
from accel.kernels.ahead_of_time import Build, compile_for

@triton.jit
def _hoard(p_x, p_y, b: tl.constexpr):
    # far more values alive at once than one warp has registers
    o = tl.arange(0, b)
    x = tl.load(p_x + o[:, None] * b + o[None, :])
    for i in range(8):
        x = tl.dot(x, x) + x
    tl.store(p_y + o[:, None] * b + o[None, :], x)

if __name__ == "__main__":
    types = {"p_x": "*fp32", "p_y": "*fp32"}
    row = compile_for(Build("none", _hoard, "b=128", types, {"b": 128}, num_warps=1), "sm_90")
    print(row.spill_bytes)
    wrong = Build("none", _hoard, "b=128", {"p_x": "*fp32"}, {"b": 128})
    try:
        compile_for(wrong, "sm_90")
    except ValueError as error:
        print(error)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_configuration_compiles_for_every_target_without_spills(tmp_path: Path) -> None:
    path = tmp_path / "compiled.json"
    done = run("-m", "accel.kernels.ahead_of_time", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text(encoding="utf-8"))
    names = {(row["family"], row["name"], row["target"]) for row in rows}
    assert len(names) == len(rows), "two configurations have one name"
    listed = {(b.family, b.name) for f in FAMILIES for b in import_module(f"accel.kernels.{f}.triton").builds()}
    assert names == {(*build, target) for build in listed for target in TARGETS}
    assert not [row for row in rows if row["spill_bytes"] or not row["fits"]]
    assert all(row["registers"] > 0 for row in rows)


def test_the_committed_page_lists_what_there_is(root: Path) -> None:
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert "SPILLS" not in page and "DOES NOT FIT" not in page
    for family in FAMILIES:
        section = re.search(rf"^## {family}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
        assert section, f"no section {family}"
        names = re.findall(r"^\| (.+?\]) \|", section[1], re.M)
        expected = [build.name for build in import_module(f"accel.kernels.{family}.triton").builds()]
        assert names[1:] == expected, "make it again: python -m accel.kernels.ahead_of_time --output docs/kernels.md"


def test_a_kernel_that_spills_is_seen(tmp_path: Path) -> None:
    script = tmp_path / "hoard.py"
    script.write_text(GREEDY_KERNEL, encoding="utf-8")
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    spilled, complaint = done.stdout.splitlines()
    assert int(spilled) > 0
    assert "types and constants differ from the kernel in ['p_y']" in complaint


def test_the_compiler_refuses_the_interpreter_and_unknown_families() -> None:
    done = run("-m", "accel.kernels.ahead_of_time", "attention")
    assert done.returncode == 2 and "no kernel family attention: choose from verify," in done.stderr
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "accel.kernels.ahead_of_time", "unmask"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET=1 is set" in done.stderr
