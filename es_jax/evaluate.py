"""python -m es_jax.evaluate --workdir=RUN [--tasks=a,b] [--steps=0,100 | --every=K] [--kl] [--drift] [--json]

Evaluates steps of a run (or a model: --workdir=FOLDER --base=MODEL) on held-out rows: accuracy by the published grader,
by the strict one and, for multiple choice, by likelihood, with standard errors, and what a drop is made of; KL from the
base model; drift of the weights. A step needs no checkpoint. What is finished is not done again, so the same command
goes on after an interruption. Writes evals/<task>.jsonl, evals/kl.jsonl and evals/drift.jsonl (docs/evaluate.md).
On several hosts the same command runs on all, with one --workdir on a file system that they share, as for training:
--distributed, or --coordinator_address=HOST:PORT, --num_processes and --process_id. With --json one line is printed:

    out, warnings, tasks ({task: rows}), kl (rows), drift (rows)
"""

import json
import logging
import sys
from typing import Any

from absl import app, flags

from es_jax.core.flags import define_processes, joined_processes


def main(argv: list[str]) -> None:
    """Flags → evaluate_run()."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax, on opening checkpoints to read them
    with joined_processes("es_jax.evaluate"):
        _evaluate()


def _evaluate() -> None:
    from es_jax.core import processes
    from es_jax.evals.runner import Options, evaluate_run

    given = flags.FLAGS
    options: dict[str, Any] = {name: given[name].value for name in _OPTIONS}
    try:
        result = evaluate_run(
            given.workdir,
            tasks=given.tasks or None,
            every=given.every,
            steps=whole_numbers(given.steps),
            kl=given.kl,
            drift=given.drift,
            base=given.base,
            out=given.out,
            options=Options(**options),
        )
    except (ValueError, OSError) as error:
        if given.traceback:
            raise
        sys.exit(f"es_jax.evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit("es_jax.evaluate: interrupted; the same command goes on behind what is finished")
    if processes.first():
        print(json.dumps(result) if given.json else report(result))


def whole_numbers(steps: list[str] | None) -> list[int] | None:
    """The steps of --steps."""
    try:
        return [int(step) for step in steps] if steps else None
    except ValueError:
        given = ",".join(steps or ())
        raise ValueError(f"--steps is {given!r}: give whole numbers with commas, as in --steps=0,50,100") from None


def report(result: dict[str, Any]) -> str:
    """The result as text: a table a task, then KL and drift."""
    lines = []
    for task, rows in result["tasks"].items():
        lines += [task, _table(rows, ACCURACY)]
    if result["kl"]:
        lines += ["KL(base ‖ now), nats a token", _table(result["kl"], KL)]
    if result["drift"]:
        lines += ["drift", _table(result["drift"], DRIFT)]
    return "\n".join([*lines, f"rows in {result['out']}"])


def _pm(name: str) -> Any:
    def cell(row: dict[str, Any]) -> str:
        if row.get(name) is None:
            return "–"
        error = row.get(f"{name}_se")
        return f"{row[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")

    return cell


ACCURACY = {
    "step": _pm("step"),
    "accuracy": _pm("accuracy"),
    "change": _pm("accuracy_change"),
    "of format": _pm("lost_format"),
    "truncation": _pm("lost_truncation"),
    "knowledge": _pm("lost_knowledge"),
    "strict": _pm("strict"),
    "loglik": _pm("loglik"),
    "well-formed": _pm("well_formed"),
    "truncated": _pm("truncated"),
    "length": _pm("mean_length"),
}
KL = {name: _pm(name) for name in ("step", "task", "kl", "kl_exact", "kl_token", "kl_exact_token")} | {
    "task": lambda row: row["task"]
}
DRIFT = {name: _pm(name) for name in ("step", "norm", "predicted", "ratio", "relative", "kappa", "largest")} | {
    "in": lambda row: row["largest_in"]
}


def _table(rows: list[dict[str, Any]], columns: dict[str, Any]) -> str:
    cells = [list(columns), *([str(cell(row)) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


_OPTIONS = ("size", "max_prompt_tokens", "max_new_tokens", "slots", "data_dir", "kl_size", "kl_tokens", "kl_seed")


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "A run's directory; or a model folder, .gguf file or hub name.", required=True)
    flags.DEFINE_list("tasks", None, "Tasks by name, with commas; those that the run evaluated, by default.")
    flags.DEFINE_list("steps", None, "Steps, with commas. Step 0, the base model, is always among them.")
    flags.DEFINE_integer("every", None, "Steps 0, K, 2K, … and the last; the run's evals.every by default.")
    flags.DEFINE_bool("kl", False, "Measure KL(base ‖ now) on continuations of each task's prompts.")
    flags.DEFINE_bool("drift", False, "Measure ‖θ − θ₀‖ beside the closed form.")
    flags.DEFINE_string("base", None, "Of a model: what it was trained from. It becomes step 0, the model step 1.")
    flags.DEFINE_string("out", None, "The folder to write; workdir/evals by default, where workdir is a folder.")
    flags.DEFINE_integer("size", None, "Test rows of each task; the run's evals.rows by default.")
    flags.DEFINE_integer("max_prompt_tokens", None, "The longest prompt allowed, in tokens; the run's by default.")
    flags.DEFINE_integer("max_new_tokens", None, "Tokens after which a completion is cut; the run's by default.")
    flags.DEFINE_integer("slots", None, "Prompts decoded at once; the run's by default.")
    flags.DEFINE_string("data_dir", None, "A folder of folders of rows, named like their tasks.")
    flags.DEFINE_integer("kl_size", None, "Rows of each task to measure KL on; all by default.")
    flags.DEFINE_integer("kl_tokens", 256, "The longest continuation for KL, in tokens.")
    flags.DEFINE_integer("kl_seed", 0, "Of the continuations for KL.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")


def entry() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    entry()
