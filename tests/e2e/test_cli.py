"""Whole commands on a tiny random model: what is printed, what is stored, what is returned."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from galley.cli.main import invoke
from tests.tiny import tiny_gguf

CALL = "import sys; from galley.cli.main import main; main(sys.argv[1:])"
SMALL = ["--threads", "1", "--kv-memory", "8MiB"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", seed=1)


@pytest.fixture
def home(tmp_path: Path, tiny: Path) -> Path:
    assert invoke(["--home", str(tmp_path), "pull", str(tiny)]) == 0
    return tmp_path


class Shell:
    """``galley`` in this process, with a piped standard input."""

    def __init__(
        self, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._home = home
        self._capsys = capsys
        self._patch = monkeypatch

    def __call__(self, *words: str, stdin: str = "", code: int = 0) -> tuple[str, str]:
        self._patch.setattr("sys.stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        got = invoke(["--home", str(self._home), *words])
        captured = self._capsys.readouterr()
        assert got == code, captured.err
        return captured.out, captured.err

    def json(self, *words: str, stdin: str = "") -> Any:
        return json.loads(self(*words, "--json", stdin=stdin)[0])


@pytest.fixture
def shell(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(home, capsys, monkeypatch)


def test_run_streams_text_and_leaves_a_receipt(shell: Shell) -> None:
    out, err = shell("run", "tiny", "hello", "--max-tokens", "8", "--seed", "1", "--ignore-eos", *SMALL)
    assert err.startswith("[local · 8 tokens · TTFT ") and out.endswith("\n")
    receipt = err.strip().strip("[]").rpartition(" ")[2]
    stored = shell.json("receipt", receipt)
    assert (stored["api"], stored["status"], stored["usage"]["completion_tokens"]) == ("cli.run", "ok", 8)
    assert stored["params"]["seed"] == 1 and stored["prompt"] is None
    text, _ = shell("receipt", receipt)
    assert receipt in text and "sha256" not in text.splitlines()[0]
    assert receipt in shell("log")[0]
    lines = shell("log", "--json")[0].splitlines()
    assert [json.loads(line)["id"] for line in lines] == [receipt]


def test_run_json_has_choices_logprobs_and_usage(shell: Shell) -> None:
    words = ["--max-tokens", "5", "-n", "2", "--seed", "3", "--ignore-eos", "--logprobs", "2", *SMALL]
    said = shell.json("run", "tiny", "-", *words, stdin="hello")
    assert [choice["index"] for choice in said["choices"]] == [0, 1]
    assert all(len(choice["token_ids"]) == len(choice["logprobs"]) == 5 for choice in said["choices"])
    assert all(choice["finish_reason"] == "length" for choice in said["choices"])
    assert said["usage"]["completion_tokens"] == 10 and said["receipt"]
    again = shell.json("run", "tiny", "hello", *words)
    assert again["choices"] == said["choices"], "same seed, same answer"


def test_stdin_is_the_prompt_when_there_is_none(shell: Shell) -> None:
    words = ["--max-tokens", "5", "--temperature", "0", "--ignore-eos", *SMALL]
    piped = shell.json("run", "tiny", *words, stdin="hello")
    named = shell.json("run", "tiny", "hello", *words)
    raw = shell.json("run", "tiny", "hello", "--raw", *words)
    assert piped["choices"] == named["choices"]
    assert raw["usage"]["prompt_tokens"] < named["usage"]["prompt_tokens"], "no template around it"


def test_capture_stores_the_prompt_only_when_asked(shell: Shell) -> None:
    words = ["run", "tiny", "my secret", "--max-tokens", "2", *SMALL]
    shell(*words)
    assert "my secret" not in shell("log", "--json")[0]
    shell(*words, "--capture")
    assert "my secret" in shell("log", "--json", "--limit", "1")[0]


def test_bad_parameters_and_context_have_their_codes(shell: Shell) -> None:
    _, err = shell("run", "tiny", "hi", "--temperature", "-1", *SMALL, code=2)
    assert "temperature" in err
    _, err = shell("run", "tiny", "hello " * 2000, *SMALL, code=4)
    assert "maximum context length is 512" in err
    _, err = shell("run", "tiny", "hi", "--isa", "mmx", *SMALL, code=2)
    assert "mmx" in err
    statuses = [json.loads(line)["status"] for line in shell("log", "--json")[0].splitlines()]
    assert statuses == ["error", "error"], "refused requests leave receipts too"


def test_path_works_wherever_a_model_is_asked_for(shell: Shell, tiny: Path) -> None:
    out, _ = shell("run", str(tiny), "hi", "--max-tokens", "2", "--quiet", *SMALL)
    assert out
    assert shell.json("show", str(tiny))["spec"]["arch"] == "llama"


def test_chat_remembers_and_resets(shell: Shell) -> None:
    turns = "first\nsecond\n\n/reset\nfirst\n/exit\nnever\n"
    out, err = shell(
        "chat", "tiny", "--max-tokens", "3", "--temperature", "0", "--ignore-eos", *SMALL, stdin=turns
    )
    receipts = [json.loads(line) for line in shell("log", "--json")[0].splitlines()]
    prompts = [receipt["usage"]["prompt_tokens"] for receipt in receipts]
    assert len(prompts) == 3 and prompts[1] > prompts[0] == prompts[2]
    assert {receipt["api"] for receipt in receipts} == {"cli.chat"}
    assert err.count("[local · 3 tokens") == 3 and "Forgotten." in err and out


def test_list_show_rm(shell: Shell, tiny: Path) -> None:
    (entry,) = shell.json("list")
    assert (entry["name"], entry["path"], entry["in_place"]) == ("tiny", str(tiny), True)
    assert "tiny" in shell("ls")[0]
    shown = shell.json("show", "tiny")
    assert shown["weights_sha256"] == entry["sha256"]
    assert shown["chat_format"] == "chatml"
    assert sum(row["bytes"] for row in shown["types"]) < entry["bytes"]
    text, _ = shell("show", "tiny")
    assert all(
        word in text for word in ("architecture", "quantisation", "context", "512", "licence", "sha256")
    )
    shell("rm", "tiny")
    assert shell.json("list") == [] and tiny.is_file()


def test_doctor_measures_and_says_what_fits(shell: Shell) -> None:
    report = shell.json("doctor")
    assert report["version"] == 1
    assert set(report) == {
        "version", "machine", "kernels", "measured", "home", "disk_free", "models", "cost",
    }  # fmt: skip
    assert report["machine"]["usable_cores"] >= 1
    (fit,) = report["models"]
    assert fit["name"] == "tiny" and fit["fits"] and fit["fault"] is None
    if report["measured"]["why_not"] is None:
        assert report["measured"]["bandwidth_gb_s"] > 0.1 and report["measured"]["int8_gop_s"] > 0.1
        ceiling = report["measured"]["bandwidth_gb_s"] * 1e9 / fit["weight_bytes"]
        assert report["kernels"]["backend"] != "native" or fit["decode_ceiling_tok_s"] == pytest.approx(
            ceiling
        )
    else:
        assert report["kernels"]["backend"] == "reference" and fit["decode_ceiling_tok_s"] is None
    text, _ = shell("doctor", "--backend", "reference", "--threads", "99")
    assert "asked for by flag:--backend" in text and "tiny" in text
    assert "99: asked for by flag:--threads" in text and "warning: 99 threads on" in text
    assert "cost       unknown" in text and "smollm2-135m" in text, "the default model is not here"


def test_doctor_measures_the_cost_of_a_step_once(
    shell: Shell, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept for the next start; a damaged file is said to be, and measured again."""
    monkeypatch.setattr("galley.runtime.cost.CostModel.doubts", None)  # test machines are busy
    words = ["doctor", "--model", "tiny", "--threads", "1"]
    first = shell.json(*words)["cost"]
    assert first["why_not"] is None and first["problems"] == [] and first["source"] == "measured"
    points = {point["tokens"]: point for point in first["points"]}
    assert list(points) == [1, 2, 4, 8, 16, 64, 512]
    assert 0 < points[1]["seconds"] <= points[16]["seconds"] <= points[512]["seconds"]
    assert first["ratios"]["8"] >= first["ratios"]["4"] >= 1
    kept = Path(first["file"])
    assert kept.parent == home / "cost"
    assert shell.json(*words)["cost"] == first, "not measured a second time"
    assert shell.json(*words, "--fresh")["cost"]["taken"] > first["taken"]
    kept.write_bytes(kept.read_bytes()[:-40])
    text, _ = shell(*words)
    assert "is damaged" in text and "t(4)/t(1)" in text and "1,000 positions of context" in text
    assert shell.json(*words)["cost"]["problems"] == []


def test_a_doubtful_cost_is_shown_and_not_kept(
    shell: Shell, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("galley.runtime.cost.CostModel.doubts", "a crowd")
    text, _ = shell("doctor", "--model", "tiny", "--threads", "1")
    assert "not kept: a crowd" in text and not (home / "cost").exists()


def child(home: Path, *words: str, **options: Any) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CALL, "--home", str(home), *words], env=env, text=True, **options
    )


def test_ctrl_c_stops_an_answer_with_130_and_a_receipt(home: Path, shell: Shell) -> None:
    words = ["run", "tiny", "hi", "--ignore-eos", "--max-tokens", "450", "--backend", "reference"]
    process = child(home, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)  # The answer has begun.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    (line,) = shell("log", "--json")[0].splitlines()
    assert json.loads(line)["status"] == "cancelled"


def test_log_follows_other_processes(home: Path, shell: Shell) -> None:
    process = child(home, "log", "-f", "--json", "-n", "0", stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        deadline = time.monotonic() + 30
        while True:
            # It may have started after the first receipt was stored, so there is a next one.
            shell("run", "tiny", "hi", "--max-tokens", "2", "-q", *SMALL)
            if select.select([output], [], [], 0.5)[0]:
                break
            assert time.monotonic() < deadline and process.poll() is None
        assert json.loads(output.readline())["api"] == "cli.run"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


@pytest.mark.model
def test_the_real_model_answers(smollm2_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "smollm2", "What is gravity?", "--temperature", "0", "--max-tokens", "24"]
    assert invoke(["--home", str(smollm2_home), *words]) == 0
    assert "Gravity is" in capsys.readouterr().out
