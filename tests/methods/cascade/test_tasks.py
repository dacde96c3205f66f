"""Episodes worked on step by step: what is asked at each, and what is kept of it."""

from __future__ import annotations

from refusals import refusal

from accel.methods.cascade.prompt import Layout
from accel.methods.cascade.store import Situation, Step
from accel.methods.cascade.tasks import MOST_STEPS, Question, Questions, parted_action, play, question


class Count:
    """Done, and a success, once ``target`` times "up" were said."""

    def __init__(self, target: int) -> None:
        self.target, self.value = target, 0
        self.done = self.success = False
        self.observation = "at 0"

    def act(self, action: str) -> None:
        self.value += action == "up"
        self.observation = f"at {self.value}"
        self.done = self.success = self.value == self.target


def test_an_episode_is_asked_step_by_step():
    asked: list[tuple[list[dict[str, str]], Situation]] = []
    script = iter(["up", "stay", "up"])

    def ask(messages, situation):
        asked.append((messages, situation))
        return next(script)

    found = play(Count(2), "count to 2", ask, system="Count.", history=1, name="t/0")
    assert found.success and found.goal == "count to 2"
    assert [(s.observation, s.action) for s in found.steps] == [("at 0", "up"), ("at 1", "stay"), ("at 1", "up")]
    assert asked[2][0] == [
        {"role": "system", "content": "Count."},
        {
            "role": "user",
            "content": "Task: count to 2\nObservation: at 1\nAction: stay\nObservation: at 1\nAction:",
        },
    ]
    assert asked[0][0][1]["content"] == "Task: count to 2\nObservation: at 0\nAction:"
    assert asked[1][1] == Situation(goal="count to 2", observation="at 1", episode="t/0")
    kept = found.demonstration(episode="t/0", source="teacher:x")
    assert (kept.outcome, kept.episode, kept.source, len(kept.steps)) == (1.0, "t/0", "teacher:x", 3)


def test_an_episode_that_never_ends_is_ended():
    found = play(Count(-1), "", lambda messages, situation: "no")
    assert not found.success and len(found.steps) == MOST_STEPS
    assert found.demonstration().outcome == 0.0


def test_reasoning_is_parted_from_the_action():
    assert parted_action("I see. Action: no. Action: go ", "Action:") == ("I see. Action: no.", "go")
    assert parted_action(" go ", "Action:") == ("", "go")
    assert parted_action(" Action: go", "") == ("", "Action: go")
    found = play(Count(1), "g", lambda m, s: "Up it is. Action: up", marker="Action:")
    assert found.steps == (Step("at 0", "up", "Up it is."),)


def test_words_of_a_layout():
    layout = Layout(goal="", observation="Question:", action="Answer:")
    assert question("", "", "2 + 2?", layout) == [{"role": "user", "content": "Question: 2 + 2?\nAnswer:"}]


def test_questions_are_tasks_of_one_step():
    world = Questions([Question("2 + 2?", "4"), Question("1 + 1?", "2")], lambda said, known: said == known, "Add.")
    first, second = world.tasks(2, 0)
    episode = world.Episode(first)
    assert (episode.observation, episode.done) == ("2 + 2?", False)
    assert play(episode, first.goal, lambda m, s: "4").success
    assert not play(world.Episode(second), "", lambda m, s: "4").success
    assert "there are 2 questions" in refusal(lambda: world.tasks(3, 0))
