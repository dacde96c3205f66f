"""The small-LM drafter against the draft model itself, run from scratch on the row's whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from accel.drafters.base import Ask, Drafter
from accel.drafters.small_lm import SmallLMDrafter, VocabularyMap
from accel.errors import AccelError, IncompatibleError

VOCAB, MAX_POSITIONS = 23, 64
# ids of a trimmed draft vocabulary in the target's, in no order
D2T = [7, 3, 40, 11, 5, 29, 0, 18, 33, 2, 45, 21, 9, 14, 27, 36, 48, 1, 12, 30, 25, 6, 41]
TARGET_VOCAB = 50


def tiny(vocab=VOCAB, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        # wide enough that the next token depends on the whole context and not on the last token alone
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


MODEL = tiny()


@torch.no_grad()
def logits_after(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()


def greedy(tokens, count, model=MODEL):
    grown = list(tokens)
    for _ in range(count):
        grown.append(int(logits_after(model, grown).argmax()))
    return grown[len(tokens) :]


def mapped(unknown=4):
    return VocabularyMap(torch.tensor(D2T), unknown, TARGET_VOCAB)


def test_fulfils_the_protocol():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    assert isinstance(drafter, Drafter)
    assert not drafter.free


# greedy drafts

PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
# per row and round: (asks?, tokens asked for, drafted tokens that come true, final tokens after these)
MOVE = st.tuples(
    st.booleans(), st.integers(1, 4), st.integers(0, 4), st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=2)
)


@given(st.lists(PROMPT, min_size=1, max_size=3), st.lists(st.tuples(MOVE, MOVE, MOVE), max_size=6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_greedy_drafts_are_the_models_own_continuation_after_any_outcome(prompts, rounds):
    drafter = SmallLMDrafter(MODEL, VOCAB)
    texts = [list(prompt) for prompt in prompts]
    for row, text in enumerate(texts):
        drafter.open(row, text, seed=row)
    for moves in rounds:
        asking = [row for row in range(len(texts)) if moves[row][0]]
        drafts = dict(zip(asking, drafter.propose([Ask(row, moves[row][1]) for row in asking]), strict=True))
        for row, text in enumerate(texts):
            _, count, kept, more = moves[row]
            proposed = []
            if row in drafts:
                proposed = drafts[row].tokens
                assert proposed == greedy(text, count)
                assert drafts[row].probs is None
                assert len(drafts[row].confidence) == count
            # a target always adds a token of its own, which may be the one that was drafted
            final = [*proposed[:kept], *more] or [text[0]]
            drafter.observe(row, final)
            text += final


def test_a_row_whose_trimmed_draft_came_true_drafts_on():
    """The caller verified one of four drafted tokens and drew the second itself: all it observes was read already."""
    drafter = SmallLMDrafter(MODEL, VOCAB)
    drafter.open(0, [1, 2, 3], seed=0)
    drafted = drafter.propose([Ask(0, 4)])[0].tokens
    drafter.observe(0, drafted[:2])
    assert drafter.propose([Ask(0, 3)])[0].tokens == greedy([1, 2, 3, *drafted[:2]], 3)


def test_rows_pause_close_and_reopen_without_disturbing_each_other():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    texts = {0: [1, 2, 3, 4, 5, 6, 7], 1: [9], 2: [5, 5]}
    for row, text in texts.items():
        drafter.open(row, text, seed=0)
    drafter.propose([Ask(row, 4) for row in texts])
    for row, text in texts.items():
        drafter.observe(row, [8])
        text.append(8)
    for token in (4, 6, 1, 2):  # row 0 sits out
        drafts = drafter.propose([Ask(2, 3), Ask(1, 2)])
        assert [d.tokens for d in drafts] == [greedy(texts[2], 3), greedy(texts[1], 2)]
        for row in texts:
            drafter.observe(row, [token])
            texts[row].append(token)
    drafter.close(1)
    drafter.open(1, [3, 3], seed=0)
    texts[1] = [3, 3]
    drafts = drafter.propose([Ask(1, 3), Ask(0, 5), Ask(2, 1)])
    assert [d.tokens for d in drafts] == [greedy(texts[1], 3), greedy(texts[0], 5), greedy(texts[2], 1)]
    with pytest.raises(AccelError, match="row 1 is open already"):
        drafter.open(1, [1], seed=0)


def test_confidence_is_the_models_probability_of_each_token():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    drafter.open(0, [4, 8], seed=0)
    draft = drafter.propose([Ask(0, 3)])[0]
    expected = [
        float(logits_after(MODEL, [4, 8, *draft.tokens[:i]]).softmax(-1)[token]) for i, token in enumerate(draft.tokens)
    ]
    assert draft.confidence == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("trimmed", [False, True])
def test_others_that_a_token_might_be_are_the_models_next_best(trimmed):
    drafter = SmallLMDrafter(MODEL, TARGET_VOCAB, mapped()) if trimmed else SmallLMDrafter(MODEL, VOCAB)
    prompt = [1, 5, 9]
    drafter.open(0, [D2T[token] for token in prompt] if trimmed else prompt, seed=0)
    draft = drafter.propose([Ask(0, 2, beside=3)])[0]
    text = list(prompt)
    for depth in range(2):
        best = logits_after(MODEL, text).softmax(-1).topk(4)
        names = [D2T[token] if trimmed else token for token in best.indices.tolist()]
        others = [each for each in draft.beside if each.depth == depth]
        assert (draft.tokens[depth], [each.token for each in others]) == (names[0], names[1:])
        found = [draft.confidence[depth], *(each.confidence for each in others)]
        torch.testing.assert_close(torch.tensor(found), best.values, rtol=1e-4, atol=1e-6)
        text.append(int(best.indices[0]))
    assert not drafter.propose([Ask(0, 2)])[0].beside
    drafter.close(0)


def test_keep_going_ends_a_rows_draft_alone():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    drafter.open(0, [4, 8], seed=0)
    drafter.open(1, [2], seed=0)
    seen = []

    def at_most_two(confidences):
        seen.append(list(confidences))
        return len(confidences) < 2

    short, long = drafter.propose([Ask(0, 6, keep_going=at_most_two), Ask(1, 4)])
    assert short.tokens == greedy([4, 8], 2)
    assert long.tokens == greedy([2], 4)
    assert [len(s) for s in seen] == [1, 2]
    assert seen[-1] == short.confidence


def test_drafts_stay_inside_the_drafts_context():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    drafter.open(0, [1] * (MAX_POSITIONS - 3), seed=0)
    drafter.open(1, [1], seed=0)
    drafter.open(2, [1] * (MAX_POSITIONS + 5), seed=0)
    near, roomy, full = drafter.propose([Ask(row, 5) for row in range(3)])
    assert near.tokens == greedy([1] * (MAX_POSITIONS - 3), 3)
    assert roomy.tokens == greedy([1], 5)
    assert full.tokens == [] and full.confidence == [] and full.probs is None
    drafter.observe(0, [2, 2, 2])
    assert drafter.propose([Ask(0, 5)])[0].tokens == []


def test_an_empty_row_drafts_nothing():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    drafter.open(0, [], seed=0)
    drafter.open(1, [6], seed=0)
    empty, other = drafter.propose([Ask(0, 2), Ask(1, 2)])
    assert empty.tokens == []
    assert other.tokens == greedy([6], 2)
    drafter.observe(0, [3])
    assert drafter.propose([Ask(0, 2)])[0].tokens == greedy([3], 2)


def test_nothing_is_kept_of_closed_rows():
    drafter = SmallLMDrafter(MODEL, VOCAB)
    for row in range(3):
        drafter.open(row, [1, 2, 3], seed=0)
    drafter.propose([Ask(row, 4) for row in range(3)])
    full = drafter.state_bytes()
    drafter.close(1)
    assert 0 < drafter.state_bytes() < full
    drafter.close(0)
    drafter.close(2)
    assert drafter.state_bytes() == 0


# sampled drafts


def warp(logits):
    """Temperature 0.7 and the five best: what a row's own settings might be."""
    logits = logits / 0.7
    return logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf)


@pytest.mark.parametrize("given_warp", [None, warp])
def test_probs_are_the_warped_softmax_that_the_tokens_were_drawn_from(given_warp):
    drafter = SmallLMDrafter(MODEL, VOCAB)
    text = [3, 1, 4, 1, 5]
    drafter.open(0, text, seed=7)
    for _ in range(4):
        draft = drafter.propose([Ask(0, 4, sample=True, warp=given_warp)])[0]
        assert draft.probs is not None and draft.probs.shape == (4, VOCAB)
        for i, token in enumerate(draft.tokens):
            logits = logits_after(MODEL, text + draft.tokens[:i])
            expected = (given_warp(logits[None])[0] if given_warp else logits).softmax(-1)
            torch.testing.assert_close(draft.probs[i], expected, rtol=1e-4, atol=1e-6)
            assert draft.confidence[i] == pytest.approx(float(draft.probs[i, token]))
        drafter.observe(0, [*draft.tokens[:2], 6])
        text += [*draft.tokens[:2], 6]


def pairs_of(drafter, rows, prompt):
    """How often each pair of tokens was drafted, over one fresh row a seed."""
    counts = torch.zeros(VOCAB, VOCAB)
    for row in range(rows):
        drafter.open(row, prompt, seed=row)
    for draft in drafter.propose([Ask(row, 2, sample=True, warp=warp) for row in range(rows)]):
        counts[draft.tokens[0], draft.tokens[1]] += 1
    return counts


def test_sampled_tokens_follow_their_distribution():
    """Chi-square of the joint distribution of two drafted tokens against exact enumeration."""
    rows, prompt = 3000, [2, 7]
    counts = pairs_of(SmallLMDrafter(MODEL, VOCAB), rows, prompt)
    first = warp(logits_after(MODEL, prompt)[None])[0].softmax(-1)
    then = torch.stack([warp(logits_after(MODEL, [*prompt, t])[None])[0].softmax(-1) for t in range(VOCAB)])
    expected = (first[:, None] * then).double()
    assert counts[expected == 0].sum() == 0
    common = expected * rows >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*(expected[common] * rows).tolist(), float(expected[~common].sum() * rows)]
    assert chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_a_seed_fixes_a_rows_draft_whatever_its_neighbours():
    def drafted(rows):
        drafter = SmallLMDrafter(MODEL, VOCAB)
        for row, seed in rows.items():
            drafter.open(row, [5, row], seed=seed)
        drafts = drafter.propose([Ask(row, 5, sample=True) for row in rows])
        return dict(zip(rows, (d.tokens for d in drafts), strict=True))

    alone = drafted({3: 11})
    assert drafted({1: 4, 3: 11, 2: 11})[3] == alone[3]
    assert drafted({3: 12})[3] != alone[3]


# a trimmed vocabulary


def translated(tokens, unknown=4):
    """What the draft model reads: its own id of each target id, ``unknown`` where it has none."""
    return [D2T.index(t) if t in D2T else unknown for t in tokens]


def test_a_trimmed_vocabulary_reads_and_writes_target_ids():
    drafter = SmallLMDrafter(MODEL, TARGET_VOCAB, mapped())
    text = [7, 44, 3, 49, 21]  # the draft knows neither 44 nor 49
    drafter.open(0, text, seed=0)
    for _ in range(3):
        draft = drafter.propose([Ask(0, 4)])[0]
        assert draft.tokens == [D2T[i] for i in greedy(translated(text), 4)]
        final = [draft.tokens[0], 44]
        drafter.observe(0, final)
        text += final


def test_a_trimmed_vocabulary_samples_in_the_targets():
    drafter = SmallLMDrafter(MODEL, TARGET_VOCAB, mapped())
    text = [7, 44, 3]
    drafter.open(0, text, seed=0)
    draft = drafter.propose([Ask(0, 6, sample=True)])[0]
    assert draft.probs is not None and draft.probs.shape == (6, TARGET_VOCAB)
    outside = [t for t in range(TARGET_VOCAB) if t not in D2T]
    assert (draft.probs[:, outside] == 0).all()
    assert set(draft.tokens) <= set(D2T)
    for i in range(6):
        own = logits_after(MODEL, translated(text + draft.tokens[:i])).softmax(-1)
        torch.testing.assert_close(draft.probs[i, D2T], own, rtol=1e-4, atol=1e-6)


def test_the_warp_of_a_trimmed_vocabulary_sees_the_targets_ids():
    """A warper that forbids target ids must find them at their own places."""

    def forbid(logits):
        assert logits.shape == (1, TARGET_VOCAB)
        return logits.index_fill(1, torch.tensor(D2T[:-1]), -torch.inf)

    drafter = SmallLMDrafter(MODEL, TARGET_VOCAB, mapped())
    drafter.open(0, [7], seed=0)
    assert drafter.propose([Ask(0, 3, sample=True, warp=forbid, names_tokens=True)])[0].tokens == [D2T[-1]] * 3


def test_other_warps_see_the_drafts_own_vocabulary_to_the_same_effect():
    def probs(**how):
        drafter = SmallLMDrafter(MODEL, TARGET_VOCAB, mapped())
        drafter.open(0, [7, 3], seed=0)
        draft = drafter.propose([Ask(0, 1, sample=True, warp=warp, **how)])[0]
        assert draft.confidence[0] == pytest.approx(float(draft.probs[0, draft.tokens[0]]))
        return draft.probs

    torch.testing.assert_close(probs(), probs(names_tokens=True))


def test_unfitting_vocabularies_are_refused_in_one_line():
    with pytest.raises(IncompatibleError, match=r"vocabulary of 23 and the target of 50: .*tokenizer") as refused:
        SmallLMDrafter(MODEL, TARGET_VOCAB)
    assert "\n" not in str(refused.value)
    with pytest.raises(IncompatibleError, match="vocabulary of 23"):
        SmallLMDrafter(MODEL, TARGET_VOCAB, VocabularyMap(torch.tensor(D2T[:-1]), 0, TARGET_VOCAB))
    with pytest.raises(IncompatibleError, match="at most once"):
        VocabularyMap(torch.tensor([1, 1]), 0, TARGET_VOCAB)
    with pytest.raises(IncompatibleError, match="up to 48, but the target's vocabulary has 40"):
        VocabularyMap(torch.tensor(D2T), 0, 40)
    with pytest.raises(IncompatibleError, match="unknown=23 is no draft id"):
        mapped(unknown=23)
