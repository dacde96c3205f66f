"""What every test shares: no network, reproducible examples, the reason for each skip, figures as JSON."""

from __future__ import annotations

import json
import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# before transformers is imported: a test that would ask the hub fails at once instead of waiting for it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# autoconversion threads and progress bars have no place in a test's output
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # triton reads it when it is imported: kernels then run on the CPU, one program at a time, uncompiled
    os.environ["TRITON_INTERPRET"] = "1"

# no deadline, because the machine may be shared; the same examples each time, because CI must not flip
settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")

RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-out", type=Path, default=None, help="write outcomes and recorded figures to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here: run `make test-gpu` where there is one"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        figures = dict(report.user_properties)
        item.config.stash[RESULTS].append(
            {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "figures": figures}
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--json-out")
    if path is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    document = {"device": device, "torch": torch.__version__, "tests": session.config.stash[RESULTS]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tests/tiny_models.py: tiny models of every family, drafts and prompts for them."""
    spec = spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
