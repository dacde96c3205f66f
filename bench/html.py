"""The document as one self-contained HTML page: the report's tables and bars of the speed-ups, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from accel.bench import report

BAR_HEIGHT = 26
LABEL_WIDTH = 190
CHART_WIDTH = 760

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2530 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #d7dde4; white-space: nowrap }
th:first-child, td:first-child { text-align: left } .scroll { overflow-x: auto }
pre { background: #f2f4f7; padding: .8rem; white-space: pre-wrap } .failed { color: #b3261e; font-weight: 600 }
svg text { font: 13px system-ui, sans-serif; fill: #1c2530 }
"""


def page(document: Mapping[str, Any]) -> str:
    """The page's whole text."""
    parts = [bars(document), table(*report.arm_rows(document))]
    if len(document["groups"]) > 1:
        parts.append(f"<h2>Speed-up by task group</h2>{table(*report.group_rows(document))}")
    return whole(document, report.heading(document), parts, report.remarks(document))


def whole(document: Mapping[str, Any], heading: str, parts: Sequence[str], remarks: Sequence[str]) -> str:
    """A page: heading, the suite's own parts (HTML), remarks and how it was measured."""
    said = "".join(f"<li>{escape(line)}</li>" for line in remarks)
    environment = "\n".join(f"{key}: {value}" for key, value in document["environment"].items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>accel bench</title>'
        f"<style>{STYLE}</style></head><body><h1>accel bench</h1>"
        f"<pre>{escape(heading)}</pre>{''.join(parts)}"
        f"<ul>{said}</ul><h2>How this was measured</h2>"
        f"<pre>{escape(document['command'])}\n{escape(document['date'])}\n\n{escape(environment)}</pre></body></html>\n"
    )


def bars(document: Mapping[str, Any]) -> str:
    """Speed-up an arm with its p20–p80 whisker; the vertical line is the reference, left of it is slower."""
    arms = document["arms"]
    longest = max([1.0, *(arm["speedup_p80"] for arm in arms.values() if arm["speedup"] is not None)])
    scale = (CHART_WIDTH - LABEL_WIDTH - 70) / longest
    height = BAR_HEIGHT * len(arms) + 24
    parts = [f'<svg role="img" width="{CHART_WIDTH}" height="{height}" xmlns="http://www.w3.org/2000/svg">']
    for index, (name, arm) in enumerate(arms.items()):
        middle = index * BAR_HEIGHT + BAR_HEIGHT / 2
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>')
        end = LABEL_WIDTH
        if arm["speedup"] is not None:
            low, high = (LABEL_WIDTH + scale * arm[key] for key in ("speedup_p20", "speedup_p80"))
            end = max(LABEL_WIDTH + scale * arm["speedup"], high)
            colour = "#2e7d5b" if arm["speedup"] >= 1 else "#b3541e"
            width = scale * arm["speedup"]
            parts.append(f'<rect x="{LABEL_WIDTH}" y="{middle - 8}" width="{width:.1f}" height="16" fill="{colour}"/>')
            parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#1c2530" stroke-width="2"/>')
        parts.append(f'<text x="{end + 6:.1f}" y="{middle + 4}">{escape(report.speedup(arm))}</text>')
    one = LABEL_WIDTH + scale
    bottom = BAR_HEIGHT * len(arms)
    parts.append(f'<path d="M{one:.1f} 0V{bottom}" stroke="#1c2530" stroke-dasharray="4 3"/>')
    caption = f"1× = {document['reference']}"
    parts.append(f'<text x="{one:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(caption)}</text></svg>')
    return "".join(parts)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<td class="failed">{text}</td>' if text == "FAILED" else f"<td>{escape(text)}</td>"
