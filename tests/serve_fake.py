"""`palimpsest serve` in front of a TorchServe that is a function: what a process does, in a second instead of ten."""

from fakes import FakeDevice, FakeHost, FakeTorchServe

from serve import cli, startup
from serve.settings import Settings
from serve.store.catalog import Catalog


class Host(FakeHost):
    async def stop(self) -> None:
        await super().stop()
        print("The engine is stopped.", flush=True)

    def end(self) -> None:
        """What the event loop did not come to: nothing here."""


if __name__ == "__main__":
    startup.Supervisor = lambda settings, gpu: Host(FakeTorchServe())  # type: ignore[assignment, misc, return-value]
    settings = Settings()
    memory = startup.memory_of(settings, FakeDevice(), cli._say)
    cli._serve(settings, Catalog(settings.store, settings.cache, demo=False), memory)
