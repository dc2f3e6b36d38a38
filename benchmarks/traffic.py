"""The bytes that a decode step moves in memory, against the least it must, from compiled programs for absent chips.

Command:  python -m benchmarks.traffic [--models=…] [--slots=64,200] [--topology=h100:1x1x1,v5e:2x2] [--json[=FILE]]
Cost:     see the column "compile, s"; v5e needs libtpu, h100 the CUDA plugin (docs/scale.md).
Result:   docs/speed.md.

The programs are those of `python -m es_jax.plan`, and so those of a run: 200 prompts of up to 256 tokens, 1024 new
tokens, bfloat16 members of float32 weights, an l2 anchor. A step has all slots at 1279 places; an even_step has all
slots at 256 to 1279 places. `--programs` names what else is compiled (perturb and perturb_layer must be, since they
determine the sharding of the weights for decode).
"""

import argparse
import json
import sys
from typing import Any

import jax

from benchmarks.compare import add_json, write_json

MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B")
CONFIG = {
    "model": {"dtype": "bfloat16"},
    "task": {"train_size": 200},
    "es": {"population": 32},
    "decode": {"max_prompt_tokens": 256, "max_new_tokens": 1024},
    "optim": {"anchor": {"penalty": "l2", "strength": 10.0}},
}
PARTS = {"decode": ("step", "even_step", "chunk", "prefill")}  # for programs that are not counted as a whole
FIELDS = ("bytes", "bytes_least", "ratio", "kernels", "unknown_calls")
HEAD = """| topology | model | slots | of | GB | at least, GB | ratio | kernels | compile, s |
|---|---|---|---|---|---|---|---|---|"""


def cells(topology_name: str, model_name: str, slots: int, programs: set[str]) -> list[dict[str, Any]]:
    """The fields of `plan --json` about traffic, for each part of the programs."""
    from es_jax.planning.plan import fields, make_plan
    from es_jax.planning.programs import find_shape
    from es_jax.planning.topology import topology
    from es_jax.training.config import freeze

    config = freeze({
        **CONFIG, "model": {**CONFIG["model"], "source": model_name}, "decode": {**CONFIG["decode"], "slots": slots}
    })  # fmt: skip
    plan = fields(make_plan(config, find_shape(config)[0], topology(topology_name), only=programs))
    run = {"topology": topology_name, "model": model_name, "slots": slots, "mesh": plan["mesh"], "jax": jax.__version__}
    found = []
    for name, program in plan["programs"].items():
        same = run | {field: program[field] for field in ("compile_seconds", "error")}
        for part in PARTS.get(name, ("",)):
            prefix = f"{part}_" if part else ""
            if f"{prefix}bytes" in program:
                found.append(same | {"of": part or name} | {field: program[prefix + field] for field in FIELDS})
    return found


def row(cell: dict[str, Any]) -> str:
    """A cell of the table; the reason if there is no figure."""
    least = f"{cell['bytes_least'] / 1e9:.2f}"
    if cell["bytes"] is None:
        why = cell["error"] or ", ".join(cell["unknown_calls"]) or "no such loop"
        figures = [f"not known: {why}", least, "", ""]
    else:
        figures = [f"{cell['bytes'] / 1e9:.2f}", least, f"{cell['ratio']:.2f}", str(cell["kernels"])]
    name = cell["model"].split("/")[-1]
    return "| " + " | ".join([
        cell["topology"], name, str(cell["slots"]), cell["of"], *figures, f"{cell['compile_seconds']:.0f}"
    ]) + " |"  # fmt: skip


def main() -> None:
    from es_jax.planning.compiler import CompilerEnded

    jax.config.update("jax_platforms", "cpu")  # it must not use this machine's chips
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--slots", default="64,200")
    parser.add_argument("--topology", default="h100:1x1x1,v5e:2x2")
    parser.add_argument("--programs", default="perturb,perturb_layer,decode")
    add_json(parser)
    args = parser.parse_args()
    result: list[dict[str, Any]] = []
    unanswered = 0
    if args.json != "-":
        print(HEAD, flush=True)
    for topology_name in args.topology.split(","):
        for model_name in args.models.split(","):
            for slots in map(int, args.slots.split(",")):
                try:
                    new = cells(topology_name, model_name, slots, set(args.programs.split(",")))
                except CompilerEnded as error:  # the other cells may have an answer
                    print(f"{model_name}, {slots} slots: {error}", file=sys.stderr)
                    unanswered += 1
                    continue
                result += new
                if args.json != "-":
                    print("\n".join(map(row, new)), flush=True)
                if args.json not in (None, "-"):
                    write_json(result, args.json)
    if args.json == "-":
        print(json.dumps(result))
    sys.exit(1 if unanswered else 0)


if __name__ == "__main__":
    main()
