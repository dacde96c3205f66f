"""Keys and values of independent rows, in the place of transformers' cache.

A row's context is a chain of immutable segments, shared by any number of rows, followed by a tail of its own. Rows
have their own lengths and are opened, forked and closed at any time. Tokens written by forward passes are tentative
until ``commit`` keeps a prefix of them; what is not kept is simply overwritten later. Knows nothing of models.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from accel.kernels.prefix_attention import Plan, SharedKV, plan

# tails grow by doubling from here, so that growing costs O(1) a token
MIN_TAIL_CAPACITY = 256


@dataclass(frozen=True, eq=False)
class Segment:
    """An immutable piece of context: per layer keys and values ``[Hkv, P, D]`` (keys already rotated).

    ``num_positions`` is how far it moves the positions of what follows (P, unless an artifact says otherwise).
    ``bias``: per layer ``[Hkv, P]``, added to the scores of its slots, where an artifact has one.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_positions: int
    bias: tuple[Tensor, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[1]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values, *(self.bias or ())))


@dataclass
class Row:
    """One row's chain of segments and the length of its own tail, stored in ``slot``.

    The tail ends with ``num_tentative`` tokens that no commit has kept or dropped yet.
    """

    slot: int
    segments: tuple[Segment, ...]
    tail_length: int = 0
    num_tentative: int = 0

    @property
    def offset(self) -> int:
        """Position of the first tail token."""
        return sum(s.num_positions for s in self.segments)


@dataclass
class Step:
    """One forward pass under way: the rows it advances, each by n tentative tokens from ``starts[r]`` of its tail."""

    rows: list[Row]
    starts: list[int]
    n: int
    plans: dict[int | None, Plan] = field(default_factory=dict)
    slots: Tensor | None = None
    positions: Tensor | None = None

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of context of each row, before the pass."""
        pairs = zip(self.rows, self.starts, strict=True)
        return [sum(s.num_tokens for s in row.segments) + start for row, start in pairs]

    @property
    def first_positions(self) -> list[int]:
        """Position of each row's first new token."""
        return [row.offset + start for row, start in zip(self.rows, self.starts, strict=True)]

    @property
    def end(self) -> int:
        return max(self.starts) + self.n

    def contiguous_slots(self) -> slice | None:
        """The rows' slots as a slice where they are consecutive, so that tails can be read without a copy."""
        first = self.rows[0].slot
        if all(row.slot == first + i for i, row in enumerate(self.rows)):
            return slice(first, first + len(self.rows))
        return None


@dataclass(frozen=True)
class LayerView:
    """What the attention function of one layer reads: it stands where transformers passes keys and values."""

    keys: Tensor
    values: Tensor
    step: Step
    layer: int

    def plan(self, window: int | None, device: torch.device, dtype: torch.dtype) -> Plan:
        """The step's attention plan for a window size, made once for all layers."""
        if window not in self.step.plans:
            rows = self.step.rows
            offsets = [row.offset for row in rows]
            self.step.plans[window] = plan(
                self.step.starts, self.step.n, offsets, window=window, device=device, dtype=dtype
            )
        return self.step.plans[window]

    def segments(self) -> list[SharedKV]:
        """Every distinct (segment, first position) in this layer with the rows that read it, in chain order."""
        readers: dict[tuple[int, int], tuple[Segment, list[int]]] = {}
        for index, row in enumerate(self.step.rows):
            position = 0
            for segment in row.segments:
                readers.setdefault((id(segment), position), (segment, []))[1].append(index)
                position += segment.num_positions
        return [
            SharedKV(
                segment.keys[self.layer],
                segment.values[self.layer],
                tuple(rows),
                position,
                None if segment.bias is None else segment.bias[self.layer],
            )
            for (_, position), (segment, rows) in readers.items()
        ]


class RowCache(Cache):
    """The rows of one model. With ``views`` the layers get a ``LayerView``; without, left-padded tensors."""

    def __init__(self, *, views: bool) -> None:
        super().__init__(layers=[])
        self.views = views
        self.rows: dict[int, Row] = {}
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        # layers that keep keys, in the order they came: a hybrid's others do not
        self._places: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._next_row = 0
        self._step: Step | None = None

    def open(self, segments: Iterable[Segment] = ()) -> int:
        """A new row on top of a chain of segments; returns its name."""
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        self._free_slots.sort(reverse=True)
        name, self._next_row = self._next_row, self._next_row + 1
        slot = self._free_slots.pop()
        for store in (*self._keys, *self._values):
            # what an earlier row left behind is masked by a zero weight, and 0 · inf is NaN
            store[slot : slot + 1] = 0
        self.rows[name] = Row(slot, tuple(segments))
        return name

    def close(self, rows: Iterable[int]) -> None:
        """Forget rows; their segments live on while other rows or artifacts hold them."""
        for name in rows:
            self._free_slots.append(self.rows.pop(name).slot)
        self._close_ranks()
        if not self.rows:
            self._keys, self._values, self._free_slots, self._num_slots = [], [], [], 0
            self._places = {}

    def _close_ranks(self) -> None:
        """Move the last rows into the holes that closed ones left: rows side by side are read without a copy."""
        by_slot = sorted(self.rows.values(), key=lambda row: row.slot)
        for hole in sorted(self._free_slots):
            if not by_slot or by_slot[-1].slot < hole:
                return
            row = by_slot.pop()
            end = row.tail_length + row.num_tentative
            for store in (*self._keys, *self._values):
                # what has no keys yet may lie behind the end of the store
                if end:
                    store[hole, :, :end] = store[row.slot, :, :end]
                store[hole : hole + 1, :, end:] = 0
            self._free_slots[self._free_slots.index(hole)] = row.slot
            row.slot = hole
            bisect.insort(by_slot, row, key=lambda row: row.slot)

    def freeze(self, name: int) -> None:
        """Turn a row's tail into an immutable segment (a copy) at the end of the row's own chain.

        Without any keys, where no layer keeps some, the tail only counts tokens and stays.
        """
        row = self.rows[name]
        assert row.num_tentative == 0, "only what is committed can be shared"
        end = row.tail_length
        if end == 0 or not self._keys:
            return
        segment = Segment(
            tuple(k[row.slot, :, :end].clone() for k in self._keys),
            tuple(v[row.slot, :, :end].clone() for v in self._values),
            num_positions=end,
        )
        row.segments, row.tail_length = (*row.segments, segment), 0

    def copy(self, name: int) -> Segment:
        """What a row's tail holds, as a segment of its own; the row stays as it is."""
        row = self.rows[name]
        end = row.tail_length
        return Segment(
            tuple(k[row.slot, :, :end].clone() for k in self._keys),
            tuple(v[row.slot, :, :end].clone() for v in self._values),
            num_positions=end,
        )

    def fill(self, name: int, segment: Segment, length: int) -> None:
        """Begin an empty row's tail with a copy of the first ``length`` slots of a segment.

        A copy and not a link: every distinct segment costs an attention call of its own, in each layer and step.
        """
        row = self.rows[name]
        assert row.tail_length == row.num_tentative == 0, "only an empty row can be filled"
        step = Step([row], [0], length)
        for store, given in ((self._keys, segment.keys), (self._values, segment.values)):
            for layer, new in enumerate(given):
                if layer == len(store):
                    store.append(self._empty(new, new.shape[0], new.shape[2], length))
                store[layer] = self._grown(store[layer], length)
                self._write(store[layer], new[None, :, :length], step)
        for layer in range(len(segment.keys)):
            self._places.setdefault(layer, layer)
        row.tail_length = length

    def place(self, name: int) -> int:
        """Where a row lies: rows that are asked for in this order can be read without a copy."""
        return self.rows[name].slot

    def begin(self, names: Sequence[int], n: int) -> Step:
        """Announce a forward pass that adds n tentative tokens to each of the rows, and make room for them."""
        rows = [self.rows[name] for name in names]
        step = Step(rows, [row.tail_length + row.num_tentative for row in rows], n)
        for row in rows:
            row.num_tentative += n
        for layer in range(len(self._keys)):
            self._keys[layer] = self._grown(self._keys[layer], step.end)
            self._values[layer] = self._grown(self._values[layer], step.end)
        self._step = step
        return step

    def commit(self, names: Sequence[int], keep: Sequence[int]) -> None:
        """Keep the first ``keep[r]`` tentative tokens of each row and drop the rest."""
        for name, count in zip(names, keep, strict=True):
            row = self.rows[name]
            assert 0 <= count <= row.num_tentative, "a row can keep no more than it was given"
            row.tail_length += count
            row.num_tentative = 0

    def commit_path(self, name: int, path: Sequence[int]) -> None:
        """Keep these tentative tokens of a row, in ascending order, and drop the others."""
        row = self.rows[name]
        assert all(i <= place < row.num_tentative for i, place in enumerate(path)), "places ascend"
        start = row.tail_length
        for i, place in enumerate(path):
            if place > i:
                for store in (*self._keys, *self._values):
                    store[row.slot, :, start + i] = store[row.slot, :, start + place]
        self.commit([name], [len(path)])

    def nbytes(self) -> int:
        """Bytes of context held: used tail positions of every row, and each distinct segment once."""
        per_position = sum(t.element_size() * t.shape[1] * t.shape[3] for t in (*self._keys, *self._values))
        segments = {id(s): s for row in self.rows.values() for s in row.segments}
        tails = sum(row.tail_length for row in self.rows.values())
        return per_position * tails + sum(s.nbytes() for s in segments.values())

    # what transformers' models call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store a layer's new keys and values ``[R, Hkv, n, D]`` and hand its attention all it may read."""
        step = self._step
        assert step is not None, "begin() announces every forward pass"
        layer_idx = self._places.setdefault(layer_idx, len(self._places))
        if layer_idx == len(self._keys):
            for store, new in ((self._keys, key_states), (self._values, value_states)):
                store.append(self._empty(new, new.shape[1], new.shape[3], step.end))
        self._write(self._keys[layer_idx], key_states, step)
        self._write(self._values[layer_idx], value_states, step)
        if not self.views:
            return self.gather(layer_idx, step)
        view = LayerView(_read(self._keys[layer_idx], step), _read(self._values[layer_idx], step), step, layer_idx)
        return view, view

    def tails(self, layer: int, kv_heads: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's stores ``[slots, Hkv, capacity, D]``, for a pass that writes its keys and values itself.

        Keys and values are ``like`` in type; both have heads of one size.
        """
        step = self._step
        assert step is not None, "begin() announces every forward pass"
        place = self._places.setdefault(layer, len(self._places))
        if place == len(self._keys):
            for store in (self._keys, self._values):
                store.append(self._empty(like, kv_heads, size, step.end))
        return self._keys[place], self._values[place]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Left-padded length of the context before the pass under way."""
        return max(self._step.num_tokens) if self._step else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        n = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length(layer_idx) + n, 0

    @property
    def is_compileable(self) -> bool:
        return False

    def gather(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """One layer's whole contexts, left-padded with zeros: keys and values ``[R, Hkv, max tokens, D]``."""
        keys, values = self._keys[layer], self._values[layer]
        if len(step.rows) == 1 and not step.rows[0].segments:
            return _read(keys, step), _read(values, step)
        width = max(step.num_tokens) + step.n
        out_keys = keys.new_zeros(len(step.rows), keys.shape[1], width, keys.shape[3])
        out_values = values.new_zeros(len(step.rows), values.shape[1], width, values.shape[3])
        for index, (row, start, before) in enumerate(zip(step.rows, step.starts, step.num_tokens, strict=True)):
            end, used = start + step.n, before + step.n
            parts_k = [*(s.keys[layer] for s in row.segments), keys[row.slot, :, :end]]
            parts_v = [*(s.values[layer] for s in row.segments), values[row.slot, :, :end]]
            out_keys[index, :, width - used :] = torch.cat(parts_k, dim=1)
            out_values[index, :, width - used :] = torch.cat(parts_v, dim=1)
        return out_keys, out_values

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    def _write(self, store: Tensor, new: Tensor, step: Step) -> None:
        starts, slots = step.starts, step.contiguous_slots()
        if slots is not None and min(starts) == max(starts):
            store[slots, :, starts[0] : starts[0] + step.n] = new
            return
        if step.slots is None:
            step.slots = torch.tensor([row.slot for row in step.rows], device=new.device)[:, None]
            step.positions = torch.tensor(starts, device=new.device)[:, None] + torch.arange(step.n, device=new.device)
        store[step.slots, :, step.positions] = new.transpose(1, 2)  # [R, n, Hkv, D]

    def _empty(self, like: Tensor, kv_heads: int, size: int, length: int) -> Tensor:
        # zeros, not empty: masked positions are multiplied by a zero weight, and 0 · NaN is NaN
        capacity = max(MIN_TAIL_CAPACITY, _next_power_of_two(length))
        return like.new_zeros(max(1, self._num_slots), kv_heads, capacity, size)

    def _grown(self, store: Tensor, length: int) -> Tensor:
        slots, kv_heads, capacity, size = store.shape
        if slots >= self._num_slots and capacity >= length:
            return store
        # by doubling, too: rows that come one after the other would copy all that is there each time
        num_slots = slots if slots >= self._num_slots else _next_power_of_two(self._num_slots)
        grown = store.new_zeros(num_slots, kv_heads, max(capacity, _next_power_of_two(length)), size)
        grown[:slots, :, :capacity] = store
        return grown


def _read(store: Tensor, step: Step) -> Tensor:
    slots = step.contiguous_slots()
    if slots is not None:
        return store[slots, :, : step.end]
    return store[[row.slot for row in step.rows], :, : step.end]


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
