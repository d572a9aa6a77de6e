"""The command line's frame: start-up, help, exit codes, and how faults are told. No model is run here."""

import builtins
import importlib
import io
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from galley import __version__
from galley.audit.assemble import assemble
from galley.audit.receipts import ReceiptStore
from galley.cli.main import COMMANDS, EXIT_CODES, galley, invoke
from galley.config import Config
from galley.errors import EngineFault, GalleyError, Overloaded
from galley.types import Request, SamplingParams

HEAVY = {
    "numpy",
    "starlette",
    "uvicorn",
    "tokenizers",
    "sqlalchemy",
    "jinja2",
    "msgspec",
    "asyncio",
    "tomllib",
}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False
    )


CALL = "from galley.cli.start import main; main()"


def test_version_imports_nothing_heavy() -> None:
    done = python(
        "import sys\nfrom galley.cli.main import invoke\nassert invoke(['--version']) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert done.stdout.splitlines()[0] == f"galley {__version__}", done.stderr
    assert not HEAVY & set(done.stdout.splitlines()[1].split())


def test_version_is_said_alike_whoever_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--version"]) == 0
    assert python(CALL, "--version").stdout == capsys.readouterr().out == f"galley {__version__}\n"


def test_version_takes_60_ms_more_than_bare_python() -> None:
    """Processor time of the two, taking turns: other work on the machine lengthens the clock's, not this."""

    def spent(code: str, *arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(code, *arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(spent("pass"), spent(CALL, "--version")) for _ in range(9)]
    bare, version = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert version - bare < 0.060


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
    assert done.returncode == 0 and done.stderr == b""


def receipts(home: Path, *models: str) -> None:
    store = ReceiptStore(home / "receipts.db")
    for number, model in enumerate(models):
        made = Request(
            id="r", api="chat.completions", model=model, params=SamplingParams(), created=float(number)
        )
        store.record(
            assemble(
                receipt_id=f"rcp_{number}",
                request=made,
                route=None,
                digests=None,
                meters={},
                status="disconnected",
            )
        )
    store.close()


def test_log_of_an_empty_home_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--home", str(tmp_path), "log"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "No receipts" in captured.err


def test_log_columns_hold_long_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipts(tmp_path, "m", "a-model-with-a-name-of-many-letters")
    assert invoke(["--home", str(tmp_path), "log"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2
    for row in rows:
        assert row[head.index("RECEIPT") :].startswith("rcp_") and row[head.index("MODEL") - 1] == " "


def test_reader_that_leaves_is_no_fault(tmp_path: Path) -> None:
    receipts(tmp_path, *(["m" * 2000] * 500))
    child = subprocess.Popen(
        [sys.executable, "-c", CALL, "--home", str(tmp_path), "log", "-n", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert (child.stderr.read(), child.wait(60)) == (b"", 0)
    child.stderr.close()


def test_help_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["config", "--help"]) == 0
    assert "Never overwrites one." in " ".join(capsys.readouterr().out.split())
    assert invoke(["log", "--help"]) == 0
    assert "INTEGER RANGE" not in capsys.readouterr().out
    assert invoke(["chat", "--help"]) == 0
    assert "config show" in capsys.readouterr().out


def test_capture_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GALLEY_CAPTURE", "1")
    seen = []

    def serve(config: Config) -> None:
        seen.append((config.receipts.capture, config.origin("receipts.capture")))

    monkeypatch.setattr("galley.endpoint.serve.serve", serve)
    monkeypatch.setattr("galley.model.store.Store.resolve", lambda self, name: None)
    for flags in ([], ["--capture"], ["--no-capture"]):
        assert invoke(["serve", *flags]) == 0
    assert seen == [(True, "env:GALLEY_CAPTURE"), (True, "flag:--capture"), (False, "flag:--capture")]


def test_damaged_entry_is_told_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "bad"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
        assert invoke(["--home", str(tmp_path), "pull", str(tmp_path / f"{name}.gguf")]) == 0
    (tmp_path / "models/bad/entry.json").write_text("{")
    capsys.readouterr()
    assert invoke(["--home", str(tmp_path), "list"]) == 0
    captured = capsys.readouterr()
    assert "good" in captured.out and "models/bad" in captured.err
    assert invoke(["--home", str(tmp_path), "rm", "good", "bad"]) == 0
    assert invoke(["--home", str(tmp_path), "list"]) == 0


@pytest.fixture
def stranger() -> Iterator[Callable[[], None]]:
    """Become a user to whom permissions apply, for the rest of the test."""
    before = os.geteuid()

    def become() -> None:
        if before == 0:
            os.seteuid(65534)

    yield become
    os.seteuid(before)


def receipts_in(home: Path) -> str:
    store = ReceiptStore(home / "receipts.db")
    request = Request(id="r", api="test", model="m", params=SamplingParams(), created=1.0, prompts=["x"])
    receipt = assemble(receipt_id="rcpt_1", request=request, route=None, digests=None, meters={}, status="ok")
    store.record(receipt)
    store.close()
    return receipt.id


COMMANDS_THAT_LOOK = (["cache", "list"], ["cache", "drop", "--all"], ["log"], ["receipt", "rcpt_1"])


@pytest.mark.parametrize("shut", ["home", "inside"])
@pytest.mark.parametrize("words", COMMANDS_THAT_LOOK, ids=" ".join)
def test_another_users_home_is_a_typed_error(
    tmp_path: Path,
    shut: str,
    words: list[str],
    stranger: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = tmp_path / "home"
    (home / "kv").mkdir(parents=True)
    receipts_in(home)
    monkeypatch.chdir("/")
    assert invoke(["--home", str(home), *words]) == 0  # and everything is imported
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    for folder in (home,) if shut == "home" else (home / "kv", home / "receipts.db"):
        folder.chmod(0)
    capsys.readouterr()
    try:
        stranger()
        code = invoke(["--home", str(home), *words])
    finally:
        os.seteuid(os.getuid())
        home.chmod(0o700)
        (home / "kv").chmod(0o700)
    told = capsys.readouterr().err
    assert code != 0 and "internal fault" not in told, told
    assert str(home) in told and "GALLEY_HOME" in told


@pytest.mark.parametrize("words", [["cache", "list"], ["log"], ["receipt", "rcpt_1"]], ids=" ".join)
def test_a_read_only_home_can_be_looked_at(
    tmp_path: Path, words: list[str], stranger: Callable[[], None], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    home = tmp_path / "home"
    (home / "kv").mkdir(parents=True)
    receipts_in(home)
    monkeypatch.chdir("/")
    assert invoke(["--home", str(home), *words]) == 0
    expected = capsys.readouterr().out
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (home / "kv").chmod(0o555)
    home.chmod(0o555)
    for file in home.glob("receipts*"):
        file.chmod(0o444)
    try:
        stranger()
        code = invoke(["--home", str(home), *words])
    finally:
        os.seteuid(os.getuid())
        home.chmod(0o700)
    assert (code, capsys.readouterr().out) == (0, expected)


def test_settings_file_that_cannot_be_written_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").write_text("a file")
    assert invoke(["--home", str(tmp_path / "home"), "config", "init"]) == 2
    assert "galley --config FILE config init" in capsys.readouterr().err


def test_chat_on_a_terminal_edits_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from galley.cli import chat

    asked = []
    monkeypatch.setattr(chat.importlib, "import_module", asked.append)
    monkeypatch.setattr(builtins, "input", lambda prompt: "/exit")
    for live in (True, False):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda live=live: live))
        house = SimpleNamespace(model=SimpleNamespace(name="m"))
        chat.Conversation(house, None, SamplingParams(), left_open=[], system=None, quiet=True).talk()
        assert asked == ["readline"]


@pytest.mark.parametrize(
    ("given", "word"), [("", "empty"), (" \n", "empty"), ("a\x00b", "NUL"), ("\udcff", "surrogate")]
)
def test_run_refuses_what_is_no_prompt(
    given: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    assert invoke(["run", "no-such-model"]) == 2
    assert word in capsys.readouterr().err
