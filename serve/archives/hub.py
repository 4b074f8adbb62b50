"""Files of Hugging Face's hub, by its own library: it knows mirrors, tokens, the hub's storage, and resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm import tqdm

from handlers.building.files import ProgressBar
from serve.archives.download import DownloadFailed


def download(
    repo: str, path: str, revision: str | None, folder: Path, limit: int | None, progress: ProgressBar
) -> None:
    """Brings a repository's file to folder/path. limit: bytes after which it can't be the right file.

    Raises DownloadFailed, and OSError where the disk is full.
    """
    try:
        # Asked for its size first.
        size = hf_hub_download(repo, path, revision=revision, local_dir=folder, dry_run=True).file_size
        if limit is not None and size is not None and size > limit:
            raise DownloadFailed(f"{repo}/{path} has {size:,} bytes, and no more than {limit:,} are expected")
        with progress(f"download {Path(path).name}", size) as advance:
            hf_hub_download(repo, path, revision=revision, local_dir=folder, tqdm_class=_telling(advance))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DownloadFailed(reason, getattr(getattr(error, "response", None), "status_code", None)) from error


def _telling(advance: Callable[[int], None]) -> type[tqdm]:
    """A bar that shows nothing itself."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, initial: int = 0, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **options | {"disable": True})
            advance(initial)

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

    return Bar
