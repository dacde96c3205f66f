"""The document of a run: its goals summed up, as JSON text, and as a table for a terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def terminal(document: Mapping[str, Any]) -> str:
    """Ceilings, one line a case with its peers' ratios, and what became of the goals."""
    limits, machine = document["ceilings"], document["environment"]
    lines = [
        f"{machine.get('gpu') or machine['cpu']} · torch {machine['torch']} · triton {machine['triton']} · "
        f"commit {machine['commit']}",
        f"ceilings here: copy {limits['copy_gb_s']:.0f} GB/s · matmul {limits['matmul_tflop_s']:.3g} TFLOP/s "
        f"({limits['matmul_dtype']}) · an empty launch {1000 * limits['launch_ms']:.1f} µs",
        "",
        f"{'case':<58} {'floor ms':>9} {'median':>9} {'p20 – p80':>17} {'share':>6}  {'bound':<6}  "
        "goals; peers' time over ours",
    ]
    family = None
    for row in document["cases"]:
        if row["family"] != family:
            family = row["family"]
            lines.append(family)
        lines.append(_line(row))
    if missing := _missing(document["cases"]):
        lines += ["", "peers without a time:", *missing]
    lines += ["", "goals by family, and cases without a figure:"]
    for name, count in document["goals"].items():
        lines.append(f"  {name:<18} " + " · ".join(f"{number} {verdict}" for verdict, number in count.items()))
    lines.append(f"{document['seconds']:.0f} s")
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    name = f"  {row['name']}{' ' + row['dtype'] if 'dtype' in row else ''}"
    if row["status"] != "ok":
        return f"{name:<58} {row['status'].upper()}: {row['reason']}"
    spread = f"{row['p20_ms']:.4f} – {row['p80_ms']:.4f}"
    verdicts = [f"{goal['goal']}: {goal['verdict']}" for goal in row["goals"]]
    peers = [
        f"{peer} {found['ratio']:.2f}x [{found['ratio_p20']:.2f} – {found['ratio_p80']:.2f}]"
        if "ratio" in found
        else f"{peer} –"
        for peer, found in row["peers"].items()
    ]
    return (
        f"{name:<58} {row['floor_ms']:9.4f} {row['median_ms']:9.4f} {spread:>17} {row['share']:6.2f}  "
        f"{row['bound']:<6}  {'; '.join(verdicts + peers)}"
    )


def _missing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a peer and reason, with the number of its cases."""
    counts = Counter(
        (peer, found["reason"]) for row in rows for peer, found in row.get("peers", {}).items() if "reason" in found
    )
    return [f"  {peer}, {count} cases: {why}" for (peer, why), count in counts.items()]


def goals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By family, how many goals were met, not met, left open; a case without figures leaves nothing but "no figure"."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        count = counts.setdefault(row["family"], {"met": 0, "not met": 0, "open": 0, "no figure": 0})
        if row["status"] != "ok":
            count["no figure"] += 1
        for goal in row.get("goals", ()):
            count[goal["verdict"]] += 1
    return counts


def dump(document: Mapping[str, Any]) -> str:
    """JSON text of a document, figures to five digits: errors of 1e-7 and bytes of 1e9 stand side by side here."""
    return json.dumps(_rounded(document), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
