"""A transformers model read in both directions: logits of chosen positions, and keys and values kept between blocks.

Causal classes are given a four-dimensional mask that hides padding and nothing else (a sliding window of theirs is
not applied); masked-LM classes read in both directions by themselves. Knows nothing of masks to fill, rules or
schedules.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from accel.errors import IncompatibleError, ModelError, first_line
from accel.models.diffusion.facts import DiffusionFacts

# attention that takes any mask; other implementations build their own from lengths
_TAKES_MASK = ("sdpa", "eager")
# RMS of a difference over RMS of the logits, below which two readings of one row are the same reading
_SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
_SAME_IN_HALF = 5e-2


@dataclass
class BlockCache:
    """Keys and values of whole rows, as they were when ``Denoiser.open`` read them; each pass rewrites the block's.

    ``start``, ``stop``: each row's block; ``lengths``: the rows' whole lengths. Approximate by nature: what is kept
    does not know what the block has become since. ``keys``, ``values``: per layer [R, Hkv, T + 1, D], T the longest
    row; the last column takes what padding writes.
    """

    start: list[int]
    stop: list[int]
    lengths: list[int]
    dual: bool
    keys: list[Tensor]
    values: list[Tensor]

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def select(self, rows: Sequence[int]) -> BlockCache:
        """Some of the rows (a copy), by their index, in the order given."""
        rows = list(rows)
        width = max(self.lengths[row] for row in rows) + 1
        return replace(
            self,
            start=[self.start[row] for row in rows],
            stop=[self.stop[row] for row in rows],
            lengths=[self.lengths[row] for row in rows],
            keys=[each[rows, :, :width] for each in self.keys],
            values=[each[rows, :, :width] for each in self.values],
        )

    @staticmethod
    def join(caches: Sequence[BlockCache]) -> BlockCache:
        """All rows of several caches in one (a copy), in their order, so that one forward pass serves them all."""
        first = caches[0]
        assert all(each.dual == first.dual for each in caches), "one forward pass has one way to read its rows"
        width = max(max(each.lengths) for each in caches) + 1

        def together(tensors: Iterator[Tensor]) -> Tensor:
            return torch.cat([nn.functional.pad(t, (0, 0, 0, width - t.shape[2])) for t in tensors])

        layers = range(len(first.keys))
        return replace(
            first,
            start=[position for each in caches for position in each.start],
            stop=[position for each in caches for position in each.stop],
            lengths=[length for each in caches for length in each.lengths],
            keys=[together(each.keys[layer] for each in caches) for layer in layers],
            values=[together(each.values[layer] for each in caches) for layer in layers],
        )


class Denoiser:
    """Bidirectional logits of chosen positions; rows of different length in one batch.

    ModelError for a model that cannot be read without causality: it is tried when this is made.
    """

    def __init__(self, model: PreTrainedModel, facts: DiffusionFacts) -> None:
        facts.check(model.config)
        config = model.config.get_text_config(decoder=True)
        self.model, self.facts, self.config = model, facts, config
        # whose layers ``cpu_linear`` may speed up where the model drafts
        self.linears: nn.Module = model
        self.vocab_size: int = config.vocab_size
        self.is_masked_lm = is_masked_lm(model)
        # a table of learned positions ends; rotations go on, if with less and less sense
        self.has_position_table = not hasattr(config, "rope_parameters")
        self.max_positions: int | None = _max_positions(model, config)
        self._takes_positions = not self.is_masked_lm and "position_ids" in inspect.signature(model.forward).parameters
        self._takes_cache = not self.is_masked_lm and "past_key_values" in inspect.signature(model.forward).parameters
        self._shift = int(facts.shift)
        self._gathers = False
        self._refuse_what_cannot_be_read()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def logits(self, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        """Logits of the tokens at some positions of each row, from one forward pass over all rows.

        rows: int64 [T_r] each (prompt and canvas); at: int64 [L_r] each, positions whose token is asked for
        → [L_r, V] each, in the model's type. Shifted models are unshifted here: the logits of position p are those
        that the model gives at p - 1 (at 0: its own). Padding changes nothing.
        """
        return self.differentiable(rows, at)

    def differentiable(self, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        """``logits`` as training needs them: gradients follow the caller's grad mode."""
        lengths = [len(row) for row in rows]
        return self._answers(self._inputs(rows), lengths, [0] * len(rows), at)

    @cached_property
    def supports_cache(self) -> bool:
        """Whether ``open`` and ``logits_cached`` may be used: full attention in every layer, and a trial that agrees.

        Masked-LM classes have no cache, and a sliding window would have to know which positions are where.
        """
        if not self._takes_cache or _has_windows(self.config):
            return False
        training = self.model.training
        try:
            self.model.eval()
            return self._cache_agrees()
        except Exception:  # a family whose layers want a cache of their own kind raises whatever it likes
            return False
        finally:
            self.model.train(training)

    @torch.no_grad()
    def open(
        self, rows: Sequence[Tensor], start: Sequence[int], stop: Sequence[int], *, dual: bool
    ) -> tuple[BlockCache, list[Tensor]]:
        """Read the rows whole, keep their keys and values, and answer for their blocks [start, stop).

        ``dual``: what stands behind the block is kept as it is now; else ``logits_cached`` reads it again each time
        → (cache, logits [stop - start, V] each). IncompatibleError where the model has no cache.
        """
        if not self.supports_cache:
            raise IncompatibleError(
                f"{type(self.model).__name__} cannot keep keys and values of a block's surroundings: use cache='none'"
            )
        return self._open(rows, start, stop, dual)

    @torch.no_grad()
    def logits_cached(self, cache: BlockCache, rows: Sequence[Tensor], at: Sequence[Tensor]) -> list[Tensor]:
        """As ``logits``, reading only each row's block (not dual: from the block to the row's end).

        rows: the whole rows as they are now, in the cache's order; at: positions of the row, in [start, stop).
        Shifted models read one position more, that in front of the block.
        """
        assert [len(row) for row in rows] == cache.lengths, "a cache is of the rows that it was opened with"
        device, width = self.device, max(cache.lengths)
        first = [max(0, start - self._shift) for start in cache.start]
        end = cache.stop if cache.dual else cache.lengths
        windows = [row[a:b] for row, a, b in zip(rows, first, end, strict=True)]
        tokens = self._padded(windows)
        column = torch.arange(tokens.shape[1], device=device)
        positions = torch.tensor(first, device=device)[:, None] + column
        ends = torch.tensor(end, device=device)[:, None]
        # padding writes into the column behind all rows, which nobody reads
        slots = torch.where(positions < ends, positions, width)
        inputs = {
            "input_ids": tokens,
            "attention_mask": self._mask(cache.lengths, tokens.shape[1], width + 1),
            "past_key_values": _Blocks(cache.keys, cache.values, slots),
            "use_cache": True,
        }
        if self._takes_positions:
            inputs["position_ids"] = positions.clamp(max=width - 1)
        return self._answers(inputs, [len(window) for window in windows], first, at)

    def _open(
        self, rows: Sequence[Tensor], start: Sequence[int], stop: Sequence[int], dual: bool
    ) -> tuple[BlockCache, list[Tensor]]:
        lengths = [len(row) for row in rows]
        blocks = list(zip(start, stop, lengths, strict=True))
        assert all(0 <= a < b <= length for a, b, length in blocks), "a block is a part of its row"
        kept = _Blocks([], [], None)
        inputs = self._inputs(rows) | {"past_key_values": kept, "use_cache": True}
        at = [torch.arange(a, b) for a, b, _ in blocks]
        answers = self._answers(inputs, lengths, [0] * len(rows), at)
        return BlockCache(list(start), list(stop), lengths, dual, kept.keys, kept.values), answers

    def _inputs(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        """What the class takes to read whole rows in both directions, padded on the right."""
        lengths = [len(row) for row in rows]
        if self.has_position_table and self.max_positions is not None and max(lengths) > self.max_positions:
            raise ModelError(
                f"a row of {max(lengths)} tokens: {type(self.model).__name__} has positions for {self.max_positions}; "
                "shorten the prompt or max_new_tokens"
            )
        tokens = self._padded(rows)
        width = tokens.shape[1]
        if self.is_masked_lm:
            # its own positions too: some families number them from behind their padding token
            there = torch.arange(width, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
            return {"input_ids": tokens, "attention_mask": there.long()}
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": self._mask(lengths, width, width)}
        if self._takes_cache:
            inputs["use_cache"] = False
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(width, device=self.device).expand(len(rows), -1)
        return inputs

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        # masked-LM families know their padding token by its id
        pad = self.config.pad_token_id if self.is_masked_lm else self.facts.pad_token
        return pad_sequence([row.to(self.device) for row in rows], batch_first=True, padding_value=pad or 0)

    def _mask(self, lengths: Sequence[int], queries: int, width: int) -> Tensor:
        """[R, 1, queries, width]: every query sees its row, and no padding."""
        column = torch.arange(width, device=self.device)
        seen = column < torch.tensor(lengths, device=self.device)[:, None]
        if self.config._attn_implementation == "eager":
            # plain attention adds it to the scores; the fused one takes it as it is, whatever autocast makes of scores
            low = torch.finfo(self.model.dtype).min
            seen = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device).masked_fill(~seen, low)
        return seen[:, None, None].expand(-1, 1, queries, -1)

    def _answers(
        self, inputs: dict[str, Any], lengths: Sequence[int], first: Sequence[int], at: Sequence[Tensor]
    ) -> list[Tensor]:
        """One forward pass over windows of rows that begin at ``first``; ``at`` counts from the rows' beginnings."""
        width = inputs["input_ids"].shape[1]
        places = []
        for row, (begin, positions) in enumerate(zip(first, at, strict=True)):
            asked = positions.to(self.device) - self._shift
            places.append(asked.clamp(min=0) - begin + row * width)
        assert all(length > 0 for length in lengths), "a row has at least one token"
        logits = self._forward(inputs, torch.cat(places))
        return list(logits.split([len(each) for each in places]))

    def _forward(self, inputs: dict[str, Any], places: Tensor) -> Tensor:
        """places int64 [N], flat: row · width + column → logits [N, V]; the head is applied to these alone."""
        if not self._gathers:
            return self.model(**inputs).logits.flatten(0, 1)[places]
        with _only(self.model.get_output_embeddings(), inputs["input_ids"].shape, places) as said:
            logits = self.model(**inputs).logits
        return logits.flatten(0, -2) if said else logits.flatten(0, 1)[places]

    @torch.no_grad()
    def _refuse_what_cannot_be_read(self) -> None:
        """ModelError where a position does not see what follows it, or where padding is seen."""
        name = type(self.model).__name__
        implementation = self.config._attn_implementation
        if self.model.config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder: masked diffusion needs a model that reads what it writes")
        if not self.is_masked_lm and implementation not in _TAKES_MASK:
            raise ModelError(
                f"{name} runs {implementation}, which takes no mask of our own: load it with attn_implementation='sdpa'"
            )
        short, other, long = self._trial_rows()
        everywhere = torch.arange(len(short))
        training = self.model.training
        try:
            # dropout would make every reading another one
            self.model.eval()
            (whole,) = self.logits([short], [everywhere])
            self._gathers = self._gathering_agrees(short, whole)
            together, changed, _ = self.logits([short, other, long], [everywhere, everywhere, everywhere])
        except Exception as error:  # whatever a class raises for a mask that it does not expect
            raise ModelError(f"{name} cannot be read in both directions: {first_line(error)}") from error
        finally:
            self.model.train(training)
        if self._same(together[:1], changed[:1]):
            raise ModelError(
                f"{name} reads from left to right only, whatever mask it is given: masked diffusion needs a model "
                "whose positions see what follows them"
            )
        if not self._same(together, whole):
            raise ModelError(f"{name} sees padding behind a row: rows of different length cannot be decoded together")

    def _gathering_agrees(self, row: Tensor, whole: Tensor) -> bool:
        """Whether the head may be applied to single positions: not where a class does more with its whole output."""
        self._gathers = True
        some = torch.tensor([3, 1])
        try:
            (gathered,) = self.logits([row], [some])
        except Exception:  # the shape of its output is the class's own business
            return False
        return self._same(gathered, whole[some.to(whole.device)])

    def _cache_agrees(self) -> bool:
        """Whether a block read again at once, in front of kept keys and values, says what the whole rows said."""
        short, _, long = self._trial_rows()
        for dual in (True, False):
            cache, whole = self._open([short, long], [1, 2], [3, 3], dual)
            again = self.logits_cached(cache, [short, long], [torch.arange(1, 3), torch.arange(2, 3)])
            if not all(self._same(a, b) for a, b in zip(again, whole, strict=True)):
                return False
        return True

    def _trial_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Two rows that differ behind their first position, a mask, and a longer one; no padding token in them."""
        pad = self.config.pad_token_id if self.is_masked_lm else None
        tokens = [token for token in range(min(self.vocab_size, 16)) if token != pad]
        ids = torch.tensor([tokens[i % len(tokens)] for i in range(12)], device=self.device)
        short, other, long = ids[:4].clone(), ids[4:8].clone(), ids[6:12].clone()
        short[0] = other[0] = self.facts.mask_token
        return short, other, long

    def _same(self, ours: Tensor, theirs: Tensor) -> bool:
        error, size = ((each.double() ** 2).mean().sqrt() for each in (ours - theirs, theirs))
        return bool(error <= _SAME.get(self.model.dtype, _SAME_IN_HALF) * size)


class _Blocks(Cache):
    """Where layers put keys and values in the order of positions: whole rows first, then blocks of them again."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], slots: Tensor | None) -> None:
        super().__init__(layers=[])
        self.keys, self.values = keys, values
        # int64 [R, n], the column of each new position; None while whole rows are read
        self.slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [R, Hkv, n, D] and return all that its attention may read."""
        if self.slots is None:
            assert layer_idx == len(self.keys), "layers come in their order"
            # zeros behind the rows: what is masked is multiplied by a weight of zero, and 0 · NaN is NaN
            self.keys.append(nn.functional.pad(key_states, (0, 0, 0, 1)))
            self.values.append(nn.functional.pad(value_states, (0, 0, 0, 1)))
            return key_states, value_states
        rows = torch.arange(len(self.slots), device=self.slots.device)[:, None]
        for store, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            store[rows, :, self.slots] = new.transpose(1, 2)  # [R, n, Hkv, D]
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.slots is None else self.keys[0].shape[2] - self.slots.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        n = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length(layer_idx) + n, 0

    @property
    def is_compileable(self) -> bool:
        return False


@contextmanager
def _only(head: nn.Module | None, shape: Sequence[int], places: Tensor) -> Iterator[list[bool]]:
    """While it lasts, ``head`` is applied to some places of its [R, T, D] input; the list tells whether it was."""
    said: list[bool] = []

    def gather(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if said or not given or given[0].shape[:2] != tuple(shape):
            return None
        said.append(True)
        return (given[0].flatten(0, 1)[places][None], *given[1:])

    handle = head.register_forward_pre_hook(gather) if head is not None else None
    try:
        yield said
    finally:
        if handle is not None:
            handle.remove()


def is_masked_lm(model: PreTrainedModel) -> bool:
    """Whether its class, or one it was derived from, is a masked-LM class of transformers."""
    names = {cls.__name__ for cls in type(model).__mro__}
    known: set[str] = set()
    for value in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        known |= {value} if isinstance(value, str) else set(value)
    return bool(names & known)


def _has_windows(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) != {"full_attention"}
    return getattr(config, "sliding_window", None) is not None


def _max_positions(model: PreTrainedModel, config: Any) -> int | None:
    """How long a row may be by the config; families that number positions from behind their padding token lose some."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    embeddings = getattr(model.base_model, "embeddings", None)
    taken = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return limit if limit is None or taken is None else limit - taken - 1
