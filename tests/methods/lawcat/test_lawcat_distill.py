"""Distilling a conversion: texts as rows, both stages by brute force, resumption, what is kept softmax, refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from refusals import refusal
from torch import nn

import accel
from accel.artifacts import open_artifact, verify
from accel.distill.weights import weights_digest
from accel.methods.lawcat.distill import recipe as recipes
from accel.methods.lawcat.distill import stage, transfer, tune
from accel.methods.lawcat.distill.recipe import Recipe, distill, prepare
from accel.methods.lawcat.distill.texts import Documents, documents, rows
from accel.models.linear import LowRank, converted_copy, fresh_layers, is_linear, own_parameters

LENGTH = 24
RECIPE = Recipe(
    length=LENGTH,
    batch_tokens=4 * LENGTH,
    transfer_steps=12,
    tune_steps=6,
    tune_rate=3e-3,
    checkpoint_every=2,
    lora_rank=2,
    lora_alpha=4.0,
    dtype="float32",
    held_out=0.2,
)


@pytest.fixture(scope="module")
def teacher():
    return byte_llama(max_position_embeddings=64)


@pytest.fixture(scope="module")
def texts():
    """Counting in several ways, as a byte tokenizer reads it."""
    draw = torch.Generator().manual_seed(0)
    ids = []
    for _ in range(40):
        start, step = (int(torch.randint(1, 9, (), generator=draw)) for _ in range(2))
        ids.append(byte_tokenizer()(" ".join(str(start + step * i) for i in range(5)))["input_ids"] + [0])
    return Documents(ids, [f"{place * 0x06_00_00_00:08x}" for place in range(40)])


def spec(model, **choices):
    return replace(RECIPE, **choices).spec(model)


def fresh(model, **choices):
    return fresh_layers(model, spec(model, **choices), torch.Generator().manual_seed(0))


def packed(texts):
    return rows(texts, LENGTH, 0.2, 64, seed=0)


def test_documents_are_lines_with_answers_and_stretches_of_files(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": "ab", "answer": "cd"}) + "\n" + json.dumps({"prompt": "e"}) + "\n")
    (tmp_path / "file.txt").write_text("hello world")
    tokenizer = byte_tokenizer()
    found = documents([lines], [tmp_path / "file.txt"], tokenizer, 5)
    spelt = [tokenizer.decode(each) for each in found.ids]
    assert spelt == ["abcd</s>", "e</s>", "hello", " worl", "d</s>"]
    assert len(set(found.digests)) == 5


def test_rows_begin_with_a_document_and_hold_every_one(texts):
    found = packed(texts)
    held = [each for each, digest in zip(texts.ids, texts.digests, strict=True) if int(digest, 16) < 0.2 * 2**32]
    kept = [each for each, digest in zip(texts.ids, texts.digests, strict=True) if int(digest, 16) >= 0.2 * 2**32]
    assert 0 < len(held) < 40 and found.learned.shape[1] == LENGTH
    whole = []
    for row in found.learned.tolist():
        assert any(row[: len(each)] == each for each in kept)
        whole += [row[a + 1 : b + 1] for a, b in pairwise([-1, *(at for at, token in enumerate(row) if token == 0)])]
    assert {tuple(each) for each in whole} == {tuple(each) for each in kept}
    # in a random order that the seed decides
    assert not torch.equal(rows(texts, LENGTH, 0.2, 64, seed=1).learned, found.learned)
    # what is measured with is never counted twice
    assert sorted(torch.cat(found.held_out).tolist()) == sorted(token for each in held for token in each)
    assert all(2 <= len(row) <= LENGTH for row in found.held_out)


def test_a_row_is_filled_by_the_document_that_follows():
    ids = [[1, 2, 3], [4, 5, 6], [7, 8], [9, 9]]
    found = rows(Documents(ids, ["fffffff1", "fffffff2", "fffffff3", "00000000"]), 5, 0.1, 1, seed=0)
    order = [[1, 2, 3], [4, 5, 6], [7, 8]]
    starts = [next(each for each in order if row[: len(each)] == each) for row in found.learned.tolist()]
    for row, start in zip(found.learned.tolist(), starts, strict=True):
        rest = row[len(start) :]
        assert any((each + other)[: len(rest)] == rest for each in order for other in order)
    assert [row.tolist() for row in found.held_out] == [[9, 9]]


def test_a_batch_is_a_function_of_its_number(texts):
    found = packed(texts)
    ones, again, other = (found.batches(3 * LENGTH, seed) for seed in (0, 0, 1))
    assert torch.equal(ones[17], again[17]) and ones[0].shape == (3, LENGTH)
    assert not all(torch.equal(ones[n], other[n]) for n in range(4))
    epoch = torch.cat([ones[n] for n in range(-(-len(found.learned) // 3))])
    assert sorted(epoch.tolist()) == sorted(found.learned.tolist())


def test_what_is_watched_is_what_attention_reads_and_says(tiny):
    model = tiny.build("qwen3")
    layers = fresh_layers(model, replace(RECIPE, layers=(1,)).spec(model), torch.Generator().manual_seed(0))
    tokens = torch.arange(3, 23).view(2, 10)
    (seen,) = transfer.watch(model, layers, tokens)
    module = model.model.layers[1].self_attn
    assert not module.o_proj._forward_pre_hooks and not module._forward_pre_hooks
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states[1]
        assert torch.allclose(seen.hidden, model.model.layers[1].input_layernorm(states))
        mask = torch.full((10, 10), -torch.inf).triu(1)[None, None]
        said, _ = module(seen.hidden, position_embeddings=seen.positions, attention_mask=mask)
        assert torch.allclose(module.o_proj(seen.heads), said, atol=1e-5)


def test_the_loss_of_a_transfer_is_the_mean_over_layers(teacher, texts, monkeypatch):
    layers, batch = fresh(teacher), packed(texts).learned[:5]
    expected = 0.0
    for layer, seen in zip(layers, transfer.watch(teacher, layers, batch), strict=True):
        with torch.no_grad():
            # the whole layer as it will be called, with nothing behind it
            whole, layer.o_proj = layer.o_proj, nn.Identity()
            said = layer(seen.hidden, seen.positions)[0]
            layer.o_proj = whole
        expected += 1000 * float((said - seen.heads).square().mean()) / len(layers)
    for at_once in (2048, 2 * LENGTH):
        monkeypatch.setattr(stage, "AT_ONCE", at_once)
        found = sum(float(each.detach()) for each in transfer.losses(teacher, layers, batch))
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_transfer_lowers_every_layers_error_and_touches_nothing_else(teacher, texts, tmp_path):
    digest, wanted = weights_digest(teacher), [each.requires_grad for each in teacher.parameters()]
    layers, data = fresh(teacher), packed(texts)
    before = transfer.errors(teacher, layers, data.held_out)
    how = replace(RECIPE, transfer_steps=40).transfer
    done = transfer.train(teacher, layers, data, how, tmp_path, made_from={})
    after = transfer.errors(teacher, layers, data.held_out)
    assert all(now < 0.9 * was for was, now in zip(before, after, strict=True)), (before, after)
    assert done[-1]["loss"] < done[0]["loss"]
    start = own_parameters(fresh(teacher))
    assert all(not torch.equal(weight, start[name]) for name, weight in own_parameters(layers).items())
    assert weights_digest(teacher) == digest
    assert [each.requires_grad for each in teacher.parameters()] == wanted
    assert not any(each.grad is not None for each in teacher.parameters())


LOW_RANK = LowRank(2, 4.0)


def tuned(teacher, own=False, low_rank=LOW_RANK):
    tensors = {name: each.detach() for name, each in own_parameters(fresh(teacher)).items()}
    return tune.Tuned(teacher, spec(teacher), tensors, low_rank, own, seed=0)


def stirred(learner):
    with torch.no_grad():
        for each in learner.parameters():
            each += 0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(each.numel()))
    return learner


def test_the_loss_of_a_tuning_is_cross_entropy_and_divergence(teacher, texts, monkeypatch):
    learner, batch = stirred(tuned(teacher)), packed(texts).learned[:5]
    with torch.no_grad():
        q = learner.student(batch).logits[:, :-1].double().log_softmax(-1)
        p = teacher(batch).logits[:, :-1].double().log_softmax(-1)
    entropy = -float(q.gather(-1, batch[:, 1:, None]).mean())
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence > 1e-3
    for at_once in (2048, 2 * LENGTH):
        monkeypatch.setattr(stage, "AT_ONCE", at_once)
        for next_token, kl in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
            found = sum(float(each.detach()) for each in tune.losses(learner, batch, next_token, kl))
            assert found == pytest.approx(next_token * entropy + kl * divergence, rel=1e-4)


@pytest.mark.parametrize(("own", "low_rank"), [(False, LOW_RANK), (True, LOW_RANK), (True, None)])
def test_what_is_saved_is_what_was_tuned(teacher, texts, tmp_path, own, low_rank):
    digest, data = weights_digest(teacher), packed(texts)
    learner = tuned(teacher, own, low_rank)
    start = learner.tensors()
    before = tune.measure(learner.student, data.held_out)
    how = replace(RECIPE, tune_steps=8).tuning
    done = tune.train(learner, data, how, tmp_path, next_token=1.0, kl=1.0, made_from={})
    assert min(row["loss"] for row in done[-3:]) < done[0]["loss"]
    assert tune.measure(learner.student, data.held_out) < before
    assert weights_digest(teacher) == digest
    end = learner.tensors()
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert any(".lora_" in name for name in changed) == (low_rank is not None)
    assert any(".lora_" not in name for name in changed) == own
    again = converted_copy(teacher, spec(teacher), end, low_rank)
    with torch.no_grad():
        ours, trained = again(data.learned[:2]).logits, learner.student(data.learned[:2]).logits
    assert torch.allclose(ours, trained, atol=2e-4), (ours - trained).abs().max()


def test_measured_is_the_mean_over_tokens(teacher, texts):
    held = packed(texts).held_out
    total = count = 0.0
    with torch.no_grad():
        for row in held:
            logits = teacher(row[None]).logits[0, :-1].log_softmax(-1)
            total -= float(logits.gather(-1, row[1:, None]).sum())
            count += len(row) - 1
    assert tune.measure(teacher, held) == pytest.approx(total / count, rel=1e-5)


def make(teacher, texts, tmp_path, name="made", work="work", **choices):
    return distill(
        teacher, byte_tokenizer(), texts, replace(RECIPE, **choices), tmp_path / work, tmp_path / name, command="accel"
    )


def test_from_texts_to_an_artifact_that_attaches(teacher, texts, tmp_path):
    artifact = make(teacher, texts, tmp_path)
    verify(artifact)
    made, measured = artifact.manifest.made, artifact.manifest.measured
    assert artifact.kind == "lawcat" and made["data_digest"] == packed(texts).digest and made["command"] == "accel"
    assert len(made["losses"]) == 6 and len(made["transfer_losses"]) == 12
    assert made["teacher"]["weights_digest"] == weights_digest(teacher)
    assert set(measured["transfer"]) == {"0", "1"}
    assert all(each["after"] < each["before"] for each in measured["transfer"].values())
    assert measured["teacher"]["cross_entropy"] == pytest.approx(
        tune.measure(teacher, packed(texts).held_out), abs=1e-4
    )
    model = copy.deepcopy(teacher)
    accel.attach(model, str(artifact.path), tokenizer=byte_tokenizer(), method="plain")
    assert is_linear(model)
    loss = tune.measure(model, packed(texts).held_out)
    assert measured["student"]["cross_entropy"] == pytest.approx(loss, abs=1e-4)
    assert measured["student"]["cross_entropy"] < measured["transferred"]["cross_entropy"]
    assert model.generate(torch.arange(5, 9)[None], max_new_tokens=4).shape[1] > 4
    accel.detach(model)
    assert weights_digest(model) == weights_digest(teacher)


def test_a_killed_run_goes_on_to_the_same_artifact(teacher, texts, tmp_path, monkeypatch):
    whole = make(teacher, texts, tmp_path, "whole", "whole.work", keep_softmax=1, tune_own=True)
    for where, step in (("transfer", 5), ("tuning", 3)):
        original = recipes._Run._shown

        def killing(self, what, steps, step=step, where=where, original=original):
            show = original(self, what, steps)

            def shown(row):
                if (what == "tuning") == (where == "tuning") and row["step"] == step:
                    raise KeyboardInterrupt
                show(row)

            return shown

        with monkeypatch.context() as killed:
            killed.setattr(recipes._Run, "_shown", killing)
            with pytest.raises(KeyboardInterrupt):
                make(teacher, texts, tmp_path, "again", keep_softmax=1, tune_own=True)
    with monkeypatch.context() as measured:
        # it was measured before the run was killed
        measured.setattr("accel.methods.lawcat.distill.sensitivity.measure", None)
        again = make(teacher, texts, tmp_path, "again", keep_softmax=1, tune_own=True)
    ours, theirs = again.manifest, whole.manifest
    assert ours.made["losses"] == theirs.made["losses"]
    assert ours.made["transfer_losses"] == theirs.made["transfer_losses"]
    assert ours.files == theirs.files and ours.measured == theirs.measured
    for change in ({"kl": 0.5}, {"transfer_rate": 1e-3}):
        message = refusal(
            lambda change=change: make(teacher, texts, tmp_path, "x", keep_softmax=1, tune_own=True, **change)
        )
        assert next(iter(change)) in message or "learning_rate" in message


def test_the_costliest_layer_stays_softmax(teacher, texts, tmp_path):
    artifact = make(teacher, texts, tmp_path, keep_softmax=1, tune_steps=0)
    measured = artifact.manifest.measured
    rises = {int(layer): rise for layer, rise in measured["sensitivity"].items()}
    (kept,) = measured["kept_softmax"]
    assert rises[kept] == max(rises.values()) and len(set(rises.values())) == 2
    left = [layer for layer in (0, 1) if layer != kept]
    assert artifact.manifest.parameters == {"spec": spec(teacher, layers=tuple(left)).as_dict(), "lora": None}
    # of two layers the artifact has one alone
    rise = measured["student"]["cross_entropy"] - measured["teacher"]["cross_entropy"]
    assert rise == pytest.approx(rises[left[0]], abs=2e-5)


def test_disk_stays_within_what_was_said(teacher, texts, tmp_path):
    asked = prepare(teacher, texts, RECIPE)
    artifact = make(teacher, texts, tmp_path)
    used = {
        name: sum(each.stat().st_size for each in (tmp_path / "work" / name).rglob("*"))
        for name in ("transfer", "tuning")
    }
    used["artifact"] = sum(each.stat().st_size for each in artifact.path.rglob("*"))
    assert set(used) == set(asked.disk)
    assert all(used[name] <= asked.disk[name] for name in used), (used, asked.disk)
    assert str(asked.disk["artifact"]) in refusal(lambda: prepare(teacher, texts, replace(RECIPE, max_bytes=10)))


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"layers": (0, 2)}, "layer 2 of a model that has 2"),
        ({"layers": ()}, "layers=[]"),
        ({"keep_softmax": 2}, "leaves none to convert"),
        ({"length": 128, "batch_tokens": 128}, "has 64 positions"),
        ({"length": 200}, "batch_tokens=96"),
        ({"conv_width": 3}, "conv_width=3"),
        ({"lora_rank": 0}, "nothing to train"),
        ({"next_token": 0.0, "kl": 0.0}, "no loss"),
        ({"tune_rate": 0.0}, "learning_rate=0.0"),
        ({"kl": -1.0}, "kl=-1.0"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"held_out": 0.9}, "held_out=0.9"),
        ({"transfer_steps": 0}, "transfer_steps=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_mistakes_are_one_line(teacher, texts, choices, says):
    assert says in refusal(lambda: prepare(teacher, texts, replace(RECIPE, **choices)))


def test_models_and_texts_that_do_not_fit_are_refused(tiny, teacher, texts, tmp_path):
    assert "linear attention is for llama" in refusal(lambda: prepare(tiny.build("gpt2"), texts, RECIPE))
    assert "float16" in refusal(lambda: prepare(copy.deepcopy(teacher).half(), texts, RECIPE))
    linear = converted_copy(teacher, spec(teacher), own_parameters(fresh(teacher)))
    assert "detach it" in refusal(lambda: prepare(linear, texts, RECIPE))
    few = Documents([*texts.ids[:1], [5, 0]], ["00000000", "ffffffff"])
    assert "2 tokens to learn from" in refusal(lambda: prepare(teacher, few, RECIPE))
    assert "give --prompts" in refusal(lambda: documents([], [], byte_tokenizer(), 8))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in refusal(lambda: documents([], [tmp_path / "empty.txt"], byte_tokenizer(), 8))
    assert "cannot read the corpus" in refusal(lambda: documents([], [tmp_path / "none.txt"], byte_tokenizer(), 8))
    assert "cannot read" in refusal(lambda: documents([], [tmp_path / "no.txt"], byte_tokenizer(), 8))
    assert "exists already" in refusal(lambda: make(teacher, texts, tmp_path, "empty.txt"))


def test_the_saved_type_is_the_recipes(teacher, texts, tmp_path):
    artifact = make(teacher, texts, tmp_path, dtype="bfloat16", tune_steps=0, transfer_steps=2)
    tensors = open_artifact(artifact.path).tensors("lawcat.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
