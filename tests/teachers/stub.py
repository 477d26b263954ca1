"""A server such as vLLM, around a tiny model, that can be told to fail. `from stub import Stub` works for the tests of this folder."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

NAME = "tiny-teacher"


class Stub:
    """Serves `model` over its first `vocabulary` tokens. `faults` are used up one per question about a prompt, or never with `is_ill`;
    `asked` holds the prompts, `keys` the Authorization of each."""

    def __init__(self, model, vocabulary, max_logprobs=400, max_model_len=512):
        self.model, self.vocabulary, self.max_logprobs, self.max_model_len = model, vocabulary, max_logprobs, max_model_len
        self.faults, self.is_ill, self.asked, self.keys = deque(), False, [], []
        self.dies_after = None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # who gave up waiting is no error of ours
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, question):
        ids, k = question["prompt"], question["prompt_logprobs"]
        with self._lock, torch.no_grad():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, :, : self.vocabulary]
        log_probs = torch.log_softmax(logits.float(), -1)
        said = [None]
        for position, actual in enumerate(ids[1:]):
            top, tokens = log_probs[position].topk(k)
            entry = {str(token): value for token, value in zip(tokens.tolist(), top.tolist(), strict=True)}
            entry.setdefault(str(actual), float(log_probs[position, actual]))
            said.append({token: {"logprob": value, "rank": 1, "decoded_token": "?"} for token, value in entry.items()})
        return {"model": NAME, "choices": [{"index": 0, "text": "?", "prompt_logprobs": said, "prompt_token_ids": None}]}

    def fault(self):
        with self._lock:
            self.dies_after = self.dies_after - 1 if self.dies_after is not None else None
            if self.dies_after is not None and self.dies_after < 0:
                return 503
            if not self.faults:
                return None
            return self.faults[0] if self.is_ill else self.faults.popleft()


def spoil(tree, fault):
    """An answer that is wrong in one way, in its last token."""
    entry = tree["choices"][0]["prompt_logprobs"][-1]
    first = max(entry, key=lambda token: entry[token]["logprob"])
    if fault == "nan":
        entry[first]["logprob"] = float("nan")
    elif fault == "mass":
        for value in entry.values():
            value["logprob"] = -0.1
    elif fault == "above 0":
        entry[first]["logprob"] = 0.5
    elif fault == "fewer":
        entry.popitem()
        entry.popitem()
    elif fault == "more":
        entry |= {str(token): {"logprob": -40.0} for token in range(40)}
    elif fault == "texts":
        tree["choices"][0]["prompt_logprobs"][-1] = {f"token {token}": value for token, value in entry.items()}
    elif fault == "other ids":
        tree["choices"][0]["prompt_logprobs"][-1] = {str((int(token) + 7) % 250): value for token, value in entry.items()}
    elif fault == "far ids":
        entry["99999"] = entry.pop(first)
    elif fault == "shorter":
        tree["choices"][0]["prompt_logprobs"].pop()
    elif fault == "no log-probabilities":
        tree["choices"][0]["prompt_logprobs"] = None
    return tree


def _handler(stub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def send(self, status, body, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.send(200, {"data": [{"id": NAME, "max_model_len": stub.max_model_len}]})

        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            stub.asked.append(question["prompt"])
            stub.keys.append(key)
            if question["prompt_logprobs"] > stub.max_logprobs:
                return self.send(400, {"error": {"message": f"Requested more than {stub.max_logprobs} prompt logprobs"}})
            fault = stub.fault()
            if fault == "stall":
                time.sleep(1.5)
                return None
            if fault == "death":
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if isinstance(fault, int):
                return self.send(fault, {"error": {"message": f"status {fault} for {key}"}}, Retry_After="0")
            body = json.dumps(spoil(stub.answer(question), fault)).encode()
            return self.send(200, body[:40] if fault == "garbage" else body)

    return Handler
