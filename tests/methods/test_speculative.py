"""The speculative decoder between a target and a drafter that are both scripted: every call each of them gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from accel.drafters.base import Ask, Beside, Draft, Drafter
from accel.drafters.cascade import CascadeDrafter
from accel.errors import IncompatibleError
from accel.methods.plain.decoder import PlainDecoder, PlainOptions
from accel.methods.speculative.decoder import MOST_BESIDE, SpeculativeDecoder, Speculator
from accel.methods.speculative.draft_length import AdaptiveLength, Costs, FixedLength
from accel.methods.speculative.options import SpeculativeOptions
from accel.sampling import LogitsPipeline
from accel.types import Emission, Request, Stats

VOCAB = 11


def logits_after(prefix: Sequence[int]) -> Tensor:
    """The target's logits ``[V]``: a function of the whole prefix, and of nothing else."""
    seed = 1
    for token in prefix:
        seed = (seed * 48271 + token + 1) % 2147483647
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


class ScriptedTarget:
    """Knows each row's committed and tentative tokens, and refuses calls that a real target could not serve."""

    def __init__(self, max_positions: int | None = None) -> None:
        self.vocab_size, self.max_positions, self.device = VOCAB, max_positions, torch.device("cpu")
        self.kept: dict[int, list[int]] = {}
        self.tentative: dict[int, list[int]] = {}
        self.forwards: list[dict[int, list[int]]] = []
        self.commits: list[dict[int, int]] = []

    def open(self, segments: Iterable[object] = ()) -> int:
        row = len(self.kept) + 10
        self.kept[row], self.tentative[row] = [], []
        return row

    def fork(self, row: int, copies: int) -> list[int]:
        rows = [self.open() for _ in range(copies)]
        for copy in rows:
            self.kept[copy] = list(self.kept[row])
        return rows

    def close(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.kept[row] = [-1]  # a closed row's name is not given out again here

    def place(self, row: int) -> int:
        return row

    def num_positions(self, row: int) -> int:
        return len(self.kept[row]) + len(self.tentative[row])

    def forward(
        self,
        tokens: Tensor,
        rows: Sequence[int],
        keep: Sequence[int] | None = None,
        final: Sequence[int] | None = None,
    ) -> Tensor:
        self.forwards.append(dict(zip(rows, tokens.tolist(), strict=True)))
        out = torch.zeros(len(rows), tokens.shape[1], VOCAB)
        for index, row in enumerate(rows):
            assert not self.tentative[row], "what was tentative must be settled before the next step"
            for position, token in enumerate(tokens[index].tolist()):
                self.tentative[row].append(token)
                out[index, position] = logits_after(self.kept[row] + self.tentative[row])
        return out if keep is None else out[:, list(keep)]

    def commit(self, keep: Sequence[int], rows: Sequence[int]) -> None:
        self.commits.append(dict(zip(rows, keep, strict=True)))
        for row, count in zip(rows, keep, strict=True):
            assert 1 <= count <= len(self.tentative[row])
            self.kept[row] += self.tentative[row][:count]
            self.tentative[row] = []
        if self.max_positions is not None:
            assert all(len(self.kept[row]) <= self.max_positions for row in rows)

    def state_bytes(self) -> int:
        return 0


class BranchingTarget(ScriptedTarget):
    """The same, with rows that go on in several ways at once."""

    def __init__(self, max_positions: int | None = None) -> None:
        super().__init__(max_positions)
        self.paths: list[list[int]] = []

    def may_branch(self, row: int) -> bool:
        return True

    def forward_branches(self, tokens: Tensor, row: int, depths: Sequence[int]) -> Tensor:
        assert not self.tentative[row]
        known = self.tentative[row] = tokens.tolist()
        self.forwards.append({row: known})
        return torch.stack(
            [logits_after([*self.kept[row], *known[:depth], token]) for token, depth in zip(known, depths, strict=True)]
        )

    def commit_path(self, path: Sequence[int], row: int) -> None:
        self.paths.append(list(path))
        self.kept[row] += [self.tentative[row][place] for place in path]
        self.tentative[row] = []


# (the row's final tokens, most that may be drafted) → a guess
Guess = Callable[[list[int], int], Draft]


class ScriptedDrafter:
    def __init__(self, guess: Guess, name: str = "scripted", free: bool = True) -> None:
        self.guess, self.name, self.free = guess, name, free
        self.seen: dict[int, list[int]] = {}
        self.closed: dict[int, list[int]] = {}
        self.asks: list[Ask] = []

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        assert row not in self.seen
        self.seen[row] = list(prompt)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        self.asks += asks
        drafts = [self.guess(self.seen[ask.row], ask.max_tokens) for ask in asks]
        assert all(len(d.tokens) <= ask.max_tokens for d, ask in zip(drafts, asks, strict=True))
        return drafts

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        self.seen[row] += tokens

    def close(self, row: int) -> None:
        self.closed[row] = self.seen.pop(row)

    def state_bytes(self) -> int:
        return 0


def greedy(prefix: Sequence[int], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits_after([*prefix, *tokens]).argmax()))
    return tokens


def right_for(count: int, length: int, confidence: float = 0.9) -> Guess:
    """Guesses ``length`` tokens of which the first ``count`` are what greedy decoding says."""

    def guess(seen: list[int], most: int) -> Draft:
        tokens = greedy(seen, length + 1)
        tokens[count:] = [(t + 1) % VOCAB for t in tokens[count:]]
        n = min(length, most)
        return Draft(tokens[:n], confidence=[confidence] * n)

    return guess


def request(id: int, prompt: Sequence[int] = (1, 2, 3), new: int = 20, **kwargs) -> Request:
    ids = torch.tensor(list(prompt))
    return Request(id=id, prompt=ids, max_new_tokens=new, history=ids, **kwargs)


class Setup:
    """A decoder with everything scripted around it, run to the requests' length."""

    def __init__(
        self,
        guess: Guess | Drafter,
        *,
        max_positions: int | None = None,
        target: ScriptedTarget | None = None,
        **options,
    ) -> None:
        self.target = target or ScriptedTarget(max_positions)
        self.drafter = guess if isinstance(guess, Drafter) else ScriptedDrafter(guess)
        self.options = SpeculativeOptions(**{"draft_length": 4, **options})
        self.speculator = Speculator.create(self.drafter, self.options)
        self.stats = Stats()
        self.decoder = SpeculativeDecoder(self.target, self.options, self.stats, self.speculator)
        self.emissions: list[Emission] = []

    def run(self, *requests: Request) -> dict[int, list[int]]:
        self.decoder.admit(requests)
        left = {r.id: r.max_new_tokens for r in requests}
        tokens: dict[int, list[int]] = {r.id: [] for r in requests}
        while left:
            for emission in self.decoder.step():
                self.emissions.append(emission)
                tokens[emission.request_id] += emission.tokens
                left[emission.request_id] -= len(emission.tokens)
            done = [id for id, count in left.items() if count <= 0]
            self.decoder.evict(done)
            left = {id: count for id, count in left.items() if id not in done}
        return tokens


@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_each_round_keeps_what_is_right_and_one_more(right: int) -> None:
    setup = Setup(right_for(right, 4))
    tokens = setup.run(request(0, new=1 + 6 * (right + 1)))
    assert tokens[0] == greedy([1, 2, 3], 1 + 6 * (right + 1))
    # the prefill's own token, then full rounds
    assert [len(e.tokens) for e in setup.emissions][:3] == [1, right + 1, right + 1]
    assert setup.target.commits[:3] == [{10: 3}, {10: 1 + right}, {10: 1 + right}]
    first, second = setup.target.forwards[1][10], setup.target.forwards[2][10]
    assert (len(first), first[0]) == (5, tokens[0][0])
    # the next round starts from the last final token, and no refused token is ever in the way
    assert second[0] == tokens[0][right + 1]


def test_the_target_holds_all_but_the_last_token() -> None:
    setup = Setup(right_for(2, 4))
    setup.decoder.admit([request(0)])
    tokens = [1, 2, 3]
    for _ in range(5):
        for emission in setup.decoder.step():
            tokens += emission.tokens
        assert setup.target.kept[10] == tokens[:-1]
        assert setup.target.tentative[10] == []


def wrong_with_the_right_beside(wrong_at: int) -> Guess:
    """Guesses three tokens; that at ``wrong_at`` is wrong, and the right one stands beside it, among others."""

    def guess(seen: list[int], most: int) -> Draft:
        right = greedy(seen, 3)
        tokens = [(t + (i == wrong_at)) % VOCAB for i, t in enumerate(right)][:most]
        depths = range(min(3, most))
        beside = [Beside(d, (right[d] + 5) % VOCAB, 0.3) for d in depths]
        beside += [Beside(d, right[d], 0.4) for d in depths if tokens[d] != right[d]]
        return Draft(tokens, confidence=[0.6, 0.55, 0.5][:most], beside=beside)

    return guess


@pytest.mark.parametrize("wrong_at", [0, 1, 2, 3])
def test_a_token_beside_the_guess_is_kept_where_it_is_the_one(wrong_at: int, monkeypatch) -> None:
    monkeypatch.setattr(Costs, "verify", lambda self, positions: 1.0)
    monkeypatch.setattr(Costs, "is_stale", lambda self, positions: False)
    setup = Setup(wrong_with_the_right_beside(wrong_at), target=BranchingTarget(), draft_length="auto")
    tokens = setup.run(request(0, new=22))[0]
    assert tokens[:22] == greedy([1, 2, 3], 22)
    # up to the wrong one, the one beside it, and what the target says behind that
    kept = min(wrong_at + 1, 3)
    assert {len(e.tokens) for e in setup.emissions[1:4]} == {kept + 1}
    places = [*range(wrong_at + 1), setup.target.paths[0][-1]] if wrong_at < 3 else [0, 1, 2, 3]
    assert setup.target.paths[0] == places and places[-1] >= min(wrong_at + 1, 3)
    assert all(ask.beside > 0 for ask in setup.drafter.asks)
    seen = setup.drafter.closed[0]
    assert seen[: 3 + len(tokens)] == [1, 2, 3, *tokens]
    assert setup.stats.accepted_tokens == sum(len(e.tokens) - 1 for e in setup.emissions[1:])


def test_tokens_beside_a_guess_are_for_one_greedy_row_of_any_length(monkeypatch) -> None:
    def asked(*requests: Request, target: ScriptedTarget | None = None, **options) -> set[int]:
        setup = Setup(right_for(2, 4), target=target or BranchingTarget(), **{"draft_length": "auto"} | options)
        for each, tokens in setup.run(*requests).items():
            assert requests[each].do_sample or tokens[:8] == greedy([1, 2, 3], 8)
        return {ask.beside for ask in setup.drafter.asks}

    assert asked(request(0)) == {MOST_BESIDE}
    assert asked(request(0), target=ScriptedTarget()) == {0}
    assert asked(request(0), draft_length=4) == {0}
    assert asked(request(0, do_sample=True)) == {0}
    assert asked(request(0), lenience=("lin", 0.5)) == {0}
    assert asked(request(0), request(1)) == {0, MOST_BESIDE} or asked(request(0), request(1)) == {0}
    history = LogitsPipeline(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.0)]))
    assert asked(request(0, pipeline=history)) == {0}


def test_stats_by_position() -> None:
    setup = Setup(right_for(2, 4))
    setup.run(request(0, new=16))
    stats = setup.stats
    # 1 + 5 rounds of 3; the last may draft only 2 of its 4: two more than that would be behind the end
    assert (stats.target_calls, stats.row_calls) == (5, 5)
    assert stats.drafted_by_position == [5, 5, 4, 4]
    assert stats.accepted_by_position == [5, 5]
    assert (stats.drafted_tokens, stats.accepted_tokens) == (18, 10)
    assert stats.mean_accepted_length == 3.0
    assert (stats.method, stats.lossless, stats.prompt_tokens) == ("speculative", True, 3)
    assert set(stats.seconds) == {"prefill", "draft", "verify"}


def test_drafts_end_where_the_request_does() -> None:
    setup = Setup(right_for(9, 9), draft_length=9)
    tokens = setup.run(request(0, new=7))
    assert tokens[0] == greedy([1, 2, 3], 7)
    # one from the prefill, six left: five may be drafted, and the sixth is the target's own
    assert [ask.max_tokens for ask in setup.drafter.asks] == [5]
    assert len(setup.target.forwards) == 2


def test_drafts_end_where_the_context_does() -> None:
    setup = Setup(right_for(4, 4), max_positions=11)
    setup.decoder.admit([request(0, new=50)])
    tokens: list[int] = []
    while setup.target.num_positions(10) < 11:
        tokens += setup.decoder.step()[0].tokens
    assert tokens == greedy([1, 2, 3], 9)  # 3 + 9: the last token has not been read
    # 3 are read, 1 is pending, room for 4; then 8 are read and there is room for 2
    assert [ask.max_tokens for ask in setup.drafter.asks] == [4, 2]
    assert [len(f[10]) for f in setup.target.forwards] == [3, 5, 3]


def test_rows_with_different_drafts_share_a_forward() -> None:
    prompts = {0: (1, 2, 3), 1: (4, 5), 2: (6,)}

    def guess(seen: list[int], most: int) -> Draft:
        count = {1: 4, 4: 2, 6: 0}[seen[0]]
        return right_for(count, count)(seen, most)

    setup = Setup(guess)
    tokens = setup.run(*(request(id, prompt, new=11) for id, prompt in prompts.items()))
    assert tokens == {id: greedy(prompt, 11) for id, prompt in prompts.items()}
    # the shorter ones are padded to the longest draft, and keep their own number
    assert {len(t) for t in setup.target.forwards[3].values()} == {5}
    assert setup.target.commits[3] == {10: 5, 11: 3, 12: 1}
    # rows that have ended are no longer there
    assert list(setup.target.forwards[-1]) == [12]


def test_a_padded_step_changes_no_token(monkeypatch) -> None:
    monkeypatch.setattr(FixedLength, "padded", lambda self, rows, n: n + 2)
    setup = Setup(right_for(2, 4))
    tokens = setup.run(request(0, (1, 2), new=13), request(1, (3, 4), new=7))
    assert tokens == {0: greedy((1, 2), 13), 1: greedy((3, 4), 7)}
    assert [len(f[10]) for f in setup.target.forwards[2:]] == [7, 7, 7, 5]
    assert len(setup.decoder.stats.drafted_by_position) == 4


def test_the_drafter_sees_each_final_token_once_and_in_order() -> None:
    setup = Setup(right_for(2, 4))
    tokens = setup.run(request(0, (1, 2), new=13), request(1, (3, 4), new=7))
    assert setup.drafter.closed == {0: [1, 2, *tokens[0]], 1: [3, 4, *tokens[1]]}
    assert setup.drafter.seen == {}


def test_evict_closes_the_row_everywhere_and_once() -> None:
    setup = Setup(right_for(2, 4))
    setup.decoder.admit([request(0), request(1, (7,))])
    setup.decoder.step()
    setup.decoder.evict([1])
    setup.decoder.evict([1, 5])
    assert list(setup.drafter.closed) == [1]
    assert {e.request_id for e in setup.decoder.step()} == {0}
    setup.decoder.evict([0])
    assert setup.decoder.step() == []
    assert setup.drafter.seen == {}


def test_trimmed_tokens_are_never_verified_and_still_teach(monkeypatch) -> None:
    learned = []
    monkeypatch.setattr(AdaptiveLength, "choose", lambda self, row, confidences, *how: (min(1, len(confidences)), []))
    monkeypatch.setattr(AdaptiveLength, "learn", lambda self, row, confidences, *seen: learned.append(seen))
    setup = Setup(right_for(2, 4), draft_length="auto")
    tokens = setup.run(request(0, new=7))
    assert tokens[0] == greedy([1, 2, 3], 7)
    assert [len(f[10]) for f in setup.target.forwards[1:]] == [2, 2, 2]
    assert setup.stats.drafted_by_position == [3]
    # one verified, and the target's own token says how the second would have ended
    assert learned == [(2, 2, "scripted"), (2, 2, "scripted"), (1, 1, "scripted")]


def test_a_row_that_may_not_draft_is_not_asked(monkeypatch) -> None:
    monkeypatch.setattr(AdaptiveLength, "allowance", lambda self, row: 3 if row else 0)
    setup = Setup(right_for(3, 3), draft_length="auto")
    tokens = setup.run(request(0, new=5), request(1, (9,), new=5))
    assert tokens == {0: greedy([1, 2, 3], 5), 1: greedy([9], 5)}
    assert {ask.row for ask in setup.drafter.asks} == {1}


def test_in_a_cascade_the_free_part_goes_on_while_the_other_sits_out(monkeypatch) -> None:
    monkeypatch.setattr(AdaptiveLength, "allowance", lambda self, row: 0)
    free, paid = ScriptedDrafter(right_for(2, 2, 0.5)), ScriptedDrafter(right_for(3, 3), "paid", free=False)
    setup = Setup(CascadeDrafter(free, paid), draft_length="auto")
    assert setup.run(request(0, new=7))[0] == greedy([1, 2, 3], 7)
    assert setup.stats.accepted_tokens > 0 and free.asks and all(ask.free_only for ask in free.asks)
    assert paid.asks == [] and paid.closed[0] == free.closed[0]


def test_in_a_cascade_cost_and_acceptance_are_learned_of_each_part(monkeypatch) -> None:
    learned, timed = [], []
    monkeypatch.setattr(FixedLength, "learn", lambda self, *how: learned.append(how))
    monkeypatch.setattr(Costs, "observe_draft", lambda self, tokens, seconds: timed.append(tokens))
    # sure of itself while the text is short
    free = ScriptedDrafter(lambda seen, most: right_for(1, 1, 0.9 if len(seen) < 10 else 0.1)(seen, most))
    paid = ScriptedDrafter(right_for(2, 2), "paid", free=False)
    setup = Setup(CascadeDrafter(free, paid))
    setup.run(request(0, new=24))
    sources = [how[-1] for how in learned]
    assert set(sources) == {"scripted", "paid"}
    assert len(timed) == sources.count("paid") and set(timed[:-1]) == {2}  # the last draft ends with the row


def test_rows_that_draft_side_by_side_share_the_time_of_a_round(monkeypatch) -> None:
    timed = []
    monkeypatch.setattr(Costs, "observe_draft", lambda self, tokens, seconds: timed.append(tokens))
    setup = Setup(ScriptedDrafter(right_for(2, 2), "paid", free=False))
    setup.run(request(0, new=24), request(1, (9,), new=24))
    # two rows of two tokens each are two steps of drafting, not four
    assert set(timed[:-1]) == {2}


def test_acceptance_of_one_source_says_nothing_of_another() -> None:
    length = AdaptiveLength(8, Costs())
    length.open(0)
    for _ in range(50):
        length.learn(0, [0.75], 0, 1, "suffix")
    assert length._estimate(0, "suffix").chance(0.75) < 0.2
    assert length._estimate(0, "lm").chance(0.75) == 0.75


def test_a_drafter_with_nothing_to_say_is_plain_decoding() -> None:
    setup = Setup(lambda seen, most: Draft())
    assert setup.run(request(0, new=6))[0] == greedy([1, 2, 3], 6)
    assert (setup.stats.target_calls, setup.stats.drafted_tokens) == (5, 0)
    assert setup.stats.acceptance_rate is None


def test_logits_and_scores_come_with_their_tokens() -> None:
    pipeline = LogitsPipeline(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)]))
    setup = Setup(right_for(3, 4))
    tokens = setup.run(request(0, new=9, pipeline=pipeline, keep_logits=True, keep_scores=True))[0]
    logits = torch.cat([e.logits for e in setup.emissions if e.logits is not None])
    scores = torch.cat([e.scores for e in setup.emissions if e.scores is not None])
    prefix = [1, 2, 3]
    for index, token in enumerate(tokens):
        raw = logits_after(prefix)
        assert torch.equal(logits[index], raw)
        assert torch.equal(scores[index], pipeline(torch.tensor([prefix]), raw[None], [0])[0])
        assert int(scores[index].argmax()) == token
        prefix.append(token)
    assert len(logits) == len(scores) == len(tokens)


class Counting(LogitsProcessor):
    """Somebody's own processor with a memory: it must see each kept prefix once, in order, and no other."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.prefixes.append(input_ids[0].tolist())
        # what it says depends on how often it was called
        return scores + 3.0 * torch.nn.functional.one_hot(torch.tensor([len(self.prefixes) % VOCAB]), VOCAB)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("right", [0, 2, 4])
def test_a_processor_with_a_memory_sees_each_kept_prefix_once(sampled: bool, right: int) -> None:
    processor = Counting()
    setup = Setup(right_for(right, 4))
    asked = request(0, new=9, do_sample=sampled, pipeline=LogitsPipeline([processor]))
    tokens = setup.run(asked)[0]
    assert processor.prefixes == [[1, 2, 3, *tokens[:i]] for i in range(len(tokens))]


def test_a_processor_with_a_memory_gives_plain_decodings_tokens() -> None:
    def decode(make: Callable[[Request], list[int]]) -> list[int]:
        return make(request(0, new=12, pipeline=LogitsPipeline([Counting()])))

    def plain(asked: Request) -> list[int]:
        decoder, tokens = PlainDecoder(ScriptedTarget(), PlainOptions(), Stats()), []
        decoder.admit([asked])
        while len(tokens) < asked.max_new_tokens:
            tokens += decoder.step()[0].tokens
        return tokens

    assert decode(lambda asked: Setup(right_for(2, 4)).run(asked)[0]) == decode(plain)


def sampled_guess(seen: list[int], most: int) -> Draft:
    """Tokens drawn from a distribution that is near the target's, with their probabilities."""
    generator = torch.Generator().manual_seed(len(seen))
    tokens, probs = [], []
    for _ in range(min(most, 3)):
        q = (0.7 * logits_after([*seen, *tokens])).softmax(-1)
        tokens.append(int(torch.multinomial(q, 1, generator=generator)))
        probs.append(q)
    confidence = [float(q[t]) for q, t in zip(probs, tokens, strict=True)]
    return Draft(tokens, torch.stack(probs) if probs else None, confidence)


@pytest.mark.parametrize("guess", [right_for(2, 4), sampled_guess], ids=["certain", "sampled"])
@pytest.mark.parametrize("acceptance", ["token", "block"])
def test_a_sampled_row_does_not_depend_on_its_neighbours(guess: Guess, acceptance: str) -> None:
    def row(id: int) -> Request:
        return request(id, (id + 1, 5), new=12 + 5 * id, do_sample=True, seed=100 + id)

    together = Setup(guess, acceptance=acceptance).run(row(0), row(1), row(2))
    for id in range(3):
        assert Setup(guess, acceptance=acceptance).run(row(id))[id] == together[id]
    other = Setup(guess, acceptance=acceptance).run(request(0, (1, 5), new=12, do_sample=True, seed=7))
    assert other[0] != together[0]


def test_sampled_rows_ask_for_samples_and_bring_their_warp() -> None:
    pipeline = LogitsPipeline()
    setup = Setup(sampled_guess)
    setup.run(request(0, new=4, do_sample=True, pipeline=pipeline), request(1, (2,), new=4))
    assert {(ask.row, ask.sample) for ask in setup.drafter.asks} == {(0, True), (1, False)}


def test_greedy_and_sampled_rows_in_one_batch() -> None:
    setup = Setup(sampled_guess)
    tokens = setup.run(request(0, new=10), request(1, (2,), new=10, do_sample=True, seed=3))
    assert tokens[0] == greedy([1, 2, 3], 10)
    assert tokens[1] == Setup(sampled_guess).run(request(1, (2,), new=10, do_sample=True, seed=3))[1]


def test_a_sampled_drafts_outcome_is_its_acceptance(monkeypatch) -> None:
    learned: list[tuple[int, int]] = []
    monkeypatch.setattr(AdaptiveLength, "choose", lambda self, row, confidences, *how: (min(2, len(confidences)), []))
    monkeypatch.setattr(AdaptiveLength, "learn", lambda self, row, confidences, *seen: learned.append(seen))
    setup = Setup(sampled_guess, draft_length="auto")
    setup.run(request(0, new=20, do_sample=True, seed=1))
    assert [matches for matches, *_ in learned] == [len(e.tokens) - 1 for e in setup.emissions[1:]]
    assert max(labels for _, labels, _ in learned) == 2


@pytest.mark.parametrize(
    ("options", "sampled", "said"),
    [
        ({"acceptance": "block"}, True, "use acceptance='token' or 'auto'"),
        (
            {"lenience": ("lin", 0.5)},
            False,
            "lenience with greedy decoding does not work with custom logits processors",
        ),
    ],
)
def test_what_a_custom_processor_rules_out_is_refused(options: dict, sampled: bool, said: str) -> None:
    setup = Setup(right_for(2, 4), **options)
    with pytest.raises(IncompatibleError, match=said):
        setup.decoder.admit([request(0, do_sample=sampled, pipeline=LogitsPipeline([Counting()]))])


def test_lenience_is_not_lossless() -> None:
    assert not Setup(right_for(2, 4), lenience=("lin", 0.5)).stats.lossless
    assert Setup(right_for(2, 4), lenience=("lin", 1.0)).stats.lossless


def test_what_was_learned_outlives_the_call() -> None:
    setup = Setup(right_for(4, 4), draft_length="auto")
    setup.run(request(0))
    measured = setup.speculator.costs.verify(1)
    again = SpeculativeDecoder(ScriptedTarget(), setup.options, Stats(), setup.speculator)
    assert again.costs.verify(1) == measured
    assert again.length is setup.speculator.length
