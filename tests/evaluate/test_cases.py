"""The subset of a benchmark: by content, not by place."""

from __future__ import annotations

import hashlib
import random

from limbeck.cache import files_hash
from limbeck.evaluate import cases
from limbeck.evaluate.cases import choose, in_batches

ROWS = [f"row-{i}" for i in range(50)]


def test_the_order_of_the_file_does_not_matter():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert choose(ROWS, str, 10) == choose(shuffled, str, 10)
    assert choose(ROWS, str, 10) != ROWS[:10]


def test_a_smaller_limit_takes_a_part_of_a_larger_one():
    assert choose(ROWS, str, 30)[:10] == choose(ROWS, str, 10)
    assert sorted(choose(ROWS, str, None)) == sorted(ROWS) == sorted(choose(ROWS, str, 1000))


def test_a_row_that_is_there_twice_counts_once():
    assert len(choose(ROWS * 2, str, None)) == len(ROWS)


def test_rows_of_other_files_do_not_change_the_choice_among_ours():
    chosen = choose(ROWS, str, 10)
    assert [row for row in choose([*ROWS, "x", "y", "z"], str, 13) if row in ROWS][:10] == chosen


def test_batches():
    batches = in_batches(["aaa", "b", "cc", "d", "eeee"], len, 2)
    assert batches == [["b", "d"], ["cc", "aaa"], ["eeee"]]
    assert in_batches([], len, 2) == []


def test_files_hash_is_of_content(write_jsonl):
    one, same, other = write_jsonl([{"a": 1}], "1.jsonl"), write_jsonl([{"a": 1}], "2.jsonl"), write_jsonl([{"a": 2}], "3.jsonl")
    assert files_hash([str(one)]) == files_hash([str(same)]) != files_hash([str(other)])
    assert files_hash([str(one), str(other)]) != files_hash([str(other), str(one)])


def test_a_file_is_hashed_anew_once_it_has_changed(write_jsonl, monkeypatch):
    file, read = write_jsonl([{"a": 1}], "grows.jsonl"), []
    digest = hashlib.file_digest
    monkeypatch.setattr(cases.hashlib, "file_digest", lambda stream, name: read.append(stream.name) or digest(stream, name))
    first = files_hash([str(file)])
    assert files_hash([str(file)]) == first and len(read) == 1
    file.write_text(file.read_text() + "{}\n")
    assert files_hash([str(file)]) != first and len(read) == 2
