"""The suite `dparallel` on tiny random models: figures that generate() gives one question at a time, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner, Result
from diffusion_models import LLADA, LLADA_FACTS, llada_tensors, write_checkpoint
from transformers import BertConfig, BertForMaskedLM

import accel
from accel.artifacts import describe_base
from accel.bench import dparallel as suite
from accel.cli.common import DEFAULT_MASKED, DEFAULT_MASKED_BASE
from accel.cli.main import main
from accel.methods.dparallel import artifact
from accel.models.diffusion import CONFIG_KEY, DiffusionFacts, facts_of, set_facts
from accel.models.loading import load_model

NEW, CANVAS = 10, 12
ASKED = ["12=", "How many?", "a b c", "x", "seven of nine", "3+4"]
FAST_ARMS = ["dparallel", "dparallel, prefix cache", "dparallel, dual cache"]
# fp64: no sum's order decides about a token
FEW = ("--max-new-tokens", NEW, "--rows", 2, "--timed", 5, "--repeat", 2, "--dtype", "float64")
SVG = "{http://www.w3.org/2000/svg}"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments), "--suite", "dparallel"])


def masked(certainty: float, **facts: object):
    """A tiny masked-diffusion model; the larger its logits, the more it is certain of, and its answers end."""
    model = byte_llama(max_position_embeddings=512)
    with torch.no_grad():
        # the end token stands where a token that this model likes would
        model.lm_head.weight[0] = 1.3 * model.lm_head.weight[byte_tokenizer()("\x07")["input_ids"][0]]
        model.lm_head.weight *= certainty
    chosen = {"mask_token": 256, "stop_tokens": (0,), "block_length": 4, "threshold": 1.0} | facts
    set_facts(model, DiffusionFacts(**chosen))
    return model


def save(folder: Path, model, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def asked(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def alone(folder: Path, **options: object) -> list[tuple[str, int, int]]:
    """Each question by itself through generate(): text, tokens, forwards."""
    loaded = accel.load(str(folder), dtype="float64", **options)
    found = []
    for question in ASKED:
        text = loaded.generate(question, max_new_tokens=NEW)
        found.append((text, loaded.stats.generated_tokens, loaded.stats.target_calls))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Two models, one more certain than the other, and questions of which the careful one gets every second right."""
    where = tmp_path_factory.mktemp("masked")
    folders = {name: save(where / name, masked(certainty)) for name, certainty in (("fast", 4.0), ("base", 2.0))}
    said = [text for text, _, _ in alone(folders["fast"], rule="entropy", threshold=-1.0)]
    rows = [{"question": q, "answer": said[i] if i % 2 else "never"} for i, q in enumerate(ASKED)]
    return folders | {"questions": asked(where / "questions.jsonl", rows)}


@pytest.fixture(scope="module")
def found(made, tmp_path_factory) -> tuple[dict, str, Path]:
    """The document and the report of one run with everything in it."""
    output = tmp_path_factory.mktemp("out") / "found.json"
    result = run(made["fast"], "-a", made["base"], "--prompts", made["questions"], *FEW, "--output", output)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text()), result.stdout, output


@pytest.fixture(scope="module")
def expected(made) -> dict[str, list[tuple[str, int, int]]]:
    """Of each arm what its model says to each question alone."""
    one, own = {"rule": "entropy", "threshold": -1.0}, {"rule": "entropy", "threshold": 1.0}
    fast, base = made["fast"], made["base"]
    found = {"one token, whole canvas": alone(fast, **one, early_stop=False), "one token": alone(fast, **one)}
    found |= {"base": alone(base, **own), "base, one token": alone(base, **one), "dparallel": alone(fast, **own)}
    return found | {f"dparallel, {cache} cache": alone(fast, **own, cache=cache) for cache in ("prefix", "dual")}


def test_counts_are_those_of_each_question_alone(found, expected, made) -> None:
    arms = found[0]["arms"]
    assert list(arms) == list(expected)
    known = [json.loads(line)["answer"] for line in made["questions"].read_text().splitlines()]
    for name, arm in arms.items():
        texts, tokens, forwards = zip(*expected[name], strict=True)
        assert arm["right"] == [text == answer for text, answer in zip(texts, known, strict=True)], name
        assert arm["accuracy"] == pytest.approx(100 * fmean(arm["right"]), abs=1e-3)
        assert arm["forwards"] == pytest.approx(fmean(forwards), abs=1e-3), name
        assert arm["tokens"] == pytest.approx(fmean(tokens), abs=1e-3)
        assert arm["tokens_per_forward"] == pytest.approx(arm["tokens"] / arm["forwards"], abs=1e-3)
        assert arm["forwards_ratio"] == pytest.approx(arms["one token"]["forwards"] / arm["forwards"])
    canvas, careful = arms["one token, whole canvas"], arms["one token"]
    assert canvas["forwards"] == CANVAS > careful["forwards"] >= careful["tokens"] < NEW
    assert canvas["right"] == careful["right"] == [False, True] * 3
    assert arms["base"]["forwards"] > arms["dparallel"]["forwards"]


def test_ratios_are_of_seconds_side_by_side(found, expected) -> None:
    document = found[0]
    settings, arms = document["settings"], document["arms"]
    # five are asked for by the clock, and batches are whole
    assert (settings["rows"], settings["timed"], settings["repeat"]) == (2, 4, 2)
    for name, arm in arms.items():
        # of the first four questions, twice
        useful = 2 * sum(tokens for _, tokens, _ in expected[name][:4])
        for at in ("at_1", "at_2"):
            ratios = [a / b for a, b in zip(arms["one token"][at]["seconds"], arm[at]["seconds"], strict=True)]
            # the median of two is their mean
            assert arm[at]["speedup"] == pytest.approx([fmean(ratios), min(ratios), max(ratios)], rel=1e-3)
            assert arm[at]["tokens_per_second"] == pytest.approx(useful / sum(arm[at]["seconds"]), rel=1e-3)
    assert arms["one token"]["at_1"]["speedup"] == [1, 1, 1]


def test_verdicts_hold_the_same_figures_against_each_other(found) -> None:
    document, text, _ = found
    arms, verdicts = document["arms"], document["verdicts"]
    assert list(verdicts) == ["one token", "base", "base, one token"]
    for name, verdict in verdicts.items():
        assert verdict["forwards_ratio"] == pytest.approx(arms[name]["forwards"] / arms["dparallel"]["forwards"])
        gained = arms["dparallel"]["accuracy"] - arms[name]["accuracy"]
        assert verdict["accuracy"]["mean"] == pytest.approx(gained, abs=1e-2)
        assert verdict["accuracy"]["low"] <= gained <= verdict["accuracy"]["high"]
        assert f"dparallel against '{name}': forwards ÷ {verdict['forwards_ratio']:.2f}, time ÷ " in text
    assert verdicts["one token"]["accuracy"]["mean"] < 0
    assert verdicts["one token"]["at_2"] == pytest.approx(arms["dparallel"]["at_2"]["speedup"], abs=1e-5)
    assert "entropy ≤ 1 nats, blocks of 4 · base: " in text and "dparallel, dual cache " in text


def test_the_sweep_begins_where_the_table_stands_and_is_drawn(found) -> None:
    document, text, output = found
    arms, sweeps = document["arms"], document["sweeps"]
    for name, one in (("dparallel", "one token"), ("base", "base, one token")):
        assert [point["threshold"] for point in sweeps[name]][:2] == [-1, 0.05]
        assert {key: arms[one][key] for key in sweeps[name][0]} == sweeps[name][0]
        # a threshold of the sweep is the arm of that threshold
        assert {key: arms[name][key] for key in sweeps[name][-1]} == sweeps[name][-1]
        assert f"{document['aup'][name]:.1f}" in text
    root = ElementTree.fromstring(output.with_suffix(".svg").read_text())
    lines = list(root.iter(f"{SVG}polyline"))
    assert [len(line.get("points").split()) for line in lines] == [10, 10]


def test_the_model_and_its_base_that_ship_are_the_default(made, tmp_path, monkeypatch) -> None:
    """By id, with the length that the artifact was trained with, on the embedded problems."""
    for name, folder in ((DEFAULT_MASKED, "fast"), (DEFAULT_MASKED_BASE, "base")):
        model, tokenizer = load_model(made[folder])
        base = describe_base(model.config, tokenizer, name="causal")
        about = {"parameters": {"max_new_tokens": 8}, "made": {}, "measured": {}}
        facts = facts_of(model)
        work = tmp_path / "work"
        root = tmp_path / "artifacts"
        artifact.write(root / name, model, tokenizer, facts, work=work, base=base, dtype="float32", **about)
    monkeypatch.setenv("ACCEL_ARTIFACTS", str(root))
    few = ("--limit", 2, "--timed", 1, "--repeat", 1, "--no-sweep", "--json")
    result = run(*few)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    settings = document["settings"]
    assert (settings["model"], settings["base"]) == (DEFAULT_MASKED, DEFAULT_MASKED_BASE)
    assert (settings["max_new_tokens"], settings["questions"], settings["rows"]) == (8, 2, 1)
    assert "base" in document["arms"] and document["sweeps"] == {}
    # a model of one's own has no base unless one is named
    result = run(root / DEFAULT_MASKED, *few)
    assert result.exit_code == 0 and json.loads(result.stdout)["settings"]["base"] is None


def test_a_published_checkpoint_needs_no_base(tmp_path) -> None:
    folder = write_checkpoint(tmp_path / "llada", LLADA | {CONFIG_KEY: LLADA_FACTS}, llada_tensors())
    byte_tokenizer().save_pretrained(folder)
    file = asked(tmp_path / "q.jsonl", [{"question": "12+30=", "answer": "42"}, {"question": "1+2=", "answer": "3"}])
    output = tmp_path / "out.json"
    result = run(folder, "--prompts", file, "--max-new-tokens", 8, "--timed", 2, "--repeat", 1, "--output", output)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    assert list(document["arms"]) == ["one token, whole canvas", "one token", *FAST_ARMS]
    assert list(document["verdicts"]) == ["one token"] and list(document["sweeps"]) == ["dparallel"]
    assert "base: none" in result.stdout


def test_a_model_without_a_cache_says_so(tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    facts = {"mask_token": 256, "stop_tokens": [0], "block_length": 4}
    config = BertConfig(vocab_size=257, max_position_embeddings=64, **sizes, **{CONFIG_KEY: facts})
    folder = save(tmp_path / "bert", BertForMaskedLM(config))
    file = asked(tmp_path / "q.jsonl", [{"question": "1+2=", "answer": "3"}])
    result = run(folder, "--prompts", file, "--max-new-tokens", 4, "--repeat", 1, "--no-sweep")
    assert result.exit_code == 0, result.output
    assert "keeps no keys and values: no arms with a cache" in result.stdout and "dual cache" not in result.stdout


def test_a_base_is_judged_by_the_distilled_models_rule(made, tmp_path) -> None:
    facts = {"rule": "confidence", "threshold": 0.9, "strict": True}
    opened = suite.open_model(made["fast"])
    base = suite._base(suite.Plan("fast", str(save(tmp_path / "other", masked(2.0, **facts)))), opened)
    assert (base.facts.rule, base.facts.threshold, base.facts.strict) == ("entropy", 1.0, False)
    ways = {way.name: way for way in suite.ways_of(opened, base)}
    assert ways["base"].options == ways["dparallel"].options and ways["base"].opened is base


@pytest.fixture(scope="module")
def unfit(made, tmp_path_factory) -> dict[str, Path]:
    """What has no place in this suite."""
    where = tmp_path_factory.mktemp("unfit")
    other = byte_tokenizer()
    other.add_tokens(["and"])
    return {
        "causal": save(where / "causal", byte_llama(max_position_embeddings=512)),
        "blocks": save(where / "blocks", masked(2.0, block_length=8)),
        "words": save(where / "words", masked(2.0), other),
        "counts": save(where / "counts", masked(2.0, rule="top_k")),
        "bare": asked(where / "bare.jsonl", [{"question": "Who?"}, {"question": "1+1=", "answer": "2"}]),
        "missing": where / "missing",
    }


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("causal", [], "causal is no masked-diffusion model"),
        ("fast", ["-a", "{causal}"], "causal is no masked-diffusion model"),
        ("fast", ["-a", "{blocks}"], "blocks fills blocks of 8 tokens, "),
        ("fast", ["-a", "{words}"], "words has another tokenizer than "),
        ("counts", [], "the model's rule 'top_k' has no threshold"),
        ("fast", ["-a", "smollm2-135m-draft"], "is an artifact of kind draft"),
        ("missing", [], "there is no such folder"),
        ("fast", ["--prompts", "{bare}"], "every question needs an answer to be held against"),
        ("fast", ["--max-new-tokens", "600"], "positions, the model has 512"),
        ("fast", ["--limit", "0"], "limit=0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(made, unfit, model, arguments, says) -> None:
    places = {name: str(path) for name, path in (made | unfit).items()}
    given = [each.format(**places) for each in arguments]
    prompts = [] if "--prompts" in given else ["--prompts", made["questions"]]
    result = run(places[model], *prompts, *given)
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert says in result.stderr and result.stderr.count("\n") == 1
