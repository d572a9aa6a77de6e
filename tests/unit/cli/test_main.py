"""The command line's frame: start-up, help, exit codes, and how faults are told. No model is run here."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from galley import __version__
from galley.cli.main import COMMANDS, EXIT_CODES, galley, invoke
from galley.errors import EngineFault, GalleyError, Overloaded

HEAVY = {"numpy", "starlette", "uvicorn", "tokenizers", "rich", "jinja2", "msgspec", "asyncio", "tomllib"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False
    )


CALL = "import sys; from galley.cli.main import main; main(sys.argv[1:])"


def test_version_imports_nothing_heavy() -> None:
    done = python(
        "import sys\nfrom galley.cli.main import invoke\nassert invoke(['--version']) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert done.stdout.splitlines()[0] == f"galley {__version__}", done.stderr
    assert not HEAVY & set(done.stdout.splitlines()[1].split())


def test_version_is_quick() -> None:
    """The budget is 60 ms over bare Python; shared test machines get four times that."""

    def best(code: str, *arguments: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert python(code, *arguments).returncode == 0
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(CALL, "--version") - best("pass") < 0.240


@pytest.mark.parametrize("name", COMMANDS)
def test_listed_help_is_the_commands_own(name: str) -> None:
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert command.help.splitlines()[0] == COMMANDS[name][1]


@pytest.mark.parametrize("name", [*COMMANDS, "ls"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke([name, "--help"]) == 0
    assert "Usage: galley " in capsys.readouterr().out


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}  " in out or f"  {name} " in out for name in COMMANDS)
    for line in EXIT_CODES.splitlines()[2:]:
        assert line.strip() in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nonsense"], 2),
        (["list", "--nonsense"], 2),
        (["run"], 2),
        (["run", "x", "hi", "--temperature", "warm"], 2),
        (["run", "x", "hi", "--logit-bias", "5"], 2),
        (["run", "x", "hi", "--logprobs", "1"], 2),
        (["run", "x", "hi", "--raw", "--system", "s"], 2),
        (["serve", "--port", "x"], 2),
        (["--config", "/nowhere/galley.toml", "list"], 2),
        (["run", "nothing-like-it", "hi"], 3),
        (["chat", "nothing-like-it"], 3),
        (["show", "nothing-like-it"], 3),
        (["serve", "--model", "nothing-like-it"], 3),
        (["rm", "nothing-like-it"], 3),
        (["pull", "nothing-like-it"], 3),
        (["pull", "pypi:x==1"], 2),
        (["receipt", "rcp_none"], 2),
        (["list"], 0),
        (["log"], 0),
    ],
)
def test_exit_codes(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(words) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert code == 0 or captured.err, "a failure says something"


class Broken(click.Command):
    def __init__(self, error: BaseException) -> None:
        super().__init__("broken")
        self.error = error

    def invoke(self, ctx: click.Context) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (GalleyError("went wrong", hint="do this"), 1, "galley: went wrong\n  hint: do this\n"),
        (EngineFault("step failed"), 1, "galley: step failed\n"),
        (Overloaded("full"), 1, "galley: full\n"),
        (ZeroDivisionError("oops"), 1, "galley: internal fault: ZeroDivisionError: oops\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_faults_are_one_line(
    error: BaseException,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(galley, "get_command", lambda ctx, name: Broken(error))
    assert invoke(["broken"]) == code
    assert capsys.readouterr().err.startswith(words)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galley, "get_command", lambda ctx, name: Broken(ZeroDivisionError("oops")))
    with pytest.raises(ZeroDivisionError):
        invoke(["--debug", "broken"])


def test_config_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    assert invoke([*home, "config", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "config.toml")
    assert invoke([*home, "config", "init"]) == 0
    assert invoke([*home, "config", "init"]) == 2
    assert invoke([*home, "config", "validate"]) == 0
    (tmp_path / "config.toml").write_text("[server]\nport = 5\n")
    capsys.readouterr()
    assert invoke([*home, "config", "show", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["server.port"]["value"] == 5
    assert rows["server.port"]["origin"] == f"file:{tmp_path / 'config.toml'}"
    assert rows["home"]["origin"] == "flag:--home"
    assert invoke([*home, "config", "show"]) == 0
    assert "ORIGIN" not in capsys.readouterr().out
    assert invoke([*home, "config", "show", "--origin"]) == 0
    assert "ORIGIN" in capsys.readouterr().out
    (tmp_path / "config.toml").write_text("[server]\nprot = 5\n")
    assert invoke([*home, "config", "validate"]) == 2
    assert "server.prot" in capsys.readouterr().err


def test_listings_without_a_terminal_have_no_colour(tmp_path: Path) -> None:
    done = python(CALL, "--home", str(tmp_path), "config", "show", "--origin")
    assert done.returncode == 0 and "\x1b" not in done.stdout


def test_a_reader_that_leaves_is_not_a_traceback(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", CALL, "--home", str(tmp_path), "config", "show"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=env,
        check=False,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""
