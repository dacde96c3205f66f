"""Speculation as a server's /metrics count it: vLLM's counters before and after a run → its acceptance."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_LINE = re.compile(r"vllm:spec_decode_(\w+)_total(?:\{(.*)\})?\s+(\S+)")
_POSITION = re.compile(r'position="(\d+)"')


@dataclass
class Counters:
    """Sums over all engines of a server."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    accepted_at: dict[int, int] = field(default_factory=dict)


def read(text: str) -> Counters | None:
    """The counters in a page of metrics; None where it has none."""
    found: Counters | None = None
    for line in text.splitlines():
        if (match := _LINE.match(line.strip())) is None:
            continue
        found = found or Counters()
        name, labels = match[1], match[2] or ""
        try:
            value = int(float(match[3]))
        except (ValueError, OverflowError):
            continue
        if name == "num_drafts":
            found.drafts += value
        elif name == "num_draft_tokens":
            found.draft_tokens += value
        elif name == "num_accepted_tokens":
            found.accepted += value
        elif name == "num_accepted_tokens_per_pos" and (position := _POSITION.search(labels)):
            at = int(position[1])
            found.accepted_at[at] = found.accepted_at.get(at, 0) + value
    return found


def acceptance(before: Counters | None, after: Counters | None) -> dict[str, Any]:
    """What was drafted and accepted in between, under vLLM's keys; nothing where nothing was drafted."""
    if before is None or after is None or after.draft_tokens <= before.draft_tokens:
        return {}
    drafts, accepted = after.drafts - before.drafts, after.accepted - before.accepted
    drafted = after.draft_tokens - before.draft_tokens
    positions = sorted(before.accepted_at.keys() | after.accepted_at.keys())
    gained = [after.accepted_at.get(at, 0) - before.accepted_at.get(at, 0) for at in positions]
    return {
        # a percentage
        "spec_decode_acceptance_rate": accepted / drafted * 100,
        "spec_decode_acceptance_length": 1 + accepted / drafts if drafts > 0 else 0.0,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": [each / drafts for each in gained] if drafts > 0 else [],
    }
