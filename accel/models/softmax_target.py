"""The softmax target: any decoder-only transformers model whose rows advance, roll back and fork independently."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel.errors import ModelError
from accel.models.attention import supports_rows, using_rows
from accel.models.lagged import Recent, lagged_embedding
from accel.models.row_cache import RowCache, Segment, Step


class Tap(Protocol):
    """Something that watches what the model computes on the way to its logits, and keeps some of it for each row."""

    def listening(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Around a forward pass that adds tentative positions to ``rows``."""

    def commit(self, rows: Sequence[int], keep: Sequence[int]) -> None:
        """The first ``keep[r]`` tentative positions of each row stay, the others are gone."""

    def fork(self, row: int, copies: Sequence[int]) -> None: ...
    def close(self, rows: Sequence[int]) -> None: ...


class SoftmaxTarget:
    """Implements ``accel.axes.Target`` with a key-value cache (see row_cache.py).

    Models that ``accel.models.attention`` knows read the rows directly; every other one gets left-padded tensors
    and the two-dimensional mask that transformers' own batched generation would give it.
    """

    cache: RowCache

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            raise ModelError(f"{type(model).__name__} is an encoder-decoder: accel decodes decoder-only models")
        self.model = model
        # whose layers ``cpu_linear`` may speed up
        self.linears: nn.Module = model
        self.config = config
        self.device = model.device
        self.vocab_size: int = config.vocab_size
        self.reads_rows = supports_rows(config)
        self.cache = RowCache(views=self.reads_rows)
        self.taps: list[Tap] = []
        self.lagged = lagged_embedding(model)
        self.recent = None if self.lagged is None else Recent(self.lagged.lags)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        # alibi has no table or rotation to run out of
        has_limit = not getattr(config, "alibi", False)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None) if has_limit else None
        # a table of learned positions ends; rotations go on, if with less and less sense
        self.has_position_table = self.max_positions is not None and not hasattr(config, "rope_parameters")

    def open(self, segments: Iterable[Segment] = ()) -> int:
        """A new, empty row on a chain of shared segments; returns the row's name."""
        segments = tuple(segments)
        if not self.reads_rows and any(segment.bias is not None for segment in segments):
            raise ModelError(
                f"{type(self.model).__name__} runs its own attention, which knows no bias of slots: a cartridge with "
                "one needs a family that accel/models/attention.py lists"
            )
        name = self.cache.open(segments)
        if self.recent is not None:
            self.recent.open(name)
        return name

    def close(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        self.cache.close(rows)
        if self.recent is not None:
            self.recent.close(rows)
        for tap in self.taps:
            tap.close(rows)

    def fork(self, row: int, copies: int) -> list[int]:
        """``copies`` new rows with the context of ``row``, which becomes a segment that all of them share."""
        self.cache.freeze(row)
        names = [self.cache.open(self.cache.rows[row].segments) for _ in range(copies)]
        if self.recent is not None:
            self.recent.fork(row, names)
        for tap in self.taps:
            tap.fork(row, names)
        return names

    def num_positions(self, row: int) -> int:
        """Position of the row's next token, behind everything committed."""
        state = self.cache.rows[row]
        return state.offset + state.tail_length

    def state_bytes(self) -> int:
        return self.cache.nbytes()

    def place(self, row: int) -> int:
        """Rows that are given to ``forward`` in this order are read without a copy."""
        return self.cache.place(row)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        rows: Sequence[int],
        keep: Sequence[int] | None = None,
        final: Sequence[int] | None = None,
    ) -> Tensor:
        """Add n tentative tokens to rows: ``[R, n]`` → logits ``[R, n, V]``; commit() decides how many stay.

        ``keep`` names the positions (of 0 … n-1) whose logits are wanted, ``[R, len(keep), V]``; all by default.
        ``final`` is of no use here: every prefix of a key-value cache can be kept.
        """
        return self._forward(tokens, rows, keep, self.cache.begin(rows, tokens.shape[1]))

    def _forward(self, tokens: Tensor, rows: Sequence[int], keep: Sequence[int] | None, step: Step) -> Tensor:
        n = tokens.shape[1]
        inputs: dict[str, object] = {"past_key_values": self.cache, "use_cache": True}
        if self.lagged is None:
            inputs["input_ids"] = tokens
        else:
            inputs["inputs_embeds"] = self.lagged.behind(tokens, self._before(rows, tokens))
        if self._takes_positions:
            inputs["position_ids"] = self._positions(step)
        if not self.reads_rows:
            inputs["attention_mask"] = _left_padded_mask(step, tokens.device)
        if keep is not None and self._takes_logits_to_keep:
            # a slice is free where an index copies; decoding's one position needs neither
            last = list(keep) == [n - 1]
            inputs["logits_to_keep"] = 1 if last else torch.tensor(list(keep), device=tokens.device)
        with ExitStack() as around:
            if self.reads_rows:
                around.enter_context(using_rows(self.config))
            for tap in self.taps:
                around.enter_context(tap.listening(rows))
            logits = self.model(**inputs).logits
        if keep is not None and not self._takes_logits_to_keep:
            logits = logits[:, list(keep)]
        return logits

    def commit(self, keep: Sequence[int], rows: Sequence[int]) -> None:
        """Keep the first ``keep[r]`` tentative tokens of each row, drop the others."""
        self.cache.commit(rows, keep)
        if self.recent is not None:
            self.recent.commit(rows, keep)
        for tap in self.taps:
            tap.commit(rows, keep)

    def _before(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """The tokens before the new ones of each row, ``[R, lags]``, for an embedding that looks back."""
        assert self.recent is not None, "only such an embedding has lags"
        return torch.tensor(self.recent.read(rows, tokens.tolist()), device=tokens.device)

    def _positions(self, step: Step) -> Tensor:
        first = torch.tensor(step.first_positions, device=self.device)
        positions = first[:, None] + torch.arange(step.n, device=self.device)
        if self.max_positions is not None and self.has_position_table:
            # a row's unused look-ahead may run past the table; those logits are never read
            positions.clamp_(max=self.max_positions - 1)
        return positions


def _left_padded_mask(step: Step, device: torch.device) -> Tensor | None:
    """What batched generation passes: ``[R, context + n]``, ones on the right; None where nothing is padded."""
    used = [before + step.n for before in step.num_tokens]
    if min(used) == max(used):
        return None
    column = torch.arange(max(used), device=device)
    return (column >= max(used) - torch.tensor(used, device=device)[:, None]).long()
