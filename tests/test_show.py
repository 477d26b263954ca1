"""`check --show-data`: what is shown is what is trained on, readable with and without colours, and harmless whatever the data says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import limbeck
from limbeck import cli, show
from limbeck.errors import RecipeError
from limbeck.show import numbers, print_sample, quantiles, segments, show_data, summary
from limbeck.tokens.render import render
from limbeck.tokens.sample import Conversation

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "The answer is five. " * (1 + i % 3)}]}
    for i in range(9)
]
HOSTILE = Conversation(prompt="\x1b[2J\x07[red]x[/red]\u202e", completion="\x9b31m\t\n[/] 🦊")


@pytest.fixture(scope="module")
def recipe(make_model_dir: Callable[..., Path]) -> dict[str, Any]:
    rows = [*ROWS, ROWS[0]]
    return {
        "student": {"model": str(make_model_dir(layers=2))},
        "source": {"type": "dataset", "data": {"rows": rows}, "max_length": 30},
        "objective": [{"type": "ce"}],
        "train": {"epochs": 2, "batch_size": 4, "micro_batch_size": 2},
        "evaluate": [{"type": "bits_per_byte", "data": {"rows": [ROWS[1], {"prompt": "a", "completion": "b"}]}}],
    }


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def printed(monkeypatch: pytest.MonkeyPatch, conversation: Conversation, tokenizer: Any, **settings: Any) -> str:
    output = io.StringIO()
    monkeypatch.setattr(show, "console", Console(file=output, width=60, _environ={}, **settings))
    print_sample(render(conversation, tokenizer, 999), tokenizer, 0)
    return output.getvalue()


def test_scored_text_is_in_brackets_where_there_are_no_colours(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    conversation = Conversation(messages=({"role": "user", "content": "hi [b]"}, {"role": "assistant", "content": "yes"}))
    expected = "<|im_start|>user\nhi [b]<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
    for settings in ({"force_terminal": False}, {"force_terminal": True, "no_color": True}):
        text = printed(monkeypatch, conversation, tokenizer, **settings)
        assert expected in text and "scored tokens in ⟦⟧" in text


def test_scored_text_is_green_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    text = printed(monkeypatch, Conversation(prompt="a", completion="b"), tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[2ma\x1b[0m\x1b[32mb<|im_end|>\x1b[0m" in text and "⟦" not in text


def test_data_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    text = printed(monkeypatch, HOSTILE, tokenizer, force_terminal=False)
    assert "\\u001b[2J\\u0007[red]x[/red]\\u202e⟦\\u009b31m" in text
    assert not [char for char in text if not char.isprintable() and char not in "\n\t"]


def test_segments_join_to_the_text_of_the_sample(tokenizer: Any) -> None:
    for conversation in (HOSTILE, Conversation(text="é🦊" * 3), Conversation(prompt="🦊", completion="")):
        sample = render(conversation, tokenizer, 999)
        whole = tokenizer.decode(sample.ids, clean_up_tokenization_spaces=False)
        assert "".join(text for _, text in segments(sample, tokenizer)) == show.visible(whole)
        flags = [flag for flag, _ in segments(sample, tokenizer)]
        assert flags == [index % 2 == 1 for index in range(len(flags))]


def test_numbers_by_hand(recipe: dict[str, Any], tokenizer: Any) -> None:
    parsed = limbeck.parse_recipe(recipe)
    source = parsed.source.open(tokenizer, 0)
    found = numbers(parsed, source, tokenizer)
    lengths = sorted(len(sample.ids) for sample in source.samples)
    assert found["lengths"] == {**found["lengths"], "min": lengths[0], "max": lengths[-1], "median": lengths[4]}
    assert found["lengths_before_cutting"]["max"] > 30 == lengths[-1]
    assert (found["num_samples"], found["num_duplicates"], found["steps_per_epoch"], found["epochs"]) == (10, 1, 3, 2)
    assert found["held_out"] == {"bits_per_byte": {"cases": 2, "also_trained_on": 1}}
    computed = {True: 0, False: 0}
    for step in range(3):
        rows = sorted((len(sample.ids) for sample in source.at(step, 4)), reverse=True)
        computed[False] += 2 * rows[0] + 2 * rows[2]
    tokens = sum(len(sample.ids) for step in range(3) for sample in source.at(step, 4))
    shares = found["share_not_padding"]
    assert shares["padded"] == pytest.approx(tokens / computed[False])
    assert (shares["pack_length"], shares["is_packed"]) == (30, False)
    packed = limbeck.parse_recipe(recipe, ["train.pack_length=200", "train.micro_batch_size=1"])
    shares = numbers(packed, source, tokenizer)["share_not_padding"]
    assert shares["packed"] == 1.0 and shares["is_packed"]
    assert json.loads(json.dumps(found)) == found


def test_summary_says_what_was_lost(recipe: dict[str, Any], tokenizer: Any) -> None:
    parsed = limbeck.parse_recipe(recipe, ["source.data.held_out=0.3", "source.min_length=28"])
    lines = dict(summary(numbers(parsed, parsed.source.open(tokenizer, 0), tokenizer)))
    assert "rows: " in lines["data"] and "held out" in lines["data"] and "messages)" in lines["data"]
    assert "too short" in lines["rows"] and "truncated" in lines["rows"] and "tokens are cut" in lines["rows"]
    assert "train.pack_length: 30" in lines["padding"]


def test_quantiles_are_values_that_occur() -> None:
    assert quantiles([7]) == dict.fromkeys(show.QUANTILES, 7)
    assert quantiles(range(1, 101)) == {"min": 1, "5%": 6, "25%": 26, "median": 51, "75%": 75, "95%": 95, "max": 100}


def test_command_line(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["limbeck", "check", str(file), *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 1  # one of the two held-out cases is trained on
        captured = capsys.readouterr()
        return captured.out, captured.err

    out, err = run("--show-data", "--rows", "2")
    assert out == "" and err.count("--- sample") == 2 and err.count("⟦The answer is five.") == 2
    assert "10 of 10 rows (10 messages)" in err and "valid recipe" in err
    out, err = run("--show-data", "--json")
    assert "--- sample" not in err and json.loads(out)["data"]["num_scored"] > 0
    assert "data" not in json.loads(run("--json")[0])


def test_first_samples_are_those_of_the_first_step(file: Path, recipe: dict[str, Any], tokenizer: Any, capsys: Any) -> None:
    show_data(file, ["seed=3"], rows=3)
    shown = capsys.readouterr().err
    first = limbeck.parse_recipe(recipe).source.open(tokenizer, 3).at(0, 3)
    for number, sample in enumerate(first):
        assert f"--- sample {number + 1}: {len(sample.ids)} tokens, {sample.num_scored} scored" in shown


def test_a_study_shows_every_data_set_once(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {key: value for key, value in recipe.items() if key != "objective"}
    arms: dict[str, Any] = {name: {"objective": [{"type": "ce", "weight": weight}]} for name, weight in (("a", 1), ("b", 2))}
    arms["c"] = arms["a"] | {"source": {"max_length": 25}}
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"name": "s", "base": base, "arms": arms}))
    found = show_data(path, rows=1)
    assert list(found) == ["a, b", "c"] and found["c"]["lengths"]["max"] == 25
    assert capsys.readouterr().err.count("--- sample") == 2


def test_a_recipe_without_a_tokenizer_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"source": recipe["source"]}))
    with pytest.raises(RecipeError, match="student: missing; expected a model whose tokenizer renders the data"):
        show_data(path)
