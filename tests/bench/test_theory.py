"""Theory against runs: what is predicted along the target's texts is what drafting shows, and nothing else is.

Each check is repeated over batches of independent texts and runs, so that their spread is the error to allow.
"""

from __future__ import annotations

import copy

import pytest
import torch

import accel
from accel.bench import theory
from accel.distill.forward import Scorer
from accel.drafters.small_lm import SmallLMDrafter, VocabularyMap
from accel.methods.speculative.distill.data import Translation

BATCHES, ROWS, TOKENS = 12, 12, 32
GAMMA = 3
# a mean difference of more standard errors is no chance: two in a thousand with twelve batches (and seeds are fixed)
ALLOWED = 4.0
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0}


def noised(model, share):
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.ndim > 1:
                weight += share * weight.std() * torch.randn(weight.shape, generator=generator)
    return draft


def trimmed(tiny, model, share):
    """A noised copy that can say every second token and the end."""
    kept = torch.cat([torch.arange(3), torch.arange(3, tiny.VOCAB, 2)])
    draft = noised(model, share)
    vocabulary = VocabularyMap(kept, 0, tiny.VOCAB)
    small = tiny.build("llama", vocab_size=len(kept))
    weights = draft.state_dict()
    small.load_state_dict(
        weights | {key: weights[key][kept] for key in ("model.embed_tokens.weight", "lm_head.weight")}
    )
    return small, vocabulary


@pytest.fixture(scope="module")
def target(tiny):
    return tiny.build("llama", peak=0.6)


@pytest.fixture(scope="module")
def drafts(tiny, target):
    """name → (draft model, its vocabulary), from good to bad."""
    return {
        "close": (noised(target, 0.1), None),
        "far": (noised(target, 0.35), None),
        "trimmed": trimmed(tiny, target, 0.2),
    }


def generate(tiny, model, prompt, **kwargs):
    """New tokens of each row, up to its end; prompts have no padding."""
    ids = prompt.expand(ROWS, -1)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, **kwargs)[
        :, prompt.shape[1] :
    ]
    rows = []
    for row in out.tolist():
        rows.append(row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row)
    return rows


def prompt_of(tiny, batch):
    return torch.randint(3, tiny.VOCAB, (1, 6), generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def texts(tiny, target):
    """The target's own sampled texts and its view of them, a list for each batch."""
    score = Scorer(target)
    found = []
    accel.attach(target, method="plain")
    for batch in range(BATCHES):
        prompt = prompt_of(tiny, batch)
        torch.manual_seed(1000 + batch)
        found.append([(prompt[0].tolist(), row) for row in generate(tiny, target, prompt, **SAMPLING)])
    accel.detach(target)
    views = [[theory.read(score, prompt, row, TOKENS) for prompt, row in batch] for batch in found]
    return [[view for view in batch if view is not None] for batch in views]


@pytest.fixture(scope="module")
def predicted(texts, drafts):
    """name → the prediction for each batch."""

    def of(model, vocabulary):
        score, translation = Scorer(model), Translation(vocabulary)
        return [
            theory.predict([theory.along(score, translation, text, sampled=True) for text in batch], GAMMA)
            for batch in texts
        ]

    return {name: of(*draft) for name, draft in drafts.items()}


@pytest.fixture(scope="module")
def measured(tiny, target, drafts):
    """name → (acceptance at position 1, τ) of each batch, from the counts of sampled speculative decoding."""

    def of(model, vocabulary):
        drafter = SmallLMDrafter(model, tiny.VOCAB, vocabulary)
        accel.attach(target, drafter, drafter="lm", draft_length=GAMMA, acceptance="token")
        found = []
        for batch in range(BATCHES):
            torch.manual_seed(batch)
            generate(tiny, target, prompt_of(tiny, batch), **SAMPLING)
            stats = accel.stats(target)
            found.append((stats.accepted_by_position[0] / stats.drafted_by_position[0], stats.mean_accepted_length))
        accel.detach(target)
        return found

    return {name: of(*draft) for name, draft in drafts.items()}


def errors_apart(one, other):
    """|mean difference| in units of its standard error over batches."""
    difference = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return float(difference.mean().abs() / (difference.std() / len(difference) ** 0.5))


NAMES = ("close", "far", "trimmed")


@pytest.mark.parametrize("name", NAMES)
def test_sampled_drafts_are_kept_as_often_as_one_minus_tvd_says(name, measured, predicted):
    first, tau = zip(*measured[name], strict=True)
    assert errors_apart(first, [each.first_acceptance for each in predicted[name]]) < ALLOWED
    assert errors_apart(tau, [each.mean_accepted_length for each in predicted[name]]) < ALLOWED


@pytest.mark.parametrize("name", NAMES)
def test_the_check_rejects_wrong_predictions(name, measured, predicted):
    """Another draft's α, top-1 agreement, and an α that is off by a tenth."""
    first, tau = zip(*measured[name], strict=True)
    other = predicted[NAMES[NAMES.index(name) - 1]]
    own = predicted[name]
    assert errors_apart(first, [each.first_acceptance for each in other]) > ALLOWED
    assert errors_apart(tau, [each.mean_accepted_length for each in other]) > ALLOWED
    assert errors_apart(first, [each.top1 for each in own]) > ALLOWED
    assert errors_apart(first, [each.first_acceptance + 0.1 for each in own]) > ALLOWED


def test_block_acceptance_is_not_what_is_predicted(tiny, target, drafts, predicted):
    """It keeps more than 1 − TVD: the suite must ask for token-wise acceptance."""
    drafter = SmallLMDrafter(drafts["far"][0], tiny.VOCAB)
    # the prediction is of the draft itself, not of its weights in 8 bits
    accel.attach(target, drafter, drafter="lm", draft_length=GAMMA, acceptance="block", cpu_linear="transposed")
    tau = []
    for batch in range(BATCHES):
        torch.manual_seed(batch)
        generate(tiny, target, prompt_of(tiny, batch), **SAMPLING)
        tau.append(accel.stats(target).mean_accepted_length)
    accel.detach(target)
    expected = [each.mean_accepted_length for each in predicted["far"]]
    assert errors_apart(tau, expected) > ALLOWED and sum(tau) > sum(expected)


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_theory_is_exact(tiny, target, drafts, name, gamma):
    """Along the same text there is nothing left to chance: the counts are the predicted ones."""
    model, vocabulary = drafts[name]
    drafter = SmallLMDrafter(model, tiny.VOCAB, vocabulary)
    score, along, accepted, drafted, calls = Scorer(target), [], 0, 0, 0
    for batch in range(3):
        prompt = prompt_of(tiny, batch)
        kwargs = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": TOKENS, "do_sample": False}
        tokens = target.generate(prompt, **kwargs)[0, prompt.shape[1] :].tolist()
        text = theory.read(score, prompt[0].tolist(), tokens, TOKENS)
        if text is None:
            continue
        along.append(theory.along(Scorer(model), Translation(vocabulary), text, sampled=False))
        accel.attach(target, drafter, drafter="lm", draft_length=gamma)
        assert target.generate(prompt, **kwargs)[0, prompt.shape[1] :].tolist() == tokens
        stats = accel.stats(target)
        accel.detach(target)
        accepted += sum(stats.accepted_by_position[:1])
        drafted += sum(stats.drafted_by_position[:1])
        calls += stats.row_calls
    found = theory.predict(along, gamma)
    assert found.first_acceptance == pytest.approx(accepted / drafted)
    assert found.mean_accepted_length == pytest.approx(sum(len(each.alpha) for each in along) / calls)
    assert found.alpha == pytest.approx(found.top1, abs=0.02)


def test_stretches_change_nothing(tiny, target, drafts, monkeypatch):
    prompt, tokens = [5, 6, 7], torch.randint(3, tiny.VOCAB, (40,)).tolist()
    model, vocabulary = drafts["trimmed"]

    def found():
        text = theory.read(Scorer(target), prompt, tokens, 40)
        return theory.along(Scorer(model), Translation(vocabulary), text, sampled=True)

    whole = found()
    monkeypatch.setattr(theory, "STRETCH", 7)
    parts = found()
    assert whole.full and len(whole.alpha) == 39
    torch.testing.assert_close(parts.alpha, whole.alpha, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.kept, whole.kept, atol=2e-3, rtol=0)
    assert torch.equal(parts.top1, whole.top1)


def test_acceptance_is_weighted_by_where_rounds_begin():
    """α of 1, 1, 0, 0 with two drafted: rounds begin at 0 and, behind the target's own token, at 3."""
    chances = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    text = theory.Along(chances, chances, chances, full=False)
    found = theory.predict([text], 2)
    assert found.first_acceptance == pytest.approx(1 / 2) and found.mean_accepted_length == pytest.approx(4 / 2)
    # with one drafted they begin at 0, 2 and 3; nothing is drafted for the last place of a text that was cut
    assert theory.predict([text], 1).first_acceptance == pytest.approx(1 / 3)
    cut = theory.Along(chances, chances, chances, full=True)
    assert theory.predict([cut], 1).first_acceptance == pytest.approx(1 / 2)
    assert found.alpha == 0.5


def test_texts_without_a_drafted_token_say_nothing(target):
    assert theory.read(Scorer(target), [5, 6], [7], TOKENS) is None
    assert theory.predict([], 3) is None
