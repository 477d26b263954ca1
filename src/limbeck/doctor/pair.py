"""Do student and teacher speak the same language? Ids as bytes, padded rows, special tokens, and both chat templates on the recipe's own
rows. Needs the tokenizers and config.json, no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from limbeck.cache import model_config
from limbeck.doctor.finding import Finding
from limbeck.errors import LimbeckError, ModelError
from limbeck.tokens.chat import encode
from limbeck.tokens.identity import shared_vocabulary, vocabulary
from limbeck.tokens.render import start_ids
from limbeck.tokens.sample import Conversation

MAX_SHOWN = 5
"""Differences that a finding quotes."""
SPECIAL = ("bos", "eos", "pad", "unk")


def compare(student: Any, teacher: Any, conversations: Sequence[Conversation]) -> Iterator[Finding]:
    """What two tokenizers make of ids, of special tokens, and of some of the recipe's conversations."""
    yield tokenizers(student, teacher)
    yield special_tokens(student, teacher)
    yield text_starts(student, teacher, conversations)
    if chats := [row for row in conversations if row.messages]:
        yield templates(student, teacher, chats)
    yield splitting(student, teacher, conversations)


def tokenizers(student: Any, teacher: Any) -> Finding:
    """Every id as bytes, and the ids that only one of the two has."""
    ours, theirs = vocabulary(student), vocabulary(teacher)
    common = min(len(ours), len(theirs))
    different = [index for index in range(common) if ours[index] != theirs[index]]
    first = [{"id": index, "student": _text(ours[index]), "teacher": _text(theirs[index])} for index in different[:MAX_SHOWN]]
    detail = {"shared": common - len(different), "different": len(different), "student": len(ours), "teacher": len(theirs), "first": first}
    try:
        shared_vocabulary(student, teacher)
    except ModelError as error:
        return Finding("tokenizers", "stop", str(error), detail)
    only = {"student": len(ours) - common, "teacher": len(theirs) - common}
    more = "".join(f"; {count} more only in the {side}'s" for side, count in only.items() if count)
    return Finding("tokenizers", "ok", f"all {common:,} ids stand for the same bytes in both{more}", detail)


def padding(name: str, revision: str | None, tokenizer: Any, side: str) -> Finding:
    """Rows of a model's head and ids of its tokenizer."""
    config, num_ids = model_config(name, revision), len(vocabulary(tokenizer))
    rows = (config or {}).get("vocab_size")
    check, detail = f"vocabulary of the {side}", {"rows": rows, "ids": num_ids}
    if rows is None:
        return Finding(check, "unknown", f"{name}: vocab_size is not known before its config.json is here", detail)
    if rows < num_ids:
        return Finding(check, "stop", f"{rows:,} rows in its head, and its tokenizer has {num_ids:,} ids; expected a row for each", detail)
    padded = (
        f"{rows - num_ids:,} padded rows beyond {num_ids:,} ids; they get no probability" if rows > num_ids else f"{rows:,} rows and ids"
    )
    return Finding(check, "ok", padded, detail)


def special_tokens(student: Any, teacher: Any) -> Finding:
    """bos, eos, pad and unk by id. Only eos decides what is learned: masks come from lengths, never from a pad id."""
    tokens = {name: {"student": _special(student, name), "teacher": _special(teacher, name)} for name in SPECIAL}
    different = [name for name, pair in tokens.items() if pair["student"] != pair["teacher"]]
    listed = ", ".join(f"{name} {tokens[name]['student']} / {tokens[name]['teacher']}" for name in different)
    if "eos" in different:
        return Finding(
            "special tokens", "warning", f"student / teacher differ: {listed}; each may end its answers with its own eos", tokens
        )
    if different:
        return Finding("special tokens", "ok", f"student / teacher differ: {listed}; neither is scored for it", tokens)
    return Finding("special tokens", "ok", ", ".join(f"{name} {pair['student']}" for name, pair in tokens.items()), tokens)


def text_starts(student: Any, teacher: Any, conversations: Sequence[Conversation]) -> Finding:
    """What each tokenizer puts before a plain text (BOS). The teacher reads the student's ids, so it may lack one that it knows."""
    ours, theirs = ([tokenizer.convert_ids_to_tokens(i) for i in start_ids(tokenizer)] for tokenizer in (student, teacher))
    detail = {"student": ours, "teacher": theirs}
    if ours == theirs:
        return Finding("start of a text", "ok", f"both begin a text with {ours or 'nothing'}", detail)
    message = f"the student's tokenizer begins a text with {ours or 'nothing'}, the teacher's with {theirs or 'nothing'}"
    if all(row.messages for row in conversations):
        return Finding("start of a text", "ok", f"{message}; chats begin as the template says", detail)
    return Finding(
        "start of a text", "warning", f"{message}: the teacher scores texts that begin in another way than it is used to", detail
    )


def templates(student: Any, teacher: Any, chats: Sequence[Conversation]) -> Finding:
    """The same conversations through both chat templates."""
    check = "chat templates"
    if not student.chat_template:
        return Finding(
            check, "stop", "the student has none, which `messages` need; expected an instruct model, or `prompt` and `completion`"
        )
    if not teacher.chat_template:
        return Finding(check, "warning", "the teacher has none (a base model): it scores a format that it was not trained on")
    different: list[tuple[Conversation, str, str]] = []
    refused = ""
    for row in chats:
        try:
            ours, theirs = _rendered(row, student), _rendered(row, teacher)
        except LimbeckError as error:
            refused = refused or str(error)
            continue
        if ours != theirs:
            different.append((row, ours, theirs))
    detail: dict[str, Any] = {"rows": len(chats), "different": len(different), "refused": refused}
    if refused:
        return Finding(check, "warning", f"one of the two refuses rows of this data: {refused}", detail)
    if not different:
        return Finding(check, "ok", f"{len(chats)} rows of this data come out alike from both", detail)
    row, ours, theirs = different[0]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    detail["first"] = {"where": row.where, "at": at, "student": _excerpt(ours, at), "teacher": _excerpt(theirs, at)}
    message = (
        f"{len(different)} of {len(chats)} rows come out otherwise; {row.where}, character {at}: {_excerpt(ours, at)!r} by the student's, "
        f"{_excerpt(theirs, at)!r} by the teacher's. The teacher scores the student's format"
    )
    return Finding(check, "warning", message, detail)


def splitting(student: Any, teacher: Any, conversations: Sequence[Conversation]) -> Finding:
    """Whether both tokenizers cut the same text in the same tokens; equal ids can hide other merges (digits, spaces)."""
    texts = [text for row in conversations for text in texts_of(row)]
    different = [text for text in texts if encode(student, text) != encode(teacher, text)]
    detail = {"texts": len(texts), "different": len(different)}
    if not different:
        return Finding("splitting of text", "ok", f"{len(texts)} texts of this data are the same tokens to both", detail)
    message = (
        f"{len(different)} of {len(texts)} texts are other tokens to the teacher's tokenizer, as {different[0][:40]!r}: "
        "it scores a spelling that it is not used to"
    )
    return Finding("splitting of text", "warning", message, detail)


def texts_of(row: Conversation) -> list[str]:
    """The texts of a conversation, as its author wrote them."""
    contents = [message.get("content") for message in row.messages]
    return [text for text in (*contents, row.prompt, row.completion, row.text) if isinstance(text, str) and text.strip()]


def _rendered(row: Conversation, tokenizer: Any) -> str:
    from limbeck.errors import DataError

    messages = [{key: value for key, value in message.items() if value is not None} for message in row.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=list(row.tools) or None, tokenize=False))
    except Exception as error:  # a template is a foreign program
        raise DataError(f"{row.where}: {error or type(error).__name__}") from error


def _special(tokenizer: Any, name: str) -> str:
    token = getattr(tokenizer, f"{name}_token")
    return "none" if token is None else f"{token!r} ({getattr(tokenizer, f'{name}_token_id')})"


def _text(piece: bytes | None) -> str | None:
    return None if piece is None else piece.decode("utf-8", errors="backslashreplace")


def _excerpt(text: str, at: int) -> str:
    return text[max(at - 20, 0) : at + 30]
