"""Why a handler could not be loaded, from what its worker wrote into TorchServe's model_log.log."""

import asyncio
import re
from pathlib import Path

LOG = "model_log.log"
MOST = 2**20  # bytes of the log that are read
WRITTEN_WITHIN = 0.5  # seconds: TorchServe writes its logs beside its answers
_EXCEPTION = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt))(?:: (.*))?")
_IMPORT_ERRORS = ("ImportError", "ModuleNotFoundError")
_PATH = re.compile(r" \(/[^)]*\)")


class HandlerLog:
    """What comes into the log of one load from now on. log: the file, which may not be there yet."""

    def __init__(self, log: Path, name: str) -> None:
        """name: the model's, in TorchServe."""
        self._log, self._marker = log, f"-{name}_"
        self._begin = log.stat().st_size if log.exists() else 0

    async def reason(self, archive: Path) -> str:
        """Says why in one short line; empty if the log does not tell.

        A missing library is named. Of any other exception only the type is told: its text is the handler's own, and
        may hold what is nobody's business.
        """
        kind, text = await self._exception()
        if not kind:
            return ""
        if kind not in _IMPORT_ERRORS:
            return kind
        said = f"{kind}: {_PATH.sub('', text)[:200]}"
        if not (archive / "requirements.txt").exists():
            return said
        return f"{said}. This server does not install an archive's requirements.txt: do so in its own environment"

    async def _exception(self) -> tuple[str, str]:
        deadline = asyncio.get_running_loop().time() + WRITTEN_WITHIN
        while True:
            # The first of a chain: TorchServe wraps it in others of its own.
            for line in await asyncio.to_thread(self._lines):
                if match := _EXCEPTION.fullmatch(line):
                    return match[1], match[2] or ""
            if asyncio.get_running_loop().time() > deadline:
                return "", ""
            await asyncio.sleep(0.05)

    def _lines(self) -> list[str]:
        """What the model's worker printed."""
        try:
            with self._log.open("rb") as log:
                # A log that has been rotated begins anew.
                log.seek(self._begin if self._begin <= self._log.stat().st_size else 0)
                lines = log.read(MOST).decode(errors="replace").splitlines()
        except OSError:
            return []
        return [line.partition(" MODEL_LOG - ")[2] for line in lines if self._marker in line.partition(" - ")[0]]
