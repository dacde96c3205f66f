"""A document read once and shared by a batch, on a model made on the spot (no download).

A whole document's keys and values are exact, so that the output can be compared; `accel distill cartridge` makes small
ones that stand in for a long document. Run: python examples/cartridge.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import accel
from accel.methods.cartridge import document


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, max_position_embeddings=1024, eos_token_id=None, pad_token_id=0, **shape)
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(1, 128, (600,)).tolist()
    questions = torch.randint(1, 128, (16, 8))
    settings = {"max_new_tokens": 16, "do_sample": False}
    in_the_prompt = torch.cat([torch.tensor([text]).expand(16, -1), questions], dim=1)
    expected = model.generate(in_the_prompt, attention_mask=torch.ones_like(in_the_prompt), **settings)

    handbook = accel.Cartridge.of("handbook", document.read(model, text), model, method="whole", exact=True)
    accel.attach(model, handbook)  # in front of every prompt from now on
    output = model.generate(questions, attention_mask=torch.ones_like(questions), **settings)
    stats = accel.stats(model)
    accel.detach(model)

    print("same tokens as transformers:", torch.equal(output, expected[:, len(text) :]))
    print(
        f"16 rows behind {handbook.num_tokens} tokens hold {stats.state_bytes / 1e6:.2f} MB, one copy of the document"
    )
    print(f"which takes {handbook.nbytes() / 1e6:.2f} MB; sixteen would take {16 * handbook.nbytes() / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
