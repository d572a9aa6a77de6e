"""Processor time and memory of a process and its children."""

import subprocess
import sys

import pytest
from benchmarks.process import Busier, ProcessTree

THREAD_THAT_ENDED = """
import sys, threading, time
def work():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("done", flush=True)
sys.stdin.read()
"""
CHILD = """
import subprocess, sys
code = "x = bytearray(50_000_000); print('up', flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", code],
    stdin=subprocess.PIPE, text=True)
sys.stdin.read()
child.communicate("\\n")
"""


def started(code: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_threads_that_ended_count() -> None:
    with started(THREAD_THAT_ENDED) as process:
        assert ProcessTree(process.pid, "x").cpu_seconds() >= 0.2


def test_children_count() -> None:
    with started(CHILD) as process:
        tree = ProcessTree(process.pid, "x")
        assert len(tree.members()) == 2
        assert tree.peak_rss_mb() > 50


def test_a_tree_that_spins_does_not_rest() -> None:
    spin = "print('up', flush=True)\nwhile True: pass"
    process = started(spin)
    try:
        with pytest.raises(Busier, match="busy"):
            ProcessTree(process.pid, "spinner").rest(patience_s=0.2)
    finally:
        process.kill()
        process.communicate()
