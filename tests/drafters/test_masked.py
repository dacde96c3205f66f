"""The masked drafter against the toy denoiser's closed form, and tiny masked models drafting for tiny causal ones."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch
from byte_models import byte_llama, save_byte_llama
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner
from refusals import refusal
from scipy.stats import chisquare
from toy_denoiser import MASK, VOCAB, denoiser, prompts

import accel
from accel.bench.arms import find_draft
from accel.cli.main import main
from accel.drafters.base import Ask, Drafter, drafts_at_once
from accel.drafters.cascade import CascadeDrafter
from accel.drafters.masked import MaskedDrafter
from accel.drafters.small_lm import SmallLMDrafter
from accel.drafters.suffix import SuffixDrafter
from accel.errors import AccelError
from accel.models.diffusion import Denoiser, DiffusionFacts, set_facts

BLOCK = 4  # of the toy
HIDDEN = 66  # the mask of the tiny models: their last token


def open_rows(toy, texts):
    drafter = MaskedDrafter(toy, VOCAB)
    for row, text in enumerate(texts):
        drafter.open(row, text, seed=row)
    return drafter


def said(toy, text, num_masks, filled=()):
    """The closed form's logits [masks, V] behind a text, without the mask token."""
    row = [*text, *filled, *[MASK] * (num_masks - len(filled))]
    logits = toy.of(torch.tensor(row))[len(text) :].float()
    logits[:, MASK] = -torch.inf
    return logits


def test_fulfils_the_protocol() -> None:
    drafter = MaskedDrafter(denoiser(), VOCAB)
    assert isinstance(drafter, Drafter)
    assert not drafter.free and drafts_at_once(drafter) and drafts_at_once(CascadeDrafter(SuffixDrafter(), drafter))
    assert not drafts_at_once(SuffixDrafter())


def test_one_pass_guesses_every_rows_block() -> None:
    """Uneven rows after uneven outcomes: a row's masks reach to the end of a block, counted from its prompt."""
    toy, texts = denoiser(), prompts(3)
    drafter = open_rows(toy, texts)
    lengths, written = [3, 4, 6], [0, 1, 2]
    for row, count in enumerate(written):
        drafter.observe(row, [7] * count)
        texts[row] = texts[row] + [7] * count
    toy.calls.clear()
    drafts = drafter.propose([Ask(row, lengths[row]) for row in range(3)])
    assert toy.calls == [("whole", 3, lengths)]
    for row, draft in enumerate(drafts):
        num_masks = math.ceil((written[row] + lengths[row]) / BLOCK) * BLOCK - written[row]
        expected = said(toy, texts[row], num_masks).softmax(-1).max(-1)
        assert draft.tokens == expected.indices[: lengths[row]].tolist()
        assert draft.confidence == pytest.approx(expected.values[: lengths[row]].tolist(), rel=1e-5)
        assert draft.probs is None and draft.source == "masked"


def by_hand(toy, text, count, passes):
    """Greedy drafting as the rule states it, one gap after the other: (tokens, gaps of each pass)."""
    facts, drafted, asked = toy.facts, [], []
    while len(drafted) < count:
        asked.append(count - len(drafted))
        p = said(toy, text, math.ceil(count / BLOCK) * BLOCK, drafted)[len(drafted) : count].softmax(-1)
        best, entropy = p.max(-1), -torch.where(p > 0, p * p.log(), p).sum(-1)
        doubt = entropy if facts.rule == "entropy" else -best.values
        limit = facts.threshold if facts.rule == "entropy" else -facts.threshold
        if facts.rule == "top_k":
            limit = doubt.sort().values[math.ceil(asked[-1] / (passes - len(asked) + 1)) - 1]
        for place in range(asked[-1]):
            if place and doubt[: place + 1].max() > limit and len(asked) < passes:
                break
            drafted.append(int(best.indices[place]))
    return drafted, asked


@pytest.mark.parametrize(("rule", "threshold"), [("entropy", 1.0), ("confidence", 0.7), ("top_k", 0.5)])
@pytest.mark.parametrize("passes", [2, 3, 5])
def test_more_passes_fill_from_the_left_what_the_models_own_rule_is_certain_of(rule, threshold, passes) -> None:
    toy, seen = denoiser(rule=rule, threshold=threshold), set()
    for text in prompts(6):
        drafter = open_rows(toy, [text])
        toy.calls.clear()
        (draft,) = drafter.propose([Ask(0, 7, passes=passes)])
        tokens, asked = by_hand(toy, text, 7, passes)
        assert draft.tokens == tokens and [count for _, _, (count,) in toy.calls] == asked
        seen |= {a - b for a, b in pairwise(asked)}
    # runs of one and of more were both met
    assert min(seen) == 1 < max(seen) or passes == 2


def test_nothing_is_drafted_behind_an_end() -> None:
    toy, (text,) = denoiser(), prompts(1)
    (whole,) = open_rows(toy, [text]).propose([Ask(0, 8)])
    end = whole.tokens[2]
    first = whole.tokens.index(end)
    ending = denoiser(stop_tokens=(end,))
    for wishes in ({}, {"passes": 3}, {"sample": True}, {"sample": True, "passes": 3}):
        drafts = [open_rows(ending, [text]).propose([Ask(0, 8, **wishes)])[0].tokens for _ in range(20)]
        assert all(end not in tokens[:-1] for tokens in drafts)
    assert open_rows(ending, [text]).propose([Ask(0, 8)])[0].tokens == whole.tokens[: first + 1]


def test_a_full_context_ends_drafting() -> None:
    toy = denoiser(max_positions=8)
    drafter = open_rows(toy, [[1, 2, 3], [1] * 6, [1] * 8, [1] * 9])
    drafts = drafter.propose([Ask(row, 3) for row in range(4)])
    assert [len(draft.tokens) for draft in drafts] == [3, 2, 0, 0]
    assert drafts[1].tokens == said(toy, [1] * 6, 2).argmax(-1).tolist()
    assert toy.calls[-1] == ("whole", 2, [3, 2])


# sampling


def warp(logits):
    """Temperature 2 and the five best."""
    logits = logits / 2
    return logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf)


# passes, the model's rule, its threshold: how many masks the first pass is certain of, from the first one on
LAWS = {
    "all in one pass": (1, "entropy", 1.5),
    "two of three": (2, "entropy", 1.5),
    "none, so the first": (3, "entropy", 1.3),
    "by confidence": (2, "confidence", 0.32),
    "by number": (3, "top_k", 0.5),
}


@pytest.mark.parametrize("case", LAWS)
def test_each_token_is_a_draw_from_its_q_given_the_tokens_in_front_of_it(case) -> None:
    """q is a function of the drafted prefix alone, and over many seeds the drafts follow the law that the q make."""
    passes, rule, threshold = LAWS[case]
    toy, text, count, rows = denoiser(rule=rule, threshold=threshold), [2, 7, 5], 3, 1500
    drafter = open_rows(toy, [text] * rows)
    drafts = drafter.propose([Ask(row, count, sample=True, warp=warp, passes=passes) for row in range(rows)])
    assert 1 <= len(toy.calls) <= passes
    known, seen = defaultdict(list), Counter(tuple(draft.tokens) for draft in drafts)
    for draft in drafts:
        assert draft.probs is not None and draft.probs.shape == (count, VOCAB) and not draft.probs[:, MASK].any()
        for i, token in enumerate(draft.tokens):
            known[tuple(draft.tokens[:i])].append(draft.probs[i])
            assert draft.confidence[i] == pytest.approx(float(draft.probs[i, token]))
    law = {prefix: qs[0] for prefix, qs in known.items()}
    assert all(torch.equal(q, law[prefix]) for prefix, qs in known.items() for q in qs)
    torch.testing.assert_close(law[()], warp(said(toy, text, BLOCK))[0].softmax(-1))
    # the last one knows of the others where there was a pass behind them
    last = {tuple(q.tolist()) for prefix, q in law.items() if len(prefix) == count - 1}
    assert (len(last) == 1) == (passes == 1)
    expected = {c: rows * math.prod(float(law[c[:i]][t]) for i, t in enumerate(c)) for c in seen}
    common = [cell for cell in seen if expected[cell] >= 5]
    rest = rows - sum(expected[cell] for cell in common)
    observed = [*(seen[cell] for cell in common), rows - sum(seen[cell] for cell in common)]
    assert chisquare(observed, [*(expected[cell] for cell in common), rest], sum_check=False).pvalue > 1e-3


def test_keep_going_ends_a_sampled_draft_and_is_not_asked_of_a_greedy_one() -> None:
    """A greedy block is paid for, whatever is in it; a sampled one may only be cut before it is drawn."""
    drafter, asked = open_rows(denoiser(), prompts(2)), []

    def at_most_two(confidences):
        asked.append(list(confidences))
        return len(confidences) < 2

    sampled, greedy = drafter.propose(
        [Ask(0, 6, sample=True, keep_going=at_most_two), Ask(1, 6, keep_going=at_most_two)]
    )
    assert (len(sampled.tokens), len(sampled.probs), len(greedy.tokens)) == (2, 2, 6)
    assert asked == [sampled.confidence[:1], sampled.confidence]


def test_a_seed_fixes_a_rows_draft_whatever_its_neighbours() -> None:
    def drafted(rows):
        drafter = MaskedDrafter(denoiser(), VOCAB)
        for row, seed in rows.items():
            drafter.open(row, [5, row], seed=seed)
        drafts = drafter.propose([Ask(row, 6, sample=True, passes=2) for row in rows])
        return dict(zip(rows, (draft.tokens for draft in drafts), strict=True))

    alone = drafted({3: 11})
    assert drafted({1: 4, 3: 11, 2: 11})[3] == alone[3] != drafted({3: 12})[3]


def test_rows_are_opened_once_and_closed() -> None:
    drafter = open_rows(denoiser(), [[1], [2]])
    with pytest.raises(AccelError, match="row 1 is already open in the masked drafter"):
        drafter.open(1, [3], seed=0)
    drafter.close(1)
    drafter.open(1, [3], seed=0)
    with pytest.raises(AccelError, match="row 2 is not open"):
        drafter.observe(2, [1])
    assert drafter.state_bytes() == 0


# for a target


@pytest.fixture
def masked(tiny):
    """A masked-diffusion model of the tiny models' vocabulary."""
    return facts_on(tiny.build("qwen2", seed=5))


def facts_on(model, **changes):
    set_facts(model, DiffusionFacts(**{"mask_token": HIDDEN, "block_length": 4} | changes))
    return model


@pytest.mark.parametrize("drafter", ["lm", "auto"])
@pytest.mark.parametrize("options", [{"draft_length": 3}, {"draft_length": 5, "draft_steps": 3}, {}])
def test_greedy_output_is_the_targets(tiny, masked, drafter, options) -> None:
    target, inputs = tiny.build("llama"), tiny.prompts(4) | {"max_new_tokens": 20}
    out = accel.generate(target, artifacts=[masked], drafter=drafter, **options, **inputs)
    stats = accel.stats(target)
    assert stats.method == "speculative" and stats.lossless and (stats.drafted_tokens > 0 or not options)
    tiny.assert_similar(out, tiny.reference(target, **inputs))


def test_it_may_assist_a_single_call(tiny, masked) -> None:
    target, inputs = tiny.build("llama"), tiny.prompts(2) | {"max_new_tokens": 12}
    accel.attach(target, method="plain")
    out = target.generate(**inputs, assistant_model=masked, num_assistant_tokens=4)
    assert accel.stats(target).drafted_tokens > 0
    tiny.assert_similar(out, tiny.reference(target, **inputs))


class Foreteller:
    """In a denoiser's place: it knows what the target will say, and says something else at every ``wrong``-th place."""

    def __init__(self, target, wrong=10**6, **facts) -> None:
        self.facts = DiffusionFacts(**{"mask_token": HIDDEN, "block_length": 4} | facts)
        self.target, self.wrong, self.max_positions, self.linears = target, wrong, None, torch.nn.Module()
        self.vocab_size, self.calls = target.config.vocab_size, 0

    def logits(self, rows, at):
        self.calls += 1
        return [self.foretold(row[: int(places[0])], len(places)) for row, places in zip(rows, at, strict=True)]

    def foretold(self, text, count):
        settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": -1}
        new = type(self.target).generate(self.target, text[None], **settings)[0, len(text) :]
        is_wrong = torch.arange(len(text), len(text) + count) % self.wrong == self.wrong - 1
        return 30.0 * torch.nn.functional.one_hot(new + is_wrong, self.vocab_size)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("gamma", [1, 3, 6])
def test_one_that_foretells_the_target_gives_a_whole_block_a_forward(tiny, gamma, sampled) -> None:
    target, rounds = tiny.build("llama"), 5
    oracle = Foreteller(target)
    # a temperature at which the target too says one thing only
    how = {"do_sample": True, "temperature": 1e-4, "top_k": 0} if sampled else {"do_sample": False}
    prompt = tiny.prompts(1) | {"max_new_tokens": 1 + rounds * (gamma + 1), "eos_token_id": -1}
    options = {"drafter": "lm", "draft_length": gamma}
    out = accel.generate(target, artifacts=[MaskedDrafter(oracle, 67)], **options, **prompt, **how)
    stats = accel.stats(target)
    assert (stats.target_calls, oracle.calls) == (rounds, rounds)
    assert stats.mean_accepted_length == gamma + 1 and stats.acceptance_rate == 1.0
    assert torch.equal(out, accel.generate(target, method="plain", **prompt, do_sample=False))


def test_steps_are_passes_of_the_draft_a_round(tiny) -> None:
    target = tiny.build("llama")
    oracle = Foreteller(target, rule="top_k")
    prompt = tiny.prompts(1) | {"max_new_tokens": 1 + 2 * 7, "eos_token_id": -1}
    accel.generate(target, artifacts=[MaskedDrafter(oracle, 67)], drafter="lm", draft_length=6, draft_steps=3, **prompt)
    assert (accel.stats(target).target_calls, oracle.calls) == (2, 6)


def test_rows_that_end_inside_a_block(tiny) -> None:
    target = tiny.build("llama")
    inputs = tiny.prompts(3) | {"max_new_tokens": 24}
    whole = accel.generate(target, method="plain", **inputs, eos_token_id=-1)
    end = int(whole[0, 9 + 5])
    expected = accel.generate(target, method="plain", **inputs, eos_token_id=end)
    drafter = MaskedDrafter(Foreteller(target, stop_tokens=(end,)), 67)
    out = accel.generate(target, artifacts=[drafter], drafter="lm", draft_length=8, **inputs, eos_token_id=end)
    assert torch.equal(out, expected)
    stats = accel.stats(target)
    # but for what the target adds behind a drafted end, which is taken back
    assert stats.drafted_tokens - stats.accepted_tokens <= 3


def test_a_block_costs_the_same_however_long(tiny) -> None:
    """One that is right half of the way: long drafts are cut to what promises most, and none is paid by its length."""
    target = tiny.build("llama")
    drafter = MaskedDrafter(Foreteller(target, wrong=5), 67)
    accel.attach(target, drafter, drafter="lm")
    inputs = tiny.prompts(1) | {"max_new_tokens": 40, "eos_token_id": -1}
    for _ in range(2):
        target.generate(**inputs)
    (speculator,) = target.__dict__["_accel_attached"]._speculators.values()
    costs = speculator.costs
    assert costs.at_once and costs.knows_draft and costs.drafting(1) == costs.drafting(16) > 0
    assert accel.stats(target).cost_ratio > 0


# what does not fit


def test_a_mask_token_of_its_own_is_the_one_token_more_that_a_draft_may_have(tiny) -> None:
    target = tiny.build("llama")
    wider = facts_on(tiny.build("llama", seed=5, vocab_size=68), mask_token=67)
    drafter = MaskedDrafter(Denoiser(wider, DiffusionFacts(mask_token=67)), 67)
    drafter.open(0, [3, 4], seed=0)
    (draft,) = drafter.propose([Ask(0, 4, sample=True)])
    assert draft.probs.shape == (4, 67)
    inputs = tiny.prompts(2) | {"max_new_tokens": 10}
    out = accel.generate(target, artifacts=[wider], drafter="lm", draft_length=3, **inputs)
    tiny.assert_similar(out, tiny.reference(target, **inputs))
    for size, mask in ((68, 66), (69, 68), (66, 65)):
        other = facts_on(tiny.build("llama", seed=5, vocab_size=size), mask_token=mask)
        message = refusal(lambda model=other: accel.attach(target, model))
        assert f"a vocabulary of {size} and the target of 67" in message and "not translated" in message


def test_another_tokenizer_is_refused(tiny, masked) -> None:
    """Told by the tokens that both name: a token that one leaves unnamed is no difference, nor is the mask."""
    target = tiny.build("llama", vocab_size=257)
    draft = facts_on(tiny.build("llama", seed=5, vocab_size=257), mask_token=200)
    ours, theirs = byte_tokenizer(), byte_tokenizer()
    assert accel.attach(target, draft, tokenizer=ours, draft_tokenizer=theirs)
    state = json.loads(theirs.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    turned = {word: {40: 41, 41: 40}.get(id, id) for word, id in words.items()}
    state["model"]["vocab"] = turned
    other = type(ours)(tokenizer_object=type(ours.backend_tokenizer).from_str(json.dumps(state)), eos_token="</s>")
    message = refusal(lambda: accel.attach(target, draft, tokenizer=ours, draft_tokenizer=other))
    assert "another tokenizer" in message and "token 40" in message
    fewer = {word: id for word, id in words.items() if id < 150}
    state["model"]["vocab"] = fewer
    shorter = type(ours)(tokenizer_object=type(ours.backend_tokenizer).from_str(json.dumps(state)), eos_token="</s>")
    assert accel.attach(target, draft, tokenizer=ours, draft_tokenizer=shorter)
    # nor need anything be known of one of the two
    assert accel.attach(target, draft, draft_tokenizer=other)


def test_steps_are_a_masked_drafts_alone(tiny, masked) -> None:
    target, lm = tiny.build("llama"), tiny.build("llama", seed=5)
    for artifacts, options in (([], {}), ([lm], {}), ([masked], {"drafter": "suffix"})):
        message = refusal(lambda a=artifacts, o=options: accel.attach(target, *a, draft_steps=2, **o))
        assert "draft_steps=2" in message and "masked-diffusion" in message
    assert "draft_steps=0" in refusal(lambda: accel.attach(target, masked, draft_steps=0))
    accel.attach(target, masked, draft_steps=2)
    inputs = tiny.prompts(1) | {"max_new_tokens": 8}
    # a call with a draft of its own leaves them to the attached one
    tiny.assert_similar(target.generate(**inputs, assistant_model=lm), tiny.reference(target, **inputs))


def test_masked_targets_take_no_draft_still(tiny, masked) -> None:
    assert "a draft" in refusal(lambda: accel.attach(masked, facts_on(tiny.build("llama", seed=6))))


# from folders


@pytest.fixture
def folders(tmp_path):
    """A causal byte model and a masked-diffusion one with the same tokenizer."""
    causal = save_byte_llama(tmp_path / "causal", max_position_embeddings=128)
    masked = facts_on(byte_llama(max_position_embeddings=128, initializer_range=0.2), mask_token=256, stop_tokens=(0,))
    masked.save_pretrained(tmp_path / "masked")
    byte_tokenizer().save_pretrained(tmp_path / "masked")
    return str(causal), str(tmp_path / "masked")


def test_the_command_line(folders) -> None:
    causal, masked = folders

    def run(*arguments):
        return CliRunner().invoke(main, ["generate", "-m", causal, "ab", "--max-new-tokens", "12", *arguments])

    plain = run("--method", "plain", "--json")
    drafted = run("-a", masked, "-o", "drafter=lm", "-o", "draft_length=3", "--json")
    assert drafted.exit_code == 0, drafted.output
    found, expected = json.loads(drafted.stdout), json.loads(plain.stdout)
    assert found["text"] == expected["text"] and found["stats"]["drafted_tokens"] > 0
    assert "drafted tokens accepted" in run("-a", masked, "-o", "drafter=lm", "-o", "draft_length=3", "--stats").stderr
    assert run("-a", masked, "--temperature", "1", "--seed", "3").exit_code == 0


def test_bench_gives_it_to_accel_alone(folders) -> None:
    causal, masked = folders
    target = accel.load(causal).model
    accel.detach(target)
    draft = find_draft(masked, target)
    assert draft.assistant is None and "masked-diffusion" in draft.reason
    accel.attach(target, draft.artifact, drafter="lm")
    assert isinstance(target.__dict__["_accel_attached"].draft, MaskedDrafter)
    small = find_draft(causal, target)
    assert small.assistant is not None
    accel.attach(target, small.artifact, drafter="lm")
    assert isinstance(target.__dict__["_accel_attached"].draft, SmallLMDrafter)
