"""Every `galley bench` on a tiny random model: what it runs, what it writes, how it fails."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galley.cli.main import invoke
from galley.runtime.backend import native_missing
from tests.e2e.conftest import TinyServer

SMALL = ["--threads", "1", "--kv-memory", "8MiB"]
SHORT = ["--prompt-tokens", "12", "--output-tokens", "6"]


class Bench:
    """``galley bench`` in this process; the JSON and SVG it wrote."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._home = home
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str, code: int = 0, plot: bool = True) -> dict[str, Any]:
        file, picture = self._home / "result.json", self._home / "plot.svg"
        for path in (file, picture):
            path.unlink(missing_ok=True)
        extra = ["--json", str(file), *(["--plot", str(picture)] if plot else [])]
        self._capsys.readouterr()
        got = invoke(["--home", str(self._home), "bench", *words, *extra])
        self.out, self.err = self._capsys.readouterr()
        assert got == code, self.err + self.out
        if not file.exists():
            return {}
        if plot:
            assert ET.parse(picture).getroot().tag.endswith("svg")
        record: dict[str, Any] = json.loads(file.read_text())
        assert record["kind"] == words[0] and record["version"] == 1 and record["command"]
        assert (
            record["machine"]["cpu"] and record["machine"]["galley"] and record["machine"]["isa"] is not None
        )
        assert record["commit"] and record["settings"]
        if native_missing() is None:
            for when in ("before", "after"):
                assert record["placement"][when]["read_gb_s"] > 0
                assert record["placement"][when]["roundtrip_ns"] > 0
            assert "GB/s" in self.out
        return record


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def test_latency(bench: Bench, tiny_path: Path) -> None:
    record = bench("latency", "--model", str(tiny_path), *SHORT, *SMALL, "--repeats", "2", "--seed", "5")
    found = record["figures"]
    assert (found["prompt"], found["output"], len(found["gaps"])) == (12, 6, 10)
    assert found["itl"]["count"] == 10 and found["ttft"]["count"] == found["e2e"]["count"] == 2
    assert 0 < found["ttft"]["p50"] < found["e2e"]["p50"] and found["decode_tok_s"]["median"] > 0
    assert record["settings"]["seed"] == 5 and record["settings"]["threads"] >= 1
    assert "time to first token" in bench.out and "between tokens" in bench.out


def test_latency_of_one_token_has_nothing_between(bench: Bench, tiny_path: Path) -> None:
    words = ["--prompt-tokens", "12", "--output-tokens", "1", "--repeats", "1"]
    record = bench("latency", "--model", str(tiny_path), *words, *SMALL, plot=False)
    assert record["figures"]["itl"] is None and record["figures"]["decode_tok_s"] is None


def test_fresh_prompts_find_nothing_cached_and_shared_ones_do(bench: Bench, tiny_path: Path) -> None:
    words = ["--prompt-tokens", "40", "--output-tokens", "3", "--repeats", "3"]
    assert bench("latency", "--model", str(tiny_path), *words, *SMALL)["figures"]["cached_tokens"] == 0
    record = bench("latency", "--model", str(tiny_path), *words, *SMALL, "--shared-prefix", "32")
    assert record["figures"]["cached_tokens"] == 64, "the first of three is cold, also after warming up"
    assert "64 prompt tokens came from the prefix cache" in bench.err


def test_a_result_that_cannot_be_written_is_said_in_one_line(
    bench: Bench, tiny_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words = ["latency", "--model", str(tiny_path), *SHORT, *SMALL, "--repeats", "1"]
    assert invoke(["bench", *words, "--json", str(tmp_path / "file" / "x.json")]) == 1
    assert bench._capsys.readouterr().err.splitlines()[-1].startswith("galley: the result cannot be written")


def test_throughput(bench: Bench, tiny_path: Path) -> None:
    words = ["--streams", "3,1", "--repeats", "2"]
    record = bench("throughput", "--model", str(tiny_path), *SHORT, *words, *SMALL)
    assert [one["streams"] for one in record["figures"]] == [1, 3]
    for one in record["figures"]:
        assert one["output_tok_s"]["median"] > 0 and one["output_tok_s"]["count"] == 2
        assert one["ttft"]["count"] == 2 * one["streams"] and one["cached_tokens"] == 0


@pytest.mark.skipif(native_missing() is not None, reason="the limits are probed by the native kernels")
def test_roofline(bench: Bench, tiny_path: Path) -> None:
    words = ["--sizes", "1,4,80", "--repeats", "2", "--threads", "1"]
    points = bench("roofline", "--model", str(tiny_path), *words)["figures"]
    assert [(p["tokens"], p["outputs"]) for p in points] == [(1, 1), (4, 4), (80, 1)]
    for p in points:
        nearest = max(p["gb_s"] / p["read_gb_s"], p["gop_s"] / p["int8_gop_s"])
        assert p["share"] == pytest.approx(nearest) and p["limit"] in ("memory", "arithmetic")
    bench("roofline", "--model", str(tiny_path), "--sizes", "4096", code=2)
    assert "context is 512" in bench.err


def test_serve_starts_its_own_server_and_stops_it(bench: Bench, tiny_path: Path, tmp_path: Path) -> None:
    words = ["--clients", "2", "--requests", "5", "--slo", "ttft=60", "--slo", "e2e=60"]
    record = bench("serve", "--model", str(tiny_path), *SHORT, *words, *SMALL)
    found = record["figures"]
    assert (found["mode"], found["requests"], found["ok"], found["errors"]) == ("closed", 5, 5, {})
    assert (found["output_tokens"], found["tokens_counted_by"]) == (30, "server")
    assert found["cached_tokens"] == 0 and found["prompt_tokens"] >= 60
    assert found["goodput_share"] == 1.0 and found["client_cores"] > 0 and found["late"] is None
    assert len(record["outcomes"]) == 5 and all(o["scheduled"] >= 0 for o in record["outcomes"])
    assert "--threads" in record["settings"]["server_flags"]
    assert any("ready after" in line for line in record["settings"]["server_notes"])
    assert not (tmp_path / "receipts.db").exists(), "a benchmark's receipts are not the user's"
    assert record["others_cores"] is not None


@pytest.fixture
def url(tiny_serve: Callable[..., TinyServer]) -> str:
    return tiny_serve().url


def test_serve_against_a_url_open_loop(bench: Bench, url: str, tmp_path: Path) -> None:
    record = bench("serve", "--url", url, *SHORT, "--rate", "40", "--requests", "6", "--seed", "3", "--chat")
    found = record["figures"]
    assert (found["mode"], found["ok"], found["errors"]) == ("open", 6, {})
    assert found["late"]["count"] == 6 and record["settings"]["model"]
    assert record["others_cores"] is None, "whose work is whose cannot be told"
    times = [o["scheduled"] for o in record["outcomes"]]
    assert times == sorted(times) and times[0] > 0
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at": 0.0}\n{"at": 0.05, "prompt_tokens": 30, "output_tokens": 2}\n')
    record = bench("serve", "--url", url, *SHORT, "--trace", str(trace))
    assert [o["tokens"] for o in record["outcomes"]] == [6, 2]
    assert record["outcomes"][1]["prompt_tokens"] > record["outcomes"][0]["prompt_tokens"]


def test_serve_counts_errors_and_fails(bench: Bench, url: str) -> None:
    """Prompts beyond the context are refused by the server: counted by kind, exit code 1."""
    record = bench("serve", "--url", url, "--prompt-tokens", "900", "--requests", "3", code=1, plot=False)
    assert record["figures"]["ok"] == 0
    assert record["figures"]["errors"] == {"http 400 context_length_exceeded": 3}
    assert record["figures"]["ttft"] is None and "failed: http 400" in bench.out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["serve", "--rate", "1", "--clients", "2"], 2, "give one"),
        (["serve", "--rate", "-1"], 2, "arrival rate"),
        (["serve", "--url", "nowhere"], 2, "not an address"),
        (["serve", "--url", "http://127.0.0.1:9/v1", "--threads", "1"], 2, "--threads"),
        (["serve", "--url", "http://127.0.0.1:9/v1"], 1, "does not list its models"),
        (["serve", "--slo", "ttft"], 2, "objective"),
        (["serve", "--extra", "top_k"], 2, "NAME=JSON"),
        (["serve", "--extra", "top_k={"], 2, "top_k"),
        (["serve", "--shared-prefix", "128"], 2, "--shared-prefix"),
        (["serve", "--model", "nothing-like-it"], 3, "does not exist"),
        (["latency", "--model", "nothing-like-it"], 3, "does not exist"),
        (["latency", "--plot", "x.gif"], 2, ".svg or a .png"),
        (["throughput", "--streams", "1,x"], 2, "separated by commas"),
        (["compare"], 2, "two or more"),
        (["compare", "--target", "a=x", "--target", "a=y"], 2, "of its own"),
        (["compare", "--target", "a=galley:", "--target", "b=galley:"], 3, "does not exist"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    bench: Bench, words: list[str], code: int, told: str
) -> None:
    assert bench(*words, code=code, plot="--plot" not in words) == {}
    assert told in bench.err


def test_a_server_that_does_not_start_says_why(bench: Bench, tiny_path: Path) -> None:
    bench("serve", "--model", str(tiny_path), "--isa", "mmx", code=1)
    assert "galley serve ended with 2" in bench.err and "mmx" in bench.err


def test_compare_takes_turns(bench: Bench, tiny_path: Path, url: str) -> None:
    """A server under two settings started here, and one that was there."""
    record = bench(
        "compare", "--model", str(tiny_path), *SHORT,
        "--target", "one=galley:--threads 1 --kv-memory 8MiB", "--target", f"there={url}",
        "--rounds", "2", "--requests", "3", "--clients", "2",
    )  # fmt: skip
    first, second = record["figures"]
    assert (first["name"], second["name"]) == ("one", "there")
    assert first["rate_ratio"] is None and second["rate_ratio"]["count"] == 2
    assert second["ttft_ratio"]["median"] > 0 and first["errors"] == second["errors"] == 0
    orders = [list(one["figures"]) for one in record["rounds"]]
    assert orders == [["one", "there"], ["there", "one"]], "the order turns round"
    assert list(record["settings"]["server_notes"]) == ["one"]
    assert all(f["cached_tokens"] == 0 for one in record["rounds"] for f in one["figures"].values())


def test_the_command_line_stays_quick_without_it() -> None:
    """`galley bench --help` measures nothing and imports nothing heavy."""
    code = (
        "import sys\nfrom galley.cli.main import invoke\nassert invoke(['bench', 'serve', '--help']) == 0\n"
        "assert not {'numpy', 'matplotlib', 'uvloop'} & set(sys.modules), sorted(sys.modules)"
    )
    path = str(Path(sys.modules["galley"].__file__ or "").parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
