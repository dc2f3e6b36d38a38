"""GSM8K's graders against completions worked out by hand, hostile ones among them."""

import time
from fractions import Fraction

import pytest

from es_jax.tasks import Example, get_task
from es_jax.tasks.gsm8k import final_number, number

LONG = 100_000
HUGE = "9" * 4000

CASES = [  # (completion, the right answer, paper, format, strict)
    ("48 + 24 = 72\n#### 72", "72", 1, 1, 1),
    ("#### 72", "72", 1, 1, 1),
    ("#### 72\n", "72", 1, 1, 1),
    ("#### 72  \n\n \t\n", "72", 1, 1, 1),
    ("  #### 72", "72", 1, 1, 1),
    ("so\r\n#### 72\r\n", "72", 1, 1, 1),
    ("#### 71", "72", 0, 1, 0),
    ("####72", "72", 1, 1, 0),
    ("####  72", "72", 1, 1, 0),
    ("####\n72", "72", 1, 0, 0),
    ("#### 72.", "72", 1, 1, 0),
    ("#### 72 clips", "72", 1, 0, 0),
    ("#### $72", "72", 1, 0, 0),
    ("#### 72%", "72", 1, 0, 0),
    ("**#### 72**", "72", 1, 0, 0),
    ("the total is #### 72", "72", 1, 0, 0),
    ("#### 72\nThat is all.", "72", 1, 0, 0),
    ("#### 72\n#### 71", "72", 0, 1, 0),
    ("#### 71\n#### 72", "72", 1, 1, 1),
    ("#### 72\n#### unsure", "72", 1, 0, 0),
    ("### 72", "72", 1, 0, 0),  # the first number
    ("##### 72", "72", 1, 0, 0),
    ("48\n##### 72", "72", 1, 0, 0),  # more than four signs hold four
    ("48\n###### 72", "72", 1, 0, 0),
    ("48\n######## $72", "72", 1, 0, 0),
    ("48\n### 72", "72", 0, 0, 0),
    ("48 + 24 = 72\n#### $ 72", "72", 1, 0, 0),
    ("48 #### $ -72", "-72", 1, 0, 0),
    ("48 #### -$ 72", "-72", 0, 0, 0),
    ("48 #### **72**", "72", 1, 0, 0),
    ("48 #### ** $72.50 **", "72.5", 1, 0, 0),
    ("48 #### $$72$$", "72", 1, 0, 0),
    ("48 #### %72", "72", 1, 0, 0),
    ("48 #### is 72", "72", 1, 0, 0),
    ("#### 1,234,567", "1234567", 1, 1, 1),
    ("#### 1234567.0000001", "1234567", 1, 1, 1),
    ("#### 72.000002", "72", 0, 1, 0),
    ("#### 72.000001", "72", 1, 1, 1),
    ("#### 144/2", "72", 0, 0, 1),
    ("#### 144 / 2", "72", 0, 0, 0),
    ("3 #### $1/$2", "0.5", 1, 0, 0),
    ("3 #### $1 / $2", "0.5", 0, 0, 0),
    (r"3 #### \$1/\$2", "0.5", 0, 0, 0),
    ("3 #### 1/$", "1", 1, 0, 0),
    ("#### 1/.5", "2", 0, 0, 1),
    ("#### 1/0", "1", 1, 0, 0),
    ("#### 5/0.0", "72", 0, 0, 0),
    ("#### -10", "-10", 1, 1, 1),
    ("#### +10", "10", 1, 0, 1),
    ("#### -$10", "-10", 0, 0, 0),
    ("#### $-10", "-10", 1, 0, 0),
    ("#### −10", "-10", 0, 0, 0),  # a minus sign outside ASCII is not a sign
    ("#### .5", "0.5", 0, 1, 1),
    ("####.5", "0.5", 0, 1, 0),
    ("3 #### $.5", "0.5", 0, 0, 0),
    ("3 #### -.5", "-0.5", 0, 0, 0),
    ("#### ...72", "72", 1, 1, 0),  # no leading point
    ("so...72", "72", 1, 0, 0),
    ("so..72", "72", 1, 0, 0),
    ("so ...72 of 80", "72", 1, 0, 0),
    ("No.5: 72", "5", 1, 0, 0),
    ("é.5", "5", 1, 0, 0),
    ("about .5", "0.5", 0, 0, 0),
    ("(.5)", "0.5", 0, 0, 0),
    ("3...5", "3", 1, 0, 0),
    ("#### 1e3", "1000", 0, 0, 0),
    ("#### NaN", "72", 0, 0, 0),
    ("#### inf", "72", 0, 0, 0),
    ("#### 10**10000", "72", 0, 0, 0),
    ("#### ٧٢", "72", 1, 0, 0),
    ("#### ７２", "72", 1, 0, 0),
    ("#### 7²", "7", 1, 0, 0),
    ("#### 0x48", "72", 0, 0, 0),
    ("", "72", 0, 0, 0),
    ("no number", "72", 0, 0, 0),
    ("72", "72", 1, 0, 0),
    ("It is $72.50 in all", "72.5", 1, 0, 0),
    ("First 48, then 72", "72", 0, 0, 0),
    ("covid-19", "19", 0, 0, 0),
    ("from 9 to -19", "9", 1, 0, 0),
    ("below -19 degrees", "-19", 1, 0, 0),
    ("x72", "72", 1, 0, 0),
    (r"\boxed{72}", "72", 1, 0, 0),
    (r"48 and \boxed{72}", "72", 1, 0, 0),
    (r"\boxed{71} or \boxed{72}", "72", 1, 0, 0),
    (r"\boxed{72} or \boxed{71}", "72", 0, 0, 0),
    (r"\boxed{\$72}", "72", 1, 0, 0),
    (r"\boxed{75\%}", "75", 1, 0, 0),
    (r"48 \boxed{$ 72}", "72", 1, 0, 0),
    (r"48 \boxed{\$ 72}", "72", 1, 0, 0),
    (r"48 \boxed{-\$72}", "-72", 0, 0, 0),
    (r"48 \boxed{$-72$}", "-72", 1, 0, 0),
    (r"\boxed{ 1,250.50 }", "1250.5", 1, 0, 0),
    (r"\boxed{{72}}", "72", 1, 0, 0),
    (r"\boxed{72\text{ clips}}", "72", 1, 0, 0),
    (r"5 are \boxed{\text{seventy-two}}", "5", 0, 0, 0),
    (r"5 are \boxed{72", "5", 1, 0, 0),  # never closed
    (r"#### 72 not \boxed{71}", "72", 1, 0, 0),
    ("48 <answer>72</answer>", "72", 1, 0, 0),
    ("48 <answer>\n72\n</answer>", "72", 1, 0, 0),
    ("48 <answer>$ 72</answer>", "72", 1, 0, 0),
    ("48 <answer>**72**</answer>", "72", 1, 0, 0),
    ("<answer>71</answer><answer>72</answer>", "72", 1, 0, 0),
    ("<answer>1<answer>72</answer>", "72", 0, 0, 0),
    ("<answer>72", "72", 1, 0, 0),
    ("48 <answer>it is 72</answer>", "48", 0, 0, 0),
    (r"\boxed{72} <answer>71</answer>", "72", 1, 0, 0),
    ("<think>#### 71</think>\n#### 72", "72", 1, 1, 1),
    ("#### 72</think>71", "71", 1, 0, 0),
    ("#### 72</think>nothing", "72", 0, 0, 0),
    ("a</think>#### 71</think>#### 72", "72", 1, 0, 0),
    ("72</think>", "72", 0, 0, 0),
    ("#### 71" + " " * 4096 + "72", "72", 1, 0, 0),
    ("#### 72" + " " * 4096, "72", 0, 1, 1),  # the marker is out of the tail; the last line is still what was asked
    ("#### 72\n" + "no " * 2000, "72", 0, 0, 0),
    ("72 in all\n#### ...", "72", 0, 0, 0),  # a marker that holds no number decides
    ("72 in all\n#### -", "72", 0, 0, 0),
    ("#### 71\n#### .", "71", 0, 0, 0),
    ("#### \n\n 72", "72", 1, 0, 0),
    ("71 ####\n72\n", "72", 1, 0, 0),
    ("#### 72,.-", "72", 1, 1, 0),
    ("#### 7,2", "72", 1, 1, 1),
    ("#### 72.5.1", "72.5", 1, 1, 0),
    ("#### 70-2", "70", 1, 1, 0),
    ("#### 70 - 2", "70", 1, 0, 0),
    ("#### --72", "-72", 1, 1, 0),
    ("#### 1-2", "-2", 0, 1, 0),
    ("x\r#### 72", "72", 1, 1, 0),  # "\r" ends a line, too
    ("#### 72 \\boxed{71} <answer>70</answer>", "72", 1, 0, 0),
    ("\\boxed{71} <answer>72</answer>", "71", 1, 0, 0),
    ("72 <answer>71</answer>", "71", 1, 0, 0),
    ("72 \\boxed{}", "72", 0, 0, 0),
    ("72 <answer></answer>", "72", 0, 0, 0),
    ("72 \\boxed{none} #### ≈ 71", "72", 0, 0, 0),
    ("48 \\BOXED\n{ 72 }", "72", 1, 0, 0),
    ("\\boxed{72 and \\boxed{71}", "72", 1, 0, 0),  # up to the first closing brace, from the first opening one
    ("\\boxed{x #### 72}", "72", 1, 0, 0),
    ("\\boxed{5 #### x72}", "72", 1, 0, 0),  # what follows the last ####
    ("\\boxed{144/2}", "72", 1, 0, 0),
    ("\\boxed{ -144/2\n}", "-72", 1, 0, 0),
    ("\\boxed{144/2 cups}", "144", 1, 0, 0),
    ("\\boxed{$1,440/20%}", "72", 1, 0, 0),
    ("\\boxed{144.0/2}", "144", 1, 0, 0),
    ("\\boxed{72/0}", "72", 0, 0, 0),
    ("\\boxed{+72}", "72", 1, 0, 0),
    ("\\boxed{- 72}", "72", 1, 0, 0),
    ("\\boxed{٧٢}", "72", 1, 0, 0),
    ("48 <ANSWER>72</ANSWER>", "48", 1, 0, 0),
    ("144/2", "72", 1, 0, 0),
    ("144/2 in all", "144", 1, 0, 0),
    ("of 7,000% 2", "7000", 1, 0, 0),
    ("7% 2", "7", 1, 0, 0),
    ("5 </THINK> 72", "5", 1, 0, 0),
    ("5</think>" + "x" * 4096 + "72", "72", 1, 0, 0),
    ("5</think>72" + "x" * 4090, "72", 1, 0, 0),
    ("72" + "x" * 4095, "2", 1, 0, 0),  # the first characters of what is taken
    ("#### " + HUGE, HUGE, 1, 1, 1),
    ("#### " + "9" * 5000, HUGE, 0, 1, 0),
    ("#### " + "1/3" * 1000, "72", 0, 0, 0),
    (f"#### {HUGE}/{HUGE}", "1", 0, 0, 0),
]

MONSTERS = {
    "digits": "9" * LONG,
    "commas": "1" + "," * LONG,
    "hashes": "#" * LONG,
    "markers": "#### " * LONG,
    "boxes": "\\boxed{" * LONG,
    "boxes of braces": "\\boxed{" + "{" * LONG + "}" * LONG,
    "answers": "<answer></answer>" * LONG,
    "open answers": "<answer>" * LONG,
    "thoughts": "</think>" * LONG,
    "white space": "####" + " " * LONG + "x",
    "newlines": "#### " + "\n" * LONG + "x",
    "slashes": "1/" * LONG,
    "dollars": "$" * LONG,
    "marks behind a marker": "####" + "$ %*{\\" * LONG,
    "dots": "." * LONG,
    "fractions of dollars": "$1/" * LONG,
    "points": "1." * LONG,
    "surrogates": "\ud800" * LONG,
    "nuls": "\0" * LONG,
}


@pytest.mark.parametrize(("completion", "answer", "paper", "form", "strict"), CASES)
def test_case(completion: str, answer: str, paper: int, form: int, strict: int) -> None:
    example = Example("0", "?", answer)
    for grader, verdict in (("paper", paper), ("strict", strict)):
        score = get_task("gsm8k", grader=grader).score(example, completion)
        assert {**score.parts, "robust": None} == {
            "answer": verdict, "format": form, "paper": paper, "strict": strict, "robust": None
        }  # fmt: skip
        assert score.reward == verdict + 0.1 * form


@pytest.mark.parametrize("name", MONSTERS)
def test_monster(name: str) -> None:
    task, start = get_task("gsm8k"), time.process_time()
    for end in ("", "\n", "\n#### 5"):
        score = task.score(Example("0", "?", "5"), MONSTERS[name] + end)
        assert score.parts["strict"] == (end == "\n#### 5")
    assert time.process_time() - start < 1


def test_only_the_asked_form_may_begin_in_the_prompts_open_turn() -> None:
    prompt = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "5 or 6?\n####"})
    assert set(get_task("gsm8k").score(Example("0", prompt, "72"), " 72").parts.values()) == {1}
    assert not any(get_task("gsm8k").score(Example("0", prompt, "5"), "").parts.values())
    closed = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "#### 5"})
    assert not any(get_task("gsm8k").score(Example("0", closed, "5"), " \n").parts.values())
    spoken = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "So: "})
    assert get_task("gsm8k").score(Example("0", spoken, "5"), "#### 5").parts["format"] == 1


def test_numbers() -> None:
    assert number("1,000/3") == Fraction(1000, 3) and number("1/.5") == 2 and number("$5%") == 5
    for text in ("", ".", "5.", "1//2", "1/2/3", "--1", "1e5", "nan", "1_000", "٣", "9" * 5000):
        assert number(text) is None, text
    assert final_number("a 1/0 b 3") == 1


def test_an_example_of_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'7' has the answer 'True': it must be a number for gsm8k"):
        get_task("gsm8k").score(Example("7", "?", "True"), "1")
