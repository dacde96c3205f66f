"""Self-study: the model asks itself about pieces of a document and answers with the piece in view.

Eyuboglu et al. 2025 (arXiv 2506.06266), section 4. Over half of the answers are quoted from the piece instead of
generated: a small model writes the wrong fact, or the same words again and again, where its distribution over the right
sentence is good. What is learned is its distribution in both cases.

Knows a document's tokens, chunks and conversations. Does not know what is learned from them. A conversation depends on
the document, the seed and its index alone.
"""

from __future__ import annotations

import random
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from accel.distill.cache import LessonCache
from accel.distill.lessons import Progress, complete, predicted_bytes
from accel.distill.teacher import Generation, Lesson, answers, judge_rows
from accel.errors import OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.template import document_ids, query_ids, text_ids
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget


class Seed(NamedTuple):
    """What the asking side is told, and how its message begins: a small model asks where its first word asks."""

    told: str
    begins: tuple[str, ...]


# The paper's five kinds. {passage} is a sentence or two of the chunk: without it a small model asks about the chunk's
# first lines again and again.
SEEDS: Mapping[str, Seed] = {
    "question": Seed(
        'Write one short question that this sentence answers: "{passage}"',
        ("What", "Who", "When", "Where", "Which", "How many", "How", "Why", "In which", "What is the name of"),
    ),
    "structuring": Seed(
        'Write one instruction that asks to list the facts of this part: "{passage}"',
        ("List", "Make a list of", "Name"),
    ),
    "summarization": Seed(
        'Write one instruction that asks to sum up this part: "{passage}"', ("Summarize", "Describe briefly", "Sum up")
    ),
    "use_case": Seed(
        'A reader has a task for which this matters: "{passage}" Write the question of the reader.',
        ("What should I", "How can I", "Can I", "What do I need to"),
    ),
    "creative": Seed(
        'Write one unusual question about this part: "{passage}"', ("What would", "Imagine", "What if", "Why")
    ),
}
# Answered with a sentence of the document itself: a question about it, and its beginning, to be completed, which is
# asked without a model and so reaches every fact whoever asks.
RECALL, COMPLETION = "recall", "completion"
_COMPLETE = 'Complete this sentence from the text: "{beginning}"'
# The kinds in turn. Facts are asked for more often than anything else.
_KINDS: tuple[str, ...] = (
    *(RECALL, COMPLETION, "question", RECALL, COMPLETION, "structuring", RECALL, COMPLETION, "summarization"),
    *(RECALL, COMPLETION, "use_case", "creative"),
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
# words of a sentence to be completed: enough to know which one, at least two left to say
_FEWEST_WORDS = 4
# an answer that says so many tokens again has begun to run in circles
_LOOP = 8
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

    def sentences(self, index: int) -> list[str]:
        """Those of the chunk that conversation ``index`` is about; its cut ends are left out where more is there."""
        found = [each.strip() for each in _SENTENCE.split(self.text(self.number(index))) if each.strip()]
        return found[1:-1] if len(found) > 2 else found

    def passage(self, index: int) -> str:
        """A sentence or two of the chunk that conversation ``index`` is about; one, if it is the answer."""
        chance = random.Random(f"{self._study.seed}/passage/{index}")
        found = self.sentences(index)
        found = [each for each in found if len(each.split()) >= _FEWEST_WORDS] or found  # headings say little
        start = chance.randrange(len(found))
        return " ".join(found[start : start + (1 if kind(index) == RECALL else chance.randint(1, 2))])

    def to_complete(self, index: int) -> tuple[str, str] | None:
        """A sentence of the chunk, and its first words; None where all are too short to be completed."""
        chance = random.Random(f"{self._study.seed}/beginning/{index}")
        long = [each for each in self.sentences(index) if len(each.split()) >= _FEWEST_WORDS + 2]
        if not long:
            return None
        sentence = chance.choice(long)
        words = sentence.split()
        return sentence, " ".join(words[: chance.randint(_FEWEST_WORDS, len(words) - 2)])

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

    def begun(index: int) -> str:
        return random.Random(f"{how.seed}/begins/{index}").choice(_seed(index).begins)

    def asking(index: int) -> list[int]:
        told = _seed(index).told.format(passage=chunks.passage(index))
        return [*prompt(told), *text_ids(tokenizer, begun(index))]

    by_model = [index for index in range(how.conversations) if kind(index) != COMPLETION]

    def ask(left: Sequence[int]) -> Iterator[Lesson]:
        way = Generation(how.question_tokens, how.question_temperature, how.seed, stop_tokens, k=1, rows=how.rows)
        told = ((place, asking(by_model[place])) for place in left)
        return answers(SoftmaxTarget(model), told, way, lambda place: contexts(by_model[place]))

    cache = LessonCache.open(work / "questions", facts | {"stage": "questions"}, max_bytes)
    asked = complete(cache, len(by_model), ask, lambda message: progress(f"questions: {message}"))
    questions = {
        by_model[each.index]: begun(by_model[each.index]) + _clean(tokenizer, each.answer)
        for each in asked
        if len(each.answer)
    }
    quoted = {index: chunks.passage(index) for index in questions if kind(index) == RECALL}
    for index in range(how.conversations):
        if kind(index) == COMPLETION and (found := chunks.to_complete(index)) is not None:
            quoted[index], questions[index] = found[0], _COMPLETE.format(beginning=found[1])
    kept = sorted(questions)
    if not kept:
        raise OptionError(f"{corpus.name}: the model asked nothing; is it an instruct model?")

    def quote(place: int) -> list[int]:
        said = [*text_ids(tokenizer, quoted[kept[place]]), *stop_tokens[:1]]
        return said[: how.answer_tokens]

    def answer(left: Sequence[int]) -> Iterator[Lesson]:
        target = SoftmaxTarget(model)
        known = [i for i in left if kept[i] in quoted]
        given = ((i, prompt(questions[kept[i]]), quote(i)) for i in known)
        yield from judge_rows(target, given, how.k, how.rows, lambda i: contexts(kept[i]))
        way = Generation(how.answer_tokens, how.answer_temperature, how.seed + 1, stop_tokens, how.k, how.rows)
        told = ((i, prompt(questions[kept[i]])) for i in left if kept[i] not in quoted)
        for lesson in answers(target, told, way, lambda i: contexts(kept[i])):
            yield _before_loops(lesson)

    cache = LessonCache.open(work / "answers", facts | {"stage": "answers"}, max_bytes)
    return complete(cache, len(kept), answer, lambda message: progress(f"answers: {message}"))


def _seed(index: int) -> Seed:
    return SEEDS["question" if kind(index) == RECALL else kind(index)]


def kind(index: int) -> str:
    """What conversation ``index`` is: one of ``SEEDS``, RECALL or COMPLETION."""
    return _KINDS[index % len(_KINDS)]


def _clean(tokenizer: Any, tokens: torch.Tensor) -> str:
    """The rest of a question as text: its first line, up to the question mark."""
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    line = text.split("\n")[0].rstrip().rstrip('"')
    return line[: line.index("?") + 1] if "?" in line else line


def _before_loops(lesson: Lesson) -> Lesson:
    """The answer up to where it says ``_LOOP`` tokens for the second time: nothing is learned from what follows."""
    tokens = lesson.answer.tolist()
    seen = set()
    for start in range(len(tokens) - _LOOP + 1):
        words = tuple(tokens[start : start + _LOOP])
        if words in seen:
            return _first(lesson, start)
        seen.add(words)
    return lesson


def _first(lesson: Lesson, count: int) -> Lesson:
    return replace(lesson, answer=lesson.answer[:count], ids=lesson.ids[:count], logp=lesson.logp[:count])


def _digest_of_seeds() -> str:
    return document.describe(repr((SEEDS, _COMPLETE, _KINDS, _LOOP)), 0).sha256


def cut(lessons: Sequence[Lesson], longest: int) -> list[Lesson]:
    """Lessons whose answers are cut so that none has more than ``longest`` tokens in all."""
    kept = []
    for each in lessons:
        room = longest - len(each.prompt)
        if room >= 1:
            kept.append(_first(each, room))
    return kept
