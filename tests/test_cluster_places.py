"""Which box of a machine has which place, folder and GPU."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from serve.cluster import places


def test_each_box_has_a_place_of_its_own_and_gets_a_free_one_again(tmp_path: Path) -> None:
    with ExitStack() as first, ExitStack() as second:
        assert first.enter_context(places.claimed(tmp_path)) == (0, tmp_path / "box-0")
        assert second.enter_context(places.claimed(tmp_path)) == (1, tmp_path / "box-1")
        (tmp_path / "box-0" / "footprints.json").write_text("{}")
        first.close()
        with places.claimed(tmp_path) as again:
            assert again.number == 0
            assert (again.state / "footprints.json").exists()


@pytest.mark.parametrize(
    ("named", "found"), [("", []), ("-1", []), ("2", ["2"]), ("0, GPU-abc", ["0", "GPU-abc"])]
)  # fmt: skip
def test_gpus_are_those_that_are_named(named: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert places.gpus() == found
    assert places.places_here() == (len(found) or max(1, places.cores.usable() // places.CORES))


def test_all_gpus_are_found_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(places.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(places.pynvml, "nvmlDeviceGetCount", lambda: 4)
    assert places.places_here() == 4
