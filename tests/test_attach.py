"""attach and detach leave no trace, whatever happened in between; one-off calls leave an attachment as it was."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

import accel
from accel.errors import AccelError

NEW = 8


def snapshot(model):
    """All that could have changed: attributes by identity and order, settings by value, weights and outputs by bits."""
    modules = {
        name: {
            "attributes": [(key, id(value)) for key, value in vars(module).items()],
            "members": [
                (key, [(name, id(value)) for name, value in vars(module)[key].items()])
                for key in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
            ],
            "class": type(module),
        }
        for name, module in model.named_modules()
    }
    ids = torch.arange(3, 33).view(2, 15)
    with torch.no_grad():
        outputs = model(ids).logits
    return {
        "modules": modules,
        "config": pickle.dumps(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation_config": pickle.dumps(model.generation_config.to_dict()),
        "weights": {k: (v.data_ptr(), v.numpy().tobytes()) for k, v in model.state_dict().items()},
        "outputs": outputs.numpy().tobytes(),
        "generated": type(model).generate(model, ids, max_new_tokens=NEW).tolist(),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text"])
@pytest.mark.parametrize("linear", ["auto", "packed", "transposed", "linear"])
def test_detach_undoes_attach(tiny, family, linear):
    model = tiny.build(family)
    draft = tiny.draft_of(model, "partly")
    before, draft_before = snapshot(model), snapshot(draft)
    accel.attach(model, draft, cpu_linear=linear, draft_length=3)
    model.generate(**tiny.prompts(4), max_new_tokens=NEW)
    assert accel.stats(model).drafted_tokens > 0
    model.generate(**tiny.prompts(2), max_new_tokens=NEW, do_sample=True, prompt_lookup_num_tokens=2)
    assert accel.detach(model) is model
    assert snapshot(model) == before and snapshot(draft) == draft_before
    assert accel.detach(model) is model
    assert snapshot(model) == before


def test_attaching_again_replaces(tiny):
    model, (_, draft) = tiny.build("llama"), tiny.pair("llama")
    before = snapshot(model)
    inputs = tiny.prompts(2) | {"max_new_tokens": NEW}
    expected = model.generate(**inputs)
    accel.attach(accel.attach(model, draft, draft_length=2), method="plain")
    assert torch.equal(model.generate(**inputs), expected)
    assert accel.stats(model).method == "plain"
    accel.detach(model)
    assert snapshot(model) == before


def test_a_refused_attachment_leaves_the_old_one(tiny):
    model = accel.attach(tiny.build("llama"), method="plain")
    kept = dict(vars(model))
    with pytest.raises(AccelError):
        accel.attach(model, method="speculative", draft_length=0)
    with pytest.raises(AccelError):
        accel.generate(model, **tiny.prompts(1), drafter="lm")
    assert vars(model) == kept


def test_a_one_off_call_restores_the_attachment(tiny):
    model, (_, draft) = tiny.build("llama"), tiny.pair("llama")
    pristine = snapshot(model)
    inputs = tiny.prompts(2) | {"max_new_tokens": NEW}
    accel.attach(model, drafter="ngram", draft_length=2)
    expected = model.generate(**inputs)
    attached = dict(vars(model))
    assert torch.equal(accel.generate(model, artifacts=[draft], draft_length=3, **inputs), expected)
    with pytest.raises(ValueError, match="nonsense"):
        accel.generate(model, artifacts=[draft], **inputs, nonsense=1)
    assert vars(model).keys() == attached.keys() and all(vars(model)[k] == v for k, v in attached.items())
    assert torch.equal(model.generate(**inputs), expected)
    assert accel.stats(model).method == "speculative" and len(accel.stats(model).drafted_by_position) <= 2
    accel.detach(model)
    assert snapshot(model) == pristine


def test_a_draft_may_be_attached_itself(tiny):
    model, inputs = tiny.build("llama"), tiny.prompts(2) | {"max_new_tokens": NEW}
    draft = tiny.draft_of(model, "partly")
    before, expected = (snapshot(model), snapshot(draft)), draft.generate(**inputs)
    accel.attach(draft, method="plain", cpu_linear="transposed")
    accel.attach(model, draft, draft_length=3, cpu_linear="transposed")
    model.generate(**inputs)
    tiny.assert_similar(draft.generate(**inputs), tiny.reference(draft, **inputs))
    accel.detach(model)
    assert torch.equal(draft.generate(**inputs), expected)
    accel.detach(draft)
    assert (snapshot(model), snapshot(draft)) == before


class Interrupt(BaseException):
    pass


class FailsLate(BaseStreamer):
    def __init__(self):
        self.left = 4

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise Interrupt

    def end(self):
        pass


def fails_late(ids, scores, **kwargs):
    """A logits processor or a criterion that breaks after a few tokens."""
    if ids.shape[1] > 12:
        raise Interrupt
    return False if scores is None else scores


@pytest.mark.parametrize("drafter", ["lm", "suffix", "ngram", "cascade"])
@pytest.mark.parametrize("culprit", ["streamer", "stopping_criteria", "logits_processor"])
def test_an_exception_inside_leaves_a_model_that_works(tiny, drafter, culprit):
    model, (_, draft) = tiny.build("llama"), tiny.pair("llama")
    before, inputs = snapshot(model), tiny.prompts(1) | {"max_new_tokens": 2 * NEW}
    expected = tiny.reference(model, **inputs)
    accel.attach(model, *([draft] if drafter in ("lm", "cascade") else []), drafter=drafter, draft_length=2)
    broken = FailsLate() if culprit == "streamer" else [fails_late]
    with pytest.raises(Interrupt) as held:
        model.generate(**inputs, **{culprit: broken})
    # the traceback, and all that it refers to, is still alive
    tiny.assert_similar(model.generate(**inputs), expected)
    assert held.value is not None
    accel.detach(model)
    assert snapshot(model) == before


def test_an_attached_model_can_be_copied(tiny):
    model = accel.attach(tiny.build("llama"), drafter="suffix")
    twin = copy.deepcopy(model)
    inputs = tiny.prompts(1) | {"max_new_tokens": NEW}
    assert torch.equal(twin.generate(**inputs), model.generate(**inputs))
    accel.detach(twin)
    assert "generate" in vars(model) and "generate" not in vars(twin)


def test_no_reference_keeps_a_model_alive(tiny):
    from weakref import ref

    model = tiny.build("llama")
    accel.generate(model, **tiny.prompts(1), max_new_tokens=2)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_stats_without_a_call_is_a_sentence(tiny):
    with pytest.raises(AccelError, match="no accelerated call yet"):
        accel.stats(tiny.build("llama"))


def test_a_stream_that_is_not_read_to_its_end_frees_the_model(tiny):
    # decoded with spaces in between, where streamers cut
    characters = Tokenizer(models.BPE({chr(ord("0") + i): i for i in range(tiny.VOCAB)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    model = accel.attach(tiny.build("llama", eos_token_id=None), drafter="suffix")
    loaded = accel.Model(model, tokenizer)
    whole = "".join(loaded.stream("45678", max_new_tokens=200))
    pieces = loaded.stream("45678", max_new_tokens=200)
    first = next(pieces)
    pieces.close()
    # the thread that decoded is gone, and with it its row in the drafter
    assert loaded.generate("45678", max_new_tokens=200) == whole
    assert whole.startswith(first)


def test_an_attached_model_may_assist_transformers(tiny):
    """transformers calls the assistant's generate() with arguments of its own, which are left to it."""
    model, _ = tiny.pair("llama")
    assistant = accel.attach(tiny.build("llama"))
    prompt = tiny.prompts(1) | {"max_new_tokens": 12}
    tiny.assert_similar(model.generate(**prompt, assistant_model=assistant), tiny.reference(model, **prompt))
