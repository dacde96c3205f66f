"""The proof that cartridges are read rightly: a whole document's keys and values against the document in the prompt.

Runs on the model and the machine at hand, so that a port or a new version is proved and not trusted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from accel.methods.cartridge import document
from accel.models.softmax_target import SoftmaxTarget

# RMS of the difference over RMS of the logits in fp32: sums in another order, no more
TOLERANCE = 1e-5
# bf16 and fp16 keep 8 and 11 bits
_ROUNDED = 3e-2


def tolerance(model: PreTrainedModel) -> float:
    return TOLERANCE if model.dtype == torch.float32 else _ROUNDED


@torch.no_grad()
def ratio(model: PreTrainedModel, document_ids: Sequence[int], queries: Sequence[Sequence[int]]) -> float:
    """The largest RMS ratio over ``queries``, each read behind the document's segment in a batch of rows of its own,
    against transformers' own forward over document and query."""
    segment = document.read(model, document_ids)
    target = SoftmaxTarget(model)
    worst = 0.0
    rows = [target.open([segment]) for _ in queries]
    longest = max(len(each) for each in queries)
    padded = torch.zeros(len(queries), longest, dtype=torch.long, device=target.device)
    for place, each in enumerate(queries):
        padded[place, : len(each)] = torch.tensor(list(each), device=target.device)
    together = target.forward(padded, rows)
    for place, each in enumerate(queries):
        whole = torch.tensor([[*document_ids, *each]], device=target.device)
        expected = model(input_ids=whole).logits[0, -len(each) :].float()
        found = together[place, : len(each)].float()
        worst = max(worst, float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()))
    return worst
