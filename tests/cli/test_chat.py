"""`accel chat`: turns, figures, commands and Ctrl-C, against a server on this machine, and with a tiny model here."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_llama
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner, Result

from accel.cli.main import main

STATS = {"generated_tokens": 5, "mean_accepted_length": 2.5, "drafted_tokens": 8, "accepted_tokens": 6, "notes": []}


class Talker(ThreadingHTTPServer):
    """Answers the number of messages it was sent, in three pieces; "forever" without end; "fail" with an error."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.owner = "accel"
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Talker

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        assert self.path == "/v1/models"
        listed = [{"id": "tiny", "object": "model", "owned_by": self.server.owner}]
        self.send(200, json.dumps({"object": "list", "data": listed}).encode())

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        said = body["messages"][-1]["content"]
        if said == "fail":
            self.send(429, json.dumps({"error": {"message": "the queue is full", "code": 429}}).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.say({"role": "assistant", "content": ""})
            while said == "forever":
                self.say({"content": "on "})
                time.sleep(0.02)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()
            return
        for piece in ("I see ", str(len(body["messages"])), " messages"):
            self.say({"content": piece})
        if said == "break":
            self.event({"error": {"message": "the engine died", "code": 500}})
            return
        figures = {"accel": STATS} if body.get("accel", {}).get("stats") else {}
        self.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}, **figures})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, delta: dict[str, str]) -> None:
        self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b": a comment\n" + f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def talker() -> Iterator[Talker]:
    server = Talker()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def chat(*arguments: str | Path, said: str = "") -> Result:
    return CliRunner().invoke(main, ["chat", *map(str, arguments)], input=said)


def test_a_conversation_grows_and_is_forgotten(talker: Talker) -> None:
    said = "one\n\ntwo\n/clear\nthree\n/exit\nfour\n"
    result = chat("--url", talker.url, "--system", "Be brief.", said=said)
    assert result.exit_code == 0, result.output
    assert result.stdout == "I see 2 messages\nI see 4 messages\nI see 2 messages\n"
    assert result.stderr == ""
    assert [m["content"] for m in talker.bodies[1]["messages"]] == ["Be brief.", "one", "I see 2 messages", "two"]
    assert [m["role"] for m in talker.bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert talker.bodies[0]["model"] == "tiny" and talker.bodies[0]["stream"] is True
    assert (talker.bodies[0]["temperature"], talker.bodies[0]["max_tokens"]) == (0, 512)


def test_figures_follow_an_answer(talker: Talker) -> None:
    result = chat("--url", talker.url + "/v1/", "--quick", "hello", "--stats")
    assert result.stdout == "I see 1 messages\n"
    parts = result.stderr.strip().split(" · ")
    assert parts[0].startswith("5 tokens in ") and parts[1].endswith(" tokens/s") and parts[2].startswith("first after")
    assert parts[3:] == ["τ 2.50", "6 of 8 drafted tokens accepted"]


def test_another_server_is_not_asked_for_what_is_ours(talker: Talker) -> None:
    talker.owner = "vllm"
    given = ("--api-key", "12345678", "--temperature", "0.5", "--seed", "3", "--max-new-tokens", "7")
    result = chat("other", "--url", talker.url, *given, "--quick", "hello", "--stats")
    assert "drafted" not in result.stderr and result.stderr.startswith("5 tokens in ")
    assert talker.keys == ["Bearer 12345678"]
    body = talker.bodies[0]
    assert "accel" not in body and body["model"] == "other" and body["stream_options"] == {"include_usage": True}
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 3, 7)


@pytest.mark.parametrize(
    ("said", "why"), [("fail", "429: the queue is full"), ("break", "the engine died")], ids=["status", "stream"]
)
def test_what_fails_is_one_line_and_an_exit_code(talker: Talker, said: str, why: str) -> None:
    result = chat("--url", talker.url, said=f"{said}\nafterwards\n")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {talker.url}/v1/: {why}\n"
    assert len(talker.bodies) == 1


def test_bad_calls_are_one_line(talker: Talker) -> None:
    cases = {
        ("--url", "localhost:8000"): "must be http(s)://HOST[:PORT]/v1",
        ("--url", talker.url, "-a", "x", "-o", "draft_length=3"): "-a, -o with --url",
        ("--api-key", "12345678"): "--api-key without --url",
        ("--url", "http://127.0.0.1:9"): "http://127.0.0.1:9/v1/: ",
    }
    for given, why in cases.items():
        result = chat(*given, "--quick", "hello")
        assert result.exit_code == 1 and why in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1


def test_a_model_here(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    byte_llama(max_position_embeddings=512).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    result = chat(folder, "--max-new-tokens", "8", "--stats", said="hello\nagain\n")
    assert result.exit_code == 0, result.output
    figures = result.stderr.strip().splitlines()
    assert len(figures) == 2 and all(line.startswith("8 tokens in ") for line in figures), result.stderr
    assert chat(folder, "--max-new-tokens", "8", "--quick", "hello").stdout == result.stdout.splitlines(True)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of Unix")
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(talker: Talker) -> None:
    import pty

    ours, theirs = pty.openpty()
    code = "from accel.cli.main import main; main(prog_name='accel')"
    command = [sys.executable, "-P", "-c", code, "chat", "--url", talker.url]
    # a session of its own with this terminal: Ctrl-C reaches it as a person's would
    program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=_own_terminal)
    os.close(theirs)
    shown = bytearray()

    def until(text: str, begin: int = 0) -> None:
        deadline = time.monotonic() + 20
        while text.encode() not in shown[begin:] and time.monotonic() < deadline:
            readable, _, _ = select.select([ours], [], [], 0.5)
            try:
                shown.extend(os.read(ours, 4096) if readable else b"")
            except OSError:  # the other side is closed
                break
        assert text.encode() in shown[begin:], shown.decode()

    try:
        until("> ")
        os.write(ours, b"fail\n")
        until("the queue is full")
        os.write(ours, b"forever\n")
        until("on on")
        os.write(ours, b"\x03")
        until("stopped after")
        assert talker.gone.wait(5)
        os.write(ours, b"hello\n")
        # the question that failed is forgotten; the answer that was stopped is not
        until("I see 3 messages")
        until("6 of 8 drafted tokens accepted")
        # Ctrl-D means the end to the one that reads at the prompt only
        until("> ", begin=shown.index(b"6 of 8"))
        os.write(ours, b"\x04")
        assert program.wait(10) == 0
    finally:
        program.kill()
        program.wait()
        os.close(ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # a shell starts what runs in its background deaf to Ctrl-C, and so would we be if the tests ran there
    signal.signal(signal.SIGINT, signal.SIG_DFL)
