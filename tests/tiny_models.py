"""Tiny random models of every family, drafts that are right, wrong or partly right, and transformers' similarity rule.

Reached through the ``tiny`` fixture: with --import-mode=importlib tests cannot import each other.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 67
PAD, BOS, EOS = 0, 1, 2
# model type → what it takes beyond the sizes that all share
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
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
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {},
}
# what is added to every weight of a draft, in standard deviations of that weight
NOISE = {"right": 0.0, "partly": 0.12}


def build(family: str = "llama", *, seed: int = 0, peak: float = 1.0, **extra: Any) -> PreTrainedModel:
    """A fresh model in fp32. ``peak`` scales its logits: at 1 their standard deviation is about 3."""
    sizes: dict[str, Any] = {
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
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "attention_dropout": 0.0,
    }
    config = AutoConfig.for_model(family, **sizes | FAMILIES[family] | extra)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        probe = torch.randint(3, config.vocab_size, (4, 16))
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head *= 3 * peak / float(model(probe).logits.std())
    return model


def draft_of(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """``kind``: "right" (a copy), "partly" (a noised copy) or "wrong" (other weights)."""
    if kind == "wrong":
        family, config = model.config.model_type, model.config
        return build(family, seed=99, vocab_size=config.vocab_size).to(model.dtype)
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in draft.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            if weight.ndim > 1:
                weight += NOISE[kind] * weight.std() * noise
    return draft


@cache
def pair(family: str, kind: str = "partly") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A family's model and a draft for it, made once; tests must leave them as they are."""
    model = _model(family)
    return model, draft_of(model, kind)


@cache
def _model(family: str) -> PreTrainedModel:
    return build(family)


def prompts(batch: int, *, seed: int = 3, vocab: int = VOCAB) -> dict[str, Tensor]:
    """``batch`` prompts of different lengths (9, 6, 3, 9, …), left-padded; a single one has no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 3 * (row % 3)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def reference(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """transformers' own generate() with the scores that the similarity rule needs."""
    defaults = {"return_dict_in_generate": True, "output_scores": True}
    return type(model).generate(model, *args, **defaults | kwargs)


def assert_similar(ours: Tensor, theirs: Any, our_scores: Any = None, *, tolerance: float = 1e-5) -> None:
    """transformers' rule: the same sequences, or scores at a row's first difference that agree within ``tolerance``.

    ours ``[B, L]``; theirs: an output object of transformers with scores.
    """
    expected, steps = theirs.sequences, theirs.scores
    if torch.equal(ours, expected):
        return
    prompt = expected.shape[1] - len(steps)
    for row, (a, b) in enumerate(zip(ours, expected, strict=True)):
        width = min(len(a), len(b))
        different = (a[:width] != b[:width]).nonzero()
        if not len(different):
            assert len(a) == len(b), f"row {row}: {len(a)} tokens, transformers has {len(b)}"
            continue
        step = int(different[0]) - prompt
        assert step >= 0, f"row {row}: the prompt itself differs"
        said = steps[step][row]
        if our_scores is not None:
            torch.testing.assert_close(our_scores[step][row], said, atol=tolerance, rtol=tolerance)
        # without our scores: the two tokens must be tied in transformers' own
        gap = float((said[a[step + prompt]] - said[b[step + prompt]]).abs())
        assert gap <= 2 * tolerance * max(1.0, float(said.max().abs())), f"row {row}, step {step}: {a} and {b}"
