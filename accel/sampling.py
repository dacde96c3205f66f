"""From a row's raw logits to the scores its tokens are drawn from: transformers' logits processors, run row by row.

A leaf: knows neither models nor methods. Processors run once per kept token and in order, whatever the decoder
looks ahead, so that stateful ones stay right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from accel.kernels.sampling import sample
from accel.kernels.sampling.reference import NOTHING_TO_CHOOSE
from accel.types import Request

# processors that look at the scores alone: any number of positions can be processed in one call
_IGNORE_IDS = (
    "TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper MinPLogitsWarper TopHLogitsWarper TypicalLogitsWarper "
    "EpsilonLogitsWarper EtaLogitsWarper LogitNormalization InfNanRemoveLogitsProcessor SuppressTokensLogitsProcessor"
).split()
# processors that look at their own row's ids, and at nothing that another call left behind
_ROWWISE = (
    "RepetitionPenaltyLogitsProcessor NoRepeatNGramLogitsProcessor MinLengthLogitsProcessor "
    "MinNewTokensLengthLogitsProcessor SequenceBiasLogitsProcessor NoBadWordsLogitsProcessor "
    "ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor ExponentialDecayLengthPenalty "
    "SuppressTokensAtBeginLogitsProcessor PrefixConstrainedLogitsProcessor"
).split()
IGNORE_IDS = tuple(getattr(hf, name) for name in _IGNORE_IDS if hasattr(hf, name))
ROWWISE = tuple(getattr(hf, name) for name in _ROWWISE if hasattr(hf, name))


class RowwiseProcessor(hf.LogitsProcessor):
    """A processor whose result for a row depends on that row's ids and scores, and on nothing an earlier call left.

    Subclassing is a promise that rows need not stay in step; ``ignores_ids`` is the further one of the first list.
    """

    ignores_ids = False


def _ignores_ids(processor: hf.LogitsProcessor) -> bool:
    return type(processor) in IGNORE_IDS or (isinstance(processor, RowwiseProcessor) and processor.ignores_ids)


class LogitsPipeline:
    """A list of logits processors and what may be assumed of it.

    ``ignores_ids``: positions can be processed together. ``rowwise``: a row's result depends on the row alone; where
    that is not known (somebody's own processor), rows must be processed together and in step.
    """

    def __init__(self, processors: Sequence[hf.LogitsProcessor] = ()) -> None:
        self.processors = list(processors)
        self.ignores_ids = all(map(_ignores_ids, self.processors))
        # warp() means particular tokens by their ids
        self.names_tokens = any(isinstance(p, hf.SuppressTokensLogitsProcessor) for p in self.processors)
        self.rowwise = all(type(p) in IGNORE_IDS + ROWWISE or isinstance(p, RowwiseProcessor) for p in self.processors)

    def __bool__(self) -> bool:
        return bool(self.processors)

    def __call__(self, ids: Tensor, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """ids ``[R, L]``, logits ``[R, V]`` of the batch rows named in ``rows`` → scores ``[R, V]`` in fp32."""
        scores = logits.to(torch.float32, copy=True)
        for processor in self.processors:
            if type(processor) is hf.PrefixConstrainedLogitsProcessor:
                scores = _prefix_constrained(processor, ids, scores, rows)
            else:
                scores = processor(ids, scores)
        return scores

    def warp(self, logits: Tensor) -> Tensor:
        """Only what ignores the ids (temperature, truncation), for a drafter's own logits ``[n, V]``."""
        scores = logits.to(torch.float32, copy=True)
        no_ids = torch.empty(scores.shape[0], 0, dtype=torch.long, device=scores.device)
        for processor in self.processors:
            if _ignores_ids(processor):
                scores = processor(no_ids, scores)
        return scores


def _prefix_constrained(
    processor: hf.PrefixConstrainedLogitsProcessor, ids: Tensor, scores: Tensor, rows: Sequence[int]
) -> Tensor:
    """The processor numbers rows by their place in the call; users mean their place in the batch."""
    user_function = processor._prefix_allowed_tokens_fn
    numbered = hf.PrefixConstrainedLogitsProcessor(lambda place, sent: user_function(rows[place], sent), num_beams=1)
    return numbered(ids, scores)


class RowSampler:
    """One row's history and randomness: scores, draws and uniforms that no other row can influence."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pipeline: LogitsPipeline = request.pipeline if request.pipeline is not None else LogitsPipeline()
        self.generator = torch.Generator().manual_seed(request.seed)
        self.length = len(request.history)
        # room for look-ahead; only processors that read ids need the history at all
        room = request.max_new_tokens + 1 if self.pipeline and not self.pipeline.ignores_ids else 0
        self._ids = torch.cat([request.history, request.history.new_zeros(room)]) if room else request.history

    @property
    def is_argmax(self) -> bool:
        """The next token is simply the most likely one."""
        return not self.request.do_sample and not self.pipeline

    def ids(self, ahead: Sequence[int] = ()) -> Tensor:
        """The history as processors see it, ``[L]``, followed by tentative tokens."""
        if len(self._ids) == len(self.request.history):
            return self._ids
        end = self.length + len(ahead)
        if ahead:
            self._ids[self.length : end] = torch.tensor(ahead, device=self._ids.device)
        return self._ids[:end]

    def push(self, tokens: Sequence[int]) -> None:
        """Append final tokens to the history."""
        self.ids(tokens)
        self.length += len(tokens)

    def scores(self, logits: Tensor, ahead: Sequence[int] = ()) -> Tensor:
        """Scores ``[V]`` of the token after the history and ``ahead``, from raw logits ``[V]``."""
        if not self.pipeline:
            return logits.float()
        return self.pipeline(self.ids(ahead)[None], logits[None], [self.request.id])[0]

    def scores_together(self, logits: Tensor) -> Tensor:
        """Scores ``[n, V]`` of n positions at once; only for pipelines that ignore the ids."""
        assert self.pipeline.ignores_ids
        return self.pipeline.warp(logits) if self.pipeline else logits.float()

    def choose(self, scores: Tensor) -> int:
        """The row's next token from scores ``[V]``: the argmax, or a draw that takes one uniform.

        A draw depends on the scores and on how many tokens the row has drawn before, and on nothing else: whoever
        guesses the token, and however far ahead, the same one comes out.
        """
        if not self.request.do_sample:
            return int(scores.argmax())
        return draw_rows([self], scores[None])[0]

    def uniforms(self, count: int) -> Tensor:
        """The row's next ``count`` uniforms in [0, 1), float64 on the CPU."""
        return torch.rand(count, dtype=torch.float64, generator=self.generator)


def batch_scores(samplers: Sequence[RowSampler], logits: Tensor) -> Tensor:
    """Scores ``[R, V]`` of every row's next token, in as few processor calls as the rows' histories allow."""
    groups: dict[int, list[int]] = {}
    for index, sampler in enumerate(samplers):
        groups.setdefault(id(sampler.pipeline), []).append(index)
    if len(groups) == 1:
        return _scores_of_one_pipeline(samplers, logits)
    scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for members in groups.values():
        scores[members] = _scores_of_one_pipeline([samplers[index] for index in members], logits[members])
    return scores


def _scores_of_one_pipeline(samplers: Sequence[RowSampler], logits: Tensor) -> Tensor:
    pipeline = samplers[0].pipeline
    if not pipeline:
        return logits.float()
    if pipeline.ignores_ids:
        return pipeline.warp(logits)
    if all(s.length == samplers[0].length for s in samplers):
        ids = torch.stack([s.ids() for s in samplers])
        return pipeline(ids, logits, [s.request.id for s in samplers])
    return torch.stack([s.scores(row) for s, row in zip(samplers, logits, strict=True)])


def draw_rows(samplers: Sequence[RowSampler], scores: Tensor) -> list[int]:
    """One token a row from scores ``[R, V]``: argmax, or a draw with the row's own generator."""
    drawn = [index for index, sampler in enumerate(samplers) if sampler.request.do_sample]
    if len(drawn) == len(samplers):
        return checked(_draw(samplers, scores))
    tokens = scores.argmax(-1)
    if drawn:
        tokens[drawn] = _draw([samplers[index] for index in drawn], scores[drawn])
    return checked(tokens)


def _draw(samplers: Sequence[RowSampler], scores: Tensor) -> Tensor:
    uniforms = torch.cat([sampler.uniforms(1) for sampler in samplers])
    return sample(scores, uniforms=uniforms.to(scores.device)).token


def checked(tokens: Tensor) -> list[int]:
    """Chosen tokens ``[R]`` on the host, where a GPU's answer for a row without any allowed token (-1) is refused."""
    chosen: list[int] = tokens.tolist()
    if any(token < 0 for token in chosen):
        raise ValueError(NOTHING_TO_CHOOSE)
    return chosen
