"""How a model is told of tools, by its chat template or in words where that has no place for them; and in which style it is to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.errors import DataError
from limbeck.evaluate.calls import Style, parse
from limbeck.evaluate.prompt import prompt_ids
from limbeck.tokens.stated import stated

ToolStyle = Literal["auto", "template", "stated"]

PROBE = "xprobex"
STATED_STYLE: Style = "tool_call"


@dataclass(frozen=True)
class Asker:
    """Writes prompts for one tokenizer. `how` tools are shown, and the `style` in which calls are expected."""

    tokenizer: Any
    how: Literal["template", "stated"]
    style: Style

    def ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], where: str) -> list[int]:
        """The prompt that asks for the next turn of a conversation."""
        if self.how == "template":
            return prompt_ids(self.tokenizer, _render(self.tokenizer, messages, tools, where), "chat")
        said = stated(messages, tools)
        if self.tokenizer.chat_template:
            return prompt_ids(self.tokenizer, _render(self.tokenizer, said, None, where), "chat")
        turns = [f"{message['role'].capitalize()}: {message.get('content') or ''}" for message in said]
        return prompt_ids(self.tokenizer, "\n".join([*turns, "Assistant:"]), "plain")


def asker(tokenizer: Any, how: ToolStyle, where: str) -> Asker:
    """`auto` is the chat template where it shows tools, else `stated`."""
    question: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    probe = [{"type": "function", "function": {"name": PROBE, "description": PROBE, "parameters": {"type": "object", "properties": {}}}}]
    shows = bool(tokenizer.chat_template) and PROBE in _render(tokenizer, question, probe, where, empty_on_error=how != "template")
    if how == "stated" or (how == "auto" and not shows):
        return Asker(tokenizer, "stated", STATED_STYLE)
    if not shows:
        reason = "the tokenizer's chat template ignores tools" if tokenizer.chat_template else "the tokenizer has no chat template"
        raise DataError(f"{where}: {reason}; set `prompt: stated`")
    # as templates differ in what they demand: an id of nine characters, a content
    call = {"id": "abcdefghi", "type": "function", "function": {"name": PROBE, "arguments": {"x": PROBE}}}
    answered = [*question, {"role": "assistant", "content": "", "tool_calls": [call]}]
    before = _render(tokenizer, question, probe, where)
    after = _render(tokenizer, answered, probe, where, generation_prompt=False)
    start = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    found = parse(after[start:])
    if [each.name for each in found.calls] != [PROBE] or found.style is None:
        raise DataError(f"{where}: the tokenizer's chat template writes calls in a form that cannot be read here; set `prompt: stated`")
    return Asker(tokenizer, "template", found.style)


def _render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    where: str,
    generation_prompt: bool = True,
    empty_on_error: bool = False,
) -> str:
    settings = {"tools": list(tools) if tools else None, "add_generation_prompt": generation_prompt, "tokenize": False}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **settings))
    except Exception as error:  # a template is a foreign program
        if empty_on_error:
            return ""
        raise DataError(f"{where}: the chat template refuses the conversation: {error or type(error).__name__}") from error
