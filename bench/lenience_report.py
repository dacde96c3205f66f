"""The document of the suite `lenience` as text, as a page and as plots. Reads nothing but the document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.bench import html, plot, report
from accel.bench.report import NOTHING, number, speedup, table


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report."""
    return "\n\n".join([heading(document), table(*arm_rows(document)), "\n".join(remarks(document))]) + "\n"


def page(document: Mapping[str, Any]) -> str:
    """One self-contained HTML page."""
    plots = "".join(plot.scatter(*each) for each in charts(document))
    return html.whole(document, heading(document), [plots, html.table(*arm_rows(document))], remarks(document))


def heading(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    decoding = f"temperature {settings['temperature']}" if settings["temperature"] else "greedy"
    draft = ", ".join(document["drafts"])
    return report.opening(document, document["prompts"], f"{decoding}, draft {draft}, γ = {settings['draft_length']}")


def charts(document: Mapping[str, Any]) -> list[tuple[plot.Chart, list[plot.Point]]]:
    """Speed-up against both measures of quality; where no prompt has an answer, against the one."""
    speed = "speed-up over accel-plain"
    found = [(plot.Chart("Speed and log-probability", "mean ln p a token", speed), _points(document, "mean_logprob"))]
    if any(arm["graded"] for arm in document["arms"].values()):
        found.append((plot.Chart("Speed and accuracy", "share of right answers", speed), _points(document, "accuracy")))
    return found


def _points(document: Mapping[str, Any], key: str) -> list[plot.Point]:
    return [
        plot.Point(
            arm[key], arm["speedup"], name, arm["rule"] or "lossless", arm["speedup_ci_low"], arm["speedup_ci_high"]
        )
        for name, arm in document["arms"].items()
        if arm[key] is not None and arm["speedup"] is not None
    ]


def arm_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and one row an arm."""
    titles = ["arm", "× accel-plain [p20–p80]", "95 %", "predicted", "τ", "accept %", "accuracy % (95 %)"]
    titles += ["ln p a token", "± s.e.", "lossless"]
    rows = []
    for name, arm in document["arms"].items():
        low, high = arm["speedup_ci_low"], arm["speedup_ci_high"]
        rows.append(
            [
                name,
                speedup(arm, spread=True),
                NOTHING if low is None else f"{low:.2f}–{high:.2f}",
                number(arm["predicted_speedup_vs_plain"], 2),
                number(arm["mean_accepted_length"], 2),
                number(arm["acceptance_rate"], 1, scale=100),
                _accuracy(arm),
                number(arm["mean_logprob"], 3),
                number(arm["logprob_standard_error"], 3),
                arm["gate"],
            ]
        )
    return titles, rows


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, losses first."""
    arms = document["arms"]
    lines = [*report.refusals(arms), *report.slower("accel-plain", arms), *document["notes"]]
    graded = max(arm["graded"] for arm in arms.values())
    if not graded:
        lines.append("No prompt has a reference answer in GSM8K's form (#### and a number): accuracy cannot be told.")
    lines += [
        "lin, sq, exp accept with min(1, f(p)/q), f = p/ε, p/ε², p^ε (DistillSpec); the number beside the rule is ε. "
        "They do not keep the target's distribution; `lossless` does.",
        "ln p a token: the mean log-probability that the plain target at temperature 1 gives the output's own tokens. "
        "Higher is not better as such: what is sampled losslessly stands where accel-plain does.",
        "accuracy: the last number of the output is the one behind ####; 95 % is Wilson's interval.",
    ]
    return lines


def _accuracy(arm: Mapping[str, Any]) -> str:
    if arm["accuracy"] is None:
        return NOTHING
    low, high = 100 * arm["accuracy_low"], 100 * arm["accuracy_high"]
    return f"{100 * arm['accuracy']:.1f} ({low:.1f}–{high:.1f})"
