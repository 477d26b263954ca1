"""What makes two tokenizers the same: the bytes that every id stands for.

Names, classes and files say nothing reliable: the same vocabulary comes as GGUF, as tokenizer.json and with padded rows. How a
tokenizer splits text is not compared: one tokenizer makes the ids, and the other model only has to mean the same by them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from limbeck.errors import ModelError

# Ids that only one of the two has (padding, added tokens) are cut off; more than this is another vocabulary with a common start.
MAX_EXTRA_IDS = 1024
MAX_EXTRA_SHARE = 0.05


def vocabulary(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every id: ordinary tokens by what they decode to, added and special tokens as their text, None where no token is."""
    tokens: dict[str, int] = tokenizer.get_vocab()
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    size = max([*tokens.values(), *added], default=-1) + 1
    to_bytes = _token_decoder(tokenizer, tokens)
    # byte-level tokenizers write added tokens as plain text; SentencePiece writes a space as ▁ in those too
    added_to_bytes = _utf8 if to_bytes is _from_byte_level else to_bytes
    pieces: list[bytes | None] = [None] * size
    for token, index in tokens.items():
        if index not in added:
            pieces[index] = to_bytes(token)
    for index, text in added.items():
        pieces[index] = added_to_bytes(text)
    return pieces


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 over the bytes of every id, in order."""
    digest = hashlib.sha256()
    for piece in vocabulary(tokenizer):
        digest.update(b"-" if piece is None else b"%d:" % len(piece) + piece)
    return digest.hexdigest()


def template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template (of all of them, where it has several by name); None without one."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """The number of ids that student's and teacher's tokenizer share; ModelError where an id means different bytes in the two."""
    of_student, of_teacher = vocabulary(student), vocabulary(teacher)
    shared = min(len(of_student), len(of_teacher))
    different = [index for index in range(shared) if of_student[index] != of_teacher[index]]
    if different:
        examples = "; ".join(
            f"id {i} is {_show(of_student[i])} to the student and {_show(of_teacher[i])} to the teacher" for i in different[:3]
        )
        raise ModelError(
            f"tokenizers of student and teacher differ: {len(different)} of {shared} ids stand for other bytes ({examples}); "
            "expected the same vocabulary, as models of one family have"
        )
    extra = max(len(of_student), len(of_teacher)) - shared
    if not shared or extra > max(MAX_EXTRA_IDS, MAX_EXTRA_SHARE * shared):
        raise ModelError(
            f"tokenizers of student and teacher differ: the student's has {len(of_student)} ids, the teacher's {len(of_teacher)}; "
            f"expected the same vocabulary, with at most a few padded or added ids at the end of one"
        )
    return shared


def _token_decoder(tokenizer: Any, tokens: dict[str, int]) -> Callable[[str], bytes]:
    """A function from a token, as the vocabulary writes it, to bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        byte_level = any("ByteLevel(" in repr(part) for part in (backend.decoder, backend.pre_tokenizer))
    else:
        byte_level = all(char in tokens for char in _BYTE_OF)
    if byte_level:
        return _from_byte_level
    return _from_sentencepiece if "<0x0A>" in tokens or any(token.startswith("▁") for token in tokens) else _utf8


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the rest for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_TO_LATIN_1 = str.maketrans({char: chr(byte) for char, byte in _BYTE_OF.items()})
_OUTSIDE = re.compile(f"[^{re.escape(''.join(_BYTE_OF))}]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _from_byte_level(token: str) -> bytes:
    # a control token that was put into the vocabulary itself may have characters which the alphabet lacks
    return _utf8(token) if _OUTSIDE.search(token) else token.translate(_TO_LATIN_1).encode("latin-1")


def _from_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _utf8(token.replace("▁", " "))


def _utf8(text: str) -> bytes:
    # GGUF files hold a few broken tokens; they must compare, not raise
    return text.encode("utf-8", errors="surrogatepass")


def _show(piece: bytes | None) -> str:
    if piece is None:
        return "no token"
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)
