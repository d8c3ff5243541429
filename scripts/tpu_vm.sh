#!/usr/bin/env bash
# The same command on every host of a Cloud TPU VM slice:
#
#     scripts/tpu_vm.sh NAME ZONE --config configs/voc_vgg16.py --workdir /mnt/shared/runs/voc ...
#
# NAME and ZONE are those of the slice; all that follows goes to train.py. The repository must lie in ~/pwcrf_jax on each
# host, with its requirements installed for ~/pwcrf_jax/.venv, and --workdir and data.data_dir on a disk that they share.
# Started again, also on another slice, the run goes on.
set -euo pipefail
if [ "$#" -lt 3 ]; then
    echo "usage: $0 NAME ZONE [arguments of train.py]" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf '%q ' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd ~/pwcrf_jax && .venv/bin/python train.py --distributed $arguments"
