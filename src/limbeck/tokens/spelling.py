"""Spelling: how many bytes of a text each token of a sample is. By bytes, what one tokenizer's tokens say can be told of another's."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.tokens.identity import vocabulary
from limbeck.tokens.sample import Sample


class Spelling:
    """The bytes of a tokenizer's tokens, checked sample by sample against what it decodes to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces = vocabulary(tokenizer)

    def lengths(self, sample: Sample) -> np.ndarray | None:
        """The bytes of each token of a sample, which add up to its text; None where the tokens do not spell the text."""
        ids = sample.ids.tolist()
        pieces = [self._pieces[index] if index < len(self._pieces) else None for index in ids]
        whole = b"".join(piece or b"" for piece in pieces).decode("utf-8", errors="replace")
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        lengths = np.array([len(piece or b"") for piece in pieces], dtype=np.int64)
        if whole == text:
            return lengths
        if whole == f" {text}":  # SentencePiece puts a space before a text, and takes it away again
            lengths[np.flatnonzero(lengths)[0]] -= 1
            return lengths
        return None
