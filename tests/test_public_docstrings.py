"""The public names have docstrings of one form, which say what there is to say. tests/test_house.py runs the examples.

Examples that need PyTorch or lm_eval are marked `+SKIP`. They run here where the package is installed.
"""

import ast
import doctest
import importlib.util
import inspect
import re
import sys
import textwrap
import types

import jax
import pytest

import es_jax

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples")
NEEDS = {"verify_model": "torch", "evaluate_harness": "lm_eval", "harness_lm": "lm_eval"}  # of examples marked +SKIP
FROM_OUTSIDE = ("__init__", "__post_init__", "__call__")  # methods with these names are part of a class's use


def callables():
    """(name, object) of all public functions and classes, and of the public methods of these classes."""
    for name in es_jax.__all__:
        thing = getattr(es_jax, name)
        if isinstance(thing, types.ModuleType):
            own = vars(thing).items()
            yield from ((f"{name}.{key}", one) for key, one in own if inspect.isfunction(one) and key[0] != "_")
            continue
        yield name, thing
        if inspect.isclass(thing):
            yield from ((f"{name}.{key}", one) for key, one in methods(thing) if not key.startswith("__"))
            if "__call__" in vars(thing):
                yield f"{name}.__call__", vars(thing)["__call__"]


def methods(cls):
    """Those that es_jax defines, also in a base, by name."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("es_jax.")]
    found = {key: one for base in reversed(bases) for key, one in vars(base).items()}
    for key, one in found.items():
        one = one.__func__ if isinstance(one, classmethod | staticmethod) else one
        if key[0] != "_" and (isinstance(one, property) or inspect.isfunction(one)):
            yield key, one


THINGS = dict(callables())


def sections(thing):
    """Of each section of the docstring: the names of its items, in order; [] where it has none."""
    found, here = {}, None
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            here = found.setdefault(line[:-1], [])
        elif line and not line.startswith(" "):
            here = None
        elif here is not None and (item := re.match(r"  ([*\w.]+): \S", line)):
            here.append(item.group(1))
    return found


def parameters(thing):
    """As a caller gives them."""
    if isinstance(thing, property) or getattr(thing, "_is_protocol", False):
        return []
    known = inspect.signature(thing).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [stars.get(one.kind, "") + one.name for one in known]
    names = names if inspect.isclass(thing) else [name for name in names if name != "self"]
    return [name for name in names if name[0] != "_"]


def body(thing):
    """The syntax of a function, unwrapped."""
    function = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
    return ast.parse(textwrap.dedent(inspect.getsource(function))), sys.modules[function.__module__]


def raised(thing):
    """Names of the errors that a function raises, and of those that functions of its own module raise for it."""
    if inspect.isclass(thing):
        made = [vars(base)[key] for base in thing.__mro__ for key in FROM_OUTSIDE[:2] if key in vars(base)]
        own = [one for one in made if getattr(one, "__module__", "").startswith("es_jax.") and not generated(one)]
        return set().union(*map(raised, own)) if own else set()
    names, seen, left = set(), set(), [thing]
    while left:
        tree, module = body(left.pop())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if isinstance(error, ast.Name) and isinstance(getattr(module, error.id, None) or eval(error.id), type):
                    names.add(error.id)
            called = getattr(module, node.func.id, None) if isinstance(node, ast.Call) and name_of(node) else None
            if inspect.isfunction(called) and called.__module__ == module.__name__ and called not in seen:
                seen.add(called)
                left.append(called)
    return names


def name_of(call):
    return call.func.id if isinstance(call.func, ast.Name) else None


def generated(function):
    """Whether a dataclass made it."""
    return inspect.unwrap(function).__code__.co_filename.startswith("<")


@pytest.mark.parametrize("name", THINGS)
def test_a_docstring_says_all_there_is_to_say(name):
    thing = THINGS[name]
    found, text = sections(thing), inspect.getdoc(thing) or ""
    assert re.match(r"[^\n]+[.:!?](\n\n|$)", text), "its first line is not a sentence of its own"
    assert "Args" not in found or "Attributes" not in found, "two lists of one thing"
    given = [*found.get("Args", []), *found.get("Attributes", [])]
    if fields := parameters(thing):
        assert sorted(given) == sorted(fields)
    elif "Attributes" not in found:  # those of a class that is not made with them are not parameters
        assert not given
    missing = raised(thing) - set(found.get("Raises", []))
    assert not missing, f"it raises {missing} and does not say so"
    if not inspect.isclass(thing) and not isinstance(thing, property):
        returns = inspect.signature(thing).return_annotation
        nothing = returns is None or (name.endswith("__call__") and returns is inspect.Signature.empty)
        assert nothing or {"Returns", "Yields"} & set(found)


@pytest.mark.parametrize("name", es_jax.__all__)
def test_a_public_name_has_an_example_that_the_house_runs(name):
    thing = getattr(es_jax, name)
    text = inspect.getdoc(thing)
    assert "\nExamples:\n" in text
    module = sys.modules[thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__]
    own = module.__name__ if module is thing else f"{module.__name__}.{name}"
    tests = {test.name: test for test in doctest.DocTestFinder().find(module)}
    examples = tests[own].examples  # by the same finder as doctest.testmod's
    assert len(examples) == text.count("\n  >>> ") and examples
    skipped = [example for example in examples if example.options.get(doctest.SKIP)]
    assert bool(skipped) == (name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_examples_that_need_an_extra_run_where_it_is_there(name):
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    thing = getattr(es_jax, name)
    text = inspect.getdoc(thing).replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, dict(vars(sys.modules[thing.__module__])), name, None, 0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert doctest.DocTestRunner().run(test).failed == 0


def test_the_check_sees_what_is_missing():
    def f(x):
        """Raises.

        Args:
          x: a number.
        """
        if x:
            raise ValueError(x)

    assert raised(f) == {"ValueError"} and sections(f) == {"Args": ["x"]} and parameters(f) == ["x"]
