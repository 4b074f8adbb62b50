#!/usr/bin/env bash
# Resolves pyproject.toml into requirements.lock (what serving needs) and requirements-dev.lock (what the checks add).
# CUDA's own packages are left out: torch names their exact versions for each platform itself.
set -euo pipefail
bin=${1:?usage: deploy/lock.sh VENV/bin}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$bin/pip" install --quiet pip-tools
# The client comes from this tree: what the index has by this name is another's.
"$bin/pip" wheel --quiet --no-deps --wheel-dir "$work" ./client
printf '%s\n' 'torch==2.14.1' 'torchvision==0.29.1' "palimpsest-editing-client @ file://$(echo "$work"/*.whl)" > "$work/fixed.txt"
resolve() {
    "$bin/pip-compile" --quiet --strip-extras --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
        --no-emit-trusted-host --constraint "$work/fixed.txt" --output-file "$1" "${@:2}" pyproject.toml
    sed -i -E '/^(nvidia-cu|nvidia-nc|nvidia-nv|cuda-|triton)/d; /^palimpsest-editing-client/d; /^#/d; /^$/d' "$1"
}
resolve "$work/serve.lock"
resolve "$work/dev.lock" --extra dev
cp "$work/serve.lock" requirements.lock
grep -vxFf requirements.lock "$work/dev.lock" > requirements-dev.lock
