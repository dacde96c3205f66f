"""Everybody at once for a while: streams, clients that hang up, nonsense, cartridges that come and go.

Fifteen seconds here; ACCEL_SOAK_SECONDS=1800 is half an hour. Afterwards nothing may be left of it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from typing import Any

import httpx2
import psutil
import torch
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from http_server import listening

import accel
from accel.engine.service import serve
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge
from accel.models.row_cache import Segment
from accel.server.app import create_app
from accel.server.metrics import Metrics
from accel.server.settings import ServerSettings

SECONDS = float(os.environ.get("ACCEL_SOAK_SECONDS", "15"))
CLIENTS = 6
KINDS = ("answered", "refused", "hung up", "cartridges")
# what allocators keep, and what Python interns, in bytes
SLACK = 48 << 20
WORDS = ["the river", "a stone", "said nothing", "seven", "and then", "why?", "{}", "é→"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

NONSENSE: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [999_999]},
    {"prompt": "x" * 3000},
    {"prompt": "x", "n": 10_000},
    {"prompt": "x", "logprobs": 99},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "max_tokens": 10**9},
    {"prompt": "x", "logit_bias": {"no": 1}},
    {"prompt": "x", "accel": {"cartridges": ["none such"]}},
    {"prompt": "x", "structured_outputs": {"regex": "("}},
    {"prompt": 5},
]


def whole(model: Any, name: str, seed: int) -> Cartridge:
    ids = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    about = (document.describe(name, len(ids)),)
    return Cartridge.of(name, document.read(model, ids), model, method="whole", exact=True, documents=about)


def request(dice: random.Random, cartridges: list[str]) -> tuple[str, dict[str, Any]]:
    text = " ".join(dice.choices(WORDS, k=dice.randint(1, 30)))
    fields: dict[str, Any] = {"max_tokens": dice.randint(1, 60), "stream": dice.random() < 0.5}
    fields |= dice.choice(
        [{}, {"temperature": 0}, {"n": 3, "seed": 4}, {"logprobs": 2}, {"stop": ["e", "the"]}, {"top_p": 0.5}]
    )
    if dice.random() < 0.15:
        fields["structured_outputs"] = {"regex": "[a-f]{3,9}"}
    if cartridges and dice.random() < 0.3:
        fields["accel"] = {"cartridges": [dice.choice(cartridges)], "stats": True}
    if dice.random() < 0.2:
        fields["accel"] = {"method": "plain", "salt": dice.choice("ab")}
    if dice.random() < 0.5:
        return "/v1/completions", fields | {"prompt": text}
    if "logprobs" in fields:
        fields |= {"logprobs": True, "top_logprobs": 2}
    return "/v1/chat/completions", fields | {"messages": [{"role": "user", "content": text}]}


async def client(url: str, number: int, until: float, store: Any, made: list[Cartridge], seen: Counter) -> None:
    dice = random.Random(number)
    names: list[str] = []
    async with httpx2.AsyncClient(base_url=url, timeout=60) as web:
        # a busy machine may need longer until each kind has been there
        while time.monotonic() < (until if all(seen[kind] for kind in KINDS) else until + 120):
            what = dice.random()
            if what < 0.1:
                answer = await web.post("/v1/completions", json=dice.choice(NONSENSE))
                assert 400 <= answer.status_code < 500, answer.text
                seen["refused"] += 1
            elif what < 0.2 and number == 0:
                absent = [each for each in made if each.name not in names]
                if absent and (not names or dice.random() < 0.5):
                    names.append(store.add(dice.choice(absent)))
                    seen["cartridges"] += 1
                else:
                    store.remove(names.pop(0))
            elif what < 0.35:
                path, body = request(dice, names)
                try:
                    await web.post(path, json=body | {"max_tokens": 400}, timeout=dice.uniform(0.01, 0.3))
                except httpx2.TimeoutException:
                    seen["hung up"] += 1
            elif what < 0.4:
                answer = await web.post("/v1/embeddings", json={"input": "a river"})
                assert answer.status_code in (200, 429), answer.text
            else:
                path, body = request(dice, names)
                answer = await web.post(path, json=body)
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    seen["full"] += 1
                    await asyncio.sleep(0.05)
                    continue
                # a cartridge may have been taken away meanwhile
                assert answer.status_code == 200 or "no cartridge" in answer.text, answer.text
                assert not body["stream"] or answer.status_code != 200 or answer.text.endswith("[DONE]\n\n")
                seen["answered"] += 1
    for name in names:
        store.remove(name)


def segments() -> int:
    gc.collect()
    return sum(type(each) is Segment for each in gc.get_objects())


def test_nothing_is_left_of_a_busy_day() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = accel.Model(byte_llama(max_position_embeddings=512), tokenizer)
    accel.attach(model.model, drafter="suffix", tokenizer=tokenizer)
    # made beforehand: once it is served, the model is the engine's alone
    made = [whole(model.model, f"c{seed}", seed) for seed in range(4)]
    before_segments, before_threads = segments(), threading.active_count()
    service = serve(model, max_rows=6, max_queue=6, piece=64, prefix_bytes=2 << 20)
    app = create_app(service, model, ServerSettings("tiny"), Metrics("tiny", service))
    process, seen, memory = psutil.Process(), Counter[str](), []

    async def day(url: str) -> None:
        begun = time.monotonic()
        store, until = accel.cartridges(model.model), begun + SECONDS
        clients = [asyncio.create_task(client(url, number, until, store, made, seen)) for number in range(CLIENTS)]
        while not all(each.done() for each in clients):
            memory.append(process.memory_info().rss)
            await asyncio.sleep(SECONDS / 60)
        await asyncio.gather(*clients)

    with listening(app) as url:
        asyncio.run(day(url))
        assert service.failure is None
        deadline = time.monotonic() + 5
        while service.gauges().running + service.gauges().waiting and time.monotonic() < deadline:
            time.sleep(0.05)
        gauges = service.gauges()
        assert (gauges.running, gauges.waiting, gauges.cartridges) == (0, 0, ())
        assert gauges.context_bytes["rows"] == gauges.context_bytes["cartridges"] == 0
        assert gauges.context_bytes["prefixes"] <= 2 << 20
        # somebody who comes now is answered
        body = {"prompt": "a river", "max_tokens": 3}
        assert httpx2.post(f"{url}/v1/completions", json=body, timeout=5).status_code == 200
        assert not service._batcher.works and not service._taken
    service.close()
    accel.detach(model.model)
    print(f"{dict(seen)}, MB: {[round(each / 2**20) for each in memory[:: max(1, len(memory) // 10)]]}")
    assert all(seen[kind] for kind in KINDS), seen
    assert segments() == before_segments
    assert threading.active_count() <= before_threads + 1
    # the second half of the day takes no more than the first did
    half = len(memory) // 2
    assert max(memory[half:]) <= max(memory[:half]) + SLACK, memory
