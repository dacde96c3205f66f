"""The EAGLE-3 drafter against the published computation, run from scratch on each row's whole text."""

from __future__ import annotations

import eagle3_heads as heads
import pytest
import torch
from scipy.stats import chisquare

from accel.drafters.base import Ask, Draft, Drafter, TargetReader, target_readers
from accel.drafters.cascade import CascadeDrafter
from accel.drafters.eagle3 import Eagle3Drafter, load_head
from accel.drafters.eagle3.tap import LayerTap
from accel.drafters.suffix import SuffixDrafter
from accel.errors import AccelError, IncompatibleError, ModelError
from accel.models.softmax_target import SoftmaxTarget

KEPT = [40, 3, 66, 11, 5, 29, 0, 18, 33, 2, 45, 21, 9, 14, 27, 36, 48, 1, 12, 30, 25, 6, 41]
PROMPTS = [[7], [4, 8, 15, 16, 23, 42, 5], [9, 9, 3, 60]]
# layout, layers of the target, the target's family, what the head is
CASES = {
    "speculators": (
        "speculators",
        4,
        "llama",
        {"ids": (1, 2, 4), "kept": KEPT, "theta": 500.0, "norm_before_residual": True},
    ),
    "speculators, whole vocabulary": ("speculators", 2, "gemma3_text", {"ids": (0, 2)}),
    "speculators, qwen3": (
        "speculators",
        3,
        "qwen3",
        {"ids": (0, 1, 3), "layer": "qwen3", "num_layers": 2, "fc_norm": True, "norm_output": True, "kept": KEPT},
    ),
    "speculators, other size": (
        "speculators",
        2,
        "llama",
        {"ids": (2, 1), "size": 20, "own_embedding": True, "norm_before_fc": True, "kept": KEPT},
    ),
    "safeailab": ("safeailab", 8, "llama", {"ids": (2, 4, 5), "kept": KEPT, "own_embedding": True}),
    "specforge": ("specforge", 4, "llama", {"ids": (1, 2, 4), "kept": KEPT, "theta": 77.0}),
    "left-padded target": ("specforge", 4, "bloom", {"ids": (1, 2, 4), "kept": KEPT}),
}


class Bench:
    """A target and a drafter that follows it, without a decoder between them: the tests decide what comes true."""

    def __init__(self, model, drafter):
        self.target, self.drafter = SoftmaxTarget(model), drafter
        self.names, self.texts = {}, {}
        drafter.listen(self.target)

    def admit(self, prompts, copies=0, first=None):
        """Prefill in one padded batch; with ``copies``, each prompt is forked. ``first``: the rows' first tokens."""
        known, names = len(self.names), [self.target.open() for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        self.target.forward(padded(prompts), names)
        self.target.commit(lengths, names)
        for name, prompt in zip(names, prompts, strict=True):
            for each in [name, *self.target.fork(name, copies)] if copies else [name]:
                row = len(self.names)
                self.names[row], self.texts[row] = each, list(prompt)
                self.drafter.open(row, prompt, seed=row)
                self.drafter.follow(row, self.target, each)
        new = range(known, len(self.names))
        self.emit({row: [(13 * row + 5) % 67 if first is None else first[row]] for row in new})

    def emit(self, tokens):
        for row, new in tokens.items():
            self.texts[row] += new
            self.drafter.observe(row, new)

    def verify(self, drafts, kept):
        """A round: the target reads each row's pending token and draft, the first ``kept[row]`` of it come true."""
        rows = list(drafts)
        names = [self.names[row] for row in rows]
        self.target.forward(padded([[self.texts[row][-1], *drafts[row].tokens] for row in rows]), names)
        self.target.commit([1 + kept[row] for row in rows], names)
        self.emit({row: [*drafts[row].tokens[: kept[row]], (7 * len(self.texts[row]) + row) % 67] for row in rows})

    def propose(self, lengths, **wishes):
        asks = [Ask(row, length, **wishes) for row, length in lengths.items()]
        return dict(zip(lengths, self.drafter.propose(asks), strict=True))


def padded(lists):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in lists], batch_first=True)


def assert_published(head, model, text, draft):
    """Each drafted token is the argmax of the plain computation, its confidence the probability there."""
    steps = heads.draft(head, model, text, draft.tokens[:-1])
    assert draft.tokens == [head.kept[int(logits.argmax())] for logits in steps]
    expected = [float(logits.softmax(-1).max()) for logits in steps]
    torch.testing.assert_close(torch.tensor(draft.confidence), torch.tensor(expected), atol=1e-4, rtol=1e-3)


@pytest.fixture
def made(tiny, tmp_path):
    """name of a case → (target, head, drafter)"""

    def make(name):
        layout, num_layers, family, wishes = CASES[name]
        model = tiny.build(family, num_hidden_layers=num_layers, n_layer=num_layers, layer_types=None)
        head = heads.random_head(model, **wishes)
        folder = heads.write(head, tmp_path / "head", model, layout)
        return model, head, Eagle3Drafter(load_head(folder, model), model)

    return make


@pytest.mark.parametrize("name", CASES)
def test_drafts_are_the_published_computation_after_any_outcome(made, name):
    model, head, drafter = made(name)
    bench = Bench(model, drafter)
    bench.admit(PROMPTS)
    # per round and row: tokens asked for, and how many of them come true; None: the row is not asked
    rounds = [
        [(4, 2), (1, 1), (3, 0)],
        [(2, 2), (5, 4), None],
        [None, (3, 0), (4, 3)],
        [(3, 1), (3, 3), (2, 1)],
    ]
    for moves in rounds:
        drafts = bench.propose({row: move[0] for row, move in enumerate(moves) if move is not None})
        for row, drafted in drafts.items():
            assert len(drafted.tokens) == moves[row][0]
            assert_published(head, model, bench.texts[row], drafted)
        # a row that was not asked still advances: its features wait until it is
        drafts |= {row: Draft() for row, move in enumerate(moves) if move is None}
        bench.verify(drafts, {row: move[1] if move else 0 for row, move in enumerate(moves)})


def test_rows_come_and_go(made):
    model, head, drafter = made("speculators")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS[:2])
    bench.verify(bench.propose({0: 2, 1: 3}), {0: 1, 1: 2})
    bench.target.close([bench.names[0]])
    drafter.close(0)
    bench.admit(PROMPTS[2:])
    for row, drafted in bench.propose({1: 3, 2: 4}).items():
        assert_published(head, model, bench.texts[row], drafted)
    assert drafter.state_bytes() > 0
    for row in (1, 2):
        bench.target.close([bench.names[row]])
        drafter.close(row)
    assert drafter.state_bytes() == 0


def test_forks_of_a_prompt_share_its_features_and_then_part(made):
    model, head, drafter = made("specforge")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS[1:], copies=2)
    # they part before anybody has asked for what they share
    bench.verify(dict.fromkeys(range(6), Draft()), dict.fromkeys(range(6), 0))
    for kept in (1, 0, 2):
        drafts = bench.propose(dict.fromkeys(range(6), 3))
        for row, drafted in drafts.items():
            assert_published(head, model, bench.texts[row], drafted)
        bench.verify(drafts, dict.fromkeys(drafts, kept))
    assert len({tuple(bench.texts[row]) for row in range(3)}) == 3


def test_several_tentative_passes_before_a_commit(made):
    model, head, drafter = made("speculators")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS[:1])
    name = [bench.names[0]]
    bench.target.forward(torch.tensor([[bench.texts[0][-1], 8]]), name)
    bench.target.forward(torch.tensor([[30, 31]]), name)
    bench.target.commit([3], name)
    bench.emit({0: [8, 30, 50]})
    assert_published(head, model, bench.texts[0], bench.propose({0: 3})[0])


def test_keep_going_ends_a_row_and_not_its_neighbours(made):
    model, head, drafter = made("safeailab")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS)
    asks = [Ask(row, 4, keep_going=lambda c, row=row: len(c) <= row) for row in range(3)]
    drafts = drafter.propose(asks)
    assert [len(drafted.tokens) for drafted in drafts] == [1, 2, 3]
    for row, drafted in enumerate(drafts):
        assert_published(head, model, bench.texts[row], drafted)


def test_sampled_drafts_carry_the_heads_warped_distribution(made):
    model, head, drafter = made("speculators")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS)
    for row, drafted in bench.propose({0: 3, 1: 1, 2: 2}, sample=True, warp=lambda scores: scores / 0.7).items():
        steps = heads.draft(head, model, bench.texts[row], drafted.tokens[:-1])
        expected = torch.zeros(len(steps), 67)
        expected[:, head.kept] = (torch.stack(steps) / 0.7).softmax(-1)
        torch.testing.assert_close(drafted.probs, expected, atol=1e-4, rtol=1e-3)
        chosen = expected[range(len(steps)), drafted.tokens]
        torch.testing.assert_close(torch.tensor(drafted.confidence), chosen, atol=1e-4, rtol=1e-3)


def test_sampled_tokens_follow_their_distribution(made):
    model, _, drafter = made("specforge")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS[1:2], copies=599, first=[50] * 600)
    drafts = bench.propose(dict.fromkeys(range(600), 1), sample=True, warp=lambda scores: scores / 4)
    expected = 600 * drafts[0].probs[0].double()
    counts = torch.bincount(torch.tensor([drafted.tokens[0] for drafted in drafts.values()]), minlength=67)
    often = expected >= 5
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    assert len(observed) > 5
    assert chisquare(observed, [*expected[often].tolist(), 600 - float(expected[often].sum())]).pvalue > 1e-3


def test_between_passes_the_target_is_untouched(made):
    model, _, drafter = made("speculators")
    bench = Bench(model, drafter)
    bench.admit(PROMPTS)
    bench.propose({0: 2})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(IndexError):
        bench.target.forward(torch.tensor([[1000]]), [bench.names[0]])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "olmo2", "falcon", "bloom"])
def test_taps_hear_what_transformers_calls_hidden_states(tiny, family):
    model = tiny.build(family)
    target = SoftmaxTarget(model)
    tap = LayerTap(model, (0, 1), lambda states: states)
    target.taps.append(tap)
    row, tokens = target.open(), torch.tensor([PROMPTS[1]])
    target.forward(tokens, [row])
    target.commit([5], [row])
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tap.take(row), torch.cat(states[:2], -1)[0, :5], atol=1e-5, rtol=1e-4)
    assert tap.take(row) is None


def test_fulfils_the_protocols_also_inside_a_cascade(made):
    _, _, drafter = made("speculators")
    assert isinstance(drafter, Drafter)
    assert isinstance(drafter, TargetReader)
    assert target_readers(CascadeDrafter(SuffixDrafter(), CascadeDrafter(SuffixDrafter(), drafter))) == [drafter]
    assert target_readers(SuffixDrafter()) == []


def test_misuse_is_one_sentence(tiny, made):
    model, _, drafter = made("speculators")
    with pytest.raises(IncompatibleError, match="the model it was loaded for"):
        drafter.listen(SoftmaxTarget(tiny.build("llama", num_hidden_layers=4)))
    drafter.open(0, [1, 2], seed=0)
    with pytest.raises(AccelError, match="row 0 is already open"):
        drafter.open(0, [1, 2], seed=0)
    drafter.observe(0, [3])
    with pytest.raises(AccelError, match=r"2 unread tokens and 0 features .* call listen\(\)"):
        drafter.propose([Ask(0, 2)])
    model.model.layers = torch.nn.ModuleList([model.model.layers[0]])
    with pytest.raises(ModelError, match="0 lists of 4 decoder layers found"):
        Eagle3Drafter.__init__(drafter, drafter, model)
