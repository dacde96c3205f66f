"""Drafts chains of tokens with an EAGLE-3 head, many rows at once, from what the target computed for each row.

What a row has read of its final tokens is committed to the head's own key-value rows, one position a pair (token
x_{j+1}, feature g_j). A draft feeds the head's own output back in place of features it does not have, so its keys and
values are dropped when it ends: the tokens that come true are read again, with the target's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.axes import Target
from accel.drafters.base import Ask, Draft
from accel.drafters.eagle3.loading import LoadedHead
from accel.drafters.eagle3.tap import LayerTap, decoder_layers
from accel.drafters.growing import Growing
from accel.drafters.rows import Rows
from accel.errors import AccelError, IncompatibleError
from accel.models.row_cache import RowCache
from accel.models.softmax_target import SoftmaxTarget


@dataclass
class _Row:
    name: int
    generator: torch.Generator
    # final tokens that no pair has been read for; a row's first token is in none
    unread: list[int]
    # whose features go with them: a row of the target, once it is known
    source: tuple[LayerTap, int] | None = None


class Eagle3Drafter:
    """Fulfils ``Drafter`` and ``TargetReader``: ``model`` is the target's, and the one the head was loaded for."""

    name = "eagle3"
    free = False

    def __init__(self, loaded: LoadedHead, model: PreTrainedModel) -> None:
        decoder_layers(model)  # a target without layers to read is refused here and not in the middle of a call
        self.head = loaded.head
        self._target_model = model
        self._layer_ids = loaded.layer_ids
        self._d2t = loaded.d2t
        self._vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self._cache = RowCache(views=True)
        self._rows: Rows[_Row] = Rows(self.name)
        self._taps: WeakKeyDictionary[SoftmaxTarget, LayerTap] = WeakKeyDictionary()

    # what the target is told, and tells

    def listen(self, target: Target) -> None:
        if not isinstance(target, SoftmaxTarget) or target.model is not self._target_model:
            raise IncompatibleError(
                "an EAGLE-3 head reads the hidden states of the model it was loaded for: load it again for this target"
            )
        if target not in self._taps:
            self._taps[target] = LayerTap(target.model, self._layer_ids, self.head.project)
            target.taps.append(self._taps[target])

    def follow(self, row: int, target: Target, target_row: int) -> None:
        assert isinstance(target, SoftmaxTarget), "listen() refuses every other target"
        self._rows[row].source = (self._taps[target], target_row)

    # what every drafter does

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        # the draft's randomness must be its own: the row's generator decides what is accepted
        generator = torch.Generator().manual_seed((seed ^ 0x5EED_EA61) & 0x7FFF_FFFF_FFFF_FFFF)
        state = _Row(self._cache.open(), generator, list(prompt[1:]))
        try:
            self._rows.open(row, state)
        except AccelError:
            self._cache.close([state.name])
            raise

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        self._rows[row].unread += tokens

    def close(self, row: int) -> None:
        name = self._rows[row].name
        self._rows.close(row)
        self._cache.close([name])

    def state_bytes(self) -> int:
        return self._cache.nbytes() + sum(tap.nbytes() for tap in self._taps.values())

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """One draft per ask, in order; rows with nothing to read draft nothing."""
        drafts = [Growing(ask, self._rows[ask.row]) for ask in asks]
        active = started = [d for d in drafts if d.row.unread and d.ask.max_tokens > 0]
        hidden = self._read(started)
        while active:
            logits, features = self.head.read_out(hidden)
            self._extend(active, logits)
            going = [index for index, draft in enumerate(active) if draft.wants_more()]
            active = [active[index] for index in going]
            if active:
                tokens = torch.tensor([[d.tokens[-1]] for d in active], device=hidden.device)
                hidden = self._forward(tokens, features[going][:, None], active)[:, 0]
        # nothing of a draft is worth keeping: its features were guesses
        self._cache.commit([d.row.name for d in started], [0] * len(started))
        return [draft.finish(self.name) for draft in drafts]

    def _read(self, drafts: Sequence[Growing[_Row]]) -> Tensor:
        """Read the rows' unread pairs; the hidden state of the last of each ``[R, H]``."""
        if not drafts:
            return torch.empty(0)
        own = [self._features(d) for d in drafts]
        lengths = [len(features) for features in own]
        features = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)  # [R, longest, H]
        tokens = torch.zeros(features.shape[:2], dtype=torch.long)
        for index, draft in enumerate(drafts):
            tokens[index, : lengths[index]] = torch.tensor(draft.row.unread)
            draft.row.unread = []
        hidden = self._forward(tokens.to(features.device), features, drafts)
        self._cache.commit([d.row.name for d in drafts], lengths)
        return hidden[torch.arange(len(drafts)), torch.tensor(lengths) - 1]

    def _features(self, draft: Growing[_Row]) -> Tensor:
        """The target's features for the row's unread tokens ``[n, H]``."""
        row, source = draft.row, draft.row.source
        features = None if source is None else source[0].take(source[1])
        found = 0 if features is None else len(features)
        if features is None or found != len(row.unread):
            raise AccelError(
                f"row {draft.ask.row} has {len(row.unread)} unread tokens and {found} features of the target: call "
                "listen() before its prompt is read, and follow() once it is open"
            )
        return features.to(self._d2t.device)

    def _forward(self, tokens: Tensor, features: Tensor, drafts: Sequence[Growing[_Row]]) -> Tensor:
        step = self._cache.begin([d.row.name for d in drafts], tokens.shape[1])
        hidden: Tensor = self.head(tokens, features, self._cache, step)
        return hidden

    def _extend(self, drafts: Sequence[Growing[_Row]], logits: Tensor) -> None:
        """Choose each row's next token from the head's logits ``[R, draft vocabulary]``."""
        logits = logits.float()
        best = logits.softmax(-1).max(-1)
        beliefs, tokens = best.values.tolist(), self._d2t[best.indices].tolist()
        for index, draft in enumerate(drafts):
            if draft.ask.sample:
                draft.sample(logits[index], self._d2t, self._vocab_size)
            else:
                draft.tokens.append(tokens[index])
                draft.confidence.append(beliefs[index])
