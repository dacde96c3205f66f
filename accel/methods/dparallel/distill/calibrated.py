"""An artifact's threshold, found on prompts and written into it.

Joins the sweep (``calibrate``) and the files (``artifact``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from accel.artifacts import resolve
from accel.distill.prompts import Prompt, encode
from accel.errors import OptionError
from accel.methods.dparallel.artifact import set_threshold
from accel.methods.dparallel.distill.calibrate import Sweep, check_length, known_answers, require_answers, sweep
from accel.methods.dparallel.distill.opened import open_model

Progress = Callable[[str], None]


def calibrate_artifact(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    budget: float = 1.0,
    thresholds: Sequence[float] = (),
    max_new_tokens: int | None = None,
    longest_prompt: int = 256,
    rows: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    write: bool = True,
    command: str | None = None,
    progress: Progress = lambda message: None,
) -> tuple[Sweep, bool]:
    """Sweep the thresholds of the artifact at ``folder``; whether the chosen one was written into it."""
    for name, value in (("rows", rows), ("longest_prompt", longest_prompt), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: must be 1 or more")
    progress("loading the model …")
    opened = open_model(resolve(folder), device=device, dtype=dtype)
    assert opened.artifact is not None, "what was resolved is an artifact"
    max_new_tokens = max_new_tokens or opened.max_new_tokens
    asked = encode(prompts, opened.tokenizer, longest=longest_prompt)
    known = require_answers(known_answers(prompts, asked), "")
    longest = max(map(len, asked.prompts))
    check_length(opened.denoiser.max_positions, opened.facts.block_length, longest, max_new_tokens)
    found = sweep(
        opened.denoiser,
        opened.tokenizer,
        asked.prompts,
        known,
        thresholds=thresholds,
        budget=budget,
        max_new_tokens=max_new_tokens,
        rows=rows,
        progress=progress,
    )
    if found.chosen is None or not write:
        return found, False
    measured = {"calibration": found.as_dict() | {"max_new_tokens": max_new_tokens, "data_digest": asked.digest()}}
    set_threshold(opened.artifact, found.chosen.threshold, measured, {"calibrated_with": command})
    return found, True
