"""The HTTP side of a served teacher: asked again where asking again may help, and believed only after its answers were checked.

httpx speaks, tenacity waits; neither is imported anywhere else.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Lock
from typing import Any

import numpy as np

from limbeck.errors import LimbeckError, ModelError, RunError, nearest
from limbeck.log import warn
from limbeck.teachers.told import Told
from limbeck.tokens.identity import MAX_EXTRA_IDS

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds that are waited at most before the second, and before any further try: drawn from 0 to that, doubled each time."""
BAD_ANSWERS = 4
"""Bad answers to one question after which the next is not awaited: the server is not ill, it is another one than was thought."""
PASSING = frozenset({408, 409, 425, 429})
"""Refusals that pass, besides all of 500 and above; the others (400, 401, 403, 404, 422) say that the question is wrong."""
MASS_ERROR = 1e-3
"""Probabilities may add up to so much more than 1 by rounding."""
SMALLEST_TAIL = 1e-7
"""1 minus the told mass is rounding noise below it."""


class BadAnswerError(Exception):
    """An answer that cannot be meant, whatever its status."""


class _PassingError(Exception):
    """A failure after which asking again may help."""

    def __init__(self, cause: str, wait: float = 0.0, said: str = "") -> None:
        super().__init__(f"{cause} ({said})" if said else cause)
        self.cause, self.wait = cause, wait


class Client:
    """Asks one server; may be used by several threads. `url` is the base of the API, with its `/v1`. Without `patience` it asks once."""

    def __init__(self, url: str, name: str, key_variable: str | None, timeout: float, patience: float, connections: int) -> None:
        import httpx

        self.url, self.name, self._patience = url.rstrip("/"), name, patience
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=connections))
        self.retries: Counter[str] = Counter()
        self._lock, self._stopped = Lock(), Event()

    def stop(self) -> None:
        """Let no thread ask or wait any longer."""
        self._stopped.set()
        with suppress(RuntimeError):  # older releases close, and then complain of what was under way
            self._http.close()

    def longest(self) -> int | None:
        """The most tokens of a prompt and what follows it, where the server says it; LimbeckError where it does not serve the model."""
        tree = self._retried("GET", "/models", None, _models)
        served = {str(one["id"]): one for one in tree}
        if self.name not in served:
            known = ", ".join(sorted(served)) or "none"
            raise ModelError(f"teacher {self.url}: serves {known}, expected teacher.served_name {self.name!r}{nearest(self.name, served)}")
        length = served[self.name].get("max_model_len")
        return length if isinstance(length, int) else None

    def ask(self, ids: np.ndarray, wanted: np.ndarray, k: int, vocabulary: int) -> Told:
        """What the server says of the tokens after the offsets `wanted` of a document."""
        question = {"model": self.name, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        told: Told = self._retried("POST", "/completions", question, lambda tree: read_answer(tree, ids, wanted, k, vocabulary))
        return told

    def in_words(self) -> str:
        """How often it was asked again, by cause; empty where it never was."""
        with self._lock:
            return ", ".join(f"{count} x {cause}" for cause, count in sorted(self.retries.items()))

    def _retried(self, method: str, path: str, question: Any, read: Any) -> Any:
        import tenacity

        bad = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal bad
            bad += isinstance(_error_of(state), BadAnswerError)
            return bad >= BAD_ANSWERS or self._stopped.is_set() or (state.seconds_since_start or 0.0) >= self._patience

        jittered = tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((_PassingError, BadAnswerError)),
            wait=lambda state: max(jittered(state), getattr(_error_of(state), "wait", 0.0)),
            stop=stop,
            sleep=tenacity.sleep_using_event(self._stopped),
            before_sleep=lambda state: self._count(_error_of(state)),
            reraise=True,
        )
        try:
            return retrying(lambda: read(self._once(method, path, question)))
        except BadAnswerError as error:
            raise RunError(
                f"teacher {self.url}: {error}; {bad} answers of {self.name!r} were like that. What was done before stays"
            ) from None
        except _PassingError as error:
            if not self._patience:
                raise RunError(f"teacher {self.url}: {error.cause}; expected a server that answers there (teacher.url)") from None
            raise RunError(
                f"teacher {self.url}: {error}, for {self._patience:g} seconds (teacher.patience_seconds). What was done before "
                "stays, and goes on where the server answers again"
            ) from None

    def _once(self, method: str, path: str, question: Any) -> Any:
        """The JSON of one answer."""
        import httpx

        if self._stopped.is_set():
            raise RunError(f"teacher {self.url}: no longer asked, after an error of another question")
        try:
            answer = self._http.request(method, f"{self.url}{path}", json=question)
        except (httpx.HTTPError, RuntimeError) as error:  # a closed client is a RuntimeError
            cause = "no answer in time" if isinstance(error, httpx.TimeoutException) else "no connection"
            raise _PassingError(cause, said=self._plain(str(error))[:200]) from None
        if answer.status_code != 200:
            raise self._refused(answer)
        try:
            return answer.json()
        except ValueError:
            raise BadAnswerError(f"found an answer that is no JSON ({self._plain(answer.text)[:60]!r})") from None

    def _refused(self, answer: Any) -> Exception:
        status = answer.status_code
        if status in PASSING or status >= 500:
            after = answer.headers.get("retry-after", "")
            return _PassingError(f"status {status}", min(float(after), LONGEST_WAIT) if after.isdigit() else 0.0)
        said = " ".join(self._plain(answer.text).split())[:300]
        hint = {
            400: "; teacher.k may be more than the server allows: start it with that many (vLLM: --max-logprobs), or set a smaller one",
            401: "; set teacher.key_variable to the environment variable that holds its key",
            403: "; the key in the variable that teacher.key_variable names may not ask this",
            404: "; teacher.url is the base of its API, mostly with /v1 at the end",
        }.get(status, "")
        return LimbeckError(f"teacher {self.url}: status {status}, and was not asked again ({said}){hint}")

    def _plain(self, text: str) -> str:
        """What a server said, without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _count(self, error: BaseException | None) -> None:
        cause = error.cause if isinstance(error, _PassingError) else "bad answer"
        with self._lock:
            self.retries[cause] += 1
            count = self.retries[cause]
        if not count & (count - 1):  # the first, second, fourth ...: a server that is down for an hour fills no log
            warn(f"teacher {self.url}: asked again: {self.in_words()}" + (f"; last: {error}" if str(error) != cause else ""))


def _error_of(state: Any) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _models(tree: Any) -> list[dict[str, Any]]:
    found = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
        raise BadAnswerError("found no list of models")
    return found


def read_answer(tree: Any, ids: np.ndarray, wanted: np.ndarray, k: int, vocabulary: int) -> Told:
    """The told distributions of an answer to the prompt `ids`, after checking that it is about these tokens and can be true.

    `prompt_logprobs[t]` is about the token at t given those before it, keyed by token id: k of them, and the token that is there where it
    is none of those. Ids from `vocabulary` on are padded rows of the teacher's head: they are no tokens and get no probability.
    """
    try:
        choice = tree["choices"][0]
        said: Sequence[Any] = choice["prompt_logprobs"]
        length, echoed = len(said), choice.get("prompt_token_ids")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswerError("found an answer without prompt_logprobs; expected a server that knows them, such as vLLM") from None
    if length != len(ids):
        raise BadAnswerError(f"found log-probabilities of {length} tokens, expected {len(ids)}, the prompt's")
    if echoed is not None and echoed != ids.tolist():
        raise BadAnswerError("found other token ids than those of the prompt")
    rows = [_row(said[offset + 1], int(ids[offset + 1]), k, vocabulary) for offset in wanted.tolist()]
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    kinds = (np.int64, np.float32, np.float32, np.float32)
    shapes = ((-1, k), (-1, k), (-1,), (-1,))
    return Told(*(np.array(list(column), kind).reshape(shape) for column, kind, shape in zip(columns, kinds, shapes, strict=True)))


def _row(entry: Any, actual: int, k: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Ids, log-probabilities, log of the mass of the others, and the log-probability of `actual`."""
    try:
        found = {int(key): float(value["logprob"]) for key, value in entry.items()}
    except (AttributeError, TypeError, KeyError, ValueError):
        raise BadAnswerError("found a token whose log-probabilities are not keyed by token id") from None
    if not k <= len(found) <= k + 1:
        raise BadAnswerError(f"found {len(found)} log-probabilities of a token, expected {k}, or {k + 1} with the token that is there")
    if actual not in found:
        raise BadAnswerError(f"found no log-probability of token {actual}, which the prompt has there: other token ids than ours")
    ids, log_probs = np.fromiter(found, np.int64), np.fromiter(found.values(), np.float64)
    if ids.min() < 0 or ids.max() >= vocabulary + MAX_EXTRA_IDS:
        raise BadAnswerError(f"found token {int(ids.max())}, expected one of the vocabulary's {vocabulary}")
    if not np.isfinite(log_probs).all() or log_probs.max() > math.log1p(MASS_ERROR):
        raise BadAnswerError("found a log-probability that is not finite, or above 0")
    if (mass := float(np.exp(log_probs).sum())) > 1 + MASS_ERROR:
        raise BadAnswerError(f"found probabilities that add up to {mass:.4f}, expected at most 1")
    order = np.lexsort((ids, -log_probs))
    if len(found) > k and ids[order[-1]] != actual:
        # of equal ones, the token that is there is the one too many
        if found[actual] > log_probs[order[-1]]:
            raise BadAnswerError(f"found {len(found)} log-probabilities of a token that is among the first {k}, expected {k}")
        order = np.append(order[ids[order] != actual], order[ids[order] == actual])
    is_token = ids < vocabulary
    share = max(1.0 - float(np.exp(log_probs[~is_token]).sum()), SMALLEST_TAIL)
    observed = found[actual] - math.log(share)
    top = order[:k][is_token[order[:k]]]
    kept = log_probs[top] - math.log(share)
    least = math.exp(observed) if len(found) > k else 0.0
    rest = max(1.0 - float(np.exp(kept).sum()), least, SMALLEST_TAIL)
    log_tail = math.log(rest) if len(top) < vocabulary else -math.inf
    padding = k - len(top)  # with an id of the row's own, and no probability
    return (
        np.concatenate([ids[top], np.full(padding, ids[top[0]] if len(top) else actual)]),
        np.concatenate([kept, np.full(padding, -np.inf)]),
        log_tail,
        observed,
    )
