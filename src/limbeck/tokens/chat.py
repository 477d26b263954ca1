"""A conversation by the tokenizer's chat template: its ids, and the turns that are targets.

A turn's target runs from where generation would start to its end-of-turn token, both found on the ids that are trained on. What a
chat template would drop or rewrite in silence is refused here, by row and turn: it cannot be seen in a loss curve.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from limbeck.errors import DataError
from limbeck.tokens.sample import Conversation

Message = dict[str, Any]
Span = tuple[int, int]

# as transformers looks for it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and target mask of a conversation of messages."""
    chat = _Chat(conversation, tokenizer)
    if not any(message["role"] == "assistant" for message in chat.messages[chat.num_context :]):
        raise DataError(f"{chat.where}: found no message of role 'assistant', expected at least one to learn from")
    text = chat.text(chat.messages)
    _refuse_dropped(chat, text)
    ids = encode(tokenizer, text)
    spans = _marked_spans(chat, text, ids) if _GENERATION.search(chat.template) else _prefix_spans(chat, text, ids)
    is_target = [False] * len(ids)
    for start, end in spans:
        end = _end_of_turn(ids, start, end, tokenizer)
        is_target[start:end] = [True] * (end - start)
    return ids, is_target


class _Chat:
    """A conversation with the tokenizer's chat template."""

    def __init__(self, conversation: Conversation, tokenizer: Any) -> None:
        self.where, self.tokenizer, self.tools = conversation.where, tokenizer, list(conversation.tools) or None
        self.num_context = conversation.num_context
        # a null is an absent key to apply_chat_template, and here wherever a message is looked at
        self.messages = [{key: value for key, value in message.items() if value is not None} for message in conversation.messages]
        if not tokenizer.chat_template:
            raise DataError(
                f"{self.where}: the tokenizer has no chat template, which `messages` need; "
                "expected rows of `prompt` and `completion`, or the tokenizer of an instruct model"
            )
        self.template = str(self._run(lambda: tokenizer.get_chat_template(tools=self.tools)))

    def text(self, messages: Sequence[Message], tools: bool = True, generation_prompt: bool = False) -> str:
        """What the template makes of some messages."""
        apply = self.tokenizer.apply_chat_template
        kwargs = {"tools": self.tools if tools else None, "add_generation_prompt": generation_prompt, "tokenize": False}
        return str(self._run(lambda: apply(list(messages), **kwargs)))

    def generation_spans(self, messages: Sequence[Message]) -> list[Span]:
        """The characters that the template's `{% generation %}` blocks write in the text of these messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        settings = {"tools": self.tools, "chat_template": self.template, "return_assistant_tokens_mask": True}
        settings |= self.tokenizer.special_tokens_map
        _, spans = self._run(lambda: render_jinja_template([list(messages)], **settings))
        return list(spans[0])

    def _run(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # a template is a foreign program: whatever it raises is about this row
            raise DataError(f"{self.where}: the chat template refuses the conversation: {error or type(error).__name__}") from error


def _marked_spans(chat: _Chat, text: str, ids: list[int]) -> list[Span]:
    """The tokens in the template's `{% generation %}` blocks, each with the eos that follows it.

    Not by `return_assistant_tokens_mask`: transformers 5.23 looks up a block's first and last character only, and where a tokenizer
    trims spaces off its offsets (Llama 3) it then leaves out this turn and all later ones, or scores everything that follows.
    """
    encoding = chat.tokenizer(text, add_special_tokens=False, verbose=False)
    num_context = len(chat.generation_spans(chat.messages[: chat.num_context])) if chat.num_context else 0
    spans = []
    for first, last in chat.generation_spans(chat.messages)[num_context:]:
        covering = [token for char in range(first, last) if (token := encoding.char_to_token(char)) is not None]
        if not covering:
            continue
        # a boundary inside a token belongs to the block
        start, end = _length_if_prefix(chat, text[:first], ids), _length_if_prefix(chat, text[:last], ids)
        start, end = covering[0] if start is None else start, covering[-1] + 1 if end is None else end
        # markers that leave the eos out would teach a student never to stop
        leaves_out_eos = end < len(ids) and ids[end] == chat.tokenizer.eos_token_id != ids[end - 1]
        spans.append((start, end + leaves_out_eos))
    if not spans:
        raise DataError(f"{chat.where}: the chat template's {{% generation %}} blocks cover no token, expected the assistant's turns")
    return spans


def _prefix_spans(chat: _Chat, text: str, ids: list[int]) -> list[Span]:
    """The span of each assistant turn: from the ids of everything before it, with the generation prompt, to the ids up to its end."""
    spans = []
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant" or turn < chat.num_context:
            continue
        if turn == 0:
            raise DataError(
                f"{chat.where}: turn 0 (assistant) opens the conversation, and the chat template cannot say where it starts; "
                "expected a user or system message before it, or a template with {% generation %} markers"
            )
        before = chat.text(chat.messages[:turn], generation_prompt=True)
        after = text if turn == len(chat.messages) - 1 else chat.text(chat.messages[: turn + 1])
        start, end = (_prefix_length(chat, part, text, ids, turn, name) for part, name in ((before, "start"), (after, "end")))
        if end <= start:
            raise DataError(f"{chat.where}: turn {turn} (assistant) has no token after the chat template's generation prompt")
        spans.append((start, end))
    return spans


def _prefix_length(chat: _Chat, part: str, text: str, ids: list[int], turn: int, name: str) -> int:
    """The number of ids in `part`, which must be how `ids` begin."""
    length = _length_if_prefix(chat, part, ids)
    if length is not None:
        return length
    if text.startswith(part):
        reason = f"the tokens at its {name} merge with their neighbours (white space at the {name} of its content does that: strip it)"
    else:
        at = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))
        reason = (
            f"the chat template renders the conversation up to its {name} otherwise when more follows "
            f"({_excerpt(part, at)} becomes {_excerpt(text, at)}); what is trained on would not be what the model sees when it answers"
        )
    raise DataError(f"{chat.where}: turn {turn} (assistant) cannot be told from its context: {reason}")


def _length_if_prefix(chat: _Chat, part: str, ids: list[int]) -> int | None:
    part_ids = encode(chat.tokenizer, part)
    return len(part_ids) if ids[: len(part_ids)] == part_ids else None


def _end_of_turn(ids: list[int], start: int, end: int, tokenizer: Any) -> int:
    """Where the targets of a turn end: at its end-of-turn token, without the white space that the template puts after it."""
    last = end - 1
    while last > start and not tokenizer.decode([ids[last]]).strip():
        last -= 1
    is_special = not tokenizer.decode([ids[last]], skip_special_tokens=True)
    return last + 1 if is_special else end


def _refuse_dropped(chat: _Chat, text: str) -> None:
    """DataError where the template leaves out tools, a message's content, or a tool call.

    Every content, function name and argument list is swapped for a probe word of its own: one that does not come out at the other
    end was dropped. (A search for the contents themselves would find a dropped call's name in the list of tools.)
    """
    if chat.tools and chat.text(chat.messages, tools=False) == text:
        raise DataError(
            f"{chat.where}: tools are given, but the tokenizer's chat template ignores them; expected a template with "
            "tool support, or the data set with `tools: stated`, which puts them in words"
        )
    probes: dict[str, str] = {}

    def probe(what: str) -> str:
        word = f"xprobe{len(probes)}x"
        probes[word] = what
        return word

    probed = chat.text([_probed(message, f"messages.{turn} ({message['role']})", probe) for turn, message in enumerate(chat.messages)])
    dropped = [what for word, what in probes.items() if word not in probed]
    if dropped:
        raise DataError(f"{chat.where}: the tokenizer's chat template leaves out {', '.join(dropped)}; expected a template that renders it")


def _probed(message: Message, name: str, probe: Any) -> Message:
    changed = dict(message)
    if isinstance(message.get("content"), str) and message["content"].strip():
        changed["content"] = probe(f"the content of {name}")
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function", call))
        function["name"] = probe(f"the tool call {function['name']!r} of {name}")
        if isinstance(function.get("arguments"), dict):
            function["arguments"] = {**function["arguments"], "probe": probe(f"the arguments of a tool call of {name}")}
        calls.append({**call, "function": function} if "function" in call else function)
    if calls:
        changed["tool_calls"] = calls
    return changed


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(at - 20, 0) : at + 20])
