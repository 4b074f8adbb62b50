#!/usr/bin/env bash
# Builds the image and proves it: as compose.yaml starts it, with a read-only root file system, no capability and no way to
# gain privileges, a server in it refuses a wrong key, answers a click to who has the right one, directly and through
# Caddy, and ends when it is told to.
#
# With a Docker engine that is what is used. Without one: root, podman, runc, netavark, iptables, aardvark-dns, catatonit,
# podman-compose, debootstrap (unless BASE_IMAGE is set). Needs curl as well, and 30 GB of disk under TMPDIR (/tmp), which is given back.
# What is not at hand, such as promtool, is said to be left out. What belongs to one machine comes from the environment:
#
#   BASE_IMAGE  image to build on (Docker: the Dockerfile's; podman: a minimal Debian, made with debootstrap)
#   SUITE       release of that Debian (bookworm)
#   MIRROR      where debootstrap fetches it (debootstrap's own default)
#   MOUNTS      paths that podman's build sees read-only, as "PATH[:PATH-IN-THE-BUILD] ...": pip's configuration, a folder of
#               wheels, certificates
#   PORT        a free port (18080)
#   IMAGES      folder of podman's images that stays from one run to the next (a temporary one)
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=$(mktemp -d)
export PORT=${PORT:-18080}
TLS_PORT=$((PORT + 1)) # and the two behind it
PROMETHEUS_PORT=$((PORT + 3))
PICTURE=tests/data/dog-on-bench.png # 1499 by 1041 pixels, the click is on the dog
LEFT_OUT=()

main() {
    trap clean_up EXIT
    choose_engine
    build_image
    check_image
    check_compose
    check_monitoring
    make_keys
    start_server
    check_hardening
    check_keys
    check_caddy
    check_prometheus
    stop_server
    step "passed${LEFT_OUT:+, without what was not at hand: ${LEFT_OUT[*]}}"
}

choose_engine() {
    if docker info >/dev/null 2>&1; then
        ENGINE=(docker)
        COMPOSE=(docker compose)
        return
    fi
    # Limits on open files and processes are the engine's to raise, which not every machine lets it.
    printf '[containers]\ndefault_ulimits = []\n[engine]\nruntime = "runc"\n' >"$WORK/containers.conf"
    export CONTAINERS_CONF=$WORK/containers.conf
    local images=${IMAGES:-$WORK/images}
    mkdir -p "$WORK/bin" "$images"
    cat >"$WORK/bin/podman" <<END
#!/bin/sh
exec $(command -v podman) --root "$images/storage" --runroot "$images/run" --network-config-dir "$images/networks" \
    --cgroup-manager cgroupfs --events-backend file --network-backend netavark "\$@"
END
    chmod +x "$WORK/bin/podman"
    ENGINE=("$WORK/bin/podman")
    COMPOSE=(podman-compose --podman-path "$WORK/bin/podman" --in-pod false)
    make_base
}

make_base() {
    [ -z "${BASE_IMAGE:-}" ] || return 0
    BASE_IMAGE=localhost/debian-base
    ! engine image exists "$BASE_IMAGE" || return 0
    step "base image"
    # python:3.11-slim-bookworm has certificates, too. With them in the base, MOUNTS can put a site's own over them.
    debootstrap --variant=minbase --include=ca-certificates "${SUITE:-bookworm}" "$WORK/base" \
        ${MIRROR:+"$MIRROR"} >"$WORK/debootstrap.log" || fail "debootstrap: $(tail "$WORK/debootstrap.log")"
    tar --directory "$WORK/base" --create . | engine import --quiet - "$BASE_IMAGE" >/dev/null
}

build_image() {
    step "build"
    local options=() mount
    [ -z "${BASE_IMAGE:-}" ] || options+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    if [ "${ENGINE[0]}" != docker ]; then
        # Docker's format has HEALTHCHECK; layers would keep the five gigabytes once a line.
        options+=(--format docker --layers=false --isolation chroot --network host)
        for mount in ${MOUNTS:-}; do
            [[ $mount == *:* ]] || mount=$mount:$mount
            options+=(--volume "$mount:ro")
        done
    fi
    engine build "${options[@]}" --tag palimpsest . >"$WORK/build.log" 2>&1 || fail "$(tail -n 30 "$WORK/build.log")"
}

check_image() {
    step "image"
    echo "$(engine image inspect --format '{{.Size}}' palimpsest | numfmt --to iec) unpacked"
    [[ $(of_image .Config.User) =~ ^[1-9][0-9]*$ ]] || fail "it runs as root"
    [ "$(of_image 'index .Config.Labels "com.amazonaws.sagemaker.capabilities.multi-models"')" = true ] || fail "no label"
    inside sh -c 'ls /store/demo/sam/MAR-INF/MANIFEST.json /store/demo/lama/MAR-INF/MANIFEST.json \
        /store/demo/sd/MAR-INF/MANIFEST.json' >/dev/null || fail "it lacks demo archives"
    ! inside sh -c 'ls -d /opt/palimpsest/.git /opt/palimpsest/.venv /opt/palimpsest/tests /opt/palimpsest/model-store \
        /opt/venv/bin/pip /root/.cache/pip' 2>/dev/null | grep . || fail "it has more than the server"
    # Else each start would compile it anew, and could not keep it.
    inside python -c '
import importlib.util, struct, serve.cli as ours, httpx as other
for path in (ours.__file__, other.__file__):
    with open(importlib.util.cache_from_source(path), "rb") as file:
        assert struct.unpack("<4xI", file.read(8)) == (1,), path
' || fail "its modules are not compiled once for all"
}

check_compose() {
    step "compose"
    local profile
    for profile in cpu tls monitoring pool; do
        compose --profile "$profile" config >"$WORK/config.yaml" || fail "compose.yaml with the profile $profile"
    done
}

check_monitoring() {
    step "monitoring"
    command -v promtool >/dev/null || { LEFT_OUT+=(promtool); return 0; }
    promtool check config --lint=none deploy/monitoring/prometheus.yml || fail "prometheus.yml"
    promtool test rules deploy/monitoring/rules-test.yml || fail "rules.yml"
    # The dashboard's queries, and that what they ask for is there.
    [ ! -x .venv/bin/pytest ] || .venv/bin/pytest tests/test_monitoring.py --durations=0 || fail "the dashboard"
}

make_keys() {
    step "keys"
    install -d -o 10001 "$WORK/keys"
    KEY=$(engine run --rm --volume "$WORK/keys:/keys" --env PALIMPSEST_KEYS_FILE=/keys/keys.json palimpsest \
        keys add check --scope edit --scope operate | grep -oE 'pk_[A-Za-z0-9_-]+')
    [ -n "$KEY" ] || fail "no key was made"
    # 127.0.0.1 with that port is what the proof asks Caddy for.
    export KEYS='' KEYS_FILE=$WORK/keys/keys.json SITE=localhost HOSTS=''
}

start_server() {
    step "start"
    compose --profile cpu up --detach cpu >"$WORK/up.log" 2>&1 || fail "$(tail "$WORK/up.log")"
    SERVER=$(engine ps --all --quiet --filter label=com.docker.compose.project=palimpsest-check \
        --filter label=com.docker.compose.service=cpu)
    [ -n "$SERVER" ] || fail "there is no container: $(cat "$WORK/up.log")"
    wait_for 120 healthy || fail "not healthy after two minutes: $(engine logs "$SERVER" 2>&1)"
    engine logs "$SERVER" 2>&1 | head -n 4
}

check_hardening() {
    step "hardening"
    local status
    # The engine's own init comes first.
    status=$(engine exec "$SERVER" sh -c 'cat /proc/$(pgrep -of "palimpsest serve")/status')
    grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' <<<"$status"
    [ "$(grep -cE '^Cap(Inh|Prm|Eff|Bnd|Amb):\s0+$' <<<"$status")" = 5 ] || fail "it has capabilities"
    grep -qE '^NoNewPrivs:\s1$' <<<"$status" || fail "it may gain privileges"
    grep -qE '^Seccomp:\s2$' <<<"$status" || fail "it is under no seccomp filter"
    ! engine exec "$SERVER" touch /opt/palimpsest/x 2>/dev/null || fail "its root file system can be written"
    [ "$(engine exec "$SERVER" ps -eo uid= | tr -d ' ' | sort -u)" = "$(of_image .Config.User)" ] || fail "more than one user"
}

check_keys() {
    step "keys and a click"
    local url=http://127.0.0.1:$PORT
    expect 401 "$url/v1/models"
    expect 401 "$url/v1/models" --header "Authorization: Bearer ${KEY%?}-"
    expect 200 "$url/v1/models" --header "Authorization: Bearer $KEY"
    expect 401 "$url/predictions/sam" --form image=@$PICTURE
    check_click "$url"
    engine exec "$SERVER" ps -eo uid,rss,args | cut -c -100 | tee "$WORK/processes"
    grep -q zygote.py "$WORK/processes" || fail "workers start slowly: programs in /tmp may not be executed"
}

check_caddy() {
    step "caddy"
    at_hand caddy || return 0
    TLS_ADDRESS=127.0.0.1 start_beside caddy tls
    wait_for 60 caddy_answers || fail "Caddy does not answer"
    expect 401 "https://localhost:$TLS_PORT/v1/models" --insecure
    check_click "https://localhost:$TLS_PORT" --insecure
}

check_prometheus() {
    step "prometheus"
    at_hand prometheus || return 0
    start_beside prometheus monitoring
    wait_for 60 prometheus_scrapes || fail "Prometheus does not scrape the server"
    ! curl --silent --max-time 10 "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/rules" | grep -o '"health":"err"' \
        || fail "rules that cannot be computed"
}

# Whether compose.yaml's image of a service is here or can be fetched.
at_hand() {
    local image
    image=$(sed -nE "s/^    image: (\S*$1:.*)/\1/p" compose.yaml)
    engine image inspect "$image" >/dev/null 2>&1 || engine pull --quiet "$image" >/dev/null 2>&1 \
        || { LEFT_OUT+=("$image"); return 1; }
}

# Starts a service of a profile; on other ports, as theirs may be taken on this machine.
start_beside() {
    sed -E "s/:80:80\"/:$((TLS_PORT + 1)):80\"/; s/:443:443\"/:$TLS_PORT:443\"/; s/:9090:9090\"/:$PROMETHEUS_PORT:9090\"/" \
        compose.yaml >compose.check.yaml
    compose --file compose.check.yaml --profile "$2" --profile cpu up --detach "$1" >"$WORK/up.log" 2>&1 \
        || fail "$(tail "$WORK/up.log")"
}

prometheus_scrapes() {
    curl --silent --max-time 5 "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query" --data-urlencode 'query=up{job="palimpsest"}' \
        | grep -qE '"value":\[[0-9.]+,"1"\]'
}

caddy_answers() {
    curl --silent --fail --insecure --max-time 5 --output /dev/null "https://localhost:$TLS_PORT/ping"
}

check_click() {
    local mask=$WORK/mask.png
    curl --silent --show-error --fail --max-time 60 --output "$mask" --header 'Accept: image/png' "${@:2}" \
        --header "x-api-key: $KEY" --form image=@$PICTURE \
        --form 'gen_args={"point_coords": [750, 500], "dilate_kernel_size": 15}' "$1/predictions/sam"
    # Width and height are the first fields of a PNG after its signature.
    [ "$(od -An -tx1 -j16 -N8 "$mask" | tr -d ' ')" = 000005db00000411 ] || fail "no mask of 1499 by 1041 pixels"
    curl --silent --show-error --fail --max-time 60 --output "$WORK/erased.png" "${@:2}" --header "x-api-key: $KEY" \
        --form image=@$PICTURE --form mask=@"$mask" "$1/v1/erase"
    [ "$(od -An -tx1 -j16 -N8 "$WORK/erased.png" | tr -d ' ')" = 000005db00000411 ] || fail "nothing was erased"
}

stop_server() {
    step "stop"
    engine stop --time 60 "$SERVER" >/dev/null
    [ "$(engine inspect --format '{{.State.ExitCode}}' "$SERVER")" = 0 ] || fail "it ended badly: $(engine logs "$SERVER" 2>&1)"
    engine logs "$SERVER" 2>&1 | tail -n 1
}

healthy() {
    [ "$(engine inspect --format '{{.State.Running}}' "$SERVER")" = true ] || fail "it ended: $(engine logs "$SERVER" 2>&1)"
    local check
    mapfile -t check < <(of_image 'range .Config.Healthcheck.Test}}{{println .}}{{end')
    engine exec "$SERVER" "${check[@]:1}"
}

expect() {
    local status
    status=$(curl --silent --max-time 60 --output /dev/null --write-out '%{http_code}' "${@:2}")
    [ "$status" = "$1" ] || fail "$2: $status, not $1"
}

inside() {
    engine run --rm --entrypoint '' palimpsest "$@"
}

# A field of the image's description, by Go template.
of_image() {
    engine image inspect --format "{{$1}}" palimpsest
}

engine() {
    "${ENGINE[@]}" "$@"
}

compose() {
    "${COMPOSE[@]}" --project-name palimpsest-check "$@"
}

wait_for() {
    local deadline=$((SECONDS + $1))
    until "$2"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.5
    done
}

step() {
    echo "== $1 (${SECONDS} s)"
}

fail() {
    echo "image-check: $1" >&2
    exit 1
}

clean_up() {
    compose --profile cpu --profile tls --profile monitoring down --volumes >/dev/null 2>&1 || true
    rm -f compose.check.yaml
    [ "${ENGINE[0]:-docker}" = docker ] || [ -n "${IMAGES:-}" ] || engine system reset --force >/dev/null 2>&1 || true
    rm -rf --one-file-system "$WORK"
}

main
