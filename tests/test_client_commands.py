"""`palimpsest segment|erase|replace`: what they read and write, what they leave alone, and what they say."""

import base64
import io
import json
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from conftest import encoded
from connecting import events
from palimpsest import AsyncClient
from palimpsest.cli import app, batch
from palimpsest.cli.plan import Unusable, plan
from PIL import Image
from test_client import FakeServer
from typer.testing import CliRunner, Result

AT = ["--at", "3,4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in folders, and what is none; the working directory."""
    for name in ("a.png", "b.jpg", "c.HEIC", "in/a.png", "in/d.tiff", ".hidden/e.png", "notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(name: str) -> bytes:
    kind = {".jpg": "JPEG", ".tiff": "TIFF"}.get(Path(name).suffix, "PNG")
    return encoded(np.full((9, 9, 3), len(name), np.uint8), kind)


def result_of(data: bytes) -> bytes:
    """What the fake server makes of a picture: its negative, in its own format."""
    image = Image.open(io.BytesIO(data))
    return encoded(255 - np.asarray(image), image.format or "")


class Painter(FakeServer):
    """Gives negatives. fails: of pictures' bytes, the error that they get."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: dict[bytes, httpx.Response] = {}
        self.parts: list[dict[str, bytes]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.calls.append(request)
        if not request.url.path.startswith(("/v1/erase", "/v1/replace", "/v1/segment")):
            return httpx.Response(200, content=result_of(picture("any.png")))
        said = self.said()
        self.parts.append(said)
        if said["image"] in self.fails:
            return self.fails[said["image"]]
        made = base64.b64encode(result_of(said["image"])).decode()
        count = int(said.get("variants", b"1"))
        fields = {"warnings": [], "timings": {}, "score": 0.9, "area": 5, "box": [0, 0, 9, 9], "mask": made, "seed": 3}
        more = {"pictures": [made] * count, "seeds": [3, 4, 5][:count]} if count > 1 else {}
        kept = {"id": "img_1"} if "keep" in said else {}
        return events(("job", {"job": "j"}), ("done", fields | {"picture": made} | more | kept))


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    server = Painter()
    monkeypatch.setattr(batch, "AsyncClient", partial(AsyncClient, transport=httpx.MockTransport(server)))
    return server


Run = Callable[..., Result]


@pytest.fixture
def run(folder: Path, painter: Painter) -> Run:
    return lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused() -> httpx.Response:
    told = {"code": "bad_request", "message": "points: nothing was found there", "field": "points"}
    return httpx.Response(400, json={"error": told})


# What becomes what


def planned(*inputs: str, verb: str = "erase", out: str = "out", mask: str | None = None, **more: Any) -> list[str]:
    tasks = plan(verb, list(inputs), Path(out), mask and Path(mask), more.get("variants", 1), more.get("force", False))
    return [f"{task.source.as_posix()} -> {','.join(each.as_posix() for each in task.outputs)}" for task in tasks]


@pytest.mark.usefixtures("folder")
def test_a_folders_pictures_keep_their_names_places_and_formats() -> None:
    assert planned("photos") == [
        "photos/a.png -> out/a.png",
        "photos/b.jpg -> out/b.jpg",
        "photos/c.HEIC -> out/c.png",
        "photos/in/a.png -> out/in/a.png",
        "photos/in/d.tiff -> out/in/d.tiff",
    ]
    assert [line.partition(" -> ")[2] for line in planned("photos", verb="segment")] == [
        "out/a.png", "out/b.png", "out/c.png", "out/in/a.png", "out/in/d.png",
    ]  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_patterns_and_files() -> None:
    assert planned("photos/*.png", "photos/b.jpg") == ["photos/a.png -> out/a.png", "photos/b.jpg -> out/b.jpg"]
    assert planned("photos/**/*.png") == ["photos/a.png -> out/a.png", "photos/in/a.png -> out/in/a.png"]
    assert planned("photos/a.png", "photos/a.png") == ["photos/a.png -> out/a.png"]
    assert planned("photos/a.png", out="one.webp") == ["photos/a.png -> one.webp"]
    assert planned("photos/a.png", variants=2) == ["photos/a.png -> out/a-1.png,out/a-2.png"]


def test_results_and_masks_among_the_pictures_are_none(folder: Path) -> None:
    for name in ("photos/out/a.png", "photos/masks/a.png"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(picture(name))
    inside = planned("photos", out="photos/out", mask="photos/masks", force=True)
    assert len(inside) == 5
    assert inside[0] == "photos/a.png -> photos/out/a.png"
    assert len(planned("photos", out="photos", mask="photos/masks", force=True)) == 6  # what is in out, too


@pytest.mark.usefixtures("folder")
def test_names_that_differ_in_case_are_one_file_where_the_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("photos/A.jpg").write_bytes(picture("A.jpg"))
    assert len(planned("photos/a.png", "photos/A.jpg", verb="segment")) == 2
    monkeypatch.setattr("palimpsest.cli.plan._FOLDS_CASE", True)
    with pytest.raises(Unusable, match="would both become"):
        planned("photos/a.png", "photos/A.jpg", verb="segment")


@pytest.mark.parametrize(
    ("inputs", "more", "words"),
    [
        (["nowhere"], {}, "no such file"),
        (["photos/*.bmp"], {}, "no pictures"),
        (["photos/notes"], {}, "no such file"),
        (["photos/a.png", "photos/in/a.png"], {}, "would both become out/a.png"),
        (["photos"], {"out": "photos"}, "overwrite the picture itself"),
        (["photos/a.png"], {"out": "photos/a.png"}, "overwrite the picture itself"),
        (["photos"], {"mask": "none.png"}, "no such mask"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_can_not_be_done_is_said_before_anything_is(inputs: list[str], more: dict[str, Any], words: str) -> None:
    with pytest.raises(Unusable, match=words):
        planned(*inputs, **more)


# What is done


def test_a_folder_is_erased_picture_by_picture(run: Run, folder: Path, painter: Painter) -> None:
    result = run("erase", "photos", *AT, "--not", "1,2", "--dilate", 4, "--fill-holes")
    assert result.exit_code == 0, result.output
    assert files(folder / "erased") == ["a.png", "b.jpg", "c.png", "in/a.png", "in/d.tiff"]
    for name in ("a.png", "b.jpg", "in/d.tiff"):
        assert (folder / "erased" / name).read_bytes() == result_of((folder / "photos" / name).read_bytes())
    assert "5 done" in result.stderr
    assert all(
        said.keys() - {"keep", "result"} == {"image", "points", "dilate", "fill_holes"} for said in painter.parts
    )
    assert json.loads(painter.parts[0]["points"]) == [[3, 4], [1, 2, 0]]


def test_masks_are_pngs_and_one_command_takes_what_another_made(run: Run, folder: Path, painter: Painter) -> None:
    assert run("segment", "photos", "--box", "1,2,3,4").exit_code == 0
    assert files(folder / "masks") == ["a.png", "b.png", "c.png", "in/a.png", "in/d.png"]
    painter.parts.clear()
    assert run("replace", "photos", "--mask", "masks", "--prompt", "a cat").exit_code == 0
    sent = {said["mask"] for said in painter.parts}
    assert sent == {path.read_bytes() for path in (folder / "masks").rglob("*.png")}
    assert {said["prompt"] for said in painter.parts} == {b"a cat"}


def test_variants_are_numbered(run: Run, folder: Path) -> None:
    assert run("replace", "photos/a.png", "-o", "x.png", *AT, "--prompt", "p", "--variants", 3).exit_code == 0
    assert sorted(path.name for path in folder.glob("x*")) == ["x-1.png", "x-2.png", "x-3.png"]


def test_another_suffix_is_another_format(run: Run, folder: Path, painter: Painter) -> None:
    assert run("erase", "photos/b.jpg", "-o", "x.webp", *AT).exit_code == 0
    assert painter.asked()[-1] == "GET /v1/images/img_1"
    assert painter.calls[-1].url.params["format"] == "webp"
    assert painter.parts[0]["keep"] == b"true"


def test_what_is_there_stays_and_is_not_done_again(run: Run, folder: Path, painter: Painter) -> None:
    (folder / "erased").mkdir()
    (folder / "erased" / "a.png").write_bytes(b"mine")
    result = run("erase", "photos", *AT)
    assert (result.exit_code, len(painter.parts)) == (0, 4)
    assert "4 done, 1 already there" in result.stderr
    assert (folder / "erased" / "a.png").read_bytes() == b"mine"
    assert run("erase", "photos", *AT).exit_code == 0
    assert len(painter.parts) == 4
    assert run("erase", "photos", *AT, "--force").exit_code == 0
    assert len(painter.parts) == 9
    assert (folder / "erased" / "a.png").read_bytes() != b"mine"


def test_of_variants_those_that_are_there_stay(run: Run, folder: Path) -> None:
    (folder / "x-2.png").write_bytes(b"mine")
    assert run("replace", "photos/a.png", "-o", "x.png", *AT, "--prompt", "p", "--variants", 2).exit_code == 0
    assert (folder / "x-2.png").read_bytes() == b"mine"
    assert (folder / "x-1.png").exists()


def test_what_fails_is_listed_with_its_reason_and_the_rest_is_done(run: Run, folder: Path, painter: Painter) -> None:
    painter.fails[picture("b.jpg")] = refused()
    result = run("erase", "photos", *AT)
    assert result.exit_code == 1
    assert "photos/b.jpg: points: nothing was found there" in result.stderr
    assert "1 failed" in result.stderr
    assert "b.jpg" not in files(folder / "erased")
    painter.fails.clear()
    assert run("erase", "photos", *AT).exit_code == 0  # which does what failed
    assert "b.jpg" in files(folder / "erased")


def test_a_mask_that_is_missing_fails_its_picture_alone(run: Run, folder: Path) -> None:
    (folder / "masks").mkdir()
    (folder / "masks" / "a.png").write_bytes(picture("a.png"))
    result = run("erase", "photos/a.png", "photos/b.jpg", "--mask", "masks")
    assert result.exit_code == 1
    assert "masks/b.png" in result.stderr.replace("\\", "/")
    assert files(folder / "erased") == ["a.png"]


def test_a_server_that_is_gone_ends_the_batch(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, painter: Painter
) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        painter.calls.append(request)
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(batch, "AsyncClient", partial(AsyncClient, transport=httpx.MockTransport(gone)))
    result = run("erase", "photos", *AT, "--parallel", 1, "--server", "http://there:1")
    assert (result.exit_code, len(painter.calls)) == (1, 1)
    assert "no Palimpsest answers at http://there:1" in result.stderr
    assert "4 to do, 1 failed" in result.stderr
    assert files(folder / "erased") == []


def test_a_dry_run_says_what_would_be_done(run: Run, folder: Path, painter: Painter) -> None:
    (folder / "erased").mkdir()
    (folder / "erased" / "a.png").touch()
    result = run("erase", "photos", *AT, "--dry-run")
    assert (result.exit_code, painter.calls) == (0, [])
    assert "a.png" not in result.stderr.replace("in/a.png", "")
    assert "photos/b.jpg -> erased/b.jpg" in result.stderr.replace("\\", "/")
    assert files(folder / "erased") == ["a.png"]


def test_the_report_as_json(run: Run, folder: Path, painter: Painter) -> None:
    painter.fails[picture("b.jpg")] = refused()
    (folder / "out").mkdir()
    (folder / "out" / "a.png").touch()
    result = run("replace", "photos", *AT, "--prompt", "p", "-o", "out", "--json")
    told = json.loads(result.stdout)
    assert told["counts"] == {"done": 3, "already there": 1, "to do": 0, "failed": 1}
    by_name = {Path(each["input"]).name: each for each in told["pictures"] if "in" not in Path(each["input"]).parts}
    assert by_name["a.png"]["status"] == "already there"
    assert by_name["b.jpg"]["error"] == json.loads(refused().content)["error"]
    assert (by_name["c.HEIC"]["status"], by_name["c.HEIC"]["seeds"]) == ("done", [3])
    assert Path(by_name["c.HEIC"]["outputs"][0]) == Path("out/c.png")


def test_so_many_requests_run_at_a_time_and_no_more(
    run: Run, monkeypatch: pytest.MonkeyPatch, painter: Painter
) -> None:
    running: list[int] = [0]
    together = anyio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        running.append(running[-1] + 1)
        if running[-1] == 2:
            together.set()
        await together.wait()
        await anyio.wait_all_tasks_blocked()
        running.append(running[-1] - 1)
        return painter(request)

    monkeypatch.setattr(batch, "AsyncClient", partial(AsyncClient, transport=httpx.MockTransport(answer)))
    assert run("segment", "photos", *AT, "--parallel", 2).exit_code == 0
    assert max(running) == 2
    assert len(painter.parts) == 5


def test_on_a_terminal_a_bar_shows_how_much_is_done_and_how_long_the_rest_takes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run("erase", "photos", *AT, "--parallel", 1).stderr)
    assert re.search(r"erase ━+ 5/5 0:00:00", shown)


def test_what_a_kill_left_in_parts_goes_and_what_is_anothers_stays(run: Run, folder: Path) -> None:
    """In parts of its own, and of a picture that this batch does not write."""
    (folder / "erased").mkdir()
    for name in (".b.jpg.0011aabb.part", ".other.jpg.0011aabb.part"):
        (folder / "erased" / name).write_bytes(b"half")
    assert run("erase", "photos/*.jpg", *AT).exit_code == 0
    assert files(folder / "erased") == [".other.jpg.0011aabb.part", "b.jpg"]


def test_of_many_failures_the_first_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch, painter: Painter) -> None:
    monkeypatch.setattr("palimpsest.cli.report._SHOWN", 1)
    painter.fails = {picture(name): refused() for name in ("a.png", "b.jpg", "in/d.tiff")}
    shown = run("erase", "photos", *AT).stderr
    assert shown.count("nothing was found there") == 1
    assert "and 2 more: --json lists all" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["erase", "photos"], "say where"),
        (["segment", "photos"], "say where"),
        (["segment", "photos", "--at", "3"], "2 numbers"),
        (["segment", "photos", "--box", "1,2,3,x"], "4 numbers"),
        (["erase", "photos", *AT, "--server", "there"], "no address"),
        (["erase", "nowhere", *AT], "no such file"),
        (["erase", "photos", *AT, "--quality", "draft"], "not one of"),
        (["replace", "photos", *AT], "prompt"),
        (["erase", "photos", *AT, "--parallel", "0"], "parallel"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, folder: Path, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not (folder / "erased").exists()


def test_one_picture_in_parts_is_never_seen(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has its name only once it is whole."""
    monkeypatch.setattr("palimpsest.files.os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    result = run("erase", "photos/a.png", *AT)
    assert result.exit_code == 1
    assert "disk full" in result.stderr
    assert files(folder / "erased") == []


def test_the_servers_commands_are_there_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("server", "serve.cli:app", "palimpsest.commands")
    server = SimpleNamespace(entry_points=EntryPoints([point]))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: server)
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert all(name in shown for name in ("segment", "erase", "replace", "serve", "stop", "archives", "models"))
    assert "Seconds to wait" in CliRunner().invoke(app, ["stop", "--help"]).stdout

    def none(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", none)
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "archives" not in shown
    assert CliRunner().invoke(app, ["serve"]).exit_code == 2
