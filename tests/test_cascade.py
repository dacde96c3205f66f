"""`accel.cascade`: whoever is named becomes a student or a teacher, and what cannot be composed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_models import byte_llama, save_byte_llama
from byte_tokenizer import byte_tokenizer
from cascade_fakes import Scripted, WordEmbedder, demonstration
from cascade_server import fails, says, serving
from refusals import refusal

import accel
from accel.artifacts import BaseModel
from accel.methods.cascade import embedding
from accel.methods.cascade.demos import Demos
from accel.methods.cascade.local import LocalAnswerer
from accel.methods.cascade.options import CascadeOptions
from accel.methods.cascade.prompt import Layout
from accel.methods.cascade.router import Cascade
from accel.methods.cascade.store import DemonstrationStore

ASKED = [{"role": "user", "content": "which way?"}]
KEPT = (demonstration("find the key", "north", "south"),)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the same whether a sentence model is installed or not
    monkeypatch.setattr(embedding, "packaged_folder", lambda: None)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))


def demos(folder: Path, **changes: object) -> Path:
    Demos(KEPT, BaseModel("big", None, None, None, 0), **changes).save(folder)  # type: ignore[arg-type]
    return folder


def test_two_endpoints_by_name_with_listed_prices() -> None:
    with serving(says("a", "b", "a")) as small, serving(says("c", model="big-served")) as big:
        cascade = accel.cascade(f"gpt-4.1-mini@{small.url}", teacher=f"gpt-4.1@{big.url}", samples=3)
        answer = cascade.answer(ASKED)
    assert (answer.text, answer.decision, answer.model) == ("c", "escalated", "big-served")
    # 60 fresh tokens, 40 cached and 7 written each, at the two models' own prices
    student, teacher = 60 * 0.4 + 40 * 0.1 + 7 * 1.6, 60 * 2.0 + 40 * 0.5 + 7 * 8.0
    assert answer.ledger.cost == pytest.approx((student + teacher) / 1e6)
    assert cascade.totals.escalated == 1


def test_prices_of_ones_own_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"mine": {"input": 1.0, "output": 10.0}}))
    monkeypatch.setenv("SOME_KEY", "secret")
    with serving(says("a")) as small:
        answer = accel.cascade(f"mine@{small.url}", samples=1, prices=str(prices), key_variable="SOME_KEY").answer(
            ASKED
        )
        assert small.headers[0]["Authorization"] == "Bearer secret"
    assert answer.ledger.cost == pytest.approx(170 / 1e6)


def test_a_model_here_is_shown_the_demonstrations(tmp_path: Path) -> None:
    folder = save_byte_llama(tmp_path / "model", max_position_embeddings=2048)
    cascade = accel.cascade(str(folder), [demos(tmp_path / "demos")], samples=2, max_tokens=4, method="plain")
    assert isinstance(cascade.student, LocalAnswerer) and cascade.store is not None and len(cascade.store) == 1
    answer = cascade.answer(ASKED)
    assert [found.demonstration.goal for found in answer.found] == ["find the key"]
    assert answer.ledger.attempts[0].samples == 2 and accel.stats(cascade.student.model).method == "plain"
    # the tiny model's two samples differ, and there is no teacher
    assert answer.decision in ("agreed", "fallback")


def test_a_loaded_model_keeps_its_own_draft() -> None:
    model = accel.attach(byte_llama(max_position_embeddings=256))
    cascade = accel.cascade(accel.Model(model, byte_tokenizer()), samples=2, max_tokens=4)
    assert cascade.student.sample(ASKED, 2, cascade.options.student_sampling(0), seconds=60).samples
    assert accel.stats(model).method == "speculative"


def test_layouts_of_the_demonstrations_are_followed(tmp_path: Path) -> None:
    student = Scripted("small", "go")
    words = Layout(observation="You see:", goal="Quest:")
    folder = save_byte_llama(tmp_path / "model", max_position_embeddings=2048)
    given = demos(tmp_path / "a", layout=words)
    cascade = accel.cascade(str(folder), [given], samples=1, max_tokens=2)
    assert cascade.layout == words
    other = demos(tmp_path / "b")
    said = refusal(lambda: accel.cascade(str(folder), [given, other], samples=1))
    assert "asked for in different words" in said
    # an embedder is needed, and a scripted student has no hidden states
    assert "nothing to embed texts with" in refusal(lambda: accel.cascade(student, [given]))


def test_a_question_is_worded_as_the_demonstrations_are(tmp_path: Path) -> None:
    student = Scripted("small", "left")
    cascade = accel.cascade(student, samples=1)
    cascade.ask("where?")
    assert student.questions[-1][0] == [{"role": "user", "content": "where?"}]
    with DemonstrationStore(tmp_path / "own.db", WordEmbedder()) as store:
        store.add(KEPT)
        layout = Layout(observation="Question:", action="Answer:", place="turns")
        options = CascadeOptions(samples=1, window=1)
        answer = Cascade(student, None, options, store=store, layout=layout, system="Act.").ask("see south?")
    assert answer.found[0].step == 1
    assert student.questions[-1][0] == [
        {"role": "system", "content": "Act."},
        {"role": "user", "content": "Task: find the key\nQuestion: see south\nAnswer:"},
        {"role": "assistant", "content": "because south\nAnswer: south"},
        {"role": "user", "content": "Question: see south?\nAnswer:"},
    ]


def test_what_the_teacher_says_is_learned_into_a_file(tmp_path: Path) -> None:
    folder = save_byte_llama(tmp_path / "model", max_position_embeddings=2048)
    file = tmp_path / "mine.db"
    with serving(says("west")) as big:
        settings = {"teacher": f"big@{big.url}", "learn": True, "store": str(file), "max_tokens": 2, "samples": 8}
        cascade = accel.cascade(str(folder), [demos(tmp_path / "demos")], temperature=2.0, **settings)
        answer = cascade.answer(ASKED)
        assert answer.decision == "escalated" and not answer.notes
    assert file.exists() and cascade.store is not None and len(cascade.store) == 2
    assert "learn=true without store" in refusal(lambda: accel.cascade(str(folder), learn=True))


def test_a_teacher_that_is_down_leaves_the_students_best() -> None:
    with serving(says("a", "a", "b")) as small, serving(fails(400)) as big:
        answer = accel.cascade(f"small@{small.url}", teacher=f"big@{big.url}").answer(ASKED)
    assert (answer.text, answer.decision) == ("a", "fallback")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: accel.cascade(7), "int: a student or teacher is a name"),
        (lambda: accel.cascade("x@http://h/v1", draft_length=3), "draft_length: for a student that is loaded here"),
        (lambda: accel.cascade("x@http://h/v1", threshold=2), "threshold=2"),
        (lambda: accel.cascade("x@http://h/v1", key_variable="NO_SUCH_KEY"), "NO_SUCH_KEY"),
        (lambda: accel.cascade("x@http://h/v1", prices="no-such-file.json"), "no-such-file.json"),
        (lambda: accel.cascade("x@http://"), "base_url"),
        (lambda: accel.cascade("x@http://h/v1", compress="no-such-folder"), "llmlingua"),
        (lambda: accel.cascade("x@http://h/v1", store="kept.db"), "nothing to embed texts with"),
    ],
)
def test_what_cannot_be_is_refused(call, says) -> None:
    assert says in refusal(call)


def test_a_cascade_attaches_to_no_model() -> None:
    model = byte_llama(max_position_embeddings=64)
    assert "use accel.cascade(student" in refusal(lambda: accel.attach(model, method="cascade"))


def test_demonstrations_attach_to_no_model(tmp_path: Path) -> None:
    model = byte_llama(max_position_embeddings=64)
    said = refusal(lambda: accel.attach(model, demos(tmp_path / "demos")))
    assert "demos" in said and "accel.cascade" in said
