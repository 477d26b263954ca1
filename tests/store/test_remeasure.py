"""What a store gives back, against the live teacher."""

from __future__ import annotations

import pytest
from captures import conversation, run

from helpers import write_jsonl
from limbeck.errors import StoreError
from limbeck.recipe import parse_recipe
from limbeck.remeasure import remeasure


def test_nothing_was_lost_of_an_exact_capture(base, captured):
    found = remeasure(captured, parse_recipe(base, ["capture.path=unused"]), 5)
    assert found["num_samples"] == 5 and abs(found["kl"]) < 1e-6 and found["top1"] == 1
    assert 0 < found["observed_error"] < 0.01, "float16"


def test_it_is_what_the_certificate_says(base, tmp_path):
    """All that the codec was not fitted on, here: the documents of the certificate."""
    path = tmp_path / "store"
    codec = ("capture.codec={type: topk, k: 8}", "capture.calibrate_on=3", "source.limit=6")
    manifest = run(base, path, *codec)
    found = remeasure(path, parse_recipe(base, [f"capture.path={path}", *codec]), 100)
    assert found["num_samples"] == 3
    for name in ("num_scored", "kl", "l1", "top1", "mass"):
        assert found[name] == pytest.approx(manifest.certificate[name], rel=1e-4), name


def test_another_teacher_or_other_data_is_refused(base, captured, make_model_dir, tmp_path):
    with pytest.raises(StoreError, match=r"holds another capture: teacher\.weights_sha256 .* Give the recipe that it was captured with"):
        remeasure(captured, parse_recipe(base, ["capture.path=x", f"teacher.model={make_model_dir(layers=4, width=48, seed=6)}"]), 5)
    data = write_jsonl(tmp_path / "other.jsonl", [conversation(40)])
    with pytest.raises(StoreError, match="holds no sample of this recipe's source"):
        remeasure(captured, parse_recipe(base, ["capture.path=x", f"source.data={data}"]), 5)
