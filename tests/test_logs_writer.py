"""Where lines go: bounded on disk, never in anybody's way; and what TorchServe and its workers print."""

import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from logged import lines, logged, text
from serving import fill, small_disk

from contract.marking import mark, marked
from handlers.worker import marking
from serve.engine import warmstart
from serve.logs import record, writer
from serve.logs.engine import EngineLines
from serve.logs.lines import CUT, LONGEST
from serve.logs.record import Record
from serve.logs.sinks import RotatedFile, Stream
from serve.logs.writer import Writer

log = logging.getLogger("serve.test")


def sizes(folder: Path) -> list[int]:
    return [file.stat().st_size for file in sorted(folder.iterdir())]


def test_a_flood_does_not_grow_past_the_bound_and_the_newest_lines_stay(tmp_path: Path) -> None:
    file = RotatedFile(tmp_path / "a.log", size=1000, count=3)
    for number in range(1000):
        assert file.write([b"%04d %s\n" % (number, b"x" * 44)]) == 0
    file.close()
    assert len(sizes(tmp_path)) == 3
    assert max(sizes(tmp_path)) <= 1000
    kept = (tmp_path / "a.log.2").read_text() + (tmp_path / "a.log.1").read_text() + (tmp_path / "a.log").read_text()
    assert [int(line[:4]) for line in kept.splitlines()] == list(range(1000 - len(kept.splitlines()), 1000))


def test_a_servers_flood_is_bounded_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is in the folder of logs: lines of ours, and what TorchServe says."""
    monkeypatch.setattr(writer, "RotatedFile", lambda path: RotatedFile(path, size=20_000, count=3))
    with logged(tmp_path) as running:
        for number in range(3000):
            log.warning("%d %s", number, "y" * 100)
            running.engine_said(b"2026-11-28T22:19:30,945 [WARN ] main org.X - " + b"z" * 100 + b"\n")
    assert 20_000 < sum(sizes(tmp_path / "logs")) <= 60_000


def test_a_log_of_another_start_goes_on_and_counts(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"x" * 990)
    file = RotatedFile(tmp_path / "a.log", size=1000, count=2)
    file.write([b"12345678901\n"])
    file.write([b"1\n"])
    file.close()
    assert sizes(tmp_path) == [14, 990]


def test_a_log_that_was_moved_away_begins_anew(tmp_path: Path) -> None:
    file = RotatedFile(tmp_path / "logs" / "a.log")
    file.write([b"1\n"])
    (tmp_path / "logs" / "a.log").rename(tmp_path / "old")
    file.write([b"2\n"])
    (tmp_path / "logs" / "a.log").unlink()
    (tmp_path / "logs").rmdir()
    file.write([b"3\n"])
    file.close()
    assert ((tmp_path / "old").read_text(), (tmp_path / "logs" / "a.log").read_text()) == ("1\n", "3\n")


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    file = RotatedFile(tmp_path / "a.log")
    file.write([b"1\n"])
    file.close()
    assert (tmp_path / "a.log").stat().st_mode & 0o077 == 0


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        file = RotatedFile(disk / "a.log")
        file.write([b"1\n"])
        make_room = fill(disk)
        assert file.write([b"x" * 8192 + b"\n", b"y\n"]) > 0
        make_room()
        assert file.write([b"2\n"]) == 0
        file.close()
        assert (disk / "a.log").read_bytes().endswith(b"2\n")


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def test_a_stream_that_nobody_reads_is_not_waited_for_twice(tmp_path: Path) -> None:
    with pipe() as (reading, writing):
        stream = Stream(writing, patience=0.01)
        line = b"x" * 999 + b"\n"
        assert stream.write([line] * 1000) > 800
        assert stream.write([line]) == 1
        while len(os.read(reading, 65536)) == 65536:
            continue
        assert stream.write([b"again\n"]) == 0
        assert os.read(reading, 65536).endswith(b"again\n")


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert Stream(writing).write([b"1\n", b"2\n"]) == 2
    os.close(writing)


class Stuck:
    """Takes nothing until it is let go."""

    def __init__(self) -> None:
        self.free, self.taken = threading.Event(), list[bytes]()

    def write(self, written: list[bytes]) -> int:
        self.free.wait(30)
        self.taken += written
        return 0

    def close(self) -> None:
        pass


def test_whoever_logs_never_waits_and_hears_how_much_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MOST", 100)
    sink = Stuck()
    running = Writer([sink], "json")
    entry = logging.LogRecord("serve.x", logging.ERROR, "", 0, "full", None, None)
    for _ in range(1000):
        running.handle(entry)
    sink.free.set()
    running.end()
    told = b"".join(sink.taken).decode()
    assert 100 <= told.count('"full"') <= 300
    assert told.count('"full"') + running.lost == 1000
    assert f"{running.lost} lines were lost" in told


def test_what_cannot_be_said_is_no_fault_of_who_says_it(tmp_path: Path) -> None:
    with logged(tmp_path) as running:
        running.handle(logging.LogRecord("serve.x", logging.ERROR, "", 0, "%d", ("not a number",), None))
    assert [line["text"] for line in lines(tmp_path)] == ["a line that cannot be written"]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    with logged(tmp_path):
        log.warning("x" * 10 * LONGEST)
    [line] = lines(tmp_path)
    assert len(line["text"]) == LONGEST + len(CUT)


def test_a_fault_in_the_background_shows_no_text_of_its_own(tmp_path: Path) -> None:
    """asyncio's message has the exception's repr, and the arguments of what was called."""
    with logged(tmp_path, "console"):
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task ValueError('SECRET')>")
        try:
            try:
                raise KeyError("SECRET")
            except KeyError as error:
                raise ValueError("SECRET") from error
        except ValueError:
            log.exception("it failed")
    written = text(tmp_path)
    assert "SECRET" not in written
    assert "Task exception was never retrieved" in written
    assert [line.strip() for line in written.splitlines() if line.strip() in ("KeyError", "ValueError")] == [
        "KeyError", "ValueError"
    ]  # fmt: skip


def test_lines_of_a_request_say_so_and_others_do_not(tmp_path: Path) -> None:
    with logged(tmp_path, "console"):
        log.info("before")
        thread = threading.Thread(target=lambda: (record.begin(Record("abc", "GET")), log.info("inside")))
        thread.start()
        thread.join()
    before, inside = text(tmp_path).splitlines()
    assert before.endswith("serve.test before")
    assert inside.endswith("serve.test inside request=abc")


# TorchServe and its workers

JAVA = "2026-11-28T22:19:30,945 [{}] {} {} - {}\n".format
WORKER = "W-9000-p.demo--sam.def3b1daa443_1.0-stdout"
PRINTED = (
    JAVA("INFO ", "main", "org.pytorch.serve.ModelServer", "Inference API bind to: http://127.0.0.1:8085")
    + JAVA("INFO ", WORKER, "MODEL_LOG", "Backend received inference at: 1795904371")
    + JAVA("INFO ", WORKER, "MODEL_LOG", "[request a-1] RuntimeError in predict")
    + JAVA("WARN ", WORKER.replace("stdout", "stderr"), "MODEL_LOG", "a library's warning: é")
    + JAVA("ERROR", "W-9000-p.demo--sam_1.0", "org.pytorch.serve.wlm.WorkerThread", "Backend worker error")
    + "java.lang.IllegalStateException: x\n\tat org.pytorch.serve.X\n"
    + JAVA("INFO ", "main", "org.pytorch.serve.ModelServer", "fine")
    + "\tat nowhere\n"
)
TOLD = [
    ("info", "worker", "RuntimeError in predict", {"model": "demo/sam", "request": "a-1"}),
    ("warning", "worker", "a library's warning: é", {"model": "demo/sam"}),
    ("error", "torchserve", "WorkerThread: Backend worker error", {}),
    ("error", "torchserve", "java.lang.IllegalStateException: x", {}),
    ("error", "torchserve", "\tat org.pytorch.serve.X", {}),
]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_what_torchserve_prints_becomes_lines_wherever_its_blocks_are_cut(size: int) -> None:
    printed = PRINTED.encode()
    told = EngineLines().lines([printed[at : at + size] for at in range(0, len(printed), size)])
    assert [(line.level, line.source, line.text, line.fields) for line in told] == TOLD


def test_a_line_of_torchserves_without_an_end_is_bounded() -> None:
    engine = EngineLines()
    assert not list(engine.lines([b"x" * 65536] * 100))
    assert len(engine._rest) <= 4 * LONGEST
    [line] = engine.lines([b"\n" + JAVA("WARN ", "main", "a.B", "y" * 100_000).encode()])
    assert len(line.text) < LONGEST


def test_each_line_of_a_text_is_marked() -> None:
    assert mark("a\nb", "x:1") == "[request x:1] a\n[request x:1] b"
    assert mark("a\nb", "") == "a\nb"
    assert [marked(line) for line in ("[request x:1] a", "[request x 1] a", "[request] a", "a [request x] b")] == [
        ("x:1", "a"), ("", "[request x 1] a"), ("", "[request] a"), ("", "a [request x] b")
    ]  # fmt: skip


def test_a_worker_marks_what_it_logs_during_a_request() -> None:
    root, stream = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = [(each, each.formatter) for each in root.handlers]
    levels = {name: logging.getLogger(name).level for name in marking.QUOTING}
    root.addHandler(handler)
    try:
        marking.install()
        marking.install()
        with marking.of_request("a1"):
            logging.getLogger("handlers.x").error("RuntimeError in predict\n  frame")
        with pytest.raises(KeyError), marking.of_request("a2"):
            raise KeyError
        logging.getLogger("handlers.x").error("after")
        assert not logging.getLogger("diffusers.pipelines.any").isEnabledFor(logging.WARNING)
    finally:
        root.removeHandler(handler)
        for each, formatter in before:
            each.setFormatter(formatter)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert stream.getvalue() == "[request a1] RuntimeError in predict\n[request a1]   frame\nafter\n"


def test_the_zygotes_log_begins_anew_where_it_is_large(tmp_path: Path) -> None:
    file = tmp_path / "zygote.log"
    for size in (10, warmstart.LOG_BYTES + 1):
        file.write_bytes(b"x" * size)
        with warmstart._opened(file) as opened:
            opened.write(b"new")
        assert file.stat().st_size == (size + 3 if size == 10 else 3)
