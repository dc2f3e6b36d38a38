"""Chat templates: they turn messages into the text that a model continues."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = "give the prompt as plain text"
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode reserves them for use inside a program
_TAG = r"<[\w:]*(?:think|thought|reason)[\w:]*>|\[[\w:]*(?:think|thought|reason)[\w:]*\]"
_THOUGHTS = re.compile(_TAG, re.IGNORECASE)  # where they begin
_EMPTY_THOUGHT = re.compile(rf"({_TAG})\s*(?P<end>(?:</|\[/)[\w:]+[>\]]\s*)?\Z", re.IGNORECASE)  # or has just begun


def set_date(tokenizer: Any, date: str | None) -> None:
    """From now on the tokenizer's chat template sees `date`, such as "2026-11-27": through `strftime_now`, at midnight,
    and as `date_string`, "27 Nov 2026". With None it sees the clock's date and no `date_string`."""
    tokenizer.template_date = date


def apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as text. If the last message is the user's, the assistant's turn is opened after it; if it is the
    assistant's, it is left open, as `render` in tokenizer.py says.

    Raises ValueError if there are no messages or no template, or if the template is broken, refuses the messages,
    leaves one out, or does not keep an open one.
    """
    if not messages:
        raise ValueError("prompt = []: give plain text or at least one message")
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is a list of messages, but this tokenizer has no chat template: use an instruction-tuned "
            f"model that has one, or {_PLAIN}"
        )
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ValueError(f"prompt[{i}].{field} is {message.get(field)!r}: it must be text")
    *before, last = map(dict, messages)
    continues = last["role"] == "assistant"
    text = _open_turn(tokenizer, before, last) if continues else _fill(tokenizer, [*before, last], open_turn=True)
    for message in before if continues else [*before, last]:
        role, content = message["role"], message["content"].strip()
        quoted = json.dumps(content, ensure_ascii=False)[1:-1]  # some templates escape the results of tools so
        if role != "assistant" and content not in text and quoted not in text:  # answers may lose their thoughts
            raise ValueError(
                f"the chat template leaves out or changes the message of role {role}, {content[:60]!r}: put its text "
                f"into another message, or {_PLAIN}"
            )
    return text


def _open_turn(tokenizer: Any, before: list[dict], last: dict) -> str:
    """The text up to the end of the last message's content. A mark after the content shows what the template writes
    after it. The mark itself never stays in a prompt, however often the template writes it and whatever it changes."""
    opening = last["content"]
    contents = "".join(message["content"] for message in [*before, last])
    mark = next(mark for mark in _NONCHARACTERS if mark not in contents)

    def around(content: str) -> tuple[str, str, str]:
        return _fill(tokenizer, [*before, {**last, "content": content + mark}]).rpartition(mark)

    text, marker, after = around(opening)
    if opening.strip():  # the template may trim it
        text = _fill(tokenizer, [*before, last]).removesuffix(after).rstrip() + opening[len(opening.rstrip()) :]
    text, content = text.replace(mark, ""), opening.lstrip()
    if not marker or not text.endswith(content):
        raise ValueError(
            f"the chat template does not keep the open assistant message {opening!r} (its text ends in "
            f"{text[-40 - len(opening) :]!r}): end the messages with a user message, or {_PLAIN}"
        )
    head, question = text[: len(text) - len(content)], before[-1]["content"].strip() if before else ""
    own = around("")[0].replace(mark, "")  # what the template itself writes
    turn = own.rpartition(question)[2] if question else own
    if head.endswith(turn):
        head = head.removesuffix(turn) + _without_thought(tokenizer, before, turn, opening)
    return head + content


def _without_thought(tokenizer: Any, before: list[dict], turn: str, opening: str) -> str:
    """What the template writes between the message before and the open one, without a thought that it begins or ends
    there. After a finished thought the model would not think, and a message with <think> would begin a second one."""
    if thought := _EMPTY_THOUGHT.search(turn):
        answer = before and _EMPTY_THOUGHT.search(_fill(tokenizer, before, open_turn=True))
        off = answer and answer["end"]  # the messages turn thinking off: every answer begins like this
        if not off if thought["end"] else thought[1] in opening:
            turn = turn[: thought.start()]
    for tag in _THOUGHTS.findall(opening):
        if tag in turn:
            raise ValueError(
                f"the chat template writes {turn[turn.index(tag) :]!r} before the open assistant message {opening!r}, "
                f"which begins a thought itself: take {tag} out of that message, or what turns thinking off (such as "
                f"/no_think) out of the others, or {_PLAIN}"
            )
    return turn


def _fill(tokenizer: Any, messages: list[dict], *, open_turn: bool = False) -> str:
    """The text that `apply_chat_template` of transformers gives, but with the tokenizer's date. A date needs a
    function, and `apply_chat_template` passes only plain values, so the compiled template is rendered here."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    templates, mend = tokenizer.chat_template, f"correct its chat_template, or {_PLAIN}"
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise ValueError(f"the model has chat templates {names}, but none is named 'default': {mend}")
    roles = ", ".join(message["role"] for message in messages)
    try:
        template = _compile_jinja_template(tokenizer.get_chat_template())
        values = {**tokenizer.special_tokens_map, **_day(getattr(tokenizer, "template_date", None))}
        return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=open_turn, **values)
    except TemplateSyntaxError as error:
        where = f"line {error.lineno}: {error.message}"
        raise ValueError(f"the model's chat template is not valid Jinja ({where}): {mend}") from None
    except Exception as error:  # a template is a program, and may do anything
        if type(error) is TemplateError:  # raised by its own raise_exception
            raise ValueError(
                f"the model's chat template refuses messages with the roles {roles} ({error}): change the prompt's "
                f"roles, or {_PLAIN}"
            ) from None
        what = f"messages with the roles {roles} ({type(error).__name__}: {error})"
        raise ValueError(f"the model's chat template fails on {what}: {mend}") from error


def _day(date: str | None) -> dict[str, Any]:
    """The functions and values by which a template reads the date."""
    if date is None:
        return {}
    day = datetime.datetime.fromisoformat(date)
    return {"strftime_now": lambda format: day.strftime(format), "date_string": day.strftime("%d %b %Y")}
