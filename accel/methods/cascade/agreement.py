"""Whether samples say the same, and how soon that is certain. Knows texts and votes; not who wrote them.

A comparison maps a text to a key: texts with one key agree, and a text without a key (None) is invalid. It agrees with
nothing, itself included, but was asked for and counts among the samples.
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.errors import OptionError, unknown_name

Key = Callable[[str], Hashable | None]
Same = Callable[[str, str], bool]

_FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
# what people write around an answer without meaning it. A point in front is part of a number (.5), "!" of a negation,
# and "<" and ">" compare: those stay
_QUOTES = " \"'`*_«»“”„‘’"
_BEFORE, _BEHIND = f"{_QUOTES}([{{", f"{_QUOTES}.,;:!?)]}}"
# longer ones are no action, and Python's parser can be made to take minutes
_MAX_PARSED = 100_000


def exact(text: str) -> Hashable | None:
    """The text itself; invalid where there is nothing in it."""
    return text if text.strip() else None


def normalised(text: str) -> Hashable | None:
    """Without case, width, runs of white space, quotes around it, and punctuation behind it."""
    plain = _one_width(text).casefold()
    return " ".join(plain.split()).lstrip(_BEFORE).rstrip(_BEHIND) or None


def json_value(text: str) -> Hashable | None:
    """The JSON value, in a code fence or bare: order of keys, white space and 1 against 1.0 do not matter."""
    try:
        return _frozen(json.loads(unfenced(text), parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def code(text: str) -> Hashable | None:
    """Python's syntax tree, of a code fence or bare: layout, comments, quotes and brackets do not matter; names do."""
    source = unfenced(text)
    if len(source) > _MAX_PARSED:
        return None
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not tree.body:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.kind = None  # u"" is ""
    try:
        return ast.dump(tree)
    except RecursionError:
        return None


COMPARISONS: Mapping[str, Key] = {"exact": exact, "normalised": normalised, "json": json_value, "code": code}


def comparison(name: str) -> Key:
    """A comparison by its name."""
    if name not in COMPARISONS:
        raise OptionError(unknown_name("comparison", name, COMPARISONS))
    return COMPARISONS[name]


def after(marker: str, key: Key = exact) -> Key:
    """Compare only what follows the last ``marker`` ("Action:"); a text without it is invalid.

    For students that think aloud: their reasoning never reads the same twice, and only the action is carried out.
    """
    if not marker:
        raise OptionError("marker='': name the word that stands in front of what is to be compared, such as 'Action:'")

    def of(text: str) -> Hashable | None:
        _, found, rest = text.rpartition(marker)
        return key(rest.strip()) if found else None

    return of


def unfenced(text: str) -> str:
    """What stands in the code fence, where the text is one; else the text, without white space around it."""
    match = _FENCE.fullmatch(text)
    return match[1] if match else text.strip()


@dataclass(frozen=True)
class Rule:
    """How many of ``samples`` must agree: at least the share ``threshold``, which is all of them with 1.0.

    ``key`` makes texts comparable. ``same(a, b)`` is a user's own test in its place: a text joins the first group whose
    first text it is the same as, and ``key`` then only says what is invalid.
    """

    samples: int = 3
    threshold: float = 1.0
    key: Key = exact
    same: Same | None = None

    def __post_init__(self) -> None:
        if type(self.samples) is not int or not 1 <= self.samples <= 64:
            raise OptionError(f"samples={self.samples!r}: must be a whole number in 1..64")
        if type(self.threshold) not in (int, float) or not 0 < self.threshold <= 1:
            raise OptionError(
                f"threshold={self.threshold!r}: the share of the samples that must agree, above 0 and at most 1 (all)"
            )

    @property
    def needed(self) -> int:
        """Votes that accept."""
        # a share such as 2/3 is a float, a little more or less than what was meant
        return max(1, math.ceil(self.threshold * self.samples - 1e-9))

    def tally(self) -> Tally:
        return Tally(self)


@dataclass
class Group:
    """Texts that agree, by their numbers; the first of them speaks for all."""

    text: str
    members: list[int]


@dataclass(frozen=True)
class Verdict:
    """``text`` is accepted, or None; ``votes``: those of the largest group, after ``taken`` of ``planned`` samples."""

    text: str | None
    votes: int
    taken: int
    planned: int

    @property
    def accepted(self) -> bool:
        return self.text is not None

    @property
    def agreement(self) -> float:
        """The largest group's share of the samples taken."""
        return self.votes / self.taken if self.taken else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "agreement": self.agreement, **_without(vars(self), "text")}


@dataclass
class Tally:
    """Votes as they come in. Of groups of one size the one that began first is the largest."""

    rule: Rule
    taken: int = 0
    groups: list[Group] = field(default_factory=list)
    _keys: dict[Hashable, Group] = field(default_factory=dict)

    def add(self, text: str, *, valid: bool = True) -> None:
        """One more sample; one that is not ``valid`` counts, and agrees with nothing."""
        if self.taken == self.rule.samples:
            raise OptionError(f"samples={self.rule.samples}: all of them are counted already")
        number, key = self.taken, self.rule.key(text)
        self.taken += 1
        if key is None or not valid:
            return
        found = self._find(text, key)
        if found is None:
            found = Group(text, [])
            self.groups.append(found)
            self._keys[key] = found
        found.members.append(number)

    def best(self) -> Group | None:
        """The largest group; None while there is no valid sample."""
        return max(self.groups, key=lambda group: len(group.members), default=None)

    def decided(self) -> bool:
        """Whether no outcome of the samples still to come can change the verdict, or the text that is accepted."""
        left = self.rule.samples - self.taken
        first = self.best()
        top = len(first.members) if first else 0
        if top + left < self.rule.needed:
            return True
        if first is None or top < self.rule.needed:
            return False
        # another group overtakes with one vote more, or with as many if it began earlier; a new one with more
        others = [(len(group.members), group.members[0]) for group in self.groups if group is not first]
        return all(
            size + left < top or (size + left == top and begun > first.members[0])
            for size, begun in [*others, (0, self.rule.samples)]
        )

    def fewest(self) -> int:
        """Valid samples that must still come before anything can be decided: what is worth asking for at once."""
        left = self.rule.samples - self.taken
        if self.decided():
            return 0
        return next(count for count in range(1, left + 1) if self._could_decide(count))

    def verdict(self) -> Verdict:
        """The verdict as far as it goes: final once ``decided()``."""
        first = self.best()
        votes = len(first.members) if first else 0
        accepted = first.text if first is not None and votes >= self.rule.needed else None
        return Verdict(accepted, votes, self.taken, self.rule.samples)

    def _find(self, text: str, key: Hashable) -> Group | None:
        if self.rule.same is None:
            return self._keys.get(key)
        return next((group for group in self.groups if self.rule.same(group.text, text)), None)

    def _could_decide(self, count: int) -> bool:
        """Whether ``count`` more can settle it: all for the largest group, or each for another answer."""
        numbers = range(self.taken, self.taken + count)
        for joins in (True, False):
            trial = Tally(self.rule, self.taken + count, [Group(g.text, list(g.members)) for g in self.groups])
            first = trial.best()
            if not joins:
                trial.groups += [Group("", [number]) for number in numbers]
            elif first is None:
                trial.groups.append(Group("", list(numbers)))
            else:
                first.members += numbers
            if trial.decided():
                return True
        return False


def _one_width(text: str) -> str:
    """NFKC, but for raised and lowered characters: 10² is not 102."""
    raised = ("<super>", "<sub>")
    return unicodedata.normalize(
        "NFC",
        "".join(
            each if unicodedata.decomposition(each).startswith(raised) else unicodedata.normalize("NFKC", each)
            for each in text
        ),
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _frozen(value: Any) -> Hashable:
    """A JSON value as something with a hash; tags keep true from 1 and lists from objects."""
    if isinstance(value, dict):
        return "object", frozenset((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, list):
        return "list", tuple(_frozen(item) for item in value)
    return type(value).__name__ if isinstance(value, bool) or value is None else "value", value


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
