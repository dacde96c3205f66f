"""The suite `lenience`: answers and their marks, log-probabilities, and a whole run on a tiny model."""

from __future__ import annotations

import copy
import json
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch

import accel
from accel.bench import lenience, lenience_report, plot, saving
from accel.bench.runner import Settings
from accel.bench.workloads import Prompt
from accel.distill.forward import Scorer
from accel.errors import OptionError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 16 - 3 = 13 eggs", "13"),
        ("it costs $1,234.50.", "1234.50"),
        ("-7 degrees", "-7"),
        ("1,000,000 in all, or .5", ".5"),
        ("#### 42\n", "42"),
        ("no number", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert lenience.last_number(text) == (None if number is None else Decimal(number))


def test_reference_answers_stand_behind_the_mark():
    asked = lambda answer: lenience.reference_answer(Prompt("1", "gsm8k", ("?",), answer))  # noqa: E731
    assert asked("2 + 1,198 = 1,200\n#### 1,200") == 1200
    assert asked("1200") is None and asked(None) is None


@torch.no_grad()
def test_log_likelihood_is_the_mean_over_the_outputs_tokens(model):
    prompt, tokens = [5, 6, 7], [9, 8, 200, 3]
    logp = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    by_hand = [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]
    assert lenience.log_likelihood(Scorer(model), prompt, tokens) == pytest.approx(sum(by_hand) / 4, abs=1e-5)


@pytest.fixture
def plan(model, tokenizer, monkeypatch, tmp_path):
    """Drafts come from a folder with a noised copy of the model."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    draft.save_pretrained(tmp_path / "draft")
    monkeypatch.setattr(accel, "load", lambda name, **options: SimpleNamespace(model=model, tokenizer=tokenizer))
    file = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {i}?", "answer": f"It is.\n#### {i}"} for i in range(4)]
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def build(**fields):
        given = {
            "model": "tiny",
            "artifacts": (str(tmp_path / "draft"),),
            "suite": "lenience",
            "prompt_file": file,
            "settings": Settings(24, temperature=1.0),
            "device": "cpu",
            "epsilons": (0.5, 0.05),
        }
        return lenience.LeniencePlan(**{**given, **fields})

    return build


def test_lenience_gains_tokens_and_loses_likelihood(plan):
    document = lenience.carry_out(plan())
    arms = document["arms"]
    assert list(arms) == [
        *("accel-plain", "lossless", "lin 0.5", "lin 0.05", "sq 0.5", "sq 0.05", "exp 0.5", "exp 0.05")
    ]
    assert [arms[name]["gate"] for name in ("accel-plain", "lossless", "lin 0.5")] == ["sampled", "sampled", "lossy"]
    assert (arms["lin 0.05"]["rule"], arms["lin 0.05"]["epsilon"]) == ("lin", 0.05)
    # a draft this bad is kept more often the more lenient the rule, and the target thinks less of the output
    taus = [arms[name]["mean_accepted_length"] for name in ("lossless", "exp 0.5", "exp 0.05")]
    assert taus == sorted(taus) and taus[0] < taus[-1]
    assert arms["exp 0.05"]["mean_logprob"] < arms["lossless"]["mean_logprob"] - 0.5
    # what is lossless stands where plain decoding does
    spread = 4 * (arms["lossless"]["logprob_standard_error"] + arms["accel-plain"]["logprob_standard_error"])
    assert abs(arms["lossless"]["mean_logprob"] - arms["accel-plain"]["mean_logprob"]) < spread
    assert {arm["graded"] for arm in arms.values()} == {4}
    assert all(arm["accuracy_low"] <= arm["accuracy"] <= arm["accuracy_high"] for arm in arms.values())
    json.dumps(document, allow_nan=False)
    text = lenience_report.terminal(document)
    assert "draft draft, γ = 3" in text and "exp 0.05" in text
    assert lenience_report.page(document).count("<svg") == 2
    assert plot.page(lenience_report.charts(document)).count("<g transform") == 2


def test_right_answers_are_counted_against_each_prompts_own(plan, tokenizer, monkeypatch):
    """Every output says 2, which is right for one prompt of four."""
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, tokens, **kwargs: "1 and 1 is 2.")
    document = lenience.carry_out(plan(settings=Settings(3)))
    # greedy: the gate compares what is not lenient
    assert document["arms"]["lossless"]["gate"] == "yes"
    assert {arm["accuracy"] for arm in document["arms"].values()} == {0.25}


def test_without_reference_answers_there_is_no_accuracy(plan, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text('{"question": "Why?"}\n')
    document = lenience.carry_out(plan(prompt_file=file, epsilons=(0.5,), settings=Settings(4, temperature=1.0)))
    assert all(arm["accuracy"] is None and arm["mean_logprob"] < 0 for arm in document["arms"].values())
    assert "accuracy cannot be told" in lenience_report.terminal(document)
    assert len(lenience_report.charts(document)) == 1


def test_a_killed_run_resumes(plan, tmp_path):
    output = tmp_path / "out.json"

    def killed(done, total, prompt, arm):
        if prompt.id == "3":
            raise KeyboardInterrupt

    fields = {"output": output, "epsilons": (0.5,), "settings": Settings(4, temperature=1.0)}
    with pytest.raises(KeyboardInterrupt):
        lenience.carry_out(plan(**fields), killed)
    partial = saving.load(output)
    assert partial["arms"]["lossless"]["completed"] == 2 and partial["arms"]["lossless"]["mean_logprob"] is None
    assert "UNFINISHED" in lenience_report.terminal(partial)
    document = lenience.carry_out(plan(**fields, resume=True))
    assert document["complete"] and document["arms"]["lossless"]["completed"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"artifacts": ()}, "takes one draft model"),
        ({"artifacts": ("a", "b")}, "2 artifacts given"),
        ({"epsilons": (0.0,)}, "ε=0.0"),
        ({"epsilons": (0.5, 0.5)}, "each once"),
        ({"epsilons": ()}, "one or more"),
        ({"draft_length": 0}, "draft_length=0"),
    ],
)
def test_plans_that_cannot_work_are_refused(plan, fields, message):
    with pytest.raises(OptionError, match=message):
        plan(**fields)
