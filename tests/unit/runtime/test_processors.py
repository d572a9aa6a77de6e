"""Threads from affinity, siblings and quota, on machines made of files."""

from pathlib import Path

import pytest

from galley.runtime.processors import Busy, Processors


def machine(root: Path, *, groups: str = "", cgroup: str = "", files: dict[str, str] | None = None) -> Path:
    """A root folder. ``groups``: siblings as ``0-1 2-3``."""
    for group in groups.split():
        first, _, last = group.partition("-")
        for number in range(int(first), int(last or first) + 1):
            folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(group + "\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Test 9000\n")
    for name, text in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_one_thread_a_physical_core(tmp_path: Path) -> None:
    found = Processors.read(machine(tmp_path, groups="0-1 2-3"), usable=(0, 1, 2, 3))
    assert found.name == "Test 9000"
    assert found.physical == ((0, 1), (2, 3))
    chosen = found.threads()
    assert chosen.count == 2 and "physical" in chosen.why and chosen.warnings == ()


def test_the_mask_decides_which_siblings_count(tmp_path: Path) -> None:
    found = Processors.read(machine(tmp_path, groups="0-1 2-3"), usable=(1, 2, 3))
    assert found.physical == ((1,), (2, 3)) and found.threads().count == 2


def test_without_topology_every_processor_is_a_core(tmp_path: Path) -> None:
    found = Processors.read(machine(tmp_path), usable=(0, 5))
    assert found.threads().count == 2 and found.quota is None


V2 = "0::/pod/inner\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "quota", "count"),
    [
        (V2, {"sys/fs/cgroup/pod/inner/cpu.max": "max 100000"}, None, 4),
        (V2, {"sys/fs/cgroup/pod/inner/cpu.max": "250000 100000"}, 2.5, 2),
        (V2, {"sys/fs/cgroup/pod/cpu.max": "50000 100000"}, 0.5, 1),
        (
            V2,
            {"sys/fs/cgroup/pod/inner/cpu.max": "300000 100000", "sys/fs/cgroup/cpu.max": "200000 100000"},
            2.0,
            2,
        ),
        (V2, {"sys/fs/cgroup/pod/inner/cpu.max": "not a number"}, None, 4),
        (
            "3:cpu,cpuacct:/job\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            3.0,
            3,
        ),
        (
            "1:cpu:/\n0::/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            None,
            4,
        ),
        ("1:cpuset:/x\n", {"sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us": "1"}, None, 4),
    ],
)
def test_quota_of_any_control_group_above_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], quota: float | None, count: int
) -> None:
    found = Processors.read(machine(tmp_path, cgroup=cgroup, files=files), usable=(0, 1, 2, 3))
    assert found.quota == quota
    chosen = found.threads()
    assert chosen.count == count
    assert ("quota" in chosen.why) == (count < 4)


def test_a_quota_below_one_is_warned_of(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "50000 100000"}
    found = Processors.read(machine(tmp_path, cgroup="0::/\n", files=files), usable=(0, 1))
    assert found.threads().count == 1 and "0.5" in found.threads().warnings[0]


def test_what_is_asked_for_is_obeyed_and_judged(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "300000 100000"}
    root = machine(tmp_path, groups="0-1 2-3", cgroup="0::/\n", files=files)
    found = Processors.read(root, usable=(0, 1, 2, 3))
    assert found.threads(1, "flag:--threads").why == "asked for by flag:--threads"
    assert found.threads(2).warnings == ()
    (shared,) = found.threads(3).warnings
    assert "vector units" in shared
    over, stopped = found.threads(8).warnings
    assert "8 threads on 4 usable" in over and "quota of 3" in stopped


def test_this_machine() -> None:
    found = Processors.read()
    assert 1 <= len(found.physical) <= len(found.usable) <= found.cores and found.threads().count >= 1


def test_busy_reads_ticks(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 0 50 900 3 0 10 40 0 0\ncpu0 …\n")
    found = Busy.now(tmp_path)
    assert found.used == pytest.approx(4 * found.stolen) and found.stolen > 0
    assert Busy(used=3.0, stolen=1.0) - Busy(used=1.0, stolen=0.5) == 2.5


def test_the_native_backend_uses_the_same_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("galley._native")
    from galley.model.families import spec_from_gguf
    from galley.model.gguf import GGUF
    from galley.runtime.backend.native import NativeBackend
    from tests.tiny import tiny_gguf

    monkeypatch.setattr(Processors, "threads", machine_says_three)
    with GGUF.open(tiny_gguf(tmp_path / "t.gguf")) as gguf:
        backend = NativeBackend(gguf, spec_from_gguf(gguf), threads=None, num_blocks=2)
        assert backend.threads == 3
        backend.close()


def machine_says_three(processors: Processors):  # type: ignore[no-untyped-def]
    from galley.runtime.processors import Threads

    return Threads(count=3, why="a test")
