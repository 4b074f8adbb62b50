"""A disk that is full or read-only: it is said once, nothing half-written stays, and the server goes on."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import fill, small_disk

from serve import disk, pid_file
from serve.engine.warmstart import WarmStarts
from serve.state_file import keep

ROOMY = {"f_flag": 0, "f_bavail": 10**6, "f_frsize": 4096, "f_files": 10**6, "f_favail": 10**5}


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "64k", files=20) as folder:
        yield folder


@pytest.mark.parametrize(
    ("told", "trouble"),
    [
        ({}, ""),
        ({"f_bavail": 0}, "full"),
        ({"f_bavail": 2}, "full"),
        ({"f_favail": 0}, "full"),
        ({"f_files": 0, "f_favail": 0}, ""),  # btrfs, which counts none
        ({"f_flag": os.ST_RDONLY}, "read-only"),
    ],
)
def test_what_a_disk_says_of_itself(
    told: dict[str, int], trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(**ROOMY | told))
    assert disk.trouble(tmp_path) == trouble


def test_a_disk_is_complained_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").mkdir()
    watch = disk.Watch([tmp_path, tmp_path / "logs", tmp_path / "not there yet"])
    caplog.set_level(logging.WARNING)
    for free in (10**6, 0, 0, 0, 10**6, 10**6):
        monkeypatch.setattr(os, "statvfs", lambda folder, free=free: SimpleNamespace(**ROOMY | {"f_bavail": free}))
        watch.look()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"the disk of {tmp_path} is full")
    assert second == f"the disk of {tmp_path} can be written to again"


def test_what_cannot_be_kept_leaves_what_was(full: Path) -> None:
    keep(full / "known.json", {"a": 1})
    make_room = fill(full)
    keep(full / "known.json", {"a": "b" * 10_000})
    assert json.loads((full / "known.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in full.iterdir()) == ["filler", "known.json"]
    make_room()
    keep(full / "known.json", {"a": 2})
    assert json.loads((full / "known.json").read_text()) == {"a": 2}


def test_no_empty_process_id_stays(full: Path) -> None:
    fill(full)
    with pytest.raises(OSError, match="No space left"), pid_file.held(full / "serve.pid"):
        pytest.fail("it is not held")
    assert [path.name for path in full.iterdir()] == ["filler"]


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.anyio
async def test_workers_start_fast_without_a_log(full: Path, tmp_path: Path, files: bool) -> None:
    (tmp_path / "home").mkdir()
    fill(full, files)
    warm = WarmStarts(("json",))
    warm.start(tmp_path / "home", os.environ, full / "zygote.log")
    try:
        assert await warm.wait(60)
        assert warm.zygote_restarts == 0
    finally:
        await warm.stop()
