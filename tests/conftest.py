"""What every test shares: no network, reproducible examples, the reason for each skip, figures as JSON."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
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


class Recorder:
    """Every test's outcome, and the figures it recorded, as they are reported: by workers too, where pytest-xdist
    spreads the tests over several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.outcome != "passed":
            row["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
        self.rows.append(row | {"figures": dict(report.user_properties)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.rows.append({"test": report.nodeid, "outcome": "error", "why": report.longreprtext[-2000:]})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        from accel.bench import environment

        on_gpu = torch.cuda.is_available()
        document = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "environment": environment.describe(torch.device("cuda" if on_gpu else "cpu"))
            | {"triton": environment.package_version("triton"), "cuda": torch.version.cuda},
            "seconds": time.monotonic() - self.started,
            "exit_status": int(exitstatus),
            "outcomes": dict(Counter(row["outcome"] for row in self.rows)),
            "tests": self.rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json-out", type=Path, default=None, help="write outcomes and recorded figures to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--json-out")
    # a worker of pytest-xdist has "workerinput": its reports reach the recorder of the process that started it
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "figures as JSON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here: run `make test-gpu` where there is one"))


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
