#!/usr/bin/env bash
# Trains on the GPU nodes of a SLURM cluster. There is one process per GPU, so --ntasks-per-node equals --gpus-per-node. Set
# both for your cluster.
# Assumes: this directory is a checkout on a file system that all nodes share. WORKDIR is on a shared file system too. You
# have run `make EXTRAS=llm,cuda12 .venv/.installed-llm-cuda12` in the checkout.
# SLURM sends SIGTERM two minutes before the time is over, or when it pre-empts the job. An unfinished run is queued again.
# Usage: sbatch --nodes=2 launch/slurm.sh CONFIG WORKDIR [flag …]
#SBATCH --job-name=es_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
config=$1 workdir=$2; shift 2
srun --kill-on-bad-exit=1 .venv/bin/python -m es_jax.train --distributed --config="$config" --workdir="$workdir" "$@"
test -e "$workdir/DONE" || scontrol requeue "$SLURM_JOB_ID"
