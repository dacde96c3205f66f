"""What stands between a decoder layer's products: the reference against transformers' own modules, C against it.

Tolerance: RMS(error)/RMS(reference) ≤ 1e-5 in fp32, sums in another order.
"""

from __future__ import annotations

import math
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler import COMPILED, needs_compiler
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from accel.kernels import native, row_step
from accel.kernels.row_step import Compiled, compiled, layout, reference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(native.library(row_step.SOURCE, tmp_path_factory.mktemp("compiled")))


@pytest.fixture(params=["reference", COMPILED])
def functions(request: pytest.FixtureRequest):
    return reference if request.param == "reference" else request.getfixturevalue("made")


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).square().mean().sqrt() <= TOLERANCE * expected.square().mean().sqrt())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# one to several parts of tokens; outputs that fill no panel, one, several; inputs of one part, and of two that differ
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 25])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (16, 32), (40, 49), (577, 192)])
def test_a_product(functions, tokens: int, inputs: int, outputs: int) -> None:
    # parts of a larger tensor: a token's inputs are not next to the next token's
    x = normal(tokens, inputs + 3)[:, :inputs]
    weight = normal(outputs, inputs, seed=1)
    panels = row_step.panels(weight)
    expected = x.double() @ weight.double().T
    assert close(functions.linear(x, panels).double(), expected)
    got = functions.linear(x.reshape(tokens, 1, inputs), panels)
    assert got.shape == (tokens, 1, outputs)
    assert close(got[:, 0].double(), expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 11])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (16, 32), (40, 49), (577, 192)])
def test_a_product_with_weights_in_8_bits(functions, tokens: int, inputs: int, outputs: int) -> None:
    x, weight = normal(tokens, inputs + 3)[:, :inputs], normal(outputs, inputs, seed=1)
    # each output has its own scale; one of nothing but zeros has a scale, too
    weight *= torch.logspace(-6, 6, outputs)[:, None]
    weight[-1] = 0
    scales = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (weight / scales).round()
    assert rounded.abs().max() == (127 if outputs > 1 else 0)
    panels = row_step.panels(weight, in_8_bits=True)
    assert panels.weights.dtype == torch.int8
    got = functions.linear(x, panels).double() / scales.T
    assert got.shape == (tokens, outputs)
    # what lies just between two integers may be rounded to either
    unsure = ((weight / scales).frac().abs() - 0.5).abs() < 1e-4
    assert close(got[:, ~unsure.any(1)], (x.double() @ rounded.T)[:, ~unsure.any(1)]) or outputs == 1
    assert not got[:, -1].any()


# one value, an odd width, a vector and one more, a real model's; few tokens, and enough to wake the other threads
@pytest.mark.parametrize("width", [1, 7, 8, 9, 33, 576])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_sum_and_its_norm(functions, tokens: int, width: int) -> None:
    norm = LlamaRMSNorm(width, eps=1e-3)
    norm.weight.data = normal(width, seed=1)
    x, delta = normal(tokens, width), normal(tokens, width, seed=2)
    for added in (None, delta):
        own = x.clone()
        got = functions.add_norm(own, added, norm.weight.data, 1e-3)
        total = x if added is None else x + added
        assert torch.equal(own, total)
        assert close(got, norm(total).detach())


@pytest.mark.parametrize("width", [1, 8, 13, 1536])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_gated_silu(functions, tokens: int, width: int) -> None:
    # where e^x overflows or vanishes, and in between
    gate = normal(tokens, width) * 40
    gate.flatten()[0], gate.flatten()[-1] = -200.0, 200.0
    up = normal(tokens, width, seed=1)
    expected = gate.double() / (1 + torch.exp(-gate.double())) * up
    assert close(functions.silu_mul(gate.clone(), up).double(), expected)
    both = torch.cat([gate, up], -1)
    assert close(functions.silu_mul(*both.chunk(2, -1)).double(), expected)


def tables(length: int, size: int) -> tuple[Tensor, Tensor, LlamaRotaryEmbedding]:
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, max_position_embeddings=length)
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.empty(0), torch.arange(length)[None])
    half = size // 2
    return cos[0].contiguous(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1), rotary


def brute_force(q, k, v, rows, rotary, keys, values, scale: float) -> Tensor:
    """A query at a time, over keys that are rotated by transformers."""
    kv_heads, size = keys.shape[1], keys.shape[3]
    group = q.shape[1] // size // kv_heads
    out = torch.empty_like(q)
    for slot, start, position, first, count in rows.tolist():
        new = slice(first, first + count)
        cos, sin = rotary(q, torch.arange(position, position + count)[None])
        queries = q[new].view(1, count, -1, size).transpose(1, 2)
        fresh = k[new].view(1, count, -1, size).transpose(1, 2)
        queries, fresh = apply_rotary_pos_emb(queries, fresh, cos, sin)
        for i in range(count):
            for head in range(kv_heads * group):
                own = head // group
                all_keys = torch.cat([keys[slot, own, :start], fresh[0, own, : i + 1]])
                all_values = torch.cat(
                    [values[slot, own, :start], v[new].view(count, kv_heads, size)[: i + 1, own]],
                )
                weights = (all_keys.double() @ queries[0, head, i].double() * scale).softmax(-1)
                out[first + i, head * size : (head + 1) * size] = (weights @ all_values.double()).float()
    return out


CASES = {
    "one token, nothing before": ([0], [0], [1], 1, 16, 1),
    "heads that share keys": ([0], [5], [1], 3, 16, 2),
    "an odd number of keys, several tokens": ([2, 0], [8, 3], [3, 1], 2, 32, 1),
    "rows of all lengths, not in order": ([3, 0, 2, 1], [0, 37, 64, 1], [5, 1, 2, 9], 3, 16, 3),
    "more queries than a block, a large head": ([1], [70], [11], 5, 128, 2),
    "work for several threads": ([0, 1, 2, 3], [90, 80, 40, 100], [4, 3, 2, 1], 3, 64, 3),
}


@pytest.mark.parametrize("peaked", [False, True], ids=["even", "peaked"])
@pytest.mark.parametrize("case", CASES)
def test_attention_over_rows(functions, case: str, peaked: bool) -> None:
    slots, starts, counts, group, size, kv_heads = CASES[case]
    tokens, heads = sum(counts), group * kv_heads
    capacity, offset = 128, 7
    cosine, sine, rotary = tables(offset + capacity, size)
    q, k, v = (normal(tokens, h * size, seed=s) for h, s in ((heads, 1), (kv_heads, 2), (kv_heads, 3)))
    # scores of hundreds: weights that vanish, and a maximum that must be taken off
    q = q * 60 if peaked else q
    keys, values = (normal(max(slots) + 2, kv_heads, capacity, size, seed=s) for s in (4, 5))
    # a row may begin behind segments: its positions are not its indices
    rows = layout(slots, starts, [offset + start for start in starts], counts)
    expected = brute_force(q, k, v, rows, rotary, keys, values, size**-0.5)
    for slot, start, count in zip(slots, starts, counts, strict=True):
        # nobody may read what lies behind a row's own
        keys[slot, :, start + count :] = math.nan
        values[slot, :, start + count :] = math.nan
    before = keys.clone(), values.clone()
    got = functions.attend(q, k, v, rows, cosine, sine, keys, values, scale=size**-0.5)
    assert close(got, expected)
    first = 0
    for slot, start, count in zip(slots, starts, counts, strict=True):
        written = values[slot, :, start : start + count].transpose(0, 1).flatten(1)
        assert torch.equal(written, v[first : first + count])
        before[0][slot, :, start : start + count] = keys[slot, :, start : start + count]
        before[1][slot, :, start : start + count] = values[slot, :, start : start + count]
        first += count
    assert torch.equal(keys.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(values.nan_to_num(), before[1].nan_to_num())


def test_tokens_beside_others_see_their_own_path_alone(functions) -> None:
    """Token i, at depth d, is the last of a row that gained the first d new tokens and itself."""
    kv_heads, size, capacity, start, offset = 2, 16, 64, 21, 7
    depths = [0, 1, 2, 1, 3, 1, 0]
    cosine, sine, _ = tables(offset + capacity, size)
    q, k, v = (normal(len(depths), heads * size, seed=s) for heads, s in ((6, 1), (2, 2), (2, 3)))
    stores = [normal(2, kv_heads, capacity, size, seed=s) for s in (4, 5)]
    rows = layout([1], [start], [offset + start], [len(depths)])
    own = [store.clone() for store in stores]
    got = functions.attend(q, k, v, rows, cosine, sine, *own, scale=0.25, depths=torch.tensor(depths))
    for i, depth in enumerate(depths):
        path = [*range(depth), i]
        alone = [store.clone() for store in stores]
        rows = layout([1], [start], [offset + start], [len(path)])
        expected = functions.attend(q[path], k[path], v[path], rows, cosine, sine, *alone, scale=0.25)
        assert close(got[i], expected[-1])
        for theirs, ours in zip(alone, own, strict=True):
            assert close(ours[1, :, start + i], theirs[1, :, start + depth])


@needs_compiler
def test_parts_of_a_joined_product_are_read_where_they_lie(made: Compiled) -> None:
    cosine, sine, _ = tables(16, 16)
    joined = normal(4, 64)
    parts = joined.split([32, 16, 16], -1)
    rows = layout([0], [0], [0], [4])
    found = [
        made.attend(*given, rows, cosine, sine, torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 16), scale=0.25)
        for given in (parts, [part.contiguous() for part in parts], [part.double() for part in parts])
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


LAYERS = {
    "one token": ([0], [5], [1], False, 1),
    "tokens beside others": ([1], [5], [5], False, 2),
    "joined products, several layers": ([2, 0], [8, 3], [3, 1], True, 2),
    "rows of all lengths": ([3, 0, 2, 1], [0, 37, 64, 1], [5, 1, 2, 9], False, 3),
}


@pytest.mark.parametrize("in_8_bits", [False, True], ids=["fp32", "8 bits"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers_in_one_call_are_their_parts(functions, case: str, in_8_bits: bool) -> None:
    slots, starts, counts, is_joined, depth = LAYERS[case]
    hidden, heads, kv_heads, size, inner, capacity, eps = 48, 4, 2, 16, 80, 128, 1e-3
    shapes = [(64, hidden), (32, hidden), (32, hidden), (hidden, 64), (inner, hidden), (inner, hidden), (hidden, inner)]
    weights = [[normal(o, i, seed=10 * n + s) / i**0.5 for s, (o, i) in enumerate(shapes)] for n in range(depth)]
    norms = [(normal(hidden, seed=50 + n), normal(hidden, seed=60 + n)) for n in range(depth)]
    cosine, sine, _ = tables(256, size)
    rows = layout(slots, starts, [7 + start for start in starts], counts)
    stores = [[normal(5, kv_heads, capacity, size, seed=70 + 2 * n + i) for i in range(2)] for n in range(depth)]
    x = normal(sum(counts), hidden, seed=90)
    depths = torch.tensor([0, 1, 2, 1, 2]) if case == "tokens beside others" else None

    stack, expected, own = [], x.clone(), [[each.clone() for each in pair] for pair in stores]
    for (before_attention, before_mlp), each, (keys, values) in zip(norms, weights, own, strict=True):
        panels = [row_step.panels(weight, in_8_bits=in_8_bits) for weight in each]
        q, k, v, out, gate, up, down = (lambda x, p=p: reference.linear(x, p) for p in panels)
        normed = torch.nn.functional.rms_norm(expected, (hidden,), before_attention, eps)
        rest = (rows, cosine, sine, keys, values)
        found = reference.attend(q(normed), k(normed), v(normed), *rest, scale=0.25, depths=depths)
        expected = expected + out(found)
        normed = torch.nn.functional.rms_norm(expected, (hidden,), before_mlp, eps)
        expected = expected + down(torch.nn.functional.silu(gate(normed)) * up(normed))
        if is_joined:
            # a row is rounded by itself, so that joined weights are the same weights
            joined = [torch.cat(each[:3]), torch.cat(each[4:6])]
            qkv, gate_up = ([row_step.panels(weight, in_8_bits=in_8_bits)] for weight in joined)
        else:
            qkv, gate_up = panels[:3], panels[4:6]
        stack.append(row_step.Layer(before_attention, before_mlp, qkv, [panels[3]], gate_up, [panels[6]]))

    made = stack if functions is reference else row_step.Stack(stack)
    given = (made, rows, cosine, sine, [tuple(pair) for pair in stores])
    got = functions.layers(x.clone(), *given, heads=heads, eps=eps, scale=0.25, depths=depths)
    assert close(got, expected)
    for pair, wanted in zip(stores, own, strict=True):
        assert all(close(a, b) for a, b in zip(pair, wanted, strict=True))


# what is broken: the source text, the broken text, and the test that must notice
MUTATIONS = [
    ("the sums so far", "is_first ? all(0) : load(out + t * out_stride + half * LANES)", "all(0)", "linear"),
    ("the second half of a panel", "sum[1] += high * value", "sum[1] += low * value", "linear"),
    ("the second part of the tokens", "out + t * width, width", "out, width", "linear"),
    ("the part of the inputs", "x + t * x_stride + i, x_stride,", "x + t * x_stride, x_stride,", "linear"),
    ("the weight in its integer", "<< (24 - 8 * (i % PACKED)) >> 24", "<< 24 >> 24", "8 bits"),
    ("the second sum of few tokens", "sums[t][half] += sums[MAX_TOKENS + t][half]", "", "8 bits"),
    ("the scales", "load(scales + p * PANEL + half)", "load(scales + half)", "8 bits"),
    ("the other layers' sums", "l ? delta : NULL", "NULL", "layers"),
    ("the next part's place", "out += weights[i].num_panels * PANEL", "", "layers"),
    ("the layer's own store", "layer->values, capacity", "layer->keys, capacity", "layers"),
    ("the last sum", "x[i] += delta[i]", "x[i] += 0", "layers"),
    ("the mean's epsilon", "(float)width + eps", "(float)width", "norm"),
    ("what is added", "value += load(delta + t * width + i)", "value", "norm"),
    ("the norm's end", "for (; i < width; i++) to[i] = row[i] * scale * weight[i];", "", "norm"),
    ("the sigmoid of negatives", "choose(positive, all(1), e)", "all(1)", "silu"),
    ("the gate's end", "expf(-g[i])", "expf(g[i])", "silu"),
    ("the rotation's second half", "load(sine + half + i)", "load(sine + i)", "attend"),
    ("the row's position", "(rows[r].position + depth) * size", "(rows[r].start + depth) * size", "attend"),
    ("the causal mask", "key >= sees[query] &&", "key > sees[query] + 1 &&", "attend"),
    ("a token itself", "&& key != own[query]", "", "attend"),
    ("the token's depth", "depths ? depths[token] : i;", "i;", "depths"),
    ("what a token beside others sees", "depths ? row->start + depths[row->first + i / group] : own", "own", "depths"),
    ("the maximum", "load(scores + j * QUERIES) - best", "load(scores + j * QUERIES)", "peaked"),
    ("the other half's maximum", "best = larger(best, SHUFFLE(best, best, 4, 5, 6, 7, 0, 1, 2, 3));", "", "peaked"),
    ("the other half's weights", "total += SHUFFLE(total, total, 4, 5, 6, 7, 0, 1, 2, 3);", "", "attend"),
    ("the head that a query reads", "const int64_t h = item % kv_heads, from", "const int64_t h = 0, from", "attend"),
    (
        "the new values",
        "v + token * v_stride + h * size, (size_t)",
        "k + token * k_stride + h * size, (size_t)",
        "attend",
    ),
]


@needs_compiler
@pytest.mark.parametrize(("text", "broken", "check"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_deliberate_bug_turns_a_check_red(text: str, broken: str, check: str, tmp_path: Path) -> None:
    source = row_step.SOURCE.read_text(encoding="utf-8")
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in the source, not once"
    (tmp_path / "cpu.c").write_text(source.replace(text, broken), encoding="utf-8")
    mutant = Compiled(native.library(tmp_path / "cpu.c", tmp_path))
    checks = {
        "linear": lambda: [test_a_product(mutant, n, 577, 49) for n in (1, 4, 11)],
        "8 bits": lambda: [test_a_product_with_weights_in_8_bits(mutant, n, 40, 49) for n in (1, 3)],
        "layers": lambda: [test_layers_in_one_call_are_their_parts(mutant, case, False) for case in LAYERS],
        "norm": lambda: [test_a_sum_and_its_norm(mutant, n, 33) for n in (1, 40)],
        "silu": lambda: [test_gated_silu(mutant, 2, width) for width in (8, 13)],
        "attend": lambda: [test_attention_over_rows(mutant, case, False) for case in CASES],
        "peaked": lambda: [test_attention_over_rows(mutant, case, True) for case in CASES],
        "depths": lambda: [test_tokens_beside_others_see_their_own_path_alone(mutant)],
    }
    with pytest.raises(AssertionError):
        checks[check]()


@needs_compiler
def test_a_library_that_says_something_else_is_not_taken(tmp_path, monkeypatch) -> None:
    (tmp_path / "cpu.c").write_text(row_step.SOURCE.read_text(encoding="utf-8").replace("+ eps", "+ 1"))
    monkeypatch.setattr(row_step, "SOURCE", tmp_path / "cpu.c")
    with pytest.warns(UserWarning, match="add_norm of the compiled library is wrong"):
        assert compiled(tmp_path / "kept") is None


@needs_compiler
def test_a_library_is_made_once_and_kept(tmp_path, monkeypatch) -> None:
    made = compiled(tmp_path / "new" / "kept")
    assert made is not None
    assert [path.suffix for path in (tmp_path / "new" / "kept").iterdir()] == [".so"]
    # from here on nobody needs a compiler
    monkeypatch.setenv("CC", "no-such-compiler")
    native.library(row_step.SOURCE, tmp_path / "new" / "kept")
    with pytest.raises(native.NotCompiled, match="no-such-compiler"):
        native.library(row_step.SOURCE, tmp_path / "elsewhere")


@needs_compiler
def test_where_nothing_can_be_kept_it_is_made_for_the_process(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    native.library(row_step.SOURCE, tmp_path / "file" / "compiled")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_the_reference_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    with pytest.warns(UserWarning, match="no C compiler .*install one, or name yours with CC"):
        assert compiled(tmp_path / "a") is None
    failing = script(tmp_path / "failing", "import sys; sys.exit('what is this?')")
    monkeypatch.setenv("CC", failing)
    with pytest.warns(UserWarning, match=r"failing: what is this\?"):
        assert compiled(tmp_path / "b") is None
    # it exits well and makes nothing that can be loaded
    lying = script(tmp_path / "lying", "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('x')")
    monkeypatch.setenv("CC", lying)
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert compiled(tmp_path / "c") is None


def test_workers_are_given_up_and_come_again() -> None:
    """In a process of its own: other tests' threads come and go."""
    code = """
import psutil, torch
from accel.kernels.native import release_workers
torch.set_num_threads(3)
count = lambda: psutil.Process().num_threads()
x = torch.ones(1 << 20)
x.exp()
busy = count()
released = release_workers()
after = count()
assert torch.equal(x.exp(), x.exp())
print(busy, released, after, count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    busy, released, after, again = done.stdout.split()
    assert released == "True"
    assert int(busy) == int(again) == int(after) + 2
