"""Break every kernel on purpose and see its checks go red: a check that cannot fail shows nothing.

Each ``tests/kernels/test_<family>_triton.py`` lists ``MUTATIONS`` as (kernel function, what is broken, the source
text, the broken text, a check that takes the family's kernel module). The mutant is a copy of the module with the
text replaced; the check must fail by its own assertion (a crash shows nothing about the check).
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from accel.kernels.ahead_of_time import FAMILIES

pytestmark = pytest.mark.kernel


def load(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    # dataclasses and pickling look a class's module up
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


CHECKS = {f: load(f"checks_of_{f}", Path(__file__).with_name(f"test_{f}_triton.py")) for f in FAMILIES}
MUTATIONS = [(family, mutation) for family, checks in CHECKS.items() for mutation in checks.MUTATIONS]


@pytest.mark.parametrize(("family", "mutation"), MUTATIONS, ids=[f"{f}-{m[0]}-{m[1]}" for f, m in MUTATIONS])
def test_a_deliberate_bug_turns_a_check_red(family, mutation, tmp_path):
    kernel, _, text, broken, check = mutation
    module = import_module(f"accel.kernels.{family}.triton")
    source = Path(module.__file__).read_text(encoding="utf-8")
    function = inspect.getsource(getattr(module, kernel).fn)
    # in the kernel itself, else in a function it calls
    place = function if text in function else source
    assert place.count(text) == 1, f"{text!r} stands {place.count(text)} times in {kernel} or its module, not once"
    assert source.count(place) == 1
    path = tmp_path / "triton.py"
    path.write_text(source.replace(place, place.replace(text, broken)), encoding="utf-8")
    name = f"mutant_{family}"
    try:
        mutant = load(name, path)
        with pytest.raises(AssertionError):
            check(mutant)
    finally:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_has_three_mutations(family):
    counted = Counter(mutation[0] for mutation in CHECKS[family].MUTATIONS)
    builds = import_module(f"accel.kernels.{family}.triton").builds()
    for kernel in {build.kernel.__name__ for build in builds}:
        assert counted[kernel] >= 3, f"{family}: {kernel} has {counted[kernel]} mutations, three are asked for"
