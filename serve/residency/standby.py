"""The standby worker as residency sees it: memory of the device that the next load takes over, or that comes back."""

from typing import Protocol


class WarmStarts(Protocol):
    """standby: whether there is one, or will be. A wish that cannot be fulfilled does nothing."""

    @property
    def standby(self) -> bool: ...

    def prepare_standby(self) -> None: ...

    def dismiss_standby(self) -> None: ...


class Standby:
    """size: bytes of the device that it takes; 0: there never is one. leaving: it was dismissed, and is there still."""

    def __init__(self, warm: WarmStarts | None = None, size: int = 0) -> None:
        """There is none by default, nor on a machine without a GPU, where it would have nothing to prepare."""
        self._warm, self.size = warm, size if warm else 0
        self._dismissed = False

    @property
    def held(self) -> int:
        """Bytes held for it now."""
        return self.size if self._warm and self.size and self._warm.standby else 0

    @property
    def leaving(self) -> bool:
        return self._dismissed and self.held > 0

    def prepare(self) -> None:
        if self._warm and self.size:
            self._dismissed = False
            self._warm.prepare_standby()

    def dismiss(self) -> bool:
        """Whether there was one that was not dismissed before; `held` tells when it has gone."""
        if self._warm is None or not self.held or self._dismissed:
            return False
        self._dismissed = True
        self._warm.dismiss_standby()
        return True
