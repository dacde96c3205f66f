"""`accel serve`'s options: keys, warnings, what is refused in one line before a model is loaded."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_llama
from click.testing import CliRunner, Result

import accel.cli.serve
import accel.server.run
from accel.cli.main import main
from accel.cli.serve import offer, read_keys
from accel.errors import OptionError
from accel.methods.cartridge import document
from accel.methods.cartridge.cartridge import Cartridge


def serve(*arguments: str | Path, **variables: str) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, arguments)], env=variables)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be loaded and how it would be run; nothing is."""
    seen: dict[str, Any] = {}

    def run(load: Callable[[], Any], *, on_bound: Any, on_ready: Any, **settings: Any) -> None:
        url = f"http://{settings['host']}:{settings['port']}"
        on_bound(url, settings["host"] == "0.0.0.0")
        load()
        on_ready(url)
        seen.update(settings)

    def load(model: str, name: str, **settings: Any) -> None:
        seen.update(settings, model=model, name=name)

    monkeypatch.setattr(accel.server.run, "run", run)
    monkeypatch.setattr(accel.cli.serve, "_load", load)
    return seen


def test_the_defaults_are_safe_and_one_line_says_it_is_ready(told: dict[str, Any]) -> None:
    result = serve()
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("smollm2-135m-instruct is ready at http://127.0.0.1:8000 (loaded in ")
    assert len(result.stderr.splitlines()) == 1
    assert (told["host"], told["port"], told["shutdown_timeout"]) == ("127.0.0.1", 8000, 30)
    assert told["keys"] == frozenset() and told["cors_origins"] == () and told["artifact_roots"] == ()
    assert (told["prefix_cache"], told["max_body"]) == (512_000_000, 4_000_000)


def test_options_reach_their_places(told: dict[str, Any], tmp_path: Path) -> None:
    given = ("-a", "draft", "-o", "draft_length=3", "--max-rows", "4", "--prefix-cache", "0", "--method", "plain")
    more = ("--artifact-root", tmp_path, "--cors-origin", "https://a.example", "--served-model-name", "mine")
    assert serve("gpt2", *given, *more, ACCEL_SERVE_MAX_QUEUE="7").exit_code == 0
    assert (told["model"], told["name"], told["artifact"]) == ("gpt2", "mine", ("draft",))
    assert told["options"] == {"draft_length": 3} and told["method"] == "plain"
    assert (told["max_rows"], told["max_queue"], told["prefix_cache"]) == (4, 7, 0)
    assert told["artifact_roots"] == (tmp_path,) and told["cors_origins"] == ("https://a.example",)


def test_a_folder_is_served_under_its_own_name(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    serve(tmp_path / "model")
    assert told["name"] == "model" and told["model"] == str(tmp_path / "model")


def test_whoever_opens_the_server_without_a_key_is_warned(told: dict[str, Any], tmp_path: Path) -> None:
    warned = serve("--host", "0.0.0.0").stderr.splitlines()
    assert warned[0].startswith("Warning: http://0.0.0.0:8000 can be reached from other machines and asks for no key")
    assert len(warned) == 2
    assert len(serve("--host", "0.0.0.0", ACCEL_SERVE_API_KEY="first-key second-key").stderr.splitlines()) == 1
    assert told["keys"] == {"first-key", "second-key"}
    file = tmp_path / "keys"
    file.write_text("# of the team\nthird-key\n\n")
    serve("--api-key", "first-key", "--api-key-file", file)
    assert told["keys"] == {"first-key", "third-key"}


def test_keys_that_would_keep_nobody_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(OptionError, match="holds no key, so that everybody could ask"):
        read_keys([], tmp_path / "empty")
    for key in ("", "short", "with space in it", "ключ-ключ-ключ", "a" * 600):
        with pytest.raises(OptionError, match="8 to 512 printable ASCII") as caught:
            read_keys([key], None)
        # a key has no business in a log
        assert not key or key not in str(caught.value)


def test_cartridges_of_a_root_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = list(range(3, 33))
    parameters = {"method": "whole", "exact": True, "documents": (document.describe(str(ids), len(ids)),)}
    models = {"mine": byte_llama(max_position_embeddings=512), "other": byte_llama(max_position_embeddings=256)}
    for name, model in models.items():
        Cartridge.of(name, document.read(model, ids), model, **parameters).save(tmp_path / "roots" / name)
    accel.attach(models["mine"])
    offer(models["mine"], [tmp_path / "roots"])
    assert accel.cartridges(models["mine"]).names() == ["mine"]
    warned = capsys.readouterr().err
    assert warned.startswith("Warning: cartridge other is not offered: ") and len(warned.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="holds no cartridge"):
        offer(models["mine"], [tmp_path / "empty"])


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            ("--port", str(port)): f"cannot listen on 127.0.0.1:{port}: Address already in use",
            ("--cors-origin", "a.example"): "--cors-origin a.example: must be http(s)://HOST",
            ("--prefix-cache", "lots"): "'lots' is no size",
            ("--host", "no.such.host.invalid"): "--host no.such.host.invalid: ",
        }
        for given, why in cases.items():
            result = serve(*given)
            assert result.exit_code == 1 and result.stderr.startswith(f"Error: {why}"), result.stderr
            assert len(result.stderr.splitlines()) == 1


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = accel.cli.serve.find_spec
    monkeypatch.setattr(
        accel.cli.serve, "find_spec", lambda name: None if name in ("fastapi", "prometheus_client") else there(name)
    )
    result = serve()
    assert result.exit_code == 1
    assert result.stderr == ("Error: accel serve needs fastapi, prometheus-client: pip install accel-runtime[serve]\n")
