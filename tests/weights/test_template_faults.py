"""What chat templates do that would make another prompt than the messages say: dates, thoughts, copies, errors."""

import datetime

import pytest
import transformers.utils.chat_template_utils as library
from test_chat_templates import CHATML, FOLDED, NO_SYSTEM
from test_model import tiny_metadata

from es_jax.weights.boundary import encode_options
from es_jax.weights.chat_template import set_date
from es_jax.weights.gguf_tokenizer import from_gguf_metadata
from es_jax.weights.tokenizer import encode_prompt, render

USER = {"role": "user", "content": "Make 24, inside <think> and </think>."}
SYSTEM = {"role": "system", "content": "Be brief."}
OPENING = "I try.\n<think>"
TURN = "<|im_start|>assistant\n"
LOOP = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_with(template):
    return from_gguf_metadata({**tiny_metadata(), "tokenizer.chat_template": template})


def opened(template, opening, *before):
    messages = [*(before or [USER]), {"role": "assistant", "content": opening}]
    return render(tokenizer_with(template), messages)


def written_by_library(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# The day

DATED = {
    "llama 3.2": (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{% endif %}Today Date: {{ date_string }}",
        "Today Date: 02 Jan 2026",
    ),
    "llama 3.1": (
        "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "Today Date: {{ date_string }}",
        "Today Date: 02 Jan 2026",
    ),
    "smollm3": ("{%- set today = strftime_now('%d %B %Y') -%}Today: {{ today }}", "Today: 02 January 2026"),
    "granite": ("Today's Date: {{ strftime_now('%B %d, %Y') }}.", "Today's Date: January 02, 2026."),
    "mistral small": ("{% set today = strftime_now(format='%Y-%m-%d') %}It is {{ today }}", "It is 2026-01-02"),
    "seconds": ("{{ strftime_now('%H:%M:%S') }}", "00:00:00"),
    "macro": ("{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() }}", "Friday"),
}


@pytest.mark.parametrize("name", sorted(DATED))
def test_a_template_sees_the_date_of_its_tokenizer(name):
    template, text = DATED[name]
    tokenizer, other = tokenizer_with(template + LOOP), tokenizer_with(template + LOOP)
    set_date(tokenizer, "2026-01-02")
    set_date(other, "2025-12-31")
    assert render(tokenizer, [USER]) == f"{text}[user]{USER['content']}[assistant]"
    assert (render(other, [USER]) == render(tokenizer, [USER])) == (name == "seconds")
    assert render(tokenizer, [USER, {"role": "assistant", "content": "So"}]).startswith(text)
    assert encode_prompt(tokenizer, [USER]) == tokenizer.encode(render(tokenizer, [USER]))
    prompt, _ = encode_options(tokenizer, [USER], ["A", "B"])
    assert tokenizer.decode(prompt).startswith(text)


def test_the_date_stays_with_the_tokenizer(monkeypatch):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 6, 7, 8)

    monkeypatch.setattr(library, "datetime", Day)
    tokenizer = tokenizer_with("{{ strftime_now('%Y') }}{{ date_string }}" + LOOP)
    assert (
        render(tokenizer, [USER]) == written_by_library(tokenizer, [USER]) == f"2031[user]{USER['content']}[assistant]"
    )
    set_date(tokenizer, "2026-01-02")
    assert render(tokenizer, [USER]).startswith("202602 Jan 2026[user]")
    assert written_by_library(tokenizer, [USER]).startswith("2031[user]")
    set_date(tokenizer, None)
    assert render(tokenizer, [USER]).startswith("2031[user]")


@pytest.mark.parametrize("template", [CHATML, FOLDED, NO_SYSTEM])
def test_a_template_without_a_date_writes_what_the_library_writes(template):
    tokenizer = tokenizer_with(template)
    set_date(tokenizer, "2026-01-02")
    for messages in ([USER], [USER, {"role": "assistant", "content": "24"}, USER]):
        assert render(tokenizer, messages) == written_by_library(tokenizer, messages)


# Thoughts

REASONING = (
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}"
)
QWEN3 = (  # an answer that is last always has a thought, which may be empty
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    + REASONING
    + "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = QWEN3.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
SMOLLM3 = (  # /no_think in the system message closes the thought of every answer
    "{% set off = '/no_think' in messages[0].content %}{% set head = '<think>\n\n</think>\n' if off else '' %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ head }}{% endif %}"
    "{{ m.content.lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ head }}{% endif %}"
)
R1 = (  # answers lose their thoughts, and every new answer begins with one
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def beginning(thought):
    """A template that puts `thought` before an answer's content."""
    return CHATML.replace(
        "{{ m.role }}\n{{ m.content }}",
        "{{ m.role }}\n{% if m.role == 'assistant' %}" + thought + "{% endif %}{{ m.content }}",
    )


@pytest.mark.parametrize(
    "template",
    [
        QWEN3,
        THINKING,
        R1,
        SMOLLM3,
        beginning("<think></think>\n"),
        beginning("<think>\n\n</think>"),
        beginning("<think>\n"),
    ],
)
@pytest.mark.parametrize("opening", [OPENING, "<think>\n", "<think> "])
def test_the_model_continues_one_thought(template, opening):
    assert opened(template, opening).endswith(f"{USER['content']}<|im_end|>\n{TURN}{opening.lstrip()}")


@pytest.mark.parametrize(
    "template", [QWEN3, THINKING, beginning("[THINK][/THINK]"), beginning("<seed:think></seed:think>")]
)
@pytest.mark.parametrize("opening", ["Reasoning:", "", "a  "])
def test_no_finished_thought_stands_before_an_answer_that_was_begun(template, opening):
    assert opened(template, opening).endswith(f"{USER['content']}<|im_end|>\n{TURN}{opening}")


def test_a_thought_of_the_message_is_kept():
    opening = "<think>\n4 * 6\n</think>\n\nThe answer is"
    for template in (QWEN3, THINKING, SMOLLM3, CHATML):
        assert opened(template, opening).endswith(TURN + opening)


def test_thinking_that_the_messages_turn_off_stays_off():
    off = {"role": "system", "content": "Be brief. /no_think"}
    assert opened(SMOLLM3, "Reasoning:", off, USER).endswith(f"{TURN}<think>\n\n</think>\nReasoning:")
    with pytest.raises(ValueError, match=r"writes '<think>\\n\\n</think>\\n' before .* which begins a thought itself"):
        opened(SMOLLM3, OPENING, off, USER)


@pytest.mark.parametrize("thought", ["<think>\nOkay.\n</think>\n", "<think></think><response>", "<think>\nOkay, "])
def test_a_second_thought_is_refused(thought):
    with pytest.raises(ValueError, match=r"take <think> out of that message, .* or give the prompt as plain text"):
        opened(beginning(thought), OPENING)
    assert opened(beginning(thought), "Reasoning:").endswith(f"{TURN}{thought}Reasoning:")


@pytest.mark.parametrize("opening", ["<think>\n4 * 6\n</think>\nThe answer is", "</think>7", "<think>a</think>"])
def test_a_template_that_strips_thoughts_cannot_continue_one(opening):
    with pytest.raises(ValueError, match=r"(?s)does not keep the open assistant message .* \(its text ends in "):
        opened(R1, opening)


# Copies of the message, and marks

COPIES = {
    "plain": ("{{ last }}", "<think>"),
    "upper": ("{{ last | upper }}", "<THINK>"),
    "trim": ("{{ last | trim }}", "<think>"),
    "json": ("{{ last | tojson }}", '"<think>"'),
    "ascii json": ("{{ last | tojson(ensure_ascii=True) }}", '"<think>"'),
    "url": ("{{ last | urlencode }}", "%3Cthink%3E"),
    "length": ("{{ last | length }}", "7"),
    "reversed": ("{{ last | reverse }}", ">kniht<"),
    "cut": ("{{ last[:8] }}", "<think>"),
    "list": ("{{ [last] }}", "['<think>']"),
}
LAST = "{% set last = messages[-1].content %}"


@pytest.mark.parametrize("name", sorted(COPIES))
def test_a_message_that_is_written_twice_leaves_no_mark(name):
    template, copy = COPIES[name]
    text = f"[user]{USER['content']}[assistant]<think>"
    assert opened(f"{LAST}({template}){LOOP}", "<think>") == f"({copy}){text}"
    between = LOOP.replace(
        "{{ m.content }}", "{{ m.content }}{% if loop.last %} " + template + " {{ m.content }}{% endif %}"
    )
    assert opened(LAST + between, "<think>") == f"{text} {copy} <think>"


@pytest.mark.parametrize("change", ["upper", "reverse", "urlencode", "replace('<', '(')"])
def test_a_message_that_is_changed_or_missing_is_refused(change):
    with pytest.raises(ValueError, match=r"does not keep the open assistant message '<think>'.*end the messages with"):
        opened(
            "{% for m in messages %}{{ m.content | " + change + " }}{% endfor %}", "<think>", {**USER, "content": "7"}
        )
    with pytest.raises(ValueError, match=r"does not keep the open assistant message '<think>'"):
        opened("{{ messages[0].content }}" + LAST + "({{ last | " + change + " }})", "<think>")


@pytest.mark.parametrize("strange", ["\ufdd0", "\ufdd0\ufdd1", "\ue000open-turn\ue000"])
def test_characters_of_the_users_are_no_marks(strange):
    user = {"role": "user", "content": f"a{strange}b"}
    assert opened(LOOP, f"c{strange}", user) == f"[user]a{strange}b[assistant]c{strange}"


@pytest.mark.parametrize(
    "message", [SYSTEM, {"role": "tool", "content": "12"}, {"role": "developer", "content": "x\n"}]
)
def test_a_message_that_the_template_leaves_out_is_named(message):
    template = LOOP.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
    for opening in ([], [{"role": "assistant", "content": "So"}]):
        with pytest.raises(ValueError, match=f"leaves out or changes the message of role {message['role']}"):
            render(tokenizer_with(template), [message, USER, *opening])
    assert opened(template, "So", USER) == f"[user]{USER['content']}[assistant]So"


def test_a_template_may_quote_a_message():
    template = LOOP.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    text = render(tokenizer_with(template), [USER, {"role": "tool", "content": 'say "hi"\n to é'}])
    assert text.endswith('[tool]"say \\"hi\\"\\n to é"[assistant]')


# Errors

BROKEN = {
    "{% for m in messages %}{{ m.content }}": r"not valid Jinja \(line 1: Unexpected end of template",
    "{{ messages[0].content }}\n{% endif %}": r"not valid Jinja \(line 2: Encountered unknown tag 'endif'",
    "{{ messages | nothing }}": r"not valid Jinja \(line 1: No filter named 'nothing'",
    "{{ nowhere.content }}": r"fails on messages with the roles system, user \(UndefinedError: 'nowhere' is undefined",
    "{{ messages[5].content }}": r"fails on messages .*\(UndefinedError: list object has no element 5",
    "{{ clock() }}": r"fails on messages .*\(UndefinedError: 'clock' is undefined",
    "{{ 1 / 0 }}": r"fails on messages .*\(ZeroDivisionError: division by zero",
    "{{ messages[0].content + 1 }}": r"fails on messages .*\(TypeError: ",
    "{{ messages.__class__.__mro__ }}": r"fails on messages .*\(SecurityError: ",
}


@pytest.mark.parametrize("template", sorted(BROKEN))
def test_a_broken_template_is_told_as_that(template):
    with pytest.raises(ValueError, match=BROKEN[template] + ".*: correct its chat_template, or give") as caught:
        render(tokenizer_with(template), [SYSTEM, USER])
    assert "refuses" not in str(caught.value) and "change the prompt's roles" not in str(caught.value)


@pytest.mark.parametrize("reason", ["System role not supported", "roles must alternate", "Only user and assistant!"])
def test_what_a_template_refuses_is_told_as_a_refusal(reason):
    with pytest.raises(
        ValueError, match=rf"refuses messages with the roles system, user \({reason}\): change the prompt's"
    ):
        render(tokenizer_with("{{ raise_exception('" + reason + "') }}"), [SYSTEM, USER])


def test_templates_without_a_default_are_named():
    tokenizer = tokenizer_with(LOOP)
    tokenizer.chat_template = {"tool_use": LOOP, "rag": LOOP}
    with pytest.raises(ValueError, match="chat templates rag, tool_use, but none is named 'default'"):
        render(tokenizer, [USER])
    tokenizer.chat_template["default"] = LOOP
    assert render(tokenizer, [USER]).endswith("[assistant]")


@pytest.mark.parametrize("content", [None, 7, [{"type": "text", "text": "a"}]])
def test_content_that_is_not_text_is_named(content):
    with pytest.raises(ValueError, match=r"prompt\[1\]\.content is .*: it must be text"):
        render(tokenizer_with(LOOP), [SYSTEM, {"role": "user", "content": content}])
