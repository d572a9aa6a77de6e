"""A real PostgreSQL, started by the tests from the binaries of this machine; gone when they end."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

__all__ = ["missing", "postgres"]


def binaries() -> Path | None:
    """The newest installed version's; None where there is none."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3].split(".")[0])
    )
    if found:
        return found[-1].parent
    there = shutil.which("initdb")
    return Path(there).parent if there else None


def missing() -> str | None:
    """Why there can be none here."""
    if binaries() is None:
        return "no PostgreSQL binaries are installed (apt install postgresql)"
    if os.geteuid() == 0 and other_user() is None:
        return "PostgreSQL refuses to run as root, and there is no other user to run it as"
    return None


def other_user() -> pwd.struct_passwd | None:
    """Whom to run it as, being root: PostgreSQL refuses root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a server on a socket of its own, with no durability: it does not outlive the tests."""
    bin_ = binaries()
    assert bin_ is not None
    folder = Path(tempfile.mkdtemp(prefix="galley-pg-", dir="/tmp"))  # sockets have short names
    as_user: dict[str, object] = {"cwd": folder}
    if os.geteuid() == 0:
        user = other_user()
        assert user is not None
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = folder / "data"
    server = None
    try:
        subprocess.run(
            [bin_ / "initdb", "-D", data, "-U", "galley", "-A", "trust", "-N", "-E", "UTF8", "--no-locale"],
            check=True,
            capture_output=True,
            **as_user,
        )
        options = {
            "listen_addresses": "",
            "unix_socket_directories": folder,
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "max_connections": 40,
            "shared_buffers": "16MB",
            "deadlock_timeout": "50ms",
            "log_min_messages": "panic",
        }
        words = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        server = subprocess.Popen(
            [bin_ / "postgres", "-D", data, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **as_user,
        )
        wait_for(folder, server)
        yield f"postgresql://galley@/postgres?host={folder}"
    finally:
        if server is not None:
            server.terminate()
            server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(folder: Path, server: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    for _ in range(600):
        assert server.poll() is None, "PostgreSQL did not start"
        try:
            psycopg.connect(host=str(folder), user="galley", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("PostgreSQL did not answer within a minute")
