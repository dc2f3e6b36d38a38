"""The rules of the house: who may import whom, sizes, docstrings, and that what the README says runs."""

import ast
import doctest
import graphlib
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import es_jax
from tests.fast import FAST

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "es_jax"
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "es_jax."))
ENTRIES = ("train", "evaluate", "plan", "report", "export", "sample")

# Higher imports lower; those of one level do not import each other.
LEVELS = (
    ("core",),
    ("tasks",),
    ("models", "es", "optim"),
    ("weights", "generate"),
    ("profiling",),
    ("rundir",),
    ("scoring",),
    ("training",),
    ("evals", "plotting", "planning"),
    ENTRIES,
    ("sweep",),
    ("__main__",),
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FORBIDDEN = {"tasks": {"jax", "flax", "optax"}, "core": {"flax"}, "es": {"flax", "optax"}, "optim": {"flax"}}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_only_go_down():
    wrong = []
    for path in files():
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in FORBIDDEN.get(here, ()):
                wrong.append(f"{path.name} ({here}) imports {name}")
            if parts[0] == "es_jax" and parts[1] != here and LEVEL[parts[1]] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_files_and_functions_are_small():
    for path in files():
        assert len(path.read_text().splitlines()) <= 600, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_keys_are_made_in_one_file():
    makers = re.compile(r"random\.(key|PRNGKey|split)\(")
    allowed = {"core/rng.py", "models/transformer.py"}  # the second draws initial weights from a key it is given
    for path in files():
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
        assert not makers.search(code) or str(path.relative_to(PACKAGE)) in allowed, path


def test_public_names_are_importable_and_explained():
    for name in es_jax.__all__:
        thing = getattr(es_jax, name)
        assert inspect.getdoc(thing), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = es_jax.no_such_name


def test_importing_the_package_starts_nothing():
    code = "import es_jax, sys; assert not {'jax', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_docstrings_and_their_examples_run(name):
    module = importlib.import_module(name)
    if (module.__file__ or "").endswith("__init__.py") and not Path(module.__file__).read_text().strip():
        return
    assert module.__doc__, name
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert doctest.testmod(module).failed == 0


def test_the_python_blocks_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(block, "README.md", "exec"), {})  # our own text, not a model's


def test_make_targets_and_files_that_the_readme_names_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z0-9]+)", readme):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for name in re.findall(r"(?:configs|docs|dev|benchmarks|experiments|tests)/[\w/.-]+\.(?:py|md)", readme):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("entry", [e for e in (*ENTRIES, "sweep") if (PACKAGE / f"{e}.py").exists()])
def test_entry_points_explain_themselves(entry):
    command = [sys.executable, "-m", f"es_jax.{entry}", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})
    assert out.returncode == 0 and f"python -m es_jax.{entry} " in out.stdout


def test_no_two_files_import_each_other_in_a_circle():
    """Imports under TYPE_CHECKING and inside functions among them."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files()}
    uses = {
        name: {other for found in imports(path) for other in (found, found.rpartition(".")[0]) if other in names}
        - {name}
        for name, path in names.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(uses).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' imports '.join(reversed(error.args[1]))}") from None


def test_fast_tests_touch_every_package_and_every_law():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    texts = {name: (ROOT / "tests" / name).read_text() for name in FAST}
    assert packages == {name for name in packages if any(f"es_jax.{name}" in text for text in texts.values())}
    assert {f"laws/{path.name}" for path in (ROOT / "tests/laws").glob("test_*.py")} <= set(FAST)
    for file, names in FAST.items():
        for name in names:
            assert f"def {name.partition('[')[0]}" in texts[file], f"{file} has no {name}"


@pytest.mark.parametrize("name", ["run", "Engine", "load_model"])
def test_bare_installs_name_the_extra_that_is_missing(name):
    """As if nothing but jax, jaxtyping, numpy and optax were installed."""
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "transformers" else find(name, *more)
import es_jax, numpy
es_jax.Population(4, seed=0).members(1), es_jax.GaussianNoise(), es_jax.anchored_weight_decay, es_jax.theory
es_jax.z_score(numpy.arange(4.0))
assert not {{"flax", "transformers", "datasets", "ml_collections", "orbax"}} & set(sys.modules)
es_jax.{name}
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stderr.splitlines()[-1] == (
        "ImportError: transformers is not installed: install the extra [llm] by pip install 'es_jax[llm]'"
    )
