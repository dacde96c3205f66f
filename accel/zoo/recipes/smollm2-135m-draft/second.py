"""The prompts of the second training, to standard output: some of prompts.jsonl, in another order, without answers."""

import json
import random
from pathlib import Path

QUESTIONS, OTHERS, LONG = 420, 800, 100

prompts = Path(__file__).with_name("prompts.jsonl").read_text(encoding="utf-8")
lines = [json.loads(line) for line in prompts.splitlines()]
chosen, rest = random.Random(1), lines[:-LONG]
found = chosen.sample([line for line in rest if "question" in line], QUESTIONS)
found += chosen.sample([line for line in rest if "question" not in line], OTHERS)
found += lines[-LONG:]
chosen.shuffle(found)
for line in found:
    print(json.dumps({name: text for name, text in line.items() if name != "answer"}, ensure_ascii=False))
