"""The pair doctor: every misfit that it knows is planted once, and found; a pair that fits is let go."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import helpers
import limbeck
from limbeck import cli
from limbeck.doctor import examine, is_go, show
from limbeck.doctor.data import normalise
from limbeck.doctor.headroom import judge
from limbeck.errors import RecipeError
from limbeck.evaluate.base import Item
from limbeck.recipe import parse_recipe

ROWS = [
    {"messages": [{"role": "user", "content": f"What is two and {i}, in words?"}, {"role": "assistant", "content": f"It is {i + 2}."}]}
    for i in range(12)
]
OTHERS = [{"messages": [{"role": "user", "content": "Who sleeps on, the dog or the fox?"}, {"role": "assistant", "content": "The dog."}]}]


@pytest.fixture
def pair(model_dir: Path, make_model_dir: Any) -> dict[str, Any]:
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(model_dir)},
        "source": {"type": "dataset", "data": {"rows": ROWS}, "max_length": 200},
        "objective": [{"type": "ce"}, {"type": "logits"}],
        "train": {"steps": 1},
        "evaluate": [{"type": "bits_per_byte", "data": {"rows": OTHERS}}],
    }


def found(recipe: dict[str, Any], *overrides: str, headroom: bool = False) -> dict[str, Any]:
    return {finding.check: finding for finding in examine(parse_recipe(recipe, overrides), headroom)}


def teacher_with(tmp_path: Path, tokenizer: Any, **sizes: Any) -> str:
    return str(helpers.save_model(tmp_path / "teacher", helpers.tiny_model(**sizes), tokenizer))


def test_a_pair_that_fits_goes(pair: dict[str, Any]) -> None:
    findings = examine(parse_recipe(pair))
    assert is_go(findings) and {finding.level for finding in findings} == {"ok"}, findings
    by_name = {finding.check: finding for finding in findings}
    assert "5 padded rows" in by_name["vocabulary of the student"].message
    assert by_name["chat templates"].detail == {"rows": 12, "different": 0, "refused": ""}
    assert json.loads(json.dumps([finding.to_json() for finding in findings]))


def test_other_bytes_stop_and_are_quoted(pair: dict[str, Any], tmp_path: Path) -> None:
    other = helpers.make_tokenizer(sentences=["zebras zigzag zestfully"] * 9, vocab_size=400)
    size = len(other) + 5
    finding = found(pair | {"teacher": {"type": "model", "model": teacher_with(tmp_path, other, vocab=size)}})["tokenizers"]
    assert finding.level == "stop" and finding.detail["different"] > 0 and len(finding.detail["first"]) <= 5
    first = finding.detail["first"][0]
    assert first["student"] != first["teacher"] and f"id {first['id']} is" in finding.message


def test_other_templates_eos_and_bos_are_found(pair: dict[str, Any], tmp_path: Path, fresh_tokenizer: Any) -> None:
    fresh_tokenizer.chat_template = helpers.chatml().replace("<|im_start|>assistant", "<|im_start|>model")
    fresh_tokenizer.eos_token = "<|endoftext|>"
    findings = found(pair | {"teacher": {"type": "model", "model": teacher_with(tmp_path, fresh_tokenizer)}})
    template = findings["chat templates"]
    assert template.level == "warning" and template.detail["different"] == 12 and "12 of 12 rows" in template.message
    assert (
        template.detail["first"]["student"].endswith("assistant\nIt is 2.<|im_end|>\n") and "model" in template.detail["first"]["teacher"]
    )
    assert findings["special tokens"].level == "warning" and "'<|endoftext|>' (0)" in findings["special tokens"].message
    assert is_go(findings.values())


def test_more_ids_than_rows_stop(pair: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    small = teacher_with(tmp_path, tokenizer, vocab=300)
    finding = found(pair | {"student": {"model": small}})["vocabulary of the student"]
    assert finding.level == "stop" and "300 rows" in finding.message


def test_truncation_repeats_and_open_ends_are_warned_of(pair: dict[str, Any], fresh_tokenizer: Any, tmp_path: Path) -> None:
    findings = found(pair, "source.max_length=30", "source.data.rows=" + json.dumps([*ROWS[:3], ROWS[0]]))
    assert findings["truncation"].level == findings["repeats"].level == "warning"
    assert findings["repeats"].detail["num_duplicates"] == 1
    fresh_tokenizer.eos_token = "<|endoftext|>"
    model = helpers.tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    folder = helpers.save_model(tmp_path / "open", model, fresh_tokenizer)
    finding = found(pair | {"student": {"model": str(folder)}})["ends of answers"]
    assert finding.level == "warning" and finding.detail["without_end"] == 12 and "'<|im_end|>'" in finding.message


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_markers_that_a_head_never_learned_are_found(pair: dict[str, Any], tmp_path: Path, tokenizer: Any, tied: bool, shards: int) -> None:
    end, other = tokenizer.convert_tokens_to_ids("<|im_end|>"), len(tokenizer) + 2
    model = helpers.tiny_model(tied=tied)
    with torch.no_grad():
        model.lm_head.weight[end] = 1.5 * model.lm_head.weight[other]  # one direction: no state tells them apart
        if not tied:
            model.model.embed_tokens.weight[:] = 1.0  # what goes in decides nothing
    folder = tmp_path / "unlearned"
    model.save_pretrained(folder, max_shard_size="50KB" if shards > 1 else "5GB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > (shards > 1)
    lora = {"student": {"model": str(folder), "lora": {"rank": 2}}}
    finding = found(pair | lora)["markers to the student"]
    assert finding.level == "warning" and f"'<|im_end|>' from the unused id {other}" in finding.message, finding
    (marker,) = finding.detail["unlearned"]
    assert (marker["token"], marker["nearest"]) == (end, other) and marker["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert finding.detail["taught"] == {str(end): 12} and is_go([finding])
    # all weights are trained: the student learns them; a teacher has nothing to say of them
    assert "markers to the student" not in found(pair | {"student": {"model": str(folder)}})
    assert found(pair | {"teacher": {"type": "model", "model": str(folder)}})["markers to the teacher"].level == "warning"
    findings = found(pair | {"student": {"model": pair["student"]["model"], "lora": {"rank": 2}}})
    assert findings["markers to the student"].level == findings["markers to the teacher"].level == "ok"


def test_rows_of_zeros_were_never_learned(pair: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    """They point nowhere, so no cosine tells that they are alike."""
    end, other = tokenizer.convert_tokens_to_ids("<|im_end|>"), len(tokenizer) + 2
    model = helpers.tiny_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight[[end, other]] = 0.0
    folder = helpers.save_model(tmp_path / "zeros", model, tokenizer)
    finding = found(pair | {"student": {"model": str(folder), "lora": {"rank": 2}}})["markers to the student"]
    assert finding.level == "warning" and f"'<|im_end|>' from the unused id {other}" in finding.message, finding
    assert [each["token"] for each in finding.detail["unlearned"]] == [end]


def test_a_head_that_is_not_to_be_told_is_unknown(pair: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    folder = helpers.save_model(tmp_path / "torn", helpers.tiny_model(), tokenizer)
    (folder / "model.safetensors").unlink()
    finding = found(pair | {"teacher": {"type": "model", "model": str(folder)}})["markers to the teacher"]
    assert finding.level == "unknown" and is_go([finding])


def test_leaks_are_counted_whatever_their_spelling(pair: dict[str, Any]) -> None:
    shouted = json.loads(json.dumps(ROWS[4]).replace("What is", "WHAT  IS"))
    pair = pair | {"evaluate": [{"type": "bits_per_byte", "data": {"rows": [shouted, *OTHERS]}}]}
    finding = found(pair)["trained on: bits_per_byte"]
    assert finding.level == "stop" and (finding.detail["trained_on"], finding.detail["cases"]) == (1, 2)
    assert found(pair, "source.data.rows=" + json.dumps(OTHERS * 2 + ROWS[:1]))["trained on: bits_per_byte"].detail["trained_on"] == 1
    assert normalise("ﬁne,  Thanks!\n") == "fine thanks"


def test_questions_of_a_test_are_looked_for_among_the_prompts(pair: dict[str, Any], write_jsonl: Any) -> None:
    question = {"id": "a", "question": ROWS[7]["messages"][0]["content"], "choices": ["nine", "ten"], "answer": 0}
    file = write_jsonl([question, {**question, "id": "b", "question": "Is this one of those that were trained on?"}])
    finding = found(pair | {"evaluate": [{"type": "multiple_choice", "data": str(file)}]})["trained on: multiple_choice"]
    assert (finding.detail["trained_on"], finding.detail["cases"]) == (1, 2)


def test_a_model_that_is_not_here_is_unknown_and_stops_nothing(pair: dict[str, Any]) -> None:
    absent = {"type": "model", "model": "nobody/nothing"}
    findings = found(pair | {"teacher": absent, "evaluate": [{"type": "bits_per_byte", "data": {"rows": ROWS}}]}, headroom=True)
    assert findings["tokenizers"].level == findings["headroom"].level == "unknown"
    assert "nobody/nothing" in findings["tokenizers"].message
    assert findings["scored tokens"].level == "ok" and findings["trained on: bits_per_byte"].level == "stop"
    both = list(examine(parse_recipe(pair | {"student": {"model": "nobody/else"}, "teacher": absent, "evaluate": []})))
    assert [finding.level for finding in both] == ["unknown"] * 2
    assert "nobody/else" in both[0].message and "nobody/nothing" in both[1].message
    findings = found(pair | {"student": {"model": "nobody/nothing"}})
    assert {check: finding.level for check, finding in findings.items()} == {"tokenizers": "unknown", "trained on: bits_per_byte": "ok"}


def test_a_served_teachers_tokenizer_is_compared_too(pair: dict[str, Any], tmp_path: Path, fresh_tokenizer: Any) -> None:
    fresh_tokenizer.chat_template = helpers.chatml().replace("<|im_start|>assistant", "<|im_start|>model")
    fresh_tokenizer.save_pretrained(tmp_path / "alone")
    served = {"type": "server", "url": "http://127.0.0.1:9/v1", "served_name": "t", "tokenizer": str(tmp_path / "alone"), "k": 8}
    findings = found(pair | {"teacher": served})
    assert findings["tokenizers"].level == "ok" and findings["chat templates"].level == "warning"
    assert "vocabulary of the teacher" not in findings


def test_a_server_that_does_not_answer_is_reported_at_once(pair: dict[str, Any], tokenizer_dir: Path, monkeypatch: Any) -> None:
    """Its patience, 600 seconds, is for runs."""
    monkeypatch.setattr("limbeck.student.build", lambda *args: pytest.fail("nothing is loaded for a question that has no answer"))
    served = {"type": "server", "served_name": "t", "tokenizer": str(tokenizer_dir), "k": 8, "timeout_seconds": 0.2}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        for cause in ("no answer in time", "no connection"):
            finding = found(pair | {"teacher": served | {"url": url}}, headroom=True)["headroom"]
            assert finding.level == "stop"
            assert finding.message == f"teacher {url}: {cause}; expected a server that answers there (teacher.url)"
            silent.close()


def test_a_template_cannot_steer_the_terminal(pair: dict[str, Any], tmp_path: Path, fresh_tokenizer: Any, capsys: Any) -> None:
    fresh_tokenizer.chat_template = "{{ raise_exception('\x1b[31mred') }}"
    findings = examine(parse_recipe(pair | {"teacher": {"type": "model", "model": teacher_with(tmp_path, fresh_tokenizer)}}))
    show(findings)
    shown = capsys.readouterr().err
    assert "\\u001b[31mred" in shown and "\x1b" not in shown


def test_a_capture_of_another_template_stops(pair: dict[str, Any], tmp_path: Path, fresh_tokenizer: Any) -> None:
    limbeck.capture(parse_recipe(pair | {"evaluate": [], "capture": {"path": str(tmp_path / "store")}}))
    offline = pair | {"teacher": {"type": "store", "path": str(tmp_path / "store")}}
    assert found(offline)["capture"].level == "ok"
    fresh_tokenizer.chat_template += "{# another #}"
    other = helpers.save_model(tmp_path / "other", helpers.tiny_model(layers=2), fresh_tokenizer)
    finding = found(offline | {"student": {"model": str(other)}})["capture"]
    assert finding.level == "stop" and "template_hash" in finding.message


def items(nll: float, teacher: float, kl: float) -> list[Item]:
    noise = [0.1 * (-1) ** i for i in range(10)]
    sums = [{"nll": nll + n, "teacher_nll": teacher, "kl": kl, "top1": 0.5} for n in noise]
    return [Item(str(i), each, dict.fromkeys(each, 1.0)) for i, each in enumerate(sums)]


@pytest.mark.parametrize(
    "figures,level,sentence",
    [
        ((2.0, 1.0, 0.5), "ok", "to help, because the teacher predicts this data better by 1.000"),
        ((1.0, 2.0, 0.5), "stop", "not to help, because the teacher predicts this data worse"),
        ((1.0, 1.01, 0.5), "warning", "10 rows cannot tell"),
        ((2.0, 1.0, 0.001), "stop", "not to help, because student and teacher say the same"),
    ],
)
def test_the_sentence_follows_from_the_figures(figures: tuple[float, float, float], level: str, sentence: str) -> None:
    finding = judge(items(*figures))
    assert finding.level == level and sentence in finding.message
    assert finding.detail["lead"] == pytest.approx(figures[0] - figures[1])


def test_headroom_is_measured_on_the_recipes_rows(pair: dict[str, Any]) -> None:
    finding = found(pair, headroom=True)["headroom"]
    assert finding.detail["rows"] == 12 and finding.detail["kl"] > 0 and "expect distillation" in finding.message
    same = pair | {"student": {"model": pair["teacher"]["model"]}}
    assert found(same, headroom=True)["headroom"].level == "stop"
    with pytest.raises(RecipeError, match="--headroom: found teacher type 'none'"):
        examine(parse_recipe(pair | {"teacher": {"type": "none"}, "objective": [{"type": "ce"}]}), headroom=True)


def test_the_exit_code_says_go(pair: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "recipe.yaml"

    def run(recipe: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
        file.write_text(json.dumps(recipe))
        monkeypatch.setattr("sys.argv", ["limbeck", "check", str(file), "--json"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        monkeypatch.setattr("sys.argv", ["limbeck", "check", str(file)])
        with pytest.raises(SystemExit):
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), json.loads(captured.out), captured.err

    code, result, err = run(pair)
    assert (code, result["go"]) == (0, True) and "valid recipe for train, eval; go" in err
    code, result, err = run(pair | {"evaluate": [{"type": "bits_per_byte", "data": {"rows": ROWS}}]})
    assert (code, result["go"]) == (1, False) and "no go" in err
    arms = {"a": {}, "b": {"train": {"steps": 2}}, "c": {"source": {"max_length": 40}}}
    code, result, err = run({"name": "s", "base": pair, "arms": arms})
    assert code == 0 and list(result["findings"]) == ["a, b", "c"]
