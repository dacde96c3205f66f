"""From records to the document: one flat dictionary an arm, speed-ups by task group, and what a reader must know.

The document is plain JSON and all that reports read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from accel.bench import gate, metrics
from accel.bench.arms import PLAIN
from accel.bench.measure import Record

VERSION = 1
Run = tuple[str, int]


def document(
    records: Sequence[Record],
    arms: Sequence[str],
    reference: str,
    *,
    complete: bool,
    keep_records: bool = True,
    **about: Any,
) -> dict[str, Any]:
    """Everything a run found, ``about`` as in ``frame``. An unfinished run needs its records to be resumed."""
    by_arm = split(records, arms)
    failed = failures(by_arm)
    groups = list(dict.fromkeys(record.group for record in records))
    result = frame(complete=complete, **about) | {
        "reference": reference,
        "arms": figures(by_arm, reference),
        "groups": {group: _group(group, by_arm, reference, failed) for group in groups},
    }
    return result | kept(records, keep_records or not complete)


def frame(
    *,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str,
    date: str,
    complete: bool,
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """What stands in every document, whatever was compared."""
    return {
        "version": VERSION,
        "tool": "accel bench",
        "date": date,
        "command": command,
        "complete": complete,
        "settings": dict(settings),
        "environment": dict(environment),
        "notes": list(notes),
    }


def kept(records: Iterable[Record], keep: bool) -> dict[str, Any]:
    """The records as they stand in a document."""
    return {"records": [record.as_dict() for record in records]} if keep else {}


def split(records: Iterable[Record], arms: Iterable[str]) -> dict[str, list[Record]]:
    """The records of each arm."""
    records = list(records)
    return {name: [record for record in records if record.arm == name] for name in arms}


def failures(by_arm: Mapping[str, list[Record]]) -> set[str]:
    """The arms of which the gate refused an output: they get no speed-up."""
    return {name for name, runs in by_arm.items() if any(run.verdict == gate.FAILED for run in runs)}


def figures(by_arm: Mapping[str, list[Record]], reference: str) -> dict[str, dict[str, Any]]:
    """One flat dictionary an arm."""
    failed = failures(by_arm)
    return {name: _arm(name, by_arm, reference, failed) for name in by_arm}


def _arm(name: str, by_arm: Mapping[str, list[Record]], reference: str, failed: set[str]) -> dict[str, Any]:
    runs = [run for run in by_arm[name] if not run.error]
    base = [run for run in by_arm[reference] if not run.error]
    tokens, seconds = [run.output_tokens for run in runs], [run.seconds for run in runs]
    drafting = _drafting(runs)
    tpots = (metrics.tpot_ms(run.seconds, run.ttft, run.output_tokens) for run in runs)
    margins = [run.margin for run in runs if run.margin is not None]
    valid = name not in failed and reference not in failed
    plain = valid and PLAIN in by_arm and PLAIN not in failed
    return {
        "gate": _gate(by_arm[name]),
        "completed": len(runs),
        "failed": len(by_arm[name]) - len(runs),
        "duration": sum(seconds),
        "total_input_tokens": sum(run.prompt_tokens for run in runs),
        "total_output_tokens": sum(tokens),
        "output_throughput": metrics.output_throughput(tokens, seconds),
        **metrics.describe("ttft_ms", (1e3 * run.ttft for run in runs)),
        **metrics.describe("tpot_ms", (value for value in tpots if value is not None)),
        **metrics.describe("itl_ms", (gap for run in runs for gap in metrics.itl_ms(run.times))),
        **metrics.describe("e2el_ms", (1e3 * value for value in seconds)),
        **speedup("speedup", ratios(base, runs) if valid else []),
        "speedup_of_means": metrics.speedup_of_means(_rates(base), _rates(runs)) if valid else None,
        **speedup("speedup_vs_plain", ratios(by_arm[PLAIN], runs) if plain else []),
        "mean_accepted_length": drafting.tau,
        "acceptance_rate": drafting.acceptance,
        "mean_draft_length": drafting.gamma,
        "cost_ratio": drafting.c,
        "predicted_speedup_vs_plain": drafting.predicted if valid else None,
        "identical": sum(run.verdict == gate.IDENTICAL for run in runs),
        "similar": sum(run.verdict == gate.SIMILAR for run in runs),
        "max_margin": max(margins, default=None),
        "peak_memory_mb": max((run.peak_bytes for run in runs), default=0) / 1e6,
        "notes": list(dict.fromkeys(note for run in runs for note in (run.stats or {}).get("notes", ()))),
        "failures": [f"prompt {run.prompt}: {run.reason}" for run in by_arm[name] if run.verdict == gate.FAILED],
    }


def _gate(runs: Sequence[Record]) -> str:
    """One word for the column "lossless": the worst verdict among the runs."""
    verdicts = {run.verdict for run in runs}
    if gate.FAILED in verdicts:
        return "FAILED"
    if any(run.stats and not run.stats["lossless"] for run in runs):
        return "lossy"
    if gate.SAMPLED in verdicts:
        return "sampled"
    return "yes" if verdicts else "not run"


def _group(group: str, by_arm: Mapping[str, list[Record]], reference: str, failed: set[str]) -> dict[str, Any]:
    """Speed-up an arm over the reference on one task group; None where the gate is red."""
    runs = {name: [run for run in runs if run.group == group] for name, runs in by_arm.items()}
    return {
        name: {
            "prompts": len({run.prompt for run in runs[name]}),
            **speedup("speedup", [] if {name, reference} & failed else ratios(runs[reference], runs[name])),
        }
        for name in by_arm
    }


def ratios(base: Sequence[Record], runs: Sequence[Record]) -> list[float]:
    """One paired ratio of tokens/s for every prompt and turn that both have; runs are matched by repetition."""
    found = []
    theirs, ours = _by_prompt(base), _by_prompt(runs)
    for key in theirs.keys() & ours.keys():
        repetitions = sorted(theirs[key].keys() & ours[key].keys())
        ratio = metrics.paired_ratio([theirs[key][r] for r in repetitions], [ours[key][r] for r in repetitions])
        if ratio is not None:
            found.append(ratio)
    # a set has no order, and the bootstrap's draws depend on it
    return sorted(found)


def _by_prompt(runs: Sequence[Record]) -> dict[Run, dict[int, tuple[int, float]]]:
    found: dict[Run, dict[int, tuple[int, float]]] = {}
    for run in runs:
        found.setdefault((run.prompt, run.turn), {})[run.repetition] = (run.output_tokens, run.seconds)
    return found


def _rates(runs: Sequence[Record]) -> list[float]:
    """Tokens/s of each prompt and turn, the mean over its repetitions."""
    return [fmean(tokens / seconds for tokens, seconds in of.values()) for of in _by_prompt(runs).values()]


def _drafting(runs: Sequence[Record]) -> metrics.Drafting:
    """From Stats where an arm keeps them; otherwise τ from the streamer, which gets a target call's tokens at once."""
    counts = [
        metrics.DraftCounts(s["row_calls"], s["drafted_tokens"], s["accepted_tokens"], s["cost_ratio"])
        for s in (run.stats for run in runs)
        if s is not None
    ]
    if counts:
        return metrics.drafting(counts)
    chunks = sum(len(run.times) for run in runs)
    return metrics.Drafting(tau=sum(run.output_tokens for run in runs) / chunks) if chunks else metrics.Drafting()


def speedup(key: str, paired: Sequence[float]) -> dict[str, float | None]:
    """The median of paired ratios and its spreads under flat keys; None where there are none."""
    found = metrics.paired_speedup(paired)
    return {
        key: found.median if found else None,
        f"{key}_p20": found.p20 if found else None,
        f"{key}_p80": found.p80 if found else None,
        f"{key}_ci_low": found.low if found else None,
        f"{key}_ci_high": found.high if found else None,
    }
