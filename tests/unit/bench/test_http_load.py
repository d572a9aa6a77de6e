"""The load client and the server process against a small server of our own."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.http_load import Answered, Load, drive
from benchmarks.server import Server, ServerError, free_port


class Talker(BaseHTTPRequestHandler):
    """Streams as many words as asked for; one less when the prompt begins with 13, an error with 14."""

    seen: list[dict[str, object]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.send_response(500 if body["prompt"][0] == 14 else 200)
        self.end_headers()
        count = body["max_tokens"] - (body["prompt"][0] == 13)
        for _ in range(count):
            self._event({"choices": [{"text": "word", "finish_reason": None}], "usage": None})
        self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def talker() -> Iterator[SimpleNamespace]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Talker)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(name="talker", model="m", port=server.server_port, seen=server.seen)
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_prompt_is_sent_once_and_every_token_counted(talker: SimpleNamespace) -> None:
    load = drive(talker, [[20 + i] for i in range(5)], concurrency=2, tokens=4)
    assert load.tokens == 20
    assert sorted(body["prompt"][0] for body in talker.seen) == [20, 21, 22, 23, 24]
    assert all(body["ignore_eos"] and body["stream"] for body in talker.seen)
    assert 0 < load.ttft_p50_ms <= load.ttft_p99_ms


@pytest.mark.parametrize(("first", "says"), [(13, "3 tokens came, 4 were asked for"), (14, "500")])
def test_a_short_answer_and_an_error_are_failures(talker: SimpleNamespace, first: int, says: str) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        drive(talker, [[first]], concurrency=1, tokens=4)
    assert says in str(caught.value.exceptions[0])


def test_percentiles_are_over_all_requests() -> None:
    answers = [
        Answered(sent=0.0, chunks=[0.1, 0.2, 0.3], tokens=3),
        Answered(sent=0.0, chunks=[0.3, 0.6], tokens=2),
    ]
    load = Load.of(answers, 2.0)
    assert load.tokens == 5
    assert load.ttft_p50_ms == pytest.approx(200)
    assert load.itl_p50_ms == pytest.approx(100)
    with pytest.raises(ValueError, match="two chunks"):
        Load.of([Answered(sent=0.0, chunks=[0.1], tokens=1)], 1.0)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        Server("gone", command, port=free_port(), log=tmp_path / "log") as server,
        pytest.raises(ServerError, match="no such model"),
    ):
        server.wait(patience_s=30)
