"""A causal language model of five million weights with a tokenizer of its own, from problems with answers.

    python causal.py --prompts train.jsonl --output causal

The start of the masked-diffusion model: `accel distill a2d` goes on from here.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel.distill.forward import autocast
from accel.distill.schedule import warm_cosine

END, ANSWER, MASK = "<|end|>", "<|answer|>", "<|mask|>"
# a digit is a token, so that sums are learned by digits; a word never joins the next one
PIECES = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
# pairs that are sorted by length together
_SORTED = 2048
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '<|end|>' if message['role'] == 'assistant' else '<|answer|>' }}{% endfor %}"
)


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of ``texts``: every word of the problems is one token, and any other text has tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END, ANSWER, MASK], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, mask_token=MASK)
    tokenizer.add_special_tokens({"additional_special_tokens": [ANSWER]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def batch(rows: list[list[list[int]]], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) pairs → tokens and labels int64 [B, T]; prompts and padding are not learned."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), width), end)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        tokens[row, :stop] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : stop] = torch.tensor(answer)
    return tokens, labels


def epochs(pairs: list[list[list[int]]], tokens: int, chance: random.Random) -> Iterator[list[list[list[int]]]]:
    """Batches of at most ``tokens`` with padding, for ever; those of a batch are about equally long."""
    while True:
        order = chance.sample(pairs, len(pairs))
        for start in range(0, len(order), _SORTED):
            parts: list[list[list[list[int]]]] = [[]]
            for pair in sorted(order[start : start + _SORTED], key=lambda each: sum(map(len, each))):
                if (len(parts[-1]) + 1) * sum(map(len, pair)) > tokens:
                    parts.append([])
                parts[-1].append(pair)
            yield from chance.sample(parts, len(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="lines with question and answer")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a step, with padding")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--vocabulary", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"{given.output} exists already: choose another folder")
    lines: list[dict[str, Any]] = [json.loads(line) for line in given.prompts.read_text().splitlines()]
    tokenizer = make_tokenizer([line[part] for line in lines for part in ("question", "answer")], given.vocabulary)
    model = make_model(tokenizer, given.seed)
    end = tokenizer.eos_token_id
    asked = [tokenizer(line["question"] + ANSWER)["input_ids"] for line in lines]
    pairs = [[ids, [*tokenizer(line["answer"])["input_ids"], end]] for ids, line in zip(asked, lines, strict=True)]
    print(f"{sum(each.numel() for each in model.parameters()):,} weights, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    batches = epochs(pairs, given.batch_tokens, random.Random(given.seed))
    for step in range(given.steps):
        tokens, labels = batch(next(batches), end)
        for group in optimizer.param_groups:
            group["lr"] = given.learning_rate * warm_cosine(step, given.steps, 0.05, 0.05)
        with autocast(model.device):
            loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {given.steps} · loss {loss.item():.3f}", flush=True)
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()
