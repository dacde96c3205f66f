"""Sampled speculative decoding follows the target's distribution: joint chi-square against exact enumeration.

The joint law of the first four new tokens over a vocabulary of five is computed by running the model over all
prefixes with transformers' own processors. The first token comes from the prefill; the others cross the borders
between drafted, replaced and bonus tokens at every draft length that is tried. Seeds are fixed, so nothing here flips.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import LogitsProcessor

import accel
from accel.engine.transformers_call import PreparedCall
from accel.kernels.verify import reference
from accel.methods.speculative.draft_length import Acceptance, AdaptiveLength, Costs
from accel.models.diffusion import DiffusionFacts, set_facts

V, JOINT, NEW, DRAWS = 5, 4, 5, 1200
# a text that repeats itself, so that suffix and n-gram drafters have something to say
PROMPT = [1, 3, 4, 1, 3, 4, 2, 1, 3]
# smallest expected count of a cell of its own; rarer outcomes share one
LEAST_EXPECTED = 5


@pytest.fixture(scope="module")
def models(tiny):
    target = tiny.build("llama", vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=None, peak=0.5)
    return target, {kind: tiny.draft_of(target, kind) for kind in ("right", "partly", "wrong")}


def exact(model, config, processor=None):
    """Probability of each of the V**JOINT continuations of the prompt, in the order of itertools.product."""
    prepared, _ = model._prepare_generation_config(None, do_sample=True, **config)
    model._prepare_special_tokens(prepared)
    processors = model._get_logits_processor(prepared, input_ids_seq_length=len(PROMPT))
    if processor is not None:
        processors.insert(0, processor)
    law = torch.ones(1, dtype=torch.float64)
    for length in range(JOINT):
        ids = torch.tensor([[*PROMPT, *prefix] for prefix in itertools.product(range(V), repeat=length)])
        with torch.no_grad():
            scores = processors(ids, model(ids).logits[:, -1].float())
        law = (law[:, None] * scores.double().softmax(-1)).flatten()
    return law


def p_value(sequences, law):
    """Of the chi-square test that the first JOINT new tokens of ``sequences`` [N, L] follow ``law``."""
    new = sequences[:, len(PROMPT) : len(PROMPT) + JOINT]
    cells = (new * V ** torch.arange(JOINT - 1, -1, -1)).sum(-1)
    counts, expected = torch.bincount(cells, minlength=V**JOINT).double(), law * len(new)
    assert not counts[law == 0].any(), "a token that the processors forbid was drawn"
    order = expected.argsort(descending=True)
    counts, expected = counts[order], expected[order]
    alone = int((expected >= LEAST_EXPECTED).sum())
    # the last cell must be large enough as well
    while alone and 0 < expected[alone:].sum() < LEAST_EXPECTED:
        alone -= 1
    merged = [torch.cat([x[:alone], x[alone:].sum()[None]]) for x in (counts, expected)]
    counts, expected = (x[merged[1] > 0] for x in merged)
    assert len(expected) > 8, "too few cells to tell anything"
    return float(chisquare(counts.numpy(), expected.numpy()).pvalue)


def sample(target, artifacts=(), *, draws=DRAWS, seed=0, **kwargs):
    """``draws`` sequences from one call."""
    prompt = torch.tensor([PROMPT])
    settings = {"do_sample": True, "max_new_tokens": NEW, "num_return_sequences": draws, "seed": seed, "top_k": 0}
    out = accel.generate(target, prompt, artifacts=artifacts, **settings | kwargs)
    stats = accel.stats(target)
    assert stats.lossless and stats.method != "transformers"
    return out, stats


# every pair of draft, temperature, length and acceptance stands together somewhere
CASES = [
    ("right", 0.7, 1, "token"),
    ("right", 1.0, 3, "token"),
    ("right", 1.5, 3, "block"),
    ("right", 1.0, "auto", "auto"),
    ("partly", 0.7, 3, "token"),
    ("partly", 0.7, 3, "block"),
    ("partly", 1.0, 1, "token"),
    ("partly", 1.0, 3, "block"),
    ("partly", 1.5, 3, "token"),
    ("partly", 1.5, "auto", "auto"),
    ("wrong", 0.7, 3, "block"),
    ("wrong", 0.7, "auto", "auto"),
    ("wrong", 1.0, 3, "token"),
    ("wrong", 1.0, 3, "block"),
    ("wrong", 1.5, 1, "block"),
]


@pytest.mark.parametrize(("kind", "temperature", "length", "acceptance"), CASES)
def test_a_draft_model(models, kind, temperature, length, acceptance):
    target, drafts = models
    # products in 8 bits would make a right draft a little wrong
    options = {"drafter": "lm", "draft_length": length, "acceptance": acceptance, "cpu_linear": "transposed"}
    out, stats = sample(target, [drafts[kind]], temperature=temperature, **options)
    assert p_value(out, exact(target, {"temperature": temperature, "top_k": 0})) > 1e-4
    assert stats.drafted_tokens > 0
    if length != "auto":
        rate = stats.accepted_tokens / stats.drafted_tokens
        assert rate > 0.999 if kind == "right" else 0.0 < rate < 0.98


@pytest.mark.parametrize("drafter", ["suffix", "ngram", "cascade"])
@pytest.mark.parametrize(("length", "acceptance"), [(3, "auto"), ("auto", "auto")])
def test_other_drafters(models, drafter, length, acceptance):
    target, drafts = models
    artifacts = [drafts["partly"]] if drafter == "cascade" else []
    out, stats = sample(target, artifacts, drafter=drafter, draft_length=length, acceptance=acceptance, seed=3)
    assert p_value(out, exact(target, {"top_k": 0})) > 1e-4
    if length != "auto":
        assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.parametrize(
    ("length", "steps", "acceptance", "temperature"),
    [(3, 1, "token", 1.0), (3, 1, "block", 0.7), (3, 2, "token", 1.5), (3, 3, "block", 1.0), ("auto", 1, "auto", 1.0)],
)
def test_a_masked_diffusion_draft(models, tiny, length, steps, acceptance, temperature):
    """Its mask token is one more than the target has; with several passes some tokens know those in front of them."""
    target, _ = models
    draft = tiny.build("llama", seed=8, vocab_size=V + 1, pad_token_id=0, bos_token_id=1, eos_token_id=None, peak=0.5)
    set_facts(draft, DiffusionFacts(mask_token=V, block_length=4, threshold=1.3))
    options = {"drafter": "lm", "draft_length": length, "draft_steps": steps, "acceptance": acceptance}
    out, stats = sample(target, [draft], temperature=temperature, seed=4, **options)
    assert p_value(out, exact(target, {"temperature": temperature, "top_k": 0})) > 1e-4
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


WARPERS = {
    "top_k": {"top_k": 3},
    "top_p": {"top_k": 0, "top_p": 0.8, "temperature": 1.3},
    "min_p": {"top_k": 0, "min_p": 0.1},
    # processors that read the row's tokens: the draft does not know them, the target does
    "repetition": {"top_k": 0, "repetition_penalty": 1.5},
    "no_repeat": {"top_k": 4, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("warper", WARPERS)
def test_processors(models, warper):
    target, drafts = models
    config = WARPERS[warper]
    out, _ = sample(target, [drafts["partly"]], drafter="lm", draft_length=3, seed=1, draws=DRAWS // 2, **config)
    assert p_value(out, exact(target, config)) > 1e-4


class Lean(LogitsProcessor):
    """Somebody's own processor, whose rows are independent although accel cannot know it."""

    def __call__(self, input_ids, scores):
        return scores + 0.7 * torch.nn.functional.one_hot(input_ids[:, -2], scores.shape[1])


@pytest.mark.parametrize("kind", ["partly", "wrong"])
def test_token_by_token_verification(models, kind, monkeypatch):
    """What a custom processor gets, which needs one call a draw: here all draws are let through in one."""
    monkeypatch.setattr(PreparedCall, "_must_stay_in_step", lambda call: False)
    target, drafts = models
    options = {"drafter": "lm", "draft_length": 3}
    out, stats = sample(target, [drafts[kind]], logits_processor=[Lean()], **options)
    assert stats.drafted_tokens > stats.accepted_tokens > 0
    assert p_value(out, exact(target, {"top_k": 0}, Lean())) > 1e-4


def test_plain(models):
    target, _ = models
    out, _ = sample(target, method="plain", temperature=1.2, draws=2 * DRAWS)
    assert p_value(out, exact(target, {"top_k": 0, "temperature": 1.2})) > 1e-4


def test_an_attached_model_over_many_calls(models):
    """Rows of one prompt each, in calls that share the drafter and what was learned about it."""
    target, drafts = models
    attached = accel.attach(target, drafts["partly"], drafter="cascade", draft_length=2)
    prompt = torch.tensor([PROMPT]).expand(250, -1)
    try:
        torch.manual_seed(2)
        outs = [attached.generate(prompt, do_sample=True, top_k=0, max_new_tokens=NEW) for _ in range(6)]
    finally:
        accel.detach(target)
    assert p_value(torch.cat(outs), exact(target, {"top_k": 0})) > 1e-4


def wrong_residual(p, q, x, lenience):
    return p


def always(p_x, q_x, u, lenience):
    return torch.ones_like(p_x, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "broken", "acceptance"),
    [("_residual", wrong_residual, "token"), ("_residual", wrong_residual, "block"), ("_accepts", always, "token")],
)
def test_it_can_fail(models, name, broken, acceptance, monkeypatch):
    """The draws of a wrong rule are told from the right ones, with as many draws as everywhere else here."""
    target, drafts = models
    monkeypatch.setattr(reference, name, broken)
    out, _ = sample(target, [drafts["wrong"]], drafter="lm", draft_length=3, acceptance=acceptance)
    assert p_value(out, exact(target, {"top_k": 0})) < 1e-6


def ended_at(law, end):
    """The joint law when a row stops at token ``end`` and is padded with it."""
    ended = torch.zeros_like(law)
    for probability, cell in zip(law.tolist(), itertools.product(range(V), repeat=JOINT), strict=True):
        first = cell.index(end) if end in cell else JOINT
        padded = [*cell[:first], *[end] * (JOINT - first)]
        ended[sum(token * V ** (JOINT - 1 - i) for i, token in enumerate(padded))] += probability
    return ended


@pytest.mark.parametrize("acceptance", ["token", "block"])
@pytest.mark.parametrize("kind", ["partly", "wrong"])
def test_a_sampled_draft_is_not_shortened_by_what_it_says(models, monkeypatch, kind, acceptance):
    """Verifying is made so dear that unlikely drafted tokens would not be worth it; dropping them would be a bias."""
    target, drafts = models
    monkeypatch.setattr(Costs, "verify", lambda self, positions: 0.5 + 0.5 * positions / DRAWS)
    monkeypatch.setattr(Costs, "is_stale", lambda self, positions: False)
    monkeypatch.setattr(AdaptiveLength, "_judge", lambda *args, **kwargs: False)
    monkeypatch.setattr(Acceptance, "chance", lambda self, confidence: confidence)
    monkeypatch.setattr(AdaptiveLength, "keep_going", lambda self, row, confidences, *how: len(confidences) < 3)
    out, stats = sample(target, [drafts[kind]], drafter="lm", acceptance=acceptance)
    assert stats.drafted_tokens > 0
    assert p_value(out, exact(target, {"top_k": 0})) > 1e-4


@pytest.mark.parametrize("acceptance", ["token", "block"])
@pytest.mark.parametrize("kind", ["partly", "wrong"])
def test_a_drafted_end_is_not_dropped(models, kind, acceptance):
    target, drafts = models
    law = exact(target, {"top_k": 0})
    for end in (2, 3, 4):
        options = {"draft_length": 3, "acceptance": acceptance, "eos_token_id": end, "pad_token_id": end}
        out, _ = sample(target, [drafts[kind]], drafter="lm", seed=end, **options)
        assert p_value(out, ended_at(law, end)) > 1e-4
