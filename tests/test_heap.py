"""What a request computes with is asked of the kernel once, and given back however the request ends."""

import ctypes
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import ROOT

from handlers.worker import heap
from handlers.worker.heap import KEPT, Heap

ENDS = ["answered", "refused", "cancelled", "failed", "out of memory"]
BLOCK = 40 << 20
REQUESTS = """
import json, resource, sys
from types import SimpleNamespace
import numpy as np, torch
from handlers.requests.errors import BadRequest, Cancelled
from handlers.requests.reply import Reply
from handlers.worker.base import Handler
from residence import anonymous

ERRORS = {
    "refused": lambda: BadRequest("x"), "cancelled": Cancelled, "failed": ValueError, "out of memory": MemoryError,
}
BLOCK = int(sys.argv[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

class Worker(Handler):
    def load(self, folder):
        self.kept = []

    def predict(self, request):
        activations = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(4)]
        # As an embedding does: it lies above them on the heap.
        self.kept.append(torch.ones(1 << 20, dtype=torch.uint8))
        del activations
        before = faults()
        for _ in range(10):
            torch.ones(BLOCK, dtype=torch.uint8)
        self.faults = faults() - before
        activations = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(4)]
        if (end := request.fields["end"]) in ERRORS:
            raise ERRORS[end]()
        return Reply(np.ones((1, 1), bool))

worker = Worker()
worker.initialize(SimpleNamespace(system_properties={"model_dir": ".", "gpu_id": None}, model_yaml_config=None))
answers = SimpleNamespace(
    request_processor=[SimpleNamespace(get_request_properties=lambda: {})],
    set_response_status=lambda code, idx: None,
    set_response_header=lambda idx, key, value: None,
    set_response_content_type=lambda idx, value: None,
)
measured, before = {}, anonymous()
for end in sys.argv[2:]:
    worker.handle([{"end": end}], answers)
    measured[end] = {"faults": worker.faults, "kept": anonymous() - before}
print(json.dumps(measured))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """By how a request ended: page faults of 10 BLOCKs one after another; bytes left since before the first."""
    command = [sys.executable, "-c", REQUESTS, str(BLOCK), *ENDS]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return dict(json.loads(subprocess.check_output(command, env=environment, cwd=ROOT, timeout=250)))


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_requests_memory_is_used_again_and_given_back(measured: dict[str, dict[str, int]], end: str) -> None:
    # Of ten times a block's pages, were each mapped anew. Some are, where what was freed lies in pieces.
    assert measured[end]["faults"] <= 5 * BLOCK // 4096
    assert measured[end]["kept"] < KEPT + (24 << 20)  # what is made once, too; the last BLOCKs alone are 160 MiB


class FakeLibrary:
    """glibc, as far as Heap knows it."""

    def __init__(self) -> None:
        self.options: dict[int, int] = {}
        self.trimmed = 0

    def mallopt(self, name: int, value: int) -> None:
        self.options[name] = value

    def malloc_trim(self, pad: int) -> None:
        self.trimmed += 1


def test_requests_that_leave_little_cost_no_trimming(monkeypatch: pytest.MonkeyPatch) -> None:
    library, taken = FakeLibrary(), [KEPT]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(heap, "_anonymous", lambda: taken[-1])
    kept = Heap()
    for taken_next, trimmed in [(2 * KEPT, 0), (2 * KEPT + 1, 1), (3 * KEPT, 1), (3 * KEPT + 2, 2), (KEPT, 2)]:
        taken.append(taken_next)
        kept.trim_if_grown()
        assert library.trimmed == trimmed
    kept.trim()
    assert library.trimmed == 3


def test_the_heap_is_measured_without_what_files_hold() -> None:
    before = heap._anonymous()
    block = np.ones(32 << 20, np.uint8)
    assert abs(heap._anonymous() - before - block.nbytes) < 8 << 20


@pytest.mark.parametrize("known", [[], ["mallopt"], ["malloc_trim"]])
def test_a_c_library_without_these_calls_is_left_alone(monkeypatch: pytest.MonkeyPatch, known: list[str]) -> None:
    def never(*_: Any) -> None:
        pytest.fail("half of it was done")

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**dict.fromkeys(known, never)))
    monkeypatch.setattr(heap, "_anonymous", never)  # nor is there a /proc everywhere
    kept = Heap()
    kept.trim_if_grown()
    kept.trim()
