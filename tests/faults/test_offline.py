"""With all but loopback blocked, ``local-only`` serves what it may and refuses the rest with a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
"""A network namespace of its own, with loopback alone: the kernel blocks what the hook might miss."""
LOOPBACK_UP = (
    "import fcntl, socket, struct, sys, runpy\n"
    "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 0x41))\n"  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING
    "runpy.run_module('tests.faults.offline', run_name='__main__')\n"
)


def run(tmp_path, location, *, namespace):
    lead = [sys.executable, "-m", "tests.faults.offline"]
    if namespace:
        lead = [*NAMESPACE, sys.executable, "-c", LOOPBACK_UP]
    paths = os.pathsep.join([str(HERE), str(HERE / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*lead, str(tmp_path), location],
        cwd=HERE, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout.decode().splitlines()[-1])


def namespaces_allowed():
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("namespace", [False, True], ids=["hook", "namespace"])
def test_local_only_serves_all_it_may_and_reaches_nobody(tmp_path, namespace):
    if namespace and not namespaces_allowed():
        pytest.skip("this system gives no network namespace to its users")
    told = run(tmp_path, "local-only", namespace=namespace)
    assert told["left"] == [], "nobody outside was looked up or connected to"
    answers = told["answers"]
    for name in ("chat", "stream", "text", "ids", "logprobs", "fallback", "route", "messages"):
        assert answers[name]["status"] == 200, (name, answers[name])
    assert answers["stream"]["body"].endswith("data: [DONE]\n\n")
    for name in ("fallback", "route"):
        assert json.loads(answers[name]["body"])["model"] == "tiny"
    for name in ("far", "named", "away", "tools"):
        assert answers[name]["status"] == 403, (name, answers[name])
        assert "policy is local-only" in answers[name]["body"], "and the reason is given"
    assert "it lacks tools" in answers["tools"]["body"]


def test_the_guard_would_have_seen_it(tmp_path):
    """The same with a policy that lets requests out: they are tried, noted and blocked."""
    told = run(tmp_path, "any", namespace=False)
    assert ["socket.connect", "192.0.2.1"] in told["left"]
    assert ["socket.getaddrinfo", "api.invalid"] in told["left"]
    assert told["answers"]["chat"]["status"] == 200 and told["answers"]["far"]["status"] in (502, 503)
