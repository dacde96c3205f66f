"""A drafter of one's own: anything that guesses tokens and may be wrong. The target keeps only what it would have said.

This one knows a fixed text by heart, as a template engine or a retrieval system might.
Run: python examples/own_drafter.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import accel


class ByHeart:
    """Proposes the next tokens of a text it knows, as long as the row follows it."""

    name = "by-heart"
    free = True  # proposing costs next to nothing

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)
        self.seen: dict[int, int] = {}

    def open(self, row: int, prompt: Sequence[int], seed: int) -> None:
        self.seen[row] = 0

    def propose(self, asks: Sequence[accel.Ask]) -> list[accel.Draft]:
        drafts = []
        for ask in asks:
            start = self.seen[ask.row]
            tokens = self.text[start : start + ask.max_tokens]
            drafts.append(accel.Draft(tokens, confidence=[0.9] * len(tokens), source=self.name))
        return drafts

    def observe(self, row: int, tokens: Sequence[int]) -> None:
        self.seen[row] += len(tokens)

    def close(self, row: int) -> None:
        del self.seen[row]

    def state_bytes(self) -> int:
        return 0


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, max_position_embeddings=256, eos_token_id=None, pad_token_id=0, **shape)
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[5, 17, 42]])
    settings = {"max_new_tokens": 32, "do_sample": False}
    answer = model.generate(prompt, **settings)

    known = answer[0, 3:].tolist()
    known[10] = (known[10] + 1) % 128  # one word remembered wrongly
    output = accel.generate(model, prompt, artifacts=[ByHeart(known)], draft_length=8, **settings)
    stats = accel.stats(model)

    print("same tokens as transformers:", torch.equal(output, answer))
    print(f"{stats.generated_tokens} tokens in {stats.target_calls} forwards, τ = {stats.mean_accepted_length:.2f}")


if __name__ == "__main__":
    main()
