"""hf: sources, by the real huggingface_hub client against a hub of our own on loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from galley.errors import InvalidRequest, ModelNotFound
from galley.model.staging import DigestMismatch, PullError
from galley.model.store import Store
from tests.unit.store.test_store import CONTENT, DIGEST, Told, killed

pytest.importorskip("huggingface_hub")

REVISION = "a" * 40


class Hub(ThreadingHTTPServer):
    """The three routes a download takes: model information, HEAD with the etag, GET with ranges."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.files = {"model.gguf": CONTENT, "README.md": b"# hello"}
        self.serve_instead: bytes | None = None
        self.failing = False
        self.ranges: list[str | None] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Routes(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _answer(self, *, body: bool) -> None:
        self.server.paths.append(self.path)
        if self.server.failing:
            return self._send(500, b"{}", {}, body=body)
        if re.match(r"/api/models/org/repo(/revision/[^/?]+)?(\?|$)", self.path):
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": "b" * 40}
                | ({"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}})
                for name, data in self.server.files.items()
            ]
            info = {"id": "org/repo", "sha": REVISION, "siblings": siblings, "cardData": {"license": "mit"}}
            headers = {"Content-Type": "application/json"}
            return self._send(200, json.dumps(info).encode(), headers, body=body)
        match = re.match(rf"/org/repo/resolve/{REVISION}/([^?]+)", self.path)
        if match is None or match[1] not in self.server.files:
            code = "RepoNotFound" if match is None else "EntryNotFound"
            return self._send(404, b"{}", {"X-Error-Code": code}, body=body)
        data = self.server.files[match[1]]
        promised = hashlib.sha256(data).hexdigest()
        data = self.server.serve_instead or data
        headers = {"ETag": f'"{promised}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if body:
            self.server.ranges.append(wanted)
        if wanted and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)):
            start, end = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], headers, body=body)
        return self._send(200, data, headers, body=body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(hub: Hub, tmp_path: Path) -> Store:
    return Store(tmp_path / "home", hf_endpoint=hub.url)


@pytest.mark.parametrize("what", ["hf:org/repo", "hf:org/repo/model.gguf", "hf:org/repo/model.gguf@main"])
def test_pull_records_revision_digest_and_licence(store: Store, what: str) -> None:
    told = Told()
    entry = store.pull(what, told, name="demo")
    assert entry.path.read_bytes() == CONTENT
    assert (entry.sha256, entry.revision, entry.license, entry.source) == (DIGEST, REVISION, "mit", what)
    assert (told.plans[0].download_bytes, told.plans[0].sha256) == (len(CONTENT), DIGEST)
    assert [title for title, _ in told.phases] == ["Downloading", "Verifying"]


def test_several_files_ask_for_one(hub: Hub, store: Store) -> None:
    hub.files["other.gguf"] = CONTENT
    with pytest.raises(InvalidRequest, match=r"2 GGUF files: model\.gguf, other\.gguf"):
        store.pull("hf:org/repo")
    with pytest.raises(ModelNotFound, match=r"Nearest: model\.gguf"):
        store.pull("hf:org/repo/modle.gguf")


def test_other_bytes_than_promised_are_refused(hub: Hub, store: Store, tmp_path: Path) -> None:
    hub.serve_instead = CONTENT[:-1] + b"!"
    with pytest.raises(DigestMismatch):
        store.pull("hf:org/repo", name="demo")
    assert store.list() == [] and not list(tmp_path.rglob("*.gguf"))


def test_missing_repository_and_failing_hub(hub: Hub, store: Store) -> None:
    with pytest.raises(ModelNotFound):
        store.pull("hf:org/other")
    hub.failing = True
    with pytest.raises(PullError) as caught:
        store.pull("hf:org/repo")
    assert caught.value.exit_code == 6


def test_kill_9_while_verifying_downloads_nothing_again(hub: Hub, store: Store, tmp_path: Path) -> None:
    killed(tmp_path / "home", "hf:org/repo", "Verifying", hub.url)
    assert store.list() == []
    fetched = len(hub.ranges)
    assert store.pull("hf:org/repo", name="demo").sha256 == DIGEST
    assert len(hub.ranges) == fetched


def test_kill_9_while_downloading_fetches_only_the_rest(hub: Hub, store: Store, tmp_path: Path) -> None:
    killed(tmp_path / "home", "hf:org/repo", "Downloading", hub.url)
    assert store.list() == []
    told = Told()
    assert store.pull("hf:org/repo", told, name="demo").path.read_bytes() == CONTENT
    first, second = hub.ranges
    assert first is None and second is not None
    assert int(second.removeprefix("bytes=").removesuffix("-")) > len(CONTENT) // 3
    assert [title for title, _ in told.phases] == ["Downloading", "Verifying"]


def test_partial_file_of_other_bytes_is_not_gone_on_with(hub: Hub, store: Store, tmp_path: Path) -> None:
    killed(tmp_path / "home", "hf:org/repo", "Downloading", hub.url)
    changed = hub.files["model.gguf"] = CONTENT[:-1] + b"!"
    assert store.pull("hf:org/repo", name="demo").path.read_bytes() == changed
    assert hub.ranges == [None, None]


def test_hub_is_asked_for_the_model_and_for_nothing_else(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from galley.model.store import Store;"
        "Store(Path(sys.argv[1]), hf_endpoint=sys.argv[2]).pull('hf:org/repo', name='demo')"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DISABLE_TEL"))}
    env = {**clean, "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "home"), hub.url], check=True, env=env)
    assert {path.partition("?")[0] for path in hub.paths} <= {
        "/api/models/org/repo",
        f"/org/repo/resolve/{REVISION}/model.gguf",
    }
