"""How many cores a process may use: every kind of control group, by the files that the kernel would show."""

import os
from pathlib import Path

import pytest

from serve.engine import cores

QUOTAS = {None: 8, "max": 8, 50_000: 1, 100_000: 1, 150_000: 2, 400_000: 4, 1_000_000: 8}
"""Microseconds of each 100,000 -> of eight cores, how many are usable."""
LAYOUTS = ["v2", "v1", "v1 among others", "hybrid"]
PLACES = {
    "on the host": ("/", "/user/serve", "user/serve"),
    "in a container that sees itself as the root": ("/", "/", ""),
    "in a container under the host's path": ("/docker/abc", "/docker/abc", ""),
    "in a group of a container's": ("/docker/abc", "/docker/abc/job", "job"),
    "outside of what is mounted": ("/docker/abc", "/other", ""),
    "seen from another namespace": ("/", "/../other", ""),
}
"""What is mounted, the group that the process is in, the folder below the mount."""


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def limit(folder: Path, layout: str, quota: int | str | None) -> None:
    """None: the kernel shows no such file."""
    if quota is None:
        return
    if layout == "v2":
        write(folder / "cpu.max", f"{quota} 100000\n")
    else:
        write(folder / "cpu.cfs_quota_us", f"{-1 if quota == 'max' else quota}\n")
        write(folder / "cpu.cfs_period_us", "100000\n")


def machine(root: Path, layout: str, top: str, group: str) -> Path:
    """The files of /proc; returns where the controller is mounted."""
    mount, controllers = {
        "v2": ("/sys/fs/cgroup", ""),
        "v1": ("/sys/fs/cgroup/cpu", "cpu"),
        "v1 among others": ("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"),
        "hybrid": ("/sys/fs/cgroup/cpu", "cpu"),
    }[layout]
    kind = "cgroup2 cgroup rw" if layout == "v2" else f"cgroup cgroup rw,{controllers}"
    mounts = [
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
        "34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset",
        f"32 31 0:29 {top} {mount} rw,relatime shared:9 master:1 - {kind}",
    ]
    groups = ["4:memory:/elsewhere", "3:cpuset:/", f"{0 if layout == 'v2' else 2}:{controllers}:{group}"]
    if layout == "hybrid":
        mounts.append("41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw")
        groups.append("0::/")
    write(root / "proc/self/cgroup", "\n".join(groups) + "\n")
    write(root / "proc/self/mountinfo", "\n".join(mounts) + "\n")
    return root / mount[1:]


@pytest.mark.slow
@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quota_counts_wherever_the_group_is_mounted(
    tmp_path: Path, layout: str, place: str, quota: int | str | None
) -> None:
    top, group, inside = PLACES[place]
    limit(machine(tmp_path, layout, top, group) / inside, layout, quota)
    assert cores.usable(tmp_path) == QUOTAS[quota]


@pytest.mark.slow
@pytest.mark.parametrize("own", QUOTAS)
@pytest.mark.parametrize("parent", QUOTAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tightest_of_a_group_and_its_parents_counts(
    tmp_path: Path, layout: str, parent: int | str | None, own: int | str | None
) -> None:
    mount = machine(tmp_path, layout, "/", "/a/b/c")
    limit(mount / "a", layout, parent)
    limit(mount / "a/b/c", layout, own)
    assert cores.usable(tmp_path) == min(QUOTAS[parent], QUOTAS[own])


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("allowed", [{0}, {0, 1}, {5, 7}, {0, 1, 2}, set(range(8))])
def test_a_quota_and_the_allowed_cores_both_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], quota: int | str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    limit(machine(tmp_path, "v2", "/", "/"), "v2", quota)
    assert cores.usable(tmp_path) == min(len(allowed), QUOTAS[quota])


@pytest.mark.parametrize(
    ("allowed", "usable"), [({0}, 1), ({0, 4}, 1), ({0, 1}, 2), ({1, 4, 5}, 2), (set(range(8)), 4)]
)
def test_two_threads_of_a_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], usable: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    for cpu in range(8):
        siblings = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        write(siblings, f"{cpu % 4},{cpu % 4 + 4}\n")
    assert cores.usable(tmp_path) == usable


@pytest.mark.parametrize("content", ["", "max", "0 100000", "100000 0", "-1 100000", "x y", "1 2 3", "\n"])
@pytest.mark.parametrize("layout", ["v2", "v1"])
def test_what_is_no_quota_limits_nothing(tmp_path: Path, layout: str, content: str) -> None:
    mount = machine(tmp_path, layout, "/", "/")
    for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        write(mount / name, content)
    assert cores.usable(tmp_path) == 8


def test_this_machine_has_a_core() -> None:
    assert 1 <= cores.usable() <= 8
