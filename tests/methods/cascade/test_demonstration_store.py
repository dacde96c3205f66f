"""The store: what is found at a step, what is filtered, and that writers lose nothing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cascade_fakes import WordEmbedder, demonstration
from refusals import refusal

from accel.errors import AccelError
from accel.methods.cascade.store import Added, Demonstration, DemonstrationStore, Situation, Step
from accel.methods.cascade.store import database as database_module


@pytest.fixture
def store(tmp_path):
    with DemonstrationStore(tmp_path / "demos.sqlite", WordEmbedder()) as store:
        yield store


def goals(found):
    return [each.demonstration.goal for each in found]


def test_the_nearest_by_all_fields_together(store):
    a = demonstration("boil an egg", "heat water", "add egg")
    b = demonstration("boil an egg", "crack shell", "eat egg")
    c = demonstration("paint a wall", "heat water", "add paint")
    store.add([c, b, a])
    found = store.retrieve(Situation(goal="boil an egg", observation="see heat water"), 3)
    assert found[0].demonstration == a and found[0].step == 0
    assert found[0].score == pytest.approx(1.0, abs=1e-3)
    # each of the others matches in one field of two
    assert found[1].score < 0.9 and {each.demonstration.goal for each in found[1:]} == {"boil an egg", "paint a wall"}
    assert store.retrieve(Situation(observation="see add paint"), 1)[0].demonstration == c


def test_scores_are_averages_of_cosines(store):
    store.add([demonstration("one two", "three four", plan="five six")])
    cosine = torch_cosine(store.embedder, "one seven", "one two")
    found = store.retrieve(Situation(goal="one seven", plan="five six", observation="see three four"), 1)
    assert found[0].score == pytest.approx((cosine + 1 + 1) / 3, abs=1e-3)
    # a plan that the demonstration lacks counts as unlike, and one that nobody asked about does not count
    store.add([demonstration("one two", "eight")])
    found = store.retrieve(Situation(goal="one two", plan="five six", observation="see eight"), 2)
    assert {each.steps[0].action: each.score for each in found}["eight"] == pytest.approx(2 / 3, abs=1e-3)
    found = store.retrieve(Situation(goal="one two", observation="see eight"), 1)
    assert found[0].score == pytest.approx(1.0, abs=1e-3)


def torch_cosine(embedder, a, b):
    x, y = embedder.embed([a, b])
    return float(x @ y / x.norm() / y.norm())


def test_reasoning_finds_other_steps_than_seeing(store):
    odd = Demonstration(
        "g", (Step("a dark room", "light lamp", "I need light"), Step("a lamp", "take it", "it is mine"))
    )
    store.add([odd])
    here = Situation(goal="g", observation="a lamp")
    assert store.retrieve(here, 1)[0].step == 1
    assert store.retrieve(here.thinking("I need light"), 1)[0].step == 0


def test_short_texts_find_and_whole_ones_are_shown(store):
    long = Demonstration("g", (Step("a very long page " * 50, "click", short={"observation": "login page"}),))
    store.add([long, demonstration("g", "scroll")])
    found = store.retrieve(Situation(observation="login page"), 1)[0]
    assert found.score == pytest.approx(1.0, abs=1e-3) and found.steps[0].observation.startswith("a very long page")


@pytest.mark.parametrize(
    ("step", "window", "start", "stop"),
    [(0, 3, 0, 3), (1, 3, 0, 3), (4, 3, 3, 6), (9, 3, 7, 10), (5, 5, 3, 8), (5, 4, 4, 8), (3, 1, 3, 4), (3, 99, 0, 10)],
)
def test_windows_stand_around_the_step(store, step, window, start, stop):
    names = "zero one two three four five six seven eight nine".split()
    store.add([demonstration("g", *names)])
    found = store.retrieve(Situation(observation=f"see {names[step]}"), 1, window=window)[0]
    assert (found.step, found.start, found.stop) == (step, start, stop)
    assert [each.action for each in found.steps] == names[start:stop]


def test_filters(store):
    store.add(
        [
            demonstration("g", "own", episode="e1", source="teacher:a"),
            demonstration("g", "failed", outcome=0.0, episode="e2", source="teacher:a"),
            demonstration("g", "half", outcome=0.5, source="teacher:b"),
            demonstration("g", "good", source="teacher:b"),
        ]
    )

    def actions(situation=Situation(goal="g"), **choices):  # noqa: B008 - frozen
        return {each.steps[0].action for each in store.retrieve(situation, 10, **choices)}

    assert actions() == {"own", "good"}
    assert actions(Situation(goal="g", episode="e1")) == {"good"}
    assert actions(exclude_episodes=["e1"]) == {"good"}
    assert actions(Situation(goal="g", episode="e1"), exclude_episodes=["e2"], min_outcome=None) == {"half", "good"}
    assert actions(min_outcome=0.5) == {"own", "half", "good"}
    assert actions(min_outcome=None, sources=["teacher:a"]) == {"own", "failed"}
    assert actions(sources=["nobody"]) == set() == actions(sources=[])
    assert actions(Situation(goal="g", episode="unheard of")) == {"own", "good"}


def test_no_trajectory_and_no_text_twice(store):
    first = demonstration("g", "look", "look", "look")
    assert store.add([first, first]) == Added(1, 1)
    # the same trajectory from elsewhere, and another whose window reads the same
    assert store.add([demonstration("g", "look", "look", "look", episode="e")]) == Added(0, 1)
    assert store.add([demonstration("g", *["look"] * 4), demonstration("g", "leave")]) == Added(2, 0)
    found = store.retrieve(Situation(goal="g", observation="see look"), 5, window=2)
    assert [each.steps[0].action for each in found] == ["look", "leave"]
    assert len(store.retrieve(Situation(goal="g", observation="see look"), 5, window=9)) == 3
    # other steps of a demonstration that was shown are no further demonstrations
    store.add([demonstration("h", "one", "two", "three")])
    assert goals(store.retrieve(Situation(goal="h"), 2, window=1)) == ["h", "g"]


def test_one_store_sees_what_another_adds_and_takes_out(tmp_path):
    path = tmp_path / "demos.sqlite"
    with DemonstrationStore(path, WordEmbedder()) as one, DemonstrationStore(path, WordEmbedder()) as other:
        assert one.retrieve(Situation(goal="a"), 3) == []
        other.add([demonstration("a", episode="e1"), demonstration("b", "stay", episode="e2")])
        assert goals(one.retrieve(Situation(goal="a"), 3)) == ["a", "b"]
        one.add([demonstration("c", "leave")])
        assert goals(other.retrieve(Situation(goal="c"), 1)) == ["c"]
        assert other.remove(episode="e1") == 1 and other.remove(episode="e1") == 0
        assert set(goals(one.retrieve(Situation(goal="a"), 3))) == {"b", "c"}
        # and it is searched no longer
        assert len(one._loaded.ids) == 2
        # a text whose vector went with it comes back
        one.add([demonstration("a")])
        assert goals(other.retrieve(Situation(goal="a"), 1)) == ["a"] and len(one) == 3


def test_a_vector_that_goes_before_it_is_used_is_made_again(store, monkeypatch):
    store.add([demonstration("g", "look", episode="e1")])
    unknown = store._database.unknown

    def then_gone(texts):
        found = unknown(texts)
        store.remove(episode="e1")
        return found

    monkeypatch.setattr(store._database, "unknown", then_gone)
    assert store.add([demonstration("g", "look", "jump")]) == Added(1, 0)
    check_whole(store.path)
    assert store.retrieve(Situation(goal="g", observation="see look"), 2)[0].step == 0


def test_what_goes_during_a_search_is_left_out(store, monkeypatch):
    store.add([demonstration("g", "look", episode="e1"), demonstration("g", "jump", episode="e2")])
    body = store._database.body

    def goes(number):
        store.remove(episode="e1")
        return body(number)

    monkeypatch.setattr(store._database, "body", goes)
    found = store.retrieve(Situation(goal="g", observation="see look"), 2)
    assert [each.demonstration.episode for each in found] == ["e2"]


def test_a_reading_that_fails_halfway_begins_again(store, monkeypatch):
    store.add([demonstration("g", "look"), demonstration("h", "jump")])
    read, failed = store._database.vectors, []

    def fails_once(ids, size):
        failed.append(1)
        if len(failed) == 2:
            raise AccelError("the disk is away")
        return read(ids, size)

    monkeypatch.setattr(store._database, "vectors", fails_once)
    assert "the disk is away" in refusal(lambda: store.retrieve(Situation(goal="g"), 3))
    assert goals(store.retrieve(Situation(goal="g", observation="see look"), 3)) == ["g", "h"]
    assert len(store._loaded.ids) == len(store._loaded.owner) == 2


def test_texts_are_embedded_once(store):
    store.add([demonstration("g", "look", "look"), demonstration("g", "jump", plan="g")])
    assert sorted(store.embedder.asked) == sorted(["g", "see look", "because look", "see jump", "because jump"])
    store.embedder.asked.clear()
    for _ in range(3):
        store.retrieve(Situation(goal="g", plan="p", observation="o"), 1)
    assert store.embedder.asked == ["g", "p", "o"]


def test_jsonl_there_and_back(store, tmp_path):
    made = [demonstration(f"göal {n}", "look", f"go {n}", plan="p", episode=f"e{n}", source="s") for n in range(5)]
    store.add(made)
    assert store.export_jsonl(tmp_path / "out.jsonl") == 5
    with DemonstrationStore(tmp_path / "second.sqlite", WordEmbedder(size=16, digest="other")) as second:
        assert second.import_jsonl(tmp_path / "out.jsonl") == Added(5, 0)
        assert second.import_jsonl(tmp_path / "out.jsonl") == Added(0, 5)
        second.export_jsonl(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if "jsonl" in p.name) == ["again.jsonl", "out.jsonl"]


def test_a_wrong_line_is_refused_before_anything_is_added(store, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(demonstration("g").to_json() + "\n\n{}\n")
    assert "in.jsonl:3: has no goal" in refusal(lambda: store.import_jsonl(path))
    assert len(store) == 0
    assert "cannot be read" in refusal(lambda: store.import_jsonl(tmp_path / "absent"))


def test_refusals(tmp_path):
    path = tmp_path / "demos.sqlite"
    DemonstrationStore(path, WordEmbedder()).close()
    other = WordEmbedder()
    other.name = "letters"
    assert "whose embedder is words, this embedder's is letters" in refusal(lambda: DemonstrationStore(path, other))
    assert "digest is d0, this embedder's is d1" in refusal(lambda: DemonstrationStore(path, WordEmbedder(digest="d1")))
    assert "size is 64, this embedder's is 32" in refusal(lambda: DemonstrationStore(path, WordEmbedder(32)))
    text = tmp_path / "text"
    text.write_text("no database at all, but long enough to be looked at" * 20)
    assert "no readable store" in refusal(lambda: DemonstrationStore(text, WordEmbedder()))
    foreign = tmp_path / "foreign"
    sqlite3.connect(foreign).execute("CREATE TABLE t (x)").connection.close()
    assert "no store of demonstrations" in refusal(lambda: DemonstrationStore(foreign, WordEmbedder()))
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 9")
    newer.close()
    assert "format 9, this accel reads 1" in refusal(lambda: DemonstrationStore(path, WordEmbedder()))
    assert "cannot be used" in refusal(lambda: DemonstrationStore(tmp_path / "no" / "folder", WordEmbedder()))
    assert "there is no store" in refusal(lambda: DemonstrationStore(tmp_path / "x", WordEmbedder(), create=False))
    assert not (tmp_path / "x").exists()


def test_bad_questions_are_refused(store):
    assert "empty situation" in refusal(lambda: store.retrieve(Situation(episode="e"), 1))
    assert "k=0" in refusal(lambda: store.retrieve(Situation(goal="g"), 0))
    assert "window=0" in refusal(lambda: store.retrieve(Situation(goal="g"), 1, window=0))
    # the letters of a name are names too, and would exclude nothing
    for names in ({"exclude_episodes": "e1"}, {"sources": "teacher:a"}):
        assert "not one text" in refusal(lambda names=names: store.retrieve(Situation(goal="g"), 1, **names))
    store.embedder.embed = lambda texts: WordEmbedder.embed(store.embedder, texts) * float("nan")
    assert "finite vectors [1, 64]" in refusal(lambda: store.retrieve(Situation(goal="g"), 1))


def test_a_writer_takes_its_turn_before_it_reads(store):
    with store._database._writing():
        other = sqlite3.connect(store.path, timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


WRITER = """
import os, signal, sys
from cascade_fakes import WordEmbedder, demonstration
from accel.methods.cascade.store import DemonstrationStore, Situation
path, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = DemonstrationStore(path, WordEmbedder())
if name == "third":
    whole = store._database._add_one
    def add_one(db, each, done=[]):
        done.append(each)
        if len(done) == 11:
            os.kill(os.getpid(), signal.SIGKILL)  # two of the third batch's four are written
        return whole(db, each)
    store._database._add_one = add_one
print("ready", flush=True)
for n in range(number):
    store.add([demonstration(f"goal {n}", "shared step", f"step {name} {n} {m}", episode=name) for m in range(4)])
    store.retrieve(Situation(goal=f"goal {n}", observation="see shared step"), 2)
    print(n, flush=True)
"""


def writer(root, path, name, number):
    environment = os.environ | {"PYTHONPATH": str(root / "tests" / "support")}
    arguments = [sys.executable, "-c", WRITER, str(path), name, str(number)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_processes_lose_nothing(tmp_path, root):
    path = tmp_path / "demos.sqlite"
    writers = [writer(root, path, f"p{n}", 15) for n in range(3)]
    for each in writers:
        assert each.communicate()[0].splitlines() == ["ready", *map(str, range(15))]
        assert each.returncode == 0
    with DemonstrationStore(path, WordEmbedder()) as store:
        assert len(store) == 3 * 15 * 4
        check_whole(path)
        found = store.retrieve(Situation(goal="goal 7", observation="see step p2 7 3"), 1)[0]
        assert (found.demonstration.episode, found.step) == ("p2", 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_opens_the_file_anew(tmp_path):
    made = demonstration("g")
    with DemonstrationStore(tmp_path / "demos.sqlite", WordEmbedder()) as store:
        database = store._database
        store.add([made])
        child = os.fork()
        if child == 0:
            # no torch here: its threads did not come along
            gone = database.remove([1])
            # the parent's connection was put aside, neither used nor closed
            os._exit(10 + gone + database.count() + 5 * len(database_module._INHERITED))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 16
        assert len(store) == 0 and store.add([made]) == Added(1, 0)
        check_whole(store.path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_that_closes_the_store_leaves_the_parents_connections(tmp_path):
    with DemonstrationStore(tmp_path / "demos.sqlite", WordEmbedder()) as store:
        assert len(store) == 0
        child = os.fork()
        if child == 0:
            store.close()
            os._exit(10 + len(database_module._INHERITED))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11


def test_threads_share_a_store(store):
    def work(name):
        for index in range(20):
            store.add([demonstration(f"goal {name}", f"step {name} {index}")])
            found = store.retrieve(Situation(goal=f"goal {name}", observation=f"see step {name} {index}"), 3)
            assert found[0].steps[0].action == f"step {name} {index}"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(store) == 80


def check_whole(path):
    """Every demonstration has all its steps and every step its vectors."""
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    for number, body in db.execute("SELECT id, body FROM demonstrations").fetchall():
        steps = db.execute("SELECT observation, reasoning FROM steps WHERE demonstration = ?", (number,)).fetchall()
        assert len(steps) == len(json.loads(body)["steps"]) and all(all(step) for step in steps)
    db.close()


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL here")
@pytest.mark.parametrize("where", ["inside a transaction", "anywhere"])
def test_a_killed_writer_leaves_a_readable_store(tmp_path, root, where):
    path = tmp_path / "demos.sqlite"
    killed = writer(root, path, "third" if where == "inside a transaction" else "after", 10**6)
    assert killed.stdout is not None and killed.stdout.readline() == "ready\n"
    if where == "anywhere":
        time.sleep(0.2)
        os.kill(killed.pid, signal.SIGKILL)
    told = len(killed.stdout.read().splitlines())
    killed.stdout.close()
    assert killed.wait() == -signal.SIGKILL and told
    with DemonstrationStore(path, WordEmbedder()) as store:
        # all that was acknowledged is there, in whole batches of four only, and it goes on
        assert len(store) >= 4 * told and len(store) % 4 == 0
        if where == "inside a transaction":
            assert len(store) == 4 * told
        check_whole(path)
        store.add([demonstration("after the crash")])
        assert goals(store.retrieve(Situation(goal="after the crash"), 1)) == ["after the crash"]
