"""A served teacher: a model in another process, or on another machine, that tells log-probabilities of the tokens of a prompt."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, field_validator

from limbeck.cache import resolve_tokenizer
from limbeck.errors import ModelError, RecipeError
from limbeck.objectives.base import Needs
from limbeck.store.manifest import TeacherIdentity
from limbeck.teachers.told import Document, Told, ToldScorer, ToldTeacher, documents
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.batch import Batch, Signal
    from limbeck.teachers.client import Client


REACH_SECONDS = 10.0
"""How long a server may take to say which models it serves, where nobody waits for it."""


class ServerTeacher(ToldTeacher):
    """A model behind an OpenAI-compatible API that takes token ids and gives `prompt_logprobs` keyed by token id, as vLLM does.

    It tells its k most probable tokens and, by what is left to 1, the mass of the others: losses see a top-k teacher at temperature 1.
    """

    type: Literal["server"] = "server"
    url: str
    """The base of its API: `http://127.0.0.1:8000/v1`."""
    served_name: str
    """What the server calls the model."""
    tokenizer: str
    """The model's tokenizer: a folder, a name in Limbeck's cache, or a hub name. It is compared with the student's, id by id."""
    revision: str | None = None
    """Commit, tag or branch of a hub tokenizer."""
    k: int = Field(64, gt=0)
    """Tokens asked for at each position. The server must allow as many (vLLM: `--max-logprobs`)."""
    key_variable: str | None = None
    """The environment variable that holds the server's key. The key itself is written nowhere."""
    concurrency: int = Field(8, gt=0)
    """Documents asked for at once, by each process."""
    timeout_seconds: float = Field(120, gt=0)
    """How long one answer may take."""
    patience_seconds: float = Field(600, gt=0)
    """How long a document is asked for again where the server is busy, ill or gone, before the run stops."""

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError("found a URL that holds a key, which would be written down; set key_variable to a variable that holds it")
        try:
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none
            is_address = False
        if not is_address:
            raise ValueError(f"found {url!r}, expected the base of an API: http://127.0.0.1:8000/v1")
        return url

    @property
    def told(self) -> int:
        return self.k

    @property
    def speaks(self) -> tuple[str, str | None]:
        return self.tokenizer, self.revision

    def check(self) -> None:
        resolve_tokenizer(self.tokenizer)
        if missing := [name for name in ("httpx", "tenacity") if find_spec(name) is None]:
            raise RecipeError(f"teacher.type: 'server' needs {missing[0]!r}, which is not installed: pip install 'limbeck[server]'")
        if self.key_variable is None:
            return
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise RecipeError(f"teacher.key_variable: the environment has no {self.key_variable}; expected the server's key in it")
        if not (key.isascii() and key.isprintable()):
            raise RecipeError(f"teacher.key_variable: {self.key_variable} holds what no header can carry; expected a line of ASCII")

    def reach(self) -> None:
        from limbeck.teachers.client import Client

        self.check()
        client = Client(self.url, self.served_name, self.key_variable, min(self.timeout_seconds, REACH_SECONDS), 0.0, 1)
        try:
            client.longest()
        finally:
            client.stop()

    def open(self, tokenizer: Any, needs: Needs, device: str = "cpu") -> ServerScorer:
        from limbeck.models import load_tokenizer
        from limbeck.teachers.client import Client
        from limbeck.tokens.identity import shared_vocabulary

        self.check()
        vocabulary = shared_vocabulary(tokenizer, load_tokenizer(self.tokenizer, self.revision))
        if self.k > vocabulary:
            raise ModelError(f"teacher.k: found {self.k}, expected at most {vocabulary}, the tokens of the teacher")
        client = Client(self.url, self.served_name, self.key_variable, self.timeout_seconds, self.patience_seconds, self.concurrency)
        longest = client.longest()
        client.ask(np.zeros(2, np.int64), np.zeros(1, np.int64), self.k, vocabulary)  # what it does not allow shows here
        return ServerScorer(client, self.k, vocabulary, longest, self.concurrency, device)

    def identity(self, scorer: Any) -> TeacherIdentity:
        return TeacherIdentity(name=self.served_name, told=self.k)


class ServerScorer(ToldScorer):
    """Asks for each document by itself, several at once, and for those of the next batches meanwhile."""

    def __init__(self, client: Client, k: int, vocabulary: int, longest: int | None, concurrency: int, device: str) -> None:
        super().__init__(client.name, k, vocabulary, device)
        self._client, self._longest = client, longest
        self._pool = ThreadPoolExecutor(concurrency)
        self._coming: dict[tuple[bytes, bytes], Future[Told]] = {}
        # also where a run was interrupted between two questions: Python would wait at its end for all that is asked ahead
        self._end = weakref.finalize(self, _end, client, self._pool)

    @property
    def note(self) -> str:
        """How often the server was asked again, by cause."""
        return self._client.in_words()

    def require(self, samples: Sequence[Sample]) -> None:
        longest = max((len(sample.ids) for sample in samples), default=0)
        if self._longest is not None and longest >= self._longest:  # a server generates at least one token more
            raise ModelError(
                f"teacher {self._client.url}: takes {self._longest} tokens with the one that it adds, the data has {longest} in a row; "
                "set source.max_length, or start the server with more (vLLM: --max-model-len)"
            )

    def expect(self, batches: Sequence[Batch]) -> None:
        """The server computes while the student does."""
        for batch in batches:
            for document in documents(batch):
                if document.key not in self._coming:
                    self._coming[document.key] = self._submit(document)

    def score(self, batch: Batch) -> Signal:
        self.expect([batch])
        answers = [self._coming[document.key] for document in documents(batch)]
        self._coming = {key: answer for key, answer in self._coming.items() if answer not in answers}
        try:
            told = [answer.result() for answer in answers]
        except BaseException:
            self._end()
            raise
        return self.signal(batch, told)

    def _submit(self, document: Document) -> Future[Told]:
        return self._pool.submit(self._client.ask, document.ids, document.wanted, self.k, self.vocabulary)


def _end(client: Client, pool: ThreadPoolExecutor) -> None:
    client.stop()
    pool.shutdown(wait=False, cancel_futures=True)
