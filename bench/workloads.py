"""What is asked: prompts, their suites, and how a prompt becomes token ids. Knows nothing of arms or clocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from accel.errors import AccelError, OptionError, unknown_name

# Spec-Bench asks MT-bench's eight categories as one group, "multi-turn conversation"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
CONVERSATION = "multi-turn"

KEYS = ("question_id", "category", "turns")
# what a file may hold, for messages
LINES = f"JSON lines with {', '.join(KEYS)} as in Spec-Bench, or with question (and answer) as in GSM8K"
# GSM8K's answers end in this mark and the number that is asked for
GSM8K_MARK = "####"
EMBEDDED = Path(__file__).parent / "data" / "prompts.jsonl"


class WorkloadError(AccelError, ValueError):
    """A prompt file that cannot be used."""


@dataclass(frozen=True)
class Prompt:
    """One question: ``turns`` are the user's messages in order; ``answer`` is the file's own, where it has one.

    ``reply``: the answer as a whole sentence, as a model would say it.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    answer: str | None = None
    reply: str | None = None

    @property
    def group(self) -> str:
        return group(self.category)


@dataclass(frozen=True)
class Suite:
    """A named set of prompts with its defaults; ``limit`` is prompts per task group, None is all.

    ``file``: whether the prompts come from a file, "never", "always", or "maybe" (else they are the embedded ones,
    ``limit`` of each group).
    """

    help: str
    max_new_tokens: int
    limit: int | None
    file: str = "never"


SUITES = {
    # sized for about three minutes on two CPU cores with six arms and a model of 135M parameters
    "default": Suite("an embedded sample of Spec-Bench: 18 prompts, 3 a task group", max_new_tokens=64, limit=1),
    "spec-bench": Suite("a JSONL file, given with --prompts", 128, limit=None, file="always"),
    "drafts": Suite("several draft models side by side, greedy and at temperature 1", 96, limit=1, file="maybe"),
    "lenience": Suite("what a lossy draft gains and what it costs in quality", 256, limit=None, file="always"),
}


def group(category: str) -> str:
    """The task group of a category: MT-bench's eight are one group, every other category is its own."""
    return CONVERSATION if category in MT_BENCH else category


def suite(name: str) -> Suite:
    """The suite of that name."""
    if name not in SUITES:
        raise OptionError(unknown_name("suite", name, SUITES))
    return SUITES[name]


def load_suite(name: str, file: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of suite ``name``, at most ``limit`` of each task group (None: the suite's own default)."""
    found = suite(name)
    if file is None and found.file == "always":
        raise OptionError(f"suite {name!r} reads a file: give it with --prompts FILE ({LINES})")
    if file is not None and found.file == "never":
        raise OptionError(f"suite {name!r} brings its own prompts: use --suite spec-bench with --prompts {file}")
    prompts = load_jsonl(EMBEDDED if file is None else file)
    if limit is None and file is None:
        limit = found.limit
    return prompts if limit is None else sample(prompts, limit)


def load_jsonl(path: str | Path) -> list[Prompt]:
    """Read JSON lines: ``question_id``, ``category`` and ``turns`` (Spec-Bench), or ``question`` and ``answer``.

    A question's id is the number of its line. Its category, where it gives none, is "gsm8k" if the answer has GSM8K's
    mark before the number that is asked for, else "question"; answer and ``reply`` may be missing.
    """
    path = Path(path)
    try:
        # not splitlines(): a JSON string may hold U+2028 and its like as they are
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read prompts from {path}: {error}") from error
    prompts = [_parse(line, f"{path}:{number}", number) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise WorkloadError(f"{path} holds no prompts: expected one JSON object a line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise WorkloadError(f"{path}: question_id {prompt.id} appears twice; ids must be unique")
        seen.add(prompt.id)
    return prompts


def load_answered(path: str | Path) -> list[Prompt]:
    """The same of a file whose every question has an answer; others are refused."""
    prompts = load_jsonl(path)
    if any(not prompt.answer for prompt in prompts):
        raise OptionError(f"{path}: every question needs an answer to be held against")
    return prompts


def _parse(line: str, where: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "question" in row and "turns" not in row:
        return _question(row, where, number)
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise WorkloadError(f"{where}: missing {', '.join(missing)}; expected {LINES}")
    if not isinstance(row["question_id"], (int, str)) or not isinstance(row["category"], str):
        raise WorkloadError(f"{where}: question_id must be a number or a string and category a string")
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise WorkloadError(f"{where}: turns must be a list of one or more non-empty strings, got {turns!r:.60}")
    return Prompt(str(row["question_id"]), row["category"], tuple(turns))


def _question(row: dict[str, Any], where: str, number: int) -> Prompt:
    question, answer = row["question"], row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise WorkloadError(f"{where}: question must be a non-empty string, got {question!r:.60}")
    reply = row.get("reply")
    for name, value in (("answer", answer), ("reply", reply)):
        if value is not None and not isinstance(value, str):
            raise WorkloadError(f"{where}: {name} must be a string, got {value!r:.60}")
    category = row.get("category", "gsm8k" if answer is not None and GSM8K_MARK in answer else "question")
    if not isinstance(category, str):
        raise WorkloadError(f"{where}: category must be a string, got {category!r:.60}")
    return Prompt(str(number), category, (question,), answer, reply)


def sample(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """At most ``limit`` prompts of each group, spread over its categories, in the order given."""
    if limit < 1:
        raise OptionError(f"limit={limit}: at least one prompt a task group is needed")
    # the n-th prompt of its category comes before any category's (n+1)-th
    rank: dict[str, int] = {}
    ranked = []
    for index, prompt in enumerate(prompts):
        ranked.append((rank.setdefault(prompt.category, 0), index))
        rank[prompt.category] += 1
    taken: dict[str, int] = {}
    kept = []
    for _, index in sorted(ranked):
        name = prompts[index].group
        if taken.setdefault(name, 0) < limit:
            taken[name] += 1
            kept.append(index)
    return [prompts[index] for index in sorted(kept)]


def digest(prompts: Iterable[Prompt]) -> str:
    """A sha256 that changes when any prompt, its answer or reply, or their order does."""
    rows = [(p.id, p.category, p.turns, *(each for each in (p.answer, p.reply) if each is not None)) for p in prompts]
    text = json.dumps(rows, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Any, turns: Sequence[str], replies: Sequence[str] = ()) -> Tensor:
    """Token ids ``[1, T]`` of a conversation: user turns, with the replies given so far between them.

    The tokenizer's chat template is used where it has one; otherwise the messages are joined by blank lines.
    """
    messages = []
    for index, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if index < len(replies):
            messages.append({"role": "assistant", "content": replies[index]})
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    else:
        encoded = tokenizer("\n\n".join(message["content"] for message in messages))
    ids = encoded["input_ids"]
    if not ids:
        raise WorkloadError(f"the prompt {turns[-1]!r:.60} has no tokens")
    return tensor([ids])
