"""Compile every kernel in every configuration for GPUs that are not there, and tabulate what each one needs.

    python -m accel.kernels.ahead_of_time [--output docs/kernels.md] [--json FILE] [FAMILY …]

A family's ``triton.py`` lists what it launches in ``builds()``. Nothing is run: this catches what a compiler can
catch (types, layouts, shared memory that does not fit, registers that spill) and no wrong result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

FAMILIES = (
    "verify",
    "sampling",
    "prefix_attention",
    "linear_attention",
    "conv_features",
    "unmask",
    "similarity",
)

# architecture, threads in a warp and the shared memory one program may have, in bytes
TARGETS: Mapping[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Build:
    """One kernel as one configuration launches it: all that the compiler must know without tensors at hand.

    ``types`` names Triton's type of every run-time argument ("*bf16", "i32", "fp32"); ``constants`` are the
    ``tl.constexpr`` ones and pointers that are None. Pointers are taken to be aligned to 16 bytes, as torch's are, and
    so are the integers named in ``divisible``.
    """

    family: str
    kernel: Any
    config: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__.lstrip('_')} [{self.config}]"


@dataclass(frozen=True)
class Compiled:
    """What one build needs on one target: registers a thread, shared memory a program, bytes a thread spills."""

    family: str
    name: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    fits: bool


def builds(families: Iterable[str] = FAMILIES) -> Iterator[Build]:
    """Every build of the families, in order."""
    for family in families:
        yield from import_module(f"accel.kernels.{family}.triton").builds()


def compile_for(build: Build, target: str) -> Compiled:
    """Compile ``build`` for ``target`` (a key of TARGETS) and read off what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp, shared_limit = TARGETS[target]
    names = build.kernel.arg_names
    unknown = set(names) ^ (set(build.types) | set(build.constants))
    if unknown:
        raise ValueError(
            f"{build.family} {build.name}: types and constants differ from the kernel in {sorted(unknown)}"
        )
    aligned = [n for n in names if build.types.get(n, "").startswith("*") or n in build.divisible]
    source = ASTSource(
        build.kernel,
        signature={n: build.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in build.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    except Exception as error:
        raise RuntimeError(f"{build.family} {build.name} does not compile for {target}: {error}") from error
    if backend == "cuda":
        registers, spilled = _cuda_usage(compiled.asm["cubin"])
    else:
        registers, spilled = _hip_usage(compiled.asm["amdgcn"])
    shared = compiled.metadata.shared
    return Compiled(build.family, build.name, target, registers, shared, spilled, shared <= shared_limit)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin. Triton's kernels have no stack of their own: what is there is spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in text.splitlines() if "REG:" in line]
    usage = dict(part.split(":", 1) for part in line.split())
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers (accumulators included) and scratch bytes, from the kernel's own metadata."""
    values: dict[str, int] = {}
    for line in assembly.splitlines():
        name, _, value = line.strip().removeprefix("- ").partition(":")
        if name in (".vgpr_count", ".agpr_count", ".private_segment_fixed_size"):
            values[name] = int(value)
    return values[".vgpr_count"] + values.get(".agpr_count", 0), values[".private_segment_fixed_size"]


def compile_all(families: Sequence[str] = FAMILIES, workers: int | None = None) -> list[Compiled]:
    """Every build of ``families`` for every target, in as many processes as there are cores."""
    jobs = [(family, index) for family in families for index, _ in enumerate(builds([family]))]
    # spawn: a fork would share torch's threads with its parent
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(_compile_one, jobs, chunksize=4) for row in rows]


def _compile_one(job: tuple[str, int]) -> list[Compiled]:
    family, index = job
    build = next(b for i, b in enumerate(builds([family])) if i == index)
    return [compile_for(build, target) for target in TARGETS]


def table(rows: Sequence[Compiled]) -> str:
    """The page docs/kernels.md."""
    import triton

    lines = [
        "# What the kernels need",
        "",
        "Made by `python -m accel.kernels.ahead_of_time --output docs/kernels.md`; a test compiles everything again.",
        "Each cell: registers a thread / shared memory a program in KiB. Nothing spills on any target, or the test",
        f"fails. Triton {triton.__version__}; other versions may allot a few registers more or less.",
    ]
    for family, members in groupby(rows, lambda row: row.family):
        lines += ["", f"## {family}", "", f"| kernel [configuration] | {' | '.join(TARGETS)} |", "|---" * 5 + "|"]
        for name, of_build in groupby(members, lambda row: row.name):
            cells = [f"{row.registers} / {row.shared_bytes / 1024:.3g}{_complaint(row)}" for row in of_build]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _complaint(row: Compiled) -> str:
    return (f" SPILLS {row.spill_bytes} B" if row.spill_bytes else "") + ("" if row.fits else " DOES NOT FIT")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m accel.kernels.ahead_of_time", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"any of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--output", type=Path, help="write the page of tables here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--workers", type=int, help="processes; as many as there are cores by default")
    given = parser.parse_args(arguments)
    if unknown := set(given.families) - set(FAMILIES):
        parser.error(f"no kernel family {', '.join(sorted(unknown))}: choose from {', '.join(FAMILIES)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    rows = compile_all(given.families or FAMILIES, given.workers)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if given.output:
        given.output.write_text(table(rows), encoding="utf-8")
    if not given.json and not given.output:
        sys.stdout.write(table(rows))
    if bad := [row for row in rows if row.spill_bytes or not row.fits]:
        sys.exit("\n".join(f"{row.family} {row.name} on {row.target}:{_complaint(row)}" for row in bad))


if __name__ == "__main__":
    main()
