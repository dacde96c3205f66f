"""The document of the suite `cascade` as text and as plots. Reads nothing but the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.bench import report
from accel.bench.plot import Chart, Point
from accel.bench.report import NOTHING, table

MIX = "random mix"
# shares of the teacher's cost that somebody may want to keep to
BUDGETS = (0.25, 0.5, 1.0)


def terminal(document: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [heading(document)]
    for name, each in document["workloads"].items():
        parts.append(f"{name}: {each['demonstrations']} demonstrations\n{table(*arm_rows(each))}")
    return "\n\n".join([*parts, "\n".join(remarks(document))]) + "\n"


def heading(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    asked = f"{settings['limit']} tasks × {settings['repeat']} seeds, {settings['samples']} samples at temperature "
    asked += f"{settings['temperature']:g}, {settings['demonstrations']} demonstrations a question"
    accuracy = settings["teacher_accuracy"]
    who = "" if accuracy is None else f", SIMULATED: a program that is right in {100 * accuracy:g} % of its answers"
    return (
        f"{report.banner(document, asked)}\n"
        f"teacher: {settings['teacher']} at {_price(settings['teacher_price'])}{who}\n"
        f"student at {_price(settings['student_price'])} · found by {settings['embedder']}"
    )


def arm_rows(workload: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and one row an arm; behind a cascade the coin of the same cost."""
    titles = ["arm", "success % [95 %]", "by seed", "$ a task", "of teacher's cost", "steps", "escalated %", "seconds"]
    rows = []
    for name, arm in workload["arms"].items():
        rows.append(
            [
                name,
                f"{100 * arm['success']:.0f} [{100 * arm['low']:.0f}–{100 * arm['high']:.0f}]",
                " ".join(f"{100 * each:.0f}" for each in arm["by_seed"]),
                NOTHING if arm["cost"] is None else f"{arm['cost']:.6f}",
                NOTHING if arm["relative_cost"] is None else f"{100 * arm['relative_cost']:.0f} %",
                f"{arm['steps']:.1f}",
                f"{100 * arm['escalated']:.0f}",
                f"{arm['seconds']:.2f}",
            ]
        )
        if name in workload["compared"]:
            mix = workload["compared"][name]["random_mix"]
            rows.append([f"  {MIX} at its cost", f"{100 * mix:.0f}", *[NOTHING] * 6])
    return titles, rows


def calibrated(arms: Mapping[str, Mapping[str, Any]], budget: float) -> str | None:
    """The arm with the most success whose cost is at most ``budget`` of the teacher's; the cheaper one of two alike."""
    within = [
        (row["success"], -row["relative_cost"], name)
        for name, row in arms.items()
        if row["relative_cost"] is not None and row["relative_cost"] <= budget
    ]
    return max(within)[2] if within else None


def charts(document: Mapping[str, Any]) -> list[tuple[Chart, list[Point]]]:
    """Success against cost, of each workload."""
    return [
        (
            Chart(name, "per cent of the teacher's cost", "success, per cent"),
            [
                Point(
                    100 * arm["relative_cost"], 100 * arm["success"], label, label, 100 * arm["low"], 100 * arm["high"]
                )
                for label, arm in each["arms"].items()
                if arm["relative_cost"] is not None
            ],
        )
        for name, each in document["workloads"].items()
    ]


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the numbers, losses first and the verdicts last."""
    lines = []
    for name, each in document["workloads"].items():
        lines += _losses(name, each["compared"])
    lines += document["notes"]
    lines.append(
        "A random mix sends whole tasks to the teacher by a coin, the others to the student with demonstrations, as "
        "many as the cascade's cost pays for; computed from those arms."
    )
    for name, each in document["workloads"].items():
        for arm, versus in each["compared"].items():
            lines.append(f"{name}, {arm}: {_versus(versus)}")
        chosen = ", ".join(f"{100 * budget:.0f} %: {calibrated(each['arms'], budget) or 'none'}" for budget in BUDGETS)
        lines.append(f"{name}: the most success within a share of the teacher's cost: {chosen}")
        ratio, least, most = each["shared_prompt"]["three_over_one"]
        lines.append(
            f"{name}: three samples of one prompt of {each['shared_prompt']['tokens']} tokens take {ratio:.2f}× "
            f"[{least:.2f}–{most:.2f}] the time of one."
        )
        lines.append(f"{name}: {_collected(each['collected'])}")
    for name, bars in document["verdicts"].items():
        shown = ", ".join(f"{bar}: {'met' if met else 'MISSED'}" for bar, met in bars.items())
        lines.append(f"{name}: {shown}")
    return lines


def _losses(name: str, compared: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for arm, versus in compared.items():
        if versus["of_teachers_cost"][0] > 1:
            lines.append(f"{name}: {arm} is dearer than the teacher alone")
        if versus["over_mix"][0] < 0:
            lines.append(f"{name}: {arm} succeeds less often than a coin at its cost")
    return lines


def _versus(versus: Mapping[str, Any]) -> str:
    kept, cost, mix = versus["of_teachers_success"], versus["of_teachers_cost"], versus["over_mix"]
    paid = versus["break_even"]
    after = "the demonstrations are never paid for" if paid is None else f"paid for after {paid:.0f} tasks"
    return (
        f"{_share(kept)} of the teacher's success at {_share(cost)} of its cost, {_points(mix)} over a random mix, "
        f"{_points(versus['over_student'])} over the student with demonstrations; {after}"
    )


def _share(interval: Sequence[float]) -> str:
    middle, low, high = (100 * each for each in interval)
    return f"{middle:.0f} % [{low:.0f}–{high:.0f}]"


def _points(interval: Sequence[float]) -> str:
    middle, low, high = (100 * each for each in interval)
    return f"{middle:+.0f} points [{low:+.0f} to {high:+.0f}]"


def _collected(taken: Mapping[str, Any]) -> str:
    cost = "at an unknown price" if taken["cost"] is None else f"for ${taken['cost']:.4f}"
    return f"demonstrations of {taken['successes']} of {taken['tasks']} tasks, {cost}."


def _price(price: Mapping[str, float] | None) -> str:
    if price is None:
        return "an unknown price"
    if "per_hour" in price:
        return f"${price['per_hour']:g} an hour"
    return f"${price['input']:g} in, ${price['output']:g} out per million tokens"
