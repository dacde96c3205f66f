"""Stage 2: additions of low rank to the projections of converted layers, with the whole model's loss.

The next token's cross entropy is the published loss; the divergence from the softmax model's own distribution is added.
Knows models and rows of tokens. Does not know texts or artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from accel.distill.descent import Row
from accel.distill.forward import Scorer
from accel.distill.lora import Lora
from accel.distill.losses import Pair, forward_kl
from accel.methods.lawcat.distill.stage import Stage, descend, pieces
from accel.methods.lawcat.distill.texts import Rows
from accel.models.linear import LinearSpec, LowRank, converted_copy, linear_layers, own_parameters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Tuned(nn.Module):
    """A converted copy of ``model`` and what it learns: additions (``low_rank``), ``own`` parameters, or both."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: LinearSpec,
        tensors: Mapping[str, Tensor],
        low_rank: LowRank | None,
        own: bool,
        seed: int,
    ) -> None:
        super().__init__()
        student = converted_copy(model, spec, tensors)
        self.teacher, self.scorer = Scorer(model), Scorer(student)
        self._own = own_parameters(linear_layers(student))
        self.own = nn.ParameterList(self._own.values() if own else ())
        self.lora: Lora | None = None
        if low_rank is not None:
            places = {id(module): name for name, module in student.named_modules()}
            targets = [f"{places[id(layer)]}.{name}" for layer in linear_layers(student) for name in PROJECTIONS]
            self.lora = Lora(student, rank=low_rank.rank, alpha=low_rank.alpha, targets=targets, seed=seed)

    @property
    def student(self) -> PreTrainedModel:
        # not a part of this module: its weights are the model's and not to be learned
        return self.scorer.model

    def tensors(self) -> dict[str, Tensor]:
        """The conversion as it is now, under an artifact's names."""
        found: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._own.items()}
        for name, factors in ({} if self.lora is None else self.lora.factors()).items():
            # model.layers.N.self_attn.q_proj
            layer, _, projection = name.rpartition("layers.")[2].split(".")
            for half, factor in zip("AB", factors, strict=True):
                found[f"layers.{layer}.{projection}.lora_{half}"] = factor
        return found


def losses(tuned: Tuned, tokens: Tensor, next_token: float, kl: float) -> Iterator[Tensor]:
    """``next_token`` · cross entropy + ``kl`` · KL(softmax model ‖ student) of rows [B, T], means over tokens."""
    for piece in pieces(tokens):
        at, labels = foretelling(piece)
        logits = tuned.scorer(piece, at)
        loss = logits.new_zeros(())
        if next_token:
            loss = loss + next_token * F.cross_entropy(logits, labels)
        if kl:
            with torch.no_grad():
                wanted = tuned.teacher(piece, at).log_softmax(-1)
            loss = loss + kl * forward_kl(Pair(wanted, logits.log_softmax(-1))).mean()
        yield loss * (len(piece) / len(tokens))


def foretelling(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, T] → the flat places that foretell a token of theirs, and those tokens, both int64 [B (T - 1)]."""
    at = torch.arange(rows.numel(), device=rows.device).view(rows.shape)[:, :-1]
    return at.flatten(), rows[:, 1:].flatten()


def train(
    tuned: Tuned,
    rows: Rows,
    how: Stage,
    folder: Path,
    *,
    next_token: float,
    kl: float,
    made_from: Mapping[str, Any],
    progress: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[Row]:
    """Train what ``tuned`` learns, in place; see ``stage.descend``."""
    return descend(
        tuned,
        tuned.student,
        rows,
        how,
        folder,
        lambda tokens: losses(tuned, tokens, next_token, kl),
        made_from=made_from,
        progress=progress,
    )


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    """Mean cross entropy in nats of the tokens of ``rows`` [T] each, the first of each row given."""
    score, total, count = Scorer(model), 0.0, 0
    for row in rows:
        tokens = row[None].to(model.device)
        at, labels = foretelling(tokens)
        count += len(labels)
        for logits in score.pieces(tokens, at):
            total += float(F.cross_entropy(logits, labels[: len(logits)], reduction="sum"))
            labels = labels[len(logits) :]
    return total / count
