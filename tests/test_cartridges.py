"""Cartridges in front of prompts: a whole document's keys and values must give what the document in the prompt gives.

The other side is transformers' own generate() on document + prompt, or accel's on the same.
"""

from __future__ import annotations

import pytest
import torch

import accel
from accel.errors import AccelError, ArtifactError, IncompatibleError, OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.models.softmax_target import SoftmaxTarget

NEW = 12
WAYS = {
    "plain": {"method": "plain"},
    "lm": {"drafter": "lm", "draft_length": 3},
    "suffix": {"drafter": "suffix", "draft_length": 3},
}
# fp32 sums in another order; a wrong position or a missing slot moves these logits by more than 1e-2
TOLERANCE = 1e-5


def text(length, seed, vocab=67):
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(model, ids, name="doc", **parameters):
    given = {"method": "whole", "exact": True, "documents": (document.describe(str(ids), len(ids)),)} | parameters
    return Cartridge.of(name, document.read(model, ids), model, **given)


def rms_ratio(got, reference):
    return float((got - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt())


def decode(tiny, way, family, batch, **kwargs):
    model, draft = tiny.pair(family)
    artifacts = [draft] if way == "lm" else []
    return accel.generate(model, artifacts=artifacts, **WAYS[way], **batch, max_new_tokens=NEW, **kwargs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "gpt2", "falcon"])
@pytest.mark.parametrize("n", [1, 7])
def test_a_whole_document_gives_the_logits_of_the_document_in_the_prompt(tiny, family, n):
    model, _ = tiny.pair(family)
    doc, query = text(40, 1), text(n, 2)
    target = SoftmaxTarget(model)
    rows = [target.open([document.read(model, doc)]), target.open([document.read(model, doc)])]
    logits = target.forward(torch.tensor([query, query]), rows)
    with torch.no_grad():
        expected = model(torch.tensor([doc + query])).logits[:, -n:]
    assert rms_ratio(logits, expected.expand(2, -1, -1)) <= TOLERANCE
    assert target.num_positions(rows[0]) == len(doc)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("way", WAYS)
def test_generating_behind_a_cartridge_is_generating_behind_its_document(tiny, family, way):
    model, _ = tiny.pair(family)
    doc, query = text(40, 1), text(6, 2)
    theirs = tiny.reference(model, torch.tensor([doc + query]), max_new_tokens=NEW)
    ours = decode(tiny, way, family, {"input_ids": torch.tensor([query])}, cartridges=[whole(model, doc)])
    assert ours[0, : len(query)].tolist() == query
    tiny.assert_similar(torch.cat([torch.tensor([doc]), ours], dim=1), theirs)
    assert accel.stats(model).lossless
    assert accel.stats(model).cartridges == ["doc"]
    # a document that is not read would change the text, or this test could not fail
    alone = decode(tiny, way, family, {"input_ids": torch.tensor([query])})
    assert not torch.equal(alone, ours)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_batch_read_cartridges_of_their_own(tiny, family, way):
    model, _ = tiny.pair(family)
    a, b = text(40, 1), text(17, 5)
    carts = {"a": whole(model, a, "a"), "b": whole(model, b, "b")}
    batch = tiny.prompts(4)
    asked = [[carts["a"]], [], [carts["b"]], [carts["a"]]]
    ours = decode(tiny, way, family, batch, cartridges=asked)
    for row, (doc, names) in enumerate(zip([a, [], b, a], asked, strict=True)):
        query = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        theirs = tiny.reference(model, torch.tensor([doc + query.tolist()]), max_new_tokens=NEW)
        mine = torch.cat([torch.tensor(doc + query.tolist()), ours[row, 9:]])
        width = theirs.sequences.shape[1]
        assert set(mine[width:].tolist()) <= {0}, "only padding behind a row's end"
        tiny.assert_similar(mine[None, :width].long(), theirs)
        alone = decode(tiny, way, family, {"input_ids": query[None]}, cartridges=names)
        assert alone[0, len(query) :].tolist() == ours[row, 9 : 9 + alone.shape[1] - len(query)].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_sampling_behind_a_cartridge_draws_what_it_draws_behind_the_document(tiny, way):
    model, _ = tiny.pair("llama")
    doc, query = text(40, 1), text(6, 2)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "num_return_sequences": 3, "seed": 11}
    cartridge = whole(model, doc)
    behind = decode(tiny, way, "llama", {"input_ids": torch.tensor([query])}, cartridges=[cartridge], **settings)
    inside = decode(tiny, way, "llama", {"input_ids": torch.tensor([doc + query])}, **settings)
    if way != "lm":  # the draft model has not read the document, so that other tokens are drafted and kept
        assert torch.equal(behind, inside[:, len(doc) :])
    assert len({tuple(row.tolist()) for row in behind}) > 1


def test_sixteen_rows_hold_a_cartridge_once(tiny):
    model, _ = tiny.pair("llama")
    cartridge = whole(model, text(200, 1))
    query = torch.tensor([text(5, 2)])
    accel.generate(model, query, method="plain", cartridges=[cartridge], max_new_tokens=4)
    one = accel.stats(model).state_bytes
    queries = torch.tensor([text(5, seed) for seed in range(16)])
    accel.generate(model, queries, method="plain", cartridges=[cartridge], max_new_tokens=4)
    sixteen = accel.stats(model).state_bytes
    tail = one - cartridge.nbytes()
    assert 0 < tail < cartridge.nbytes() / 10
    assert sixteen <= cartridge.nbytes() + 16 * tail


def test_composed_cartridges_keep_their_own_positions_and_move_the_query_by_both(tiny):
    """Keys are not rotated again: each begins at position 0, the query stands behind both (brute force)."""
    model, _ = tiny.pair("llama")
    a, b, query = text(11, 1), text(7, 5), text(4, 2)
    carts = [whole(model, a, "a"), whole(model, b, "b")]
    target = SoftmaxTarget(model)
    rows = [target.open([c.segment for c in order]) for order in (carts, carts[::-1])]
    logits = target.forward(torch.tensor([query, query]), rows)
    assert target.num_positions(rows[0]) == 18
    # transformers' own cache, with both prefixes one behind the other
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        keys = torch.cat([c.segment.keys[layer] for c in carts], dim=1)[None]
        values = torch.cat([c.segment.values[layer] for c in carts], dim=1)[None]
        cache.update(keys, values, layer)
    with torch.no_grad():
        expected = model(
            torch.tensor([query]),
            past_key_values=cache,
            attention_mask=torch.ones(1, 22),
            position_ids=torch.arange(18, 22)[None],
        ).logits
    assert rms_ratio(logits[:1], expected) <= TOLERANCE
    # no slot knows of the other cartridge, so that order alone changes nothing but the order of sums
    assert rms_ratio(logits[1:], logits[:1]) <= TOLERANCE


def test_composing_what_was_not_trained_together_is_said(tiny):
    model, _ = tiny.pair("llama")
    carts = [whole(model, text(11, 1), "a"), whole(model, text(7, 5), "b")]
    accel.generate(model, torch.tensor([text(4, 2)]), cartridges=carts, max_new_tokens=2)
    assert any(note.startswith("a, b: not trained to stand together") for note in accel.stats(model).notes)
    assert accel.stats(model).cartridges == ["a", "b"]
    accel.generate(model, torch.tensor([text(4, 2)]), cartridges=carts[::-1], max_new_tokens=2)
    assert accel.stats(model).cartridges == ["b", "a"]


def test_a_trained_cartridge_is_not_called_lossless(tiny):
    model, _ = tiny.pair("llama")
    trained = whole(model, text(11, 1), exact=False, method="self-study")
    accel.generate(model, torch.tensor([text(4, 2)]), cartridges=[trained], max_new_tokens=2)
    assert not accel.stats(model).lossless


def test_a_draft_may_have_a_cartridge_of_its_own(tiny):
    """A draft that is right reads the same document, and then guesses every token; without it, it does not."""
    model, _ = tiny.pair("llama")
    draft = tiny.build("llama", num_hidden_layers=3, seed=5)  # another config than the target's
    doc, query = text(40, 1), torch.tensor([text(6, 2)])
    mine, drafts_own = whole(model, doc), whole(draft, doc)
    accel.attach(model, draft, mine, drafts_own, draft_length=3)
    with model.__dict__["_accel_attached"].cartridges.use(None, 1) as (seat,):
        assert seat.segments == (mine.segment,) and seat.draft_segments == (drafts_own.segment,)
    drafter = model.generate(query, max_new_tokens=NEW)
    accel.detach(model)
    plain = accel.generate(model, query, artifacts=[mine], method="plain", max_new_tokens=NEW)
    assert torch.equal(drafter, plain)
    # the draft as its own target, so that what it guesses behind its cartridge can be known
    from accel.drafters.base import Ask
    from accel.drafters.small_lm import SmallLMDrafter

    small = SmallLMDrafter(draft, 67)
    small.open_behind([drafts_own.segment], 0, query[0].tolist(), 0)
    guess = small.propose([Ask(0, 3)])[0].tokens
    inside = tiny.reference(draft, torch.tensor([doc + query[0].tolist()]), max_new_tokens=3).sequences[0, -3:]
    assert guess == inside.tolist()


def test_attached_cartridges_stand_in_front_of_every_call_until_removed(tiny):
    model = tiny.build("llama")
    doc, query = text(40, 1), torch.tensor([text(6, 2)])
    accel.attach(model, whole(model, doc), method="plain")
    behind = model.generate(query, max_new_tokens=NEW)
    assert accel.stats(model).cartridges == ["doc"]
    alone = model.generate(query, max_new_tokens=NEW, cartridges=[])
    assert accel.stats(model).cartridges == [] and not torch.equal(behind, alone)
    store = accel.cartridges(model)
    assert store.names() == ["doc"]
    store.remove("doc")
    assert torch.equal(model.generate(query, max_new_tokens=NEW), alone)
    with pytest.raises(ArtifactError, match="no artifact 'doc'"):
        model.generate(query, cartridges=["doc"])
    store.add(whole(model, doc), name="again")
    assert torch.equal(model.generate(query, max_new_tokens=NEW, cartridges=["again"]), behind)
    accel.detach(model)
    with pytest.raises(AccelError, match="not attached"):
        accel.cartridges(model)


def test_what_cannot_read_a_cartridge_is_refused_and_never_decoded_without(tiny):
    model, _ = tiny.pair("llama")
    cartridge, query = whole(model, text(11, 1)), torch.tensor([text(4, 2), text(4, 3)])
    with pytest.raises(IncompatibleError, match="without the cartridges doc"):
        accel.generate(model, query, method="plain", cartridges=[cartridge], num_beams=2)
    with pytest.raises(OptionError, match="3 lists, the batch 2 rows"):
        accel.generate(model, query, cartridges=[[cartridge], [], []])
    with pytest.raises(OptionError, match="mixed"):
        accel.generate(model, query, cartridges=[[cartridge], cartridge])
    with pytest.raises(OptionError, match="give a list"):
        accel.generate(model, query, cartridges=cartridge)
    with pytest.raises(ArtifactError, match="is no cartridge"):
        accel.generate(model, query, cartridges=[3])
    with pytest.raises(OptionError, match="decodes nothing"):
        accel.generate(model, query, method="cartridge")
    with pytest.raises(OptionError, match="takes 258 positions"):
        accel.generate(model, query, cartridges=[whole(model, text(254, 1))])
    other = tiny.build("llama", num_hidden_layers=3)
    with pytest.raises(ArtifactError, match="has layers 3, the model 2"):
        accel.generate(model, query, cartridges=[whole(other, text(11, 1))])
    half = tiny.build("llama").to(torch.bfloat16)
    with pytest.raises(IncompatibleError, match=r"bfloat16 on cpu, the model torch\.float32"):
        accel.generate(model, query, cartridges=[whole(half, text(11, 1))])


def test_a_bias_of_slots_is_added_to_their_scores(tiny):
    """Brute force: transformers' own cache with an additive mask of its own for every head."""
    from dataclasses import replace

    from transformers import DynamicCache

    from accel.errors import ModelError

    model, _ = tiny.pair("llama")
    doc, query = text(9, 1), text(4, 2)
    draw = torch.Generator().manual_seed(0)
    bias = tuple(torch.randn(2, 9, generator=draw) for _ in range(2))
    bias[0][:, 3] = -torch.inf
    segment = replace(document.read(model, doc), bias=bias)
    target = SoftmaxTarget(model)
    logits = target.forward(torch.tensor([query]), [target.open([segment])])
    expected = []
    for layer in range(2):  # one mask serves all layers of a model: a model of each layer's own mask is out of reach
        same = replace(segment, bias=(bias[layer], bias[layer]))
        ours = target.forward(torch.tensor([query]), [target.open([same])])
        cache = DynamicCache()
        for place in range(2):
            cache.update(segment.keys[place][None], segment.values[place][None], place)
        mask = torch.full((4, 13), -torch.inf).triu(10)[None, None].repeat(1, 4, 1, 1)
        mask[..., :9] += bias[layer].repeat_interleave(2, dim=0)[None, :, None]
        with torch.no_grad():
            theirs = model(
                torch.tensor([query]),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=torch.arange(9, 13)[None],
            ).logits
        assert rms_ratio(ours, theirs) <= TOLERANCE
        expected.append(theirs)
    assert rms_ratio(logits, expected[0]) > 1e-2 and rms_ratio(logits, expected[1]) > 1e-2
    falcon, _ = tiny.pair("falcon")
    own = document.read(falcon, doc)
    with pytest.raises(ModelError, match="knows no bias of slots"):
        SoftmaxTarget(falcon).open([replace(own, bias=tuple(torch.zeros(2, 9) for _ in own.keys))])
