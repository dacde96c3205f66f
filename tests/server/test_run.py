"""How a server begins and ends: 503 while it loads, refusals while it drains, "abort" when the time is over, exit 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from accel.errors import OptionError
from accel.server.run import address, bind


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start(port, shutdown_timeout, loading)``: the fake server in a process of its own."""
    started = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        program = root / "tests" / "support" / "fake_service.py"
        process = subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready http://127.0.0.1:"), line
    return line.split()[1]


def ended(process: subprocess.Popen[str], within: float) -> tuple[int, str]:
    out, err = process.communicate(timeout=within)
    assert err == ""
    return process.returncode, out


@contextmanager
def under_way(url: str) -> Iterator[Iterator[str]]:
    """A request that has had its first letter."""
    with httpx2.stream("GET", url + "/slow", timeout=20) as response:
        pieces = response.iter_text()
        assert next(pieces).startswith("x")
        yield pieces


def refusal(url: str) -> str:
    answer = httpx2.get(url, timeout=5)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    message: str = answer.json()["error"]["message"]
    return message


def test_everything_is_503_while_the_model_loads(start: Callable[..., subprocess.Popen[str]]) -> None:
    port = free_port()
    process = start(port, 1, 1.5)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert refusal(url + "/health") == "the model is loading"
            break
        except httpx2.ConnectError:
            time.sleep(0.05)
    assert refusal(url + "/v1/models") == "the model is loading"
    assert url_of(process) == url
    assert httpx2.get(url + "/health").status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(0, 1, "fails")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and err.endswith("ValueError: no such model\n")


def test_a_signal_while_loading_ends_the_server(start: Callable[..., subprocess.Popen[str]]) -> None:
    port = free_port()
    process = start(port, 30, 60)
    deadline = time.monotonic() + 20
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert ended(process, 5) == (0, "")


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_requests_under_way_finish_and_new_ones_are_refused(
    start: Callable[..., subprocess.Popen[str]], which: signal.Signals
) -> None:
    process = start(0, 20, 0)
    url = url_of(process)
    with httpx2.Client(timeout=20) as kept, under_way(url) as pieces:
        assert kept.get(url + "/health").status_code == 200
        process.send_signal(which)
        time.sleep(0.3)
        # on a connection that was there before, and on a new one
        assert kept.get(url + "/v1/models").status_code == 503
        assert refusal(url + "/health") == "the server is shutting down"
        assert httpx2.get(url + "/metrics").status_code == 200
        assert process.poll() is None
        # no other request can end it now: the one under way does, as its engine would
        os.kill(process.pid, signal.SIGTERM)
        assert "".join(pieces).endswith("abort")
    code, out = ended(process, 5)
    # the thread that loaded has ended, the one that closes too
    assert (code, out) == (0, "over 1\n")


def test_what_does_not_finish_in_time_is_aborted(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(0, 1, 0)
    url = url_of(process)
    with under_way(url) as pieces:
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert "".join(pieces).endswith("abort")
        assert 0.9 < time.monotonic() - told < 3
    assert ended(process, 5) == (0, "over 1\n")


def test_what_finishes_in_time_is_not(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(0, 30, 0)
    url = url_of(process)
    with under_way(url) as pieces:
        httpx2.get(url + "/finish")
        process.send_signal(signal.SIGTERM)
        assert "".join(pieces).endswith("stop")
    assert ended(process, 5) == (0, "over 1\n")


def test_a_client_that_does_not_read_keeps_nobody(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(0, 0, 0)
    port = int(url_of(process).rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as deaf:
        deaf.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=6)
    assert (process.returncode, out) == (0, "over 1\n") and "Traceback" not in err


@pytest.mark.slow
def test_a_process_that_hangs_is_ended(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(0, 0, 0)
    url = url_of(process)
    with pytest.raises(httpx2.TransportError):
        httpx2.get(url + "/block", timeout=0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and 'fake_service.py"' in err and " in app" in err


def test_a_port_that_is_taken_is_one_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use: choose"):
            bind("127.0.0.1", port)
    with pytest.raises(OptionError, match=r"--host no\.such\.host\.invalid: .*: name an address of this machine"):
        bind("no.such.host.invalid", 0)
    # freed at once
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize(("host", "beyond"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_it_is_known_who_can_reach_a_socket(host: str, beyond: bool) -> None:
    with bind(host, 0) as listener:
        url, found = address(listener)
        shown = "0.0.0.0" if beyond else "127.0.0.1"
        assert url == f"http://{shown}:{listener.getsockname()[1]}" and found is beyond


def test_a_head_that_is_too_long_is_refused(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(0, 1, 0)
    url = url_of(process)
    # whether it comes in one part or in many
    for size in (70_000, 100_000, 1_000_000):
        try:
            assert httpx2.get(url + "/health", headers={"x-long": "a" * size}).status_code in (400, 431), size
        except httpx2.TransportError:
            # refused before all of it was sent
            assert size > 100_000
    assert httpx2.get(url + "/health?" + "a" * 60_000, headers={"x-long": "a" * 10_000}).status_code in (400, 431)
    assert httpx2.get(url + "/health").status_code == 200


def test_the_body_of_a_refusal_is_openais(start: Callable[..., subprocess.Popen[str]]) -> None:
    port = free_port()
    start(port, 1, 30)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={"messages": []})
            break
        except httpx2.ConnectError:
            time.sleep(0.05)
    error = {"message": "the model is loading", "type": "service_unavailable", "param": None, "code": 503}
    assert json.loads(answer.content) == {"error": error}
