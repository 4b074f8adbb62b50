"""The Python clients against the gateway, with the product's handlers behind it: a chain of edits is exact."""

import ast
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import anyio
import numpy as np
import palimpsest
import pytest
from conftest import encoded, pixels
from connecting import KINDS, Through, connecting
from PIL import Image
from test_exactness import Editor, lama
from test_keep import hole_in, jpeg_file, oriented, sd, served

from handlers.pictures.png import write_png
from handlers.pictures.tiff import write_tiff

pytestmark = pytest.mark.slow  # handlers of the product answer

__all__ = ["lama", "sd", "served"]

RNG = np.random.default_rng(11)
SIZE = (48, 64)


def noise(channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    shape = SIZE if channels == 1 else (*SIZE, channels)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def palette(**options: Any) -> bytes:
    image = Image.fromarray(noise()).quantize(16)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


COMPOSED = {
    "grey": lambda: write_png(noise(1)),
    "grey and alpha": lambda: write_png(noise(2)),
    "colours": lambda: write_png(noise(3)),
    "colours and alpha": lambda: write_png(noise(4)),
    "grey of 16 bits": lambda: write_png(noise(1, np.uint16)),
    "grey and alpha of 16 bits": lambda: write_png(noise(2, np.uint16)),
    "colours of 16 bits": lambda: write_png(noise(3, np.uint16)),
    "colours and alpha of 16 bits": lambda: write_png(noise(4, np.uint16)),
    "palette": palette,
    "palette with transparency": lambda: palette(transparency=bytes(range(0, 160, 10))),
    "bits": lambda: saved(Image.fromarray(noise(1) > 127), "PNG"),
    "turned": lambda: write_png(noise(3).transpose(1, 0, 2), [oriented(6)]),
    "JPEG, turned": jpeg_file,
    "grey JPEG": lambda: encoded(noise(1), "JPEG"),
    "WebP with losses": lambda: encoded(noise(4), "WEBP", quality=70),
    "TIFF": lambda: write_tiff(noise(3)),
    "TIFF of 16 bits": lambda: write_tiff(noise(1, np.uint16)),
    "TIFF of LZW": lambda: encoded(noise(3), "TIFF", compression="tiff_lzw"),
}
FETCHED = {
    "CMYK": lambda: saved(Image.fromarray(noise(4), "CMYK"), "JPEG"),
    "a colour that is transparent": lambda: saved(Image.fromarray(noise()), "PNG", transparency=(1, 2, 3)),
    "GIF": lambda: encoded(noise(1), "GIF"),
    "BMP": lambda: encoded(noise(3), "BMP"),
    "TIFF with alpha": lambda: write_tiff(noise(4)),
    "animated": lambda: saved(
        Image.fromarray(noise()), "WEBP", save_all=True, append_images=[Image.fromarray(noise())], lossless=True
    ),
}


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    with connecting(request.param) as make:
        yield make


@pytest.fixture
def through(served: Any) -> Through:
    return Through(served())


def whole(through: Through, edit: Any) -> np.ndarray:
    """The result as the server has it, as Pillow reads it."""
    answer = through._application.get(f"/v1/images/{edit.id}", params={"format": "png"})
    assert answer.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.mode == edit.image.mode
        return np.asarray(image)


@pytest.mark.parametrize("name", [*COMPOSED, *FETCHED])
def test_a_chain_of_patches_is_the_servers_result_bit_for_bit(through: Through, name: str) -> None:
    data = (COMPOSED | FETCHED)[name]()
    client = palimpsest.Client(transport=through)
    size = (56, 40) if name == "JPEG, turned" else SIZE
    edit: Any = data
    for index in range(3):
        edit = client.erase(edit, mask=hole_in(size, index), feather=2)
        assert (np.asarray(edit.image) == whole(through, edit)).all()
    assert not (np.asarray(edit.image) == np.asarray(client.erase(data, mask=hole_in(size, 0)).image)).all()
    fetched = [path for method, path, _ in through.calls if method == "GET"]
    # Once for the first edit; what came is what the next patches are put into.
    assert len(fetched) == (2 if name in FETCHED else 0)


def test_what_an_edit_of_an_edit_moves_is_the_mask_and_the_patch(connect: Callable[..., Any], through: Through) -> None:
    image = np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8)
    mask = hole_in((300, 400))
    client = connect(transport=through)
    first = client.erase(image, mask=mask)
    client.erase(client.erase(first, mask=mask), mask=mask)
    assert [path for _, path, _ in through.calls] == ["/v1/images", "/v1/erase", "/v1/erase", "/v1/erase"]
    assert through.calls[0][2] > 300 * 400
    assert all(size < 2000 for _, _, size in through.calls[1:])


def test_a_file_is_what_the_server_writes_with_the_inputs_metadata(
    connect: Callable[..., Any], through: Through, tmp_path: Any
) -> None:
    data, mask = jpeg_file(), hole_in((56, 40))
    client = connect(transport=through)
    edit = client.erase(data, mask=mask)
    at_once = client.erase(data, mask=mask, keep=False)
    assert edit.file() == at_once.file() == edit.file("jpeg")
    folder = tmp_path / "results"
    folder.mkdir()
    edit.save(folder / "a.jpg")
    assert (folder / "a.jpg").read_bytes() == at_once.file()
    with Image.open(folder / "a.jpg") as image:
        assert image.getexif()[0x10F] == "a maker"
    for suffix, kind in ((".png", "PNG"), (".webp", "WEBP"), (".TIF", "TIFF"), (".jpeg", "JPEG")):
        for each in (edit, at_once):
            each.save(folder / f"b{suffix}")
            with Image.open(folder / f"b{suffix}") as image:
                assert image.format == kind
    with pytest.raises(ValueError, match=r"\.webp"):
        edit.save(folder / "c.gif")
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "b.TIF", "b.jpeg", "b.png", "b.webp"]


def test_variants_are_results_of_their_own(connect: Callable[..., Any], through: Through, sd: Editor) -> None:
    sd.paint = lambda rgb, mask: np.full_like(rgb, 10 * sd.runs)
    mask = hole_in((48, 64))
    client = connect(transport=through)
    edit = client.replace(noise(3), "red", mask=mask, variants=3, seed=4, steps=1)
    assert [each.seed for each in edit.variants] == [4, 5, 6]
    assert len({each.id for each in edit.variants}) == 3
    for each in edit.variants:
        assert (np.asarray(each.image) == whole(through, each)).all()
    assert not (np.asarray(edit.variants[0].image) == np.asarray(edit.variants[1].image)).all()
    third = client.erase(edit.variants[2], mask=mask)
    assert (np.asarray(third.image) == whole(through, third)).all()


def test_a_selection_is_a_mask_and_its_candidates_are(
    connect: Callable[..., Any], through: Through, dog: bytes, tmp_path: Any
) -> None:
    client = connect(transport=through)
    found = client.segment(dog, points=[(750, 500)], masks="all", return_logits=True)
    assert found.mask.shape == (1041, 1499)
    assert (found.image.mode, found.mask.dtype, found.area) == ("L", np.bool_, found.mask.sum())
    assert found.scores == [each.score for each in found.candidates]
    assert found.score == max(found.scores)
    refined = client.segment(dog, points=[(750, 500), (20, 20, 0)], logits=found.logits)
    assert refined.mask.any()
    edit = client.erase(dog, mask=found.candidates[-1])
    assert (edit.mask == found.candidates[-1].mask).all()
    assert edit.box == found.candidates[-1].box
    found.save(tmp_path / "m.png")
    assert (pixels((tmp_path / "m.png").read_bytes()) > 127).tolist() == found.mask.tolist()
    with pytest.raises(ValueError, match="PNG"):
        found.save(tmp_path / "m.jpg")


def test_what_the_server_forgot_is_sent_and_made_again(connect: Callable[..., Any], through: Through) -> None:
    image, mask = np.random.default_rng(3).integers(0, 256, (300, 400, 3), np.uint8), hole_in((300, 400))
    other = hole_in((300, 400), 5)
    client = connect(transport=through)
    images = through._application.app.state.services.images  # type: ignore[attr-defined]
    edit = client.erase(client.erase(image, mask=mask), mask=other)
    before, file = np.asarray(edit.image), edit.file()
    images.close()
    assert edit.file() == file
    images.close()
    after = client.erase(edit, mask=mask)
    assert (np.asarray(after.image) == whole(through, after)).all()
    outside = ~mask
    assert (np.asarray(after.image)[outside] == before[outside]).all()


def test_a_points_mask_that_is_forgotten_is_none_of_the_callers_trouble(
    connect: Callable[..., Any], through: Through, dog: bytes
) -> None:
    client = connect(transport=through)
    found = client.segment(dog, points=[(750, 500)])
    through._application.app.state.services.images.close()  # type: ignore[attr-defined]
    assert client.erase(dog, mask=found).box == found.box


def test_errors_name_the_field(connect: Callable[..., Any], through: Through) -> None:
    client = connect(transport=through)
    image = noise(3)
    with pytest.raises(palimpsest.BadRequest) as caught:
        client.segment(image, points=[(1000, 2)])
    assert (caught.value.field, caught.value.status) == ("points", 400)
    with pytest.raises(palimpsest.BadRequest) as caught:
        client.erase(image, mask=np.ones((5, 5), bool))
    assert caught.value.field == "mask"
    with pytest.raises(palimpsest.BadRequest, match="sparkle"):
        client.erase(image, mask=np.ones(SIZE, bool), sparkle=1)
    with pytest.raises(palimpsest.NotFound) as caught:
        client.erase(image, mask=np.ones(SIZE, bool), model="none")
    assert caught.value.code == "model_not_found"
    with pytest.raises(FileNotFoundError):
        client.erase("nowhere.png", mask=np.ones(SIZE, bool))


SHOWN = ["Client", "Edit", "AsyncClient", "AsyncEdit", "Segmentation", "Upload", "Model", "Progress", "PalimpsestError"]
EXAMPLE = re.compile(r"Example:(?: `([^`]+)`|\n((?: {4}.*\n?)+))")


@pytest.mark.parametrize("name", SHOWN)
def test_every_call_and_type_has_an_example_that_runs(
    name: str, through: Through, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = getattr(palimpsest, name)
    calls = [call for each, call in vars(shown).items() if inspect.isfunction(call) and not each.startswith("_")]
    examples = {each: EXAMPLE.search(inspect.getdoc(each) or "") for each in (shown, *calls)}
    assert {each.__name__ for each, example in examples.items() if not example} <= {"close", "aclose"}

    monkeypatch.chdir(tmp_path)
    image, mask = np.full((900, 1000, 3), 90, np.uint8), hole_in((900, 1000))
    Path("bench.jpg").write_bytes(encoded(image, "JPEG"))
    client = palimpsest.Client(transport=through)
    found, edit, (model, *_) = client.segment(image, points=[(3, 4)]), client.erase(image, mask=mask), client.models()
    public = {each: getattr(palimpsest, each) for each in palimpsest.__all__}
    clients = {each: partial(public[each], transport=through) for each in ("Client", "AsyncClient")}
    own = {"image": image, "array": image, "mask": mask, "client": client, "found": found, "edit": edit, "model": model}

    async def run(code: CodeType) -> None:
        names = public | clients | own
        if name.startswith("Async"):
            names["client"] = clients["AsyncClient"]()
            names["edit"] = await names["client"].erase(image, mask=mask)
        running = eval(code, names)
        if inspect.iscoroutine(running):
            await running

    for example in filter(None, examples.values()):
        code = example[1] or textwrap.dedent(example[2])
        anyio.run(run, compile(code, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))


def test_models_come_from_all_pages(
    connect: Callable[..., Any], through: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palimpsest.core._PAGE", "1")
    models = connect(transport=through).models()
    assert [model.name for model in models] == ["lama", "sam", "sd"]
    assert {model.state for model in models} == {"absent"}
