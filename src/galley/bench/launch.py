"""A server of our own for the time of a benchmark: ``galley serve`` in a process, its receipts set apart."""

import http.client
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import galley
from galley.errors import GalleyError

__all__ = ["Launched"]

START = (
    "import sys; sys.path.insert(0, {root!r})\n"
    "from galley.cli.main import main; main(sys.argv[1:])"
)  # fmt: skip


class Launched:
    """``with Launched(home, flags) as server``: ready when the block begins, stopped when it ends.

    Every setting comes from the flags, or is the default: the user's settings file is not read, and receipts
    and ledger go to a folder that is removed. Environment variables are inherited, but flags win over them.

    Args:
        flags: of ``galley serve``; host and port are added.
        key: API key, when the environment sets one: used for asking whether it is ready.

    Raises GalleyError, with the server's own last words, when it does not get ready.
    """

    def __init__(
        self, home: Path, flags: Sequence[str], *, key: str | None = None, patience_s: float = 300.0
    ) -> None:
        self.flags = list(flags)
        self.url = ""
        self._home = home
        self._key = key
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="galley-bench-")
        folder = Path(self._folder.name)
        self._log = folder / "stderr"
        settings = folder / "config.toml"
        apart = f"[receipts]\npath = {str(folder / 'receipts.db')!r}\n"
        apart += f"[ledger]\nurl = {'sqlite:///' + str(folder / 'ledger.db')!r}\n"
        settings.write_text(apart, encoding="utf-8")
        code = START.format(root=str(Path(galley.__file__).resolve().parents[1]))
        words = ["--home", str(self._home), "--config", str(settings), "serve"]
        serve = [*words, "--host", "127.0.0.1", "--port", "0", *self.flags]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code, *serve], stdout=subprocess.DEVNULL, stderr=log
                )
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    @property
    def notes(self) -> list[str]:
        """What it said so far, a line each."""
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()

    def cpu_seconds(self) -> float:
        """Processor time it used so far. Raises OSError where there is no ``/proc``."""
        assert self._process is not None
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total * 1e-9

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise GalleyError(
                    f"galley serve ended with {self._process.returncode}: {self._last()}", code="bench_server"
                )
            if not self.url:
                found = re.search(r"listening on (http://\S+);", "\n".join(self.notes))
                self.url = found[1] + "/v1" if found else ""
            if self.url and self._ready():
                return
            time.sleep(0.02)
        raise GalleyError(
            f"galley serve was not ready within {self._patience_s:.0f} s: {self._last()}", code="bench_server"
        )

    def _ready(self) -> bool:
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=5)
        try:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            connection.request("GET", "/ready", headers=headers)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _last(self) -> str:
        return " / ".join(self.notes[-3:]) or "it said nothing"
