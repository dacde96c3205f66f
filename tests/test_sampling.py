"""Processors as transformers runs them, in fewer calls; rows whose draws nobody else can influence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from accel.sampling import IGNORE_IDS, ROWWISE, LogitsPipeline, RowSampler, batch_scores, draw_rows
from accel.types import Request

VOCAB = 12

INDEPENDENT = [
    hf.TemperatureLogitsWarper(0.7),
    hf.TopKLogitsWarper(3),
    hf.TopPLogitsWarper(0.8),
    hf.MinPLogitsWarper(0.1),
    hf.TopHLogitsWarper(0.5),
    hf.TypicalLogitsWarper(0.9),
    hf.EpsilonLogitsWarper(0.01),
    hf.EtaLogitsWarper(0.01),
    hf.LogitNormalization(),
    hf.InfNanRemoveLogitsProcessor(),
    hf.SuppressTokensLogitsProcessor([1, 2]),
]
OF_THE_ROW = [
    hf.RepetitionPenaltyLogitsProcessor(1.5),
    hf.NoRepeatNGramLogitsProcessor(2),
    hf.MinLengthLogitsProcessor(9, torch.tensor([0])),
    hf.MinNewTokensLengthLogitsProcessor(3, 4, torch.tensor([0])),
    hf.SequenceBiasLogitsProcessor([[[3], 2.0], [[4, 5], -3.0]]),
    hf.NoBadWordsLogitsProcessor([[6], [2, 7]], eos_token_id=torch.tensor([0])),
    hf.ForcedBOSTokenLogitsProcessor(1),
    hf.ForcedEOSTokenLogitsProcessor(9, torch.tensor([0])),
    hf.ExponentialDecayLengthPenalty((2, 1.5), torch.tensor([0]), 3),
    hf.SuppressTokensAtBeginLogitsProcessor([5], 4),
    hf.PrefixConstrainedLogitsProcessor(lambda row, ids: [row, row + 1, 8], 1),
]


class Mine(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Warmer(hf.TemperatureLogitsWarper):
    """A subclass may look at anything, whatever its parent does."""


def name(processor: object) -> str:
    return type(processor).__name__


def sampler(id: int, history: list[int], pipeline: LogitsPipeline | None, **kwargs) -> RowSampler:
    ids = torch.tensor(history)
    return RowSampler(Request(id=id, prompt=ids, history=ids, max_new_tokens=9, pipeline=pipeline, **kwargs))


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed))


# -- what may be assumed of a processor


@pytest.mark.parametrize("processor", INDEPENDENT, ids=name)
def test_some_look_at_the_scores_alone(processor) -> None:
    pipeline = LogitsPipeline([processor])
    assert (pipeline.ignores_ids, pipeline.rowwise, bool(pipeline)) == (True, True, True)


@pytest.mark.parametrize("processor", OF_THE_ROW, ids=name)
def test_some_look_at_their_rows_ids(processor) -> None:
    pipeline = LogitsPipeline([processor])
    assert (pipeline.ignores_ids, pipeline.rowwise) == (False, True)


@pytest.mark.parametrize("processor", [Mine(), Warmer(0.5)], ids=name)
def test_nothing_is_assumed_of_others(processor) -> None:
    pipeline = LogitsPipeline([INDEPENDENT[0], processor])
    assert (pipeline.ignores_ids, pipeline.rowwise) == (False, False)


def test_the_lists_above_are_complete() -> None:
    assert {type(p) for p in INDEPENDENT} == set(IGNORE_IDS)
    assert {type(p) for p in OF_THE_ROW} == set(ROWWISE)


def test_an_empty_pipeline_assumes_everything_and_does_nothing() -> None:
    pipeline = LogitsPipeline()
    assert (pipeline.ignores_ids, pipeline.rowwise, bool(pipeline)) == (True, True, False)
    given = logits(2)
    assert torch.equal(pipeline(torch.zeros(2, 1), given, [0, 1]), given)


# -- scores


@pytest.mark.parametrize("processor", [*INDEPENDENT, *OF_THE_ROW[:-1]], ids=name)
def test_scores_are_what_the_processor_says(processor) -> None:
    ids, given = torch.tensor([[1, 4, 4, 2], [4, 5, 4, 4]]), logits(2)
    before = given.clone()
    got = LogitsPipeline([processor])(ids, given, [0, 1])
    assert torch.equal(got, processor(ids, before.clone()))
    assert torch.equal(given, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32(dtype: torch.dtype) -> None:
    given = logits(2).to(dtype)
    for got in (
        LogitsPipeline(INDEPENDENT[:1])(torch.zeros(2, 1), given, [0, 1]),
        batch_scores([sampler(0, [1], None)], given[:1]),
    ):
        assert got.dtype == torch.float32


def test_warp_takes_what_ignores_the_ids_in_order() -> None:
    pipeline = LogitsPipeline([OF_THE_ROW[0], INDEPENDENT[0], INDEPENDENT[1], Mine()])
    given = logits(4)
    none = torch.empty(4, 0, dtype=torch.long)
    assert torch.equal(pipeline.warp(given), INDEPENDENT[1](none, INDEPENDENT[0](none, given.clone())))


@pytest.mark.parametrize(
    "processors",
    [[], INDEPENDENT[:3], [OF_THE_ROW[0], INDEPENDENT[0]], [OF_THE_ROW[-1]], [OF_THE_ROW[1]]],
    ids=["none", "independent", "penalty", "allowed", "n-grams"],
)
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_batch_scores_are_the_rows_own(processors: list, ragged: bool) -> None:
    pipeline = LogitsPipeline(processors)
    histories = [[1, 4, 4], [4, 5, 4], [2, 2, 2]]
    if ragged:
        histories[1] = [3, 4, 5, 4]
    samplers = [sampler(id, h, pipeline) for id, h in zip((2, 0, 5), histories, strict=True)]
    given = logits(3)
    together = batch_scores(samplers, given)
    assert torch.equal(together, torch.stack([s.scores(row) for s, row in zip(samplers, given, strict=True)]))
    assert not processors or not torch.equal(together, given)


def test_rows_of_different_pipelines_keep_their_own() -> None:
    cold, hot = LogitsPipeline([hf.TemperatureLogitsWarper(0.5)]), LogitsPipeline([hf.TemperatureLogitsWarper(2.0)])
    given = logits(2)
    got = batch_scores([sampler(0, [1], cold), sampler(1, [1], hot)], given)
    assert torch.allclose(got, torch.stack([given[0] / 0.5, given[1] / 2.0]))


def test_together_a_memory_is_called_once_a_step() -> None:
    calls = []

    class Counting(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            calls.append(tuple(input_ids.shape))
            return scores

    pipeline = LogitsPipeline([Counting()])
    batch_scores([sampler(i, [1, 2, 3], pipeline) for i in range(4)], logits(4))
    assert calls == [(4, 3)]


def test_allowed_tokens_are_asked_for_with_the_batchs_row_number() -> None:
    asked = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        asked.append((row, ids.tolist()))
        return [row]

    pipeline = LogitsPipeline([hf.PrefixConstrainedLogitsProcessor(allowed, 1)])
    got = pipeline(torch.tensor([[1, 2], [3, 4]]), logits(2), [7, 2])
    assert asked == [(7, [1, 2]), (2, [3, 4])]
    assert got.argmax(-1).tolist() == [7, 2]
    assert int((got > -torch.inf).sum()) == 2


# -- one row's history and randomness


def test_history_grows_by_what_is_pushed_and_not_by_what_is_ahead() -> None:
    row = sampler(0, [1, 2], LogitsPipeline(OF_THE_ROW[:1]))
    assert row.ids([3, 4, 5]).tolist() == [1, 2, 3, 4, 5]
    assert row.ids().tolist() == [1, 2]
    row.push([6, 7])
    assert row.ids().tolist() == [1, 2, 6, 7]
    assert row.ids([8]).tolist() == [1, 2, 6, 7, 8]
    row.push([9])
    assert (row.ids().tolist(), row.length) == ([1, 2, 6, 7, 9], 5)
    assert row.request.history.tolist() == [1, 2]


def test_there_is_room_for_all_that_a_request_may_gain() -> None:
    row = sampler(0, [1], LogitsPipeline(OF_THE_ROW[:1]))
    row.push(list(range(8)))
    assert row.ids([8, 9]).tolist() == [1, *range(10)]


@pytest.mark.parametrize("processor", [*OF_THE_ROW[:6], OF_THE_ROW[8]], ids=name)
def test_scores_ahead_are_the_scores_of_the_longer_history(processor) -> None:
    pipeline, given = LogitsPipeline([processor]), logits(1)[0]
    ahead = sampler(3, [1, 4], pipeline).scores(given, [4, 5, 4])
    assert torch.equal(ahead, sampler(3, [1, 4, 4, 5, 4], pipeline).scores(given))


def test_a_row_without_processors_that_read_ids_keeps_no_copy() -> None:
    row = sampler(0, [1, 2], LogitsPipeline(INDEPENDENT[:2]))
    row.push([5, 6])
    assert row.length == 4
    assert row.ids().data_ptr() == row.request.history.data_ptr()
    given = logits(3)
    assert torch.equal(row.scores_together(given), torch.stack([row.scores(g) for g in given]))


def test_argmax_is_all_there_is_to_greedy_decoding_without_processors() -> None:
    assert sampler(0, [1], None).is_argmax
    assert not sampler(0, [1], None, do_sample=True).is_argmax
    assert not sampler(0, [1], LogitsPipeline(INDEPENDENT[:1])).is_argmax


def test_uniforms_are_a_rows_own() -> None:
    first, second = (sampler(i, [1], None, seed=i) for i in range(2))
    alone = sampler(0, [1], None, seed=0).uniforms(6)
    mixed = []
    for _ in range(3):
        mixed.append(first.uniforms(2))
        second.uniforms(5)
        torch.rand(3)
    assert torch.equal(torch.cat(mixed), alone)
    assert alone.dtype == torch.float64
    assert not torch.equal(second.uniforms(6), alone)


def test_drawing_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    draw_rows([sampler(0, [1], None, do_sample=True)], logits(1))
    assert torch.equal(torch.rand(1), expected)


def test_draws_greedy_and_sampled_side_by_side() -> None:
    scores = logits(3)
    rows = [sampler(i, [1], None, do_sample=i == 1, seed=9) for i in range(3)]
    got = draw_rows(rows, scores)
    assert [got[0], got[2]] == [int(scores[0].argmax()), int(scores[2].argmax())]
    alone = draw_rows([sampler(1, [1], None, do_sample=True, seed=9)], scores[1:2])
    assert got[1] == alone[0]


def test_draws_follow_the_scores() -> None:
    scores = torch.full((1, VOCAB), -torch.inf)
    scores[0, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    row = sampler(0, [1], None, do_sample=True, seed=1)
    counts = torch.bincount(torch.tensor([draw_rows([row], scores)[0] for _ in range(4000)]), minlength=VOCAB)
    # 4000 draws: a standard deviation of at most 0.008
    assert torch.allclose(counts[:3] / 4000, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    assert int(counts[3:].sum()) == 0
