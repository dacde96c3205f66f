"""How well a model answers with something in front of its prompts: log-probabilities of known answers.

Knows token ids and segments. Does not know what the segments are: none, a whole document, or a cartridge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from accel.distill.teacher import answer_logits
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

# questions that are read together
ROWS = 8


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel,
    segments: Sequence[Segment],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[float]:
    """Σ ln p(answer token | segments, prompt, answer so far) of each answer, in nats; token ids without padding."""
    written = [(index, *pair) for index, pair in enumerate(zip(prompts, answers, strict=True))]
    found = []
    for (_, _, answer), logits in answer_logits(SoftmaxTarget(model), written, ROWS, lambda index: segments):
        scores = logits.log_softmax(-1)
        found.append(float(scores.gather(-1, torch.tensor(list(answer), device=scores.device)[:, None]).sum()))
    return found
