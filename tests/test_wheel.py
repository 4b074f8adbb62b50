"""The server's and the client's wheels, installed where there is no checkout: they serve."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import serving
from serving import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheels alone; the libraries are this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    # Not in the checkout: setuptools leaves folders behind.
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "config.properties"):
        shutil.copy(ROOT / name, sources)
    for name in ("contract", "handlers", "serve"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = [build(sources, folder), build_client(folder)]
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    packages = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(packages)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    command = environment / "bin" / "palimpsest"
    command.write_text(f"#!{environment / 'bin' / 'python'}\nfrom palimpsest.cli import run\nrun()\n")
    command.chmod(0o755)
    return command


def build(sources: Path, folder: Path) -> Path:
    """The wheel of a source tree, in the folder."""
    script = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", script, folder]
    built = subprocess.run(command, cwd=sources, check=True, capture_output=True, text=True, timeout=120)
    return folder / built.stdout.splitlines()[-1]


def build_client(folder: Path) -> Path:
    """The client's wheel, from its folder alone."""
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    return build(Path(shutil.copytree(ROOT / "client", folder / "client", ignore=left_out)), folder)


@pytest.mark.torchserve
def test_an_installed_wheel_builds_archives_and_serves_them(
    installed: Path, tmp_path: Path, dog: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "PALIMPSEST", installed)
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with serving.serving(tmp_path, tmp_path / "store") as server:
        reply = server.ask("sam", image=dog, gen_args={"point_coords": [750, 500]})
        assert reply["score"] is not None
        from_checkout = [p for process in server.family() for p in process.cmdline() if str(ROOT / "serve") in p]
        assert from_checkout == []
        # Its configuration is in the wheel, too.
        assert (tmp_path / "state" / "logs" / "ts_log.log").read_text().count("Inference API bind to") == 1
