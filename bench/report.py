"""The document as text for a terminal: a table of arms, a table of task groups, and sentences on what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report; reads nothing but the document."""
    parts = [heading(document), table(*arm_rows(document))]
    if len(document["groups"]) > 1:
        parts.append(f"Speed-up over {document['reference']} by task group\n" + table(*group_rows(document)))
    parts.append("\n".join(remarks(document)))
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(document: Mapping[str, Any]) -> str:
    temperature = document["settings"]["temperature"]
    prompts = sum(group[document["reference"]]["prompts"] for group in document["groups"].values())
    return opening(document, prompts, f"temperature {temperature}" if temperature else "greedy")


def opening(document: Mapping[str, Any], prompts: int, decoding: str) -> str:
    """What was run, where, and with which versions."""
    settings = document["settings"]
    repeated = f"{prompts} prompts × {settings['max_new_tokens']} new tokens × {settings['repeat']}"
    return banner(document, f"{repeated}, {decoding}")


def banner(document: Mapping[str, Any], asked: str) -> str:
    """Two lines: the model and the machine; what was ``asked`` and the versions."""
    settings, environment = document["settings"], document["environment"]
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    unfinished = "" if document["complete"] else " · UNFINISHED"
    return (
        f"{settings['model']} · {settings['dtype']} · {where}\n"
        f"{asked} · accel {environment['accel']} ({environment['commit'] or 'no commit'}), "
        f"torch {environment['torch']}, transformers {environment['transformers']}{unfinished}"
    )


def arm_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and one row an arm."""
    reference = document["reference"]
    titles = ["arm", "tokens/s", f"× {reference} [p20–p80]", "× accel-plain", "predicted", "TTFT ms", "τ", "accept %"]
    titles += ["c", "lossless", "identical", "peak MB"]
    rows = []
    for name, arm in document["arms"].items():
        rows.append(
            [
                name,
                number(arm["output_throughput"], 1) if arm["completed"] else NOTHING,
                speedup(arm, spread=True),
                number(arm["speedup_vs_plain"], 2),
                number(arm["predicted_speedup_vs_plain"], 2),
                number(arm["median_ttft_ms"], 0),
                number(arm["mean_accepted_length"], 2),
                number(arm["acceptance_rate"], 0, scale=100),
                number(arm["cost_ratio"], 3),
                arm["gate"],
                identical(arm),
                number(arm["peak_memory_mb"] or None, 0),
            ]
        )
    return titles, rows


def group_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and one row a task group: each arm's speed-up there."""
    arms = [name for name in document["arms"] if name != document["reference"]]
    rows = []
    for group, found in document["groups"].items():
        cells = [speedup({**found[name], "gate": document["arms"][name]["gate"]}) for name in arms]
        rows.append([group, str(found[document["reference"]]["prompts"]), *cells])
    return ["task group", "prompts", *arms], rows


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, losses first."""
    reference = document["reference"]
    lines = [*refusals(document["arms"]), *slower(reference, document["arms"])]
    if document["settings"]["temperature"] > 0:
        lines.append("Sampled at a temperature: outputs differ from run to run and are not compared.")
    elif margins := [arm["max_margin"] for arm in document["arms"].values() if arm["max_margin"] is not None]:
        lines.append(f"Where outputs differ, the two tokens' logits are at most {max(margins):.2g} apart.")
    for name, arm in document["arms"].items():
        lines += [f"{name}: {note}" for note in arm["notes"]]
    lines += document["notes"]
    lines.append(
        "Speed-ups are medians of paired per-prompt ratios of tokens/s. predicted = τ/(c·γ + 1) over accel-plain; "
        "beside it stands what was measured."
    )
    return lines


def refusals(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each arm whose output the gate refused."""
    lines = []
    for name, arm in arms.items():
        if arm["failures"]:
            more = f" (and {len(arm['failures']) - 1} more)" if len(arm["failures"]) > 1 else ""
            lines.append(f"{name} FAILED the output check, so no speed-up is given: {arm['failures'][0]}{more}")
    return lines


def slower(than: str, arms: Mapping[str, Mapping[str, Any]], key: str = "speedup") -> list[str]:
    """One line that names every loss; none where there are none."""
    losses = [f"{name} ({arm[key]:.2f}×)" for name, arm in arms.items() if arm[key] is not None and arm[key] < 0.995]
    return [f"Slower than {than}: {', '.join(losses)}"] if losses else []


def speedup(arm: Mapping[str, Any], spread: bool = False) -> str:
    """``1.42× [1.10–1.80]``; FAILED where the gate is red."""
    if arm["speedup"] is None:
        return "FAILED" if arm["gate"] == "FAILED" else NOTHING
    text = f"{arm['speedup']:.2f}×"
    return f"{text} [{arm['speedup_p20']:.2f}–{arm['speedup_p80']:.2f}]" if spread else text


def identical(arm: Mapping[str, Any]) -> str:
    """How many outputs are the reference's own, and how many part ways at a tie."""
    if arm["gate"] == "sampled" or not arm["completed"]:
        return NOTHING
    ties = f" +{arm['similar']} tied" if arm["similar"] else ""
    return f"{arm['identical']}/{arm['completed']}{ties}"


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return NOTHING if value is None else f"{value * scale:.{digits}f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(titles), "  ".join("─" * width for width in widths), *map(line, rows)])
