"""Rendered rows on disk: the same as fresh ones, found again exactly when nothing changed, and never trusted when damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limbeck.tokens.render as render_module
from helpers import chatml, make_tokenizer
from limbeck.tokens import rendered
from limbeck.tokens.rendered import MIN_ROWS, render_rows
from limbeck.tokens.sample import Conversation, Rendered

ROWS = [Conversation(prompt=f"What is {i}?", completion="The answer is five.") for i in range(MIN_ROWS - 1)]
ROWS.append(Conversation(messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"})))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    return tmp_path / "rendered"


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many rows were rendered since it was asked last."""
    calls: list[Conversation] = []
    original = render_module.render_whole
    monkeypatch.setattr(render_module, "render_whole", lambda row, tokenizer: calls.append(row) or original(row, tokenizer))

    def asked() -> int:
        number = len(calls)
        calls.clear()
        return number

    return asked


def same(a: list[Rendered], b: list[Rendered]) -> bool:
    return [(row.ids.tolist(), row.is_target.tolist()) for row in a] == [(row.ids.tolist(), row.is_target.tolist()) for row in b]


def test_the_second_time_nothing_is_rendered(tokenizer: Any, folder: Path, count: Callable[[], int]) -> None:
    first = render_rows(ROWS, tokenizer)
    assert count() == len(ROWS)
    (file,) = folder.iterdir()
    os.utime(file, (1, 1))
    assert same(render_rows(ROWS, tokenizer), first)
    assert count() == 0
    assert file.stat().st_mtime > 1, "a file that is used counts as new"


def test_small_sets_leave_no_file(tokenizer: Any, folder: Path) -> None:
    render_rows(ROWS[1:], tokenizer)
    assert not folder.exists()


def _template(tokenizer: Any) -> None:
    tokenizer.chat_template = chatml().replace("assistant\\n", "assistant \\n")


def _token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["fox jumps"])


def _eos(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"


@pytest.mark.parametrize("change", [_template, _token, _eos])
def test_another_tokenizer_or_template_renders_anew(change: Callable[[Any], None], count: Callable[[], int]) -> None:
    tokenizer = make_tokenizer()
    render_rows(ROWS, tokenizer)
    count()
    change(tokenizer)
    render_rows(ROWS, tokenizer)
    assert count() == len(ROWS)
    render_rows(ROWS, make_tokenizer())
    assert count() == 0


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[::-1],
        [*ROWS[:-1], Conversation(prompt="What is 9?", completion="five")],
        [*ROWS[:-1], Conversation(text="What is 9?")],
        [*ROWS, ROWS[0]],
    ],
)
def test_other_rows_render_anew(rows: list[Conversation], tokenizer: Any, count: Callable[[], int]) -> None:
    render_rows(ROWS, tokenizer)
    count()
    render_rows(rows, tokenizer)
    assert count() == len(rows)


def test_other_code_renders_anew(tokenizer: Any, count: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    render_rows(ROWS, tokenizer)
    count()
    monkeypatch.setattr(rendered, "CODE", ("chat.py",))
    render_rows(ROWS, tokenizer)
    assert count() == len(ROWS)


def test_what_only_names_a_row_does_not_matter(tokenizer: Any, count: Callable[[], int]) -> None:
    from dataclasses import replace

    render_rows(ROWS, tokenizer)
    count()
    render_rows([replace(row, where="elsewhere", format="messages") for row in ROWS], tokenizer)
    assert count() == 0


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "swap"])
def test_a_damaged_file_is_made_again(damage: str, tokenizer: Any, folder: Path, count: Callable[[], int]) -> None:
    first = render_rows(ROWS, tokenizer)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "swap":  # whole, and of other rows
        render_rows(ROWS[::-1], tokenizer)
        (other,) = set(folder.iterdir()) - {file}
        other.replace(file)
    else:
        flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
        file.write_bytes({"truncate": whole[:-10], "flip": flipped, "empty": b""}[damage])
    count()
    assert same(render_rows(ROWS, tokenizer), first)
    assert count() == len(ROWS)
    assert same(render_rows(ROWS, tokenizer), first) and count() == 0


def test_a_folder_that_cannot_be_written_costs_time_only(tokenizer: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("a file where the folder would be")
    assert len(render_rows(ROWS, tokenizer)) == len(ROWS)
    assert "could not be kept" in capsys.readouterr().err


def test_the_files_used_last_are_kept(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        render_rows([*ROWS, ROWS[number]], tokenizer)
        newest = max(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number + 1, number + 1))
    sizes = {file.stat().st_mtime: file.stat().st_size for file in folder.iterdir()}
    monkeypatch.setattr(rendered, "MAX_BYTES", 3 * max(sizes.values()) + 10)
    render_rows(ROWS, tokenizer)
    assert sorted(int(file.stat().st_mtime) for file in folder.iterdir())[:2] == [2, 3]
    assert len(list(folder.iterdir())) == 3
    assert not list(folder.glob(".*"))
