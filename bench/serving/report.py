"""The documents of `accel bench serve` as text. Reads nothing but the document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accel.bench.report import NOTHING, table

TIMES = ("ttft", "ttft_text", "tpot", "itl", "e2el")


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report, of one run or of several."""
    parts = several(document) if "rounds" in document else single(document)
    notes = "\n".join(f"note: {each}" for each in document["notes"])
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def single(run: Mapping[str, Any]) -> Iterator[str]:
    """One server, one run."""
    yield f"{run['label']} · {run['model_id']} · {_load(run)}"
    rows = [
        ["requests", f"{run['completed']} answered, {run['failed']} failed"],
        ["duration", f"{run['duration']:.2f} s"],
        ["tokens", f"{run['total_input_tokens']} in, {run['total_output_tokens']} out"],
        ["requests/s", f"{run['request_throughput']:.2f}"],
        *([["goodput, requests/s", f"{run['request_goodput']:.2f}"]] if run["request_goodput"] is not None else []),
        ["output tokens/s", f"{run['output_throughput']:.2f}"],
        ["all tokens/s", f"{run['total_token_throughput']:.2f}"],
        ["peak", f"{run['max_output_tokens_per_s']:g} chunks/s, {run['max_concurrent_requests']} requests"],
    ]
    yield "\n".join(f"{name:<20}{value}" for name, value in rows)
    of = ("mean", "median", "std", "p99")
    spread = [[name.upper().replace("_", ", "), *(f"{run[f'{each}_{name}_ms']:.2f}" for each in of)] for name in TIMES]
    yield table(["ms", *of], spread)
    if "spec_decode_num_drafts" in run:
        yield _speculation(run)
    yield from failures(run)


def _load(run: Mapping[str, Any]) -> str:
    rate, limit = run["request_rate"], run["max_concurrency"]
    sent = "all at once" if rate == "inf" else f"{rate:g} requests/s, burstiness {run['burstiness']}"
    return sent + (f", at most {limit} at a time" if limit else "")


def _speculation(run: Mapping[str, Any]) -> str:
    rates = " ".join(f"{100 * each:.1f}" for each in run["spec_decode_per_position_acceptance_rates"])
    return (
        f"speculation: {run['spec_decode_acceptance_rate']:.1f} % of {run['spec_decode_draft_tokens']} drafted tokens "
        f"accepted, {run['spec_decode_acceptance_length']:.2f} tokens a target call"
        + (f"; by position, %: {rates}" if rates else "")
    )


def failures(run: Mapping[str, Any]) -> Iterator[str]:
    if run["failures"]:
        yield "\n".join(f"failed {each['count']}x: {each['error']}" for each in run["failures"])


def several(document: Mapping[str, Any]) -> Iterator[str]:
    """Servers side by side, and the first one's ratio to each other one."""
    rounds = document["rounds"]
    asked = f"{len(document['servers'])} servers · {document['repeat']} rounds of {rounds[0]['num_prompts']} requests"
    yield f"{asked} · {_load(rounds[0])}"
    titles = ["server", "answered", "failed", "tokens out", "tokens/s [min–max]", "TTFT", "TTFT, text", "TPOT", "E2EL"]
    rows = []
    for name, each in document["servers"].items():
        speed = each["output_throughput"]
        times = ("median_ttft_ms", "median_ttft_text_ms", "median_tpot_ms", "median_e2el_ms")
        rows.append(
            [
                name,
                str(each["completed"]),
                str(each["failed"]),
                str(each["total_output_tokens"]),
                f"{speed['median']:.1f} [{speed['min']:.1f}–{speed['max']:.1f}]",
                *(f"{each[key]['median']:.1f}" for key in times),
            ]
        )
    yield table(titles, rows) + "\n(medians over rounds; times in ms)"
    for each in document["ratios"].values():
        shown = ", ".join(NOTHING if ratio is None else f"{ratio:.3f}" for ratio in each["rounds"])
        if each["median"] is None:
            yield f"{each['of']} / {each['over']}: no ratio, because requests failed in every round"
        else:
            yield (
                f"{each['of']} / {each['over']}, output tokens/s: {each['median']:.3f} "
                f"[{each['min']:.3f}–{each['max']:.3f}] ({shown})"
            )
    for each in rounds:
        yield from (f"{each['label']}, round {each['round'] + 1}: {text}" for text in failures(each))
