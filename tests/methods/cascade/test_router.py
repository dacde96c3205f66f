"""The cascade's decisions and accounts with scripted models, computed by hand, and its promises with faulty servers."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace

import pytest
from cascade_fakes import Scripted, WordEmbedder, demonstration
from cascade_server import as_asked, drips, fails, hangs, hangs_up, says, sends, serving
from refusals import refusal

from accel.methods.cascade import endpoint
from accel.methods.cascade.accounting import STUDENT, TEACHER
from accel.methods.cascade.answerer import Reply, Sample, Unanswered
from accel.methods.cascade.endpoint import Endpoint
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.prices import HourPrice, TokenPrice, Usage
from accel.methods.cascade.router import AGREED, ESCALATED, FALLBACK, UNREADABLE, Cascade, NoAnswer
from accel.methods.cascade.store import DemonstrationStore, Situation

ASKED = [{"role": "user", "content": "which way?"}]
CHEAP, DEAR = TokenPrice(1.0, 2.0), TokenPrice(10.0, 20.0)
DOWN = Unanswered("big: down", seconds=1.0, usage=Usage())


def student(*script, **changes):
    return Scripted("small", *script, **{"price": CHEAP} | changes)


def teacher(*script, **changes):
    return Scripted("big", *script, **{"price": DEAR, "prompt": 80, "written": 5} | changes)


def cascade(small, big, store=None, key=None, same=None, **options):
    return Cascade(small, big, CascadeOptions(**options), store=store, key=key, same=same)


def test_samples_that_agree_are_accepted():
    small, big = student("north"), teacher("south")
    made = cascade(small, big)
    answer = made.answer(ASKED)
    assert (answer.text, answer.decision, answer.model) == ("north", AGREED, "small-served")
    assert not big.questions and [n for _, n, _, _ in small.questions] == [3]
    # one prompt of 100 at $1, three answers of 10 at $2, per million
    assert answer.ledger.cost == 160 / 1e6
    # the teacher would have read the same prompt and written one answer: 100 · 10 + 10 · 20
    assert (answer.ledger.teacher_only, answer.ledger.estimated) == (1200 / 1e6, True)
    assert answer.ledger.saved == pytest.approx(1040 / 1e6, rel=1e-12)
    assert answer.ledger.agreement == 1.0 and not answer.notes


def test_samples_that_differ_go_to_the_teacher_and_are_charged():
    small, big = student("north", "north", "south"), teacher("west")
    answer = cascade(small, big).answer(ASKED)
    assert (answer.text, answer.decision, answer.model) == ("west", ESCALATED, "big-served")
    assert [(a.role, a.rejected) for a in answer.ledger.attempts] == [(STUDENT, True), (TEACHER, False)]
    # 160 for the rejected drafts, and 80 · 10 + 5 · 20 = 900
    assert answer.ledger.cost == pytest.approx(1060 / 1e6, rel=1e-12)
    assert (answer.ledger.teacher_only, answer.ledger.estimated) == (900 / 1e6, False)
    assert answer.ledger.agreement == 2 / 3
    ((messages, n, settings, seconds),) = big.questions
    assert messages == ASKED and n == 1 and settings.temperature == 0.0 and seconds == 120.0


def test_samples_that_are_no_answer_here_agree_with_nothing():
    small, big = student("fly", "fly", "fly"), teacher("walk")
    answer = cascade(small, big).answer(ASKED, valid=lambda text: text != "fly")
    assert (answer.text, answer.decision, answer.verdict.votes, answer.verdict.taken) == ("walk", ESCALATED, 0, 3)
    some = cascade(student("fly", "walk", "walk"), big, threshold=2 / 3).answer(ASKED, valid=lambda text: text != "fly")
    assert (some.text, some.decision, some.verdict.votes) == ("walk", AGREED, 2)
    pieces = list(cascade(student("fly"), big).stream(ASKED, valid=lambda text: text != "fly"))
    assert "".join(piece.text for piece in pieces) == "walk"


@pytest.mark.parametrize(
    ("options", "script", "text"),
    [
        ({"threshold": 2 / 3}, ["a", "b", "b"], "b"),
        ({"samples": 5, "threshold": 0.6}, ["a", "b", "b", "c", "b"], "b"),
        ({"samples": 1}, ["a"], "a"),
        ({"compare": "normalised"}, ["Go north.", "go  north", "GO NORTH"], "Go north."),
        ({"compare": "json"}, ['{"a":1}', '{"a": 1.0}', '```json\n{"a": 1}\n```'], '{"a":1}'),
        ({"compare": "code"}, ["f(1)", "f( 1 )", "f(1) # so"], "f(1)"),
        ({"action_marker": "Action:"}, ["I see. Action: go", "Hm. Action: go", "Action: go"], "I see. Action: go"),
        ({}, ["", "", ""], None),
        ({"compare": "json"}, ["{", "{", "{"], None),
        ({}, ["a", "b", "c"], None),
        ({"threshold": 2 / 3}, ["a", "", "b"], None),
    ],
)
def test_what_agrees(options, script, text):
    big = teacher('{"right": 1} Action: right' if options.get("compare") != "json" else "1")
    answer = cascade(student(*script), big, **options).answer(ASKED)
    assert answer.decision == (ESCALATED if text is None else AGREED)
    assert text is None or answer.text == text


def test_functions_of_ones_own():
    made = cascade(student("1.0", "1.04", "0.98"), teacher("9"), same=lambda a, b: abs(float(a) - float(b)) < 0.1)
    assert made.answer(ASKED).text == "1.0"
    made = cascade(student("ab", "cd", "ef"), teacher("9"), key=len)
    assert made.answer(ASKED).text == "ab"


def test_an_early_exit_asks_for_no_more_than_decides():
    # samples that cost a prompt each are asked for as far as they can matter: two, and one more if they agree
    small = student("a", "b", shares_prompt=False)
    answer = cascade(small, teacher("t"), seed=7).answer(ASKED)
    assert answer.decision == ESCALATED and [n for _, n, _, _ in small.questions] == [2]
    assert answer.ledger.attempts[0].usage == Usage(200, 0, 20) and answer.verdict.taken == 2
    small = student("a", shares_prompt=False)
    answer = cascade(small, teacher("t"), seed=7).answer(ASKED)
    assert answer.decision == AGREED and [n for _, n, _, _ in small.questions] == [2, 1]
    # new samples have new seeds
    assert [settings.seed for _, _, settings, _ in small.questions] == [7, 9]
    # the estimate is of one prompt
    assert answer.ledger.teacher_only == 1200 / 1e6
    # samples that share their prompt come at once, unless told otherwise
    for early_exit, rounds in (("auto", [3]), ("never", [3]), ("always", [2, 1])):
        small = student("a")
        cascade(small, teacher("t"), early_exit=early_exit).answer(ASKED)
        assert [n for _, n, _, _ in small.questions] == rounds


def test_a_student_that_does_not_answer_leaves_it_to_the_teacher():
    broken = Unanswered("small: out of memory", seconds=0.5, usage=Usage(100, 0, 0))
    answer = cascade(student(broken), teacher("t")).answer(ASKED)
    assert (answer.text, answer.decision, answer.notes) == ("t", ESCALATED, ("small: out of memory",))
    assert answer.ledger.attempts[0].error == "small: out of memory"
    assert answer.ledger.cost == pytest.approx((100 + 900) / 1e6, rel=1e-12)
    # what it said before it failed is its best answer
    small = student("a", "a", broken, shares_prompt=False)
    answer = cascade(small, teacher(DOWN)).answer(ASKED)
    assert (answer.text, answer.decision) == ("a", FALLBACK) and answer.verdict.taken == 2


@pytest.mark.parametrize("bad", [DOWN, "", "  \n"], ids=["down", "empty", "blank"])
def test_without_the_teacher_the_students_best_or_an_error_as_chosen(bad):
    answer = cascade(student("a", "b", "b"), teacher(bad)).answer(ASKED)
    assert (answer.text, answer.decision, answer.model) == ("b", FALLBACK, "small-served")
    assert [a.rejected for a in answer.ledger.attempts] == [False, True]
    garbage = 0 if bad is DOWN else 900
    assert answer.ledger.cost == pytest.approx((160 + garbage) / 1e6, rel=1e-12)
    assert answer.notes and "2 of 3 samples of small agree, 3 of 3 must; big: " in answer.notes[0]
    made = cascade(student("a", "b", "b"), teacher(bad), without_teacher="error")
    with pytest.raises(NoAnswer) as caught:
        made.answer(ASKED)
    assert "2 of 3 samples of small agree" in str(caught.value) and "big: " in str(caught.value)
    ledger = caught.value.ledger
    assert ledger.answered_by is None and all(a.rejected for a in ledger.attempts)
    assert ledger.cost == answer.ledger.cost == made.totals.cost
    # samples that agree need no teacher
    assert cascade(student("a"), teacher(bad), without_teacher="error").answer(ASKED).text == "a"


def test_nobody_answers():
    broken = Unanswered("small: gone", seconds=0.5, usage=Usage())
    assert "small: gone; big: down" in refusal(lambda: cascade(student(broken), teacher(DOWN)).answer(ASKED))
    assert "0 of 3 samples" in refusal(lambda: cascade(student(""), teacher(DOWN)).answer(ASKED))


def test_garbage_is_what_the_comparison_cannot_read():
    answer = cascade(student("{}", "[]", "1"), teacher("no JSON"), compare="json").answer(ASKED)
    assert answer.decision == FALLBACK and answer.ledger.attempts[1].error == UNREADABLE


def test_without_a_teacher_the_largest_group_speaks():
    answer = cascade(student("a", "b", "b"), None).answer(ASKED)
    assert (answer.text, answer.decision, answer.ledger.saved) == ("b", FALLBACK, None)
    assert cascade(student("a"), None).answer(ASKED).decision == AGREED
    assert "0 of 3 samples" in refusal(lambda: cascade(student(""), None).answer(ASKED))


def test_a_teacher_by_the_hour_is_estimated_by_its_answers():
    big = teacher("t", price=HourPrice(3600.0))
    made = cascade(student("a", "a", "a", *"abcabc", "a"), big)
    # nothing is known before it answered once
    assert made.answer(ASKED).ledger.teacher_only is None
    assert made.answer(ASKED).ledger.teacher_only == made.answer(ASKED).ledger.teacher_only == 2.0
    after = made.answer(ASKED).ledger
    assert (after.teacher_only, after.estimated) == (2.0, True)
    assert made.totals.teacher_only is None and made.totals.escalated == 2


@pytest.fixture
def store(tmp_path):
    with DemonstrationStore(tmp_path / "demos.sqlite", WordEmbedder()) as store:
        yield store


def test_the_student_sees_demonstrations_and_the_teacher_does_not(store):
    store.add([demonstration("which way", "go north", episode="e1"), demonstration("paint", "a wall", episode="e2")])
    small, big = student("a", "b", "c"), teacher("t")
    made = cascade(small, big, store, demonstrations=1)
    answer = made.answer(ASKED, Situation(goal="which way", observation="see go north"))
    assert [each.demonstration.episode for each in answer.found] == ["e1"]
    assert "Action: go north" in small.questions[0][0][0]["content"] and big.questions[0][0] == ASKED
    # the task at hand is not shown itself
    answer = made.answer(ASKED, Situation(goal="which way", episode="e1"))
    assert [each.demonstration.episode for each in answer.found] == ["e2"]
    # without a situation the conversation is one
    assert len(made.answer(ASKED).found) == 1
    assert not cascade(student("a"), big, store, demonstrations=0).answer(ASKED).found


def test_demonstrations_count_in_the_cost_and_not_in_what_the_teacher_would_read(store):
    store.add([demonstration("which way", "go north")])
    small = student("a")
    ledger = cascade(small, teacher("t"), store).answer(ASKED).ledger
    shown = sum(len(message["content"]) for message in small.questions[0][0])
    expected = round(100 * len(ASKED[0]["content"]) / shown)
    assert ledger.teacher_only == (expected * 10 + 10 * 20) / 1e6 and ledger.cost == 160 / 1e6


@pytest.mark.parametrize("broken", ["embedder", "shorten"])
def test_whatever_breaks_around_a_store_costs_the_examples_alone(store, broken):
    def breaks(_):
        raise ConnectionError("away\nfor now")

    store.add([demonstration("which way", "go north")])
    made = cascade(student("a", "b", "c"), teacher("t"), store, learn=True)
    if broken == "embedder":
        store.embedder.embed = breaks
    else:
        made.shorten = breaks
    answer = made.answer(ASKED)
    assert (answer.text, answer.found, answer.notes[0]) == ("t", (), "without demonstrations: away")
    assert made.totals.requests == 1 and len(answer.notes) == (2 if broken == "embedder" else 1)


def test_a_slow_store_takes_no_more_than_half_of_the_students_time(store):
    store.add([demonstration("which way", "go north")])
    let_go = threading.Event()
    store.embedder.embed = lambda texts: let_go.wait(20)
    small = student("a")
    began = time.monotonic()
    answer = cascade(small, teacher("t"), store, student_seconds=0.6).answer(ASKED)
    assert time.monotonic() - began < 5 and answer.text == "a"
    assert answer.notes == ("without demonstrations: not done within 0.3 s",)
    # what is left is the student's
    assert 0 < small.questions[0][3] < 0.31
    let_go.set()


def test_an_answer_does_not_wait_for_a_busy_store(store):
    let_go = threading.Event()
    store.add = lambda demonstrations: let_go.wait(20)
    began = time.monotonic()
    # the teacher took 2 s of the 2.2
    answer = cascade(student("a", "b", "c"), teacher("t"), store, learn=True, teacher_seconds=2.2).answer(ASKED)
    assert time.monotonic() - began < 5 and answer.text == "t"
    assert answer.notes == ("not learned: not done within 0.2 s",)
    let_go.set()


def test_a_store_that_fails_costs_the_examples_and_not_the_answer(store):
    store.embedder.embed = lambda texts: WordEmbedder.embed(store.embedder, texts) * math.nan
    answer = cascade(student("a", "b", "c"), teacher("t"), store, learn=True).answer(ASKED)
    assert answer.text == "t" and not answer.found
    assert answer.notes[0].startswith("without demonstrations: ") and answer.notes[1].startswith("not learned: ")


def test_the_teachers_answers_are_learned_where_wanted(store):
    here = Situation(goal="g", plan="p", observation="o", episode="e1")
    options = {"action_marker": "Action:", "demonstrations": 1}
    cascade(student("x Action: a", "x", "y"), teacher("I think. Action: b"), store, **options).answer(ASKED, here)
    assert len(store) == 0
    made = cascade(
        student("x Action: a", "x", "y", "z Action: b"), teacher("I think. Action: b"), store, learn=True, **options
    )
    made.answer(ASKED, here)
    (found,) = store.retrieve(Situation(goal="g", observation="o"), 1)
    step = found.demonstration.steps[0]
    assert (step.observation, step.reasoning, step.action) == ("o", "I think.", "b")
    assert (found.demonstration.episode, found.demonstration.source) == ("e1", "teacher:big-served")
    # what the student agrees on is not learned
    answer = made.answer(ASKED, Situation(goal="g", observation="o"))
    assert answer.decision == AGREED and len(answer.found) == len(store) == 1


def test_what_was_cut_off_or_is_no_answer_here_is_not_learned(store):
    class Cut(Scripted):
        def sample(self, *args, **kwargs):
            reply = super().sample(*args, **kwargs)
            return replace(reply, samples=tuple(replace(each, finish="length") for each in reply.samples))

    answer = cascade(student("a", "b", "c"), Cut("big", "t"), store, learn=True).answer(ASKED)
    assert (answer.text, answer.finish) == ("t", "length") and len(store) == 0
    assert answer.notes == ("not learned: the answer was cut off at 256 tokens",)
    answer = cascade(student("a", "b", "c"), teacher("t"), store, learn=True).answer(ASKED, valid=lambda text: False)
    assert (answer.text, answer.notes) == ("t", ("not learned: it is no answer here",)) and len(store) == 0
    small = Cut("small", "a", "b", "b")
    assert cascade(small, None, threshold=0.6).answer(ASKED).finish == "length"
    # of the samples that agree the first one counts
    small.sample = lambda *_, **__: Reply((Sample("a", "length"), Sample("b"), Sample("b", "length")), None, 0.0, "s")
    answer = cascade(small, None, threshold=0.6).answer(ASKED)
    assert (answer.text, answer.finish, answer.as_dict()["finish"]) == ("b", "stop", "stop")
    assert cascade(small, None).answer(ASKED).finish == "stop"


@pytest.mark.parametrize(
    ("script", "bad"), [(["a"], "t"), (["a", "b", "c"], "t"), (["a", "b", "b"], DOWN)], ids=["agreed", "asked", "down"]
)
def test_a_stream_is_the_answer_in_pieces(script, bad):
    whole, streamed = cascade(student(*script), teacher(bad)), cascade(student(*script), teacher(bad))
    answer, pieces = whole.answer(ASKED), list(streamed.stream(ASKED))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.answer for piece in pieces[:-1]] == [None]
    last = pieces[-1].answer
    assert replace(last, seconds=0.0) == replace(answer, seconds=0.0) and streamed.totals == whole.totals


def test_a_stream_asks_when_it_is_read_and_checks_before():
    small = student("a")
    made = cascade(small, None)
    assert "at least one" in refusal(lambda: made.stream([]))
    stream = made.stream(ASKED, Situation(goal="g"))
    assert not small.questions and made.totals.requests == 0
    assert next(stream).text == "a" and made.totals.requests == 1
    # a reader that stops early was charged all the same
    stream.close()
    assert made.totals.cost == 160 / 1e6
    broken = cascade(student(""), teacher(DOWN)).stream(ASKED)
    with pytest.raises(NoAnswer):
        next(broken)


def test_an_answer_is_json():
    raw = json.loads(json.dumps(cascade(student("a", "b", "c"), teacher("t")).answer(ASKED).as_dict()))
    assert raw["text"] == "t" and raw["model"] == "big-served" and raw["decision"] == ESCALATED
    assert len(raw["attempts"]) == 2 and raw["votes"] == 1 and raw["saved"] == raw["teacher_only"] - raw["cost"]


def test_many_threads_ask_at_once():
    made = cascade(student("a"), teacher("t"))
    threads = [threading.Thread(target=made.answer, args=(ASKED,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.totals.requests == 16 and made.totals.answered_by == {"small-served": 16}
    assert made.totals.cost == pytest.approx(16 * 160 / 1e6, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "says_so"),
    [
        ({"samples": 0}, "samples=0"),
        ({"threshold": 2}, "threshold=2"),
        ({"compare": "close"}, "comparison 'close'"),
        ({"temperature": 0}, "temperature=0 with samples=3"),
        ({"temperature": -1}, "temperature=-1"),
        ({"teacher_temperature": 3}, "temperature=3"),
        ({"early_exit": "soon"}, "early_exit='soon'"),
        ({"without_teacher": "retry"}, "without_teacher='retry'"),
        ({"demonstrations": -1}, "demonstrations=-1"),
        ({"window": 0}, "window=0"),
        ({"student_seconds": 0}, "student_seconds=0"),
        ({"teacher_seconds": math.inf}, "teacher_seconds=inf"),
        ({"stop": ("",)}, "stop="),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_options_are_checked(options, says_so):
    assert says_so in refusal(lambda: CascadeOptions(**options))


def test_one_greedy_sample_is_allowed():
    assert CascadeOptions(samples=1, temperature=0).rule().needed == 1


# -- the same promises with sockets in between --


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


FAULTS = [
    hangs,
    drips,
    hangs_up,
    fails(500),
    fails(503, Retry_After="99"),
    fails(401),
    sends(b"garbage"),
    says(""),
    says(),
]


@pytest.mark.parametrize("act", FAULTS)
@pytest.mark.parametrize("without_teacher", ["student", "error"])
def test_a_faulty_teacher_never_keeps_the_caller(direct, act, without_teacher):
    with serving(act) as server:
        made = cascade(
            student("a", "b", "b"),
            Endpoint(server.url, "big", price=DEAR),
            teacher_seconds=0.5,
            without_teacher=without_teacher,
        )
        began = time.monotonic()
        if without_teacher == "student":
            answer = made.answer(ASKED)
            assert (answer.text, answer.decision) == ("b", FALLBACK) and answer.ledger.cost is not None
        else:
            with pytest.raises(NoAnswer, match="big") as caught:
                made.answer(ASKED)
            assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("act", FAULTS)
def test_a_faulty_student_leaves_it_to_the_teacher(direct, act):
    with serving(act) as bad, serving(as_asked("t")) as good:
        small = Endpoint(bad.url, "small", price=CHEAP)
        made = cascade(small, Endpoint(good.url, "big", price=DEAR), student_seconds=0.5)
        answer = made.answer(ASKED)
        assert (answer.text, answer.decision, answer.model) == ("t", ESCALATED, "served-model")


def test_a_cascade_of_two_endpoints(direct):
    with serving(as_asked("a")) as small, serving(as_asked("t")) as big:
        made = cascade(Endpoint(small.url, "small", price=CHEAP), Endpoint(big.url, "big", price=DEAR), samples=4)
        answer = made.answer(ASKED)
        assert (answer.text, answer.decision) == ("a", AGREED) and not big.bodies
        # as the server counts: 100 read, 7 written; without a price of its own, what was cached is input
        assert answer.ledger.cost == (100 * 1 + 7 * 2) / 1e6 and [body["n"] for body in small.bodies] == [4]
