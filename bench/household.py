"""Small household tasks in text, in the spirit of ALFWorld, with rules, words and worlds of their own.

A flat has nine places. The goal's thing lies in one of those not searched yet; the agent goes to places one at a time,
opens what is closed, and holds one thing at most. The sink cleans dishes, the stove heats food, the open fridge cools
it, and the lamp stands on the desk. Places that were opened stay open.

What is seen says all that the next action depends on, together with the goal: no memory is needed. Places are searched
in one order everywhere, so that the right action is a function of the two texts (``expert``). Success is a state of the
flat, whatever was said. Knows no models and no clocks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from accel.bench.dealing import check_draw, dealt
from accel.errors import OptionError

SYSTEM = (
    "You do a task in a flat. Answer with the next action alone, in one line. The actions are: go to PLACE, "
    "open PLACE, take THING, put THING, clean THING, heat THING, cool THING, use lamp. Look for the thing in the "
    "first place not searched; open what is closed. You can hold one thing. Clean it at the sink, heat it at the "
    "stove, cool it at the fridge; the lamp is on the desk."
)
# no marker: the whole answer is the action
ACTION = ""

# in the order in which they are searched
PLACES = ("cabinet", "counter", "desk", "drawer", "fridge", "shelf", "sink", "stove", "table")
CLOSED = frozenset({"cabinet", "drawer", "fridge"})
INSIDE = CLOSED | {"sink"}

DISHES = ("cup", "fork", "pan", "plate")
FOODS = ("apple", "bread", "egg", "soup")
PAPERS = ("book", "letter")
THINGS = (*DISHES, *FOODS, *PAPERS)


class Work(NamedTuple):
    """What a place does to some things: afterwards they are ``state``."""

    place: str
    things: tuple[str, ...]
    state: str


WORKS = {
    "clean": Work("sink", DISHES, "clean"),
    "heat": Work("stove", FOODS, "hot"),
    "cool": Work("fridge", FOODS, "cold"),
}
KINDS = ("put", *WORKS, "look")
LAMP = "desk"

# the expert's steps; other worlds are not dealt
SHORTEST, LONGEST = 4, 9
# how much longer than the expert an agent may take, and how long at least
PATIENCE, LEAST = 2.5, 12
MOST_TASKS = 5000


@dataclass(frozen=True)
class World:
    """A flat as an episode finds it. ``target``: where the goal's ``thing`` belongs in the end (the lamp, for "look").

    ``things``: what lies where. ``unsearched``: the places that may hold the thing, in the order of ``PLACES``.
    """

    thing: str
    target: str
    things: tuple[tuple[str, str], ...]
    unsearched: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    number: int
    kind: str
    goal: str
    world: World


def tasks(count: int, seed: int) -> list[Task]:
    """``count`` different tasks, of each kind in turn. No two seeds share a goal with its world."""
    check_draw(count, seed, MOST_TASKS)
    chance = random.Random(f"household {seed}")
    made: list[Task] = []
    known: set[str] = set()
    while len(made) < count:
        task = _drawn(chance, len(made), KINDS[len(made) % len(KINDS)], seed, known)
        if task is not None:
            made.append(task)
    return made


class Episode:
    """One task, acted out. ``limit``: the most steps, 2.5 times the expert's and 12 at least."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.limit = max(LEAST, int(PATIENCE * expert_steps(task)))
        self.steps = 0
        self.success = False
        self._flat = _Flat(task)
        self.observation = self._flat.seen()

    @property
    def done(self) -> bool:
        return self.success or self.steps >= self.limit

    def act(self, action: str) -> str:
        """What is seen after an action. What cannot be done changes nothing, and takes a step all the same."""
        if self.done:
            raise OptionError(f"the episode of task {self.task.number} is over after {self.steps} steps: begin another")
        changed = self._flat.do(said(action))
        self.steps += 1
        self.success = self._flat.solved()
        self.observation = self._flat.seen() if changed else f"Nothing happens. {self._flat.seen()}"
        return self.observation


def said(answer: str) -> str:
    """The action in an answer: its first line, without "Action:", quotes, a full stop, capitals and articles.

    Where something is put need not be said, and may be.
    """
    line = next((line for line in answer.splitlines() if line.strip()), "")
    plain = line.casefold().strip("\"'`“”‘’ ").removeprefix("action:").strip("\"'`“”‘’. ")
    words = [word for word in plain.split() if word != "the"]
    if words[:1] == ["put"] and words[2:3] in (["in"], ["on"], ["at"]):
        words = words[:2]
    return " ".join(words)


def expert(goal: str, observation: str) -> str:
    """The right action in an episode that is not over, from the two texts alone.

    The fewest steps, once the thing was seen; until then places are searched in their order, but for one that the
    agent stands at.
    """
    aim, view = _aim(goal), _view(observation)
    if view.held == aim.thing:
        return _with_thing(aim, view)
    if view.held and not view.closed:
        return f"put {view.held}"
    if aim.thing in view.things:
        return f"take {aim.thing}"
    if view.left:
        return f"go to {view.left}"
    return f"open {view.here}" if view.here in view.unsearched else f"go to {view.unsearched[0]}"


def options(observation: str, goal: str) -> list[str]:
    """The actions that change something here, sorted. The goal, which callers have at hand, changes none of them."""
    view = _view(observation)
    found = [f"go to {place}" for place in PLACES if place != view.here]
    if view.closed:
        found.append(f"open {view.here}")
    if not view.held:
        found += [f"take {thing}" for thing in view.things]
    elif not view.closed:
        found.append(f"put {view.held}")
        for verb, work in WORKS.items():
            if view.here == work.place and view.held in work.things and view.state != work.state:
                found.append(f"{verb} {view.held}")
    if view.lamp == "off":
        found.append("use lamp")
    return sorted(found)


def expert_steps(task: Task) -> int:
    """How many steps the expert takes."""
    flat = _Flat(task)
    steps = 0
    while not flat.solved():
        changed = flat.do(expert(task.goal, flat.seen()))
        assert changed, (task, flat.seen())
        steps += 1
    return steps


class _Flat:
    """The world in motion."""

    def __init__(self, task: Task) -> None:
        self.kind, self.thing, self.target = task.kind, task.world.thing, task.world.target
        self.places = dict(task.world.things)
        self.unsearched = list(task.world.unsearched)
        self.states: dict[str, str] = {}
        self.opened: set[str] = set()
        self.here = ""
        self.held = ""
        self.lamp = "off"

    def do(self, action: str) -> bool:
        """Whether the action changed anything."""
        verb, _, name = action.removeprefix("go ").partition(" ")
        if action.startswith("go "):
            changed = verb == "to" and name in PLACES and name != self.here
            self.here = name if changed else self.here
        elif verb == "open":
            changed = name == self.here and self._closed()
            self.opened |= {name} if changed else set()
        elif verb == "take":
            changed = not self.held and name in self._visible()
            if changed:
                self.held = name
                del self.places[name]
        elif verb == "put":
            changed = bool(name) and name == self.held and not self._closed()
            if changed:
                self.places[name], self.held = self.here, ""
        elif verb in WORKS:
            changed = bool(name) and name == self.held and not self._closed() and self._works(WORKS[verb])
        else:
            changed = action == "use lamp" and self.here == LAMP and self.lamp == "off"
            self.lamp = "on" if changed else self.lamp
        if self.here in self.unsearched and not self._closed():
            self.unsearched.remove(self.here)
        return changed

    def seen(self) -> str:
        """All that the next action depends on, in one line."""
        parts = [f"At the {self.here}{self._look()}." if self.here else "In the hall."]
        parts.append(f"Holding {self._named(self.held) if self.held else 'nothing'}.")
        place = self.places.get(self.thing)
        if place in self.unsearched:
            parts.append(f"Not searched: {', '.join(self.unsearched)}.")
        elif place not in (None, self.here):
            parts.append(f"The {self._named(self.thing)} is at the {place}.")
        return " ".join(parts)

    def solved(self) -> bool:
        if self.kind == "look":
            return self.held == self.thing and self.here == LAMP and self.lamp == "on"
        wanted = WORKS[self.kind].state if self.kind in WORKS else None
        return self.places.get(self.thing) == self.target and wanted in (None, self.states.get(self.thing))

    def _works(self, work: Work) -> bool:
        fits = self.here == work.place and self.held in work.things and self.states.get(self.held) != work.state
        if fits:
            self.states[self.held] = work.state
        return fits

    def _closed(self) -> bool:
        return self.here in CLOSED and self.here not in self.opened

    def _visible(self) -> list[str]:
        if self._closed():
            return []
        return sorted(thing for thing, place in self.places.items() if place == self.here)

    def _look(self) -> str:
        if self._closed():
            return ", closed"
        how = ", open" if self.here in CLOSED else f", lamp {self.lamp}" if self.here == LAMP else ""
        return f"{how}: {', '.join(map(self._named, self._visible())) or 'nothing'}"

    def _named(self, thing: str) -> str:
        return f"{thing} ({self.states[thing]})" if thing in self.states else thing


class _Aim(NamedTuple):
    """A goal, read. ``work``: "" where the thing may be in any state."""

    thing: str
    work: str
    target: str


class _View(NamedTuple):
    """An observation, read. ``left``: the place where the goal's thing was seen, if it is another one."""

    here: str
    closed: bool
    lamp: str
    things: tuple[str, ...]
    held: str
    state: str
    left: str
    unsearched: tuple[str, ...]


_GOAL = re.compile(r"the (?:(\w+) )?(\w+) (?:in|on|under) the (\w+)")
_VERBS = {work.state: verb for verb, work in WORKS.items()}
_SEEN = re.compile(
    r"(?:Nothing happens\. )?"
    r"(?:In the hall|At the (?P<here>\w+)"
    r"(?:(?P<closed>, closed)|(?:, open|, lamp (?P<lamp>\w+))?: (?P<things>[^.]+)))\. "
    r"Holding (?P<held>\w+)(?: \((?P<state>\w+)\))?\."
    r"(?: The [^.]+ is at the (?P<left>\w+)\.)?"
    r"(?: Not searched: (?P<unsearched>[^.]+)\.)?"
)


def _goal(kind: str, thing: str, target: str) -> str:
    """What is to be, and not what is to be done: a verb in the goal is one that small models say too early."""
    if kind == "look":
        return f"the {thing} under the lamp"
    state = f"{WORKS[kind].state} " if kind in WORKS else ""
    return f"the {state}{thing} {'in' if target in INSIDE else 'on'} the {target}"


def _aim(goal: str) -> _Aim:
    match = _GOAL.fullmatch(goal)
    if match is None or (match[1] and match[1] not in _VERBS):
        raise OptionError(f"goal={goal[:60]!r}: none of this flat's; they are those of household.tasks")
    if match[3] == "lamp":
        return _Aim(match[2], "look", LAMP)
    return _Aim(match[2], _VERBS.get(match[1] or "", ""), match[3])


def _view(observation: str) -> _View:
    match = _SEEN.fullmatch(observation)
    if match is None:
        raise OptionError(f"observation={observation[:60]!r}: none of this flat's; they are those of household.Episode")
    held, things = match["held"], match["things"] or "nothing"
    return _View(
        match["here"] or "",
        bool(match["closed"]),
        match["lamp"] or "",
        () if things == "nothing" else tuple(each.partition(" ")[0] for each in things.split(", ")),
        "" if held == "nothing" else held,
        match["state"] or "",
        match["left"] or "",
        tuple((match["unsearched"] or "").split(", ")),
    )


def _with_thing(aim: _Aim, view: _View) -> str:
    """The expert with the goal's thing in its hand."""
    work = WORKS.get(aim.work)
    place, action = aim.target, "use lamp" if aim.work == "look" else f"put {aim.thing}"
    if work and view.state != work.state:
        place, action = work.place, f"{aim.work} {aim.thing}"
    if view.here != place:
        return f"go to {place}"
    return f"open {place}" if view.closed else action


def _drawn(chance: random.Random, number: int, kind: str, seed: int, known: set[str]) -> Task | None:
    """A task, or None where the draw is one that was drawn before, solved from the start, too short or too long."""
    thing = chance.choice(_suitable(kind))
    target = LAMP if kind == "look" else chance.choice(PLACES)
    some = chance.sample(PLACES, chance.randint(2, 5))
    place = some[0]
    unsearched = tuple(each for each in PLACES if each in some)
    key = f"{kind} {thing} {target} {place} {unsearched}"
    if key in known or (kind == "put" and place == target):
        return None
    others = list(_others(thing))
    hand = dealt(seed, key, [len(each) for each in others])
    lying = {each[digit]: where for each, digit, where in zip(others, hand, PLACES, strict=True)}
    lying.pop("", None)
    world = World(thing, target, tuple(sorted({**lying, thing: place}.items())), unsearched)
    task = Task(number, kind, _goal(kind, thing, target), world)
    if not SHORTEST <= expert_steps(task) <= LONGEST:
        return None
    known.add(key)
    return task


def _suitable(kind: str) -> tuple[str, ...]:
    return WORKS[kind].things if kind in WORKS else PAPERS if kind == "look" else THINGS


def _others(thing: str) -> Iterator[tuple[str, ...]]:
    """What else may lie at each place: nothing, or one of its own few things."""
    for index in range(len(PLACES)):
        yield ("", *(each for each in THINGS[index :: len(PLACES)] if each != thing))
