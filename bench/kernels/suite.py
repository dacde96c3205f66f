"""One run of the kernels' benchmark: ceilings, then every case by rank until the time is spent; a JSON document.

A case that cannot be made, fails or disagrees with its reference is reported as such, without a figure, and the next
one follows. Nothing is dropped without its reason.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from accel.bench import environment
from accel.bench.kernels import ceilings, report
from accel.bench.kernels.cases import Case, Check, Peer, Ready, Thunk
from accel.bench.kernels.ceilings import Ceilings
from accel.bench.kernels.families import FAMILIES, choose, gather
from accel.bench.kernels.timing import Clock

# after this many seconds no further case is begun
BUDGET_SECONDS = {"cuda": 420.0, "cpu": 60.0}
# time for the repetitions of one contestant of one case
CASE_SECONDS = {"cuda": 0.25, "cpu": 0.08}

Told = Callable[[int, int, Case], None]


@dataclass(frozen=True)
class Budget:
    """When to stop: ``clock`` counts seconds, ``begun`` is where it stood."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    begun: float = 0.0

    @property
    def spent(self) -> bool:
        return self.clock() - self.begun > self.seconds


def run(
    device: torch.device,
    families: str | None = None,
    *,
    command: str = "",
    told: Told = lambda done, total, case: None,
    save: Callable[[Mapping[str, Any]], None] = lambda document: None,
    quick: bool | None = None,
) -> dict[str, Any]:
    """Measure families on ``device``, with shapes for a CPU if ``quick``; ``save`` gets the document as it grows."""
    quick = device.type != "cuda" if quick is None else quick
    chosen = choose(families)
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        clock = Clock(device, CASE_SECONDS[device.type])
        return measure(gather(chosen, device, quick), clock, command=command, told=told, save=save)


def measure(
    cases: Sequence[Case],
    clock: Clock,
    *,
    command: str = "",
    told: Told = lambda done, total, case: None,
    save: Callable[[Mapping[str, Any]], None] = lambda document: None,
    budget: Budget | None = None,
    limits: Ceilings | None = None,
) -> dict[str, Any]:
    """Measure ``cases`` with ``clock``; ``limits`` are the ceilings, measured first where they are not given."""
    started = time.monotonic()
    budget = budget or Budget(BUDGET_SECONDS[clock.device.type], begun=started)
    limits = limits or ceilings.measure(clock)
    rows: list[dict[str, Any]] = []
    machine = environment.describe(clock.device) | versions()

    def document(complete: bool) -> dict[str, Any]:
        found = sorted(rows, key=lambda row: FAMILIES.index(row["family"]))
        return {
            "suite": "kernels",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "environment": machine,
            "ceilings": limits.document(),
            "flush_mb": clock.flush_bytes / 1e6,
            "budget_seconds": budget.seconds,
            "seconds": time.monotonic() - started,
            "complete": complete,
            "goals": report.goals(found),
            "cases": found,
        }

    for done, case in enumerate(cases):
        if budget.spent:
            why = f"the suite's {budget.seconds:g} s were spent before its turn"
            rows.append(head(case) | {"status": "skipped", "reason": why})
        else:
            told(done, len(cases), case)
            rows.append(measure_case(case, clock, limits))
            save(document(complete=False))
    result = document(complete=True)
    save(result)
    return result


def versions() -> dict[str, Any]:
    """Versions of what kernels and peers are made with; None where it is not installed."""
    names = ("triton", "flash-attn", "flash-linear-attention")
    found: dict[str, Any] = {name: environment.package_version(name) for name in names}
    return found | {"cuda": torch.version.cuda, "hip": torch.version.hip}


def measure_case(case: Case, clock: Clock, limits: Ceilings) -> dict[str, Any]:
    """One row of the document: status "ok" with figures, or "red" or "failed" with a reason and without."""
    try:
        return head(case) | _checked_figures(case, clock, limits)
    except Exception as error:
        return head(case) | {"status": "failed", "reason": reason(error)}
    finally:
        if clock.on_gpu:
            # the next case needs the memory of this one's inputs, which a traceback or a closure may still hold
            gc.collect()
            # after a wild address every call fails; the remaining cases are to say so each, not this line for all
            with suppress(RuntimeError):
                torch.cuda.empty_cache()


def _checked_figures(case: Case, clock: Clock, limits: Ceilings) -> dict[str, Any]:
    ready = case.prepare()
    first_call_seconds = clock.first_call(ready.run)[0]
    checks = list(ready.check())
    found = {"checks": [_shown(check) for check in checks], "first_call_seconds": first_call_seconds}
    red = [f"{c.what}: error {_figure(c.error)}, allowed {c.allowed:g}" for c in checks if not c.ok]
    if red or not checks:
        return found | {"status": "red", "reason": "; ".join(red) or "no check was made"}
    return found | {"status": "ok"} | _figures(case, ready, clock, limits)


def _figures(case: Case, ready: Ready, clock: Clock, limits: Ceilings) -> dict[str, Any]:
    runs: dict[str, Thunk] = {"": ready.run}
    peers: dict[str, dict[str, Any]] = {}
    for name, peer in ready.peers.items():
        missing = _missing(peer, clock)
        peers[name] = {"reason": missing} if missing else {}
        if not missing:
            assert peer.run is not None
            runs[name] = peer.run
    times = clock.race(runs)
    ours = times[""]
    floor = limits.floor_ms(case.bytes, case.flops)
    share = floor / ours.median
    for name in list(runs)[1:]:
        peers[name] = times[name].figures() | times[name].ratio_to(ours)
    ratios = {name: peer["ratio"] for name, peer in peers.items() if "ratio" in peer}
    return {
        "floor_ms": floor,
        "bound": limits.bound(case.bytes, case.flops),
        **ours.figures(),
        "host_ms": ours.host_ms,
        "repetitions": len(ours.ms),
        "share": share,
        # the goals are stated for GPUs: a CPU's reference paths neither meet nor miss them
        "goals": [
            {"goal": goal.text, "verdict": goal.verdict(share, ratios) if clock.on_gpu else "open"}
            for goal in case.goals
        ],
        "peers": peers,
    }


def _missing(peer: Peer, clock: Clock) -> str:
    """Why a peer cannot be timed; empty where a first call of it went through and its result is ours."""
    if peer.run is None:
        return peer.reason
    try:
        _, result = clock.first_call(peer.run)
        check = peer.agrees and peer.agrees(result)
    except Exception as error:
        return reason(error)
    return f"its {check.what} differs from ours by {_figure(check.error)}" if check and not check.ok else ""


def head(case: Case) -> dict[str, Any]:
    """What is known of a case before its turn."""
    return {
        "family": case.family,
        "name": case.name,
        "shape": dict(case.shape),
        "dtype": case.dtype,
        "bytes": case.bytes,
        "flops": case.flops,
    }


def reason(error: Exception) -> str:
    """One line of what went wrong, with the name of the error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _shown(check: Check) -> dict[str, Any]:
    error = check.error if check.error is not None and math.isfinite(check.error) else None
    return {"what": check.what, "error": error, "allowed": check.allowed, "ok": check.ok}


def _figure(error: float | None) -> str:
    return "not a number" if error is None else f"{error:.3g}"
