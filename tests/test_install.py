"""deploy/install.sh: every file by its hash, and which of torch's builds."""

import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from serving import PALIMPSEST, ROOT, blocks, free_port

from serve.settings import Settings

UNIT = ROOT / "deploy" / "palimpsest.service"
LOCKS = sorted(ROOT.glob("requirements*.lock"))
SERVER = [ROOT / "requirements.lock", ROOT / "requirements-torch.lock"]
TORCH, VISION = re.findall(r"^torch(?:vision)?==(\S+)", (ROOT / "requirements-torch.lock").read_text(), re.M)
FROM_INDEX = f"--index-url {{index}} torch=={TORCH} torchvision=={VISION}"
LOCKED = "--require-hashes --requirement requirements-torch.lock"


def blocks_of(lock: Path) -> list[str]:
    """Its requirements, each with its hashes."""
    return re.split(r"\n(?=\S)", lock.read_text().strip())


def wheel(folder: Path, name: str, version: str) -> Path:
    """One that pip installs, of an empty package."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        packed.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index of torch's builds, as PyTorch's own is laid out."""
    folder = tmp_path_factory.mktemp("index")
    for name, version in (("torch", f"{TORCH}+cpu"), ("torchvision", f"{VISION}+cpu")):
        built = wheel(folder, name, version)
        page = folder / "whl" / name / "index.html"
        page.parent.mkdir(parents=True)
        digest = sha256(built.read_bytes()).hexdigest()
        page.write_text(f'<a href="/{built.name.replace("+", "%2B")}#sha256={digest}">{built.name}</a>')

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=folder)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/whl"
        served.shutdown()


class Machine:
    """A machine with an environment whose pip writes down what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        (self.tree / "deploy").mkdir(parents=True)
        for lock in LOCKS:
            (self.tree / lock.name).symlink_to(lock)
        self.script = (ROOT / "deploy" / "install.sh").read_text()
        self.command("nvidia-smi", "exit 9")
        self.python()

    def command(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def python(self, torch: str = "") -> None:
        """Its environment has this torch."""
        self.command(
            "python",
            f"""case "$*" in
                "-m pip install "*) echo "${{@:4}}" >> {self.folder}/asked ;;
                *importlib*) [ -n "{torch}" ] && echo "{torch}" ;;
                *) exec {sys.executable} "$@" ;;
            esac""",
        )

    def install(self, **environ: str) -> tuple[list[str], str]:
        """Returns what pip was asked for, without what all calls have in common, and what was said."""
        (self.folder / "asked").unlink(missing_ok=True)
        script = re.sub(r"^CPU_INDEX=.*", f"CPU_INDEX={environ.pop('default')}", self.script, flags=re.M)
        (self.tree / "deploy" / "install.sh").write_text(script)
        environ["PATH"] = f"{self.folder}/bin:/usr/bin:/bin"
        command = ["bash", self.tree / "deploy" / "install.sh", self.folder / "bin"]
        done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True, timeout=60)
        common = "--disable-pip-version-check --no-deps --only-binary :all: "
        first, *others = (self.folder / "asked").read_text().splitlines()
        assert first == f"{common}--require-hashes --requirement requirements.lock"
        assert all(other.startswith(common) for other in others)
        return [other.removeprefix(common) for other in others], done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_gpu_torch_has_no_cuda_where_an_index_of_such_builds_answers(machine: Machine, index: str) -> None:
    asked, said = machine.install(default=index)
    assert asked == [FROM_INDEX.format(index=index)]
    assert said == f"torch {TORCH} for the CPU alone, from {index} (TORCH_INDEX= takes the one with CUDA)\n"


@pytest.mark.parametrize("path", ["", "/elsewhere"])
def test_an_index_that_does_not_answer_is_done_without(machine: Machine, index: str, path: str) -> None:
    silent = f"{index}{path}" if path else f"http://127.0.0.1:{free_port()}/whl"
    asked, said = machine.install(default=silent)
    assert asked == [LOCKED]
    assert said.startswith(f"{silent} does not answer with torch {TORCH}")
    assert len(said.splitlines()) == 1


def test_an_index_without_the_locked_version_is_done_without(machine: Machine, index: str) -> None:
    machine.script = machine.script.replace("has_version() {", f"VERSION={TORCH[:-1]}\nhas_version() {{", 1)
    assert machine.install(default=index)[0] == [LOCKED]


def test_a_gpu_gets_cuda_and_who_names_an_index_gets_that(machine: Machine, index: str) -> None:
    machine.command("nvidia-smi", 'echo "GPU 0: NVIDIA RTX 4090 (UUID: GPU-1)"')
    assert machine.install(default=index) == ([LOCKED], "")
    assert machine.install(default="http://127.0.0.1:9", TORCH_INDEX=index)[0] == [FROM_INDEX.format(index=index)]


def test_an_empty_index_means_cuda(machine: Machine, index: str) -> None:
    assert machine.install(default=index, TORCH_INDEX="") == ([LOCKED], "")


@pytest.mark.parametrize("torch", [TORCH, f"{TORCH}+cpu"])
def test_an_environment_that_has_the_version_keeps_its_build(machine: Machine, index: str, torch: str) -> None:
    machine.python(torch)
    assert machine.install(default=index) == ([], "")
    assert machine.install(default=index, TORCH_INDEX=index) == ([], "")


@pytest.mark.parametrize(("torch", "expected"), [("2.0.0", LOCKED), ("2.0.0+cpu", FROM_INDEX)])
def test_a_new_version_is_of_the_build_that_was_there(machine: Machine, index: str, torch: str, expected: str) -> None:
    machine.python(torch)
    assert machine.install(default=index)[0] == [expected.format(index=index)]


@pytest.mark.slow
def test_pip_takes_the_build_from_such_an_index(tmp_path: Path, index: str) -> None:
    arguments = FROM_INDEX.format(index=index).split()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--target", tmp_path]
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=120)
    assert {folder.name for folder in tmp_path.glob("torch*")} == {
        f"torch-{TORCH}+cpu.dist-info",
        f"torchvision-{VISION}+cpu.dist-info",
    }


@pytest.mark.slow
def test_packages_are_carried_to_a_machine_without_a_connection_and_believed_by_their_hashes(tmp_path: Path) -> None:
    """The commands of docs/firewalled.md, with two small packages for all."""
    for lock in LOCKS:
        (tmp_path / lock.name).write_text(lock.read_text())
    small = [block for block in blocks_of(SERVER[0]) if re.match("idna|zipp", block)]
    (tmp_path / "requirements.lock").write_text("\n".join(small))
    (tmp_path / "requirements-torch.lock").write_text("\n".join(blocks_of(SERVER[1])[-3:]))
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "install.sh").write_text((ROOT / "deploy" / "install.sh").read_text())
    page = blocks("docs/firewalled.md", "sh")
    download = re.sub(r"^.*?(?=carrier/bin/pip)|\ntar .*", "", page[0], flags=re.S)
    download = download.replace("carrier/bin/pip", f"{sys.executable} -m pip").replace(
        " -r requirements-torch.lock", ""
    )
    subprocess.run(["bash", "-euc", download], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert len(list((tmp_path / "wheels").iterdir())) == 2

    # Its torch is this environment's, which is kept.
    (export,) = re.findall(r"^export .*", page[1], re.M)
    install = (
        f"{export}; export PIP_TARGET=$PWD/there PIP_CONFIG_FILE=/dev/null; bash deploy/install.sh {PALIMPSEST.parent}"
    )
    command = ["bash", "-euc", install]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "there" / "idna").is_dir()

    shutil.rmtree(tmp_path / "there")
    (idna,) = (tmp_path / "wheels").glob("idna*")
    with zipfile.ZipFile(idna, "a") as changed:
        changed.writestr("idna/more.py", "")
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_systemd_unit_is_one_and_leaves_little_open(tmp_path: Path) -> None:
    unit = tmp_path / "palimpsest.service"
    # What it starts is not on this machine.
    unit.write_text(re.sub("^ExecStart=.*", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    for arguments in (["verify"], ["security", "--offline=true", "--threshold=25"]):
        done = subprocess.run(["systemd-analyze", *arguments, unit], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "palimpsest.service:" not in done.stderr  # of what it does not understand it only warns


def test_the_systemd_unit_sets_what_there_is() -> None:
    named = set(re.findall(r"^Environment=PALIMPSEST_(\w+)=", UNIT.read_text(), re.M))
    assert named == {"STATE", "STORE", "CACHE"}
    assert {name.lower() for name in named} <= Settings.model_fields.keys()
    assert set(re.findall(r"RestartPreventExitStatus=(\d)", UNIT.read_text())) == {"1"}  # docs/settings.md


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_each_requirement_is_one_version_with_hashes(lock: Path) -> None:
    for block in blocks_of(lock):
        head, *hashes = block.split(" \\\n    ")
        assert re.fullmatch(r"[a-z0-9._-]+==\S+( ; .+)?", head)
        assert hashes, head
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), head


def test_the_locks_name_all_that_is_needed() -> None:
    """pip is told to look for nothing else."""
    locked = dict(re.findall(r"^(\S+)==(\S+)", "".join(lock.read_text() for lock in SERVER), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [("palimpsest", each) for each in project["dependencies"]]
    wanted += [(name, each) for name in locked for each in metadata.requires(name) or ()]
    for name, text in wanted:
        each = Requirement(text)
        if each.name != "palimpsest-editing-client" and (each.marker is None or each.marker.evaluate({"extra": ""})):
            version = locked.get(canonicalize_name(each.name))
            assert version is not None, f"{name} needs {text}"
            assert each.specifier.contains(version, prereleases=True), f"{name} needs {text}, not {version}"
