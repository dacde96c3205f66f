"""The document of the suite `lawcat` as text, as a page and as plots. Reads nothing but the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log2
from typing import Any

from accel.bench import html, plot, report
from accel.bench.report import NOTHING, table

ARMS = ("softmax", "linear")
# behind a length at which the model has no positions left
BEYOND = "*"
Table = tuple[list[str], list[list[str]]]


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [f"{title}\n{table(*rows)}" for title, rows in tables(document)]
    return "\n\n".join([heading(document), *parts, "\n".join(remarks(document))]) + "\n"


def page(document: Mapping[str, Any]) -> str:
    """One self-contained HTML page."""
    drawn = "".join(plot.scatter(*each) for each in charts(document))
    parts = [drawn, *(f"<h2>{title}</h2>{html.table(*rows)}" for title, rows in tables(document))]
    return html.whole(document, heading(document), parts, remarks(document))


def heading(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    asked = f"{settings['tasks']} tasks a length, greedy, timings × {settings['repeat']}"
    trained = settings["training_length"]
    return (
        f"{report.banner(document, asked)}\n{settings['artifact']}: {settings['converted']} of {settings['layers']} "
        f"layers are linear, {settings['delta_bytes'] / 1e6:.1f} MB"
        + (f", trained at {trained} tokens" if trained else "")
        + (f" · the model has {settings['positions']} positions" if settings["positions"] else "")
    )


def tables(document: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Each with what it is called."""
    found = [("Right answers by length", retrieval_rows(document))]
    if document["perplexity"]:
        found.append(("Perplexity by position", perplexity_rows(document)))
    return [
        *found,
        ("Reading a prompt, and what a request holds", prefill_rows(document)),
        ("Decoded tokens/s behind a prompt, by requests at once", decode_rows(document)),
    ]


def retrieval_rows(document: Mapping[str, Any]) -> Table:
    tasks: Mapping[str, Sequence[Mapping[str, Any]]] = document["retrieval"]
    titles = ["tokens", *(f"{task}: {arm} %" for task in tasks for arm in ARMS)]
    lengths = sorted({row["length"] for rows in tasks.values() for row in rows})
    by_length = {task: {row["length"]: row for row in rows} for task, rows in tasks.items()}
    return titles, [
        [
            _length(document, length),
            *(
                f"{100 * by_length[task][length][arm]['accuracy']:.0f}" if length in by_length[task] else NOTHING
                for task in tasks
                for arm in ARMS
            ),
        ]
        for length in lengths
    ]


def perplexity_rows(document: Mapping[str, Any]) -> Table:
    return ["positions", "tokens", *ARMS, "linear ÷ softmax"], [
        [
            f"{row['from']}–{_length(document, row['to'])}",
            str(row["tokens"]),
            *(_perplexity(row[arm]) for arm in ARMS),
            f"{exp(min(row['linear'] - row['softmax'], 80)):.2f}",
        ]
        for row in document["perplexity"]
    ]


def prefill_rows(document: Mapping[str, Any]) -> Table:
    titles = ["tokens", *(f"{arm} s" for arm in ARMS), *(f"{arm} tokens/s" for arm in ARMS)]
    titles += ["× faster [least–most]", *(f"{arm}: × the time before" for arm in ARMS), *(f"{arm} MB" for arm in ARMS)]
    grown = {row["to"]: row for row in document["growth"]}
    held = {row["length"]: row for row in document["state"]}
    return titles, [
        [
            _length(document, row["length"]),
            *(f"{row[arm]['seconds']:.3f}" for arm in ARMS),
            *(f"{row[arm]['tokens_per_second']:.0f}" for arm in ARMS),
            _ratio(row["speedup"]),
            *(f"{grown[row['length']][arm][0]:.2f}" if row["length"] in grown else NOTHING for arm in ARMS),
            *(f"{held[row['length']][arm] / 1e6:.2f}" for arm in ARMS),
        ]
        for row in document["prefill"]
    ]


def decode_rows(document: Mapping[str, Any]) -> Table:
    sizes: Mapping[str, Sequence[Mapping[str, Any]]] = document["decode"]
    titles = ["tokens"]
    for size in sizes:
        titles += [*(f"{arm} @{size}" for arm in ARMS), "× faster [least–most]"]
    return titles, [
        [_length(document, rows[0]["length"]), *(cell for row in rows for cell in _decoded(row))]
        for rows in zip(*sizes.values(), strict=True)
    ]


def charts(document: Mapping[str, Any]) -> list[tuple[plot.Chart, list[plot.Point]]]:
    """By length, a step of the axis for each doubling: what is found again, and what reading and decoding cost."""
    across = "tokens, log₂"
    found = plot.Chart("Right answers", across, "per cent", joined=True)
    read = plot.Chart("Reading a prompt", across, "ms for 1000 tokens", joined=True)
    said = plot.Chart("Decoding, one request", across, "tokens/s", joined=True)
    return [
        (
            found,
            [
                _point(row["length"], 100 * row[arm]["accuracy"], f"{task}, {arm}")
                for task, rows in document["retrieval"].items()
                for arm in ARMS
                for row in rows
            ],
        ),
        (
            read,
            [
                _point(row["length"], 1e6 / row[arm]["tokens_per_second"], arm)
                for arm in ARMS
                for row in document["prefill"]
            ],
        ),
        (
            said,
            [
                _point(row["length"], row[arm]["tokens_per_second"], arm)
                for arm in ARMS
                for row in document["decode"]["1"]
            ],
        ),
    ]


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, losses first and the verdicts last."""
    settings = document["settings"]
    lines = _losses(document) + document["notes"]
    if any(_beyond(document, length) for length in settings["lengths"]):
        lines.append(
            f"{BEYOND} beyond the {settings['positions']} positions that the model was trained with: accel refuses "
            "such prompts to softmax layers, and lets them in here to show what becomes of them."
        )
    lines += [
        "× faster: softmax over linear, medians of runs side by side. × the time before: of the length above, in the "
        "same repetition. MB: what one request holds behind its prompt and reply.",
        "Perplexity compares the two on the same tokens; other positions are other tokens of the text.",
        f"Break-even, the length from which on linear is faster: {_break_even(document)}",
    ]
    return lines + [_verdict(name, each) for name, each in document["verdicts"].items()]


def _losses(document: Mapping[str, Any]) -> list[str]:
    """Lengths at which the conversion is slower, or finds less."""
    lines = []
    slow = [f"{row['length']} ({row['speedup'][0]:.2f}×)" for row in document["prefill"] if row["speedup"][0] < 0.995]
    if slow:
        lines.append(f"Slower than softmax at reading: {', '.join(slow)}")
    for size, rows in document["decode"].items():
        slow = [f"{row['length']} ({row['speedup'][0]:.2f}×)" for row in rows if row["speedup"][0] < 0.995]
        if slow:
            lines.append(f"Slower than softmax at decoding, {size} at once: {', '.join(slow)}")
    for task, rows in document["retrieval"].items():
        less = [row for row in rows if row["linear"]["accuracy"] < row["softmax"]["accuracy"]]
        if less:
            points = (
                f"{row['length']} ({100 * (row['linear']['accuracy'] - row['softmax']['accuracy']):+.0f} points)"
                for row in less
            )
            lines.append(f"Fewer right answers than softmax, {task}: {', '.join(points)}")
    return lines


def _break_even(document: Mapping[str, Any]) -> str:
    longest = document["settings"]["lengths"][-1]

    def shown(value: int | None) -> str:
        return f"none up to {longest}" if value is None else f"{value} tokens"

    found = document["break_even"]
    decoding = ", ".join(f"{shown(value)} with {size} at once" for size, value in found["decode"].items())
    return f"reading {shown(found['prefill'])}; decoding {decoding}."


def _verdict(name: str, verdict: Mapping[str, Any]) -> str:
    """One line a bar."""
    value, bar = verdict["value"], verdict["bar"]
    met = {True: "met", False: "MISSED", None: "not measured here"}[verdict["met"]]
    if name == "growth":
        where = f" ({verdict['from']} → {verdict['to']} tokens)" if "from" in verdict else ""
        shown = NOTHING if value is None else f"{value:.2f}"
        return f"Time to read twice the length, linear{where}: × {shown}, bar ≤ {bar}: {met}"
    if name == "state":
        return f"Bytes of a request at the longest over the shortest length, linear: × {value:.2f}, bar 1: {met}"
    shown = NOTHING if value is None else f"{100 * value:.0f} %"
    where = f"{verdict['length']} tokens" if verdict["length"] else "8 times the trained length"
    return f"{name}, right answers of linear at {where}: {shown}, bar ≥ {100 * bar:.0f} %: {met}"


def _beyond(document: Mapping[str, Any], length: int) -> bool:
    positions = document["settings"]["positions"]
    return positions is not None and length > positions


def _length(document: Mapping[str, Any], length: int) -> str:
    return f"{length}{BEYOND if _beyond(document, length) else ''}"


def _perplexity(loss: float) -> str:
    return f"{exp(min(loss, 80)):.3g}"


def _ratio(speedup: Sequence[float]) -> str:
    middle, least, most = speedup
    return f"{middle:.2f}× [{least:.2f}–{most:.2f}]"


def _decoded(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (*(f"{row[arm]['tokens_per_second']:.1f}" for arm in ARMS), _ratio(row["speedup"]))


def _point(length: int, y: float, kind: str) -> plot.Point:
    return plot.Point(log2(length), y, str(length), kind)
