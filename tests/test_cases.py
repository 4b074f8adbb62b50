"""What people really send, from public bug reports of systems that do this job: each served, or refused with a reason.

Named after the report. The rest of the list is about the server around the handlers and tested elsewhere: large bodies
and replies, malformed JSON and killed workers in test_serve.py, test_faults.py and test_chaos.py; models unloaded while
they work in test_scheduler.py; names that become paths in test_unpack.py and test_catalog.py.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import HandlerClient, HandlerReply, encoded, pixels
from PIL import Image, ImageCms, ImageFile

from handlers.editing import geometry
from handlers.pictures import decoding
from handlers.pictures.picture import Picture
from handlers.pictures.png import write_png
from handlers.sam import network as sam_network
from handlers.sam.embeddings import Embeddings

Open = Callable[[str], HandlerClient]
RNG = np.random.default_rng(11)
QUICK = {"num_inference_steps": 1, "seed": 7, "guidance_scale": 1}


def photo(height: int = 48, width: int = 64, channels: int = 3) -> np.ndarray:
    """Smooth, so that JPEG keeps it."""
    array = RNG.integers(0, 256, (height, width, channels), np.uint8)
    return cv2.GaussianBlur(array, (0, 0), 4).reshape(array.shape)


def stored(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def corner(height: int = 48, width: int = 64) -> np.ndarray:
    """A mask of the lower right quarter."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :, width // 2 :] = 255
    return mask


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Palimpsest", orientation
    return exif


def erase(open_handler: Open, image: bytes, mask: np.ndarray | bytes, accept: str = "") -> HandlerReply:
    hole = mask if isinstance(mask, bytes) else encoded(mask)
    return open_handler("lama").send({"image": image, "mask_image": hole}, accept)


def replace(open_handler: Open, image: np.ndarray, mask: np.ndarray, **gen_args: Any) -> HandlerReply:
    parts = {"image": encoded(image), "mask_image": encoded(mask), "prompt": b"x", "gen_args": QUICK | gen_args}
    return open_handler("sd").send(parts)


def segment(open_handler: Open, image: bytes, **gen_args: Any) -> HandlerReply:
    return open_handler("sam").json(image=image, gen_args=gen_args)


class TestDecodingPictures:
    @pytest.mark.slow
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a1111_177_orientation(self, open_handler: Open, orientation: int) -> None:
        data = encoded(photo(), "JPEG", exif=oriented(orientation))
        upright = decoding.decode_picture(data).samples
        mask = corner(*upright.shape[:2])
        reply = erase(open_handler, data, mask, "image/png")
        assert np.array_equal(reply.picture[mask == 0], upright[mask == 0])
        assert Image.open(io.BytesIO(reply.body)).getexif().get(0x0112, 1) == 1

    def test_unsloth_10553_mask_drawn_on_the_upright_view(self, open_handler: Open) -> None:
        """The camera held sideways: the file is 64 wide, what people see and draw on is 48."""
        scene = np.full((48, 64, 3), 60, np.uint8)
        scene[:24, :32] = 200
        data = encoded(scene, "PNG", exif=oriented(6))
        mask = np.zeros((64, 48), np.uint8)
        mask[:32, 24:] = 255  # where the bright quarter lies once it is upright
        result = erase(open_handler, data, mask).picture
        assert (result[mask == 0] == 60).all()
        # A mask that carries the camera's orientation itself is turned likewise.
        sideways = stored(Image.fromarray(np.rot90(mask).copy()), "PNG", exif=oriented(6))
        assert np.array_equal(erase(open_handler, data, sideways).picture, result)

    def test_iopaint_202_exif_kept_and_orientation_cleared(self, open_handler: Open) -> None:
        data = encoded(photo(64, 48), "JPEG", exif=oriented(6))
        exif = Image.open(io.BytesIO(erase(open_handler, data, corner(), "image/*").body)).getexif()
        assert exif[0x010F] == "Palimpsest"
        assert exif.get(0x0112, 1) == 1

    @pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "image/tiff"])
    def test_iopaint_437_the_same_profile_is_embedded(self, open_handler: Open, kind: str) -> None:
        # Any profile does; this one is a colour space that nobody would assume.
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
        data = encoded(photo(), "JPEG", icc_profile=profile)
        reply = erase(open_handler, data, corner(), kind)
        assert Image.open(io.BytesIO(reply.body)).info["icc_profile"] == profile
        if kind != "image/jpeg":
            assert np.array_equal(reply.picture[corner() == 0], pixels(data)[corner() == 0])

    @pytest.mark.parametrize("name", ["lama", "sd"])
    def test_iopaint_375_alpha_is_identical(self, open_handler: Open, name: str) -> None:
        rgba = RNG.integers(0, 256, (48, 64, 4), np.uint8)
        request = {"image": encoded(rgba), "mask_image": encoded(corner()), "prompt": b"x", "gen_args": QUICK}
        result = open_handler(name).send(request, "image/png").picture
        assert np.array_equal(result[..., 3], rgba[..., 3])
        assert np.array_equal(result[corner() == 0], rgba[corner() == 0])

    def test_pillow_7288_palette_with_transparency_becomes_rgba(self, open_handler: Open) -> None:
        palette = Image.fromarray(photo()).quantize(8)
        reply = erase(open_handler, stored(palette, "PNG", transparency=3), corner())
        assert reply.picture.shape == (48, 64, 4)
        assert np.array_equal(reply.picture[..., 3] == 0, np.asarray(palette) == 3)

    def test_pillow_3011_sixteen_bit_grey(self, open_handler: Open) -> None:
        deep = RNG.integers(0, 65536, (48, 64), np.uint16)
        data = encoded(deep)
        assert np.array_equal(decoding.decode_picture(data).rgb[..., 1], deep >> 8)
        result = erase(open_handler, data, corner()).picture
        assert result.dtype == np.uint16
        assert np.array_equal(result[corner() == 0], deep[corner() == 0])

    def test_pillow_6563_cmyk_is_converted_and_its_profile_dropped(self, open_handler: Open) -> None:
        image = Image.fromarray(photo()).convert("CMYK")
        data = stored(image, "JPEG", icc_profile=b"a profile of CMYK")
        reply = erase(open_handler, data, corner(), "image/*")
        result = Image.open(io.BytesIO(reply.body))
        assert (result.mode, result.info.get("icc_profile")) == ("RGB", None)
        assert "CMYK" in reply.headers["X-Palimpsest-Warnings"]
        upright = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(reply.picture.astype(int) - upright)[corner() == 0].mean() < 3

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["lama", "sd"])
    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_ballonstranslator_1178_grey_in_grey_out(self, open_handler: Open, name: str, format: str) -> None:
        data = encoded(photo()[..., 0], format)
        request = {"image": data, "mask_image": encoded(corner()), "prompt": b"x", "gen_args": QUICK}
        reply = open_handler(name).send(request, "image/*")
        assert Image.open(io.BytesIO(reply.body)).mode == "L"
        if format == "PNG":
            assert np.array_equal(reply.picture[corner() == 0], pixels(data)[corner() == 0])

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "I;16", "1", "L"])
    @pytest.mark.parametrize("accept", ["image/jpeg", "image/png", "image/*", ""])
    def test_original_client_every_mode_has_an_answer(self, open_handler: Open, mode: str, accept: str) -> None:
        image = Image.fromarray(photo()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(photo())
        data = stored(image if mode == "I;16" else image.convert(mode), "PNG")
        reply = erase(open_handler, data, corner(), accept)
        assert reply.status == 200
        assert reply.picture.shape[:2] == (48, 64)

    def test_iopaint_229_lossless_webp_stays_lossless(self, open_handler: Open) -> None:
        data = encoded(photo(), "WEBP", lossless=True)
        reply = erase(open_handler, data, corner(), "image/*")
        assert reply.headers["content-type"] == "image/webp"
        assert np.array_equal(reply.picture[corner() == 0], pixels(data)[corner() == 0])

    @pytest.mark.parametrize("quality", [50, 90])
    def test_iopaint_229_jpeg_leaves_at_its_quality(self, open_handler: Open, quality: int) -> None:
        data = encoded(photo(), "JPEG", quality=quality)
        reply = erase(open_handler, data, corner(), "image/*")
        before, after = (Image.open(io.BytesIO(each)) for each in (data, reply.body))
        assert after.quantization == before.quantization  # type: ignore[attr-defined]
        assert np.abs(reply.picture.astype(int) - pixels(data))[:16, :16].max() <= 4

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["sam", "lama", "sd"])
    def test_pillow_5218_bomb(self, open_handler: Open, name: str) -> None:
        data = stored(Image.new("1", (20_000, 20_000)), "PNG")
        reply = open_handler(name).json(image=data, mask_image=data, prompt="x", gen_args={"point_coords": [1, 1]})
        assert (reply.status, reply.error["field"]) == (413, "image")
        assert "64 megapixels" in reply.error["message"]

    def test_a1111_8504_pillows_limit_is_nobodys_business(
        self, open_handler: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        assert erase(open_handler, encoded(photo()), corner()).status == 200
        assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)

    def test_a1111_8241_data_uris_line_breaks_and_base64url(self, open_handler: Open) -> None:
        data = encoded(photo(), "JPEG")
        text, mask = base64.b64encode(data).decode(), base64.b64encode(encoded(corner())).decode()
        plain = open_handler("lama").json(image=text, mask_image=mask).body
        for variant in (
            f"data:image/jpeg;base64,{text}",
            base64.urlsafe_b64encode(data).decode(),
            text.rstrip("="),
            "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        ):
            assert open_handler("lama").json(image=variant, mask_image=mask).body == plain
        # 4n + 1 characters are nothing; any other cut is a file that ends too early.
        for cut in (text[: len(text) // 2 // 4 * 4], text[: len(text) // 2 // 4 * 4 + 1]):
            reply = open_handler("lama").json(image=cut, mask_image=mask)
            assert (reply.status, reply.error["field"]) == (400, "image")

    @pytest.mark.parametrize("data", [b"", b"just text", encoded(photo(200, 200), "JPEG")[:900]])
    @pytest.mark.parametrize("field", ["image", "mask_image"])
    def test_many_what_is_no_picture_is_a_400(self, open_handler: Open, data: bytes, field: str) -> None:
        request = {"image": encoded(photo()), "mask_image": encoded(corner())} | {field: data}
        reply = open_handler("lama").send(request)
        assert (reply.status, reply.error["field"]) == (400, field)

    def test_many_animated_gif_takes_the_first_frame(self, open_handler: Open) -> None:
        frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
        reply = erase(open_handler, stored(frames[0], "GIF", save_all=True, append_images=frames[1:]), corner())
        assert (reply.picture[corner() == 0] == (255, 0, 0)).all()
        assert "first" in reply.fields["warnings"][0]


class TestMasks:
    def test_original_sd_handler_254_is_white(self, open_handler: Open) -> None:
        image = photo()
        result = replace(open_handler, image, np.where(corner(), 254, 0).astype(np.uint8)).picture
        assert (result[corner() > 0] != image[corner() > 0]).any()
        assert np.array_equal(result[corner() == 0], image[corner() == 0])

    def test_original_client_jpeg_mask_touches_nothing_outside(self, open_handler: Open) -> None:
        image, mask = photo(), np.zeros((48, 64), np.uint8)
        mask[10:37, 13:50] = 255
        jpeg = encoded(mask, "JPEG", quality=75)
        assert len(np.unique(pixels(jpeg))) > 2
        assert np.array_equal(decoding.decode_mask(jpeg, Picture(image)), mask > 0)
        result = erase(open_handler, encoded(image), jpeg).picture
        assert np.array_equal(result[mask == 0], image[mask == 0])

    @pytest.mark.parametrize("kind", ["0/1", "bool", "RGB", "RGBA"])
    def test_iopaint_112_every_kind_of_mask(self, open_handler: Open, kind: str) -> None:
        grey = corner()
        mask = {
            "0/1": grey // 255,
            "bool": grey > 0,
            "RGB": np.dstack([grey] * 3),
            "RGBA": np.dstack([grey, grey, grey, np.full_like(grey, 255)]),
        }[kind]
        image = encoded(photo())
        assert erase(open_handler, image, mask).body == erase(open_handler, image, grey).body

    @pytest.mark.parametrize("name", ["lama", "sd"])
    def test_diffusers_14322_empty_mask(self, open_handler: Open, name: str) -> None:
        empty = encoded(np.zeros((48, 64), np.uint8))
        reply = open_handler(name).json(image=encoded(photo()), mask_image=empty, prompt="x")
        assert (reply.status, reply.error["field"]) == (400, "mask_image")
        assert "the mask is empty" in reply.error["message"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("box", "size"), [((1300, 100, 620, 900), (1920, 1080)), ((50, 400, 700, 620), (768, 1024))]
    )
    def test_inpaint_anything_96_boxes_that_stick_out(
        self, open_handler: Open, box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> None:
        left, top, width, height = box
        image, mask = photo(size[1], size[0]), np.zeros((size[1], size[0]), np.uint8)
        mask[top : top + height, left : left + width] = 255
        result = replace(open_handler, image, mask).picture
        assert np.array_equal(result[mask == 0], image[mask == 0])
        assert (result[mask > 0] != image[mask > 0]).any(axis=1).mean() > 0.9

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["lama", "sd"])
    def test_original_handlers_mask_of_another_size(self, open_handler: Open, name: str) -> None:
        mask = encoded(np.full((384, 512), 255, np.uint8))
        reply = open_handler(name).json(image=encoded(photo(768, 1024)), mask_image=mask, prompt="x")
        assert reply.status == 400
        assert "512x384" in reply.error["message"]
        assert "1024x768" in reply.error["message"]

    @pytest.mark.parametrize(("kernel", "status"), [(0, 200), (None, 200), (2, 200), (-1, 400)])
    def test_original_sam_handler_dilate_kernel(
        self, open_handler: Open, dog: bytes, kernel: int | None, status: int
    ) -> None:
        gen_args = {"point_coords": [750, 500]} | ({} if kernel is None else {"dilate_kernel_size": kernel})
        reply = segment(open_handler, dog, **gen_args)
        assert reply.status == status
        if status == 200:
            plain = segment(open_handler, dog, point_coords=[750, 500]).picture
            expected = cv2.dilate(plain, np.ones((3, 3), np.uint8)) if kernel == 2 else plain
            assert np.array_equal(reply.picture, expected)

    @pytest.mark.parametrize("offset", [0, 3, 6])
    def test_diffusers_1357_thin_strokes_are_painted(self, open_handler: Open, offset: int) -> None:
        image, mask = np.full((512, 512, 3), 128, np.uint8), np.zeros((512, 512), np.uint8)
        mask[100 + offset : 104 + offset, 40:470] = 255
        result = replace(open_handler, image, mask).picture
        assert (result[mask > 0] != 128).any(axis=1).mean() > 0.9

    def test_iopaint_boxes_from_mask_specks_are_merged(self) -> None:
        mask = np.zeros((1600, 2400), bool)
        mask[RNG.integers(0, 1600, 1000), RNG.integers(0, 2400, 1000)] = True
        assert len(geometry.pieces(mask, 2048, 128)) <= 4

    @pytest.mark.parametrize("name", ["lama", "sd"])
    def test_full_mask_is_served_with_a_warning(self, open_handler: Open, name: str) -> None:
        full = encoded(np.full((48, 64), 255, np.uint8))
        reply = open_handler(name).json(image=encoded(photo()), mask_image=full, prompt="x", gen_args=QUICK)
        assert reply.status == 200
        assert "whole picture" in " ".join(reply.fields["warnings"])


class TestSizes:
    @pytest.mark.slow
    @pytest.mark.parametrize("size", [(427, 640), (768, 768), (283, 530), (1, 1), (7, 5)])
    def test_diffusers_5595_any_size(self, open_handler: Open, size: tuple[int, int]) -> None:
        image, mask = photo(*size), corner(*size)
        result = replace(open_handler, image, mask).picture
        assert result.shape == image.shape
        assert np.array_equal(result[mask == 0], image[mask == 0])

    @pytest.mark.parametrize("size", [(40, 40), (7, 5), (1, 1), (3, 3)])
    def test_lama_137_tiny_pictures(self, open_handler: Open, size: tuple[int, int]) -> None:
        image, mask = photo(*size), corner(*size)
        result = erase(open_handler, encoded(image), mask).picture
        assert np.array_equal(result[mask == 0], image[mask == 0])

    @pytest.mark.slow
    def test_iopaint_547_large_pictures_are_cropped(self, open_handler: Open) -> None:
        image, mask = np.tile(photo(277, 189), (16, 12, 1)), np.zeros((4432, 2268), np.uint8)
        mask[4000:4100, 1000:1100] = 255
        lama = open_handler("lama")
        seen: list[tuple[int, int]] = []
        original = lama.handler._inpaint
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lama.handler, "_inpaint", lambda rgb, hole: seen.append(hole.shape) or original(rgb, hole))
            result = erase(open_handler, write_png(image), mask).picture
        assert seen == [(356, 356)]
        assert np.array_equal(result[mask == 0], image[mask == 0])

    def test_a1111_16243_fractional_scales_shift_nothing(self) -> None:
        """The whole path with identity models is in test_exactness.py; here, that the scale of the report is one."""
        mask = np.zeros((900, 1300), bool)
        mask[300:800, 300:733] = True
        box = geometry.context_box(mask, 512)
        fit = geometry.Fit.square(box, 512)
        assert fit.inner != fit.crop
        ramp = np.tile((np.arange(box.width) // 4).astype(np.uint8)[None, :, None], (box.height, 1, 3))
        assert abs((fit.take(fit.put(ramp)).astype(float) - ramp).mean()) < 0.05


class TestSamRequests:
    def test_sam_357_state_is_per_request(self, open_handler: Open, dog: bytes) -> None:
        other = encoded(photo(400, 300))
        alone = segment(open_handler, dog, point_coords=[750, 500]).body
        for _ in range(2):
            segment(open_handler, other, point_coords=[150, 200])
            assert segment(open_handler, dog, point_coords=[750, 500]).body == alone

    def test_iopaint_interactive_seg_a_failed_first_try_leaves_nothing(
        self, open_handler: Open, dog: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def out_of_memory(*_: object) -> None:
            raise MemoryError

        handler = open_handler("sam").handler
        monkeypatch.setattr(handler, "embeddings", Embeddings())  # of none of the tests before
        encoder = handler.model.image_encoder
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "forward", out_of_memory)
            assert segment(open_handler, dog, point_coords=[750, 500]).status == 507
        assert segment(open_handler, dog, point_coords=[750, 500]).status == 200

    def test_sam_47_points_and_labels_must_match(self, open_handler: Open, dog: bytes) -> None:
        points = [[750, 500], [600, 400], [900, 600]]
        assert segment(open_handler, dog, point_coords=points, point_labels=[1, 1, 0]).status == 200
        reply = segment(open_handler, dog, point_coords=points, point_labels=[1])
        assert (reply.status, reply.error["field"]) == (400, "gen_args.point_labels")

    @pytest.mark.parametrize(
        "prompt",
        [
            {"point_coords": [1500, 5]}, {"point_coords": [float("nan"), 5]}, {"point_coords": "12"},
            {"point_coords": [5, 5], "point_labels": 2}, {"point_coords": [5, 5], "point_labels": -1}, {},
        ],
    )  # fmt: skip
    def test_points_that_are_none_are_named(self, open_handler: Open, dog: bytes, prompt: dict[str, Any]) -> None:
        reply = segment(open_handler, dog, **prompt)
        assert reply.status == 400
        assert "point" in reply.error["message"]

    def test_sam_307_the_best_score_wins_and_all_are_there_on_request(self, open_handler: Open, dog: bytes) -> None:
        best = segment(open_handler, dog, point_coords=[750, 500]).fields
        fields = segment(open_handler, dog, point_coords=[750, 500], masks="all").fields
        assert len(fields["masks"]) == len(fields["scores"]) == 3
        assert best["score"] == max(fields["scores"])
        assert best["generated_image"] == fields["masks"][int(np.argmax(fields["scores"]))]

    def test_sam_95_clear_prompts_take_the_single_mask_head(self, open_handler: Open, dog: bytes) -> None:
        points = {"point_coords": [[750, 500], [600, 400], [900, 600]], "point_labels": [1, 1, 1]}
        for prompt in (points, {"box": [400, 200, 1100, 900]}):
            single = segment(open_handler, dog, **prompt, multimask_output=False)
            assert segment(open_handler, dog, **prompt).body == single.body

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sam_696_half_precision_gives_the_same_mask(
        self, open_handler: Open, dog: bytes, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        sam, demo = open_handler("sam"), Path(sam_network.__file__).parent / "demo"
        full = segment(open_handler, dog, point_coords=[750, 500]).picture > 0
        half = sam_network.load(demo / "network.yaml", demo / "weights.safetensors", dtype)
        monkeypatch.setattr(sam.handler, "model", half)
        found = segment(open_handler, dog, point_coords=[750, 500]).picture > 0
        iou = (found & full).sum() / (found | full).sum()
        assert iou >= (0.99 if dtype == torch.float16 else 0.95)  # bfloat16 has 8 times as coarse steps

    def test_sam_384_nothing_is_kept_between_pictures(self, open_handler: Open) -> None:
        handler = open_handler("sam").handler
        before = set(vars(handler))
        for _ in range(5):
            segment(open_handler, encoded(photo()), point_coords=[5, 5])
        assert set(vars(handler)) == before
        assert not any(isinstance(value, (np.ndarray, Picture, dict, list)) and len(value) > 10_000
                       for value in vars(handler).values())  # fmt: skip


class TestDiffusion:
    def test_diffusers_6815_overflow_is_never_a_black_picture(
        self, open_handler: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second try in float32 is in test_handlers.py; here is what has no wider type."""
        sd = open_handler("sd")
        hook = sd.handler.pipeline.unet.conv_out.register_forward_hook(lambda m, i, output: output * torch.nan)
        try:
            reply = replace(open_handler, photo(), corner())
        finally:
            hook.remove()
        assert (reply.status, reply.error["code"]) == (500, "not_finite")
        assert "not finite" in reply.error["message"]

    @pytest.mark.parametrize(
        "gen_args", [{"num_inference_steps": 1, "strength": 0.5}, {"num_inference_steps": 0}, {"strength": 0}]
    )
    def test_diffusers_11092_at_least_one_step(self, open_handler: Open, gen_args: dict[str, Any]) -> None:
        assert replace(open_handler, photo(), corner(), **gen_args).status == 400

    @pytest.mark.parametrize(("guidance", "status"), [(1.0, 200), (0, 200), (-1, 400)])
    def test_easydiffusion_691_without_guidance(self, open_handler: Open, guidance: float, status: int) -> None:
        request = {"image": encoded(photo()), "mask_image": encoded(corner()), "prompt": "x", "negative_prompt": "blue"}
        reply = open_handler("sd").json(**request, gen_args=QUICK | {"guidance_scale": guidance})
        assert reply.status == status
        if status == 200:
            assert "negative_prompt had no effect" in " ".join(reply.fields["warnings"])

    def test_diffusers_2136_long_prompts_say_what_was_cut(self, open_handler: Open) -> None:
        request = {"image": encoded(photo()), "mask_image": encoded(corner())}
        reply = open_handler("sd").json(**request, prompt="red " * 80 + "cup", gen_args=QUICK)
        assert "longer than 77 tokens" in reply.fields["warnings"][0]
        assert reply.fields["warnings"][0].endswith("cup")

    @pytest.mark.parametrize("seed", [1.5, "1", True, 2**64, 2**63, -2])
    def test_pytorch_152564_seeds_are_whole_numbers(self, open_handler: Open, seed: Any) -> None:
        reply = replace(open_handler, photo(), corner(), seed=seed)
        assert (reply.status, reply.error["field"]) == (400, "gen_args.seed")

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [None, -1, 0, 2**63 - 1])
    def test_pytorch_152564_the_seed_used_is_in_the_reply(self, open_handler: Open, seed: int | None) -> None:
        used = replace(open_handler, photo(), corner(), seed=seed).fields["seed"]
        assert used == seed if seed is not None and seed >= 0 else 0 <= used < 2**63

    def test_diffusers_4055_the_same_request_gives_the_same_bytes(self, open_handler: Open) -> None:
        image = photo()
        assert replace(open_handler, image, corner()).body == replace(open_handler, image, corner()).body

    @pytest.mark.slow
    def test_diffusers_4782_and_sdkit_50_five_rounds_leave_the_rest(self, open_handler: Open) -> None:
        original = image = photo(300, 400)
        mask = np.zeros((300, 400), np.uint8)
        for number in range(5):
            hole = np.zeros_like(mask)
            hole[40 * number : 40 * number + 60, 50 * number : 50 * number + 80] = 255
            mask |= hole
            image = replace(open_handler, image, hole, seed=number).picture
        assert np.array_equal(image[mask == 0], original[mask == 0])
        assert (image[mask > 0] != original[mask > 0]).any(axis=1).mean() > 0.9


class TestServing:
    def test_sd_webui_segment_anything_names_are_never_opened(self, open_handler: Open) -> None:
        for name in ("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png"):
            reply = open_handler("lama").json(image=name, mask_image=encoded(corner()))
            assert (reply.status, reply.error["field"]) == (400, "image")

    def test_iopaint_139_raw_pictures_instead_of_json(self, open_handler: Open) -> None:
        image = encoded(photo())
        raw = erase(open_handler, image, corner(), "image/png")
        assert raw.body.startswith(b"\x89PNG")
        assert json.loads(raw.headers["X-Palimpsest-Warnings"]) == []
        assert np.array_equal(raw.picture, erase(open_handler, image, corner()).picture)
