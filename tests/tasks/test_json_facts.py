"""The task of JSON facts: its grading, its rows, and that both splits show different names and cities."""

import json

import pytest

from es_jax.tasks import Example, get_task
from es_jax.tasks.json_facts import CITIES, NAMES

EXAMPLE = Example("0", "?", '{"name": "Tom", "age": 47}')
RIGHT = '{"name": "Tom", "age": 47}'


@pytest.mark.parametrize(
    ("completion", "keys", "share"),
    [
        (RIGHT, 1.0, 1.0),
        ('\n{\n  "age": 47,\n  "name": "Tom"\n}\n', 1.0, 1.0),  # layout and order are free
        ('{"name": "Tom", "age": "47"}', 1.0, 1.0),
        ('{"name": "Tom", "age": 48}', 0.5, 1.0),
        ('{"name": "tom", "age": 47}', 0.5, 1.0),
        ('{"name": ["Tom"], "age": {"age": 47}}', 0.0, 1.0),
        ('{"name": "Tom", "age": 47.5}', 0.5, 1.0),
        ('{"name": "Tom"}', 0.5, 1.0),
        ('{"name": "Tom", "age": 47, "city": "Oslo", "job": null}', 0.5, 1.0),
        ('{"name": "Tim", "name": "Tom", "age": 47}', 2 / 3, 1.0),
        (RIGHT + "x" * len(RIGHT), 1.0, 0.5),
        ("x" * len(RIGHT) + RIGHT, 1.0, 0.5),
        (f"{RIGHT}{RIGHT}", 1.0, 0.5),
        (f"```json\n{RIGHT}\n```", 1.0, len(RIGHT) / (len(RIGHT) + 12)),
        ("{}", 0.0, 1.0),
        ("", 0.0, 0.0),
        ("Tom is 47.", 0.0, 0.0),
        (RIGHT[:-1], 0.0, 0.0),  # cut
        ("{'name': 'Tom', 'age': 47}", 0.0, 0.0),  # Python's, not JSON
        ('{"a":' * 100_000, 0.0, 0.0),
        ('{"age": ' + "9" * 10_000 + "}", 0.0, 0.0),
        ("\ud800", 0.0, 0.0),
    ],
)
def test_grading(completion: str, keys: float, share: float) -> None:
    score = get_task("json-facts").score(EXAMPLE, completion)
    assert score.parts == {"answer": float(keys * share == 1), "keys": keys, "object": pytest.approx(share)}
    assert score.reward == pytest.approx(keys * share)


def test_the_turn_may_be_open() -> None:
    prompt = ({"role": "user", "content": "?"}, {"role": "assistant", "content": '{"name": '})
    assert get_task("json-facts").score(Example("0", prompt, RIGHT), '"Tom", "age": 47}').reward == 1


@pytest.mark.parametrize("answer", [None, "{}", "[1]", "3"])
def test_a_reference_that_is_no_object_is_named(answer: str | None) -> None:
    with pytest.raises(ValueError, match=r"example 'row' has the answer .*: it must be a JSON object"):
        get_task("json-facts").score(Example("row", "?", answer), RIGHT)


def test_rows() -> None:
    task = get_task("json-facts")
    train, test = task.train(), task.test()
    assert (len(train), len(test)) == (500, 200)
    assert task.train(3) == train[:3] != get_task("json-facts", seed=1).train(3)
    for example in [*train, *test]:
        (name, city, age, *keys), content = example.id.split("-"), example.prompt[0]["content"]
        assert content == f'{name} lives in {city} and is {age}. JSON with the keys "{keys[0]}" and "{keys[1]}"?'
        assert list(json.loads(example.answer)) == keys and task.score(example, example.answer).reward == 1
    for words in (NAMES, CITIES):
        assert not {*words["train"].split()} & {*words["test"].split()}
    with pytest.raises(ValueError, match="n is 70000, but json-facts has 62496 test rows: ask for at most 62496"):
        task.test(70_000)


@pytest.mark.unchecked
@pytest.mark.parametrize("seed", [1.5, True, "1"])
def test_a_seed_is_whole(seed: object) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed!r}: it should be a whole number"):
        get_task("json-facts", seed=seed)
