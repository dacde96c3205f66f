"""The linear layer against its equation written out in fp64, in one stretch and in pieces, padded and not.

Tolerance: RMS of the error over RMS of the reference, 1e-5, in fp32: another order of the same sums moves these
outputs by some 1e-7, a wrong tap, gate, head or mask by more than 1e-2.
"""

from __future__ import annotations

import pytest
import torch
from linear_models import convert, error, naive, naive_logits

from accel.models.linear import linear_layers

TOLERANCE = 1e-5
OPTIONS = {
    "as published": {},
    "steep gate, bounded": {"min_log_decay": -0.05, "gate_normalizer": 1.0},
    "shared conv, tied maps": {"share_conv": True, "tie_maps": True},
    "silu": {"activation": "silu"},
    "full gate": {"gate_rank": None},
    "no gate": {"gate_rank": 0},
    "no conv": {"conv_width": 0},
    "no denominator": {"normalised": False},
    "affine": {"affine": True},
    "window of 1": {"window": 1},
    "window of 5": {"window": 5},
    "window of 5, affine": {"window": 5, "affine": True},
    "window of 5, old tokens": {
        "conv_width": 0,
        "gate_rank": 0,
        "rope": True,
        "window": 5,
        "covers_window": False,
        "scaled": False,
        "eps": 0.0,
    },
    "rotated": {"conv_width": 0, "gate_rank": 0, "rope": True, "eps": 1e-12},
}


PATHS = {"linear": {}, "window": {"window": 5}, "hybrid": {"layers": (1,)}, "old": OPTIONS["window of 5, old tokens"]}
CASES = [
    *(pytest.param("llama", options, id=name) for name, options in OPTIONS.items()),
    *(pytest.param(family, {"window": 5}, id=family) for family in ("mistral", "qwen2", "qwen3")),
]


@pytest.mark.parametrize(("family", "options"), CASES)
@torch.no_grad()
def test_a_layer_is_its_equation(tiny, family, options):
    """Odd lengths, longer than a chunk of the kernels and a block of the window."""
    model = tiny.build(family)
    convert(model, **options)
    hidden = torch.randn(2, 71, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = model.model.rotary_emb(hidden, torch.arange(71)[None])
    for layer in linear_layers(model):
        got, _ = layer(hidden, position_embeddings=positions)
        for row in range(2):
            assert error(got[row], naive(layer, hidden[row])) <= TOLERANCE


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_transformers_forward_with_a_cache_is_the_equation(tiny, options):
    """A prompt at once, then tokens one by one and several at a time, through a cache of transformers' making."""
    model = tiny.build("llama")
    convert(model, **options)
    tokens = torch.randint(3, tiny.VOCAB, (1, 30), generator=torch.Generator().manual_seed(2))
    expected = naive_logits(model, tokens[0].tolist())
    assert error(model(tokens, use_cache=False).logits[0], expected) <= TOLERANCE
    cache, parts = None, []
    for piece in tokens.split([1, 17, 1, 1, 2, 8], dim=1):
        said = model(piece, past_key_values=cache, use_cache=True)
        cache = said.past_key_values
        parts.append(said.logits[0])
    assert error(torch.cat(parts), expected) <= TOLERANCE
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(tiny, options, side):
    model = tiny.build("llama")
    convert(model, **options)
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, tiny.VOCAB, (n,), generator=draw) for n in (21, 9, 1, 16)]
    ids, mask = torch.full((4, 21), tiny.PAD), torch.zeros(4, 21, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(21 - len(row), 21) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for index, row in enumerate(rows):
        own = logits[index][mask[index].bool()]
        assert error(own, model(row[None], use_cache=False).logits[0]) <= TOLERANCE
        assert error(own, naive_logits(model, row.tolist())) <= TOLERANCE
