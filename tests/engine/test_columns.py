"""Rows that advance at their own pace become the columns, sequences and scores that transformers would return."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from accel.engine.transformers_call import Columns, row_seed
from accel.types import Chunk, Stats

PAD, VOCAB = 77, 3


class Streamer:
    def __init__(self) -> None:
        self.columns: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.columns.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def columns(rows: int, *, pads: bool = True, streamer: Streamer | None = None, pad: int | None = PAD, **config):
    settings = {"return_dict_in_generate": False, "output_scores": False, "output_logits": False, **config}
    settings["_pad_token_tensor"] = None if pad is None else torch.tensor(pad)
    call = SimpleNamespace(
        config=SimpleNamespace(**settings), streamer=streamer, input_ids=torch.arange(2 * rows).view(rows, 2)
    )
    return Columns(call, rows, pads_after_end=pads)


def test_a_column_is_streamed_as_soon_as_every_row_has_it() -> None:
    streamer = Streamer()
    made = columns(2, streamer=streamer)
    made.add(Chunk(0, [1, 2, 3], False))
    assert streamer.columns == []
    made.add(Chunk(1, [4], False))
    assert streamer.columns == [[1, 4]]
    made.add(Chunk(1, [5, 6, 7], False))
    assert streamer.columns == [[1, 4], [2, 5], [3, 6]]


def test_a_row_that_has_ended_holds_nobody_back_and_is_padded() -> None:
    streamer = Streamer()
    made = columns(3, streamer=streamer)
    made.add(Chunk(0, [1], True))
    made.add(Chunk(1, [2, 3], False))
    made.add(Chunk(2, [4, 5, 6], True))
    assert streamer.columns == [[1, 2, 4], [PAD, 3, 5]]
    made.add(Chunk(1, [7, 8], True))
    assert streamer.columns == [[1, 2, 4], [PAD, 3, 5], [PAD, 7, 6], [PAD, 8, PAD]]
    sequences = made.finish(Stats())
    assert streamer.ended == 1
    assert sequences.tolist() == [[0, 1, 1, PAD, PAD, PAD], [2, 3, 2, 3, 7, 8], [4, 5, 4, 5, 6, PAD]]
    assert sequences[:, 2:].t().tolist() == streamer.columns


def test_a_row_that_ends_last_and_short_loses_no_column() -> None:
    streamer = Streamer()
    made = columns(2, streamer=streamer)
    made.add(Chunk(0, [1, 2, 3], True))
    made.add(Chunk(1, [4], True))
    assert streamer.columns == [[1, 4], [2, PAD], [3, PAD]]


@pytest.mark.parametrize(("pads", "late"), [(True, PAD), (False, 9)])
def test_late_tokens_are_padding_where_transformers_pads(pads: bool, late: int) -> None:
    made = columns(2, pads=pads)
    made.add(Chunk(0, [1], True))
    made.add(Chunk(1, [2], False))
    made.add(Chunk(0, [9], True, late=True))
    made.add(Chunk(1, [3], True))
    assert made.finish(Stats())[:, 2:].tolist() == [[1, late], [2, 3]]
    # late tokens count for nobody
    assert made.num_counted == 3


def test_without_a_padding_token_zeros_fill() -> None:
    made = columns(2, pad=None)
    made.add(Chunk(0, [1, 2], True))
    made.add(Chunk(1, [3], True))
    assert made.finish(Stats())[:, 2:].tolist() == [[1, 2], [3, 0]]


def marks(*tokens: int) -> Tensor:
    return torch.tensor(tokens).float()[:, None].expand(-1, VOCAB).contiguous()


def test_scores_and_logits_come_one_step_at_a_time_and_end_in_zeros() -> None:
    stats = Stats()
    made = columns(2, return_dict_in_generate=True, output_scores=True, output_logits=True)
    made.add(Chunk(1, [4], True, scores=marks(4), logits=marks(-4)))
    made.add(Chunk(0, [1, 2], False, scores=marks(1, 2), logits=marks(-1, -2)))
    made.add(Chunk(0, [3], True, scores=marks(3), logits=marks(-3)))
    output = made.finish(stats)
    assert output.accel is stats
    assert output.sequences[:, 2:].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert [s.shape for s in output.scores] == [(2, VOCAB)] * 3
    assert [s[:, 0].tolist() for s in output.scores] == [[1, 4], [2, 0], [3, 0]]
    assert [s[:, 0].tolist() for s in output.logits] == [[-1, -4], [-2, 0], [-3, 0]]


def test_scores_that_were_not_asked_for_are_none() -> None:
    made = columns(1, return_dict_in_generate=True, output_logits=True)
    made.add(Chunk(0, [1], True, logits=marks(-1)))
    output = made.finish(Stats())
    assert output.scores is None
    assert len(output.logits) == 1


def test_seeds_of_a_calls_rows_differ_and_stay_the_same() -> None:
    seeds = [row_seed(5, i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [row_seed(5, i) for i in range(1000)]
    assert set(seeds).isdisjoint(row_seed(6, i) for i in range(1000))
