"""How often drafted tokens should be kept, from the two models' distributions along texts that the target wrote.

Leviathan et al. 2023 (arXiv 2211.17192): a token drafted from q is kept with chance min(1, p/q), so that
α = E_q[min(1, p/q)] = Σ min(p, q) = 1 − TVD(p, q) (corollary 3.6), which DistillSpec (arXiv 2310.08461) raises by
distillation. Greedy decoding keeps it where the draft's most likely token is the target's.

α differs from place to place, and rounds do not begin at every place alike: they crowd where tokens are refused. So
what a run should count is weighted by where its rounds begin. Given the text y, the draft's token at i is kept, and
is y_i, with chance b_i = min(1, q(y_i)/p(y_i)), whatever happened elsewhere; the b_i say where rounds begin
(``round_begins``), and

    τ = tokens / Σ_i P(round begins at i)
    acceptance at position 1 = Σ_i P(round begins at i) α_i / Σ_i P(round begins at i)

are exact in the mean over texts from p. Holds for token-wise acceptance and for the model's own distribution: no
top-k, no top-p, no penalties. Teacher-forced; knows no clocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from accel.distill.batches import Batch, collate
from accel.distill.forward import Scorer
from accel.distill.losses import Teacher, acceptance, pair
from accel.distill.teacher import judge_all
from accel.methods.speculative.distill.data import Translation
from accel.methods.speculative.distill.measure import block_efficiency, round_begins

# tokens judged at once: each holds the target's whole distribution
STRETCH = 64


@dataclass(frozen=True)
class Along:
    """A draft's chances along one text, position by position, [A] each.

    ``alpha``: that a drafted token is kept. ``kept``: that the text's own token comes about by drafting. They are the
    same numbers where decoding is greedy. ``top1``: whether both models put the same token first.
    ``full``: whether the text was cut at the length limit, so that nothing was drafted for its last position.
    """

    alpha: Tensor
    kept: Tensor
    top1: Tensor
    full: bool


@dataclass(frozen=True)
class Prediction:
    """What a run should show: ``alpha`` and ``top1`` are means over all positions, the others over rounds."""

    positions: int
    alpha: float
    top1: float
    first_acceptance: float | None
    mean_accepted_length: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """What the target wrote and thinks of it; the first token comes from reading the prompt and is never drafted.

    ``views``: its whole distribution along the rest, in stretches. ``full``: cut at the length limit.
    """

    views: tuple[Batch, ...]
    full: bool


def read(target: Scorer, prompt: Sequence[int], tokens: Sequence[int], max_new_tokens: int) -> Text | None:
    """The target's view of ``tokens``, its own answer to ``prompt``; None where nothing could be drafted."""
    if len(tokens) < 2:
        return None
    vocabulary = target.model.get_output_embeddings().weight.shape[0]
    views = []
    for start in range(1, len(tokens), STRETCH):
        written = (0, [*prompt, *tokens[:start]], tokens[start : start + STRETCH])
        views.append(collate(judge_all(target, [written], vocabulary)))
    return Text(tuple(views), len(tokens) == max_new_tokens)


@torch.no_grad()
def along(draft: Scorer, translation: Translation, text: Text, *, sampled: bool) -> Along:
    """The draft's chances along a text; ``sampled``: at temperature 1, else greedy."""
    parts = [torch.stack(part, 1) for view in text.views for part in _chances(draft, translation, view, sampled)]
    alpha, kept, top1 = torch.cat(parts).cpu().unbind(1)
    return Along(alpha, kept, top1, text.full)


def predict(texts: Sequence[Along], gamma: int) -> Prediction | None:
    """What drafting ``gamma`` tokens a round should show along these texts; None without any."""
    if not texts:
        return None
    alpha = torch.cat([text.alpha for text in texts])
    begins = round_begins([text.kept for text in texts], gamma)
    # the last token before the length limit is never drafted for
    drafted = [each[:-1] if text.full else each for each, text in zip(begins, texts, strict=True)]
    rounds = sum(float(each.sum()) for each in drafted)
    kept = sum(float((each * text.alpha[: len(each)]).sum()) for each, text in zip(drafted, texts, strict=True))
    return Prediction(
        len(alpha),
        float(alpha.mean()),
        float(torch.cat([text.top1 for text in texts]).mean()),
        kept / rounds if rounds else None,
        block_efficiency([text.kept for text in texts], gamma),
    )


def _chances(
    draft: Scorer, translation: Translation, view: Batch, sampled: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(α, kept, top-1 agreement) in pieces of the view's positions."""
    device = draft.model.device
    # p of the text's own tokens, by their target ids; the list is whole, so each is in it once
    own = view.logp[view.ids == view.answer[:, None]].to(device)
    known = translation(view).to(device)
    done = 0
    for logits in draft.pieces(known.tokens, known.at):
        here = slice(done, done + len(logits))
        done += len(logits)
        ids, answer = known.ids[here], known.answer[here]
        first = logits.argmax(-1)
        top1 = (first == ids[:, 0]).double()
        if not sampled:
            agrees = (first == answer).double()
            yield agrees, agrees, top1
            continue
        alpha = acceptance(pair(logits, Teacher(ids, known.logp[here]))).double()
        log_q = logits.log_softmax(-1).gather(-1, answer.clamp(min=0)[:, None])[:, 0]
        kept = (log_q - own[here]).clamp(max=0).exp().masked_fill(answer < 0, 0).double()
        yield alpha, kept, top1
