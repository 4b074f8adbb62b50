#!/usr/bin/env bash
# Resolves pyproject.toml into the lock files, for Linux on x86-64 and every Python that is supported, with the hash of each
# file that the index has of a version:
#
#   requirements.lock            what serving needs, without torch
#   requirements-torch.lock      torch with CUDA; deploy/install.sh takes another build of it where there is no GPU
#   requirements-cluster.lock    what `palimpsest cluster` adds
#   requirements-dev.lock        what the checks add to both
#   requirements-sagemaker.lock  the SageMaker SDK, which contradicts the others
#
# What is locked keeps its version if it can; `--upgrade` takes the newest of everything.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: deploy/lock.sh VENV/bin [--upgrade]}
upgrade=("${@:2}")
torch='^(torch|torchvision|triton|cuda-[a-z-]+|nvidia-(cu|nc|nv)[a-z0-9-]+)==' # nvidia-ml-py reads the driver: it stays
# What uv says of each package, by tool.uv.environments in pyproject.toml.
everywhere="python_full_version < '3.15' and platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

main() {
    "$bin/python" -m pip install --quiet uv
    cat requirements.lock requirements-torch.lock > "$work/serve.lock"
    cat requirements*.lock > "$work/dev.lock"
    # Only these two of torch go together; setuptools installs this tree.
    printf '%s\n' torch==2.14.1 torchvision==0.29.1 > "$work/fixed.txt"
    echo 'setuptools>=77' > "$work/build.txt"
    resolve "$work/serve.lock" --constraint "$work/fixed.txt" pyproject.toml "$work/build.txt"
    mapfile -t served < <(sed -nE 's/^([a-z0-9._-]+)==.*/--no-emit-package=\1/p' "$work/serve.lock")
    cat requirements-cluster.lock > "$work/cluster.lock" 2> /dev/null || true
    resolve "$work/cluster.lock" --constraint "$work/serve.lock" --extra cluster "${served[@]}" pyproject.toml
    mapfile -t clustered < <(sed -nE 's/^([a-z0-9._-]+)==.*/--no-emit-package=\1/p' "$work/cluster.lock")
    resolve "$work/dev.lock" --constraint "$work/serve.lock" --constraint "$work/cluster.lock" --extra dev --extra cluster \
        "${served[@]}" "${clustered[@]}" pyproject.toml
    resolve requirements-sagemaker.lock - <<< 'sagemaker>=2.257,<3'
    blocks '!~' < "$work/serve.lock" > requirements.lock
    blocks '~' < "$work/serve.lock" > requirements-torch.lock
    cp "$work/cluster.lock" requirements-cluster.lock
    cp "$work/dev.lock" requirements-dev.lock
}

# The versions that the file has already are preferred. The client comes from this tree: what the index has by this name
# is another's.
resolve() {
    "$bin/python" -m uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
        --no-header --no-annotate --no-emit-package palimpsest-editing-client --output-file "$1" "${upgrade[@]}" "${@:2}"
    sed -i "s/ ; $everywhere / /" "$1"
}

# A requirement with its hashes is a line and those below it that begin with a space.
blocks() {
    awk -v torch="$torch" "/^[^ ]/ { kept = \$0 $1 torch } kept"
}

main
