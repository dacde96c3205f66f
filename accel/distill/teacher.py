"""What the target says and thinks: answers to prompts with the k most likely tokens at every position.

Knows a target and token ids. Does not know texts, students, losses or files.

Many rows decode together and a finished one makes room for the next prompt at once, because a step over 32 rows costs
a CPU little more than one over 8. A prompt's answer depends on the prompt, the seed and its index alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.distill.forward import Scorer
from accel.errors import OptionError
from accel.kernels.sampling import Settings, sample
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

# prompts that are read together: the longest is at most so many times the shortest
MOST_PADDED = 1.25
# a prompt's index, the prompt, an answer
Written = tuple[int, Sequence[int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One prompt, an answer, and the target's view of each answer position given all before it.

    ``index`` names the prompt in its list. ``prompt`` int32 [P], ``answer`` int32 [A]. ``ids`` int32 [A, k]: the
    target's most likely tokens, most likely first; ``logp`` fp16 [A, k]: their log-probabilities at temperature 1,
    under the whole vocabulary.
    """

    index: int
    prompt: Tensor
    answer: Tensor
    ids: Tensor
    logp: Tensor


@dataclass
class _Row:
    """A prompt being answered."""

    index: int
    name: int
    prompt: Sequence[int]
    answer: list[int] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)

    def lesson(self) -> Lesson:
        ids, logp = torch.stack(self.ids), torch.stack(self.logp)
        return Lesson(self.index, _int32(self.prompt), _int32(self.answer), ids, logp)


@dataclass(frozen=True)
class Generation:
    """How answers are written: ``temperature`` 0 is greedy; an answer ends with one of ``stop_tokens``, or is cut."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: Collection[int] = ()
    k: int = 32
    rows: int = 32

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "k", "rows"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")


def stop_tokens(target: PreTrainedModel, tokenizer: Any) -> list[int]:
    """What ends an answer: the tokenizer's end first, then those of the generation config."""
    named = getattr(getattr(target, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list | tuple) else [named]
    found = [token for token in (getattr(tokenizer, "eos_token_id", None), *several) if token is not None]
    return list(dict.fromkeys(found))


def _nothing(index: int) -> Sequence[Segment]:
    return ()


@torch.no_grad()
def answers(
    target: SoftmaxTarget,
    prompts: Iterable[tuple[int, Sequence[int]]],
    how: Generation,
    behind: Callable[[int], Sequence[Segment]] = _nothing,
) -> Iterator[Lesson]:
    """Answer (index, prompt) pairs; lessons come as answers end, so not in the order of their indices.

    ``behind(index)``: immutable context in front of a prompt, asked for when its turn comes; lessons do not hold it.
    """
    waiting = iter(prompts)
    live: list[_Row] = []
    settings = Settings(temperature=how.temperature)
    while True:
        fresh = [
            _Row(index, target.open(behind(index)), prompt) for index, prompt in islice(waiting, how.rows - len(live))
        ]
        for alike in _of_like_length(fresh):
            _extend(target, alike, [list(row.prompt) for row in alike], settings, how)
        if fresh:
            live = sorted(live + fresh, key=lambda row: target.cache.rows[row.name].slot)
        if not live:
            return
        done = [row for row in live if row.answer[-1] in how.stop_tokens or len(row.answer) >= how.max_new_tokens]
        if done:
            target.close([row.name for row in done])
            live = [row for row in live if row not in done]
            yield from (row.lesson() for row in done)
        # with a few rows gone, filling their places first keeps the batch full
        elif live:
            _extend(target, live, [[row.answer[-1]] for row in live], settings, how)


def _of_like_length(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows whose prompts are padded by little; rows that began together end together, and make room for several."""
    some: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        if some and len(row.prompt) > MOST_PADDED * len(some[0].prompt):
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def _extend(
    target: SoftmaxTarget, rows: Sequence[_Row], tokens: Sequence[Sequence[int]], settings: Settings, how: Generation
) -> None:
    """Read each row's new tokens and choose the one that follows."""
    lengths = [len(each) for each in tokens]
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for place, each in enumerate(tokens):
        padded[place, : lengths[place]] = torch.tensor(each)
    names = [row.name for row in rows]
    ends = sorted({length - 1 for length in lengths})
    logits = target.forward(padded.to(target.device), names, ends, lengths)
    target.commit(lengths, names)
    places = [ends.index(length - 1) for length in lengths]
    logits = logits[torch.arange(len(rows)), places].float()  # [R, V]
    ids, logp = most_likely(logits, how.k)
    seeds = torch.tensor([how.seed * 1_000_003 + row.index for row in rows], device=logits.device)
    positions = torch.tensor([len(row.answer) for row in rows], device=logits.device)
    if settings.greedy:
        chosen = sample(logits, settings).token.tolist()
    else:
        chosen = sample(logits, settings, seeds=seeds, positions=positions).token.tolist()
    for place, row in enumerate(rows):
        row.answer.append(chosen[place])
        row.ids.append(ids[place])
        row.logp.append(logp[place])


def judge_rows(
    target: SoftmaxTarget,
    written: Iterable[Written],
    k: int,
    rows: int,
    behind: Callable[[int], Sequence[Segment]] = _nothing,
) -> Iterator[Lesson]:
    """The target's view of answers that somebody else wrote, with immutable context ``behind(index)`` before each."""
    for (index, prompt, answer), logits in answer_logits(target, written, rows, behind):
        ids, logp = most_likely(logits, k)
        yield Lesson(index, _int32(prompt), _int32(answer), ids, logp)


@torch.no_grad()
def answer_logits(
    target: SoftmaxTarget,
    written: Iterable[Written],
    rows: int,
    behind: Callable[[int], Sequence[Segment]] = _nothing,
) -> Iterator[tuple[Written, Tensor]]:
    """Each answer with the logits of its tokens, fp32 [A, V], behind immutable context and its prompt, in order.

    ``rows`` are read together; their contexts are held until they are done.
    """
    waiting = iter(written)
    while some := list(islice(waiting, rows)):
        names = [target.open(behind(index)) for index, _, _ in some]
        tokens, _ = _padded(some)
        # only the positions of some answer: a vocabulary's logits fill memory
        first = min(len(prompt) for _, prompt, _ in some) - 1
        logits = target.forward(tokens.to(target.device), names, keep=range(first, tokens.shape[1]))
        for place, each in enumerate(some):
            _, prompt, answer = each
            start = len(prompt) - 1 - first
            yield each, logits[place, start : start + len(answer)].float()
        target.close(names)


@torch.no_grad()
def judge_all(score: Scorer, written: Sequence[Written], k: int) -> list[Lesson]:
    """A model's view of answers that somebody else wrote, read as one padded batch."""
    tokens, at = _padded(written)
    device = score.model.device
    parts = [most_likely(logits, k) for logits in score.pieces(tokens.to(device), at.to(device))]
    ids, logp = (torch.cat(each) for each in zip(*parts, strict=True))
    sizes = [len(answer) for _, _, answer in written]
    views = zip(written, ids.split(sizes), logp.split(sizes), strict=True)
    return [Lesson(index, _int32(prompt), _int32(answer), i, lp) for (index, prompt, answer), i, lp in views]


def _padded(written: Sequence[Written]) -> tuple[Tensor, Tensor]:
    """Prompts and answers [B, T], padded on the right, and the flat places whose logits are about answer tokens."""
    tokens = torch.zeros(len(written), max(len(p) + len(a) for _, p, a in written) - 1, dtype=torch.long)
    at = []
    for row, (_, prompt, answer) in enumerate(written):
        tokens[row, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer[:-1]])
        at.append(row * tokens.shape[1] + torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1))
    return tokens, torch.cat(at)


def _int32(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int32)


def most_likely(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [N, V] fp32 → ids int32 [N, k], log-probabilities fp16 [N, k], on the CPU."""
    best, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    top = best[:, :1]
    log_total = top + (logits - top).exp_().sum(-1, keepdim=True).log_()
    return ids.to("cpu", torch.int32), (best - log_total).to("cpu", torch.float16)
