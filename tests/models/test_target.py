"""The softmax target against the plain transformers model, run from scratch on what each row has kept.

Tolerance: RMS of the error over RMS of the reference, 1e-5 in fp32. Both sides add the same numbers in another order
(other shapes reach other matmul kernels, a softmax is merged from parts), which moves fp32 logits of these models by
some 1e-7; a wrong mask, position or slot moves them by more than 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from accel.axes import Target
from accel.errors import ModelError
from accel.models import row_cache
from accel.models.softmax_target import SoftmaxTarget

VOCAB = 61
TOLERANCE = 1e-5
# bf16 keeps 8 bits: each of a few dozen roundings in a row adds 2**-9 or less, relative
BF16_TOLERANCE = 3e-2

# model type → what it takes beyond the sizes that all share
READ_ROWS = {
    "llama": {"max_position_embeddings": 4096},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {
        "sliding_window": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
}
READ_PADDED = {
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {},
}
FAMILIES = READ_ROWS | READ_PADDED


def tiny(model_type, **extra):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # wide enough that a wrong mask or position shows
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | extra)).eval()


MODELS = {name: tiny(name, **extra) for name, extra in FAMILIES.items()}


def error(got, reference):
    return float((got.float() - reference.float()).pow(2).mean().sqrt() / reference.float().pow(2).mean().sqrt())


@torch.no_grad()
def from_scratch(model, tokens: Sequence[int], last: int):
    """[last, V]: logits of the last tokens, by the plain model alone."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0, len(tokens) - last :]


class Mirror:
    """A target and beside it, as plain lists, what each of its rows must hold."""

    def __init__(self, model):
        self.model = model
        self.target = SoftmaxTarget(model)
        self.kept: dict[int, list[int]] = {}
        self.tentative: dict[int, list[int]] = {}

    def open(self):
        row = self.target.open()
        assert row not in self.kept
        self.kept[row], self.tentative[row] = [], []

    def close(self, rows):
        self.target.close(rows)
        for row in rows:
            del self.kept[row], self.tentative[row]

    def fork(self, row, copies):
        self.commit([row], [0])
        for copy in self.target.fork(row, copies):
            assert copy not in self.kept
            self.kept[copy], self.tentative[copy] = list(self.kept[row]), []

    def forward(self, tokens, rows):
        logits = self.target.forward(tokens, rows)
        assert logits.shape == (len(rows), tokens.shape[1], VOCAB)
        for row, new, got in zip(rows, tokens.tolist(), logits, strict=True):
            self.tentative[row] += new
            reference = from_scratch(self.model, self.kept[row] + self.tentative[row], len(new))
            assert error(got, reference) <= TOLERANCE, (row, self.kept[row], self.tentative[row])
        return logits

    def commit(self, rows, keep):
        self.target.commit(keep, rows)
        for row, count in zip(rows, keep, strict=True):
            self.kept[row] += self.tentative[row][:count]
            self.tentative[row] = []

    def check(self):
        for row, tokens in self.kept.items():
            assert self.target.num_positions(row) == len(tokens)


def play(data, mirror, steps):
    """A random life of rows: opened, advanced in random subsets and orders, taken back, forked and closed."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), label="tokens"))
    mirror.open()
    for _ in range(steps):
        rows = list(mirror.kept)
        moves = ["forward", "forward", "forward", "commit", "commit"]
        moves += ["open"] * (len(rows) < 4) + ["fork"] * (0 < len(rows) < 4) + ["close"] * (len(rows) > 1)
        move = data.draw(st.sampled_from(moves), label="move")
        if move == "open":
            mirror.open()
            continue
        some = data.draw(st.permutations(rows), label="rows")
        if move == "fork":
            mirror.fork(some[0], data.draw(st.integers(1, 2), label="copies"))
            continue
        some = some[: data.draw(st.integers(1, len(rows)), label="how many")]
        if move == "close":
            mirror.close(some[:1])
        elif move == "commit":
            mirror.commit(some, [data.draw(st.integers(0, len(mirror.tentative[row])), label="keep") for row in some])
        else:
            n = data.draw(st.sampled_from([1, 1, 2, 3, 5, 8]), label="n")
            mirror.forward(torch.randint(3, VOCAB, (len(some), n), generator=generator), some)
        mirror.check()
    # every row that is left answers once more
    mirror.forward(torch.randint(3, VOCAB, (len(mirror.kept), 2), generator=generator), list(mirror.kept))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_hold_what_was_kept_whatever_happens(family):
    examples = 80 if family == "llama" else 15

    @given(st.data())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        # explaining a failure runs hundreds of further lives
        phases=[Phase.generate, Phase.shrink],
    )
    def lives(data):
        play(data, Mirror(MODELS[family]), steps=14)

    lives()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_reads_rows_where_it_is_known_to(family):
    target = SoftmaxTarget(MODELS[family])
    assert isinstance(target, Target)
    assert target.reads_rows == (family in READ_ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_is_read_ragged(family):
    """Prompts of different lengths, padded behind; then all of them advance, and the longest alone."""
    mirror = Mirror(MODELS[family])
    for _ in range(3):
        mirror.open()
    mirror.target.forward(torch.arange(3, 33).view(3, 10), [0, 1, 2])
    mirror.target.commit([10, 3, 6], [0, 1, 2])
    mirror.kept = {0: list(range(3, 13)), 1: [13, 14, 15], 2: list(range(23, 29))}
    mirror.check()
    mirror.forward(torch.tensor([[40, 41], [42, 43], [44, 45]]), [2, 0, 1])
    mirror.commit([0, 1, 2], [2, 0, 1])
    mirror.forward(torch.tensor([[46]]), [0])
    mirror.forward(torch.tensor([[47, 48, 49]]), [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_tentative_is_context_for_the_next_forward(family):
    mirror = Mirror(MODELS[family])
    mirror.open()
    mirror.open()
    for n in (4, 1, 3):
        mirror.forward(torch.arange(5, 5 + 2 * n).view(2, n), [1, 0])
    mirror.commit([1, 0], [5, 0])
    mirror.forward(torch.tensor([[7, 8], [9, 9]]), [0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_share_a_prompt_and_go_their_own_ways(family):
    """A fork of a fork reads two segments; the row that was forked goes on as well."""
    mirror = Mirror(MODELS[family])
    mirror.open()
    mirror.forward(torch.arange(3, 12)[None], [0])
    mirror.commit([0], [9])
    mirror.fork(0, 2)
    mirror.forward(torch.tensor([[20, 21], [22, 23], [24, 25]]), [2, 0, 1])
    mirror.commit([2, 0, 1], [1, 2, 2])
    mirror.fork(2, 1)
    mirror.forward(torch.arange(30, 42).view(4, 3), [3, 0, 2, 1])
    mirror.close([0, 2])
    mirror.forward(torch.tensor([[43], [44]]), [1, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_is_forked_before_it_has_a_tail(family):
    """Nothing has been read since the first fork, or ever: there is no new segment to share."""
    mirror = Mirror(MODELS[family])
    mirror.open()
    mirror.fork(0, 1)
    mirror.forward(torch.arange(3, 13).view(2, 5), [0, 1])
    mirror.commit([0, 1], [4, 5])
    mirror.fork(0, 1)
    mirror.fork(2, 2)
    mirror.forward(torch.arange(20, 30).view(5, 2), [4, 0, 1, 3, 2])


@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_neighbours_do_not_change_a_rows_logits(family, lengths, n):
    """One row's logits with neighbours of any length, before and behind it, equal those it has alone."""
    tokens = torch.randint(3, VOCAB, (len(lengths), 9 + n), generator=torch.Generator().manual_seed(sum(lengths)))
    together = SoftmaxTarget(MODELS[family])
    rows = [together.open() for _ in lengths]
    together.forward(tokens[:, :9], rows)
    together.commit(lengths, rows)
    batched = together.forward(tokens[:, 9:], rows)
    for index, length in enumerate(lengths):
        alone = SoftmaxTarget(MODELS[family])
        row = alone.open()
        alone.forward(tokens[index : index + 1, :length], [row])
        alone.commit([length], [row])
        assert error(batched[index], alone.forward(tokens[index : index + 1, 9:], [row])[0]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [[0], [4], [1, 3], [0, 1, 2, 3, 4]])
def test_keep_picks_positions(family, keep):
    tokens = torch.arange(3, 13).view(2, 5)
    logits = []
    for wanted in (None, keep):
        target = SoftmaxTarget(MODELS[family])
        logits.append(target.forward(tokens, [target.open(), target.open()], wanted))
    assert logits[1].shape == (2, len(keep), VOCAB)
    assert error(logits[1], logits[0][:, keep]) <= TOLERANCE


def test_tails_grow_past_their_first_capacity():
    """Beyond ``MIN_TAIL_CAPACITY`` tokens the stores double, with what is in them."""
    mirror = Mirror(MODELS["llama"])
    mirror.open()
    mirror.open()
    n = row_cache.MIN_TAIL_CAPACITY - 3
    generator = torch.Generator().manual_seed(1)
    mirror.forward(torch.randint(3, VOCAB, (1, n), generator=generator), [1])
    mirror.commit([1], [n])
    for _ in range(3):
        mirror.forward(torch.randint(3, VOCAB, (2, 4), generator=generator), [0, 1])
        mirror.commit([0, 1], [4, 2])


# what is held


def test_state_bytes_count_a_shared_segment_once():
    target = SoftmaxTarget(MODELS["llama"])
    # two layers, keys and values, two heads of eight numbers of four bytes
    per_token = 2 * 2 * 2 * 8 * 4
    assert target.state_bytes() == 0
    row = target.open()
    target.forward(torch.arange(3, 13)[None], [row])
    assert target.state_bytes() == 0  # tentative tokens are nobody's yet
    target.commit([7], [row])
    assert target.state_bytes() == 7 * per_token
    copies = target.fork(row, 3)
    assert target.state_bytes() == 7 * per_token
    target.forward(torch.tensor([[5], [6]]), copies[:2])
    target.commit([1, 1], copies[:2])
    assert target.state_bytes() == 9 * per_token
    target.close([row, copies[2]])
    assert target.state_bytes() == 9 * per_token
    target.close(copies[:2])
    assert target.state_bytes() == 0


def test_a_closed_rows_slot_is_used_again():
    mirror = Mirror(MODELS["llama"])
    for _ in range(3):
        mirror.open()
    mirror.forward(torch.arange(3, 18).view(3, 5), [0, 1, 2])
    mirror.commit([0, 1, 2], [5, 5, 5])
    for _ in range(4):
        mirror.close([1] if 1 in mirror.kept else [max(mirror.kept)])
        mirror.open()
        mirror.forward(torch.tensor([[9, 8], [7, 6]]), [max(mirror.kept), 0])
        mirror.commit([max(mirror.kept), 0], [2, 0])
    assert {len(store) for store in (*mirror.target.cache._keys, *mirror.target.cache._values)} == {3}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "falcon"])
def test_nothing_that_a_closed_row_left_is_read(family):
    """Large numbers where earlier rows and dropped tokens stood: only what is masked may hold them."""
    mirror = Mirror(MODELS[family])
    for _ in range(3):
        mirror.open()
    mirror.forward(torch.arange(3, 24).view(3, 7), [0, 1, 2])
    mirror.commit([0, 1, 2], [7, 4, 7])
    mirror.close([0, 2])
    cache, slot = mirror.target.cache, mirror.target.cache.rows[1].slot
    for store in (*cache._keys, *cache._values):
        lived = store[slot, :, :4].clone()
        store.fill_(1e4)
        store[slot, :, :4] = lived
    mirror.open()
    mirror.open()
    newest = max(mirror.kept)
    mirror.forward(torch.tensor([[5, 6], [7, 8]]), [newest, 1])
    mirror.commit([newest, 1], [1, 2])
    mirror.forward(torch.tensor([[5], [7], [9]]), [1, newest, newest - 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_overflowed_does_not_poison_the_next_one(family):
    """fp16 can leave NaN behind; a weight of zero times NaN is NaN, so a slot must be clean before it is used again."""
    mirror = Mirror(MODELS[family])
    mirror.open()
    mirror.open()
    mirror.forward(torch.arange(3, 17).view(2, 7), [0, 1])
    mirror.commit([0, 1], [7, 7])
    slot = mirror.target.cache.rows[1].slot
    mirror.close([1])
    for store in (*mirror.target.cache._keys, *mirror.target.cache._values):
        store[slot].fill_(float("nan"))
    mirror.open()
    assert mirror.target.cache.rows[2].slot == slot
    mirror.forward(torch.tensor([[5, 6], [7, 8]]), [2, 0])
    mirror.commit([2, 0], [2, 2])
    mirror.forward(torch.tensor([[9]]), [2])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_close_ranks(family):
    """The last row moves into the hole that a closed one left, with all it holds, and rows lie side by side again."""
    mirror = Mirror(MODELS[family])
    for _ in range(4):
        mirror.open()
    mirror.forward(torch.arange(3, 31).view(4, 7), [0, 1, 2, 3])
    mirror.commit([0, 1, 2, 3], [7, 6, 5, 4])
    mirror.close([0, 2])
    assert sorted(map(mirror.target.place, [1, 3])) == [0, 1]
    mirror.forward(torch.tensor([[5, 6], [7, 8]]), [3, 1])
    mirror.commit([3, 1], [1, 2])
    mirror.open()
    mirror.forward(torch.tensor([[9], [10], [11]]), [3, 1, 4])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 4, 6])
def test_a_row_filled_from_another_is_as_if_it_had_read_the_same(family, length):
    mirror = Mirror(MODELS[family])
    mirror.open()
    mirror.forward(torch.tensor([[3, 4, 5, 6, 7, 8]]), [0])
    mirror.commit([0], [6])
    segment = mirror.target.cache.copy(0)
    mirror.close([0])
    mirror.open()
    mirror.target.cache.fill(1, segment, length)
    mirror.kept[1] = [3, 4, 5, 6, 7, 8][:length]
    mirror.forward(torch.tensor([[9, 10]]), [1])
    mirror.commit([1], [1])
    mirror.open()
    mirror.forward(torch.tensor([[11], [12]]), [1, 2])


# the model it borrows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family):
    model = MODELS[family]
    before = model.config.to_dict(), model.config._attn_implementation, sorted(vars(model)), sorted(vars(model.config))
    plain = from_scratch(model, [5, 6, 7], 3)
    target = SoftmaxTarget(model)
    target.forward(torch.tensor([[5, 6, 7]]), [target.open()])
    assert before == (
        model.config.to_dict(),
        model.config._attn_implementation,
        sorted(vars(model)),
        sorted(vars(model.config)),
    )
    assert torch.equal(from_scratch(model, [5, 6, 7], 3), plain)


def test_the_attention_is_restored_when_forward_fails():
    model = MODELS["llama"]
    before = model.config._attn_implementation
    target = SoftmaxTarget(model)
    with pytest.raises(IndexError):
        target.forward(torch.tensor([[VOCAB + 5]]), [target.open()])
    assert model.config._attn_implementation == before
    assert torch.isfinite(from_scratch(model, [5, 6, 7], 3)).all()


def test_training_state_is_not_built_up():
    target = SoftmaxTarget(MODELS["llama"])
    logits = target.forward(torch.tensor([[5, 6]]), [target.open()])
    assert not logits.requires_grad
    assert not any(store.requires_grad for store in target.cache._keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_close_to_fp32(family):
    """Ragged rows, a fork and a rollback in bf16, against fp32 from scratch on the same (rounded) weights."""
    low = tiny(family, **FAMILIES[family]).to(torch.bfloat16)
    reference = tiny(family, **FAMILIES[family])
    reference.load_state_dict({name: weight.float() for name, weight in low.state_dict().items()})
    target = SoftmaxTarget(low)
    a, b = target.open(), target.open()
    target.forward(torch.arange(3, 19).view(2, 8), [a, b])
    target.commit([8, 5], [a, b])
    (c,) = target.fork(a, 1)
    target.forward(torch.tensor([[30, 31], [32, 33], [34, 35]]), [c, b, a])
    target.commit([1, 2, 0], [c, b, a])
    logits = target.forward(torch.tensor([[40], [41], [42]]), [a, b, c])
    assert logits.dtype == torch.bfloat16
    texts = [[*range(3, 11), 40], [*range(11, 16), 32, 33, 41], [*range(3, 11), 30, 42]]
    expected = torch.stack([from_scratch(reference, text, 1) for text in texts])
    assert error(logits, expected) <= BF16_TOLERANCE


def test_the_limit_of_positions_is_the_models():
    assert SoftmaxTarget(MODELS["gpt2"]).max_positions == 256
    assert SoftmaxTarget(MODELS["falcon"]).max_positions is None  # alibi runs out of nothing
    # look-ahead past a learned table is computed, never read, and must not fail
    target = SoftmaxTarget(MODELS["gpt2"])
    rows = [target.open(), target.open()]
    target.forward(torch.full((2, 254), 5), rows)
    target.commit([254, 10], rows)
    logits = target.forward(torch.full((2, 4), 6), rows)
    assert error(logits[1], from_scratch(MODELS["gpt2"], [5] * 10 + [6] * 4, 4)) <= TOLERANCE
    assert error(logits[0, :2], from_scratch(MODELS["gpt2"], [5] * 254 + [6] * 2, 2)) <= TOLERANCE


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        SoftmaxTarget(model)
