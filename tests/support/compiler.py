"""Tests of what is compiled for a CPU need a C compiler; where there is none, there is nothing to test."""

from __future__ import annotations

import os
import shutil

import pytest

from accel.kernels import native

HAS_COMPILER = bool(os.environ.get("CC") or any(map(shutil.which, native.COMPILERS)))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler: nothing is compiled here")
COMPILED = pytest.param("compiled", marks=needs_compiler)
