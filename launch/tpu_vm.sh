#!/usr/bin/env bash
# Trains on one TPU VM (v5litepod-8 or smaller, one host). Run it there, in a checkout of this repository.
# Assumes: python3 ≥ 3.11. WORKDIR must be on a disk that survives the VM; otherwise the run is lost with it.
# Usage: launch/tpu_vm.sh CONFIG WORKDIR [flag …]
set -euo pipefail
config=$1 workdir=$2; shift 2
make EXTRAS=llm,tpu .venv/.installed-llm-tpu
exec .venv/bin/python -m es_jax.train --config="$config" --workdir="$workdir" "$@"
