"""The memories of independent rows: recurrent states that can take tokens back, beside the softmax layers' cache.

A row's state lags behind its kept tokens by at most a buffer: inputs that were read stand there, the kept ones first
and the tentative ones behind them, and ``commit`` only counts. What is final when it is read goes straight into the
state. All linear layers of a model are alike, so that one tensor holds a kind of memory for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.kernels.conv_features import ConvState
from accel.kernels.linear_attention import Replay, State, fold, replay_step, replay_terms
from accel.models.linear.lines import Line, Slots
from accel.models.linear.memory import Memory, Projected, attend, combine, linear_inputs
from accel.models.linear.spec import CONV_WIDTH, Heads, LinearSpec
from accel.models.linear.window import WindowState, window_terms
from accel.models.row_cache import RowCache, Segment, Step

if TYPE_CHECKING:
    from accel.models.linear.layer import LinearAttention

# tokens that a row may hold back; a draft seldom has more, and a long one makes the buffers grow for a while
CAPACITY = 16


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An immutable copy of one row's memories in all linear layers: rows can be opened on it, any number of them.

    s [L, H, K, V], z [L, H, K], and the last inputs [L, m, …] of each line.
    """

    s: Tensor
    z: Tensor
    lines: tuple[Tensor, ...]
    # of the softmax layers, empty where there are none
    segments: tuple[Segment, ...]
    num_tokens: int

    def nbytes(self) -> int:
        own = sum(t.numel() * t.element_size() for t in (self.s, self.z, *self.lines))
        return own + sum(segment.nbytes() for segment in self.segments)


@dataclass
class Pass:
    """One forward pass under way. ``tentative``: per row, what stood there unkept before it. ``final``: how many of
    its tokens each row keeps, where that is known; with ``bounds`` the rows' own tokens are packed."""

    slots: Slots
    tentative: list[int]
    lengths: Tensor | None
    n: int
    final: list[int] | None
    bounds: Tensor | None = None
    # places of the rows' own tokens in the packed and in the padded form
    tokens: Tensor | None = None


class StatePool:
    """The memories of all rows of one model, by the slots of its ``RowCache``."""

    def __init__(self, spec: LinearSpec, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.heads = spec, heads
        self._kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self._device = device
        self.capacity = CAPACITY
        self._num_slots = 0
        # per slot: kept tokens that are not in the state yet
        self._buffered: list[int] = []
        # slots whose tokens of this commit are in their states already
        self._settled: set[int] = set()
        self._pass: Pass | None = None
        self._allocate(0, CAPACITY)

    # rows

    def open(self, slot: int) -> None:
        """Make a slot that of a row without a past."""
        if slot >= self._num_slots:
            self._resize(max(slot + 1, 2 * self._num_slots), self.capacity)
        self._buffered[slot] = 0
        self._settled.discard(slot)
        self._s[:, slot] = 0
        self._z[:, slot] = 0
        for line in self._lines:
            line.buffer[:, slot] = 0

    def clear(self) -> None:
        """Let go of all memory: no row is open."""
        self._buffered, self._num_slots, self.capacity = [], 0, CAPACITY
        self._settled = set()
        self._allocate(0, CAPACITY)

    def save(self, slot: int, segments: tuple[Segment, ...], num_tokens: int) -> Snapshot:
        self._fold([slot])
        lines = tuple(line.buffer[:, slot, : line.length].clone() for line in self._lines)
        return Snapshot(self._s[:, slot].clone(), self._z[:, slot].clone(), lines, segments, num_tokens)

    def restore(self, slot: int, saved: Snapshot) -> None:
        self._s[:, slot], self._z[:, slot] = saved.s, saved.z
        for line, kept in zip(self._lines, saved.lines, strict=True):
            line.buffer[:, slot, : line.length] = kept

    def row_bytes(self) -> int:
        """Bytes that one row's memories take, however long it is."""
        if not self._num_slots:
            return 0
        stores = (self._s, self._z, *self._replay, *(line.buffer for line in self._lines))
        return sum(t.numel() * t.element_size() for t in stores) // self._num_slots

    # passes

    def begin(self, step: Step, tentative: Sequence[int], final: Sequence[int] | None) -> None:
        """Announce a pass over the step's rows. ``final``: how many of its n tokens each row keeps; None: not known."""
        slots = [row.slot for row in step.rows]
        n = step.n
        # a long final stretch comes in pieces, one behind the other
        tentative = [0 if slot in self._settled else count for slot, count in zip(slots, tentative, strict=True)]
        if final is not None and (any(tentative) or self._prefers_buffer(n, final)):
            final = None
        if final is not None:
            self._fold([slot for slot in slots if self._buffered[slot]])
            self._settled |= set(slots)
            self._pass = self._final_pass(Slots(slots, self._device), n, list(final))
            return
        assert not self._settled & set(slots), "what is final is committed before anything tentative follows it"
        most = max(tentative) + n
        if most > self.capacity:
            self._resize(self._num_slots, 1 << (most - 1).bit_length())
        full = [s for s, t in zip(slots, tentative, strict=True) if self._buffered[s] + t + n > self.capacity]
        if any(t for s, t in zip(slots, tentative, strict=True) if s in full):
            # what is kept cannot be folded from under what is tentative
            used = max(self._buffered[s] + t + n for s, t in zip(slots, tentative, strict=True))
            self._resize(self._num_slots, 1 << (used - 1).bit_length())
        else:
            self._fold(full)
        lengths = [self._buffered[s] + t for s, t in zip(slots, tentative, strict=True)]
        self._pass = Pass(
            Slots(slots, self._device),
            list(tentative),
            torch.tensor(lengths, dtype=torch.int32, device=self._device),
            n,
            None,
        )

    def attend(self, layer: LinearAttention, x: Projected) -> Tensor:
        """Outputs [R, n, H, D] of the pass's tokens in one layer; remembers them."""
        now = self._pass
        assert now is not None, "begin() announces every forward pass"
        return self._tentative(layer, x, now) if now.final is None else self._read(layer, x, now)

    def commit(self, slots: Sequence[int], keep: Sequence[int]) -> None:
        """The first keep[r] tentative tokens stay."""
        keep = [0 if slot in self._settled else count for slot, count in zip(slots, keep, strict=True)]
        self._settled -= set(slots)
        if not any(keep):
            return
        for slot, count in zip(slots, keep, strict=True):
            self._buffered[slot] += count
        for line in self._lines:
            line.shift(Slots(slots, self._device), keep)

    def relax(self) -> None:
        """Give back what a long draft made the buffers grow by; nothing is tentative now."""
        if self.capacity > CAPACITY:
            self._fold([slot for slot, count in enumerate(self._buffered) if count])
            self._resize(self._num_slots, CAPACITY)

    def _prefers_buffer(self, n: int, final: Sequence[int]) -> bool:
        """On a GPU the state's own traffic is what a token costs: writing it once in a buffer's length is cheaper."""
        return self._device.type != "cpu" and max(final) == n <= self.capacity // 4 and min(final) == n

    def _final_pass(self, slots: Slots, n: int, final: list[int]) -> Pass:
        now = Pass(slots, [0] * len(final), None, n, final)
        if min(final) < n:
            now.bounds = torch.tensor([0, *final], device=self._device).cumsum(0).int()
            inside = torch.arange(n) < torch.tensor(final)[:, None]
            now.tokens = inside.flatten().nonzero()[:, 0].to(self._device)
        return now

    def _read(self, layer: LinearAttention, x: Projected, now: Pass) -> Tensor:
        """Tokens that stay: through the kernels for whole sequences, into the state."""
        place, slots = layer.place, now.slots
        before = self._memory(place, slots, now.tentative)
        if now.tokens is None:
            out, after = attend(layer, x, before)
        else:
            tokens = now.tokens
            packed = x.map(lambda each: each.flatten(0, 1)[tokens][None])
            own, after = attend(layer, packed, before, cu_seqlens=now.bounds)
            out = own.new_zeros(len(slots.list) * now.n, *own.shape[2:])
            out[tokens] = own[0]
            out = out.unflatten(0, (len(slots.list), now.n))
        self._s[place, slots.key], self._z[place, slots.key] = after.linear
        kept = [*(after.conv or ()), *(after.window or ())]
        for line, history in zip(self._lines, kept, strict=True):
            line.put(place, slots, history)
        return out

    def _tentative(self, layer: LinearAttention, x: Projected, now: Pass) -> Tensor:
        """Tokens that may be taken back: the state is only read, the inputs are buffered."""
        place, slots = layer.place, now.slots
        assert now.lengths is not None
        before = self._memory(place, slots, now.tentative)
        fresh, _ = linear_inputs(layer, x, before)
        k, v, log_decay = (each[place, slots.key] for each in self._replay)
        replay = Replay(k, v, log_decay, now.lengths.clone())
        options: dict[str, Any] = {"scale": layer.spec.scale, "min_log_decay": layer.spec.min_log_decay}
        if layer.spec.is_fraction:
            out = replay_step(*fresh, before.linear, replay, eps=layer.spec.eps, **options)
        else:
            numerator, denominator = replay_terms(*fresh, before.linear, replay, **options)
            beside = window_terms(layer, x, before.window)[0] if layer.spec.window else None
            out = combine(layer, numerator, denominator, beside)
        if slots.span is None:
            # the kernel wrote into copies
            places = now.lengths.long()[:, None] + torch.arange(now.n, device=self._device)
            rows = torch.arange(len(slots.list), device=self._device)[:, None]
            for store, each in zip(self._replay, (k, v, log_decay), strict=True):
                store[place, slots.index[:, None], places] = each[rows, places]
        for line, new in zip(self._lines, self._line_inputs(x), strict=True):
            line.write(place, slots, now.tentative, new)
        return out

    def _memory(self, place: int, slots: Slots, starts: Sequence[int]) -> Memory:
        """What the rows remember in one layer, before the tokens of this pass."""
        state = State(self._s[place, slots.key], self._z[place, slots.key])
        found = [line.before(place, slots, starts) for line in self._lines]
        conv = ConvState(found[0], found[1]) if self.spec.conv_width else None
        window = WindowState(found[-3], found[-2], found[-1]) if self.spec.window else None
        return Memory(state, conv, window)

    def _line_inputs(self, x: Projected) -> list[Tensor]:
        """What each line takes in of a pass."""
        inputs = [x.q, x.k] if self.spec.conv_width else []
        if self.spec.window:
            assert x.rotated_k is not None
            there = torch.ones(x.q.shape[:2], dtype=torch.bool, device=x.q.device)
            inputs += [x.rotated_k, x.v, there]
        return inputs

    def _fold(self, slots: Sequence[int]) -> None:
        """Move the kept tokens of some rows from their buffers into their states."""
        slots = [slot for slot in slots if self._buffered[slot]]
        if not slots:
            return
        where = Slots(sorted(slots), self._device)
        counts = torch.tensor([self._buffered[slot] for slot in where.list], dtype=torch.int32, device=self._device)
        for place in range(len(self.spec.layers)):
            state = State(self._s[place, where.key], self._z[place, where.key])
            k, v, log_decay = (each[place, where.key] for each in self._replay)
            fold(state, Replay(k, v, log_decay, counts.clone()))
            if where.span is None:
                self._s[place, where.index], self._z[place, where.index] = state
        for slot in slots:
            self._buffered[slot] = 0

    # memory

    def _allocate(self, slots: int, capacity: int) -> None:
        H, Hkv, D, K = self.heads.queries, self.heads.keys, self.heads.width, 2 * self.spec.feature_size
        L, gates = len(self.spec.layers), Hkv if self.spec.gate_rank != 0 else 1
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": self._device}
        self._s = torch.zeros(L, slots, H, K, D, **fp32)
        self._z = torch.zeros(L, slots, H, K, **fp32)
        self._replay = [
            torch.zeros(L, slots, capacity, H, K, **self._kind),
            torch.zeros(L, slots, capacity, Hkv, D, **self._kind),
            torch.zeros(L, slots, capacity, gates, K, **fp32),
        ]
        self._lines: list[Line] = []
        if self.spec.conv_width:
            for heads in (H, Hkv):
                buffer = torch.zeros(L, slots, CONV_WIDTH - 1 + capacity, heads, D, **self._kind)
                self._lines.append(Line(buffer, CONV_WIDTH - 1))
        if self.spec.window:
            m = self.spec.remembered
            for _ in range(2):
                self._lines.append(Line(torch.zeros(L, slots, m + capacity, Hkv, D, **self._kind), m))
            there = torch.zeros(L, slots, m + capacity, dtype=torch.bool, device=self._device)
            self._lines.append(Line(there, m))

    def _resize(self, slots: int, capacity: int) -> None:
        """Room for other numbers of rows and tentative tokens; what still fits stays."""
        old = (self._s, self._z, *self._replay, *(line.buffer for line in self._lines))
        self._allocate(slots, capacity)
        new = (self._s, self._z, *self._replay, *(line.buffer for line in self._lines))
        for i, (before, now) in enumerate(zip(old, new, strict=True)):
            rows = min(before.shape[1], slots)
            if i < 2:
                now[:, :rows] = before[:, :rows]
            else:
                places = min(before.shape[2], now.shape[2])
                now[:, :rows, :places] = before[:, :rows, :places]
        self._buffered += [0] * (slots - len(self._buffered))
        self._num_slots, self.capacity = slots, capacity


class LinearRowCache(RowCache):
    """A ``RowCache`` for models with linear layers: the softmax layers' keys and values, and the pool of states."""

    def __init__(self, states: StatePool) -> None:
        super().__init__(views=True)
        self.states = states

    def open(self, segments: Iterable[Segment] = ()) -> int:
        name = super().open(segments)
        self.states.open(self.rows[name].slot)
        return name

    def close(self, rows: Iterable[int]) -> None:
        super().close(rows)
        if not self.rows:
            self.states.clear()

    def _close_ranks(self) -> None:
        """Rows stay where their states are."""

    def begin(self, names: Sequence[int], n: int, final: Sequence[int] | None = None) -> Step:
        tentative = [self.rows[name].num_tentative for name in names]
        step = super().begin(names, n)
        self.states.begin(step, tentative, final)
        return step

    def commit(self, names: Sequence[int], keep: Sequence[int]) -> None:
        self.states.commit([self.rows[name].slot for name in names], keep)
        super().commit(names, keep)
        if not any(row.num_tentative for row in self.rows.values()):
            self.states.relax()

    def save(self, name: int) -> Snapshot:
        """The row's whole context, to open others on; its softmax tail becomes a segment that they share."""
        self.freeze(name)
        row = self.rows[name]
        return self.states.save(row.slot, row.segments, row.tail_length)

    def open_on(self, saved: Snapshot) -> int:
        """A new row that continues a saved one."""
        name = self.open(saved.segments)
        self.rows[name].tail_length = saved.num_tokens
        self.states.restore(self.rows[name].slot, saved)
        return name

    def nbytes(self) -> int:
        return super().nbytes() + len(self.rows) * self.states.row_bytes()
