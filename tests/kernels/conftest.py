"""What a kernel test launches, the compiler has seen: every launch must fit a configuration that builds() lists."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch

TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip


class Configuration(NamedTuple):
    """What a kernel is compiled for: constants (None pointers left out), types of pointers, warps and stages."""

    kernel: str
    num_warps: int
    num_stages: int
    constants: frozenset[tuple[str, Any]]
    pointers: frozenset[tuple[str, str]]


@cache
def compiled(module: str) -> list[Configuration]:
    found = []
    for build in import_module(module).builds():
        constants = frozenset((n, v) for n, v in build.constants.items() if v is not None)
        pointers = frozenset((n, kind) for n, kind in build.types.items() if kind.startswith("*"))
        found.append(Configuration(build.kernel.__name__, build.num_warps, build.num_stages, constants, pointers))
    return found


def launched(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Configuration:
    names = inspect.signature(kernel.fn).parameters
    given = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    constants = {n: v for n, v in given.items() if "constexpr" in str(names[n].annotation) and v is not None}
    pointers = {n: TYPES[v.dtype] for n, v in given.items() if isinstance(v, torch.Tensor)}
    options = kwargs.get("num_warps", 4), kwargs.get("num_stages", 3)
    return Configuration(kernel.fn.__name__, *options, frozenset(constants.items()), frozenset(pointers.items()))


def fits(launch: Configuration, build: Configuration) -> bool:
    """Optional pointers may differ: they are compiled with and without, not in every combination."""
    types = dict(build.pointers)
    alike = all(types.get(name, kind) == kind for name, kind in launch.pointers)
    return alike and launch[:4] == build[:4]


@pytest.fixture(autouse=True)
def launches_are_compiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if torch.cuda.is_available() or "kernel" not in request.keywords:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    seen: set[tuple[str, Configuration]] = set()
    run = InterpretedFunction.run

    def recorded(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add((kernel.fn.__module__, launched(kernel, args, kwargs)))
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    yield
    for module, launch in seen:
        if module.startswith("accel.kernels."):  # not a deliberately broken copy
            assert any(fits(launch, build) for build in compiled(module)), f"launched, not in builds(): {launch}"
