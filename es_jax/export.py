"""python -m es_jax.export --workdir=RUN --out=DIR [--step=K|best] [--dtype=…] [--max_shard_gb=5] [--json]

Writes the weights of a run's step as a Hugging Face folder: sharded safetensors, config, generation config, the base
model's tokenizer and chat template, a model card. The step comes from its checkpoint if there is one, otherwise it is
replayed from the seed log; the bits are the same. The folder appears when it is whole. With --json one line is printed:

    out, step, source ("checkpoint" or "replay"), parameters, dtype, files, bytes

A model that one host's devices do not hold is exported as it is trained: the same command on all hosts, which share the
two folders, with the flags --distributed, … of es_jax.train. The first one writes.
"""

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from es_jax.core.flags import command, define_processes, parser


def main(argv: list[str]) -> None:
    """Flags → export_run()."""
    with command("es_jax.export", argv) as values:
        from es_jax.core import processes  # JAX starts only when the flags are good
        from es_jax.evals.export_step import export_run

        nbytes = max(int(values.max_shard_gb * 1e9), 1)
        result = export_run(values.workdir, values.out, step=values.step, dtype=values.dtype, max_shard_bytes=nbytes)
        if processes.first():
            print(json.dumps(result) if values.json else _sentence(result))


def _sentence(result: dict[str, Any]) -> str:
    how = {"checkpoint": "from its checkpoint", "replay": "replayed from the seed log"}[result["source"]]
    files = "1 weight file" if result["files"] == 1 else f"{result['files']} weight files"
    return (
        f"step {result['step']} ({how}), {result['parameters']:,} weights in {result['dtype']}: "
        f"{files}, {result['bytes'] / 1e6:,.1f} MB, in {Path(result['out'])}"
    )


def entry() -> None:
    flags.DEFINE_string("workdir", None, "The run's directory; nothing in it is changed.", required=True)
    flags.DEFINE_string("out", None, "The folder to write; it must not exist, or be empty.", required=True)
    flags.DEFINE_string("step", None, "The step, 0 (the base weights) to the last, or best; the last by default.")
    dtypes = ["float32", "bfloat16", "float16"]
    flags.DEFINE_enum("dtype", None, dtypes, "What weights are written as; the run's model.param_dtype by default.")
    flags.DEFINE_float("max_shard_gb", 5.0, "The most that a weight file holds, in 10⁹ bytes.", lower_bound=1e-9)
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    define_processes()
    app.run(main, flags_parser=parser("es_jax.export"))


if __name__ == "__main__":
    entry()
