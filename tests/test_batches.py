"""Rows of a batch: independent of each other where they can be, in step where somebody looks at all of them."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import LogitsProcessor, MaxLengthCriteria, StoppingCriteria

import accel

NEW = 16
WAYS = {
    "plain": (False, {"method": "plain"}),
    "lm": (True, {"drafter": "lm", "draft_length": 3}),
    "suffix": (False, {"drafter": "suffix", "draft_length": 3}),
    "cascade": (True, {"drafter": "cascade", "draft_length": 4}),
}


def decode(tiny, way, family="llama", model=None, **kwargs):
    own, draft = tiny.pair(family)
    with_draft, options = WAYS[way]
    model = own if model is None else model
    out = accel.generate(model, artifacts=[draft] if with_draft else [], **options, **kwargs)
    assert accel.stats(model).method in ("plain", "speculative"), accel.stats(model).notes
    return out


def rows(batch, *indices):
    return {name: value[list(indices)] for name, value in batch.items()}


def new_tokens(sequence, start):
    """What a row generated, without the padding behind its end."""
    tokens = sequence[start:].tolist()
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


@pytest.mark.parametrize("way", WAYS)
def test_an_assistant_with_a_batch_or_several_sequences_works(tiny, way):
    """Where transformers raises; the answer is that of greedy decoding."""
    model, draft = tiny.pair("llama")
    batch = tiny.prompts(4) | {"max_new_tokens": NEW}
    with pytest.raises(ValueError, match="batch_size = 1"):
        tiny.reference(model, **batch, assistant_model=draft)
    attached = accel.attach(tiny.build("llama"))
    theirs = tiny.reference(model, **batch)
    tiny.assert_similar(attached.generate(**batch, assistant_model=draft), theirs)
    tiny.assert_similar(decode(tiny, way, **batch), theirs)
    # one candidate left: sampling is greedy, so that several sequences can be compared
    several = decode(tiny, way, **batch, do_sample=True, top_k=1, num_return_sequences=3)
    expected = tiny.reference(model, **batch, do_sample=True, top_k=1, num_return_sequences=3)
    tiny.assert_similar(several, expected)
    assert several.shape[0] == 12


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 11, "temperature": 1.1, "top_k": 30}])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_a_row_does_not_depend_on_its_neighbours_nor_its_padding(tiny, family, way, sampling):
    batch = tiny.prompts(4)
    settings = {"max_new_tokens": NEW, "family": family} | sampling
    together = decode(tiny, way, **batch, **settings)
    # row 0 alone, with other neighbours, and with its prompt pushed right by padding
    alone = decode(tiny, way, **rows(batch, 0), **settings)
    among_others = decode(tiny, way, **rows(batch, 0, 2), **settings)
    padded = {name: torch.nn.functional.pad(value[:1], (5, 0)) for name, value in batch.items()}
    pushed = decode(tiny, way, **padded, **settings)
    expected = new_tokens(together[0], 9)
    assert new_tokens(alone[0], 9) == new_tokens(among_others[0], 9) == new_tokens(pushed[0], 14) == expected


@pytest.mark.parametrize("way", WAYS)
def test_seeds(tiny, way):
    def sample(**kwargs):
        return decode(tiny, way, **tiny.prompts(4), max_new_tokens=NEW, do_sample=True, top_k=0, **kwargs).tolist()

    assert sample(seed=5) == sample(seed=5) != sample(seed=6)
    torch.manual_seed(0)
    first, second = sample(), sample()
    torch.manual_seed(0)
    assert sample() == first != second
    torch.manual_seed(1)
    assert sample() != first


def test_copies_of_one_prompt_are_sampled_independently(tiny):
    out = decode(tiny, "lm", **tiny.prompts(1), max_new_tokens=NEW, do_sample=True, seed=1, num_return_sequences=8)
    assert len({tuple(row) for row in out.tolist()}) == 8


class Crowd(LogitsProcessor):
    """Whole-batch: a token that ends another row's text is unlikely, and who is alone does as he likes."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, input_ids[torch.arange(len(scores)) != row, -1]] -= 3.0
            scores[row, :10] += 0.1 * (input_ids == 0).sum() / len(scores)
        return scores


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eos", [True, False])
def test_processors_that_look_at_the_whole_batch(tiny, way, eos):
    model = tiny.build("llama", eos_token_id=2 if eos else None)
    batch = tiny.prompts(4) | {"max_new_tokens": 2 * NEW}
    free = tiny.reference(model, **batch)
    if eos:  # end one row early, so that its padding is there to be seen
        batch["eos_token_id"] = [2, int(free.sequences[1, 12])]
        free = tiny.reference(model, **batch)
    theirs = tiny.reference(model, **batch, logits_processor=[Crowd()])
    assert not torch.equal(theirs.sequences, free.sequences)
    tiny.assert_similar(decode(tiny, way, model=model, **batch, logits_processor=[Crowd()]), theirs)
    notes = accel.stats(model).notes
    assert way == "plain" or any("whole batch" in note for note in notes)


class RowEnds(StoppingCriteria):
    """Row-wise: a row ends at a token that 5 divides."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


class AnyoneEnds(StoppingCriteria):
    """Whole-batch: all rows end when the last tokens' scores and ids satisfy a rule about the whole."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None or all(step.shape[0] == len(input_ids) for step in scores)
        enough = len(scores) >= 9 if scores is not None else input_ids[:, -1].sum() > 190
        return torch.full((len(input_ids),), bool(enough))


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return False


@pytest.mark.parametrize("way", ["plain", "lm"])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("criterion", [RowEnds, AnyoneEnds, Never])
@pytest.mark.parametrize("batch", [1, 4])
def test_custom_stopping_criteria(tiny, way, eos, criterion, batch):
    model = tiny.build("llama", eos_token_id=2 if eos else None)
    inputs = tiny.prompts(batch) | {"max_new_tokens": 2 * NEW, "stopping_criteria": [criterion()]}
    theirs = tiny.reference(model, **inputs)
    out = decode(tiny, way, model=model, **inputs, return_dict_in_generate=True, output_scores=True)
    tiny.assert_similar(out.sequences, theirs, out.scores)
    # without scores, criteria are told None
    plainly = tiny.prompts(batch) | {"max_new_tokens": 2 * NEW, "stopping_criteria": [criterion()]}
    expected = type(model).generate(model, **plainly)
    assert decode(tiny, way, model=model, **plainly).tolist() == expected.tolist()


def test_rows_of_very_different_lengths_finish_on_their_own(tiny):
    model, draft = tiny.pair("llama", "right")
    batch = tiny.prompts(4) | {"max_new_tokens": 40}
    theirs = tiny.reference(model, **batch)
    early = [int(theirs.sequences[0, 9 + 1]), int(theirs.sequences[3, 9 + 20])]
    batch["eos_token_id"] = early
    theirs = tiny.reference(model, **batch)
    lengths = {len(new_tokens(row.masked_fill(torch.isin(row, torch.tensor(early)), 2), 9)) for row in theirs.sequences}
    assert len(lengths) > 1
    ours = accel.generate(model, artifacts=[draft], drafter="lm", draft_length=5, **batch)
    tiny.assert_similar(ours, theirs)


class EveryOtherLength(MaxLengthCriteria):
    """A subclass means what it says, not what its parent did."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9 + self.max_length)


@pytest.mark.parametrize("way", ["plain", "lm"])
@pytest.mark.parametrize("batch", [1, 4])
def test_subclasses_of_transformers_criteria(tiny, way, batch):
    model, _ = tiny.pair("llama")
    inputs = tiny.prompts(batch) | {"max_new_tokens": NEW}
    theirs = tiny.reference(model, **tiny.prompts(batch), max_new_tokens=5)
    tiny.assert_similar(decode(tiny, way, **inputs, stopping_criteria=[EveryOtherLength(5)]), theirs)


@pytest.mark.parametrize("options", [{"draft_length": 1}, {"draft_length": 6}, {}])
@pytest.mark.parametrize("drafter", ["suffix", "ngram"])
def test_free_drafters_leave_sampled_tokens_as_they_are(tiny, drafter, options):
    """A certain guess is kept where it is what the row draws anyway: one seed, one output, whoever drafts."""
    model = tiny.build("llama", peak=2.0)
    settings = tiny.prompts(4) | {"max_new_tokens": 48, "do_sample": True, "top_k": 8, "seed": 3}
    plain = accel.generate(model, method="plain", **settings)
    assert torch.equal(accel.generate(model, drafter=drafter, **options, **settings), plain)
    if options:
        assert accel.stats(model).accepted_tokens > 0


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_processed_behind_the_end(tiny, way):
    """Once per kept token: a draft that runs past the end of the sequence is cut before it."""
    calls = []

    class Count(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(input_ids.shape[1])
            return scores

    model, draft = tiny.pair("llama", "right")
    prompt = tiny.prompts(1)
    end = tiny.reference(model, **prompt, max_new_tokens=NEW).sequences[0, 9 + 4].item()
    with_draft, options = WAYS[way]
    out = accel.generate(
        model,
        artifacts=[draft] if with_draft else [],
        **options,
        **prompt,
        max_new_tokens=NEW,
        eos_token_id=end,
        logits_processor=[Count()],
    )
    assert calls == list(range(9, out.shape[1]))


def test_an_attached_model_is_one_call_at_a_time(tiny):
    model = accel.attach(tiny.build("llama"))

    class Again(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model.generate(**tiny.prompts(1), max_new_tokens=2)
            return scores

    with pytest.raises(accel.AccelError, match="busy"):
        model.generate(**tiny.prompts(1), max_new_tokens=2, logits_processor=[Again()])
    assert model.generate(**tiny.prompts(1), max_new_tokens=2).shape == (1, 11)
