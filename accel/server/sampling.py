"""From what a request says about sampling to the processors of its logits, in vLLM's order.

Knows nothing of HTTP. Processors cost microseconds: they run once per token and row, on the engine's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from accel.errors import OptionError
from accel.sampling import LogitsPipeline, RowwiseProcessor
from accel.server.grammar import Grammar

# temperatures below it are greedy decoding, as in vLLM
GREEDY_BELOW = 1e-5
MAX_BIASED = 1024
# field → (least, most, whether the least itself is allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, True),
    "top_p": (0, 1, False),
    "top_k": (0, math.inf, True),
    "min_p": (0, 1, True),
    "frequency_penalty": (-2, 2, True),
    "presence_penalty": (-2, 2, True),
    "repetition_penalty": (0, 100, False),
    "min_tokens": (0, math.inf, True),
}
# what of a model's generation config says how to sample
_OF_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class SamplingFields:
    """What a request says about sampling; the defaults change nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    # 0: all
    top_k: int = 0
    min_p: float = 0.0
    # on tokens of the answer, as OpenAI defines them; the repetition penalty counts the prompt's too
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    # no stop token before so many tokens
    min_tokens: int = 0
    stop_tokens: frozenset[int] = field(default_factory=frozenset)
    # of the model's logits; None: not known, and token ids are not checked
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most, closed) in RANGES.items():
            _check_range(name, getattr(self, name), least, most, closed)
        for name in ("top_k", "min_tokens"):
            if not isinstance(getattr(self, name), int):
                raise OptionError(f"{name}={getattr(self, name)!r}: must be a whole number")
        for token in self.stop_tokens:
            self._check_token("stop_tokens", token)
        if len(self.logit_bias or ()) > MAX_BIASED:
            raise OptionError(f"logit_bias names {len(self.logit_bias or ())} tokens: at most {MAX_BIASED} are allowed")
        for token, bias in (self.logit_bias or {}).items():
            self._check_token("logit_bias", token)
            _check_range(f"logit_bias of token {token}", bias, -100, 100, True)

    def _check_token(self, name: str, token: object) -> None:
        most = math.inf if self.vocab_size is None else self.vocab_size - 1
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= most:
            allowed = "0 or more" if self.vocab_size is None else f"0 to {most}"
            raise OptionError(f"{name} names the token {token!r}: token ids are whole numbers, {allowed}")


def defaults(model: Any) -> SamplingFields:
    """What a model's generation config says, for requests that leave it out; as in vLLM, all but ``do_sample``."""
    config = getattr(model, "generation_config", None)
    told = {name: getattr(config, name, None) for name in _OF_CONFIG}
    size = model.get_input_embeddings().num_embeddings
    return SamplingFields(**{name: value for name, value in told.items() if value is not None}, vocab_size=size)


def sampling_for(
    fields: SamplingFields, *, prompt: Sequence[int], grammar: Grammar | None = None
) -> tuple[bool, Callable[[], LogitsPipeline]]:
    """Whether tokens are drawn, and what makes the pipeline of one continuation.

    Requests whose fields mean the same get one object, whose rows are processed together; with a grammar each
    continuation has its own.
    """
    do_sample = fields.temperature >= GREEDY_BELOW
    length = len(prompt)
    wanted = _key(fields, length)
    shared = _pipeline(*wanted)
    if grammar is None:
        return do_sample, lambda: shared
    # first of all: what it forbids can never be allowed again
    return do_sample, lambda: LogitsPipeline([grammar.processor(length), *shared.processors])


def _key(fields: SamplingFields, prompt_length: int) -> tuple[Any, ...]:
    """Of the fields what matters for the processors, in the order of ``_pipeline``."""
    greedy = fields.temperature < GREEDY_BELOW
    stops = tuple(sorted(fields.stop_tokens)) if fields.min_tokens else ()
    penalties = (fields.frequency_penalty, fields.presence_penalty)
    return (
        # what counts the answer's tokens alone must know where it begins
        prompt_length if stops or any(penalties) else 0,
        fields.min_tokens if stops else 0,
        stops,
        tuple(sorted((fields.logit_bias or {}).items())),
        fields.repetition_penalty,
        *penalties,
        1.0 if greedy else fields.temperature,
        # what is cut off is never the best token
        0.0 if greedy else fields.min_p,
        0 if greedy else fields.top_k,
        1.0 if greedy else fields.top_p,
    )


@lru_cache(maxsize=256)
def _pipeline(
    prompt_length: int,
    min_tokens: int,
    stop_tokens: tuple[int, ...],
    logit_bias: tuple[tuple[int, float], ...],
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
) -> LogitsPipeline:
    processors: list[LogitsProcessor] = []
    if stop_tokens:
        processors.append(MinTokens(prompt_length + min_tokens, stop_tokens))
    if logit_bias:
        processors.append(LogitBias(dict(logit_bias)))
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if frequency_penalty or presence_penalty:
        processors.append(OutputPenalties(prompt_length, frequency_penalty, presence_penalty))
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if min_p > 0 or top_k > 0 or top_p < 1:
        processors.append(Truncation(min_p=min_p, top_k=top_k, top_p=top_p))
    return LogitsPipeline(processors)


def _check_range(name: str, value: object, least: float, most: float, closed: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most or (value == least and not closed):  # type: ignore[operator]
        at_least = f"{'at least' if closed else 'more than'} {least:g}"
        raise OptionError(
            f"{name}={value!r}: must be {at_least}" + (f" and at most {most:g}" if most < math.inf else "")
        )


class MinTokens(RowwiseProcessor):
    """No end before ``length`` ids; where a grammar allows nothing but an end, it stays allowed."""

    def __init__(self, length: int, stop_tokens: Sequence[int]) -> None:
        self._length = length
        self._stop_tokens = torch.tensor(stop_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self._length:
            return scores
        going_on = scores.index_fill(1, self._stop_tokens.to(scores.device), -math.inf)
        return torch.where(going_on.amax(1, keepdim=True) > -math.inf, going_on, scores)


class LogitBias(RowwiseProcessor):
    """Adds a number to the scores of some tokens.

    It does not claim ``ignores_ids``: drafters apply what does to vocabularies of their own.
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values = self._values.to(scores).expand(len(scores), -1)
        return scores.index_add(1, self._tokens.to(scores.device), values)


class OutputPenalties(RowwiseProcessor):
    """OpenAI's penalties on what stands behind the prompt: ``frequency`` for each time, ``presence`` once."""

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self._prompt_length = prompt_length
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self._prompt_length :]
        ones = torch.ones_like(answer, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, answer, ones).gather(1, answer)
        # a token that stands there twice is written twice, with the same value
        return scores.scatter(1, answer, scores.gather(1, answer) - self._frequency * counts - self._presence)


class Truncation(RowwiseProcessor):
    """Keeps the tokens at least ``min_p`` times as likely as the best, of these the ``top_k`` most likely, and of
    these as few as have ``top_p`` of the mass. Tokens as likely as the last one that is kept are kept too.

    transformers' warpers sort the whole vocabulary with torch, which takes tens of milliseconds a row on a busy CPU;
    numpy's sort takes a fraction of one, and of a peaked row only its best tokens need to be sorted.
    """

    ignores_ids = True

    # what is further below the best score is looked at only when the rest does not suffice
    WIDTH = 8.0

    def __init__(self, *, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> None:
        self._min_p = min_p
        self._top_k = top_k
        self._top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        lowest = torch.tensor([self._lowest(row) for row in scores.cpu().numpy()], device=scores.device)
        return scores.masked_fill(scores < lowest[:, None], -math.inf)

    def _lowest(self, row: NDArray[np.float32]) -> float:
        """The least score of ``row`` that stays."""
        kept = self._kept(_descending(row[row >= row.max() - self.WIDTH]), row)
        if kept is None:
            kept = self._kept(_descending(row), row)
            assert kept is not None, "a whole row suffices"
        return float(kept[-1])

    def _kept(self, values: NDArray[np.float32], row: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Of the best scores in descending order those that stay; None where the rest of ``row`` has a say."""
        is_part = len(values) < len(row)
        if self._min_p > 0:
            width = -math.log(self._min_p)
            if is_part and width > self.WIDTH:
                return None
            values, is_part = values[values >= values[0] - width], False
        if self._top_k:
            if is_part and len(values) < self._top_k:
                return None
            values, is_part = values[: self._top_k], False
        if self._top_p < 1:
            mass = np.exp(values - values[0]).cumsum(dtype=np.float64)
            whole = np.exp(row - values[0]).sum(dtype=np.float64) if is_part else mass[-1]
            # the first place where there is enough
            place = int(np.searchsorted(mass, self._top_p * whole))
            if is_part and place == len(values):
                return None
            values = values[: place + 1]
        return values


def _descending(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sort(values)[::-1]
