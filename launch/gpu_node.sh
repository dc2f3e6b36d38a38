#!/usr/bin/env bash
# Trains on one node with one or more GPUs. One process drives all of them. Run it there, in a checkout of this repository.
# Assumes: a driver for CUDA 12 and python3 ≥ 3.11. For CUDA 13 write cuda13 below.
# Usage: launch/gpu_node.sh CONFIG WORKDIR [flag …]
set -euo pipefail
config=$1 workdir=$2; shift 2
make EXTRAS=llm,cuda12 .venv/.installed-llm-cuda12
exec .venv/bin/python -m es_jax.train --config="$config" --workdir="$workdir" "$@"
