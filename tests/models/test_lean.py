"""The lean pass of draft models against transformers' own, run from scratch on each row's whole text.

Tolerance: RMS(error)/RMS(reference) ≤ 1e-5 in fp32: the same products, some summed in another order.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from accel.artifacts.resolve import compiled_folder
from accel.kernels.row_step import compiled
from accel.models import cpu_linear
from accel.models.lagged import install
from accel.models.lean import LeanDraft, LeanTarget, draft_reader, supports, target_for
from accel.models.softmax_target import SoftmaxTarget

VOCAB = 61
TOLERANCE = 1e-5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # wide enough that every position matters
    "initializer_range": 0.3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


def llama(**more) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more))


def looking_back(**more) -> PreTrainedModel:
    model = install(llama(embedding_lags=2, **more))
    torch.nn.init.normal_(model.get_input_embeddings().lag_weight, std=0.1)
    return model


MAKERS = {
    "llama": llama,
    "llama-looking-back": lambda: looking_back(tie_word_embeddings=True),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=32),
    # the others' heads are too small for compiled attention
    "llama-small-heads": lambda: llama(head_dim=8),
    "llama-yarn": lambda: llama(rope_parameters=YARN),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


@torch.no_grad()
def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    for parameter in model.parameters():
        # norms and biases begin as ones and zeros, which hide whether they are used
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@torch.no_grad()
def from_scratch(model: PreTrainedModel, text: list[int], last: int) -> torch.Tensor:
    return model(torch.tensor([text]), use_cache=False).logits[0, -last:].float()


@pytest.fixture(params=["one call", "compiled", "torch"])
def way(request, monkeypatch) -> str:
    """How layers are read: by one compiled call, by compiled functions between the products, or by torch."""
    if request.param == "torch":
        monkeypatch.setattr("accel.kernels.row_step.compiled", lambda folder: None)
    elif compiled(compiled_folder()) is None:
        pytest.skip("needs a C compiler")
    return request.param


# whose layers have what the one call does not: biases, small heads, normalised heads
NOT_IN_ONE_CALL = {"llama-biases", "llama-small-heads", "qwen2", "qwen3"}


def prepare(reader: LeanTarget, way: str) -> None:
    """Have the reader read in that way, and notice if it does not."""
    if way == "one call":
        cpu_linear.install(reader.linears, "compiled")


def check_way(reader: LeanTarget, name: str, way: str) -> None:
    assert (reader._compiled is None) == (way == "torch")
    in_one_call = {stack is not None for stack in reader._stacks.values()}
    assert in_one_call <= {way == "one call" and name not in NOT_IN_ONE_CALL}


@pytest.mark.parametrize("kind", [LeanDraft, LeanTarget])
@pytest.mark.parametrize("name", MAKERS)
def test_a_text_read_in_pieces_equals_the_models_own_pass(name: str, kind: type[LeanTarget], way: str) -> None:
    model = made(name)
    reader = (draft_reader if kind is LeanDraft else target_for)(model)
    assert type(reader) is kind
    prepare(reader, way)
    torch.manual_seed(1)
    # past the first capacity of tails and rotations
    text = torch.randint(VOCAB, (300,)).tolist()
    row = reader.open()
    at = 0
    for n in (1, 7, 250, 1, 1, 5, 35):
        logits = reader.forward(torch.tensor([text[at : at + n]]), [row])
        reader.commit([n], [row])
        at += n
        assert logits.shape == (1, n, VOCAB)
        assert error(logits[0], from_scratch(model, text[:at], n)) <= TOLERANCE
    assert reader.num_positions(row) == at == 300
    check_way(reader, name, way)


MOVE = st.tuples(st.lists(st.booleans(), min_size=3, max_size=3), st.integers(1, 4), st.integers(0, 4), st.booleans())
MODEL = made("llama")


@given(st.lists(MOVE, min_size=1, max_size=6), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rows_advance_and_roll_back_on_their_own(moves, seed) -> None:
    reader = LeanDraft(MODEL)
    generator = torch.Generator().manual_seed(seed)
    names = [reader.open() for _ in range(3)]
    texts: dict[int, list[int]] = {name: [] for name in names}
    tentative: dict[int, list[int]] = {name: [] for name in names}
    for who, n, kept, commits in moves:
        chosen = [name for name, chooses in zip(names, who, strict=True) if chooses]
        if not chosen:
            continue
        tokens = torch.randint(VOCAB, (len(chosen), n), generator=generator)
        logits = reader.forward(tokens, chosen, [n - 1])
        assert logits.shape == (len(chosen), 1, VOCAB)
        for place, name in enumerate(chosen):
            tentative[name] += tokens[place].tolist()
            assert error(logits[place], from_scratch(MODEL, texts[name] + tentative[name], 1)) <= TOLERANCE
        if commits:
            counts = [min(kept, len(tentative[name])) for name in chosen]
            reader.commit(counts, chosen)
            for name, count in zip(chosen, counts, strict=True):
                texts[name] += tentative[name][:count]
                tentative[name] = []
    # what is tentative is not counted as held
    reader.commit([len(tentative[name]) for name in names], names)
    held = sum(len(texts[name]) + len(tentative[name]) for name in names)
    assert reader.state_bytes() == held * 2 * 2 * 2 * 16 * 4
    reader.close(names)
    assert reader.state_bytes() == 0


@pytest.mark.parametrize("name", ["llama", "llama-small-heads", "qwen3"])
@pytest.mark.parametrize("kind", [LeanDraft, LeanTarget])
def test_rows_of_different_lengths_are_read_as_far_as_each_goes(name: str, kind: type[LeanTarget], way: str) -> None:
    model = made(name)
    reader = kind(model)
    prepare(reader, way)
    generator = torch.Generator().manual_seed(1)
    names = [reader.open() for _ in range(3)]
    texts: list[list[int]] = [[] for _ in names]
    positions = 0
    head = reader.linears[-1] if kind is LeanDraft else model.lm_head
    hook = head.register_forward_hook(lambda _, given, out: counted.append(len(given[0])))
    counted: list[int] = []
    for lengths, kept in (
        ([4, 1, 2], [3, 1, 0]),
        ([1, 5, 1], [1, 5, 1]),
        ([2, 2, 2], [2, 0, 1]),
        ([1, 1, 6], [1, 1, 6]),
    ):
        tokens = torch.randint(VOCAB, (3, max(lengths)), generator=generator)
        found = reader.forward_ragged(tokens, names, lengths)
        for place, logits in enumerate(found):
            own = tokens[place, : lengths[place]].tolist()
            assert logits.shape == (lengths[place], VOCAB)
            assert error(logits, from_scratch(model, texts[place] + own, lengths[place])) <= TOLERANCE
            texts[place] += own[: kept[place]]
        positions += sum(lengths)
        reader.commit(kept, names)
    hook.remove()
    if kind is LeanDraft:
        assert sum(counted) == positions
    assert [reader.num_positions(name) for name in names] == [len(text) for text in texts]
    check_way(reader, name, way)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-yarn", "qwen3"])
def test_branches_are_read_as_if_each_were_alone(name: str, way: str) -> None:
    """A chain of three and tokens beside it; then what one path leaves behind is read on from."""
    model = made(name)
    reader = target_for(model)
    prepare(reader, way)
    text = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    row, other = reader.open(), reader.open()
    for each in (row, other):
        reader.forward(torch.tensor([text]), [each])
        reader.commit([len(text)], [each])
    assert reader.may_branch(row) == (way != "torch")
    if way == "torch":
        return
    tokens, depths = [7, 11, 13, 17, 19, 23, 29], [0, 1, 2, 3, 1, 3, 1]
    for path in ([0], [0, 1, 2], [0, 4], [0, 1, 2, 5], [0, 6]):
        logits = reader.forward_branches(torch.tensor(tokens), row, depths)
        assert logits.shape == (7, VOCAB)
        for place, depth in enumerate(depths):
            alone = [*tokens[:depth], tokens[place]]
            assert error(logits[place], from_scratch(model, text + alone, 1)[0]) <= TOLERANCE
        reader.commit_path(path, row)
        text += [tokens[place] for place in path]
        assert reader.num_positions(row) == len(text)
        logits = reader.forward(torch.tensor([[3, 5]]), [row])
        assert error(logits[0], from_scratch(model, [*text, 3, 5], 2)) <= TOLERANCE
        reader.commit([1], [row])
        text.append(3)
    check_way(reader, name, way)
    # what stands beside a shared context is read in torch, which knows chains alone
    assert not any(reader.may_branch(copy) for copy in reader.fork(row, 2))
    small = LeanTarget(made("llama-small-heads"))
    assert not small.may_branch(small.open())


class Doubled(nn.Module):
    """What LoRA and its like put in a linear layer's place."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@torch.no_grad()
def test_a_target_is_read_as_it_stands_now() -> None:
    model = made("llama")
    reader = target_for(model)
    assert type(reader) is LeanTarget
    layer = model.model.layers[0]
    heard: list[int] = []

    def check() -> torch.Tensor:
        row, expected = reader.open(), from_scratch(model, [5, 9], 2)
        heard.clear()
        got = reader.forward(torch.tensor([[5, 9]]), [row])[0]
        again = reader.forward_ragged(torch.tensor([[5, 9, 1], [5, 9, 2]]), [reader.open(), reader.open()], [2, 3])[0]
        assert max(error(got, expected), error(again, expected)) <= TOLERANCE
        return got

    seen = [check()]
    layer.self_attn.q_proj = Doubled(layer.self_attn.q_proj)
    seen.append(check())
    layer.mlp.act_fn = nn.ReLU()
    seen.append(check())
    model.model.layers[1].mlp = Doubled(model.model.layers[1].mlp)
    seen.append(check())
    hook = layer.register_forward_hook(lambda *_: heard.append(1))
    check()
    assert len(heard) == 2, "a hook is called in every pass"
    hook.remove()
    check()
    assert not heard
    assert all(error(a, b) > 1e-3 for a, b in itertools.pairwise(seen))


def test_kept_positions_are_the_asked_for_ones() -> None:
    reader = LeanDraft(MODEL)
    rows = [reader.open(), reader.open()]
    tokens = torch.arange(10).view(2, 5)
    every = reader.forward(tokens, rows)
    reader.commit([0, 0], rows)
    assert error(reader.forward(tokens, rows, [1, 3]), every[:, [1, 3]]) <= TOLERANCE


def test_a_row_does_not_depend_on_its_neighbours_with_8_bits_either() -> None:
    reader = LeanDraft(MODEL)
    ways = dict.fromkeys(cpu_linear.MEASURED_ROWS, "int8")
    for module in reader.linears:
        module.forward = cpu_linear._FastForward(module, ways)
    alone, first, second = reader.open(), reader.open(), reader.open()
    torch.manual_seed(3)
    for n in (6, 1, 2):
        tokens = torch.randint(VOCAB, (2, n))
        both = reader.forward(tokens, [first, second])
        assert error(both[0], reader.forward(tokens[:1], [alone])[0]) <= TOLERANCE
    exact = from_scratch(MODEL, [1, 2, 3], 3)
    fresh = reader.open()
    assert TOLERANCE < error(reader.forward(torch.tensor([[1, 2, 3]]), [fresh])[0], exact) < 0.1


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
@torch.no_grad()
def test_changed_weights_are_followed(name: str) -> None:
    model = made(name)
    reader = LeanDraft(model)
    before = from_scratch(model, [5, 9], 2)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[0].mlp
    for change in (
        lambda: attention.k_proj.weight.mul_(2.0),
        lambda: setattr(attention.v_proj, "weight", nn.Parameter(attention.v_proj.weight * -1)),
        lambda: mlp.down_proj.weight.neg_(),
        lambda: mlp.up_proj.weight.add_(0.1),
        lambda: model.model.norm.weight.mul_(1.5),
        lambda: model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0)),
    ):
        change()
        row = reader.open()
        after = from_scratch(model, [5, 9], 2)
        assert error(reader.forward(torch.tensor([[5, 9]]), [row])[0], after) <= TOLERANCE
    assert error(before, after) > 0.1


@torch.no_grad()
def test_half_precision_weights_are_read_in_fp32() -> None:
    model = made("llama").bfloat16()
    reader = draft_reader(model)
    assert isinstance(reader, LeanDraft)
    logits = reader.forward(torch.tensor([[5, 9, 2]]), [reader.open()])[0]
    assert logits.dtype == torch.float32
    assert error(logits, from_scratch(model.float(), [5, 9, 2], 3)) <= TOLERANCE


@torch.no_grad()
def test_a_model_that_changes_its_precision_is_followed() -> None:
    model = made("llama")
    reader = LeanDraft(model)
    model.bfloat16()
    expected = from_scratch(made("llama").bfloat16().float(), [5, 9, 2], 3)
    assert error(reader.forward(torch.tensor([[5, 9, 2]]), [reader.open()])[0], expected) <= TOLERANCE
    model.float()
    assert error(reader.forward(torch.tensor([[5, 9, 2]]), [reader.open()])[0], expected) <= TOLERANCE


class Changed(nn.Linear):
    """Somebody's own layer."""


def hooked() -> PreTrainedModel:
    model = llama()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def replaced() -> PreTrainedModel:
    model = llama()
    model.model.layers[0].mlp.up_proj = Changed(96, 80, bias=False)
    return model


def patched() -> PreTrainedModel:
    model = llama()
    model.model.layers[0].forward = model.model.layers[0].forward
    return model


def inferred() -> PreTrainedModel:
    with torch.inference_mode():
        return llama()


class Derived(LlamaForCausalLM):
    """Somebody's own model."""


@pytest.mark.parametrize(
    "make",
    [
        hooked,
        replaced,
        patched,
        inferred,
        lambda: Derived(LlamaConfig(**SIZES)),
        lambda: llama(hidden_act="gelu"),
        lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=4)),
    ],
    ids=["hooked", "replaced", "patched", "inferred", "derived", "gelu", "dynamic", "window", "gpt2"],
)
def test_other_models_keep_their_own_pass(make) -> None:
    model = make().eval()
    assert not supports(model)
    assert isinstance(draft_reader(model), SoftmaxTarget)


def test_large_models_keep_their_own_pass(monkeypatch) -> None:
    monkeypatch.setattr("accel.models.lean.MAX_PARAMETERS", 1000)
    assert not supports(MODEL)
