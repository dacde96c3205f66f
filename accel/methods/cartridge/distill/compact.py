"""A cartridge without training: some of a document's own keys, with a bias and values fitted to what attention saw.

Attention matching (arXiv 2602.16284): for queries like those that will be asked, a head's attention over p slots
should have the mass and the output that it has over the whole document. Knows queries, keys and values of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.errors import IncompatibleError, OptionError
from accel.methods.cartridge import document
from accel.models.attention import watching
from accel.models.row_cache import LayerView, Segment
from accel.models.softmax_target import SoftmaxTarget

# queries a head is fitted to, at most: enough for p unknowns, and memory for queries × tokens scores
_MOST_QUERIES = 4096
# of the non-negative least squares; it gains less than 1 % a step by then
_ROUNDS = 200
_SMALLEST = 1e-6
# share of a slot's own weight in its equation: keeps values near the document's where few queries look
_RIDGE = 1e-3


class Fit(NamedTuple):
    """p slots of a layer: keys [Hkv, p, D], values [Hkv, p, Dv], bias [Hkv, p]."""

    keys: Tensor
    values: Tensor
    bias: Tensor


def compact(
    model: PreTrainedModel, document_ids: Sequence[int], queries: Sequence[Sequence[int]], tokens: int, sink: int
) -> Segment:
    """``tokens`` slots fitted to what ``queries`` (token ids behind the document) look for in it.

    Slots keep the positions of the tokens they come from, so that what follows stands behind the whole document's.
    """
    if not 0 <= sink < tokens <= len(document_ids):
        raise OptionError(
            f"tokens={tokens}, sink_tokens={sink}: more than the sink, and at most the {len(document_ids)} of the "
            "document with its template"
        )
    whole = document.read(model, document_ids)
    seen, scale = _queries(model, whole, queries)
    fits = [
        fit(keys.float(), values.float(), asked, tokens, sink, scale)
        for keys, values, asked in zip(whole.keys, whole.values, seen, strict=True)
    ]
    dtype = whole.keys[0].dtype
    return Segment(
        tuple(each.keys.to(dtype) for each in fits),
        tuple(each.values.to(dtype) for each in fits),
        whole.num_positions,
        tuple(each.bias for each in fits),
    )


@torch.no_grad()
def fit(keys: Tensor, values: Tensor, queries: Tensor, tokens: int, sink: int, scale: float) -> Fit:
    """One layer: keys [Hkv, N, D], values [Hkv, N, Dv], queries [Hkv, Q, D] → the slots, fp32.

    Chosen are the keys with the largest root mean square weight; their biases are non-negative least squares for the
    mass, their values ridge least squares for the output.
    """
    scores = queries @ keys.transpose(1, 2) * scale  # [Hkv, Q, N]
    log_mass = scores.logsumexp(-1, keepdim=True)
    weights = (scores - log_mass).exp()
    importance = weights.pow(2).mean(1)  # [Hkv, N]
    importance[:, :sink] = torch.inf
    chosen = importance.topk(tokens, dim=-1).indices.sort(dim=-1).values  # [Hkv, p]

    def pick(each: Tensor) -> Tensor:
        return each.gather(1, chosen[..., None].expand(-1, -1, each.shape[-1]))

    kept = scores.gather(2, chosen[:, None].expand(-1, scores.shape[1], -1))  # [Hkv, Q, p]
    bias = _masses((kept - log_mass).exp()).log()
    attention = (kept + bias[:, None]).softmax(-1)
    own = pick(values)
    missing = weights @ values - attention @ own
    gram = attention.transpose(1, 2) @ attention
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] + _SMALLEST
    eye = torch.eye(tokens, device=gram.device)
    change = torch.linalg.solve(gram + ridge * eye, attention.transpose(1, 2) @ missing)
    return Fit(pick(keys), own + change, bias)


def _masses(parts: Tensor) -> Tensor:
    """w ≥ 0 with parts @ w ≈ 1: parts [Hkv, Q, p], each slot's share of the true mass → [Hkv, p].

    Multiplicative updates (Lee and Seung 1999) keep w positive; a slot's weight begins as the one it has.
    """
    gram = parts.transpose(1, 2) @ parts
    wanted = parts.sum(1)
    found = torch.ones_like(wanted)
    for _ in range(_ROUNDS):
        found = found * wanted / (gram @ found[..., None])[..., 0].clamp(min=_SMALLEST)
    return found.clamp(min=_SMALLEST)


def _queries(model: PreTrainedModel, whole: Segment, queries: Sequence[Sequence[int]]) -> tuple[list[Tensor], float]:
    """What every layer's heads ask of the document: per layer [Hkv, Q, D], fp32, and the scale of the scores."""
    target = SoftmaxTarget(model)
    if not target.reads_rows:
        raise IncompatibleError(
            f"{type(model).__name__} runs its own attention, whose queries cannot be seen: train the cartridge instead"
        )
    seen: dict[int, list[Tensor]] = {}
    scales: set[float] = set()

    def note(view: LayerView, query: Tensor, scale: float) -> None:
        _, heads, n, dim = query.shape
        kv_heads = view.keys.shape[1]
        grouped = query[0].reshape(kv_heads, heads // kv_heads * n, dim)
        seen.setdefault(view.layer, []).append(grouped.float())
        scales.add(scale)

    with watching(note):
        for ids in queries:
            row = target.open([whole])
            target.forward(torch.tensor([list(ids)], device=target.device), [row], keep=[len(ids) - 1])
            target.close([row])
    if not seen:
        raise OptionError("no queries: give at least one")
    if len(scales) > 1:
        raise IncompatibleError(f"{type(model).__name__} scales its layers' scores differently: train the cartridge")
    together = [torch.cat(seen[layer], dim=1) for layer in sorted(seen)]
    stride = -(-together[0].shape[1] // _MOST_QUERIES)
    return [each[:, ::stride] for each in together], scales.pop()
