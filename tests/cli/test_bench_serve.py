"""``accel bench serve``: options reach the plan, and ``accel bench MODEL`` still works. Load has tests of its own."""

from __future__ import annotations

import json
import sys

import click
import pytest
from click.testing import CliRunner
from scripted_server import END, EVENT_STREAM, ScriptedServer, answer, delta

from accel.bench.serving import session
from accel.cli import bench_serve
from accel.cli.bench import bench
from accel.cli.main import main


def invoke(*words, **environment):
    return CliRunner().invoke(main, ["bench", "serve", *words], env={k: str(v) for k, v in environment.items()})


@pytest.fixture
def plans(monkeypatch):
    """The plans that were to be carried out."""
    found = []

    def carry_out(plan, told):
        found.append(plan)
        return {"completed": 1}

    monkeypatch.setattr(session, "carry_out", carry_out)
    return found


def plan_of(plans, *words, **environment):
    result = invoke("--json", *words, **environment)
    assert result.exit_code == 0, result.output
    return plans[-1]


def test_a_run_from_options_to_figures(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    with ScriptedServer(lambda body: answer(0.0, 0.0, 4)) as server:
        words = ["--url", f"{server.url}/v1/", "--num-prompts", "2", "--api-key", "sesame", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["accel", "bench", "serve", *words])
        shown = invoke(*words)
        assert server.keys[-1] == "Bearer sesame"
        document = json.loads(output.read_text())
        printed = json.loads(invoke(*words, "--json", "--append-result").stdout)
    assert shown.exit_code == 0 and "2 answered, 0 failed" in shown.stdout
    assert document["total_output_tokens"] == 8 and document["label"] == server.url.removeprefix("http://")
    assert "--api-key '***'" in document["command"] and "sesame" not in output.read_text()
    assert printed["completed"] == 2 and len(output.read_text().splitlines()) == 2


def test_no_answer_at_all_is_a_failure():
    def broken(body):
        return answer(0.0, 0.0, 2) if "hello" in json.dumps(body) else [EVENT_STREAM, delta("a"), END]

    with ScriptedServer(broken) as server:
        result = invoke("--url", server.url, "--num-prompts", "2")
    assert result.exit_code == 1 and "failed 2x: the stream ended after 1 chunks" in result.stdout


def test_options_reach_the_plan(plans):
    plan = plan_of(
        plans,
        *("--url", "ours=http://a:1", "--url", "http://b:2/v1", "--model", "shared", "--model", "ours=org/m=1"),
        *("--request-rate", "2.5", "--burstiness", "inf", "--max-concurrency", "16", "--max-tokens", "9"),
        *("--goodput", "ttft:5", "--goodput", "e2el:7", "--metadata", "k = v=w", "--extra-body", '{"top_k": 1}'),
        *("--endpoint", "completions", "--ignore-eos", "--temperature", "0", "--repeat", "3", "--timeout", "4"),
    )
    assert [tuple(vars(each).values()) for each in plan.targets] == [
        ("ours", "http://a:1", "org/m=1"),
        ("b:2", "http://b:2/v1", "shared"),
    ]
    assert (plan.request_rate, plan.burstiness, plan.max_concurrency, plan.repeat) == (2.5, float("inf"), 16, 3)
    assert (plan.goodput, plan.metadata) == ({"ttft": 5.0, "e2el": 7.0}, {"k": "v=w"})
    assert (plan.ask.endpoint, plan.ask.max_tokens, plan.ask.temperature, plan.ask.seconds) == ("completions", 9, 0, 4)
    assert plan.ask.ignore_eos and plan.ask.extra == {"top_k": 1}


def test_options_come_from_variables_too(plans):
    plan = plan_of(
        plans, ACCEL_BENCH_SERVE_URL="http://a:1", ACCEL_BENCH_SERVE_API_KEY="k", ACCEL_BENCH_SERVE_NUM_PROMPTS=7
    )
    assert (plan.targets[0].url, plan.key, plan.num_prompts) == ("http://a:1", "k", 7)
    # an address may hold an equals sign, and a model's id too
    plan = plan_of(plans, "--url", "http://a/x?y=z", "--model", "m=1")
    assert (plan.targets[0].url, plan.targets[0].model) == ("http://a/x?y=z", "m=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--extra-body", "{"], "--extra-body '{': no JSON"),
        (["--extra-body", "[1]"], "must be a JSON object"),
        (["--metadata", "x"], "--metadata x: write KEY=VALUE"),
        (["--goodput", "speed:1"], "--goodput speed:1: write NAME:MILLISECONDS"),
        (["--model", "a", "--model", "b"], "--model b: given twice"),
        (["--prompts", "nowhere.jsonl"], "cannot read prompts from nowhere.jsonl"),
        (["--url", "http://127.0.0.1:9"], "two servers of one name"),
        (["--append-result"], "--append-result needs --output"),
    ],
)
def test_mistakes_are_one_line(words, message):
    result = invoke("--url", "http://127.0.0.1:9", *words)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_bench_itself_is_still_a_command(monkeypatch):
    seen = []
    monkeypatch.setattr("accel.cli.bench._bench_steps", lambda *given: seen.append(given[:2]))
    for words in (["m", "--suite", "steps", "--threads", "2"], ["--suite", "steps", "--threads", "2", "m"]):
        assert CliRunner().invoke(main, ["bench", *words]).exit_code == 0
    # a folder of that name can be meant
    assert CliRunner().invoke(bench, ["--suite", "steps", "--threads", "2", "serve"]).exit_code == 0
    assert seen == [("m", 2), ("m", 2), ("serve", 2)]
    for words in (["a", "b"], ["serve", "--suite", "steps"], ["serve"]):
        result = CliRunner().invoke(main, ["bench", *words])
        assert result.exit_code == 2, words
    assert "Got unexpected extra argument (b)" in CliRunner().invoke(main, ["bench", "a", "b"]).stderr


def test_help_names_both():
    shown = CliRunner().invoke(main, ["bench", "--help"], prog_name="accel").stdout
    assert "Usage: accel bench [OPTIONS] [MODEL]\n" in shown and "serve  Put load on servers" in shown
    assert (
        "Usage: accel bench serve [OPTIONS]\n"
        in CliRunner().invoke(main, ["bench", "serve", "-h"], prog_name="accel").stdout
    )
    assert isinstance(bench, click.Group) and bench.commands["serve"] is bench_serve.serve
