"""The one reader of request bodies: every way to write the same fields, and what hostile ones may cost."""

import json
import random
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contract.bodies import BodyError, PartText, Repeated, Slice, read_body, text_of
from contract.buffers import WINDOW, unescaped_pieces
from contract.jsontext import MAX_SHORT, MAX_VALUES
from contract.multipart import MAX_PARTS
from contract.pictures import is_picture

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
FORM = "multipart/form-data; boundary=b"
URLENCODED = "application/x-www-form-urlencoded"


def part(head: str, content: bytes, end: str = "\r\n") -> bytes:
    return f"--b{end}{head}{end}{end}".encode() + content + end.encode()


def one(headers: str, content: bytes) -> bytes:
    """A body of one part, `a`."""
    return part(f"Content-Disposition: form-data; name=a\r\n{headers}", content) + b"--b--"


def read(body: bytes, kind: str = FORM, encoding: str = "", **options: Any) -> dict[str, Any]:
    """With slices as what they stand for."""
    fields = read_body(kind, encoding, body, **options)
    return {name: resolved(body, name, value) for name, value in fields.items()}


def resolved(body: bytes, name: str, value: Any) -> Any:
    if not isinstance(value, Slice):
        return value
    return text_of(body, value, name, len(body)) if value.text else body[value.start : value.stop]


# The same fields, whoever wrote them

NAMES = st.text(st.characters(categories=["L", "N"], include_characters=" _.-'\"\\"), min_size=1, max_size=12)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text('ab/\\"é😀\n', max_size=60).map(
    lambda text: text * 900
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def unsliced(body: bytes, value: Any) -> Any:
    if isinstance(value, Slice):
        return text_of(body, value, "x", len(body))
    if isinstance(value, list):
        return [unsliced(body, item) for item in value]
    return {name: unsliced(body, item) for name, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.sampled_from(["application/json", "Application/JSON; charset=x", "", "text/plain", URLENCODED]),
)  # fmt: skip
def test_json_reads_back_equal(
    fields: dict[str, Any], encoding: str, indent: int | None, ascii: bool, kind: str
) -> None:
    body = json.dumps(fields, indent=indent, ensure_ascii=ascii).encode(encoding)
    assert unsliced(body, read_body(kind, "", body)) == fields


def styled(random: random.Random, name: str, file: bool) -> str:
    quoted = name.replace("\\", "\\\\").replace('"', random.choice(['\\"', "%22"]))
    names = [f'name="{quoted}"', f"name*=UTF-8''{quote(name, safe='')}", f'NAME = "{quoted}"']
    if name.isascii() and name.isalnum():
        names += [f"name={name}", f'name*0="{name[:1]}"; name*1="{name[1:]}"']
    pieces = [random.choice(names)]
    if file:
        pieces.insert(
            random.randrange(2), random.choice(['filename="a; b.png"', "filename*=UTF-8''%c3%a9.png", "filename="])
        )
    header = random.choice(["Content-Disposition", "content-disposition", "CONTENT-DISPOSITION"])
    return f"{header}: form-data;" + random.choice([" ", "\r\n\t", ""]) + random.choice([";", " ; "]).join(pieces)


# `_charset_` is no field: it says what the texts after it are written in, which a test of its own tries.
FIELDS = NAMES.map(str.strip).filter(lambda name: name not in ("", "_charset_"))


@pytest.mark.slow
@settings(deadline=None)
@example({"0": b"\r"}, "\n", random.Random(0))
@given(
    st.dictionaries(FIELDS, st.binary(max_size=90) | TEXTS, max_size=5),
    st.sampled_from(["\r\n", "\n"]),
    st.randoms(),
)
def test_multipart_reads_back_equal(fields: dict[str, bytes | str], end: str, random: random.Random) -> None:
    pieces = [random.choice(["", "a preamble" + end]).encode()]
    for name, value in fields.items():
        head = styled(random, name, isinstance(value, bytes))
        if random.random() < 0.5:
            head += end + ("Content-Type: image/png" if isinstance(value, bytes) else "content-type:text/plain")
        pieces.append(part(head, value if isinstance(value, bytes) else value.encode(), end))
    body = b"".join(pieces) + b"--b--" + random.choice(["", end, end + "an epilogue"]).encode()
    back = {name: v.encode() if isinstance(v, str) else v for name, v in read(body).items()}
    sent = {
        name.replace("%22", '"'): v if isinstance(v, bytes) else v.removeprefix("\ufeff").encode()
        for name, v in fields.items()
    }
    assert back == sent


@pytest.mark.slow
@given(st.dictionaries(NAMES, TEXTS, max_size=5))
def test_form_fields_read_back_equal(fields: dict[str, str]) -> None:
    sent = {name: text for name, text in fields.items() if text.removeprefix("\ufeff") == text}
    assert read(urlencode(sent).encode(), "application/x-www-form-urlencoded; charset=UTF-8") == sent


def test_a_real_clients_multipart_is_read() -> None:
    request = httpx.Request(
        "POST", "http://x", data={"prompt": "é 😀", "points": ["1,2", "3,4"]}, files={"image": PNG, "mask": (None, PNG)}
    )
    fields = read(request.read(), request.headers["content-type"], lists=("points",))
    assert fields == {"prompt": "é 😀", "points": ["1,2", "3,4"], "image": PNG, "mask": PNG}
    assert isinstance(fields["points"], Repeated)
    assert isinstance(fields["prompt"], PartText)


@pytest.mark.parametrize("name", ["boundary=b", "Boundary=b", 'boundary="b"', 'charset=utf-8 ; boundary = "b" ; x=y'])
def test_the_boundary_may_be_written_in_any_way(name: str) -> None:
    assert read(part("Content-Disposition: form-data; name=a", b"1") + b"--b--", f"Multipart/Form-Data; {name}") == {
        "a": "1"
    }


@pytest.mark.parametrize(
    ("head", "content", "value"),
    [
        ('name="a"', b"\xef\xbb\xbftext", "text"),
        ('name="a"\r\nContent-Type: text/plain; charset=ISO-8859-1', b"\xe9", "é"),
        ('name="a"\r\nContent-Type: text/plain; charset="utf-16"', "é".encode("utf-16"), "é"),
        ('name="a"; filename="blob"\r\nContent-Type: application/json', b"[[1, 2]]", [[1, 2]]),
        ('name="a"\r\nContent-Type: application/geo+json;x=y', b"\xef\xbb\xbf{}", {}),
        ('name="a"; filename="a.txt"\r\nContent-Type: text/plain', b"a file", b"a file"),
        ('name="a"', b"\xff\xd8\xff", b"\xff\xd8\xff"),
        ('name="a"', b"GIF8 all ascii", b"GIF8 all ascii"),
        ('name="a"', b"", ""),
        ('name="a"; filename=""', b"", ""),  # of a form in which no file was chosen
        ('name="a"; filename="a.png"', b"", b""),
        ('name="a"', b"--bb is no boundary\r\n--bc", "--bb is no boundary\r\n--bc"),
        ('name="a"\r\nContent-Transfer-Encoding: binary', b"x", "x"),
    ],
)  # fmt: skip
def test_what_a_part_is(head: str, content: bytes, value: Any) -> None:
    assert read(part(f"Content-Disposition: form-data; {head}", content) + b"--b--\r\n") == {"a": value}


def test_one_part_names_the_charset_of_all() -> None:
    body = part("Content-Disposition: form-data; name=_charset_", b"iso-8859-1")
    assert read(body + part("Content-Disposition: form-data; name=a", b"\xe9") + b"--b--") == {"a": "é"}


def test_large_values_stay_where_they_are() -> None:
    text = "A" * (20 * WINDOW)
    body = json.dumps({"image": text, "mask": text.replace("AA", "/A")}).replace("/", "\\/").encode()
    fields = read_body("", "", body)
    assert [type(value) for value in fields.values()] == [Slice, Slice]
    assert (fields["image"].escaped, fields["mask"].escaped) == (False, True)
    assert read(body, "")["mask"] == text.replace("AA", "/A")
    assert read(b'{"a": "' + b"x" * MAX_SHORT + b'"}', "") == {"a": "x" * MAX_SHORT}


def test_escapes_at_every_place_of_a_window() -> None:
    for shift in range(14):
        text = "x" * (WINDOW - 20 + shift) + '😀\\é"' * 9
        body = json.dumps({"a": text}).encode()
        assert read(body, "") == {"a": text}


# What is refused

BAD_JSON = [
    b"", b" ", b"{", b"[1]", b"1", b"null", b'{"a":}', b'{"a" 1}', b'{"a":1,}', b'{,}', b'{"a":[1,]}', b'{a:1}',
    b"{'a':1}", b'{"a":1}{', b'{"a":1} x', b'{"a":tru}', b'{"a":truer}', b'{"a":01}', b'{"a":.5}', b'{"a":1.}',
    b'{"a":+1}', b'{"a":-}', b'{"a":"', b'{"a":"\\', b'{"a":"\\"', b'{"a":"\\x"}', b'{"a":"\\u12"}', b'{"a":\xff}',
    b"\xff\xfe", b"\xff\xfe\x00", b"\x00\x00\xfe\xff{", b"\xef\xbb\xbf",
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_JSON)
def test_broken_json_is_refused(body: bytes) -> None:
    with pytest.raises(BodyError) as caught:
        read_body("application/json", "", body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        (b'{"prompt": "\\ud83d ball"}', "prompt", "half of a character"),
        (b'{"prompt": "\\ude00\\ud83d"}', "prompt", "half of a character"),
        (b'{"prompt": "\xff"}', "prompt", "UTF-8"),
        (b'{"a": 1, "a": 1}', "a", "twice"),
        (b'{"gen_args": {"seed": 1, "seed": 1}}', "gen_args.seed", "twice"),
        (b'{"a": NaN}', "a", "finite"),
        (b'{"a": [-Infinity]}', "a", "finite"),
        (b'{"a": 1e999}', "a", "finite"),
        (b'{"a": ' + b"9" * 301 + b"}", "a", "300"),
        (b'{"a": ' + b"[" * 100_000, "a", "nested"),
        (b'{"a": ' + b'{"b":' * 100_000, "a", "nested"),
    ],
)  # fmt: skip
def test_what_json_may_not_hold_is_named(body: bytes, field: str, words: str) -> None:
    with pytest.raises(BodyError, match=words) as caught:
        read_body("application/json", "", body)
    assert (caught.value.status, (caught.value.field or "")[: len(field)]) == (400, field)


@pytest.mark.parametrize(
    ("content_type", "encoding", "body", "status", "words"),
    [
        ("application/json", "gzip", b"{}", 415, "Content-Encoding"),
        (FORM, "br, gzip", b"{}", 415, "Content-Encoding"),
        ("image/png", "", PNG, 415, "content-type"),
        ("text/plain", "", b"hello", 415, "content-type"),
        ("multipart/form-data", "", b"x", 400, "boundary"),
        ("multipart/form-data; boundary=", "", b"x", 400, "boundary"),
        ('multipart/form-data; boundary=""', "", b"x", 400, "boundary"),
        ("multipart/form-data; boundary=" + "x" * 71, "", b"x", 400, "boundary"),
        (FORM, "", b"", 400, "cut off"),
        (FORM, "", part("Content-Disposition: form-data; name=a", b"1"), 400, "cut off"),
        (FORM, "", b"--b\r\nContent-Disposition: form-data; name=a", 400, "headers"),
        (FORM, "", part("X: y", b"1") + b"--b--", 400, "no name"),
        (FORM, "", part('Content-Disposition: form-data; name=""', b"1") + b"--b--", 400, "no name"),
        (FORM, "", part("Content-Disposition: form-data; name=" + "n" * 999, b"1") + b"--b--", 400, "200"),
        (FORM, "", part("Content-Disposition: form-data; name=" + "n" * 2**20, b"1") + b"--b--", 400, "16 KiB"),
        (FORM, "", part("Content-Disposition: form-data; name=a", b"1") * 2 + b"--b--", 400, "twice"),
        (FORM, "", one("Content-Transfer-Encoding: base64", b"1"), 400, "base64"),
        (FORM, "", one("Content-Type: text/plain; charset=idna", b"1"), 400, "charset"),
        (FORM, "", one("Content-Type: text/plain", b"\xff\xfe"), 400, "a is not valid UTF-8"),
        (FORM, "", one("Content-Type: application/json", b"[1"), 400, "a is not valid JSON"),
        (FORM, "", one("Content-Type: multipart/mixed; boundary=c", b"1"), 400, "multipart within"),
        (FORM, "", part("Content-Disposition: form-data; name=a", b"") * (MAX_PARTS + 1) + b"--b--", 400, "twice"),
        (FORM, "", b"--b\r\n" + b"x" * 100_000, 400, "16 KiB"),
        (FORM, "", one("Content-Type: text/plain; charset=utf-16", b"a\0"), 400, "a is not valid UTF-16"),
        (FORM, "", one("Content-Type: text/plain; charset=latin1", bytes(70_000)), 413, "64 KiB"),
        (URLENCODED, "", b"a=1&a=2", 400, "twice"),
        (URLENCODED, "", b"a=%ff", 400, "UTF-8"),
        (URLENCODED, "", b"a=" + b"x" * 2**23, 413, "4 MiB"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_said(content_type: str, encoding: str, body: bytes, status: int, words: str) -> None:
    with pytest.raises(BodyError, match=words) as caught:
        read_body(content_type, encoding, body)
    assert caught.value.status == status
    assert len(caught.value.message) < 300


# What hostile bodies cost


def calls(work: Callable[[], Any]) -> int:
    """How many functions of C were called, between which other threads may run; objects come from nowhere else."""
    count = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "c_call"

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def refused(kind: str, body: bytes) -> None:
    with pytest.raises(BodyError):
        read_body(kind, "", body)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "keys": ("", lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}"),
    "empty points": ("", lambda: b'{"points":[' + b"[]," * 1_000_000 + b"[]]}"),
    "points": ("", lambda: b'{"points":[' + b"[1,2]," * 300_000 + b"[1,2]]}"),
    "depth": ("", lambda: b'{"a":' * 500_000),
    "short texts": ("", lambda: b'{"a":[' + b",".join([b'"' + b"x" * 16_000 + b'"'] * 1_000) + b"]}"),
    "long names": ("", lambda: b'{"' + b"x" * 2_000_000 + b'":1}'),
    "parts": (FORM, lambda: part("Content-Disposition: form-data; name=a", b"") * 100_000 + b"--b--"),
    "near boundaries": (FORM, lambda: one("X: y", b"\n--bx" * 300_000)),
    "headers": (FORM, lambda: b"--b\r\n" + b"a: b\r\n" * 300_000),
    "form fields": (URLENCODED, lambda: b"a&" * 2_000_000),
    "utf-16": ("", lambda: '{"a":'.encode("utf-16") + b"  " * 9_000_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_what_its_bound_costs(name: str) -> None:
    kind, make = BOMBS[name]
    body = make()
    assert calls(lambda: refused(kind, body)) < 40 * MAX_VALUES


def test_a_body_within_the_bounds_is_read() -> None:
    values = [[1, 2]] * (MAX_VALUES // 3 - 2)
    assert read(json.dumps({"a": values}).encode(), "") == {"a": values}
    body = b"".join(part("Content-Disposition: form-data; name=a", b"1") for _ in range(MAX_PARTS)) + b"--b--"
    assert read(body, lists=("a",)) == {"a": ["1"] * MAX_PARTS}


PIECES = [
    b"--b", b"\r\n", b"\n", b"--", b"Content-Disposition: form-data", b'; name="a', b'"', b"\\", b"; filename*=", b"=",
    b"UTF-8''", b"%", b"Content-Type: application/json", b"{", b"}", b"[", b'"a":', b"\xff", b"\x00", b",",
    b"\\u", b"d83d",
]  # fmt: skip


@settings(deadline=None)
@given(
    st.binary(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join),
    st.sampled_from([FORM, "", "application/json", URLENCODED, "multipart/form-data; boundary=-"])
    | st.text(max_size=60),
    st.sampled_from(["", "identity", "gzip"]),
)
def test_any_bytes_end_in_fields_or_in_the_one_error(body: bytes, kind: str, encoding: str) -> None:
    try:
        fields = read_body(kind, encoding, body, lists=("a",))
        for name, value in fields.items():
            if isinstance(value, Slice):
                assert 0 <= value.start <= value.stop <= len(body)
                text_of(body, value, name, 1000)
        return
    except BodyError as refusal:
        error = refusal
    assert error.status in (400, 413, 415)
    assert len(error.message) < 600
    (error.message + (error.field or "")).encode()  # can be sent


SIZE = 20_000_000
LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "json": ("", lambda: b'{"image": "' + b"A" * SIZE + b'"}'),
    "escaped json": ("", lambda: b'{"image": "' + b"\\/" * (SIZE // 2) + b'"}'),
    "white space": ("", lambda: b'{"image":' + b" " * SIZE + b'"x"}'),
    "multipart": (FORM, lambda: one("Content-Type: image/png", PNG + b"\r\n--c" * (SIZE // 5))),
    "utf-16": ("", lambda: ('{"image": "' + "A" * 4_000_000 + '"}').encode("utf-16")),
}


@pytest.mark.parametrize("name", LARGE)
def test_others_run_while_a_large_body_is_read(name: str) -> None:
    """The gateway's event loop can only run between two calls: none may be about all of a body."""
    kind, make = LARGE[name]
    body = make()
    assert len(body) / WINDOW <= calls(lambda: read_body(kind, "", body)) < 30 * len(body) / WINDOW + 1000


@pytest.mark.parametrize(
    "head",
    [
        PNG,
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM1234",
        b"II*\0",
        b"MM\0*",
        b"MM\0+\0\x08",
        b"RIFF",
        b"\0\0\0\x20ftypmif1",
    ],
)
def test_pictures_are_known_by_their_first_bytes(head: bytes) -> None:
    assert is_picture(head)
    assert is_picture(memoryview(head))
    assert not is_picture(b"x" + head)


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("piece", [r"\/", r"\u002f", r"\\", "A", "é", r"\n"])
def test_a_picture_is_freed_of_escapes_wherever_they_are_cut(piece: str, shift: int) -> None:
    body = ("A" * shift + piece * (3 * WINDOW // len(piece))).encode()
    value = Slice(0, len(body), text=True, escaped=True)
    assert "".join(unescaped_pieces(body, value, "image")) == text_of(body, value, "image", len(body))


@pytest.mark.parametrize("end", ["\\", "\\x", "\\u12", "\\u12x4", "\\ud83d", "\\x" + "A" * WINDOW, b"\xff", b"\xc3"])
def test_a_picture_of_broken_escapes_is_refused(end: str | bytes) -> None:
    body = b"A" * WINDOW + (end if isinstance(end, bytes) else end.encode())
    with pytest.raises(BodyError, match="image"):
        list(unescaped_pieces(body, Slice(0, len(body), text=True, escaped=True), "image"))
