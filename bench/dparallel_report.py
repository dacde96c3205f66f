"""The document of the suite `dparallel` as text and as a plot. Reads nothing but the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.bench import report
from accel.bench.plot import Chart, Point
from accel.bench.report import table

# per rule: how its threshold reads
_PASSES = {"entropy": "entropy {} {:g} nats", "confidence": "probability {} {:g}"}


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [heading(document), table(*arm_rows(document))]
    if document["sweeps"]:
        parts.append(table(*sweep_rows(document)))
    return "\n\n".join([*parts, "\n".join(remarks(document))]) + "\n"


def heading(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    asked = f"{settings['questions']} questions × {settings['max_new_tokens']} new tokens, greedy"
    asked += f", {settings['timed']} of them by the clock × {settings['repeat']}"
    return f"{report.banner(document, asked)}\n{_rule(settings)}, blocks of {settings['block_length']} · base: " + (
        settings["base"] or "none"
    )


def arm_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and one row an arm."""
    sizes = _sizes(document)
    titles = ["arm", "accuracy %", "forwards", "tokens/forward", "× fewer"]
    titles += [title for size in sizes for title in (f"tokens/s @{size}", f"× faster @{size} [least–most]")]
    rows = []
    for name, arm in document["arms"].items():
        counted = [f"{arm['accuracy']:.1f}", f"{arm['forwards']:.1f}", f"{arm['tokens_per_forward']:.2f}"]
        timed = [cell for size in sizes for cell in _timed(arm[f"at_{size}"])]
        rows.append([name, *counted, f"{arm['forwards_ratio']:.2f}×", *timed])
    return titles, rows


def sweep_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and one row a threshold, the models side by side."""
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]] = document["sweeps"]
    titles = ["threshold", *(f"{name}: {what}" for name in sweeps for what in ("accuracy %", "tokens/forward"))]
    rows = []
    for number, points in enumerate(zip(*sweeps.values(), strict=True)):
        cells = [cell for p in points for cell in (f"{p['accuracy']:.1f}", f"{p['tokens_per_forward']:.2f}")]
        rows.append([_threshold(number, points[0]), *cells])
    rows.append(["AUP", *(cell for name in sweeps for cell in ("", f"{document['aup'][name]:.1f}"))])
    return titles, rows


def charts(document: Mapping[str, Any]) -> list[tuple[Chart, list[Point]]]:
    """Accuracy against tokens a forward; nothing where no thresholds were tried."""
    return [curves(document["sweeps"])] if document["sweeps"] else []


def curves(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Chart, list[Point]]:
    """A line for each sweep, whose first point is one token a forward."""
    chart = Chart("Accuracy and parallel tokens", "tokens a forward", "accuracy %", joined=True)
    return chart, [
        Point(point["tokens_per_forward"], point["accuracy"], _threshold(number, point), name)
        for name, sweep in sweeps.items()
        for number, point in enumerate(sweep)
    ]


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, losses first and the verdicts last."""
    reference, lines = document["reference"], []
    for size in _sizes(document):
        speeds = {name: {"speedup": arm[f"at_{size}"]["speedup"][0]} for name, arm in document["arms"].items()}
        lines += [f"{line} ({size} at once)" for line in report.slower(reference, speeds)]
    lines += document["notes"]
    lines += [
        "Tokens are useful ones, up to an answer's end; forwards are a question's own, on average. × fewer (forwards) "
        f"and × faster are against {reference!r}, which stops at an answer's end too; × faster is a median over "
        "repetitions side by side, @ how many questions at once.",
        "A cache is approximate, and its forwards read less: they are not the others' forwards.",
    ]
    if document["sweeps"]:
        lines.append("AUP weighs accuracy against the best of the whole table, so that its figures compare.")
    return lines + [_verdict(name, verdict, document) for name, verdict in document["verdicts"].items()]


def _verdict(name: str, verdict: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    points = verdict["accuracy"]
    times = [f"time ÷ {verdict[f'at_{size}'][0]:.2f} @{size}" for size in _sizes(document)]
    return (
        f"dparallel against {name!r}: forwards ÷ {verdict['forwards_ratio']:.2f}, {', '.join(times)}, accuracy "
        f"{points['mean']:+.1f} points (95 %: {points['low']:+.1f} to {points['high']:+.1f}, paired)"
    )


def _threshold(number: int, point: Mapping[str, Any]) -> str:
    """The first point of a sweep is one token a forward."""
    return f"{point['threshold']:g}" if number else "one token"


def _rule(settings: Mapping[str, Any]) -> str:
    signs = ("<", ">") if settings["strict"] else ("≤", "≥")
    return _PASSES[settings["rule"]].format(signs[settings["rule"] == "confidence"], settings["threshold"])


def _timed(figures: Mapping[str, Any]) -> tuple[str, str]:
    middle, least, most = figures["speedup"]
    return f"{figures['tokens_per_second']:.1f}", f"{middle:.2f}× [{least:.2f}–{most:.2f}]"


def _sizes(document: Mapping[str, Any]) -> list[int]:
    return sorted({1, document["settings"]["rows"]})
