"""A causal model's own greedy answers to problems, where they are right: JSON lines on stdout.

    python answers.py --model causal --problems problems.jsonl > answers.jsonl

Problems are worded at random, a model's answers are a function of the problem: only those can be foretold whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel.distill.checking import is_right


@torch.no_grad()
def answer(model: Any, tokenizer: Any, questions: list[str], most: int) -> list[str | None]:
    """The answers to questions that are read together; None where one has no end after ``most`` tokens."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
    new = model.generate(**kept, max_new_tokens=most, do_sample=False)[:, kept["input_ids"].shape[1] :]
    ended = (new == tokenizer.eos_token_id).any(1).tolist()
    said = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text if done else None for text, done in zip(said, ended, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the causal model's folder")
    parser.add_argument("--problems", type=Path, required=True, help="lines with question and answer")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=256, help="problems that are answered together")
    given = parser.parse_args()
    lines: list[dict[str, str]] = [json.loads(line) for line in given.problems.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    right = 0
    for start in range(0, len(lines), given.rows):
        some = lines[start : start + given.rows]
        said = answer(model, tokenizer, [line["question"] for line in some], given.max_new_tokens)
        for line, text in zip(some, said, strict=True):
            if text is not None and is_right(text, line["answer"]):
                right += 1
                print(json.dumps({"question": line["question"], "answer": text}))
    print(f"{right} of {len(lines)} answers are right", file=sys.stderr)


if __name__ == "__main__":
    main()
