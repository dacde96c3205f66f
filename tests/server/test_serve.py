"""`accel serve` as a person runs it, in a process of its own: from the first 503 to the last answer and exit code 0."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer

import accel

pytestmark = pytest.mark.slow

Start = Callable[..., "Server"]
# more tokens than any test waits for
ENDLESS = {"max_tokens": 30_000, "ignore_eos": True, "temperature": 0, "stream": True}


class Server:
    def __init__(self, *arguments: object) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        code = "from accel.cli.main import main; main(prog_name='accel')"
        command = [sys.executable, "-P", "-c", code, "serve", "--port", str(port), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> Server:
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert f"is ready at {self.url} (loaded in " in line, line
        return self

    def ended(self, within: float) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=within)
        assert out == ""
        return self.process.returncode, err

    def chat(self, **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return httpx2.post(self.url + "/v1/chat/completions", json=body, timeout=60)

    @contextmanager
    def under_way(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The chunks of an answer that has begun and does not end by itself."""
        body = {"messages": [{"role": "user", "content": "hi"}], **ENDLESS}
        with httpx2.stream("POST", self.url + "/v1/chat/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            chunks = (json.loads(line) for line in lines if line != "[DONE]")
            # the role, then some text
            next(chunks), next(chunks)
            yield chunks

    def figure(self, name: str) -> float:
        lines = httpx2.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("served") / "tiny"
    byte_llama(max_position_embeddings=32_768).save_pretrained(where)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Server] = []

    def begin(*arguments: object) -> Server:
        started.append(Server(*arguments))
        return started[-1]

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def ends(chunks: Iterator[dict[str, Any]]) -> list[str]:
    return [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"] is not None]


def test_from_503_to_an_answer_that_generate_gives_too(start: Start, folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-ours\n")
    server = start(folder, "--api-key-file", keys, "--log", tmp_path / "log.jsonl")
    seen = set()
    deadline = time.monotonic() + 60
    while 200 not in seen and time.monotonic() < deadline:
        try:
            seen.add(httpx2.get(server.url + "/health", timeout=5).status_code)
        except httpx2.ConnectError:
            pass
        time.sleep(0.05)
    assert seen == {503, 200}
    server.ready()
    assert server.chat(max_tokens=4).status_code == 401
    assert httpx2.get(server.url + "/metrics").status_code == 401
    with httpx2.Client(base_url=server.url, headers={"Authorization": "Bearer a-key-of-ours"}) as client:
        (card,) = client.get("/v1/models").json()["data"]
        # the name, and not where it lies
        assert (card["id"], card["root"]) == ("tiny", "tiny")
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body).json()
        assert 'finished_reason="length",model_name="tiny"} 1.0' in client.get("/metrics").text
    assert answer["choices"][0]["message"]["content"] == accel.load(str(folder)).chat("hi", max_new_tokens=12)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2
    assert_the_last_request_finishes(server, "a-key-of-ours")
    assert server.ended(15) == (0, "")


def assert_the_last_request_finishes(server: Server, key: str) -> None:
    """SIGINT while an answer is being written: it is written to its end."""
    body = {"prompt": "hi", "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.stream("POST", server.url + "/v1/completions", json=body, headers=headers, timeout=60) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        first = json.loads(next(lines))
        server.process.send_signal(signal.SIGINT)
        rest = [json.loads(line) for line in lines if line != "[DONE]"]
    assert first["choices"][0]["finish_reason"] is None
    assert ends(iter(rest)) == ["length"]


def test_requests_under_way_are_aborted_when_their_time_is_over(start: Start, folder: Path) -> None:
    server = start(folder, "--shutdown-timeout", "1.5", "--max-rows", "2").ready()
    late: list[int] = []
    told = threading.Event()

    def ask_late() -> None:
        told.wait()
        time.sleep(0.5)
        late.append(server.chat(max_tokens=1).status_code)

    queued: list[dict[str, Any]] = []
    with server.under_way() as one, server.under_way() as two:
        waiting = threading.Thread(target=lambda: queued.append(server.chat(max_tokens=5).json()))
        waiting.start()
        asker = threading.Thread(target=ask_late)
        asker.start()
        deadline = time.monotonic() + 10
        while not server.figure("vllm:num_requests_waiting") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.figure("vllm:num_requests_running") == 2
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        told.set()
        assert psutil.Process(server.process.pid).children(recursive=True) == []
        assert [ends(one), ends(two)] == [["abort"]] * 2
        assert 1.4 < time.monotonic() - begun < 5
        asker.join()
        waiting.join()
    assert late == [503]
    # it never had a row
    assert queued[0]["choices"][0]["finish_reason"] == "abort"
    assert server.ended(15) == (0, "")


def test_a_row_is_freed_by_hanging_up_and_a_second_signal_does_not_wait(start: Start, folder: Path) -> None:
    server = start(folder, "--shutdown-timeout", "600").ready()
    with server.under_way():
        assert server.figure("vllm:num_requests_running") == 1
    deadline = time.monotonic() + 5
    while server.figure("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.figure("vllm:num_requests_running") == 0
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in httpx2.get(server.url + "/metrics").text
    assert server.chat(max_tokens=3).status_code == 200
    with server.under_way() as chunks:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert ends(chunks) == ["abort"]
    assert server.ended(15) == (0, "")


def test_a_model_that_is_not_there_is_one_line(start: Start, tmp_path: Path) -> None:
    code, err = start(tmp_path).ended(60)
    assert code == 1 and err.startswith("Error: ") and len(err.splitlines()) == 1
