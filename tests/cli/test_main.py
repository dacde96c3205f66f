"""The command's frame: fast help, errors as one line, exit codes, literals, clean JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import accel.cli.main
from accel.cli.common import Progress, artifact_option, emit, model_option, options_option, parse_options, table
from accel.cli.main import COMMANDS, main
from accel.errors import OptionError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Replace ``accel env`` by a command that raises what it is given."""

    def install(error: BaseException) -> None:
        @click.command("env")
        def env() -> None:
            raise error

        monkeypatch.setattr(accel.cli.main.LazyGroup, "get_command", lambda *_: env)

    monkeypatch.delenv("ACCEL_DEBUG", raising=False)
    return install


def test_help_lists_every_command_without_torch() -> None:
    """`accel --help` from a shell, with the modules it imported: a person who asks for help does not wait."""
    code = (
        "import sys\nfrom accel.cli.main import main\nmain(['--help'], prog_name='accel', standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "-h"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Usage: main {name}")


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout.startswith("accel 0.")


def test_user_mistake_is_one_line(failing: Callable[[BaseException], None]) -> None:
    failing(OptionError("k=0: must be ≥ 1;\n  use method='plain'"))
    result = CliRunner().invoke(main, ["env"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: k=0: must be ≥ 1; use method='plain'\n"


def test_our_own_bug_names_the_switch_for_its_traceback(
    failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(KeyError("x"))
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 1
    assert result.stderr == "Error: KeyError: 'x' (unexpected; set ACCEL_DEBUG=1 for the traceback)\n"
    monkeypatch.setenv("ACCEL_DEBUG", "1")
    assert isinstance(CliRunner().invoke(main, ["env"]).exception, KeyError)


def test_interrupt_exits_with_130(failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    result = CliRunner().invoke(main, ["env"])
    assert (result.exit_code, result.stderr) == (130, "Interrupted\n")


@pytest.mark.parametrize("arguments", [["nothing"], ["env", "--nothing"], ["methods", "extra"]])
def test_usage_error_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_env_and_methods_print_clean_json() -> None:
    env = json.loads(CliRunner().invoke(main, ["env", "--json"]).stdout)
    assert env["versions"]["torch"]
    assert env["models"]["default_model"]
    methods = {row["name"]: row for row in json.loads(CliRunner().invoke(main, ["methods", "--json"]).stdout)}
    assert "plain" in methods
    assert all(option["help"] for row in methods.values() for option in row["options"])


def test_env_and_methods_print_text() -> None:
    assert "torch" in CliRunner().invoke(main, ["env"]).stdout
    assert CliRunner().invoke(main, ["methods"]).stdout.startswith("METHOD")


def test_options_come_from_the_environment_too() -> None:
    result = CliRunner().invoke(main, ["env"], env={"ACCEL_ENV_JSON": "1"})
    assert json.loads(result.stdout)["versions"]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("5", 5),
        ("-1", -1),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("none", None),
        ("ngram", "ngram"),
        ("'5'", "5"),
        ("lin,0.5", ("lin", 0.5)),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_literals(given: str, value: object) -> None:
    parsed = parse_options([f"draft-length={given}"])["draft_length"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("pairs", [["five"], ["=5"], ["a b=5"], ["k=1", "k=2"]])
def test_malformed_options_are_refused(pairs: list[str]) -> None:
    with pytest.raises(OptionError):
        parse_options(pairs)


def test_shared_options_reach_the_command() -> None:
    @click.command()
    @model_option
    @artifact_option
    @options_option
    def show(model: str | None, artifact: tuple[str, ...], options: dict[str, object]) -> None:
        click.echo(repr((model, artifact, options)))

    result = CliRunner().invoke(show, ["-m", "toy", "-a", "x", "-a", "y", "-o", "k=1", "-o", "drafter=lm"])
    assert result.stdout == "('toy', ('x', 'y'), {'k': 1, 'drafter': 'lm'})\n"
    assert CliRunner().invoke(show, ["-o", "five"]).exit_code == 2


def test_emit_keeps_stdout_clean_and_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emit({"τ": 1}, "one", as_json=True, output=tmp_path / "new" / "out.json")
    assert json.loads(capsys.readouterr().out) == {"τ": 1}
    assert json.loads((tmp_path / "new" / "out.json").read_text(encoding="utf-8")) == {"τ": 1}
    emit({"τ": 1}, "one")
    assert capsys.readouterr().out == "one\n"


def test_table_aligns() -> None:
    assert table(("A", "B"), [("long", 1), ("x", 22)]) == "A     B\nlong  1\nx     22"


def test_progress_is_for_terminals_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((io.StringIO(), ""), (Terminal(), "\r\x1b[Khalf\r\x1b[K")):
        with Progress(stream) as progress:
            progress("half")
        assert stream.getvalue() == expected


def test_the_command_line_and_the_table_agree_on_the_default_model():
    from accel.cli.common import DEFAULT_MODEL
    from accel.models import aliases

    assert DEFAULT_MODEL == aliases.DEFAULT_MODEL
