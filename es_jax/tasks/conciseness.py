"""Conciseness: answer a short question in about as many characters as the reference (arXiv 2509.24372)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from es_jax.tasks.rows import read_examples
from es_jax.tasks.task import Example, Score, Splits, messages, response_text, take

TRAIN = """\
Which planet do we live on? Earth
How many legs does a spider have? 8
What is the capital of Portugal? Lisbon
What is the chemical symbol of iron? Fe
Which animal makes honey? Bees
What do you get when water freezes? Ice
What is nine times seven? 63
Who wrote the play Macbeth? William Shakespeare
Which ocean lies between Africa and Australia? Indian Ocean
What is the largest mammal? Blue whale
How many minutes are there in two hours? 120
In which country is the city of Kyoto? Japan
What is the opposite of north? South
Which gas makes up most of the air? Nitrogen
Is a tomato a plant or an animal? Plant
What colour are emeralds? Green
Which month comes after April? May
What instrument has 88 keys? Piano
What is the square root of 144? 12
What is a young cat called? Kitten
On which continent is Peru? South America
Which organ pumps blood through the body? Heart
Who painted the Mona Lisa? Leonardo da Vinci
What language is spoken in Brazil? Portuguese
"""
TEST = """\
Which star is closest to our planet? The Sun
What is the capital of Kenya? Nairobi
How many sides does a hexagon have? 6
What is the chemical symbol of gold? Au
Which bird is the largest alive? Ostrich
What is fifteen plus twenty-six? 41
Who wrote the novel Emma? Jane Austen
What is a young dog called? Puppy
In which country is the city of Marseille? France
What is the opposite of hot? Cold
Which month comes before November? October
How many days does a leap year have? 366
Which planet is known for its large rings? Saturn
What is frozen rain that falls in balls called? Hail
Which metal is liquid at room temperature? Mercury
On which continent is Mongolia? Asia
"""


@dataclass(frozen=True)
class Conciseness(Splits):
    """The conciseness task: reward = −|len(response) − len(target)|, in characters, at most 0.

    Args:
      data_dir: folder with train and test rows in the verl layout, the target text being
        `reward_model.ground_truth`. None: the 24 training and 16 test questions of this file.

    >>> task = Conciseness()
    >>> example = task.train(1)[0]
    >>> task.score(example, "It is Earth")
    Score(reward=-6.0, parts={'answer': 1.0, 'length': 11.0})
    """

    data_dir: str | Path | None = None

    name: ClassVar[str] = "conciseness"

    def _examples(self, split: str, n: int | None) -> list[Example]:
        if self.data_dir is not None:
            return read_examples(self.data_dir, split, n)
        lines = (TRAIN if split == "train" else TEST).splitlines()
        examples = [
            Example(f"{split}-{at}", messages(user=f"{question}?"), answer)
            for at, (question, answer) in enumerate(line.split("? ") for line in lines)
        ]
        return take(examples, n, source=f"the built-in {split} split of conciseness")

    def score(self, example: Example, completion: str) -> Score:
        """Compares the lengths, without any cleaning of the response; `answer` is 1 if it contains the target, in upper
        or lower case."""
        if example.answer is None:
            raise ValueError(f"example {example.id!r} has no answer: give it a target text, which conciseness needs")
        response = response_text(example, completion)
        right = float(example.answer.casefold() in response.casefold())
        reward = -float(abs(len(response) - len(example.answer)))
        return Score(reward, {"answer": right, "length": float(len(response))})
