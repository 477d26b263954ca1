"""Plain helpers for tests: a real byte-level tokenizer and tiny Llama models, built in the process, with no network and no files.

`from helpers import tiny_model`. Fixtures that wrap these live in conftest.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "What is the weather in Paris? It is sunny in Paris today.",
    "Add two and three. The answer is five, because two and three make five.",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    "You are a helpful assistant. You answer questions about the weather and about numbers.",
    "A teacher shows a student how to answer; the student learns to answer like the teacher.",
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def chatml(generation: bool = False) -> str:
    """A ChatML template with tools, tool calls and tool results; with or without `{% generation %}` around what the model writes."""
    start, end = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    return (
        "{%- set first = messages[0] if messages else {} %}"
        "{%- if tools %}"
        "{{- '<|im_start|>system\\n' }}"
        "{%- if first.role == 'system' %}{{- first.content + '\\n\\n' }}{%- endif %}"
        "{{- '<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
        "{{- '\\n</tools><|im_end|>\\n' }}"
        "{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message.role == 'system' and loop.first and tools %}"
        "{%- elif message.role == 'assistant' %}"
        "{{- '<|im_start|>assistant\\n' }}"
        f"{start}"
        "{%- if message.content %}{{- message.content }}{%- endif %}"
        "{%- for call in message.tool_calls or [] %}"
        "{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}"
        "{%- set call = call.function if call.function is defined else call %}"
        "{{- '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}"
        "{%- endfor %}"
        "{{- '<|im_end|>' }}"
        f"{end}"
        "{{- '\\n' }}"
        "{%- else %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def make_tokenizer(sentences: Iterable[str] = SENTENCES, vocab_size: int = 400, template: str | None = chatml()) -> PreTrainedTokenizerFast:
    """A new byte-level BPE tokenizer trained on `sentences`; pad == eos == <|im_end|>, as in SmolLM2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def _vocab_size() -> int:
    return len(make_tokenizer())


def tiny_config(**overrides: Any) -> LlamaConfig:
    """A Llama of 4 blocks and width 32 over the test tokenizer's vocabulary and 5 padded rows."""
    settings: dict[str, Any] = {
        "vocab_size": _vocab_size() + 5,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(settings | overrides))


def tiny_model(
    tied: bool = True, layers: int = 4, width: int = 32, vocab: int | None = None, seed: int = 0, **overrides: Any
) -> LlamaForCausalLM:
    """A float32 Llama in eval mode; the same arguments give the same weights, and torch's global generator is left as it was."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width, "tie_word_embeddings": tied}
    if vocab is not None:
        sizes["vocab_size"] = vocab
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**(sizes | overrides))).float().eval()


def save_model(path: Path, model: LlamaForCausalLM | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A folder with model and tokenizer, as one gets it from the hub."""
    (model or tiny_model()).save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """`rows` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


FAKE_WANDB = """
import json, os

class _Run:
    def __init__(self, settings):
        self.write("init", settings)
    def write(self, what, value):
        with open(os.environ["FAKE_WANDB"], "a") as file:
            file.write(json.dumps([what, value]) + "\\n")
    def define_metric(self, name, step_metric):
        self.write("axis", step_metric)
    def log(self, row):
        print("a tracker's chatter on stdout")
        if row["step"] == int(os.environ.get("FAKE_WANDB_BREAKS", 0)):
            raise ConnectionError("no network")
        self.write("row", row)
    def finish(self, exit_code):
        self.write("finish", exit_code)

def init(**settings):
    if "FAKE_WANDB_REFUSES" in os.environ:
        raise ValueError("no api key")
    return _Run(settings)
"""


def killed_run(recipe: dict[str, Any], folder: Path, settings: Sequence[str]) -> Path:
    """The directory of a training run in a process of its own that was killed after its first checkpoint."""
    file, path = folder / "recipe.yaml", folder / "killed"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "limbeck", "train", str(file), *settings, "--out", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list((path / "checkpoints").glob("step-*[0-9]")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (path / "student").exists(), "the run was over before it could be killed"
    return path


def forked(arguments: Sequence[str], log: Path, largest: int | None = None, **environment: str) -> int:
    """The id of a forked process that runs the command line with these arguments: torch is imported. Its output goes to `log`, and it can
    write no file of more than `largest` bytes."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ |= environment
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.argv = ["limbeck", *arguments]
        from limbeck.cli import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forked_ranks(arguments: Sequence[str], folder: Path, **environment: str) -> list[int]:
    """Two such processes, as a launcher starts them; output goes to rank-0.txt and rank-1.txt."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [forked(arguments, folder / f"rank-{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]


def exit_code(process: int, seconds: float = 240) -> int:
    """How a forked process ended; it is killed where it has not after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"process {process} had not ended after {seconds} seconds")


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until something is there."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


class _Malloc(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def large_blocks_have_pages() -> bool | None:
    """Whether 4 MB get pages of their own from the allocator, and not a place in the heap; None where there is no glibc from 2.33 on."""
    try:
        look = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    look.restype = _Malloc
    freed = bytearray(16 << 20)
    del freed  # from here on glibc would have all that is smaller in its heap
    before = look().hblkhd
    block = bytearray(4 << 20)
    return bool(look().hblkhd - before >= len(block))
