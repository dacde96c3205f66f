"""Speculative decoding behind transformers' own generate(), on a model made on the spot (no download).

A draft that agrees with the target most of the time is imitated by a noisy copy of it.
Run: python examples/speculative.py
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import accel


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, max_position_embeddings=256, eos_token_id=None, pad_token_id=0, **shape)
    model = LlamaForCausalLM(config).eval()
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))

    # four prompts of different lengths, left-padded: a batch that transformers refuses to decode with an assistant
    prompts = torch.randint(1, 128, (4, 12))
    mask = torch.ones_like(prompts)
    for row, padding in enumerate([0, 3, 5, 8]):
        mask[row, :padding] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 48, "do_sample": False}
    expected = model.generate(prompts, **settings)

    accel.attach(model, draft, draft_length=4)
    output = model.generate(prompts, **settings)
    stats = accel.stats(model)
    accel.detach(model)

    print("same tokens as transformers:", torch.equal(output, expected))
    print(f"target forwards: {stats.target_calls} for {stats.generated_tokens} tokens in 4 rows")
    print(f"accepted {stats.accepted_tokens} of {stats.drafted_tokens}, τ = {stats.mean_accepted_length:.2f}")


if __name__ == "__main__":
    main()
