#!/usr/bin/env bash
# The first three runs of experiments/real_model.py on one GPU in ten minutes: SmolLM2-135M in bfloat16, N = 30 × 64
# prompts, ES, ES + AWD l2 at κ = 1 and κ = 0.5. The first has a quarter of the time; all then have the steps that it
# made. The results, at the base and the last step, are one JSON in WORKDIR/results.json.
# Assumes: a driver for CUDA 12 (for CUDA 13 write cuda13), python3 ≥ 3.11, `make smollm2` or a network; or PYTHON, one
# that has es_jax. With DATA, a folder of folders of rows (piqa), it measures PIQA as a prior too.
# Usage: [PYTHON=…] [DATA=…] launch/one_gpu.sh WORKDIR [SECONDS]; TINY=1 launch/one_gpu.sh WORKDIR 60 is a trial on CPU.
set -euo pipefail
workdir=$1 seconds=${2:-600}
if [[ -z ${PYTHON:-} ]]; then
  make EXTRAS=llm,cuda12 .venv/.installed-llm-cuda12 smollm2
  PYTHON=.venv/bin/python
fi
config=configs/json_facts.py:population=30,prompts_per_member=64,sigma=2e-3,lr=1e-3
flags=(--config.task.prompts_per_step=64 --config.evals.every=25 --config.train.checkpoint_every=1000)
study=(--size=full --target=json-facts --sigma=2e-3)
if [[ -n ${TINY:-} ]]; then
  config=configs/lab.py:noise=low_rank,population=4,sigma=1e-2,lr=5e-3
  flags=(--config.task.prompts_per_step=8 --config.evals.tasks=None --config.evals.rows=20 --config.evals.every=1000)
  study=(--size=lab --prior-rows=20)
elif [[ -n ${DATA:-} ]]; then
  study+=(--data="$DATA" --priors piqa-text:likelihood)
else
  study+=(--priors)
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/cache} PYTHONPATH=.

train() {  # NAME STEPS [argument …] of the config
  local name=$1 steps=$2 more; shift 2
  more=$(printf ',%s' "steps=$steps" "$@")
  "${clock[@]}" "$PYTHON" -m es_jax.train --config="$config$more" --workdir="$workdir/$name" "${flags[@]}"
}

clock=(timeout --signal=TERM --kill-after=60 "$((seconds / 4))")
train es 100000 || echo "the clock of the first run is over"
if ! steps=$(grep -c '"seeds"' "$workdir/es/seedlog.jsonl"); then
  echo "no step was made in $((seconds / 4)) seconds: give more SECONDS than $seconds" >&2
  exit 1
fi
clock=()
train es "$steps"
train awd-1 "$steps" anchor=l2 kappa=1
train awd-0.5 "$steps" anchor=l2 kappa=0.5
runs=("$workdir/es" "$workdir/awd-1" "$workdir/awd-0.5")
"$PYTHON" -m experiments.real_model "${study[@]}" --json "${runs[@]}" > "$workdir/results.json"
echo "$steps steps each: $workdir/results.json"
