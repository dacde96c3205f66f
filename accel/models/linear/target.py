"""The target of models with linear layers, hybrids included: a recurrent state a row that can take tokens back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.errors import IncompatibleError
from accel.models.linear.convert import linear_layers
from accel.models.linear.state import LinearRowCache, Snapshot, StatePool
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

# tokens of a prompt that the whole model reads at once: enough to fill a GPU, little enough that activations are few
PIECE = 4096


class LinearTarget(SoftmaxTarget):
    """Implements ``accel.axes.Target``. Softmax layers keep keys and values as ever, linear ones a state of one size.

    Tokens that are ``final`` go straight into the states, long stretches of them in pieces; all others are buffered
    until ``commit`` (state.py).
    """

    cache: LinearRowCache

    def __init__(self, model: PreTrainedModel, piece: int = PIECE) -> None:
        super().__init__(model)
        layers = linear_layers(model)
        assert layers, "target_for() picks this target for models with linear layers"
        first = layers[0]
        self.spec = first.spec
        self.piece = piece
        self.cache = LinearRowCache(StatePool(self.spec, first.heads, model.dtype, self.device))
        if len(layers) == self.config.num_hidden_layers:
            # positions matter inside a window only, and a state does not run out of them
            self.max_positions = None

    def open(self, segments: Iterable[Segment | Snapshot] = ()) -> int:
        """A new row: empty, or behind a ``Snapshot``. A cartridge holds keys that a linear layer has no place for."""
        given = tuple(segments)
        if not given:
            return self.cache.open()
        if len(given) > 1 or not isinstance(given[0], Snapshot):
            raise IncompatibleError(
                f"{type(given[0]).__name__} in front of a row of {type(self.model).__name__} with linear attention: "
                "a cartridge's keys are for softmax layers; leave it out, or detach the linear attention"
            )
        return self.cache.open_on(given[0])

    def save(self, row: int) -> Snapshot:
        """What the row holds, for others to be opened on: a long prompt is read once."""
        return self.cache.save(row)

    def fork(self, row: int, copies: int) -> list[int]:
        """``copies`` new rows with the context of ``row``."""
        saved = self.save(row)
        names = [self.cache.open_on(saved) for _ in range(copies)]
        for tap in self.taps:
            tap.fork(row, names)
        return names

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        rows: Sequence[int],
        keep: Sequence[int] | None = None,
        final: Sequence[int] | None = None,
    ) -> Tensor:
        """Add n tokens to rows, tentative unless they are ``final``: ``[R, n]`` → logits ``[R, n, V]``.

        ``keep`` names the positions (of 0 … n-1) whose logits are wanted, ``[R, len(keep), V]``; all by default.
        """
        n = tokens.shape[1]
        size = n if final is None else max(1, self.piece)
        logits = []
        for start in range(0, n, size):
            piece = tokens[:, start : start + size]
            width = piece.shape[1]
            own = None if final is None else [min(max(0, each - start), width) for each in final]
            asked = None if keep is None else [each - start for each in keep if start <= each < start + width]
            step = self.cache.begin(rows, width, own)
            # one position at least: the head has to be given something
            found = self._forward(piece, rows, [width - 1] if asked == [] else asked, step)
            if asked != []:
                logits.append(found)
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
