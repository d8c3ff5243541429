#!/usr/bin/env bash
# A slice of Cloud TPU VMs: asked for, set up, and the same command on each of its hosts. No disk is shared: data and
# runs lie in a bucket.
#
#     scripts/tpu_vm.sh create  NAME ZONE TYPE IMAGE [--spot ...]    waits in the queue until the slice is there
#     scripts/tpu_vm.sh install NAME ZONE SOURCE                     SOURCE: an address that pip takes, see below
#     scripts/tpu_vm.sh train   NAME ZONE --config voc_vgg16 --workdir gs://BUCKET/runs/voc ...
#     scripts/tpu_vm.sh delete  NAME ZONE
#     scripts/tpu_vm.sh run     NAME ZONE TYPE IMAGE SOURCE [--spot ...] -- --config voc_vgg16 --workdir gs://...
#
# TYPE and IMAGE are gcloud's --accelerator-type and --runtime-version, such as v5litepod-16 and v2-alpha-tpuv5-lite.
# SOURCE is such as git+https://github.com/pwcrf/pwcrf_jax@v0.2.0.
# run does it all, and again where the slice was taken away, until the run is finished: it goes on from its last
# checkpoint. The arguments of train are those of train.py.
set -euo pipefail
tpu() { gcloud compute tpus "$@"; }
on_all_hosts() { tpu tpu-vm ssh "$1" --zone="$2" --worker=all --command="$3"; }
state() { tpu queued-resources describe "$1" --zone="$2" --format="value(state.state)" 2>/dev/null || echo GONE; }
usage() {
    sed -n 's/^# \{0,1\}\(    scripts\)/\1/p' "$0" >&2
    exit 2
}

create() {
    local name=$1 zone=$2 type=$3 image=$4 now
    shift 4
    tpu queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
        --runtime-version="$image" "$@" || return
    until now=$(state "$name" "$zone") && [ "$now" = ACTIVE ]; do
        case $now in
            FAILED | SUSPENDED | GONE) echo "error: the request $name is $now; delete it and try again" >&2 && return 1 ;;
        esac
        sleep "${PWCRF_POLL:-30}"
    done
}

install() {
    local what
    what=$(printf '%q' "pwcrf_jax[train,gcs,weights,tpu] @ $3")
    on_all_hosts "$1" "$2" "python3 -m venv ~/pwcrf && ~/pwcrf/bin/pip install --quiet $what"
}

train() {
    local name=$1 zone=$2
    shift 2
    # pwcrf train is train.py, wherever the package lies.
    on_all_hosts "$name" "$zone" "~/pwcrf/bin/pwcrf train --distributed $(printf '%q ' "$@")"
}

delete() { tpu queued-resources delete "$1" --zone="$2" --force --quiet; }

run() {
    local name=$1 zone=$2 type=$3 image=$4 source=$5 more=() now code
    shift 5
    while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
        more+=("$1")
        shift
    done
    [ "$#" -gt 1 ] || usage
    shift
    while true; do
        now=$(state "$name" "$zone")
        if [ "$now" != ACTIVE ]; then
            [ "$now" = GONE ] || delete "$name" "$zone"
            create "$name" "$zone" "$type" "$image" ${more[@]+"${more[@]}"} && install "$name" "$zone" "$source" || return
        fi
        code=0
        train "$name" "$zone" "$@" || code=$?
        # 143: saved at a notice that the slice goes away. An error of the run itself ends this as well.
        if [ "$code" -ne 143 ] && [ "$(state "$name" "$zone")" = ACTIVE ]; then
            return "$code"
        fi
    done
}

declare -A least=([create]=4 [install]=3 [train]=4 [delete]=2 [run]=7)
command=${1:-none}
[ "$#" -gt "${least[$command]:-$#}" ] || usage
"$command" "${@:2}"
