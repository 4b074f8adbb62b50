#!/usr/bin/env bash
# Installs what the server needs into a virtual environment, each file by the hashes in the lock files.
#
# torch comes in two builds. The one in requirements-torch.lock has CUDA: gigabytes that only a GPU needs. Where there is
# none, torch for the CPU alone is taken from an index of such builds, if it answers. The lock has no hashes of those; pip
# checks them against the hashes that the index states. An environment keeps the build that it has.
#
#   TORCH_INDEX   index of torch's builds, whether there is a GPU or not; empty: torch with CUDA
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: deploy/install.sh VENV/bin}

CPU_INDEX=https://download.pytorch.org/whl/cpu
VERSION=$(sed -nE 's/^torch==([^ ]+).*/\1/p' requirements-torch.lock)
VISION=$(sed -nE 's/^torchvision==([^ ]+).*/\1/p' requirements-torch.lock)

main() {
    pip --require-hashes --requirement requirements.lock
    local there index
    there=$(installed)
    [[ $there != "$VERSION" && $there != "$VERSION+"* ]] || return 0
    index=$(wanted_index "$there")
    if [ -n "$index" ] && has_version "$index"; then
        echo "torch $VERSION for the CPU alone, from $index (TORCH_INDEX= takes the one with CUDA)"
        pip --index-url "$index" "torch==$VERSION" "torchvision==$VISION"
    else
        [ -z "$index" ] || echo "$index does not answer with torch $VERSION: the one with CUDA is installed, about 5 GB"
        pip --require-hashes --requirement requirements-torch.lock
    fi
}

installed() {
    "$bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

wanted_index() {
    if [ -n "${TORCH_INDEX+set}" ]; then
        echo "$TORCH_INDEX"
    elif [[ $1 == *+cpu ]] || { [ -z "$1" ] && ! has_gpu; }; then
        echo "$CPU_INDEX"
    fi
}

has_gpu() {
    timeout 10 nvidia-smi --list-gpus 2>/dev/null | grep -q ^GPU
}

has_version() {
    timeout 10 "$bin/python" - "${1%/}/torch/" "torch-$VERSION" <<'PYTHON' 2>/dev/null
import sys
import urllib.request

url, name = sys.argv[1:]
with urllib.request.urlopen(url, timeout=3) as page:
    text = page.read().decode()
sys.exit(all(name + mark not in text for mark in "-+%"))
PYTHON
}

# The lock files name all that is needed, and all of it comes built.
pip() {
    "$bin/python" -m pip install --disable-pip-version-check --no-deps --only-binary :all: "$@"
}

main
