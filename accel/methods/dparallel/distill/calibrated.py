"""An artifact's threshold, found on prompts and written into it.

Joins the sweep (``calibrate``) and the files (``artifact``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from accel.artifacts import open_artifact
from accel.distill.prompts import Prompt, encode
from accel.errors import ArtifactError, OptionError
from accel.methods.dparallel.distill.artifact import facts_in, set_threshold
from accel.methods.dparallel.distill.calibrate import Sweep, check_length, known_answers, require_answers, sweep
from accel.models.diffusion import Denoiser
from accel.models.loading import load_model

Progress = Callable[[str], None]

_DEFAULT_LENGTH = 256


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
    artifact = open_artifact(folder)
    facts = facts_in(artifact)
    for name, value in (("rows", rows), ("longest_prompt", longest_prompt), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: must be 1 or more")
    if max_new_tokens is None:
        trained = artifact.manifest.parameters.get("max_new_tokens")
        max_new_tokens = trained if isinstance(trained, int) and trained > 0 else _DEFAULT_LENGTH
    progress("loading the model …")
    model, tokenizer = load_model(folder, device=device, dtype=dtype)
    if tokenizer is None:
        raise ArtifactError(f"{folder} brings no tokenizer: prompts cannot be read without one")
    denoiser = Denoiser(model, facts)
    asked = encode(prompts, tokenizer, longest=longest_prompt)
    known = require_answers(known_answers(prompts, asked), "")
    check_length(denoiser.max_positions, facts.block_length, max(map(len, asked.prompts)), max_new_tokens)
    found = sweep(
        denoiser,
        tokenizer,
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
    set_threshold(artifact, found.chosen.threshold, measured, {"calibrated_with": command})
    return found, True
