#!/usr/bin/env bash
# One base over several machines: every one hashes its own copy of the base, byte by byte, before it joins Ray, and
# again before the head serves. A copy that differs from the manifest ends here, with exit status 1.
#
#   node.sh head                 on the first machine; stays
#   node.sh worker HEAD[:PORT]   on every other one; stays
#   node.sh serve NAME=DIR ... [-- VLLM OPTIONS]   on the first machine, when all have joined
#
# BASE and MANIFEST (made by `gora-serve hash BASE --output MANIFEST`) are the same paths everywhere. STORE is a folder
# that all machines share, at the same path: the engine reads the verified copies of the adapters there.
# TENSOR_PARALLEL: GPUs of a machine. PIPELINE_PARALLEL: machines. NODES: how many must have joined (its default).
set -euo pipefail

usage() {
    sed -n '5,7s/^# *//p' "$0" >&2
    exit 2
}

check_base() {
    : "${BASE:?the folder of the base}" "${MANIFEST:?the manifest of the base}"
    gora-serve verify "$BASE" --manifest "$MANIFEST" --strict
}

wait_for_nodes() {
    python3 - "$1" <<'PYTHON'
import sys, time
import ray

ray.init(address="auto", logging_level="ERROR")
wanted, end = int(sys.argv[1]), time.monotonic() + 600
while (found := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > end:
        sys.exit(f"only {found} of {wanted} machines have joined")
    time.sleep(2)
PYTHON
}

serve() {
    : "${STORE:?a folder that all machines share}" "${PIPELINE_PARALLEL:=1}" "${TENSOR_PARALLEL:=1}"
    local adapters=()
    while (($#)) && [[ $1 != -- ]]; do
        adapters+=(--adapter "$1")
        shift
    done
    (($#)) && shift
    wait_for_nodes "${NODES:-$PIPELINE_PARALLEL}"
    exec gora-serve serve "$BASE" "${adapters[@]}" --store "$STORE" --log-format json -- \
        --distributed-executor-backend ray --tensor-parallel-size "$TENSOR_PARALLEL" \
        --pipeline-parallel-size "$PIPELINE_PARALLEL" "$@"
}

case "${1:-}" in
    head)
        (($# == 1)) || usage
        check_base
        exec ray start --head --port "${RAY_PORT:-6379}" --block
        ;;
    worker)
        (($# == 2)) || usage
        address=$2
        [[ $address == *:* ]] || address+=":${RAY_PORT:-6379}"
        check_base
        exec ray start --address "$address" --block
        ;;
    serve)
        shift
        check_base
        serve "$@"
        ;;
    *) usage ;;
esac
