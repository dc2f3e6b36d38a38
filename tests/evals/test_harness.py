"""lm-evaluation-harness on runs and models: its rows, what is not done again, what it warns of and refuses."""

import json
import subprocess
import sys

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'es_jax[lm_eval]'")

from es_jax.evals.harness import HarnessOptions, evaluate_harness, harness_lm  # noqa: E402
from es_jax.evaluate import report  # noqa: E402
from es_jax.plotting.runs import read_run  # noqa: E402
from es_jax.rundir.metrics import read_jsonl  # noqa: E402
from es_jax.training.loop import run  # noqa: E402
from es_jax.weights.model import load_model  # noqa: E402
from tests.helpers import TWO_STEPS, config_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library and what it imports

METRICS = {"choice": "acc", "cloze": "acc", "listed": "acc", "rolling": "bits_per_byte", "writing": "exact_match"}
BODIES = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
    "cloze": {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} {{answer}}"},
    "listed": {"output_type": "loglikelihood", "doc_to_target": "{{answer}}"},
    "writing": {"output_type": "generate_until", "doc_to_target": "{{answer}}"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files over local rows. YAML is a superset of JSON."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{a}+{b}=", "choices": [str(a + b), "no", "none"], "gold": 0, "answer": answer}
        for a, b, answer in ((1, 2, "3"), (2, 2, "[4]"), (3, 5, "8"), (4, 5, "9"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in BODIES.items():
        metric = {"metric": METRICS[name], "higher_is_better": name != "rolling"}
        metric["aggregation"] = "bits_per_byte" if name == "rolling" else "mean"
        fields = {
            "task": f"my_{name}", "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "doc_to_text": "{{question}}",
            "metric_list": [metric], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(fields | body))
    return folder


@pytest.fixture(scope="module")
def workdir(tiny_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run(config_of(tiny_model, TWO_STEPS, es={"rewards": "random"}), workdir)
    return workdir


def test_every_kind_of_task_on_a_runs_steps(workdir, folder, monkeypatch):
    options = HarnessOptions(include=str(folder))
    ask = dict(steps=[2], options=options)
    found = evaluate_harness(workdir, ["my_choice", "my_cloze"], **ask)
    rows = found["lm_eval"]
    assert [(row["step"], row["task"], row["metric"]) for row in rows] == [
        (step, task, "acc") for step in (0, 2) for task in ("my_choice", "my_cloze")
    ]
    assert all(row["n"] == 4 and row["filter"] == "none" and row["higher_is_better"] for row in rows)
    assert rows[0]["stderr"] is not None and read_jsonl(workdir / "evals" / "lm_eval.jsonl") == rows
    assert found["warnings"] == []
    with monkeypatch.context() as patch:  # it goes on with what is new
        patch.setattr(lm_eval, "evaluate", None)
        assert evaluate_harness(workdir, ["my_choice", "my_cloze"], **ask)["lm_eval"] == rows
        assert evaluate_harness(f"{workdir}@2", ["my_choice", "my_cloze"], options=options)["lm_eval"] == rows
    found = evaluate_harness(workdir, ["my_rolling", "my_writing"], **ask)
    assert "first row is not a list" in found["warnings"][1] and "'my_writing'" in found["warnings"][1]
    more = found["lm_eval"]
    assert [row["metric"] for row in more] == ["bits_per_byte", "exact_match"] * 2
    assert more[0]["value"] != more[2]["value"] and more[0]["stderr"] is None
    text = report({"out": "evals", "tasks": {}, "samples": {}, "kl": [], "drift": [], "lm_eval": more})
    assert "my_rolling  bits_per_byte    none     2" in text
    with pytest.raises(ValueError, match=r"has my_choice with other prompts, .* num_fewshot, .*another --out"):
        evaluate_harness(workdir, ["my_choice"], steps=[0], options=HarnessOptions(include=str(folder), num_fewshot=1))
    assert read_run(workdir).evals == {}  # the report reads the run all the same


def test_the_librarys_own_function_takes_the_model(tiny_model, folder, tmp_path):
    """A model folder has step 0 alone, whose figures are those of `simple_evaluate`; with the chat template too."""
    options = HarnessOptions(include=str(folder), apply_chat_template=True, num_fewshot=1, limit=3)
    ours = evaluate_harness(tiny_model, ["my_choice"], out=tmp_path, options=options)["lm_eval"]
    manager = lm_eval.tasks.TaskManager(include_path=str(folder))
    theirs = lm_eval.simple_evaluate(
        model=harness_lm(load_model(tiny_model)), tasks=["my_choice"], task_manager=manager, num_fewshot=1, limit=3,
        apply_chat_template=True, bootstrap_iters=0,
    )  # fmt: skip
    prompt = theirs["samples"]["my_choice"][0]["arguments"][0][0]
    assert prompt.count("<|im_start|>") == 4 and prompt.endswith("<|im_start|>assistant\n")
    assert [row["value"] for row in ours] == [theirs["results"]["my_choice"]["acc,none"]]
    assert ours[0]["n"] == 3 and ours[0]["num_fewshot"] == 1


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["my_choic"], {}, r"no task, group or tag 'my_choic'; did you mean 'my_choice'\?"),
        (["my_listed"], {}, r"asks for the likelihood of \[4\] in row 1, which is not a text"),
        (["my_writing"], {"max_length": 3}, "the task 'my_writing' of lm_eval: up to 3 tokens are generated, and the"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(tasks, options, message, tiny_model, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate_harness(tiny_model, tasks, out=tmp_path, options=HarnessOptions(include=str(folder), **options))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_no_torch_is_needed(tiny_model, folder, tmp_path):
    """By the command, as where torch is not installed; one line of JSON is all that it prints."""
    code = (
        "import sys; from importlib.machinery import PathFinder; find = PathFinder.find_spec\n"
        "hidden = lambda cls, name, *more: None if name == 'torch' else find(name, *more)\n"
        "PathFinder.find_spec = classmethod(hidden)\n"
        "from es_jax import evaluate\n"
        f"sys.argv = ['evaluate', '--workdir={tiny_model}', '--lm_eval=my_cloze', '--lm_eval_include={folder}',"
        f" '--out={tmp_path}', '--lm_eval_limit=2', '--json']\n"
        "try:\n    evaluate.entry()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert [row["task"] for row in found["lm_eval"]] == ["my_cloze"] and found["tasks"] == {}
