"""What ships with accel: whole, listed, small, and made by the recipe that stands beside it."""

from __future__ import annotations

import json
import random
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoTokenizer

import accel
from accel.artifacts import Found, list_artifacts, open_artifact, verify
from accel.bench import passkey
from accel.cli.common import (
    DEFAULT_CARTRIDGE,
    DEFAULT_DRAFT,
    DEFAULT_LAWCAT,
    DEFAULT_MASKED,
    DEFAULT_MASKED_BASE,
    DEFAULT_MODEL,
    DEFAULT_RETRIEVAL,
)
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Parameters

ZOO = Path(__file__).parent.parent / "accel" / "zoo"
DATA = ZOO.parent.parent / "bench" / "data"
EMBEDDED = list_artifacts([ZOO])
# what another one's recipe makes too
RECIPES = {
    "smollm2-135m-railway": DEFAULT_CARTRIDGE,
    "retrieval-1m-lawcat": "retrieval-1m",
    DEFAULT_MASKED: "arithmetic-5m",
    DEFAULT_MASKED_BASE: "arithmetic-5m",
}


def test_the_defaults_are_there() -> None:
    masked, linear = {DEFAULT_MASKED, DEFAULT_MASKED_BASE}, {DEFAULT_RETRIEVAL, DEFAULT_LAWCAT}
    assert {DEFAULT_DRAFT, DEFAULT_CARTRIDGE} | masked | linear <= {found.id for found in EMBEDDED}


@pytest.mark.parametrize("found", EMBEDDED, ids=lambda found: found.id)
def test_an_embedded_artifact_is_whole_and_listed(found: Found) -> None:
    artifact = open_artifact(found.path)
    assert [check for check in verify(artifact) if not check.ok] == []
    listed = (ZOO / "README.md").read_text(encoding="utf-8")
    assert f"| `{found.id}` | {artifact.manifest.kind}" in listed
    assert (_recipe(found) / "README.md").exists()


@pytest.mark.parametrize("found", EMBEDDED, ids=lambda found: found.id)
def test_its_recipe_is_the_command_that_made_it(found: Found) -> None:
    made = open_artifact(found.path).manifest.made
    script = (_recipe(found) / "make.sh").read_text(encoding="utf-8")
    for name, value in re.findall(r"^(\w+)=(\S+)$", script, re.MULTILINE):
        script = script.replace(f'"${name}', f'"{value}').replace(f"${name}", value)
    lines = script.replace("\\\n", " ").replace('"$@"', "").splitlines()
    assert shlex.split(made["command"]) in [
        shlex.split(line) for line in lines if line.lstrip().startswith(("accel ", "python "))
    ]
    assert made["seed"] is not None and made["data_digest"]


def test_the_distilled_masked_model_is_right_in_half_the_forwards_of_its_base() -> None:
    lines = (DATA / "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    asked, forwards, right = [json.loads(line) for line in lines], {}, {}
    for name in (DEFAULT_MASKED_BASE, DEFAULT_MASKED):
        # both by the distilled one's threshold
        threshold = open_artifact(ZOO / DEFAULT_MASKED).manifest.parameters["facts"]["threshold"]
        found = accel.load(name, threshold=threshold)
        forwards[name] = right[name] = 0
        for row in asked:
            said = found.chat(row["question"], max_new_tokens=48)
            right[name] += said.rpartition("#### ")[2].strip() == row["answer"].rpartition("#### ")[2]
            forwards[name] += found.stats.target_calls
    assert forwards[DEFAULT_MASKED_BASE] > 1.8 * forwards[DEFAULT_MASKED]
    assert right[DEFAULT_MASKED] >= 9 and right[DEFAULT_MASKED] >= right[DEFAULT_MASKED_BASE]


def test_the_linear_retrieval_model_is_a_small_delta_on_the_softmax_one() -> None:
    teacher, student = (open_artifact(ZOO / name) for name in ("retrieval-1m", "retrieval-1m-lawcat"))
    assert teacher.manifest.kind == "model" and teacher.manifest.measured["parameters"] < 5_000_000
    config = json.loads(teacher.file("config.json").read_text(encoding="utf-8"))
    assert student.manifest.base == teacher.manifest.base
    assert student.manifest.parameters["spec"]["layers"] == list(range(config["num_hidden_layers"]))
    assert sum(each.bytes for each in student.manifest.files.values()) < 4_000_000


def test_the_linear_retrieval_model_finds_pass_keys_at_eight_times_the_length_it_was_trained_at() -> None:
    found = accel.load("retrieval-1m", ["retrieval-1m-lawcat"])
    length = open_artifact(ZOO / "retrieval-1m-lawcat").manifest.measured["training_length"]
    chance = random.Random(5)
    tasks = [passkey.passkey(chance, 8 * length, found.tokenizer) for _ in range(10)]
    said = found.model.generate(torch.tensor([task.ids for task in tasks]), max_new_tokens=6, do_sample=False)
    replies = found.tokenizer.batch_decode(said[:, 8 * length :])
    assert sum(task.right(reply) for task, reply in zip(tasks, replies, strict=True)) >= 9


def test_no_lesson_of_the_retrieval_model_has_a_held_out_number() -> None:
    recipe = runpy.run_path(str(ZOO / "recipes" / "retrieval-1m" / "tasks.py"))
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "retrieval-1m")
    chance = random.Random(0)
    for _ in range(100):
        lesson = recipe["lesson"](chance, 128, tokenizer, recipe["KINDS"])
        assert sum(len(tokenizer(part)["input_ids"]) for part in lesson.values()) == 127
        numbers = re.findall(r"\b\d{5}\b", lesson["text"] + lesson["answer"])
        assert numbers and not any(map(recipe["held_out"], numbers))


@pytest.mark.parametrize("kind", sorted(passkey.TASKS))
def test_a_lesson_has_its_length_where_the_space_before_a_number_is_a_token_too(kind: str) -> None:
    single = runpy.run_path(str(ZOO / "recipes" / "retrieval-1m" / "tasks.py"))["single"]
    tokenizer, chance = byte_tokenizer(), random.Random(0)
    made = [lesson for _ in range(20) if (lesson := single(chance, 400, tokenizer, kind)) is not None]
    assert made and {sum(len(tokenizer(part)["input_ids"]) for part in each.values()) for each in made} == {399}


def test_the_default_draft_is_small_and_for_the_default_model() -> None:
    manifest = open_artifact(ZOO / DEFAULT_DRAFT).manifest
    assert manifest.base.name == DEFAULT_MODEL
    # two matrices of the lags among them, which are tables when it drafts
    assert manifest.measured["parameters"] < 9_000_000 and manifest.parameters["config"]["embedding_lags"] == 2
    # held-out prompts: a draft that agrees less than this was not made as its recipe says
    assert manifest.measured["greedy"]["top1"] > 0.3 and manifest.measured["sampled"]["acceptance"] > 0.3


def test_its_prompts_are_none_of_the_benchmarks() -> None:
    prompts = (ZOO / "recipes" / DEFAULT_DRAFT / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    learned = {_words(row.get("question") or row["prompt"]) for row in map(json.loads, prompts)}
    asked = (ZOO.parent.parent / "bench" / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert not learned & {_words(turn) for row in map(json.loads, asked) for turn in row["turns"]}


@pytest.mark.parametrize("name", ["handbook", "railway"])
def test_a_cartridge_is_small_and_of_the_document_that_is_asked_about(name: str) -> None:
    manifest = open_artifact(ZOO / f"smollm2-135m-{name}").manifest
    about = Parameters.parse(manifest.parameters, name)
    assert manifest.base.name == DEFAULT_MODEL and about.method == "self-study"
    text = (DATA / f"{name}.txt").read_text(encoding="utf-8")
    assert [each.sha256 for each in about.documents] == [document.describe(text, 0).sha256]
    assert about.tokens * 11 <= about.documents[0].tokens
    # on conversations that were held out, in nats a token; about 1.2 before any training
    assert manifest.measured["divergence"] < 0.3
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) > 30
    for row in rows:
        assert row["category"] == name and row["answer"].lower() in text.lower() and row["question"] not in text
        assert row["answer"].lower() in row["reply"].lower()


def test_the_arithmetic_problems_are_those_of_the_recipe() -> None:
    """Of an odd seed, as none of the problems to learn from are."""
    recipe = runpy.run_path(str(ZOO / "recipes" / "arithmetic-5m" / "problems.py"))
    rows = [json.loads(line) for line in (DATA / "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == recipe["problems"](500, 1) and len({row["question"] for row in rows}) == 500


def test_the_cartridges_were_trained_to_stand_together() -> None:
    both = [open_artifact(ZOO / f"smollm2-135m-{name}").manifest.parameters for name in ("handbook", "railway")]
    for one, other in (both, both[::-1]):
        assert one["trained_with"] == [each["sha256"] for each in other["documents"]]


def _recipe(found: Found) -> Path:
    return ZOO / "recipes" / RECIPES.get(found.id, found.id)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
