"""JSON lines to conversations: what is read, and that each bad row is refused by file, line and key."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest

from helpers import chatml
from limbeck.errors import DataError, RecipeError
from limbeck.spec import validate
from limbeck.tokens.datasets import DataSet, data_hash, read_conversations
from limbeck.tokens.formats import conversation_of
from limbeck.tokens.render import render
from limbeck.tokens.sample import make_sample

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def call(**function):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


def refusal(tmp_path, content):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_conversations(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    return message.removeprefix(str(file))


# ---- what is read


def test_both_forms(write_jsonl):
    rows = [
        {"messages": HI, "tools": [TOOL], "source": "x", "id": 3},
        {"prompt": "a", "completion": "b"},
        {"messages": HI, "prompt": None, "tools": None},
        {"messages": HI, "prompt": "hi", "prompt_id": "77", "tools": []},
    ]
    file = write_jsonl(rows)
    conversations = read_conversations(file)
    assert [c.messages for c in conversations] == [tuple(HI), (), tuple(HI), tuple(HI)]
    assert [c.tools for c in conversations] == [(TOOL,), (), (), ()]
    assert [(c.prompt, c.completion) for c in conversations] == [(None, None), ("a", "b"), (None, None), (None, None)]
    assert [c.where for c in conversations] == [f"{file}:{line}" for line in (1, 2, 3, 4)]


def test_tools_as_json_text():
    assert conversation_of({"messages": HI, "tools": json.dumps([TOOL])}, "x").tools == (TOOL,)
    assert conversation_of({"messages": HI, "tools": ""}, "x").tools == ()
    assert conversation_of({"messages": HI, "tools": [{"name": "f"}]}, "x").tools == ({"name": "f"},)


def test_arguments_as_json_text_become_an_object(tokenizer):
    """A template that writes `arguments | tojson` would else train on JSON inside a JSON string."""
    as_text = conversation_of({"messages": call(name="f", arguments='{"city": "Paris"}')}, "x")
    as_object = conversation_of({"messages": call(name="f", arguments={"city": "Paris"})}, "x")
    flat = conversation_of(
        {"messages": [HI[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"city": "Paris"}'}]}]}, "x"
    )
    assert as_text == as_object
    assert as_text.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert flat.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"city": "Paris"}}]
    assert render(as_text, tokenizer, 999).ids.tolist() == render(flat, tokenizer, 999).ids.tolist()
    assert conversation_of({"messages": call(name="f", arguments="")}, "x").messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_null_values_are_absent():
    messages = [{"role": "user", "content": "hi", "name": None, "tool_calls": None}, {**call(name="f", arguments={})[1], "content": None}]
    first, second = conversation_of({"messages": messages}, "x").messages
    assert first == {"role": "user", "content": "hi"}
    assert set(second) == {"role", "tool_calls"}


def test_limit_reads_no_further(write_jsonl, tmp_path):
    file = write_jsonl([{"prompt": str(i), "completion": "b"} for i in range(5)])
    file.write_text(file.read_text() + "not json\n")
    assert [c.prompt for c in read_conversations(file, limit=3)] == ["0", "1", "2"]
    assert len(read_conversations(file, limit=5)) == 5
    with pytest.raises(DataError):
        read_conversations(file)


def test_blank_lines_byte_order_mark_and_line_separators(tmp_path):
    file = tmp_path / "data.jsonl"
    row = '{"prompt": "a\u2028b", "completion": "é🦊"}'
    file.write_bytes(f"\ufeff{row}\r\n\n  \n{row}".encode())
    first, second = read_conversations(file)
    assert first.prompt == second.prompt == "a\u2028b"
    assert second.completion == "é🦊"
    assert second.where.endswith(":4")


def test_a_surrogate_pair_is_a_character(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "\\ud83e\\udd8a", "completion": "b"}')
    assert read_conversations(file)[0].prompt == "🦊"


# ---- what is refused


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"mesages": HI}, ["found keys 'mesages'", "expected `messages`", "did you mean 'messages'?"]),
        ({"Messages": HI}, ["did you mean 'messages'?"]),
        ({"dialog": HI}, ["found keys 'dialog'", "`prompt` and `completion`", "named by `convert`"]),
        ({}, ["found no keys"]),
        ([HI], ["found a list", "expected an object"]),
        ("hi", ["found a text"]),
        ({"prompt": "a"}, ["`completion` is missing"]),
        ({"prompt": "a", "completion": None}, ["`completion` is missing"]),
        ({"prompt": "a", "completions": "b"}, ["`completion` is missing", "did you mean 'completion'?"]),
        ({"completion": "a"}, ["`prompt` is missing"]),
        ({"prompt": HI, "completion": "b"}, ["completion: found a text ('b'), expected a list"]),
        ({"prompt": "a", "completion": HI}, ["completion: found a list", "both `prompt` and `completion` as lists of messages"]),
        ({"prompt": "a", "completion": 4}, ["completion: found a number (4), expected a text"]),
        ({"messages": []}, ["messages: found an empty list"]),
        ({"messages": "hi"}, ["messages: found a text ('hi'), expected a list"]),
        ({"messages": ["hi"]}, ["messages.0: found a text"]),
        ({"messages": [HI[0], {"from": "gpt", "value": "yes"}]}, ["messages.1: `role` is missing, found keys 'from', 'value'"]),
        ({"messages": [{"roll": "user", "content": "a"}]}, ["`role` is missing", "did you mean 'role'?"]),
        ({"messages": [{"role": "asistant", "content": "a"}]}, ["messages.0.role: found 'asistant'", "tool", "did you mean 'assistant'?"]),
        ({"messages": [{"role": "User", "content": "a"}]}, ["did you mean 'user'?"]),
        ({"messages": [{"role": 3, "content": "a"}]}, ["messages.0.role: found 3"]),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ["messages.0.role: found ['user']"]),
        ({"messages": [{"role": "user", "contnet": "a"}]}, ["messages.0: `content` is missing", "did you mean 'content'?"]),
        ({"messages": [{"role": "user", "content": None}]}, ["`content` is missing"]),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, ["`content` is missing"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, ["messages.0.content: found a list"]),
        ({"messages": [{"role": "user", "content": 3.5}]}, ["messages.0.content: found a number (3.5), expected a text"]),
        ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, ["messages.0.tool_calls: found a text"]),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, ["messages.0.tool_calls.0: found 'f'"]),
        ({"messages": call(arguments={})}, ["messages.1.tool_calls.0", "`name`"]),
        ({"messages": call(name="f", arguments=[1])}, ["messages.1.tool_calls.0: arguments: found a list"]),
        ({"messages": call(name="f", arguments="{city")}, ["messages.1.tool_calls.0: arguments: not readable as JSON"]),
        ({"messages": call(name="f")}, ["messages.1.tool_calls.0: arguments: found null"]),
        ({"messages": HI, "tools": {"name": "f"}}, ["tools: found an object"]),
        ({"messages": HI, "tools": "[{"}, ["tools: not readable as JSON"]),
        ({"messages": HI, "tools": ["f"]}, ["tools.0: found 'f'"]),
        ({"messages": HI, "tools": [{"type": "function", "function": {}}]}, ["tools.0", "function `name`"]),
        ({"messages": HI, "tool": [TOOL]}, ["unknown key 'tool'", "did you mean 'tools'?"]),
    ],
)
def test_bad_rows(row, parts, tmp_path):
    message = refusal(tmp_path, json.dumps({"messages": HI}) + "\n" + json.dumps(row) + "\n")
    assert message.startswith(":2: ")
    for part in parts:
        assert part in message


def test_no_far_fetched_hint(tmp_path):
    assert "did you mean" not in refusal(tmp_path, json.dumps({"id": 1, "passage": "a", "question": "b"}))


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"', 2, "not readable as JSON"),
        (b"{\n", 1, "the whole object on one line"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b'\n{"prompt": "caf\xe9", "completion": "b"}\n', 2, "found byte 0xe9 at column 16, expected UTF-8 text"),
        ('{"prompt": "a"}'.encode("utf-16"), 1, "expected UTF-8"),
        (b'{"prompt": "a", "completion": "x\\ud83dy"}', 1, "completion: found a lone surrogate '\\ud83d' at character 2"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', 1, "messages.0: content: found a lone surrogate"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "[{\\"name\\": \\"\\\\ud800\\"}]"}', 1, "tools.0: name: found a lone"),
    ],
)
def test_bad_bytes(content, line, part, tmp_path):
    message = refusal(tmp_path, content)
    assert message.startswith(f":{line}: ")
    assert part in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(content, tmp_path):
    assert "found no rows" in refusal(tmp_path, content)


def test_unreadable_file(tmp_path):
    for path, problem in ((tmp_path, "a folder, expected a file"), (tmp_path / "missing.jsonl", "no such file")):
        with pytest.raises(DataError, match=problem):
            read_conversations(path)


def test_messages_are_long_but_errors_are_not(tmp_path):
    assert len(refusal(tmp_path, json.dumps({"messages": "x" * 10_000}))) < 200


# ---- which rows


TEXTS = [{"text": f"text {i}"} for i in range(200)]


def texts(**settings):
    return [conversation.text for conversation in DataSet(**settings).read().conversations]


def test_origins_give_the_same_rows(write_jsonl):
    file = str(write_jsonl(TEXTS))
    assert texts(path=file) == texts(rows=TEXTS) == texts(rows=iter(TEXTS)) == [row["text"] for row in TEXTS]
    assert [chosen.name for chosen in (DataSet(path=file).read(), DataSet(rows=TEXTS).read())] == [file, "rows"]
    assert DataSet(rows=TEXTS).read().conversations[7].where == "row 8"


def test_rows_are_a_copy_that_survives_the_recipe():
    rows = [{"text": "a"}]
    given = DataSet(rows=rows)
    rows[0]["text"] = "b"
    assert given.read().conversations[0].text == "a"
    assert DataSet.model_validate_json(given.model_dump_json()) == given


def test_limit_takes_the_first_rows_and_with_a_seed_any(write_jsonl):
    assert texts(rows=TEXTS, limit=5) == [row["text"] for row in TEXTS[:5]]
    drawn = texts(rows=TEXTS, limit=50, seed=0)
    assert len(drawn) == 50 and drawn != [row["text"] for row in TEXTS[:50]]
    assert drawn == sorted(drawn, key=lambda text: int(text.split()[1])), "rows keep their order"
    assert set(texts(rows=TEXTS, limit=20, seed=0)) < set(drawn) != set(texts(rows=TEXTS, limit=50, seed=1))
    assert set(texts(rows=TEXTS[::-1], limit=50, seed=0)) == set(drawn), "whatever the order of the file"
    assert len(texts(rows=TEXTS, limit=500, seed=0)) == 200


def test_the_two_sides_of_held_out_share_no_row_and_lose_none():
    rows = [*TEXTS, *TEXTS[:20]]
    data = DataSet(rows=rows, held_out=0.2)
    train, heldout = ([c.text for c in data.read(held_out=side).conversations] for side in (False, True))
    assert sorted(train + heldout) == sorted(row["text"] for row in rows)
    assert not set(train) & set(heldout), "a row's copies are on its side"
    assert 20 < len(heldout) < 65
    assert [c.text for c in DataSet(rows=rows[::-1], held_out=0.2).read(held_out=True).conversations] == heldout[::-1]
    assert [c.text for c in DataSet(rows=rows, held_out=0.2, seed=1).read(held_out=True).conversations] != heldout
    assert set(heldout) < {c.text for c in DataSet(rows=rows, held_out=0.4).read(held_out=True).conversations}
    assert texts(rows=rows) == [c.text for c in DataSet(rows=rows).read(held_out=True).conversations], "without it there is one side"
    chosen = data.read()
    assert (chosen.num_rows, chosen.num_other_side, len(chosen.conversations)) == (220, len(heldout), len(train))


def test_limit_and_held_out_draw_apart():
    """The rows of a limit are not those that are next to be held out: a limit of half leaves half of each side."""
    data = DataSet(rows=TEXTS, held_out=0.5, limit=40, seed=0)
    everything = {c.text for c in DataSet(rows=TEXTS, limit=80, seed=0).read().conversations}
    heldout = {c.text for c in data.read(held_out=True).conversations}
    assert 0 < len(everything & heldout) < 40


def test_origins_are_told_apart():
    for settings, message in [
        ({}, "found none of them, expected one of `path`, `hub` and `rows`"),
        ({"path": "x", "rows": []}, "found path and rows"),
        ({"path": "x", "split": "train"}, "found `split` with `path`; only data sets of the hub"),
        ({"rows": [], "revision": "main"}, "found `revision` with `rows`"),
        ({"path": "x", "convert": "module.function"}, "convert: found 'module.function', expected `module:function`"),
        ({"rows": [{"text": {1}}]}, "expected rows of texts, numbers, lists and mappings: Object of type set"),
    ]:
        with pytest.raises(RecipeError) as caught:
            validate(DataSet, settings, "recipe")
        assert message in str(caught.value)


def test_a_name_like_the_hubs_says_how_the_hub_is_named():
    with pytest.raises(DataError, match=r"no such file or data set.*\{hub: HuggingFaceH4/no_robots\}"):
        DataSet(path="HuggingFaceH4/no_robots").check()
    with pytest.raises(DataError) as caught:
        DataSet(path="data/train.jsonl").check()
    assert "hub" not in str(caught.value)


def test_a_set_without_rows_is_refused():
    with pytest.raises(DataError, match="rows: found no rows"):
        DataSet(rows=[]).read()


# ---- a function of the user's


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(source)` writes `my_rows.py` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(source):
        (tmp_path / "my_rows.py").write_text(source)
        monkeypatch.delitem(sys.modules, "my_rows", raising=False)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("my_rows", None)


QA = [{"q": "a", "a": "b"}, {"q": "c", "a": None}, {"q": "d", "a": "e"}]


def test_convert_makes_rows_of_a_known_format_or_leaves_them_out(module):
    module("def f(row):\n    return {'prompt': row['q'], 'completion': row['a']} if row['a'] else None\nclass C:\n    f = staticmethod(f)")
    for name in ("my_rows:f", "my_rows:C.f"):
        chosen = DataSet(rows=QA, convert=name).read()
        assert [(c.prompt, c.completion, c.where) for c in chosen.conversations] == [("a", "b", "row 1"), ("d", "e", "row 3")]
        assert (chosen.num_rows, chosen.num_left_out) == (3, 1)
    assert len(DataSet(rows=QA, convert="my_rows:f", limit=2).read().conversations) == 2, "rows that are left out do not count"
    assert "my_rows" in sys.modules and str(Path.cwd()) not in sys.path


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "my_row:f", "found no module 'my_row' in .*; did you mean 'my_rows'"),
        ("", "my_rows.inner:f", "found no module 'my_rows.inner'"),
        ("import surely_not_installed", "my_rows:f", "my_rows imports 'surely_not_installed', which is not installed"),
        ("1 / 0", "my_rows:f", "importing my_rows raised ZeroDivisionError"),
        ("def fun(row): ...", "my_rows:fn", "my_rows has no 'fn'; did you mean 'fun'"),
        ("f = 3", "my_rows:f", "found int, expected a function"),
    ],
)
def test_convert_that_is_not_there_is_refused_before_rows_are_read(source, name, message, module):
    module(source)
    with pytest.raises(DataError, match=f"convert '{name}': {message}"):
        DataSet(rows=QA, convert=name).check()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("row['question']", r"row 1: convert 'my_rows:f' raised KeyError: 'question'"),
        ("[row]", "row 1: found a list .*, expected an object with `messages`"),
        ("{'prompt': row['q']}", "row 1: `completion` is missing"),
        ("{'prompt': row['q'], 'completion': 'x' if row['q'] == 'a' else 3}", "row 2: completion: found a number"),
    ],
)
def test_convert_that_fails_names_the_row(body, message, module):
    module(f"def f(row):\n    return {body}")
    with pytest.raises(DataError, match=message):
        DataSet(rows=QA, convert="my_rows:f").read()


# ---- the hub


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder laid out as data sets of the hub are; `datasets` keeps its copies in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", TEXTS[:10]), ("test", [{"text": "x"}, {"text": None}])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_splits_of_a_hub_data_set(hub_folder):
    assert texts(hub=hub_folder) == [row["text"] for row in TEXTS[:10]]
    assert texts(hub=hub_folder, split="train[:20%]") == ["text 0", "text 1"]
    assert texts(hub=hub_folder, split="test", limit=1) == ["x"]
    with pytest.raises(DataError, match=rf"{hub_folder}:test: row 2: found no keys"):
        texts(hub=hub_folder, split="test")


def test_a_split_that_is_not_there(hub_folder):
    with pytest.raises(DataError, match=r"\(subset default, split dev\) cannot be loaded\n  cause: ValueError: .*dev"):
        texts(hub=hub_folder, split="dev")


def test_a_dataset_from_python(hub_folder):
    datasets = pytest.importorskip("datasets")
    assert texts(rows=datasets.Dataset.from_list(TEXTS[:3])) == ["text 0", "text 1", "text 2"]


def test_a_hub_data_set_offline_is_one_message(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        texts(hub="owner/no-such-set")
    assert "data set 'owner/no-such-set' (subset default, split train) cannot be loaded; HF_HUB_OFFLINE is set" in str(caught.value)


def test_the_package_of_the_hub_is_asked_for_before_anything_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"'owner/set': .*need the package `datasets`.*pip install 'limbeck\[data\]'"):
        DataSet(hub="owner/set").check()


# ---- the hash


def test_data_hash_tells_ids_masks_order_and_borders_apart():
    def hash_of(*rows):
        return data_hash([make_sample(ids, mask, 100) for ids, mask in rows])

    one, other = ([1, 2, 3], [False, True, True]), ([4, 5], [False, True])
    hashes = [
        hash_of(one, other),
        hash_of(other, one),
        hash_of(one),
        hash_of(([1, 2, 3], [False, False, True]), other),
        hash_of(([1, 2, 4], one[1]), other),
        hash_of(([1, 2], [False, True]), ([3, 4, 5], [False, False, True])),
        hash_of(),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(one, other) == hashes[0]
    assert len(hashes[0]) == 64


def test_data_hash_is_the_same_on_every_machine():
    sample = make_sample([1, 2], [False, True], 100)
    written_out = bytes([2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    assert data_hash([sample]) == hashlib.sha256(written_out).hexdigest()


def test_rendering_what_was_read(write_jsonl, fresh_tokenizer):
    fresh_tokenizer.chat_template = chatml(generation=True)
    file = write_jsonl([{"messages": HI}])
    sample = render(read_conversations(file)[0], fresh_tokenizer, 99)
    assert fresh_tokenizer.decode(sample.ids[sample.is_target]) == "yes<|im_end|>"
