"""Instruction sets that this processor may lack, cross-compiled or emulated: the bits of portable code.

``tests/native`` is the kernels without Python and a program that runs all of them on each instruction set.
Where the processor has a fused multiply-add, every set gives the same bits, every machine the same digests.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles the kernels: half a minute on two cores, the first time

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "tests" / "native"
ARM_TOOLS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
REQUIRE_ARM64 = "GALLEY_REQUIRE_ARM64" in os.environ
EVERY_PATH = "GALLEY_ISA_PATHS" in os.environ
LIBM = ("draw", "join", "log_sum_exp", "attention", "finish", "model")
"""Results that pass through the C library's exp, log and cos, of which each architecture has its own."""


def built(name: str, *options: str) -> Path:
    """The program, built in ``build/`` of the checkout, where a second run finds it."""
    folder = ROOT / "build" / name
    # -O1 takes a third of the time of -O3, and may not change a bit: nothing here allows reordering
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -Werror", *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return folder / "paths"


def run(*command: str) -> list[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def arm64() -> Path:
    missing = [tool for tool in ARM_TOOLS if shutil.which(tool) is None]
    if missing and REQUIRE_ARM64:
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"arm64 is cross-compiled and emulated; not installed: {', '.join(missing)}")
    return built("paths-arm64", f"-DCMAKE_TOOLCHAIN_FILE={SOURCE / 'arm64.cmake'}")


@pytest.fixture(scope="module")
def x86() -> Path:
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64 machine")
    if not EVERY_PATH:
        pytest.skip("compiles every instruction set again (a minute): `make isa` runs it")
    return built("paths-x86")


@pytest.fixture(scope="module")
def arm64_lines(arm64: Path) -> list[str]:
    return run("qemu-aarch64-static", "-cpu", "max", str(arm64))


def digests(lines: list[str]) -> dict[str, str]:
    found = [re.fullmatch("([0-9a-f]{16}) (.+)", line) for line in lines]
    return {match[2]: match[1] for match in found if match}


def test_smp6_arm64_gives_the_portable_bits(arm64_lines: list[str]) -> None:
    assert len(digests(arm64_lines)) > 40
    assert f"neon-dotprod: {len(digests(arm64_lines))} results, 0 different" in arm64_lines


def test_arm64_without_dot_products_is_portable(arm64: Path) -> None:
    assert run("qemu-aarch64-static", "-cpu", "max", str(arm64), "--list") == ["neon-dotprod", "portable"]
    assert run("qemu-aarch64-static", "-cpu", "cortex-a53", str(arm64), "--list") == ["portable"]


def test_smp6_every_x86_path_gives_the_fused_bits(x86: Path) -> None:
    lines = run(str(x86))
    for isa in set(run(str(x86), "--list")) - {"portable"}:
        assert f"{isa}: {len(digests(lines))} results, 0 different" in lines


def test_smp6_avx_vnni_gives_the_fused_bits(x86: Path) -> None:
    lines = run(str(x86), "--emulate")
    assert lines[0].startswith("avx2-vnni: ") and lines[0].endswith(" results, 0 different")


def test_smp6_arm64_and_x86_agree(x86: Path, arm64_lines: list[str]) -> None:
    here, there = digests(run(str(x86))), digests(arm64_lines)
    assert here.keys() == there.keys()
    exact = [name for name in here if not name.startswith(LIBM)]
    assert len(exact) > 20
    assert [name for name in exact if here[name] != there[name]] == []
