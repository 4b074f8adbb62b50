"""docs/limits.md says every limit and default as the code has them, the table of docs/settings.md every setting.
`python -m tests.test_docs` writes them anew."""

import re
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from contract import bodies, jsontext, multipart
from handlers.pictures.limits import LIMITS, PictureLimits
from handlers.sam import embeddings
from handlers.sd.description import SCHEDULER
from handlers.sd.settings import SCHEDULERS
from serve.descriptions import descriptions
from serve.engine.torchserve import THROUGH_JAVA
from serve.gateway import body, connections, door, health, line, protocol, tls, transfer
from serve.gateway.access import fairuse, keys, sessions, sigv4
from serve.gateway.busiest import OTHER
from serve.gateway.edit import images
from serve.gateway.edit.fields import EraseFields, ReplaceFields, SegmentFields
from serve.gateway.openai.fields import ImageEditFields
from serve.residency.versions import MAX_REMEMBERED
from serve.settings import MAX_PREDICT_TIMEOUT, Settings
from serve.store import known_versions, mirror, remote
from serve.store.unpack import UnpackLimits

PAGE = Path(__file__).parent.parent / "docs" / "limits.md"
SETTINGS_PAGE = PAGE.with_name("settings.md")
SETTINGS_HEAD = "| setting | default | |\n|---|---|---|\n"
HEAD = """# Limits and defaults

What is past a limit is refused with a 4xx that names the field and the limit, before it is decoded or computed. The
server's own settings are in [settings.md](settings.md). This page is checked against the code by
`tests/test_docs.py`; `python -m tests.test_docs` writes it anew.
"""
CALLS = {
    "/v1/segment": SegmentFields,
    "/v1/erase": EraseFields,
    "/v1/replace": ReplaceFields,
    "/v1/images/edits": ImageEditFields,
}


def render() -> str:
    parts = [HEAD, "## Pictures\n", "| limit | value | |\n|---|---|---|"]
    parts += [f"| `{name}` | {value:,} | {text} |" for name, value, text in picture_limits()]
    for call, kind in CALLS.items():
        parts += [f"\n## {call}\n", "| field | default | allowed | |\n|---|---|---|---|"]
        properties = kind.model_json_schema()["properties"]
        parts += [f"| `{name}` | {default(p)} | {allowed(p)} | {p['description']} |" for name, p in properties.items()]
    for name, model in descriptions().items():
        parts += [f"\n## /predictions/{name}\n", "| field | default | allowed | |\n|---|---|---|---|"]
        for field in model.fields:
            kind = "a picture" if field.kind == "picture" else allowed(field.schema())
            parts.append(f"| `{field.name}` | {'required' if field.required else ''} | {kind} | {field.help} |")
        for argument in model.arguments:
            own = {"default": None} | argument.schema()
            parts.append(f"| `gen_args.{argument.name}` | {default(own)} | {allowed(own)} | {argument.help} |")
    unpack = UnpackLimits()
    transit = Settings.model_fields["transit_mib"].default
    parts += [
        "\n## Requests and archives\n",
        "| limit | value | |\n|---|---|---|",
        f"| time for a request's body | {body.TIME_LIMIT:g} s | 408 |",
        f"| values in a JSON body | {jsontext.MAX_VALUES:,} | 413 |",
        f"| nesting of a JSON body | {jsontext.MAX_DEPTH} | 400 |",
        f"| texts up to {jsontext.MAX_SHORT >> 10} KiB of a JSON body | {jsontext.MAX_TEXT >> 20} MiB | 413 |",
        f"| JSON in UTF-16 or UTF-32 | {jsontext.MAX_RECODED >> 20} MiB | 413 |",
        f"| a field's name | {jsontext.MAX_NAME} bytes | 400 |",
        f"| parts of a multipart body, fields of a urlencoded one | {multipart.MAX_PARTS:,} | 413 |",
        f"| headers of a part | {multipart.MAX_HEADERS >> 10} KiB | 400 |",
        f"| a part in another charset than UTF-8 | {bodies.MAX_RECODED_PART >> 10} KiB | 413 |",
        f"| a urlencoded body | {bodies.MAX_URLENCODED >> 20} MiB | 413 |",
        f"| time without a byte of it | {body.SILENCE:g} s | 408 |",
        f"| its pace, but for that time | {body.PACE:,} bytes/s | 408 |",
        f"| bodies in memory together | {transit:,} MiB | they wait, then 429; an eighth is for those up to 1 MiB |",
        f"| replies that clients have not read | {transit:,} MiB | requests wait, then 429 |",
        f"| time for a client to read a reply | {transfer.TIME_LIMIT:g} s | cut off |",
        f"| time in which it reads nothing | {transfer.STALLED:g} s | cut off |",
        f"| uploads and results that are kept | {images.MOST} | those unused longest are forgotten |",
        f"| embeddings that a SAM worker has | {embeddings.MAX_BYTES >> 20} MiB | the longest unused are made again |",
        f"| files whose picture it knows | {embeddings.MAX_FILES:,} | others are decoded again |",
        f"| bodies in TorchServe at once | {THROUGH_JAVA >> 20} MiB | they wait; of archives of another make only |",
        f"| files and folders of a packed archive | {unpack.entries:,} | not served |",
        f"| its files together | {unpack.size >> 30} GiB | not served |",
        f"| its files' bytes per packed byte | {unpack.ratio} | not served, from {unpack.ratio_from >> 20} MiB on |",
    ]
    parts += ["\n## Connections and HTTP\n", "| limit | value | |\n|---|---|---|"]
    parts += [f"| {name} | {value} | {text} |" for name, value, text in http_limits()]
    parts += [
        "\n## Keys\n",
        "| limit | value | |\n|---|---|---|",
        f"| keys | {keys.MOST_KEYS} | one has to be revoked first |",
        f"| a key of your own making | {keys.SHORTEST} to {keys.LONGEST} characters | the server does not start |",
        f"| until a change of the file counts | {keys.LOOK_EVERY:g} s | |",
        f"| time that somebody stays logged in | {sessions.SECONDS / 3600:g} h | the form comes again |",
        f"| who is logged in with one key | {sessions.MOST} | the oldest is logged out |",
        f"| a signing client's clock, or the age of what it signed | {sigv4.SKEW:g} s | 401 |",
    ]
    parts += [
        "\n## Queues and listings\n",
        "| limit | value | |\n|---|---|---|",
        "| requests of one key, or address, that are under way | `PALIMPSEST_KEY_REQUESTS` | 429; see"
        " [fair use](keys.md#fair-use) |",
        "| megapixels that these hold | `PALIMPSEST_KEY_MEGAPIXELS` | 429; one picture alone may have more |",
        "| requests of one key, or address, in a minute | `PALIMPSEST_KEY_RATE` | 429 |",
        f"| keys and addresses remembered that have nothing under way | {fairuse.MOST_RESTING:,} | the oldest may ask"
        " as if it never had |",
        "| requests that wait for a model, and for any | `PALIMPSEST_QUEUE_PER_MODEL`, `PALIMPSEST_QUEUE_TOTAL` | 429:"
        " the newest of whoever has most there |",
        "| requests of one pointer (`hover`) that wait | 1 | 409: the older one ends |",
        f"| `PALIMPSEST_PREDICT_TIMEOUT` | {MAX_PREDICT_TIMEOUT - 60:,} s at most | 504, and the worker is ended. An"
        " archive that is not ours may have a lower `responseTimeout`; the 504 then names it |",
        "| models on a page of `GET /v1/models` | 100; `limit`: up to 1,000 | `next_page_token` leads on |",
        f"| `GET /metrics` | {health.MAX_BYTES:,} bytes | the busiest models by name, the rest as `{OTHER}` |",
        f"| archives of a store on a URL | {remote.MOST_ARCHIVES:,} | what was known before is served |",
        f"| time to list it | {mirror.LISTING_SECONDS:g} s | the same |",
        f"| silence while one is fetched, and tries in a row that bring nothing | {remote.SILENT_SECONDS:g} s,"
        f" {mirror.TRIES} | 503; the next request goes on |",
        f"| the pace of a fetch, in the mean | {mirror.PACE >> 10} KiB/s | the same |",
        f"| until a name that is not known is asked for again | {mirror.ASK_AGAIN:g} s | as before |",
        f"| archives whose hash is remembered | {known_versions.MAX_ENTRIES:,} | others are read again |",
        f"| models remembered that are not in memory | {MAX_REMEMBERED:,} | older ones lose their counts |",
    ]
    return "\n".join(parts) + "\n"


def http_limits() -> list[tuple[str, str, str]]:
    share, each, own = connections.SHARE, connections.DESCRIPTORS_EACH, connections.OWN_DESCRIPTORS
    return [
        (
            "connections", f"{connections.MOST:,}",
            f"or a {each}th of the descriptors that the system grants, less {own}; then the one that waits longest for"
            " a request is closed, and where none does the new one gets 503 with Retry-After",
        ),
        ("of one address", f"1/{share} of these", "an IPv4 address, or an IPv6 network of 64 bits"),
        ("refused connections that are still told so", f"{connections.FAREWELLS}", "closed without a word"),
        ("time for a TLS handshake", f"{tls.HANDSHAKE_SECONDS:g} s", "closed"),
        ("time for a request's head", f"{protocol.HEAD_SECONDS:g} s", "408; closed where nothing came"),
        ("silence between two requests", f"{protocol.IDLE_SECONDS:g} s", "closed"),
        ("address", f"{protocol.REQUEST_LINE:,} bytes", "414"),
        ("headers", f"{protocol.HEADERS}", "431; trailers count"),
        ("request line and headers together", f"{protocol.HEAD_BYTES:,} bytes", "431"),
        ("trailers, chunk extensions, chunks' framing past 7 bytes per byte", f"{protocol.HEAD_BYTES:,} bytes", "431"),
        ("pipelined requests that wait", f"{protocol.PIPELINED}", "400, after the answers to these"),
        ("body of a request that takes no picture", f"{door.SMALL_BODY:,} bytes", "413"),
        ("time for it", f"{door.SMALL_BODY_SECONDS:g} s", "408"),
        ("a refused body that still comes in", f"{line.LINGER_SECONDS:g} s", "thrown away unread, then closed"),
        (
            "a last reply that is not taken", f"{line.UNREAD_SECONDS:g} s",
            f"closed; after {line.SILENCE_SECONDS:g} s without progress",
        ),
    ]  # fmt: skip


def picture_limits() -> list[tuple[str, int, str]]:
    """Name, value and the docstring's words of each of handlers.pictures.limits."""
    told: dict[str, str] = {}
    for names, text in re.findall(
        r"^ *([a-z_, ]+): (.+?)(?=^ *[a-z_, ]+: |\Z)", str(PictureLimits.__doc__), re.M | re.S
    ):
        told |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return [(name, value, told[name]) for name, value in LIMITS._asdict().items()]


def default(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "required"
    value = schema["default"]
    return "" if value in (None, "") else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def allowed(schema: dict[str, Any]) -> str:
    kind = next((part for part in reversed(schema.get("anyOf", [])) if part.get("type") != "null"), schema)
    if "enum" in kind:
        return ", ".join(f"`{choice}`" for choice in kind["enum"])
    match kind.get("type"), kind.get("format"):
        case _, "binary":
            return "a picture"
        case "boolean", _:
            return "`true`, `false`"
        case "array", _:
            return (
                f"{kind['minItems']} to {kind['maxItems']} items"
                if kind["minItems"] != kind["maxItems"]
                else f"{kind['minItems']} numbers"
            )
        case "string", _ if "maxLength" not in kind:
            return "a text"
        case "string", _:
            return f"up to {kind['maxLength']:,} characters"
        case _:
            return f"{kind['minimum']:,} to {kind['maximum']:,}"


def render_settings() -> str:
    """The page with its table made anew."""
    before, _, after = SETTINGS_PAGE.read_text().partition(SETTINGS_HEAD)
    rows = []
    for name, field in Settings.model_fields.items():
        assert field.description
        value = plain_default(field.default)
        rows.append(f"| `PALIMPSEST_{name.upper()}` | {f'`{value}`' if value else ''} | {field.description} |\n")
    return before + SETTINGS_HEAD + "".join(rows) + after[after.index("\n\n") + 1 :]


def plain_default(value: object) -> str:
    match value:
        case None:
            return ""
        case Path() if value.is_absolute():
            return value.name
        case SecretStr():
            return value.get_secret_value()
        case bool():
            return str(value).lower()
        case _:
            return str(value)


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == render()


def test_the_table_of_settings_is_what_the_code_says() -> None:
    assert SETTINGS_PAGE.read_text() == render_settings()


def test_every_scheduler_that_is_offered_is_known() -> None:
    assert set(SCHEDULER.choices) == set(SCHEDULERS)


if __name__ == "__main__":
    PAGE.write_text(render())
    SETTINGS_PAGE.write_text(render_settings())
