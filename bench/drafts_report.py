"""The document of the suite `drafts` as text, as a page and as plots. Reads nothing but the document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accel.bench import html, plot, report
from accel.bench.report import NOTHING, number, speedup, table

BAND = 0.15
Row = Mapping[str, Any]


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [
        heading(document),
        table(*draft_rows(document)),
        table(*result_rows(document)),
        table(*theory_rows(document)),
        "\n".join(remarks(document)),
    ]
    return "\n\n".join(parts) + "\n"


def page(document: Mapping[str, Any]) -> str:
    """One self-contained HTML page."""
    parts = [
        "".join(plot.scatter(*each) for each in charts(document)),
        f"<h2>The drafts</h2>{html.table(*draft_rows(document))}",
        f"<h2>What they brought</h2>{html.table(*result_rows(document))}",
        f"<h2>Beside theory</h2>{html.table(*theory_rows(document))}",
    ]
    return html.whole(document, heading(document), parts, remarks(document))


def heading(document: Mapping[str, Any]) -> str:
    return report.opening(document, document["prompts"], "greedy and at temperature 1")


def charts(document: Mapping[str, Any]) -> list[tuple[plot.Chart, list[plot.Point]]]:
    """Measured against predicted: acceptance at position 1, and the speed-up."""
    kept = plot.Chart("Acceptance at position 1", "predicted by teacher forcing", "measured", BAND)
    fast = plot.Chart("Speed-up over accel-plain", "predicted: τ / (c γ + 1)", "measured", BAND)
    return [
        (kept, _points(document["rows"], lambda row: theory(row, "first_acceptance"), "first_acceptance")),
        (fast, _points(document["rows"], lambda row: row["predicted_speedup"], "speedup", whisker=True)),
    ]


def _points(
    rows: Sequence[Row], predicted: Callable[[Row], float | None], key: str, whisker: bool = False
) -> list[plot.Point]:
    found = []
    for row in rows:
        x, y = predicted(row), row[key]
        if x is not None and y is not None:
            ends = (row[f"{key}_ci_low"], row[f"{key}_ci_high"]) if whisker else (None, None)
            found.append(plot.Point(x, y, row["arm"], row["decoding"], *ends))
    return found


def draft_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What each draft is, and what its manifest says it measured on held-out answers."""
    gamma = str(document["settings"]["draft_lengths"][0])
    titles = ["draft", "divergence", "data", "shape", "vocabulary", "M parameters"]
    titles += ["held-out α", f"τ at γ = {gamma}", "greedy top-1", f"greedy τ at γ = {gamma}"]
    rows = []
    for name, facts in document["drafts"].items():
        sampled, greedy = (facts["held_out"].get(key, {}) for key in ("sampled", "greedy"))
        rows.append(
            [
                name,
                facts["loss"] or NOTHING,
                facts["data"] or NOTHING,
                facts["shape"],
                str(facts["vocabulary"]),
                number(facts["parameters"], 2, scale=1e-6),
                number(sampled.get("acceptance"), 3),
                number(sampled.get("block_efficiency", {}).get(gamma), 2),
                number(greedy.get("top1"), 3),
                number(greedy.get("block_efficiency", {}).get(gamma), 2),
            ]
        )
    return titles, rows


def result_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row a draft and decoding: what it brought, what its own counts promise, and what distillation added."""
    titles = ["draft", "decoding", "divergence", "τ", "accept %", "γ", "c", "predicted", "measured [p20–p80]"]
    titles += ["95 %", "measured / predicted", "× baseline", "lossless"]
    rows = []
    for row in document["rows"]:
        rows.append(
            [
                row["arm"],
                row["decoding"],
                document["drafts"][row["draft"]]["loss"] or NOTHING,
                number(row["mean_accepted_length"], 2),
                number(row["acceptance_rate"], 1, scale=100),
                number(row["mean_draft_length"], 2),
                number(row["cost_ratio"], 3),
                number(row["predicted_speedup"], 2),
                speedup(row, spread=True),
                _interval(row, "speedup"),
                _percent(row["measured_over_predicted"]),
                _over_baseline(row),
                row["gate"],
            ]
        )
    return titles, rows


def theory_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Measured acceptance and τ beside what the two models' distributions along accel-plain's texts say."""
    titles = ["draft", "decoding", "γ", "mean α", "top-1", "accept at 1 %", "theory %", "± 95 %", "τ", "theory τ"]
    rows = []
    for row in document["rows"]:
        share, drafted = row["first_acceptance"], row["first_drafted"]
        error = 1.96 * (share * (1 - share) / drafted) ** 0.5 if drafted else None
        sampled = row["decoding"] != "greedy"
        rows.append(
            [
                row["arm"],
                row["decoding"],
                str(row["draft_length"]),
                number(theory(row, "alpha"), 3) if sampled else NOTHING,
                number(theory(row, "top1"), 3),
                number(share, 1, scale=100),
                number(theory(row, "first_acceptance"), 1, scale=100),
                number(error, 1, scale=100) if sampled else NOTHING,
                number(row["mean_accepted_length"], 3),
                number(theory(row, "mean_accepted_length"), 3),
            ]
        )
    return titles, rows


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, losses first."""
    rows = {f"{row['arm']} ({row['decoding']})": row for row in document["rows"]}
    lines = [*report.refusals(rows), *report.slower("accel-plain", rows)]
    lines += report.slower("the undistilled draft of the same shape", rows, "speedup_vs_baseline")
    if not any(row["baseline"] for row in rows.values()):
        lines.append("No undistilled draft of the same shape among the artifacts (`accel distill draft --baseline`).")
    lines += document["notes"]
    lines += [
        "Speed-ups are medians of paired per-prompt ratios of tokens/s over accel-plain. predicted = τ/(c·γ + 1) "
        "counts a verification as one target step, so it is an upper estimate.",
        "theory: teacher-forced along accel-plain's own texts and weighted by where rounds begin, so that it is what "
        "the counts should show; mean α = 1 − TVD is over all positions. Greedy theory is exact along one text, but "
        "for ties; sampled arms write texts of their own, so it holds in the mean.",
    ]
    return lines


def theory(row: Row, key: str) -> float | None:
    """A figure of the row's prediction, where there is one."""
    found: float | None = row["theory"][key] if row["theory"] else None
    return found


def _interval(row: Row, key: str) -> str:
    low, high = row[f"{key}_ci_low"], row[f"{key}_ci_high"]
    return NOTHING if low is None else f"{low:.2f}–{high:.2f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def _over_baseline(row: Row) -> str:
    if row["speedup_vs_baseline"] is None:
        return NOTHING
    return f"{row['speedup_vs_baseline']:.2f}× ({_interval(row, 'speedup_vs_baseline')})"
