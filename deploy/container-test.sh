#!/usr/bin/env bash
# Builds the image without a Docker engine and proves it: a server in it answers a click, as an ordinary user, and
# SIGTERM ends it with no process and no temporary folder left.
#
# Needs root, buildah, debootstrap (unless BASE_IMAGE is set), curl, 25 GB of disk under TMPDIR (/tmp), all of which is
# given back, and Debian's and Python's package servers. What belongs to one machine comes from the environment:
#
#   BASE_IMAGE  image to build on (a minimal Debian, made with debootstrap)
#   SUITE       release of that Debian (bookworm)
#   MIRROR      where debootstrap fetches it (debootstrap's own default)
#   MOUNTS      paths that the build sees read-only, as "PATH[:PATH-IN-THE-BUILD] ...": pip's configuration, a folder of
#               wheels, certificates
#   PORT        a free port (18080): the container shares the machine's network
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=$(mktemp -d)
PORT=${PORT:-18080}
CONTAINER=palimpsest-test
PICTURE=tests/data/dog-on-bench.png # 1499 by 1041 pixels, the click is on the dog
export BUILDAH_ISOLATION=chroot TMPDIR=$WORK/tmp

main() {
    mkdir -p "$TMPDIR"
    trap clean_up EXIT
    make_base
    build_image
    check_image
    start_server
    check_click
    stop_server
    step "passed"
}

make_base() {
    [ -z "${BASE_IMAGE:-}" ] || return 0
    step "base image"
    BASE_IMAGE=localhost/debian-base
    local base
    base=$(buildah_ from scratch)
    # python:3.11-slim-bookworm has certificates, too. With them in the base, MOUNTS can put a site's own over them.
    debootstrap --variant=minbase --include=ca-certificates "${SUITE:-bookworm}" "$(buildah_ mount "$base")" \
        ${MIRROR:+"$MIRROR"} >"$WORK/debootstrap.log" || fail "debootstrap: $(tail "$WORK/debootstrap.log")"
    buildah_ commit --quiet --rm "$base" "$BASE_IMAGE"
}

build_image() {
    step "build"
    local volumes=() mount
    for mount in ${MOUNTS:-}; do
        [[ $mount == *:* ]] || mount=$mount:$mount
        volumes+=(--volume "$mount:ro")
    done
    # Docker's format has HEALTHCHECK; without layers vfs copies the 5 GB once, not once per line.
    buildah_ build --format docker --layers=false --build-arg BASE_IMAGE="$BASE_IMAGE" "${volumes[@]}" --tag palimpsest .
}

check_image() {
    step "image"
    buildah_ from --name "$CONTAINER" --pull-never palimpsest
    ROOT=$(buildah_ mount "$CONTAINER")
    ROOT_ID=$(stat --format %d:%i "$ROOT")
    echo "$(du --summarize --human-readable "$ROOT" | cut -f1) unpacked"
    [[ $(config .User) =~ ^[1-9][0-9]*$ ]] || fail "it runs as root"
    [ "$(config 'index .Labels "com.amazonaws.sagemaker.capabilities.multi-models"')" = true ] || fail "no label"
    ls "$ROOT"/store/demo/{sam,lama,sd}/MAR-INF/MANIFEST.json >/dev/null || fail "it lacks demo archives"
    ! ls -d "$ROOT"/opt/palimpsest/{.git,.venv,tests,model-store} 2>/dev/null || fail "it has more than the server"
}

start_server() {
    step "start"
    local command
    mapfile -t command < <(config 'range .Entrypoint}}{{println .}}{{end}}{{range .Cmd}}{{println .}}{{end')
    run_inside "${command[@]}" >"$WORK/server.log" 2>&1 &
    SERVER=$!
    wait_for 120 healthy || fail "not healthy after two minutes: $(cat "$WORK/server.log")"
    cat "$WORK/server.log"
}

check_click() {
    step "click"
    local mask=$WORK/mask.png
    curl --silent --show-error --fail --max-time 60 --output "$mask" --header 'Accept: image/png' \
        --form image=@$PICTURE --form 'gen_args={"point_coords": [750, 500], "dilate_kernel_size": 15}' \
        "http://127.0.0.1:$PORT/predictions/sam"
    # Width and height are the first fields of a PNG after its signature.
    [ "$(od -An -tx1 -j16 -N8 "$mask" | tr -d ' ')" = 000005db00000411 ] || fail "no mask of 1499 by 1041 pixels"
    ps -o pid,uid,rss,args -p "$(processes | paste -sd ,)" | cut -c -100
    [ "$(processes | xargs -n 1 ps -o uid= -p | tr -d ' ' | sort -u)" = "$(config .User)" ] || fail "more than one user"
}

stop_server() {
    step "stop"
    kill -TERM "$(cut -d ' ' -f 1 "$ROOT/state/serve-$PORT.pid")"
    wait_for 60 stopped || fail "it still runs a minute after SIGTERM"
    wait "$SERVER" || fail "it ended with code $?: $(cat "$WORK/server.log")"
    [ -z "$(processes)" ] || fail "processes are left: $(processes)"
    ! ls -d "$ROOT"/tmp/palimpsest-* 2>/dev/null || fail "its temporary folder is left"
}

healthy() {
    kill -0 "$SERVER" || fail "the server ended: $(cat "$WORK/server.log")"
    local check
    mapfile -t check < <(config 'range .Healthcheck.Test}}{{println .}}{{end')
    run_inside "${check[@]:1}" 2>/dev/null
}

stopped() {
    ! kill -0 "$SERVER" 2>/dev/null
}

# The processes that have the container's root folder as theirs.
processes() {
    local entry
    for entry in /proc/[0-9]*; do
        [ "$(stat --dereference --format %d:%i "$entry/root/" 2>/dev/null)" != "$ROOT_ID" ] || echo "${entry#/proc/}"
    done
}

run_inside() {
    buildah_ run --env PALIMPSEST_PORT="$PORT" --env PALIMPSEST_KEYS=off "$CONTAINER" -- "$@"
}

# A field of the image's configuration, by Go template.
config() {
    buildah_ inspect --type image --format "{{with .Docker.Config}}{{$1}}{{end}}" palimpsest
}

buildah_() {
    buildah --storage-driver vfs --root "$WORK/storage" --runroot "$WORK/run" "$@"
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
    echo "container-test: $1" >&2
    exit 1
}

clean_up() {
    [ -z "${ROOT_ID:-}" ] || processes | xargs --no-run-if-empty kill -KILL
    rm -rf --one-file-system "$WORK"
}

main
