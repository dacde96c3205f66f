"""How many numbers are found again, by length of the prompt, of those that no lesson had.

    python measure.py --count 100 retrieval-1m retrieval-1m-lawcat

A number counts where each digit is the likeliest token behind the ones before it: what greedy decoding would say.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from tasks import held_out

from accel.artifacts import open_artifact, resolve
from accel.bench import passkey
from accel.methods.lawcat.artifact import Lawcat
from accel.models.loading import load_model

# tokens of a forward pass
_AT_ONCE = 8192


def unseen(kind: str, length: int, count: int, tokenizer: Any) -> list[passkey.Task]:
    """Tasks with held-out numbers alone."""
    chance = random.Random(f"{kind}{length}test")
    found: list[passkey.Task] = []
    while len(found) < count:
        task = passkey.TASKS[kind](chance, length, tokenizer)
        found += [task] if held_out(task.answer) else []
    return found


@torch.no_grad()
def share(model: Any, tokenizer: Any, tasks: Sequence[passkey.Task]) -> float:
    """Of ``tasks``, those of one length, the share that is answered with the right digits."""
    rows, right = max(1, _AT_ONCE // len(tasks[0].ids)), 0
    for start in range(0, len(tasks), rows):
        part = tasks[start : start + rows]
        answers = [tokenizer(f" {task.answer}")["input_ids"] for task in part]
        tokens = torch.tensor([[*task.ids, *answer] for task, answer in zip(part, answers, strict=True)])
        wanted = torch.tensor(answers)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, -wanted.shape[1] - 1 : -1]
        right += int((model.lm_head(hidden).argmax(-1) == wanted).all(-1).sum())
    return right / len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the softmax model")
    parser.add_argument("deltas", nargs="*", help="conversions of it")
    parser.add_argument("--count", type=int, default=100, help="tasks of each kind and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="float32")
    tasks = {(kind, n): unseen(kind, n, given.count, tokenizer) for kind in passkey.TASKS for n in given.lengths}
    for name in (given.model, *given.deltas):
        measured = model
        if name != given.model:
            measured = Lawcat.load(open_artifact(resolve(name)), model, tokenizer).student(model)
        for kind in passkey.TASKS:
            shares = (f"{n}: {share(measured, tokenizer, tasks[kind, n]):.2f}" for n in given.lengths)
            print(f"{name} {kind}", *shares, sep="  ", flush=True)


if __name__ == "__main__":
    main()
