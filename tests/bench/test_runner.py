"""The paired experiment on a tiny model: order, warm-up, clocks, the gate's place, and arms that break."""

from __future__ import annotations

import contextlib
import copy
import time

import pytest
import torch

from accel.bench import arms as bench_arms
from accel.bench import gate
from accel.bench.arms import Arm, all_arms, check, choose, find_draft, reference_of
from accel.bench.measure import StampStreamer, left_padded, rotated
from accel.bench.runner import WARMUP_TOKENS, Runner, Settings
from accel.bench.workloads import Prompt
from accel.engine.attached import STATE
from accel.errors import OptionError
from accel.types import Stats

PROMPTS = [Prompt("1", "qa", ("first",)), Prompt("2", "rag", ("second",)), Prompt("3", "writing", ("one", "two"))]


def measure(model, tokenizer, arms, prompts=PROMPTS, skip=(), **settings):
    runner = Runner(model, tokenizer, arms, Settings(**{"max_new_tokens": 5, **settings}))
    return [record for of_prompt in runner.measure(prompts, skip) for record in of_prompt], runner


def wrapped(name, change=lambda output, kwargs: output, entered=None, **fields):
    """An arm whose generate() passes its result through ``change``; entering and leaving are noted."""

    @contextlib.contextmanager
    def prepare(model):
        original = model.generate
        model.generate = lambda **kwargs: change(original(**kwargs), kwargs)
        if entered is not None:
            entered.append("+" + name)
        try:
            yield model
        finally:
            del model.generate
            if entered is not None:
                entered.append("-" + name)

    return Arm(name, prepare, **fields)


def test_every_arm_runs_on_every_prompt_in_a_rotating_order(model, tokenizer):
    entered = []
    arms = [wrapped(name, entered=entered) for name in ("transformers", "b", "c")]
    records, _ = measure(model, tokenizer, arms, repeat=2)
    order = "".join(record.arm[0] for record in records)
    assert [order[i : i + 3] for i in range(0, len(order), 3)] == ["tbc", "bct", "bct", "ctb", "ctb", "tbc"]
    assert [record.repetition for record in records[:6]] == [0, 0, 0, 1, 1, 1]
    # prepared for each run alone, and undone before the next
    assert entered == [sign + record.arm for record in records for sign in "+-"]
    assert {record.verdict for record in records} == {gate.IDENTICAL}


def test_records_hold_tokens_times_and_memory(model, tokenizer):
    records, _ = measure(model, tokenizer, [Arm("transformers")], PROMPTS[:1])
    (record,) = records
    plain = model.generate(
        input_ids=tokenizer("first", return_tensors="pt").input_ids, max_new_tokens=5, pad_token_id=0
    )
    assert record.tokens == plain[0, 5:].tolist()
    assert (record.prompt_tokens, record.group) == (5, "qa")
    # one chunk a token, the prompt's own put() left out
    assert len(record.times) == record.output_tokens
    assert 0 < record.ttft == record.times[0] < record.times[-1] <= record.seconds
    assert record.peak_bytes > 1e6
    assert record.stats is None


def test_time_to_first_token_is_the_streamers(model, tokenizer):
    @contextlib.contextmanager
    def prepare(target):
        original = target.generate

        def generate(**kwargs):
            time.sleep(0.05)
            output = original(**kwargs)
            time.sleep(0.02)
            return output

        target.generate = generate
        try:
            yield target
        finally:
            del target.generate

    records, _ = measure(model, tokenizer, [Arm("transformers"), Arm("slow", prepare)], PROMPTS[:1])
    fast, slow = records
    assert slow.ttft > 0.05 > fast.ttft
    assert slow.seconds - slow.times[-1] > 0.02


def test_streamer_skips_the_prompt_and_counts_chunks():
    streamer = StampStreamer()
    streamer.put(torch.tensor([[1, 2, 3]]))
    assert streamer.times == []
    streamer.put(torch.tensor([4]))
    streamer.put(torch.tensor([5, 6]))
    streamer.end()
    assert len(streamer.times) == 2


def test_warm_up_is_short_not_counted_and_never_the_measured_prompt(model, tokenizer):
    asked = []
    arm = wrapped("b", lambda output, kwargs: asked.append(kwargs) or output)
    measure(model, tokenizer, [Arm("transformers"), arm], PROMPTS[:1])
    warm_up, measured = asked
    assert warm_up["max_new_tokens"] == WARMUP_TOKENS
    assert "streamer" not in warm_up
    assert measured["max_new_tokens"] == 5
    assert not torch.equal(warm_up["input_ids"], measured["input_ids"])


def test_a_wrong_arm_is_caught_and_a_lossy_one_is_not_blamed(model, tokenizer):
    def spoil(output, kwargs):
        return torch.cat([output[:, :-1], (output[:, -1:] + 1) % 100], dim=1)

    lossy = wrapped("lossy", spoil, stats=lambda model: Stats(lossless=False))
    records, _ = measure(model, tokenizer, [Arm("transformers"), wrapped("wrong", spoil), lossy], PROMPTS[:1])
    verdicts = {record.arm: record for record in records}
    assert verdicts["wrong"].verdict == gate.FAILED
    assert "token 4 is" in verdicts["wrong"].reason
    assert verdicts["lossy"].verdict == gate.LOSSY


def test_the_gate_asks_the_plain_model(model, tokenizer):
    """The check runs when no arm is prepared: a wrong arm must not be its own judge."""
    seen = []

    @contextlib.contextmanager
    def prepare(target):
        target.prepared = True
        yield target
        target.prepared = False

    hook = model.register_forward_pre_hook(lambda module, args: seen.append(getattr(module, "prepared", False)))
    try:
        arm = Arm("b", prepare, kwargs={"suppress_tokens": list(range(1, 200))})
        records, _ = measure(model, tokenizer, [Arm("transformers"), arm], PROMPTS[:1])
    finally:
        hook.remove()
        del model.prepared
    assert [record.verdict for record in records] == [gate.IDENTICAL, gate.FAILED]
    assert seen[-1] is False


def test_an_arm_that_raises_is_reported_once_and_costs_the_others_nothing(model, tokenizer):
    def broken(output, kwargs):
        raise RuntimeError("no such kernel")

    records, runner = measure(model, tokenizer, [Arm("transformers"), wrapped("broken", broken), Arm("c")])
    failed = [record for record in records if record.arm == "broken"]
    assert [(record.prompt, record.verdict, record.reason) for record in failed] == [
        ("1", gate.FAILED, "RuntimeError: no such kernel")
    ]
    assert sum(record.arm == "c" for record in records) == 3
    assert runner.broken == {"broken": "RuntimeError: no such kernel"}
    assert "generate" not in vars(model)


def test_a_broken_reference_stops_the_run(model, tokenizer):
    def broken(output, kwargs):
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(model, tokenizer, [wrapped("transformers", broken), Arm("b")])


def test_sampled_outputs_are_not_compared(model, tokenizer):
    records, _ = measure(model, tokenizer, [Arm("transformers"), Arm("b")], temperature=2.0, seed=3, repeat=2)
    assert {record.verdict for record in records} == {gate.SAMPLED}
    # seeded before each run: the same arm's code gives the same tokens, another repetition others
    by_arm = {arm: [record.tokens for record in records if record.arm == arm] for arm in ("transformers", "b")}
    assert sorted(by_arm["transformers"]) == sorted(by_arm["b"])
    assert by_arm["b"][0] != by_arm["b"][1]


def test_turns_continue_from_the_reference_reply(model, tokenizer):
    records, _ = measure(model, tokenizer, [Arm("transformers"), Arm("b")], turns=2)
    assert [(record.prompt, record.turn) for record in records if record.arm == "b"] == [
        ("1", 0),
        ("2", 0),
        ("3", 0),
        ("3", 1),
    ]
    first, second = (record for record in records if record.prompt == "3" and record.arm == "transformers")
    reply = tokenizer.decode(first.tokens, skip_special_tokens=True)
    assert second.prompt_tokens == len(tokenizer(f"one\n\n{reply}\n\ntwo").input_ids)
    assert len({record.prompt_tokens for record in records if record.turn == 1}) == 1


def test_a_prompt_longer_than_the_context_is_left_out_with_a_note(model, tokenizer):
    long = Prompt("9", "rag", ("x" * 2044,))
    records, runner = measure(model, tokenizer, [Arm("transformers")], [long, PROMPTS[0]])
    assert [record.prompt for record in records] == ["1"]
    assert runner.notes == ["prompt 9 left out: it needs 2049 positions and the model has 2048"]


def test_skipped_prompts_keep_their_place_in_the_rotation(model, tokenizer):
    arms = [Arm("transformers"), Arm("b"), Arm("c")]
    records, _ = measure(model, tokenizer, arms, skip=["1"])
    assert "".join(record.arm[0] for record in records) == "bct" + "ctb"


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"repeat": 0}, {"turns": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Settings(**wrong)


def test_arms_of_the_table(fake_accel, model):
    names = ["transformers", "transformers-assisted", "accel-plain", "accel-ngram", "accel-suffix", "accel-auto"]
    arms = all_arms(seed=3)
    assert list(arms) == names
    assert arms["transformers-assisted"].kwargs == {"prompt_lookup_num_tokens": 10}
    for name in names:
        with arms[name].prepare(model):
            pass
    assert fake_accel == [
        ("attach", (), {"method": "plain", "seed": 3}),
        ("detach",),
        ("attach", (), {"method": "speculative", "drafter": "ngram", "seed": 3}),
        ("detach",),
        ("attach", (), {"method": "speculative", "drafter": "suffix", "seed": 3}),
        ("detach",),
        ("attach", (), {"method": "speculative", "seed": 3}),
        ("detach",),
    ]


def test_what_an_arm_learned_stays_from_run_to_run(model):
    arm, seen = bench_arms.attached("accel-suffix", drafter="suffix"), []
    plain = model.generate
    for _ in range(2):
        with arm.prepare(model) as prepared:
            assert prepared is model
            model.generate(torch.tensor([[5, 6, 5, 6]]), max_new_tokens=8, do_sample=False)
            (speculator,) = model.__dict__[STATE]._speculators.values()
            seen.append((speculator, speculator.costs._num_steps))
        assert STATE not in model.__dict__
        assert model.generate == plain
    assert seen[0][0] is seen[1][0]
    assert seen[1][1] > seen[0][1] > 0
    # another model has a state of its own
    other = copy.deepcopy(model)
    with arm.prepare(other):
        assert other.__dict__[STATE].model is other


def test_a_draft_serves_both_runtimes(fake_accel, model):
    draft = find_draft("my-draft", model, device="cpu")
    assert draft.artifact is model
    assert fake_accel.pop(0) == ("detach",)  # as an assistant it decodes with transformers' own generate()
    arms = all_arms(draft)
    assert list(arms)[-2:] == ["accel-lm", "accel-auto"]
    assert arms["transformers-assisted"].kwargs == {"assistant_model": model}
    with arms["accel-lm"].prepare(model), arms["accel-auto"].prepare(model):
        pass
    assert fake_accel[0] == ("attach", (model,), {"method": "speculative", "drafter": "lm"})
    assert fake_accel[1] == ("attach", (model,), {"method": "speculative"})


def test_a_draft_transformers_cannot_use_goes_to_accel_by_name(fake_accel, model, monkeypatch):
    import accel

    def load(name, **options):
        raise OptionError("not a model")

    monkeypatch.setattr(accel, "load", load)
    draft = find_draft("trimmed", model)
    assert (draft.artifact, draft.assistant) == ("trimmed", None)
    assert draft.reason == "trimmed is not a transformers model (not a model)"
    assert all_arms(draft)["transformers-assisted"].kwargs == {"prompt_lookup_num_tokens": 10}


def test_an_artifact_is_read_once_and_never_looked_for_on_the_hub(fake_accel, model, monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(bench_arms, "drafter_from", lambda source, target: read.append(source) or "a drafter")
    (tmp_path / "accel.json").write_text("{}")
    draft = find_draft(str(tmp_path), model)
    arms = all_arms(draft)
    for name in ("accel-lm", "accel-auto"):
        with arms[name].prepare(model):
            pass
    assert read == [str(tmp_path)] and fake_accel[0][1] == fake_accel[2][1] == ("a drafter",)
    assert arms["transformers-assisted"].kwargs == {"prompt_lookup_num_tokens": 10}
    assert draft.reason.endswith("is an artifact of accel")


def test_choosing_arms():
    arms = all_arms()
    assert [arm.name for arm in choose(arms, "accel-auto, transformers")] == ["transformers", "accel-auto"]
    assert len(choose(arms, None)) == 6
    assert reference_of(choose(arms, "accel-plain,accel-auto")) == "accel-plain"
    for names, message in [("x", "unknown arm 'x': choose from"), (",", "names no arm"), ("accel-lm", "with -a")]:
        with pytest.raises(OptionError, match=message):
            check(names, has_draft=False)
    assert check("accel-lm", has_draft=True) == ["accel-lm"]


def test_a_batch_is_padded_on_the_left():
    batch = left_padded([[5], [6, 7, 8]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_everybody_comes_first_once():
    assert [rotated("abc", by) for by in (0, 1, 5, -1)] == [list("abc"), list("bca"), list("cab"), list("cab")]
