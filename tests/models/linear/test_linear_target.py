"""The target of models with linear layers, against the model run from scratch and against the equation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from linear_models import convert, error, naive_logits

from accel.axes import Target
from accel.errors import IncompatibleError
from accel.models.lean import LeanTarget, target_for
from accel.models.linear import LinearTarget
from accel.models.linear.state import CAPACITY
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget

TOLERANCE = 1e-5
KINDS = {
    "linear": {},
    "hybrid": {"layers": (1,)},
    "window": {"window": 4},
    "window hybrid": {"layers": (0,), "window": 3, "affine": True},
    "old tokens": {
        "conv_width": 0,
        "gate_rank": 0,
        "rope": True,
        "window": 3,
        "covers_window": False,
        "scaled": False,
        "eps": 0.0,
    },
    "no conv, no gate": {"conv_width": 0, "gate_rank": 0},
    "no denominator": {"normalised": False},
}


@pytest.fixture(scope="module")
def models(tiny):
    made = {}
    for name, spec in KINDS.items():
        made[name] = tiny.build("qwen3" if name == "hybrid" else "llama")
        convert(made[name], **spec)
    return made


@torch.no_grad()
def from_scratch(model, tokens, last):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, len(tokens) - last :]


def ids(n, seed=0):
    return torch.randint(3, 67, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Mirror:
    """A target, and beside it what each row must hold."""

    def __init__(self, model, piece=7):
        self.model, self.target = model, LinearTarget(model, piece)
        self.kept, self.tentative = {}, {}

    def open(self):
        row = self.target.open()
        self.kept[row], self.tentative[row] = [], []
        return row

    def forward(self, tokens, rows, final=None):
        logits = self.target.forward(torch.tensor(tokens), rows, final=final)
        for index, (row, new) in enumerate(zip(rows, tokens, strict=True)):
            own = len(new) if final is None else final[index]
            self.tentative[row] += new[:own]
            if own:
                expected = from_scratch(self.model, self.kept[row] + self.tentative[row], own)
                assert error(logits[index, :own], expected) <= TOLERANCE, (row, own)

    def commit(self, rows, keep):
        self.target.commit(keep, rows)
        for row, count in zip(rows, keep, strict=True):
            self.kept[row] += self.tentative[row][:count]
            self.tentative[row] = []
            assert self.target.num_positions(row) == len(self.kept[row])

    def fork(self, row, copies):
        self.commit([row], [0])
        for copy in self.target.fork(row, copies):
            self.kept[copy], self.tentative[copy] = list(self.kept[row]), []

    def close(self, rows):
        self.target.close(rows)
        for row in rows:
            del self.kept[row], self.tentative[row]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_equation(models, kind):
    """Prompt, plain tokens, and drafts of which some are kept, against the recurrence written out in fp64."""
    target, text = LinearTarget(models[kind]), ids(40)
    assert isinstance(target, Target)
    row = target.open()
    logits = [target.forward(torch.tensor([text[:20]]), [row], final=[20])[0]]
    target.commit([20], [row])
    place, round_ = 20, 0
    while place < len(text):
        draft = [*text[place : place + 1 + round_ % 3], 9, 10]
        said = target.forward(torch.tensor([draft]), [row])[0]
        keep = min(1 + round_ % 3, len(text) - place)
        logits.append(said[:keep])
        target.commit([keep], [row])
        place, round_ = place + keep, round_ + 1
    assert error(torch.cat(logits), naive_logits(models[kind], text)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
@given(data=st.data())
def test_whatever_is_kept_is_what_was_read(models, kind, data):
    """Rows in any order, drafts in one pass or several, prompts in pieces, forks: always the kept tokens' own state."""
    mirror = Mirror(models[kind])
    mirror.open()
    for step in range(data.draw(st.integers(3, 9))):
        rows = list(mirror.kept)
        moves = ["draft", "draft", "draft", "commit", "commit", "final"]
        moves += ["open", "fork"] * (len(rows) < 4) + ["close"] * (len(rows) > 1)
        move = data.draw(st.sampled_from(moves))
        some = data.draw(st.permutations(rows))[: data.draw(st.integers(1, len(rows)))]
        if move == "open":
            mirror.open()
        elif move == "fork":
            mirror.fork(some[0], data.draw(st.integers(1, 2)))
        elif move == "close":
            mirror.close(some[:1])
        elif move == "commit":
            mirror.commit(some, [data.draw(st.integers(0, len(mirror.tentative[row]))) for row in some])
        elif move == "draft":
            n = data.draw(st.integers(1, 6))
            mirror.forward([ids(n, seed=step * 7 + row) for row in some], some)
        else:
            mirror.commit(some, [0] * len(some))
            n = data.draw(st.integers(1, 18))
            final = [data.draw(st.integers(0, n)) for _ in some]
            mirror.forward([ids(n, seed=step * 7 + row) for row in some], some, final)
            mirror.commit(some, final)


@pytest.mark.parametrize("kind", ["linear", "window"])
def test_a_row_takes_the_same_bytes_however_long_it_is(models, kind):
    target = LinearTarget(models[kind])
    row = target.open()
    sizes = set()
    for n in (1, 5, 60, 300):
        target.forward(torch.tensor([ids(n)]), [row], final=[n])
        target.commit([n], [row])
        target.forward(torch.tensor([ids(3)]), [row])
        target.commit([1], [row])
        sizes.add(target.state_bytes())
    assert len(sizes) == 1 and sizes.pop() > 0
    assert target.max_positions is None


def test_a_hybrid_grows_with_its_softmax_layers(models):
    target = LinearTarget(models["hybrid"])
    row = target.open()
    empty = target.state_bytes()
    target.forward(torch.tensor([ids(10)]), [row], final=[10])
    target.commit([10], [row])
    heads = 2 * models["hybrid"].config.num_key_value_heads * models["hybrid"].config.head_dim * 4
    assert target.state_bytes() == empty + 10 * heads
    assert target.max_positions == 256


def test_a_snapshot_is_read_once_and_opened_often(models):
    for model in models.values():
        target, prompt = LinearTarget(model), ids(25)
        row = target.open()
        target.forward(torch.tensor([prompt]), [row], final=[25])
        target.commit([25], [row])
        saved = target.save(row)
        target.forward(torch.tensor([[5, 6, 7]]), [row], final=[3])
        target.commit([3], [row])
        target.close([row])
        for seed in (1, 2):
            new, text = target.open([saved]), ids(4, seed)
            got = target.forward(torch.tensor([text]), [new])[0]
            assert error(got, from_scratch(model, prompt + text, 4)) <= TOLERANCE
        assert saved.nbytes() > 0


def test_a_long_draft_makes_the_buffers_grow_for_a_while(models):
    mirror = Mirror(models["linear"])
    rows = [mirror.open(), mirror.open()]
    before = mirror.target.state_bytes()
    mirror.forward([ids(3 * CAPACITY, seed) for seed in (1, 2)], rows)
    assert mirror.target.state_bytes() > before
    mirror.commit(rows, [CAPACITY + 5, 2])
    assert mirror.target.state_bytes() == before
    mirror.forward([ids(4, seed) for seed in (3, 4)], rows)


def test_rows_that_are_no_neighbours_are_folded_together(models):
    mirror = Mirror(models["linear"])
    rows = [mirror.open() for _ in range(3)]
    for round_ in range(2 * CAPACITY // 4):
        for some in ([rows[2], rows[0]], rows[1:2]):
            mirror.forward([ids(5, seed=3 * round_ + row) for row in some], some)
            mirror.commit(some, [4] * len(some))


def test_a_model_in_bf16_keeps_its_states_in_fp32(tiny):
    model = tiny.build("llama").bfloat16()
    convert(model)
    target, text = LinearTarget(model), ids(30)
    row = target.open()
    parts = [target.forward(torch.tensor([text[:20]]), [row], final=[20])]
    target.commit([20], [row])
    parts.append(target.forward(torch.tensor([text[20:]]), [row]))
    target.commit([10], [row])
    assert target.save(row).s.dtype == torch.float32
    # eight bits of mantissa: a few dozen roundings of 2^-9 each
    assert error(torch.cat(parts, 1)[0], from_scratch(model, text, 30)) <= 3e-2


def test_keep_asks_for_some_positions_in_any_piece(models):
    model, text = models["linear"], ids(20)
    expected = from_scratch(model, text, 20)
    for keep in ([19], [0, 8, 19], [3]):
        target = LinearTarget(model, piece=8)
        got = target.forward(torch.tensor([text]), [target.open()], keep, final=[20])[0]
        assert got.shape[0] == len(keep) and error(got, expected[keep]) <= TOLERANCE


def test_the_right_target_is_found(tiny, models):
    assert type(target_for(tiny.build("llama"))) is LeanTarget
    assert type(target_for(tiny.build("gpt2"))) is SoftmaxTarget
    assert isinstance(target_for(models["hybrid"]), LinearTarget)


def test_a_cartridge_in_front_is_refused(models):
    keys = (torch.zeros(2, 3, 8),)
    with pytest.raises(IncompatibleError, match="keys are for softmax layers"):
        LinearTarget(models["linear"]).open([Segment(keys, keys, 3)])
