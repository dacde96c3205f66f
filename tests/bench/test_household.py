"""The flat: its texts against its states, its expert against a search, and what may not change anything.

``Rules`` says the rules a second time, as steps from one tuple to others; a search over those finds the fewest steps.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict, deque
from functools import cache

import pytest
from refusals import refusal

from accel.bench import household
from accel.bench.household import KINDS, PLACES, THINGS, Episode, expert, options, tasks

CLOSED = ("cabinet", "drawer", "fridge")
ACTIONS = [
    *(f"{verb} {place}" for verb in ("go to", "open") for place in PLACES),
    *(f"{verb} {thing}" for verb in ("take", "put", "clean", "heat", "cool") for thing in THINGS),
    "use lamp",
]


@pytest.fixture(scope="module")
def many():
    return tasks(300, 1)


class Rules:
    """The flat once more, for one task: a state is (here, hand, where the thing is, its state, opened, lamp).

    The hand holds the thing, something else, or nothing. Other things can be put down and not taken: to hold one only
    takes time.
    """

    def __init__(self, task):
        self.kind, self.thing, self.target = task.kind, task.world.thing, task.world.target
        self.wanted = {"clean": "clean", "heat": "hot", "cool": "cold"}.get(task.kind)
        self.fewest = cache(self._fewest)

    def state(self, flat):
        hand = "thing" if flat.held == self.thing else "other" if flat.held else ""
        opened = frozenset(flat.opened)
        return (flat.here, hand, flat.places.get(self.thing), flat.states.get(self.thing), opened, flat.lamp)

    def solved(self, state):
        here, hand, lies, made, _, lamp = state
        if self.kind == "look":
            return (here, hand, lamp) == ("desk", "thing", "on")
        return lies == self.target and (self.wanted is None or made == self.wanted)

    def after(self, state):
        here, hand, lies, made, opened, lamp = state
        for place in PLACES:
            if place != here:
                yield (place, hand, lies, made, opened, lamp)
        if here == "":
            return
        if here in CLOSED and here not in opened:
            yield (here, hand, lies, made, opened | {here}, lamp)
            return
        if here == "desk" and lamp == "off":
            yield (here, hand, lies, made, opened, "on")
        if hand == "other":
            yield (here, "", lies, made, opened, lamp)
        if hand == "" and lies == here:
            yield (here, "thing", None, made, opened, lamp)
        if hand == "thing":
            yield (here, "", here, made, opened, lamp)
            for place, things, becomes in (
                ("sink", household.DISHES, "clean"),
                ("stove", household.FOODS, "hot"),
                ("fridge", household.FOODS, "cold"),
            ):
                if here == place and self.thing in things:
                    yield (here, hand, lies, becomes, opened, lamp)

    def _fewest(self, state):
        """Steps from a state to the nearest that is solved, by breadth."""
        reached, edge = {state}, deque([(state, 0)])
        while edge:
            at, steps = edge.popleft()
            if self.solved(at):
                return steps
            for then in self.after(at):
                if then not in reached:
                    reached.add(then)
                    edge.append((then, steps + 1))
        raise AssertionError("every state can be solved")


def finish(episode):
    """The rest of an episode by its expert: steps until the thing was seen, and steps from there."""
    searching = 0
    episode.limit = episode.steps + 99
    while "Not searched" in episode.observation:
        episode.act(expert(episode.task.goal, episode.observation))
        searching += 1
    found = copy.deepcopy(episode)
    while not episode.done:
        assert expert(episode.task.goal, episode.observation) in options(episode.observation, episode.task.goal)
        episode.act(expert(episode.task.goal, episode.observation))
    assert episode.success
    return searching, episode.steps - found.steps, found


def walks(some, steps=25):
    """Episodes on the way, whoever chose the way: at random, with a share of the expert's actions."""
    for number, task in enumerate(some):
        chance = random.Random(number)
        episode = Episode(task)
        episode.limit = steps
        while not episode.done:
            yield episode
            possible = options(episode.observation, task.goal)
            right = expert(task.goal, episode.observation)
            episode.act(right if chance.random() < 0.4 else chance.choice([*possible, chance.choice(ACTIONS)]))


def test_the_expert_solves_every_task_in_time(many):
    lengths = Counter()
    for task in many:
        episode = Episode(task)
        texts = [episode.observation]
        while not episode.done:
            texts.append(episode.act(expert(task.goal, episode.observation)))
        assert episode.success and household.SHORTEST <= episode.steps <= household.LONGEST
        assert episode.limit == max(12, 5 * episode.steps // 2)
        assert all("\n" not in text and len(text.split()) <= 45 for text in texts)
        lengths[episode.steps] += 1
    assert set(lengths) == set(range(household.SHORTEST, household.LONGEST + 1))


def test_the_expert_takes_the_fewest_steps(many):
    """The search in its order, counted by hand, and the fewest steps from where the thing is seen."""
    for task in many:
        searching, rest, found = finish(Episode(task))
        rules, lies = Rules(task), dict(task.world.things)[task.world.thing]
        order = task.world.unsearched
        assert lies in order and list(order) == [place for place in PLACES if place in order]
        assert searching == sum(1 + (place in CLOSED) for place in order[: order.index(lies) + 1])
        assert rest == rules.fewest(rules.state(found._flat)) > 0


def test_the_expert_finds_back_from_anywhere(many):
    checked = Counter()
    for episode in walks(many[:60]):
        rules = Rules(episode.task)
        searching, rest, found = finish(copy.deepcopy(episode))
        # a search may begin with a thing to put down, and goes to each place that is left once
        assert searching <= 1 + sum(1 + (place in CLOSED) for place in episode._flat.unsearched)
        assert rest == rules.fewest(rules.state(found._flat))
        checked[bool(searching), rules.state(episode._flat)[1]] += 1
    # searching or not, with an empty hand or something else in it; or with the thing
    assert len(checked) == 5 and min(checked.values()) >= 5, checked


def test_what_is_seen_says_what_can_be_done(many):
    """The actions read off the text are those that change the flat, and the others change nothing at all."""
    for episode in walks(many[:15], 12):
        possible = options(episode.observation, episode.task.goal)
        assert possible == sorted(possible)
        for action in ACTIONS:
            tried = copy.deepcopy(episode)
            text = tried.act(action)
            changed = vars(tried._flat) != vars(episode._flat)
            assert changed == (action in possible), (episode.observation, action)
            assert tried.steps == episode.steps + 1
            if not changed:
                assert text == f"Nothing happens. {episode._flat.seen()}" and not tried.success


def test_what_is_seen_is_all_that_matters(many):
    """One goal and one text: one right action, whatever is hidden, and it is right in all of those states."""
    seen = defaultdict(set)
    for episode in walks(many[:150]):
        rules = Rules(episode.task)
        state = rules.state(episode._flat)
        if "Not searched" not in episode.observation:
            right = expert(episode.task.goal, episode.observation)
            tried = copy.deepcopy(episode)
            tried.act(right)
            assert rules.fewest(rules.state(tried._flat)) == rules.fewest(state) - 1
        seen[episode.task.goal, episode.observation.removeprefix("Nothing happens. ")].add(
            (state, tuple(sorted(episode._flat.places.items())), expert(episode.task.goal, episode.observation))
        )
    shared = [each for each in seen.values() if len(each) > 1]
    assert len(shared) > 50, "texts that stand for several states were met"
    assert all(len({right for *_, right in each}) == 1 for each in seen.values())


def test_success_is_a_state(many):
    solved = 0
    for episode in walks(many[:60]):
        rules, before = Rules(episode.task), copy.deepcopy(episode)
        for action in options(episode.observation, episode.task.goal):
            tried = copy.deepcopy(before)
            tried.act(action)
            assert tried.success == rules.solved(rules.state(tried._flat))
            solved += tried.success
    assert solved > 50


def task_of(kind, thing, target, lies, unsearched=("cabinet", "table"), others=()):
    world = household.World(thing, target, tuple(sorted({thing: lies, **dict(others)}.items())), tuple(unsearched))
    return household.Task(0, kind, household._goal(kind, thing, target), world)


def acted(task, *actions):
    episode = Episode(task)
    return [episode.observation, *(episode.act(action) for action in actions)], episode


def test_an_episode_reads_like_this():
    texts, episode = acted(
        task_of("heat", "soup", "drawer", "cabinet", others=[("cup", "cabinet")]),
        *("go to cabinet", "open cabinet", "take soup", "go to drawer", "go to stove", "heat soup", "go to drawer"),
        *("put soup", "open drawer", "put soup"),
    )
    assert texts == [
        "In the hall. Holding nothing. Not searched: cabinet, table.",
        "At the cabinet, closed. Holding nothing. Not searched: cabinet, table.",
        "At the cabinet, open: cup, soup. Holding nothing.",
        "At the cabinet, open: cup. Holding soup.",
        "At the drawer, closed. Holding soup.",
        "At the stove: nothing. Holding soup.",
        "At the stove: nothing. Holding soup (hot).",
        "At the drawer, closed. Holding soup (hot).",
        "Nothing happens. At the drawer, closed. Holding soup (hot).",
        "At the drawer, open: nothing. Holding soup (hot).",
        "At the drawer, open: soup (hot). Holding nothing.",
    ]
    assert episode.success and episode.done and episode.steps == 10
    assert "over after 10 steps" in refusal(lambda: episode.act("go to table"))


def test_what_was_seen_is_not_forgotten():
    texts, episode = acted(
        task_of("look", "book", "desk", "table", others=[("cup", "desk")]),
        *("go to table", "go to desk", "take cup", "use lamp", "go to table"),
    )
    assert texts[1:] == [
        "At the table: book. Holding nothing.",
        "At the desk, lamp off: cup. Holding nothing. The book is at the table.",
        "At the desk, lamp off: nothing. Holding cup. The book is at the table.",
        "At the desk, lamp on: nothing. Holding cup. The book is at the table.",
        "At the table: book. Holding cup.",
    ]
    for action in ("put cup", "take book", "go to desk"):
        assert expert(episode.task.goal, episode.observation) == action and not episode.success
        episode.act(action)
    assert episode.success


def test_a_thing_must_be_as_the_goal_says():
    task = task_of("cool", "soup", "table", "stove", ("stove",))
    _, episode = acted(task, "go to stove", "take soup", "heat soup", "go to table", "put soup")
    assert not episode.success and episode.observation == "At the table: soup (hot). Holding nothing."
    for action in ("take soup", "go to fridge", "open fridge", "cool soup", "go to table", "put soup"):
        assert expert(task.goal, episode.observation) == action and not episode.success
        episode.act(action)
    assert episode.success


def test_steps_end():
    task = task_of("put", "cup", "shelf", "table", ["table"])
    _, episode = acted(task, *["open the door"] * 11)
    assert episode.limit == 12 and not episode.done
    episode.act("go to table")
    assert episode.done and not episode.success
    # the last step may still be the one that succeeds
    _, episode = acted(task, *["nothing"] * 8, "go to table", "take cup", "go to shelf", "put cup")
    assert episode.done and episode.success and episode.steps == 12


UNDERSTOOD = [
    *("Go to Table", "go to table.", '"go to table"', "`go to table`", "“Go to table.”", "GO  TO\tTABLE"),
    *(
        "Action: go to table",
        "action: 'go to table.'",
        "go to table\nAction: go to desk",
        "\n  go to table  \n\ntake cup",
    ),
]
IDLE = [
    *("", "\n", "I go to table", "table", "go table", "to table", "go open table", "go to", "put"),
    *(
        "put ",
        "take",
        "take cup",
        "clean",
        "clean cup",
        "go to hall",
        "use",
        "lamp",
        "use lamp",
        "go to table, take cup",
    ),
]


@pytest.mark.parametrize("words", UNDERSTOOD)
def test_an_action_is_understood(words):
    texts, _ = acted(task_of("put", "cup", "shelf", "table"), words)
    assert texts[-1] == "At the table: cup. Holding nothing."


@pytest.mark.parametrize("words", IDLE)
def test_other_words_do_nothing(words):
    texts, episode = acted(task_of("put", "cup", "shelf", "table"), words)
    assert texts[-1] == f"Nothing happens. {texts[0]}" and episode.steps == 1 and not episode.done


def test_tasks_repeat_and_differ():
    first = tasks(100, 5)
    assert first == tasks(100, 5) and first[:20] == tasks(20, 5)
    assert len({hash(task) for task in first}) == 100
    assert [task.number for task in first] == list(range(100))
    assert Counter(task.kind for task in first) == dict.fromkeys(KINDS, 20)
    assert len({(task.goal, task.world) for task in first}) == 100


def test_seeds_share_no_task():
    """Whole tasks never; one that is the same but for what else lies around in at most one of fifty."""
    drawn = {seed: {(task.goal, task.world) for task in tasks(150, seed)} for seed in (0, 1, 2, 77, 99)}
    assert len(set.union(*drawn.values())) == 750
    # the same draws under another seed are other worlds: the deal differs
    draws = [
        [household._drawn(random.Random(chance), 0, "heat", seed, set()) for chance in range(20)] for seed in (0, 1)
    ]
    pairs = [(one, other) for one, other in zip(*draws, strict=True) if one and other]
    assert len(pairs) >= 10
    assert all(one.goal == other.goal and one.world != other.world for one, other in pairs)
    cores = [
        (goal, dict(world.things)[world.thing], world.unsearched) for each in drawn.values() for goal, world in each
    ]
    assert len(cores) - len(set(cores)) <= len(cores) // 50


def test_worlds_are_sound(many):
    for task in many:
        world = task.world
        lying = dict(world.things)
        assert lying[world.thing] in world.unsearched and set(lying.values()) <= set(PLACES)
        assert max(Counter(lying.values()).values()) <= 2 and not Rules(task).solved(
            Rules(task).state(Episode(task)._flat)
        )


def test_what_agents_are_told():
    assert len(household.SYSTEM.split()) <= 90 and household.ACTION == ""
    # things and places have names of one word, which are not those of a state
    names = (*THINGS, *PLACES)
    assert len(set(names)) == len(names) and all(name.isalpha() and name.islower() for name in names)


def test_refusals():
    assert "count=0" in refusal(lambda: tasks(0, 1)) and "seed=-1" in refusal(lambda: tasks(1, -1))
    assert "paint the wall" in refusal(lambda: expert("paint the wall", "In the hall. Holding nothing."))
    assert "On the moon" in refusal(lambda: options("On the moon.", "put the cup on the table"))
