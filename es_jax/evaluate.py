"""python -m es_jax.evaluate --workdir=RUN [--tasks=a,b] [--steps=0,best | --every=K] [--kl] [--drift] [--json]
python -m es_jax.evaluate --workdir=RUN --lm_eval=a,b [--lm_eval_include=FOLDER] [--lm_eval_limit=N]

Evaluates steps of a run (or a model: --workdir=FOLDER --base=MODEL) on held-out rows: accuracy by the published grader,
by the strict and the robust one and, for multiple choice, by likelihood, with standard errors, and what a drop is made
of; pass@k and the majority's vote of --samples=N --temperature=T; KL from the base model; drift of the weights. A step
needs no checkpoint. What is finished is not done again, so the same command goes on after an interruption. Writes
evals/<task>.jsonl, evals/samples/, evals/kl.jsonl and evals/drift.jsonl (docs/evaluate.md). With --lm_eval it evaluates
on tasks of lm-evaluation-harness and writes evals/lm_eval.jsonl; its own tasks only if --tasks, --samples, --kl or
--drift asks for them.
On several hosts the same command runs on all, with one --workdir on a file system that they share, as for training:
--distributed, or --coordinator_address=HOST:PORT, --num_processes and --process_id. With --json one line is printed:

    out, warnings, tasks ({task: rows}), samples ({task: rows}), kl (rows), drift (rows), with --lm_eval lm_eval (rows)
"""

import dataclasses
import json
import sys
from typing import Any

from absl import app, flags

from es_jax.core.extras import require
from es_jax.core.flags import command, define_processes, parser
from es_jax.core.text_table import aligned

BEST = "best"  # of --steps

RENAMED = {"size": "rows", "kl_size": "kl_rows", "max_new": "max_new_tokens", "max_prompt": "max_prompt_tokens"}


def main(argv: list[str]) -> None:
    """Flags → evaluate_run()."""
    with command("es_jax.evaluate", argv) as values:
        from es_jax.core import processes  # JAX starts only when the flags are good
        from es_jax.evals.runner import Options, evaluate_run

        options: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
        arguments: dict[str, Any] = {name: values[name].value for name in ("every", "base", "out")}
        arguments["steps"], harness = whole_numbers(values.steps), harness_options(values)
        result: dict[str, Any] = {"warnings": [], "tasks": {}, "samples": {}, "kl": [], "drift": []}
        try:
            if own_tasks(values):
                measured = {"tasks": values.tasks or None, "kl": values.kl, "drift": values.drift}
                result |= evaluate_run(values.workdir, options=Options(**options), **measured, **arguments)
            if harness:
                from es_jax.evals.harness import HarnessOptions, evaluate_harness

                own = evaluate_harness(values.workdir, values.lm_eval, options=HarnessOptions(**harness), **arguments)
                result |= own | {"warnings": result["warnings"] + own["warnings"]}
        except KeyboardInterrupt:
            sys.exit("es_jax.evaluate: interrupted; the same command goes on after what is finished")
        if processes.first():
            print(json.dumps(result) if values.json else report(result))


def whole_numbers(steps: list[str] | None) -> list[int | str] | None:
    """The steps of --steps."""
    try:
        return [step if step == BEST else int(step) for step in steps or ()] or None
    except ValueError:
        text = ",".join(steps or ())
        raise ValueError(
            f"--steps is {text!r}: give whole numbers with commas, as in --steps=0,50,100, or best"
        ) from None


HARNESS = ("lm_eval_include", "lm_eval_limit", "lm_eval_max_length", "num_fewshot", "apply_chat_template")
# What means nothing for tasks of --lm_eval.
OWN = (
    *("rows", "max_prompt_tokens", "max_new_tokens", "data_dir", "kl_rows", "kl_tokens", "kl_seed"),
    *("temperature", "top_p", "sample_seed"),
)


def own_tasks(values: Any) -> bool:
    """Whether something other than --lm_eval is to be done."""
    return bool(values.tasks or values.samples or values.kl or values.drift or not values.lm_eval)


def harness_options(values: Any) -> dict[str, Any]:
    """The options of --lm_eval; {} without it. ValueError for a flag that means nothing then."""
    given = [name for name in (OWN if values.lm_eval else HARNESS) if values[name].present]
    if not values.lm_eval:
        if given:
            raise ValueError(f"--{given[0]} is of --lm_eval, which is not given: name tasks with --lm_eval=a,b")
        return {}
    if given and not own_tasks(values):
        raise ValueError(f"--{given[0]} is not of --lm_eval: there are {', '.join(f'--{name}' for name in HARNESS)}")
    require("lm_eval")
    options = {name.removeprefix("lm_eval_"): values[name].value for name in HARNESS}
    return options | {name: values[name].value for name in ("slots", "template_date")}


def report(result: dict[str, Any]) -> str:
    """The result as text: a table a task, then KL and drift."""
    tables = [(task, rows, ACCURACY) for task, rows in result["tasks"].items()]
    tables += [sampled_table(task, rows) for task, rows in result["samples"].items()]
    tables += [("KL(base ‖ now), nats a token", result["kl"], KL)] if result["kl"] else []
    tables += [("drift", result["drift"], DRIFT)] if result["drift"] else []
    tables += [("lm_eval", beside_base(result["lm_eval"]), LM_EVAL)] if result.get("lm_eval") else []
    texts = [f"{title}\n{_table(rows, columns)}\n" for title, rows, columns in tables]
    return "".join(texts) + f"rows in {result['out']}"


def sampled_table(task: str, rows: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """Title, rows and columns of the table of a task's samples: pass@k of k = 1, 2, 4, … and n, and the majority."""
    n, parts = rows[0]["samples"], ("pass_at_k", "pass_at_k_se", "pass_at_k_change", "pass_at_k_change_se")
    shown = sorted({n, *(2**i for i in range(n.bit_length()))})
    cells = [
        row | {part.replace("_at_k", f"@{k}"): row[part][k - 1] for part in parts if part in row for k in shown}
        for row in rows
    ]
    columns = {"step": "step"} | {f"pass@{k}": f"pass@{k}" for k in shown} | {f"majority@{n}": "majority"}
    columns |= {f"change of pass@{k}": f"pass@{k}_change" for k in sorted({1, n})}
    columns |= {"of the majority": "majority_change"}
    how = f"{n} samples a row, temperature {rows[0]['temperature']:g}, top_p {rows[0]['top_p']:g}"
    return f"{task}, {how}", cells, columns


# The columns of the tables: heading → name in a row.
ACCURACY = {name: name for name in ("step", "accuracy")}
ACCURACY |= {"change": "accuracy_change", "of format": "lost_format", "truncation": "lost_truncation"}
ACCURACY |= {"knowledge": "lost_knowledge", "by it alone": "lost_alone", "strict": "strict", "robust": "robust"}
ACCURACY |= {"loglik": "loglik", "well-formed": "well_formed"}
ACCURACY |= {"truncated": "truncated", "length": "mean_length"}
KL = {name: name for name in ("step", "task", "kl", "kl_exact", "kl_token", "kl_exact_token")}
DRIFT = {name: name for name in ("step", "norm", "predicted", "ratio", "relative", "kappa", "largest")}
DRIFT["in"] = "largest_in"
LM_EVAL = {name: name for name in ("task", "metric", "filter", "step", "value", "change", "n")}


def beside_base(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of lm_eval by task and metric, with the change since step 0."""
    key = lambda row: tuple(row[name] for name in ("task", "metric", "filter"))  # noqa: E731
    base = {key(row): row["value"] for row in rows if row["step"] == 0}
    found = []
    for row in sorted(rows, key=lambda row: (*key(row), row["step"])):
        then, now = base.get(key(row)), row["value"]
        change = None if None in (then, now) or not row["step"] else now - then
        found.append(row | {"value_se": row["stderr"], "change": change})
    return found


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    cells = [list(columns), *([_cell(row, name) for name in columns.values()] for row in rows)]
    return "\n".join(f"  {line}" for line in aligned(cells, str.rjust))


def _cell(row: dict[str, Any], name: str) -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    if value is None:
        return "–"
    text = value if isinstance(value, str) else f"{value:.4g}"
    return text + ("" if error is None else f" ± {error:.2g}")


def entry() -> None:
    flags.DEFINE_string("workdir", None, "A run's directory; or a model folder, .gguf file or hub name.", required=True)
    flags.DEFINE_list("tasks", None, "Tasks by name, with commas; those that the run evaluated, by default.")
    flags.DEFINE_list("steps", None, "Steps, with commas, or best. Step 0, the base model, is always among them.")
    flags.DEFINE_integer("every", None, "Steps 0, K, 2K, … and the last; the run's evals.every by default.")
    flags.DEFINE_bool("kl", False, "Measure KL(base ‖ now) on continuations of each task's prompts.")
    flags.DEFINE_bool("drift", False, "Measure ‖θ − θ₀‖ beside the closed form.")
    flags.DEFINE_string("base", None, "Of a model: what it was trained from. It becomes step 0, the model step 1.")
    flags.DEFINE_string("out", None, "The folder to write; workdir/evals by default, where workdir is a folder.")
    flags.DEFINE_integer("rows", None, "Test rows of each task; the run's evals.rows by default.")
    flags.DEFINE_integer("max_prompt_tokens", None, "The longest prompt allowed, in tokens; the run's by default.")
    flags.DEFINE_integer("max_new_tokens", None, "Tokens after which a completion is cut; the run's by default.")
    flags.DEFINE_integer("slots", None, "Prompts decoded at once; the run's by default.")
    flags.DEFINE_string("data_dir", None, "A folder of folders of rows, named like their tasks.")
    flags.DEFINE_string("template_date", None, "The day that the chat template sees, YYYY-MM-DD; the run's by default.")
    flags.DEFINE_integer("kl_rows", None, "Rows of each task to measure KL on; all by default.")
    flags.DEFINE_integer("kl_tokens", 256, "The longest continuation for KL, in tokens.")
    flags.DEFINE_integer("kl_seed", 0, "Of the continuations for KL.")
    flags.DEFINE_integer("samples", None, "Completions of each row to sample, for pass@k and the majority's vote.")
    flags.DEFINE_float("temperature", None, "Of the samples; 1 by default.")
    flags.DEFINE_float("top_p", None, "Of the samples: the likeliest tokens with this probability; 1, all, by default.")
    flags.DEFINE_integer("sample_seed", None, "Of the samples; 0 by default.")
    flags.DEFINE_list("lm_eval", None, "Tasks of lm-evaluation-harness, with commas; it needs the extra [lm_eval].")
    flags.DEFINE_string("lm_eval_include", None, "A folder of task files (.yaml) of your own, for --lm_eval.")
    flags.DEFINE_integer("lm_eval_limit", None, "Rows of each task of --lm_eval: its first ones; all by default.")
    flags.DEFINE_integer("lm_eval_max_length", None, "Tokens of context for --lm_eval; the model's by default.")
    flags.DEFINE_integer("num_fewshot", None, "Solved examples in a prompt of --lm_eval; the task's by default.")
    flags.DEFINE_bool("apply_chat_template", False, "Put the prompts of --lm_eval through the chat template.")
    define_processes()
    flags.DEFINE_bool("json", False, "Print the result as one line of JSON.")
    flags.DEFINE_bool("traceback", False, "Show where an error came from.")
    app.run(main, flags_parser=parser("es_jax.evaluate", renamed=RENAMED))


if __name__ == "__main__":
    entry()
