#!/usr/bin/env bash
# Trains on a TPU pod slice. It starts the same command on all hosts of the slice. Run it on your own machine.
# Assumes: gcloud is logged in. TPU, ZONE and PROJECT name a slice that is up. Every host has this repository in REPO, and
# mounts WORKDIR from one shared file system (Filestore, or a bucket through gcsfuse).
# Usage: TPU=… ZONE=… PROJECT=… REPO=… launch/tpu_slice.sh CONFIG WORKDIR [flag …]
set -euo pipefail
config=$1 workdir=$2; shift 2
train="cd $(printf %q "$REPO") && make EXTRAS=llm,tpu .venv/.installed-llm-tpu && exec .venv/bin/python -m es_jax.train"
train+="$(printf ' %q' --distributed "--config=$config" "--workdir=$workdir" "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --project="$PROJECT" --worker=all --command="$train"
