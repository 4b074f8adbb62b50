"""The plain loads that bench/coldstart.py compares with: their archives answer as ours do."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HandlerClient

from bench.stores import build_stock
from handlers.sd import network

ASKED: dict[str, dict[str, Any]] = {
    "sam": {"gen_args": {"point_coords": [750, 500]}},
    "lama": {},
    "sd": {"prompt": "a red box", "gen_args": {"num_inference_steps": 2, "seed": 3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "lama", "sd"])
def test_a_stock_archive_answers_as_ours(
    name: str, demo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dog: bytes, dog_mask: bytes
) -> None:
    ours = demo_store / "demo" / name
    build_stock(ours.parent, tmp_path, [name])
    monkeypatch.setattr(network, "load", network.load)  # which the stock load of sd replaces
    monkeypatch.syspath_prepend(str(tmp_path / name))
    monkeypatch.delitem(sys.modules, "stock", raising=False)
    stock = runpy.run_path(str(tmp_path / name / "handler.py"))["Stock"]
    fields = {"image": dog, **({"mask_image": dog_mask} if name != "sam" else {}), **ASKED[name]}
    pictures = []
    for client in (HandlerClient(name, ours), HandlerClient(name, tmp_path / name, stock)):
        reply = client.json(**fields)
        assert reply.status == 200, reply.body
        pictures.append(reply.picture.astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= (0 if name == "sam" else 2)
