"""Self-study: the model asks itself about pieces of a document and answers with the piece in view.

Eyuboglu et al. 2025 (arXiv 2506.06266), section 4. Knows a document's tokens, chunks and conversations. Does not know
what is learned from them. A conversation depends on the document, the seed and its index alone.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from accel.distill.cache import LessonCache
from accel.distill.lessons import Progress, complete, predicted_bytes
from accel.distill.teacher import Generation, Lesson, answers
from accel.errors import OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.template import document_ids, query_ids
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

# What the asking side is told, by kind (the paper's five). {passage} is a few words of the chunk: a small model asks
# about what it was just shown, and without it about the chunk's first lines again and again.
SEEDS: Mapping[str, tuple[str, ...]] = {
    "question": (
        'Write one short question about this part of the text: "{passage}"\nReply with the question only.',
        'Ask for one fact that is stated here: "{passage}"\nReply with the question only.',
    ),
    "structuring": (
        'Write one instruction that asks to put the following part into a list: "{passage}"\nReply with it only.',
    ),
    "summarization": ('Write one instruction that asks to sum up this part: "{passage}"\nReply with it only.',),
    "use_case": ('Write one question that a reader with a task would ask about: "{passage}"\nReply with it only.',),
    "creative": ('Write one unusual question about this part of the text: "{passage}"\nReply with it only.',),
}
# of ten conversations: facts are asked for more often than anything else
_KINDS = ("question",) * 6 + ("structuring", "summarization", "use_case", "creative")
_PASSAGE = (12, 40)
# pieces of context that are kept for conversations still running
_HELD = 4


@dataclass(frozen=True)
class Study:
    """How much is asked, and how."""

    conversations: int = 1024
    # tokens of the document in view, at random between these
    shortest_chunk: int = 256
    longest_chunk: int = 1024
    # conversations about one chunk, whose keys and values are computed once
    per_chunk: int = 16
    question_tokens: int = 48
    answer_tokens: int = 96
    # asking varies, answering is certain: the paper's temperatures
    question_temperature: float = 0.6
    answer_temperature: float = 0.0
    k: int = 32
    rows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("conversations", "shortest_chunk", "per_chunk", "question_tokens", "answer_tokens", "k", "rows"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.longest_chunk < self.shortest_chunk:
            raise OptionError(
                f"longest_chunk={self.longest_chunk}: must be shortest_chunk={self.shortest_chunk} or more"
            )

    def predicted_bytes(self) -> int:
        """The most that questions and answers take on disk."""
        questions = predicted_bytes([4 * self.question_tokens] * self.conversations, self.question_tokens, 1)
        return questions + predicted_bytes([4 * self.question_tokens] * self.conversations, self.answer_tokens, self.k)


@dataclass(frozen=True)
class Corpus:
    """A document and how it stands in prompts."""

    name: str
    text: str
    template: str
    instruction: str

    @property
    def digest(self) -> str:
        return document.describe(self.text, 0).sha256


class Chunks:
    """Pieces of a document at random places; which one is number n depends on the seed and on n alone."""

    def __init__(self, tokenizer: Any, corpus: Corpus, study: Study) -> None:
        self._tokenizer = tokenizer
        self._study = study
        self._ids: list[int] = tokenizer(corpus.text, add_special_tokens=False)["input_ids"]
        if not self._ids:
            raise OptionError(f"{corpus.name}: the document is empty")

    def text(self, number: int) -> str:
        chance = random.Random(f"{self._study.seed}/{number}")
        size = min(chance.randint(self._study.shortest_chunk, self._study.longest_chunk), len(self._ids))
        start = chance.randint(0, len(self._ids) - size)
        return self._decode(self._ids[start : start + size])

    def passage(self, index: int) -> str:
        """A few words of the chunk that conversation ``index`` is about."""
        chance = random.Random(f"{self._study.seed}/passage/{index}")
        ids = self._tokenizer(self.text(self.number(index)), add_special_tokens=False)["input_ids"]
        size = min(chance.randint(*_PASSAGE), len(ids))
        start = chance.randint(0, len(ids) - size)
        return self._decode(ids[start : start + size]).strip()

    def number(self, index: int) -> int:
        return index // self._study.per_chunk

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class _Contexts:
    """Keys and values of chunks as they stand in prompts, computed when first needed, the last few kept."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, corpus: Corpus, chunks: Chunks) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._chunks = chunks
        self._held: OrderedDict[int, Segment] = OrderedDict()

    def __call__(self, index: int) -> Sequence[Segment]:
        number = self._chunks.number(index)
        if number not in self._held:
            corpus = self._corpus
            text = self._chunks.text(number)
            ids = document_ids(self._tokenizer, text, corpus.template, corpus.instruction)
            self._held[number] = document.read(self._model, ids)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        return (self._held[number],)


def study(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    how: Study,
    work: Path,
    base: Mapping[str, Any],
    stop_tokens: Sequence[int],
    progress: Progress = lambda message: None,
    max_bytes: int = 2_000_000_000,
) -> list[Lesson]:
    """Conversations about the document: the prompt is the question as it stands behind a cartridge.

    Cached below ``work``; a run that was killed goes on there. Conversations whose question came out empty are left
    out. ``ids`` and ``logp`` of a lesson are the view of the model that had the chunk before it.
    """
    chunks = Chunks(tokenizer, corpus, how)
    contexts = _Contexts(model, tokenizer, corpus, chunks)
    choices = {name: value for name, value in asdict(how).items() if name != "rows"}
    facts = {**base, **choices, "document": corpus.digest, "template": corpus.template, "seeds": _digest_of_seeds()}
    facts |= {"instruction": corpus.instruction}

    def prompt(content: str) -> list[int]:
        return query_ids(tokenizer, [{"role": "user", "content": content}], corpus.template)

    def ask(left: Sequence[int]) -> Any:
        told = ((i, prompt(_seed_prompt(how.seed, i).format(passage=chunks.passage(i)))) for i in left)
        way = Generation(how.question_tokens, how.question_temperature, how.seed, stop_tokens, k=1, rows=how.rows)
        return answers(SoftmaxTarget(model), told, way, contexts)

    cache = LessonCache.open(work / "questions", facts | {"stage": "questions"}, max_bytes)
    asked = complete(cache, how.conversations, ask, lambda message: progress(f"questions: {message}"))
    questions = {each.index: _clean(tokenizer, each.answer) for each in asked}
    kept = [index for index in sorted(questions) if questions[index]]
    if not kept:
        raise OptionError(f"{corpus.name}: the model asked nothing; is it an instruct model?")

    def answer(left: Sequence[int]) -> Any:
        way = Generation(how.answer_tokens, how.answer_temperature, how.seed + 1, stop_tokens, how.k, how.rows)
        told = ((i, prompt(questions[kept[i]])) for i in left)
        return answers(SoftmaxTarget(model), told, way, lambda i: contexts(kept[i]))

    cache = LessonCache.open(work / "answers", facts | {"stage": "answers"}, max_bytes)
    return complete(cache, len(kept), answer, lambda message: progress(f"answers: {message}"))


def _seed_prompt(seed: int, index: int) -> str:
    chance = random.Random(f"{seed}/seed/{index}")
    return chance.choice(SEEDS[_KINDS[index % len(_KINDS)]])


def _clean(tokenizer: Any, tokens: torch.Tensor) -> str:
    """A question as text: one line, without the quotes that models like to put around it."""
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return text.strip().split("\n")[0].strip().strip('"').strip()


def _digest_of_seeds() -> str:
    return document.describe(repr((SEEDS, _KINDS, _PASSAGE)), 0).sha256


def cut(lessons: Sequence[Lesson], longest: int) -> list[Lesson]:
    """Lessons whose answers are cut so that none has more than ``longest`` tokens in all."""
    kept = []
    for each in lessons:
        room = longest - len(each.prompt)
        if room >= 1:
            kept.append(replace(each, answer=each.answer[:room], ids=each.ids[:room], logp=each.logp[:room]))
    return kept
