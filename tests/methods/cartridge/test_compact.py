"""The quick fit: exact where nothing is left out, better than leaving tokens out; its parts against plain algebra."""

from __future__ import annotations

import pytest
import torch

from accel.errors import IncompatibleError, OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.distill.compact import _masses, compact, fit
from accel.models.row_cache import Segment
from accel.models.softmax_target import SoftmaxTarget


def text(length, seed):
    return torch.randint(3, 67, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def behind(model, segment, query):
    target = SoftmaxTarget(model)
    return target.forward(torch.tensor([query]), [target.open([segment])])


def test_all_slots_are_the_document_itself(tiny):
    model, _ = tiny.pair("llama")
    doc, query = text(30, 1), text(5, 2)
    segment = compact(model, doc, [text(6, seed) for seed in range(20)], 30, 1)
    torch.testing.assert_close(
        behind(model, segment, query), behind(model, document.read(model, doc), query), rtol=2e-2, atol=2e-2
    )


def test_a_fit_is_nearer_than_the_tokens_alone(tiny):
    """At the same positions, so that only what the fit does can help: bias and values of the same keys."""
    model, _ = tiny.pair("llama")
    doc = text(40, 1)
    queries = [text(8, seed) for seed in range(30)]
    fitted = compact(model, doc, queries, 10, 1)
    assert fitted.num_positions == 40 and fitted.num_tokens == 10
    whole = document.read(model, doc)
    bare = Segment(fitted.keys, tuple(_own_values(whole, fitted)), 40)
    first = Segment(tuple(k[:, :10] for k in whole.keys), tuple(v[:, :10] for v in whole.values), 40)

    def distance(segment):
        gaps = [behind(model, segment, q) - behind(model, whole, q) for q in (text(8, seed) for seed in range(90, 100))]
        return float(torch.cat(gaps).pow(2).mean())

    assert distance(fitted) < 0.7 * distance(bare)
    assert distance(fitted) < 0.5 * distance(first)


def _own_values(whole, fitted):
    """The document's values at the keys that were chosen."""
    for keys, values, chosen in zip(whole.keys, whole.values, fitted.keys, strict=True):
        places = (chosen[:, :, None] == keys[:, None]).all(-1).int().argmax(-1)
        yield values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def test_the_sink_is_always_chosen():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 30, 4, generator=generator) for _ in range(2))
    queries = torch.randn(2, 50, 4, generator=generator)
    queries -= 10 * keys[:, :1]  # nobody looks there
    assert torch.equal(fit(keys, values, queries, 5, 2, 0.5).keys[:, :2], keys[:, :2])


def test_masses_solve_the_equation_where_it_has_a_solution():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(1, 40, 5, generator=generator)
    true = torch.tensor([[0.2, 1.0, 3.0, 0.5, 1.5]])
    parts = parts / (parts @ true[..., None])  # rows now sum to 1 under the true weights
    torch.testing.assert_close(_masses(parts), true, rtol=5e-2, atol=5e-2)
    assert (_masses(torch.rand(1, 40, 60, generator=generator)) > 0).all()


def test_what_cannot_be_fitted_is_refused(tiny):
    model, _ = tiny.pair("llama")
    with pytest.raises(OptionError, match="no queries"):
        compact(model, text(20, 1), [], 5, 1)
    with pytest.raises(OptionError, match="tokens=21"):
        compact(model, text(20, 1), [text(4, 2)], 21, 1)
    with pytest.raises(IncompatibleError, match="queries cannot be seen"):
        compact(tiny.pair("falcon")[0], text(20, 1), [text(4, 2)], 5, 1)
