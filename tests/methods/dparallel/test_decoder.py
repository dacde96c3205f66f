"""The decoder against a loop over single candidates, and against itself: alone, batched, cut short, cached."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import toy_denoiser
from masked_loop import one_by_one
from refusals import refusal
from transformers.generation import logits_process as hf

from accel.kernels.unmask import certainty
from accel.methods.dparallel.decoder import DParallelDecoder
from accel.methods.dparallel.options import DParallelOptions
from accel.sampling import LogitsPipeline
from accel.types import Request, Stats


@pytest.fixture
def toys():
    return toy_denoiser


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("rule", "threshold"), [("entropy", 0.8), ("entropy", 1.2), ("confidence", 0.6)])
def test_rows_follow_the_loop(toys, rule, threshold, strict) -> None:
    denoiser = toys.denoiser(rule=rule, threshold=threshold, strict=strict)
    prompts = toys.prompts(5)
    made = toys.run(denoiser, {}, prompts, 12)
    plan = {"mask": toys.MASK, "block": 4, "rule": rule, "threshold": threshold, "strict": strict}
    expected = [one_by_one(denoiser.of, prompt, 12, **plan) for prompt in prompts]
    assert made.new == [tokens for tokens, _ in expected]
    forwards = [count for _, count in expected]
    # neither one token a forward nor one forward a block, or the test would say nothing of the rule
    assert 5 * 3 < sum(forwards) < 5 * 12 and len(set(forwards)) > 1
    assert (made.stats.target_calls, made.stats.row_calls) == (max(forwards), sum(forwards))
    assert made.stats.tokens_per_forward == 60 / max(forwards)


class Uniform:
    """Position p is uniform over p + 1 tokens, whatever stands around it: H = ln(p + 1), probability 1 / (p + 1)."""

    def __init__(self, denoiser) -> None:
        self.facts, self.device, self.max_positions, self.supports_cache = denoiser.facts, denoiser.device, None, True
        self.calls = []

    def logits(self, rows, at):
        self.calls.append([positions.tolist() for positions in at])
        tokens = torch.arange(11)
        return [torch.where(tokens <= p[:, None], 0.0, -torch.inf) for p in at]


@pytest.mark.parametrize(("rule", "exactly"), [("entropy", math.log(3)), ("confidence", 1 / 3)])
@pytest.mark.parametrize("strict", [False, True])
def test_strictness_is_seen_where_a_position_is_exactly_at_the_threshold(toys, rule, exactly, strict) -> None:
    # to the last bit what the kernel says of such a position
    threshold = float(getattr(certainty(torch.zeros(1, 3)), "probability" if rule == "confidence" else rule))
    assert threshold == pytest.approx(exactly)
    toy = Uniform(toys.denoiser(rule=rule, threshold=threshold, strict=strict))
    toys.run(toy, {}, [[0]], 4)
    # positions 1 to 4; 2 is the one at the threshold, and 1 passes as the most certain one anyway
    assert toy.calls[:2] == [[[1, 2, 3, 4]], [[2, 3, 4] if strict else [3, 4]]]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_ends_of_the_threshold(toys, cache) -> None:
    one_by_one = toys.run(toys.denoiser(), {"threshold": -1, "cache": cache}, toys.prompts(1), 12)
    assert one_by_one.stats.target_calls == 12 and one_by_one.stats.tokens_per_forward == 1
    at_once = toys.run(toys.denoiser(), {"threshold": math.inf, "cache": cache}, toys.prompts(1), 12)
    assert at_once.stats.target_calls == 3 and at_once.stats.tokens_per_forward == 4
    for probability, forwards in ((2, 12), (0, 3)):
        options = {"rule": "confidence", "threshold": probability, "cache": cache}
        assert toys.run(toys.denoiser(), options, toys.prompts(1), 12).stats.target_calls == forwards


@pytest.mark.parametrize(("steps", "asked"), [(None, [4, 3, 2, 1]), (1, [4]), (3, [4, 2, 1]), (9, [4, 3, 2, 1])])
@pytest.mark.parametrize("rule", ["top_k", "top_k_entropy"])
def test_counting_rules_fill_in_a_number_of_forwards(toys, rule, steps, asked) -> None:
    made = toys.run(toys.denoiser(), {"rule": rule, "steps": steps}, toys.prompts(1), 8)
    assert [call[2] for call in made.calls] == [[n] for n in asked * 2]


def test_top_k_takes_the_most_probable(toys) -> None:
    """One a forward, they are the rules with thresholds that nothing passes; and the two differ."""

    def made(**options):
        return [toys.run(toys.denoiser(seed, peak=1.0), options, toys.prompts(5), 12).new for seed in range(4)]

    assert made(rule="top_k") == made(rule="confidence", threshold=2)
    assert made(rule="top_k_entropy") == made(rule="entropy", threshold=-1)
    assert made(rule="top_k") != made(rule="top_k_entropy")


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("max_rows", [None, 2])
def test_a_batch_is_its_rows_alone(toys, cache, sampled, max_rows) -> None:
    prompts, options = toys.prompts(5), {"threshold": 0.8, "cache": cache}
    changes = {"do_sample": sampled, "eos": 3}
    if sampled:
        changes["pipeline"] = LogitsPipeline([hf.TemperatureLogitsWarper(1.3), hf.TopPLogitsWarper(0.9)])
    together = toys.run(toys.denoiser(), options, prompts, 16, max_rows=max_rows, **changes)
    alone = [
        toys.run(toys.denoiser(), options, [prompt], 16, seeds=[100 + i], **changes) for i, prompt in enumerate(prompts)
    ]
    assert together.new == [each.new[0] for each in alone]
    assert len({tuple(tokens) for tokens in together.new}) == 5
    # rows moved at their own pace, and finished on their own
    assert together.stats.row_calls == sum(each.stats.row_calls for each in alone)
    assert len({each.stats.target_calls for each in alone}) > 1 and len({len(new) for new in together.new}) > 1
    if cache == "none" and max_rows is None:
        assert together.stats.target_calls == max(each.stats.target_calls for each in alone)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_is_read_in_one_forward_for_all_rows(toys, cache) -> None:
    denoiser = toys.denoiser()
    made = toys.run(denoiser, {"threshold": 0.8, "cache": cache}, toys.prompts(5), 16)
    assert denoiser.duals == {cache == "dual"}
    hows = [how for how, _, _ in made.calls]
    # never two of a kind in one step: a step is a cached forward, an opening one, or both in this order
    steps = sum(1 for a, b in itertools.pairwise([*hows, "open"]) if not (a == "cached" and b == "open"))
    assert len(hows) == made.stats.target_calls and steps < len(hows)
    assert sum(rows for how, rows, _ in made.calls if how == "open") == 5 * 4  # rows times blocks
    assert made.stats.state_bytes > 0 and not made.stats.lossless
    assert [note for note in made.stats.notes if "approximate" in note and f"cache='{cache}'" in note]


def test_what_a_cache_approximates(toys) -> None:
    """Nothing while a block is filled at once; everything behind its first forward otherwise."""

    def made(**options):
        return [toys.run(toys.denoiser(seed, peak=4.0), options, toys.prompts(5), 16).new for seed in range(4)]

    for threshold, same in ((math.inf, True), (-1, False)):
        exact = made(threshold=threshold)
        assert [made(threshold=threshold, cache=cache) == exact for cache in ("prefix", "dual")] == [same, same]
    # in the last block nothing is masked behind it: both caches keep the same
    made = {
        cache: toys.run(toys.denoiser(), {"threshold": 0.8, "cache": cache}, toys.prompts(4), 4).new
        for cache in ("prefix", "dual")
    }
    assert made["prefix"] == made["dual"]
    assert toys.run(toys.denoiser(), {}, toys.prompts(1), 4).stats.state_bytes == 0


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("sampled", [False, True])
def test_stopping_early_keeps_the_text(toys, cache, sampled) -> None:
    prompts = toys.prompts(5)
    changes = {"do_sample": sampled, "eos": 3}
    options = {"threshold": 0.8, "cache": cache}
    early = toys.run(toys.denoiser(), options, prompts, 16, **changes)
    whole = toys.run(toys.denoiser(), options | {"early_stop": False}, prompts, 16, **changes)
    endless = toys.run(toys.denoiser(), options, prompts, 16, do_sample=sampled)
    assert early.new == whole.new
    assert early.new == [new[: new.index(3) + 1] if 3 in new else new for new in endless.new]
    assert any(len(new) < 12 for new in early.new) and any(3 in new[:-1] for new in endless.new)
    assert whole.stats.target_calls == endless.stats.target_calls
    assert early.stats.row_calls < whole.stats.row_calls
    # what follows the end is no output
    assert early.stats.generated_tokens == whole.stats.generated_tokens < 5 * 16


def test_tokens_come_as_soon_as_no_mask_stands_before_them(toys) -> None:
    prompts = toys.prompts(1)
    made = toys.run(toys.denoiser(), {"threshold": -1}, prompts, 12)
    pieces = [chunk.tokens for chunk in made.chunks]
    assert [chunk.finished for chunk in made.chunks] == [False] * (len(pieces) - 1) + [True]
    assert all(pieces) and 3 < len(pieces) < 12  # some settle at once, some wait for what stands before them
    at_the_end = toys.run(toys.denoiser(), {"threshold": -1, "early_stop": False}, prompts, 12)
    assert [chunk.tokens for chunk in at_the_end.chunks] == made.new


def test_a_length_that_blocks_do_not_divide_is_cut_from_whole_blocks(toys) -> None:
    prompts = toys.prompts(3)
    long = toys.run(toys.denoiser(), {}, prompts, 12)
    short = toys.run(toys.denoiser(), {}, prompts, 9)
    assert short.new == [new[:9] for new in long.new]
    assert short.stats.generated_tokens == 27
    # whoever drives the decoder: the rest of the canvas is not handed out at all
    decoder, prompt = DParallelDecoder(toys.denoiser(), DParallelOptions(), Stats()), torch.tensor(prompts[0])
    decoder.admit([Request(id=0, prompt=prompt, max_new_tokens=9, history=prompt)])
    handed_out = [emission.tokens for _ in range(20) for emission in decoder.step()]
    assert [token for tokens in handed_out for token in tokens] == short.new[0]
    # and a row that is done costs no forward
    assert decoder.stats.target_calls <= 12


def test_the_mask_is_never_filled_in(toys) -> None:
    denoiser = toys.denoiser()
    denoiser.bias[:, toys.MASK] += 100.0  # its own favourite
    for changes in ({}, {"do_sample": True}, {"pipeline": LogitsPipeline([hf.TopKLogitsWarper(1)])}):
        made = toys.run(denoiser, {"threshold": 0.5}, toys.prompts(3), 8, **changes)
        assert not any(toys.MASK in new for new in made.new)
        assert made.stats.target_calls <= 8
    # truncation counts what can be chosen: the best one of the others, and no mask
    assert made.new == toys.run(denoiser, {"threshold": math.inf}, toys.prompts(3), 8).new


def test_gaps_in_a_prompt_are_filled_first_and_handed_out_once(toys) -> None:
    M = toys.MASK
    prompts = [[1, M, 2, M, M, 5, M, 7, M, 4], [3, 4, 5]]
    made = toys.run(toys.denoiser(), {"threshold": -1}, prompts, 8)
    gaps = [i for i, t in enumerate(prompts[0]) if t == M]
    assert [t for i, t in enumerate(made.prompts[0]) if i not in gaps] == [1, 2, 5, 7, 4]
    assert M not in made.prompts[0] and made.prompts[1] == prompts[1]
    assert [len(c.tokens) for c in made.chunks if c.prompt] == [len(next(c for c in made.chunks if c.prompt).tokens)]
    # four gaps are a block, the fifth is one of its own, then come the canvas's two blocks
    assert [call[2][0] for call in made.calls] == [4, 3, 2, 1, 1, 4, 3, 2, 1, 4, 3, 2, 1]
    assert [len(new) for new in made.new] == [8, 8]
    # and from then on the row is one whose prompt had none
    assert toys.run(toys.denoiser(), {"threshold": -1}, [made.prompts[0]], 8).new[0] == made.new[0]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_gaps_with_a_cache(toys, cache) -> None:
    M = toys.MASK
    prompts = [[1, M, 2, M, M, 5, M, 7, M, 4]]
    exact = toys.run(toys.denoiser(), {"threshold": math.inf}, prompts, 8)
    cached = toys.run(toys.denoiser(), {"threshold": math.inf, "cache": cache}, prompts, 8)
    assert (cached.new, cached.prompts) == (exact.new, exact.prompts)
    assert M not in toys.run(toys.denoiser(), {"threshold": -1, "cache": cache}, prompts, 8).prompts[0]


def test_draws_follow_the_conditional_distributions(toys) -> None:
    """Two tokens, one a forward: the pair's law is the product of what the two forwards say, chi-square at 1e-4."""
    from scipy.stats import chisquare

    denoiser, prompt = toys.denoiser(peak=0.7, block_length=2), [1, 2]
    warpers = LogitsPipeline([hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(4)])

    def law(row: list[int], position: int):
        x = denoiser.of(torch.tensor(row))[position].clone()
        x[toys.MASK] = -torch.inf
        return warpers.warp(x[None])[0].double().softmax(-1)

    M = toys.MASK
    first_laws = [law([*prompt, M, M], 2), law([*prompt, M, M], 3)]
    entropy = [float(-(p[p > 0] * p[p > 0].log()).sum()) for p in first_laws]
    first = entropy.index(min(entropy))  # the more certain position goes first, whatever was drawn there
    expected = torch.zeros(toys.VOCAB, toys.VOCAB, dtype=torch.float64)
    for token in range(toys.VOCAB):
        row = [*prompt, M, M]
        row[2 + first] = token
        other = first_laws[first][token] * law(row, 3 - first)
        expected[token if first == 0 else slice(None), slice(None) if first == 0 else token] = other
    draws = 2000
    made = toys.run(
        denoiser, {"threshold": -1}, [prompt] * draws, 2, do_sample=True, pipeline=warpers, seeds=range(draws)
    )
    counts = torch.zeros_like(expected)
    for a, b in made.new:
        counts[a, b] += 1
    possible = expected > 0
    assert not counts[~possible].any() and int(possible.sum()) == 16
    assert chisquare(counts[possible], draws * expected[possible] / expected.sum()).pvalue > 1e-4


def test_a_draw_depends_on_seed_and_place_alone(toys) -> None:
    prompts = toys.prompts(2)
    runs = [
        toys.run(toys.denoiser(), {"threshold": t}, prompts, 8, do_sample=True, seeds=[5, s]).new
        for t, s in ((0.8, 6), (0.8, 6), (0.8, 7))
    ]
    assert runs[0] == runs[1] and runs[0][0] == runs[2][0] and runs[0][1] != runs[2][1]


def test_a_drawn_token_is_as_certain_as_it_is_probable(toys) -> None:
    """An unlikely draw does not pass for certain because another token is likely."""
    toy = Uniform(toys.denoiser(rule="confidence", threshold=0.6, block_length=2))
    # position 1: token 0 has 0.9, token 1 has 0.1; position 2: one token alone
    shares = {1: [0.9, 0.1] + 9 * [0.0], 2: [1.0] + 10 * [0.0]}
    toy.logits = lambda rows, at: [torch.tensor([shares[p] for p in positions.tolist()]).log() for positions in at]
    calls = []
    for seed in range(100):
        made = toys.run(toy, {}, [[0]], 2, do_sample=True, seeds=[seed * 7919])
        calls.append((made.new[0][0], made.stats.target_calls))
    assert set(calls) == {(0, 1), (1, 2)}
    assert 2 <= sum(token for token, _ in calls) <= 25


def test_the_peak_of_the_cache_is_counted(toys) -> None:
    made = toys.run(toys.denoiser(), {"cache": "dual"}, toys.prompts(3), 8)
    assert made.stats.state_bytes == sum(8 * (len(prompt) + 8) for prompt in toys.prompts(3))


REQUESTS = {
    "a cartridge": ({"segments": (object(),)}, "cartridge"),
    "logits": ({"keep_logits": True}, "output_logits"),
    "scores": ({"keep_scores": True}, "output_scores"),
    "a processor that reads the text": (
        {"pipeline": LogitsPipeline([hf.TopKLogitsWarper(3), hf.RepetitionPenaltyLogitsProcessor(1.2)])},
        "RepetitionPenaltyLogitsProcessor",
    ),
    "somebody's own processor": ({"pipeline": LogitsPipeline([type("Mine", (hf.LogitsProcessor,), {})()])}, "Mine"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_that_are_refused(toys, case) -> None:
    changes, hint = REQUESTS[case]
    assert hint in refusal(lambda: toys.run(toys.denoiser(), {}, [[1, 2]], 8, **changes))


def test_a_canvas_longer_than_the_model_is_refused(toys) -> None:
    assert len(toys.run(toys.denoiser(max_positions=10), {}, [[1, 2]], 8).new[0]) == 8
    said = refusal(lambda: toys.run(toys.denoiser(max_positions=10), {}, [[1, 2]], 9))
    assert "10 positions" in said and "at most 8" in said
    assert "shorten the prompt" in refusal(lambda: toys.run(toys.denoiser(max_positions=10), {}, [[1] * 8], 1))


def test_a_block_that_somebody_chose_must_divide_the_length(toys) -> None:
    said = refusal(lambda: toys.run(toys.denoiser(), {"block_length": 5}, [[1, 2]], 12))
    assert "10 or 15" in said
    assert len(toys.run(toys.denoiser(), {"block_length": 5}, [[1, 2]], 15).new[0]) == 15


def test_a_model_without_a_cache_is_refused_one(toys) -> None:
    denoiser = toys.denoiser()
    denoiser.supports_cache = False
    assert "cache='none'" in refusal(lambda: toys.run(denoiser, {"cache": "dual"}, [[1, 2]], 8))
    assert toys.run(denoiser, {}, [[1, 2]], 8).stats.state_bytes == 0


def test_a_failed_admission_leaves_nothing_behind(toys) -> None:
    decoder = DParallelDecoder(toys.denoiser(), DParallelOptions(), Stats())
    prompt = torch.tensor([1, 2])
    good = Request(id=0, prompt=prompt, max_new_tokens=4, history=prompt)
    bad = Request(id=1, prompt=prompt, max_new_tokens=4, history=prompt, keep_logits=True)
    refusal(lambda: decoder.admit([good, bad]))
    assert not decoder.live and decoder.stats.prompt_tokens == 0
    decoder.evict([0, 1])
