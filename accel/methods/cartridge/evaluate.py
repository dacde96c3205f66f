"""How well a model answers with something in front of its prompts: log-probabilities of known answers.

Knows token ids and segments. Does not know what the segments are: none, a whole document, or a cartridge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

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
    found: list[float] = []
    for start in range(0, len(prompts), ROWS):
        some = list(zip(prompts[start : start + ROWS], answers[start : start + ROWS], strict=True))
        target = SoftmaxTarget(model)
        rows = [target.open(segments) for _ in some]
        tokens = torch.zeros(len(some), max(len(p) + len(a) for p, a in some) - 1, dtype=torch.long)
        for row, (prompt, answer) in enumerate(some):
            tokens[row, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer[:-1]])
        # only the positions of some answer: a vocabulary's logits fill memory
        first = min(len(prompt) for prompt, _ in some) - 1
        logits = target.forward(tokens.to(target.device), rows, keep=range(first, tokens.shape[1]))
        for row, (prompt, answer) in enumerate(some):
            begin = len(prompt) - 1 - first
            scores = logits[row, begin : begin + len(answer)].float().log_softmax(-1)
            found.append(float(scores.gather(-1, torch.tensor(list(answer), device=scores.device)[:, None]).sum()))
    return found
