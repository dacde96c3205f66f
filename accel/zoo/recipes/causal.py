"""A small causal language model with a tokenizer of its own, from texts with answers: shared by recipes.

    python causal.py --prompts train.jsonl --output causal

Lines are {"question", "answer"}, told apart by a token of their own, or {"text", "answer"}, read as one text.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel.artifacts import Manifest, describe_base, json_digest, save, saved_files
from accel.distill.forward import autocast
from accel.distill.schedule import warm_cosine

END, ANSWER, MASK = "<|end|>", "<|answer|>", "<|mask|>"
# what becomes one token at most; a word never joins the next one
_PIECES = r"{number}| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
# a digit, so that numbers are learned by digits; or all of them, so that how many places one takes is always known
_DIGIT, _WHOLE = r" ?\d", r" ?\d+"
# pairs that are sorted by length together
_SORTED = 2048
# frequencies by which a head looks back, and what each adds to its score at the right distance
_FASTEST, _PREFERENCE = 12, 4.0
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '<|end|>' if message['role'] == 'assistant' else '<|answer|>' }}{% endfor %}"
)


def make_tokenizer(
    texts: list[str], size: int, *, chat: bool = True, whole_numbers: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of ``texts``, most words one token; any other text has tokens too. ``chat``: for questions,
    with tokens between question and answer and for masks."""
    inner = Tokenizer(models.BPE())
    pieces = Regex(_PIECES.format(number=_WHOLE if whole_numbers else _DIGIT))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, ANSWER, MASK] if chat else [END]
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if not chat:
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, mask_token=MASK)
    tokenizer.add_special_tokens({"additional_special_tokens": [ANSWER]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, given: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(given.seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        max_position_embeddings=given.positions,
        attention_bias=given.look_back,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    if not given.look_back:
        return LlamaForCausalLM(config)
    # with the usual deviation a model as narrow as these says next to nothing at first
    config.initializer_range = 0.5 * given.hidden**-0.5
    model = LlamaForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Let head h of the first layer begin by reading the token h + 1 places back, whatever it is.

    To find what stood behind the same words before, a model has to know which words stand in front of each token, and
    most of its steps go by before it has come upon that. By biases: a query (c, 0) and a key turned by (h + 1) θ agree
    best at that distance, summed over the fastest of the rotary embedding's frequencies θ.
    """
    width = model.config.hidden_size // model.config.num_attention_heads
    theta = model.model.rotary_emb.inv_freq[:_FASTEST]
    attention = model.model.layers[0].self_attn
    size = (_PREFERENCE * width**0.5) ** 0.5
    for head in range(model.config.num_attention_heads):
        at = head * width
        attention.q_proj.bias[at : at + _FASTEST] = size
        attention.k_proj.bias[at : at + _FASTEST] = size * torch.cos((head + 1) * theta)
        attention.k_proj.bias[at + width // 2 : at + width // 2 + _FASTEST] = size * torch.sin((head + 1) * theta)


def batch(rows: list[list[list[int]]], end: int) -> tuple[Tensor, Tensor]:
    """(prompt, answer) pairs → tokens int64 [B, T], and what each is: 0 prompt, 1 answer, -1 padding."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), width), end)
    parts = torch.full((len(rows), width), -1)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        tokens[row, :stop] = torch.tensor(prompt + answer)
        parts[row, : len(prompt)] = 0
        parts[row, len(prompt) : stop] = 1
    return tokens, parts


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


def losses(model: LlamaForCausalLM, tokens: Tensor, parts: Tensor, prompts: bool) -> tuple[Tensor, Tensor]:
    """Mean cross entropies of what is answered and of what is asked; the latter 0 where it is not learned."""
    with autocast(model.device):
        logits = model(tokens).logits[:, :-1].float()
    labels, parts = tokens[:, 1:], parts[:, 1:]
    answered = F.cross_entropy(logits[parts == 1], labels[parts == 1])
    return answered, F.cross_entropy(logits[parts == 0], labels[parts == 0]) if prompts else answered.new_zeros(())


def pairs_of(lines: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[list[list[int]]]:
    """Token ids of what is asked and of what is answered, with the end token."""
    asked = [tokenizer(line["text"] if "text" in line else line["question"] + ANSWER)["input_ids"] for line in lines]
    end = tokenizer.eos_token_id
    return [[ids, [*tokenizer(line["answer"])["input_ids"], end]] for ids, line in zip(asked, lines, strict=True)]


def save_artifact(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[list[list[int]]], given: argparse.Namespace
) -> None:
    """Both as an artifact of kind ``model``."""
    made = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": given.seed,
        "data_digest": json_digest(pairs),
        "recipe": {name: value for name, value in vars(given).items() if not isinstance(value, Path)},
    }
    base = describe_base(model.config, tokenizer, name=given.output.name)
    measured = {"parameters": sum(each.numel() for each in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save(given.output, Manifest(kind="model", base=base, made=made, measured=measured), *saved_files(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="lines with question or text, and answer")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--artifact", action="store_true", help="with a manifest, and in bfloat16")
    parser.add_argument("--tokenizer", type=Path, help="a folder; made of the prompts where none is given")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a step, with padding")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--prompt-weight", type=float, default=0.0, help="of the loss of what is asked")
    parser.add_argument("--vocabulary", type=int, default=768)
    parser.add_argument("--whole-numbers", action="store_true", help="a number is a token, not each of its digits")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--look-back", action="store_true", help="heads of the first layer begin by looking back")
    parser.add_argument("--positions", type=int, default=512, help="that the model says it has")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"{given.output} exists already: choose another folder")
    lines: list[dict[str, Any]] = [json.loads(line) for line in given.prompts.read_text().splitlines()]
    if given.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    else:
        texts = [line[part] for line in lines for part in ("question", "text", "answer") if part in line]
        tokenizer = make_tokenizer(texts, given.vocabulary, whole_numbers=given.whole_numbers)
    model = make_model(tokenizer, given)
    pairs = pairs_of(lines, tokenizer)
    print(f"{sum(each.numel() for each in model.parameters()):,} weights, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    batches = epochs(pairs, given.batch_tokens, random.Random(given.seed))
    for step in range(given.steps):
        tokens, parts = batch(next(batches), tokenizer.eos_token_id)
        for group in optimizer.param_groups:
            group["lr"] = given.learning_rate * warm_cosine(step, given.steps, 0.05, 0.05)
        answered, asked = losses(model, tokens, parts, given.prompt_weight > 0)
        optimizer.zero_grad()
        (answered + given.prompt_weight * asked).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {given.steps} · loss {answered.item():.3f}", flush=True)
    if given.artifact:
        save_artifact(model.to(torch.bfloat16), tokenizer, pairs, given)
    else:
        model.save_pretrained(given.output)
        tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()
