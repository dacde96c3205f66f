"""What the CPU suite shows, shown again where there is a GPU: drop-in output in three types, rows, sampling, state."""

from __future__ import annotations

import copy

import pytest
import torch

import accel

pytestmark = pytest.mark.gpu

NEW = 24
# half precision rounds each logit to 8 or 11 bits; the models' logits have a standard deviation of about 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}


def on_device(tiny, family, dtype):
    """A target and a partly right draft on the GPU, and a left-padded batch of four prompts."""
    models = [copy.deepcopy(model).to("cuda", dtype) for model in tiny.pair(family)]
    return *models, {name: value.to("cuda") for name, value in tiny.prompts(4).items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{"method": "plain"}, {"drafter": "lm", "draft_length": 4}, {"drafter": "cascade"}])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_greedy_output_is_that_of_transformers(tiny, family, options, dtype):
    model, draft, batch = on_device(tiny, family, dtype)
    theirs = tiny.reference(model, **batch, max_new_tokens=NEW)
    artifacts = [] if options.get("method") == "plain" else [draft]
    kept = {"return_dict_in_generate": True, "output_scores": True}
    ours = accel.generate(model, artifacts=artifacts, **options, **batch, max_new_tokens=NEW, **kept)
    tiny.assert_similar(ours.sequences, theirs, ours.scores, tolerance=TOLERANCE[dtype])
    assert ours.accel.method != "transformers", ours.accel.notes


@pytest.mark.parametrize("options", [{"method": "plain"}, {"drafter": "suffix", "draft_length": 4}])
def test_a_seed_gives_the_same_tokens_whoever_drafts(tiny, options):
    model, _, batch = on_device(tiny, "llama", torch.float32)
    settings = {"max_new_tokens": NEW, "do_sample": True, "top_k": 8, "seed": 3}
    assert torch.equal(
        accel.generate(model, **batch, **settings, **options),
        accel.generate(model, **batch, **settings, method="plain"),
    )


def test_copies_share_their_prompt(tiny):
    model, _, batch = on_device(tiny, "llama", torch.float32)
    one = {name: value[:1] for name, value in batch.items()}
    accel.generate(model, **one, max_new_tokens=2, do_sample=True, num_return_sequences=16, method="plain")
    shared = accel.stats(model).state_bytes
    accel.generate(model, **one, max_new_tokens=2, do_sample=True, num_return_sequences=2, method="plain")
    assert shared < 8 * accel.stats(model).state_bytes
