"""All settings of the server: typed, read once, PALIMPSEST_* in the environment or in the file `palimpsest.env`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from serve.store_url import StoreUrl

MAX_PREDICT_TIMEOUT = 86_400  # seconds: TorchServe's own limit, in every archive of ours, which must not come first
OFF = "off"
"""PALIMPSEST_KEYS where there are to be none."""
SECRETS = (
    "PALIMPSEST_KEYS", "PALIMPSEST_KEY", "PALIMPSEST_STORE",
    "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
)  # fmt: skip
"""What no other process is to find in its environment."""


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # there is no home folder
        raise ValueError(str(error)) from None


def _store(place: object) -> object:
    """What has a scheme is a URL."""
    if isinstance(place, StoreUrl):
        return place
    return StoreUrl.read(str(place)) if "://" in str(place) else _absolute(Path(str(place)))


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Store = Annotated[Path | StoreUrl, PlainValidator(_store), PlainSerializer(str)]
NONE_IF_EMPTY = BeforeValidator(lambda text: text or None)
ModelSet = Literal["auto", "full", "demo"]
LogFormat = Literal["console", "json"]


class Settings(BaseSettings):
    """Raises pydantic.ValidationError, which names the setting, when a value is unusable."""

    model_config = SettingsConfigDict(
        env_prefix="PALIMPSEST_",
        env_file="palimpsest.env",
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
    )

    host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(8080, ge=1, le=65535, description="Port that the gateway listens on.")
    hosts: str = Field(
        "",
        description="Further names by which clients call the server, as a.example.org,.example.net (all below it).",
    )
    origins: str = Field(
        "",
        description="Pages of other sites that may use the server from a browser, as https://studio.example.org,"
        "http://localhost:3000 (CORS).",
    )
    keys: SecretStr = Field(
        SecretStr(""),
        description="off: whoever reaches the server may use it. Else keys beside those of the file, as"
        " name:edit+operate:KEY,... (docs/keys.md).",
    )
    keys_file: Annotated[AbsolutePath | None, NONE_IF_EMPTY] = Field(
        None, description="File of the keys that `palimpsest keys` makes; STATE/keys.json where it is not set."
    )
    key: SecretStr = Field(SecretStr(""), description="Key that `palimpsest models` sends to the server.")
    tls_cert: AbsolutePath | None = Field(
        None,
        description="The server's certificate in PEM form, with those that vouch for it; https then (docs/tls.md).",
    )
    tls_key: AbsolutePath | None = Field(None, description="Its key in PEM form, without a password.")
    proxies: str = Field(
        "",
        description="Addresses or networks of reverse proxies, as 10.0.0.5,172.18.0.0/16: whose X-Forwarded-For and"
        " X-Forwarded-Proto count.",
    )
    key_requests: int = Field(
        128, ge=1, description="Requests of one key that may be under way; above it 429. Without keys: of one address."
    )
    key_megapixels: float = Field(
        4000, gt=0, description="Megapixels that those may hold together, as their pictures declare; above it 429."
    )
    key_rate: float = Field(
        6000, gt=0, description="Requests of one key a minute, as many of them at once as it likes; above it 429."
    )
    metrics: Literal["open", "operate"] = Field(
        "open", description="Who may read /metrics where there are keys: anybody, or those with the scope operate."
    )
    log_format: LogFormat = Field(
        "console", description="Lines in the log and on stderr: console, for people, or json (docs/operations.md)."
    )
    models: ModelSet = Field(
        "auto", description="Model set behind the bare names; auto: full with a CUDA GPU or full archives, else demo."
    )
    store: Store = Field(
        Path("model-store"),
        description="Folder that holds the archives, or a URL of one: https://, s3://, gs:// (docs/scale.md).",
    )
    state: AbsolutePath = Field(Path(".palimpsest"), description="Folder for logs, downloads and the process id.")
    # In a checkout a link, so that an installed package has the file as well.
    config: AbsolutePath = Field(
        Path(__file__).with_name("config.properties"), description="TorchServe's own settings file."
    )
    max_request_mib: int = Field(128, ge=1, le=128, description="Largest request body; above it the answer is 413.")
    transit_mib: int = Field(
        1024,
        ge=1,
        description="Main memory for requests' bodies, and as much for replies that clients have not read; past it"
        " requests wait, then 429.",
    )
    images_mib: int = Field(512, ge=1, description="Main memory for uploads and results that are kept under an id.")
    images_seconds: float = Field(
        3600, gt=0, description="Seconds since its last use that an upload or a result is kept."
    )
    memory_budget: str = Field(
        "92%", description="Memory that models may take together: MiB, or a percentage of the device."
    )
    host_budget: str = Field(
        "25%",
        description="Main memory for parked models and archives read ahead: MiB, or a percentage; 0: none.",
    )
    suspend: bool = Field(
        False,
        description="Whether parked models may leave the GPU altogether; experimental, see docs/suspension.md.",
    )
    cache: AbsolutePath = Field(
        Path("~/.cache/palimpsest/archives"),
        description="Folder for unpacked .tar.gz and .mar archives, on a disk of this machine; all servers share it.",
    )
    cache_mib: int = Field(65536, ge=1, description="Disk that these may take; those unused longest make room.")
    queue_per_model: int = Field(128, ge=1, description="Requests that may wait for one model; above it 429.")
    queue_total: int = Field(256, ge=1, description="Requests that may wait for any model; above it 429.")
    queue_timeout: float = Field(
        55, gt=0, description="Seconds that a request waits for its model; then 429. Clients often give up at 60."
    )
    concurrent_loads: int = Field(1, ge=1, description="Models that load at the same time.")
    minimum_stay: float = Field(2, ge=0, description="Seconds that a busy model keeps its place in memory.")
    keep_alive: float | None = Field(
        None, ge=0, description="Seconds until an idle model is unloaded anyway; 0: after each answer."
    )
    eviction: Literal["lrfu", "lru"] = Field(
        "lrfu", description="Which idle model goes first: asked for least often of late, or longest ago."
    )
    load_timeout: float = Field(360, gt=0, description="Seconds that loading a model may take.")
    predict_timeout: float = Field(
        330, gt=0, le=MAX_PREDICT_TIMEOUT - 60, description="Seconds that a prediction may take."
    )
    start_timeout: float = Field(60, gt=0, description="Seconds that TorchServe may take to start.")
    stop_timeout: float = Field(30, gt=0, description="Seconds that running requests get to finish at shutdown.")
