"""A capture gives back what the teacher said, by sample id and token offset."""

from __future__ import annotations

import shutil

import pytest
import torch
from captures import ALL, LAYERS, SHORT, assert_same, conversation, names, run, samples_of, signals
from safetensors.torch import load_file

import limbeck
from helpers import save_model, tiny_model, write_jsonl
from limbeck.errors import StoreError
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.store.hidden import HiddenCodec
from limbeck.store.manifest import read_manifest, write_manifest
from limbeck.store.plan import once
from limbeck.store.reader import StoreReader
from limbeck.store.writer import write_head
from limbeck.teachers import ModelTeacher, StoreTeacher
from limbeck.tokens.pad import collate, pad
from limbeck.tokens.sample import make_sample, sample_id_of

# ---- what is read is what was written


def test_the_store_describes_itself(captured, teacher_dir, tokenizer):
    manifest = read_manifest(captured)
    assert (manifest.codec.type, manifest.layers, manifest.num_samples, manifest.vocabulary) == ("exact", LAYERS, 7, len(tokenizer))
    assert (manifest.temperatures, manifest.hidden.type, manifest.hidden_error) == (None, "float32", {1: 0.0, 3: 0.0})
    assert (manifest.byte_offsets, manifest.certificate, manifest.model, manifest.num_missing) == (True, None, None, 0)
    assert (manifest.teacher.num_layers, manifest.teacher.width, manifest.teacher.dtype) == (4, 48, "float32")
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 2, 1]
    assert names(captured) == ["head.safetensors", "manifest.json", *(f"shard-0000{i}.parquet" for i in range(4))]
    assert manifest.num_bytes == sum(file.stat().st_size for file in captured.iterdir() if file.name != "manifest.json")
    assert {"torch", "transformers"} <= set(manifest.packages)


def test_states_that_are_kept_otherwise_come_from_another_teacher(captured, tmp_path):
    """A run that has begun with the one does not go on with the other."""
    shutil.copytree(captured, tmp_path / "store")
    content = StoreTeacher(path=str(captured)).content()
    assert StoreTeacher(path=str(tmp_path / "store")).content() == content
    write_manifest(tmp_path / "store", read_manifest(captured).model_copy(update={"hidden": HiddenCodec.members["bfloat16"]()}))
    assert StoreTeacher(path=str(tmp_path / "store")).content() != content


def test_counts_are_those_of_the_data(captured, data, tokenizer):
    manifest, samples = read_manifest(captured), samples_of(data, tokenizer)
    assert manifest.num_scored == sum(sample.num_scored for sample in samples)
    assert sum(shard.num_represented for shard in manifest.shards) == sum(len(sample.ids) for sample in samples)


def test_it_says_what_the_live_teacher_says(captured, teacher_dir, data, tokenizer):
    samples = samples_of(data, tokenizer)
    stored = StoreTeacher(path=str(captured)).open(tokenizer, ALL)
    live = ModelTeacher(model=str(teacher_dir)).open(tokenizer, ALL)
    assert (stored.num_layers, stored.width, stored.vocabulary) == (live.num_layers, live.width, live.vocabulary)
    for sample in samples:
        batch = pad([sample], 0)
        ours, theirs = stored.score(batch), live.score(batch)
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.teacher_head(ours.output), theirs.teacher_head(theirs.output), rtol=1e-5, atol=1e-5)
        assert ours.hidden.keys() == theirs.hidden.keys() == set(LAYERS)
        for layer in LAYERS:
            torch.testing.assert_close(ours.hidden[layer], theirs.hidden[layer], rtol=1e-5, atol=1e-5)
        log_probs = theirs.teacher_head(theirs.output).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(ours.observed, log_probs, rtol=1e-3, atol=1e-3)  # kept in float16


def test_the_batch_does_not_matter(captured, data, tokenizer):
    """By sample id and offset: any order, any batch size, and a sample twice in a batch."""
    samples = samples_of(data, tokenizer)
    one_by_one = signals(captured, samples, tokenizer)
    assert_same(signals(captured, samples[::-1], tokenizer, batch_size=3), one_by_one)
    assert_same(signals(captured, samples[3:] + samples[:3], tokenizer, batch_size=7), one_by_one)
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, ALL)
    twice = scorer.score(pad([samples[0], samples[1], samples[0]], 0))
    output, hidden = one_by_one[samples[0].sample_id][0], one_by_one[samples[0].sample_id][2]
    assert torch.equal(twice.output[: len(output)], output) and torch.equal(twice.output[-len(output) :], output)
    assert torch.equal(twice.hidden[LAYERS[0]][-len(hidden) :], hidden)


def test_an_empty_microbatch(captured, tokenizer):
    signal = StoreTeacher(path=str(captured)).open(tokenizer, ALL).score(pad([], 0))
    assert signal.output.shape == (0, 48) and signal.observed.shape == (0,)
    assert all(state.shape == (0, 48) for state in signal.hidden.values())


@pytest.mark.parametrize("needs", [Needs(output=True), Needs(layers=frozenset({3})), Needs(layers=frozenset(LAYERS))])
def test_only_what_is_asked_for_is_given(captured, data, tokenizer, needs):
    signal = StoreTeacher(path=str(captured)).open(tokenizer, needs).score(pad(samples_of(data, tokenizer)[:2], 0))
    assert (signal.output is not None, signal.teacher_head is not None) == (needs.output, needs.output)
    assert signal.hidden.keys() == needs.layers
    assert signal.observed is not None


def test_capturing_in_other_batches_gives_the_same_ids_and_nearly_the_same_values(base, captured, data, tokenizer, tmp_path):
    run(base, tmp_path / "other", "capture.batch_size=7", "capture.samples_per_shard=100")
    samples = samples_of(data, tokenizer)
    ours, theirs = signals(tmp_path / "other", samples, tokenizer), signals(captured, samples, tokenizer)
    for sample_id in theirs:
        for a, b in zip(ours[sample_id], theirs[sample_id], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---- lengths


def test_a_smaller_max_length_is_served(captured, data, tokenizer):
    whole, short = samples_of(data, tokenizer), samples_of(data, tokenizer, SHORT)
    assert any(len(a.ids) > len(b.ids) for a, b in zip(whole, short, strict=True))
    StoreTeacher(path=str(captured)).open(tokenizer, ALL).require(short)
    full, cut = signals(captured, whole, tokenizer), signals(captured, short, tokenizer, batch_size=4)
    for sample_id, parts in cut.items():
        assert all(torch.equal(part, whole_part[: len(part)]) for part, whole_part in zip(parts, full[sample_id], strict=True))


def test_a_larger_max_length_is_refused_with_the_share_that_is_missing(base, data, tokenizer, tmp_path):
    run(base, tmp_path / "short", f"source.max_length={SHORT}")
    whole, short = samples_of(data, tokenizer), samples_of(data, tokenizer, SHORT)
    scorer = StoreTeacher(path=str(tmp_path / "short")).open(tokenizer, Needs(output=True))
    lacking = sum(sample.num_scored for sample in whole) - sum(sample.num_scored for sample in short)
    total = sum(sample.num_scored for sample in whole)
    assert 0 < lacking < total
    with pytest.raises(StoreError) as caught:
        scorer.require(whole)
    assert f"lacks {lacking} of {total} tokens that this recipe asks for ({lacking / total:.1%})" in str(caught.value)
    with pytest.raises(StoreError, match="lacks 'output' of a token of sample"):
        scorer.score(pad([max(whole, key=lambda sample: len(sample.ids))], 0))


def test_capturing_longer_into_the_same_store_adds_what_is_missing(base, data, tokenizer, tmp_path):
    """Else the advice to capture again would lead nowhere."""
    path = tmp_path / "store"
    before = run(base, path, f"source.max_length={SHORT}")
    after = run(base, path)
    assert after.shards[: len(before.shards)] == before.shards and len(after.shards) > len(before.shards)
    whole = samples_of(data, tokenizer)
    StoreTeacher(path=str(path)).open(tokenizer, ALL).require(whole)
    run(base, tmp_path / "fresh")
    ours, fresh = signals(path, whole, tokenizer), signals(tmp_path / "fresh", whole, tokenizer)
    for sample_id in fresh:
        for a, b in zip(ours[sample_id], fresh[sample_id], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert run(base, path) == after


def test_other_data_is_missing_altogether(captured, data, tokenizer):
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, Needs(output=True))
    stranger = make_sample([5, 6, 7, 8], [False, True, True, True], 64)
    with pytest.raises(StoreError, match=r"lacks 3 of 3 tokens .* \(100\.0%\)"):
        scorer.require([stranger])
    with pytest.raises(StoreError, match=f"lacks 'output' of a token of sample {stranger.sample_id}"):
        scorer.score(pad([stranger], 0))


def test_a_token_that_was_context_at_capture_is_missing(captured, data, tokenizer):
    """The same ids with other targets: another template's mask, say."""
    sample = samples_of(data, tokenizer)[0]
    more = make_sample(sample.ids.tolist(), [True] * len(sample.ids), 64)
    assert more.sample_id == sample.sample_id
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, Needs(output=True))
    with pytest.raises(StoreError, match=f"lacks {more.num_scored - sample.num_scored} of {more.num_scored} tokens"):
        scorer.require([more])
    with pytest.raises(StoreError, match="lacks 'output' of a token"):
        scorer.score(pad([more], 0))


# ---- layers


def test_layers_that_were_not_captured_are_refused(captured, tokenizer):
    with pytest.raises(StoreError, match=r"holds the states of blocks \[1, 3\], this recipe needs \[0, 2\] too"):
        StoreTeacher(path=str(captured)).open(tokenizer, Needs(layers=frozenset({0, 1, 2})))


def test_samples_that_were_captured_without_states_are_missing_where_states_are_needed(base, tmp_path, tokenizer):
    """Held-out texts are captured for their output alone."""
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [conversation(9)])
    path = tmp_path / "store"
    run({**base, "evaluate": [{"type": "agreement", "data": str(heldout)}]}, path)
    samples = samples_of(heldout, tokenizer, 1024)
    StoreTeacher(path=str(path)).open(tokenizer, Needs(output=True)).require(samples)
    lacking = len(samples[0].ids)
    with pytest.raises(StoreError, match=f"lacks {lacking} of {lacking + samples[0].num_scored} tokens"):
        StoreTeacher(path=str(path)).open(tokenizer, ALL).require(samples)
    with pytest.raises(StoreError, match=r"lacks 'hidden\.1' of a token"):
        StoreTeacher(path=str(path)).open(tokenizer, ALL).score(pad(samples, 0))


@pytest.mark.parametrize(("trained", "graded"), [(SHORT, 64), (64, SHORT)])
def test_a_text_that_is_trained_on_and_evaluated_at_another_length_serves_both(base, data, tokenizer, tmp_path, trained, graded):
    """One sample id, asked for with states up to one length and without them up to another."""
    path = tmp_path / "store"
    asks = {**base, "evaluate": [{"type": "agreement", "data": str(data), "max_length": graded}]}
    assert run(asks, path, f"source.max_length={trained}").num_samples == 7
    StoreTeacher(path=str(path)).open(tokenizer, ALL).require(samples_of(data, tokenizer, trained))
    StoreTeacher(path=str(path)).open(tokenizer, Needs(output=True)).require(samples_of(data, tokenizer, graded))


def test_what_is_asked_of_a_sample_in_several_places_is_asked_once():
    ids = [3, 4, 5, 6]
    short, long = make_sample(ids, [False, True, False, False], 3), make_sample(ids, [False, False, False, True], 4)
    other = make_sample([9, 9], [False, True], 4)
    for groups in ([([short, other], ALL), ([long], Needs(output=True))], [([long], Needs(output=True)), ([short, other], ALL)]):
        first, both = once(groups)
        assert first.sample.sample_id == other.sample_id and first.needs == both.needs == ALL
        assert both.sample.ids.tolist() == ids and both.sample.is_target.tolist() == [False, True, False, True]


# ---- other tokenizers


def test_another_tokenizer_is_refused_by_name_of_the_field(captured, fresh_tokenizer):
    fresh_tokenizer.add_tokens(["something new"])
    with pytest.raises(StoreError, match=r"captured with vocabulary_hash \w{12}, the student's tokenizer has \w{12}"):
        StoreTeacher(path=str(captured)).open(fresh_tokenizer, ALL)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", None])
def test_another_template_is_refused_by_name_of_the_field(captured, fresh_tokenizer, template):
    fresh_tokenizer.chat_template = template
    with pytest.raises(StoreError, match="captured with template_hash"):
        StoreTeacher(path=str(captured)).open(fresh_tokenizer, ALL)


# ---- the head


def test_a_head_of_bf16_numbers_is_kept_in_bf16_and_comes_back_exactly(base, data, tokenizer, tmp_path):
    """A float32 copy of weights that were published in bf16: half the size, not one bit lost."""
    model = tiny_model(layers=4, width=48, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    short = save_model(tmp_path / "model", model, tokenizer)
    run(base, tmp_path / "store", f"teacher.model={short}")
    assert load_file(tmp_path / "store" / "head.safetensors")["weight"].dtype == torch.bfloat16
    head = StoreReader(tmp_path / "store").head()
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, model.lm_head.weight[: len(tokenizer)])


def test_a_head_of_other_numbers_is_kept_as_it_is(captured, teacher_dir, tokenizer):
    assert load_file(captured / "head.safetensors")["weight"].dtype == torch.float32
    assert torch.equal(
        StoreReader(captured).head().weight, load_file(teacher_dir / "model.safetensors")["model.embed_tokens.weight"][: len(tokenizer)]
    )


def test_bias_factor_and_soft_cap_come_back(captured, store):
    head = Head(torch.randn(6, 48), torch.randn(6), scale=0.5, soft_cap=30.0)
    stored = write_head(store, head)
    manifest = read_manifest(captured)
    teacher = manifest.teacher.model_copy(update={"head_scale": 0.5, "head_soft_cap": 30.0})
    write_manifest(store, manifest.model_copy(update={"head": stored, "teacher": teacher}))
    rows = torch.randn(3, 48)
    assert torch.equal(StoreReader(store).head()(rows), head(rows))


def test_a_bf16_teacher_is_stored_and_applied_in_bf16(base, data, tokenizer, tmp_path):
    run(base, tmp_path / "store", "teacher.dtype=bfloat16")
    samples = samples_of(data, tokenizer)
    live = ModelTeacher(model=base["teacher"]["model"], dtype="bfloat16").open(tokenizer, ALL)
    stored = StoreTeacher(path=str(tmp_path / "store")).open(tokenizer, ALL)
    batch = pad(samples[:1], 0)
    ours, theirs = stored.score(batch), live.score(batch)
    assert ours.output.dtype == ours.hidden[1].dtype == ours.teacher_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(ours.teacher_head(ours.output), theirs.teacher_head(theirs.output), rtol=3e-2, atol=3e-2)
    assert stored.score(pad([], 0)).output.dtype == torch.bfloat16


# ---- through the whole walk


def test_sample_ids_do_not_depend_on_truncation(data, tokenizer):
    whole, short = samples_of(data, tokenizer), samples_of(data, tokenizer, SHORT)
    assert [sample.sample_id for sample in whole] == [sample.sample_id for sample in short]
    assert whole[1].sample_id == sample_id_of(whole[1].ids) != sample_id_of(short[1].ids)
    assert len({sample.sample_id for sample in whole}) == len(whole)


def test_captured_one_by_one_and_trained_packed(base, captured, data, tokenizer):
    """Rows that are shared, in any order, say the same."""
    samples = samples_of(data, tokenizer)
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, ALL)
    alone = signals(captured, samples, tokenizer)
    for rows in ([[samples[2], samples[0], samples[5]], [samples[1]]], [samples[::-1]]):
        packed = scorer.score(collate(rows, 0))
        for number, part in enumerate((packed.output, packed.observed, *(packed.hidden[layer] for layer in LAYERS))):
            assert torch.equal(part, torch.cat([alone[sample.sample_id][number] for row in rows for sample in row]))


def test_what_is_expected_is_read_ahead_and_changes_nothing(captured, data, tokenizer, monkeypatch):
    samples = samples_of(data, tokenizer)
    batches = [pad(samples[start : start + 2], 0) for start in range(0, 7, 2)] * 3
    plain, ahead = (StoreTeacher(path=str(captured)).open(tokenizer, ALL) for _ in range(2))
    ahead.expect(batches[:2])
    for number, batch in enumerate(batches):
        ahead.expect(batches[number + 2 : number + 3])
        ours, theirs = ahead.score(batch), plain.score(batch)
        assert torch.equal(ours.output, theirs.output) and torch.equal(ours.observed, theirs.observed)
        assert all(torch.equal(ours.hidden[layer], theirs.hidden[layer]) for layer in LAYERS)
    assert not ahead.reader._coming
    monkeypatch.setattr(ahead.reader, "_read", None)  # what comes was read when it was announced
    with pytest.raises(TypeError):
        ahead.score(batches[0])


def test_an_error_of_the_reading_thread_comes_where_the_batch_is_asked_for(captured, tokenizer):
    scorer = StoreTeacher(path=str(captured)).open(tokenizer, ALL)
    batch = pad([make_sample([5, 6, 7, 8], [False, True, True, True], 64)], 0)
    scorer.expect([batch])
    with pytest.raises(StoreError, match="lacks 'output' of a token"):
        scorer.score(batch)


def test_what_the_teacher_said_of_each_target_and_where_it_stands_in_the_text(captured, data, tokenizer):
    """What another tokenizer's tokens would be compared by."""
    reader = StoreReader(captured)
    for sample in samples_of(data, tokenizer):
        observed = reader.observed(sample.sample_id)
        text = tokenizer.decode(sample.ids.tolist()).encode()
        assert observed.offsets.tolist() == [i - 1 for i in range(1, len(sample.ids)) if sample.is_target[i]]
        spelt = [text[start:end].decode() for start, end in observed.spans]
        assert spelt == [tokenizer.decode([int(sample.ids[offset + 1])]) for offset in observed.offsets]
        assert len(observed.log_probs) == len(spelt) and (observed.log_probs < 0).all()
    with pytest.raises(StoreError, match="lacks sample 17"):
        reader.observed(17)


def test_places_in_the_text_are_left_out_where_tokens_do_not_spell_it(base, teacher_dir, fresh_tokenizer, tmp_path, capfd):
    """A tokenizer that changes what it decodes; the vocabulary is the same."""
    from tokenizers import decoders

    fresh_tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "A")])
    model = save_model(tmp_path / "model", tiny_model(layers=4, width=48, seed=5), fresh_tokenizer)
    manifest = run(base, tmp_path / "store", f"teacher.model={model}")
    assert not manifest.byte_offsets and "do not spell its text" in capfd.readouterr().err
    (entries, *_) = StoreReader(tmp_path / "store")._entries.values()
    assert StoreReader(tmp_path / "store").observed(entries[0].at.sample_id).spans is None


def test_a_store_behind_a_url_is_read_as_one_on_disk(captured, data, tokenizer):
    import fsspec

    fsspec.filesystem("memory").put(str(captured), "/bucket/store", recursive=True)
    samples = samples_of(data, tokenizer)
    try:
        assert_same(signals("memory://bucket/store", samples, tokenizer, batch_size=3), signals(captured, samples, tokenizer))
        assert StoreTeacher(path="memory://bucket/store").provides().layers == frozenset(LAYERS)
        with pytest.raises(StoreError, match=r"memory://bucket/nowhere': found no manifest\.json"):
            StoreTeacher(path="memory://bucket/nowhere").provides()
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)
    with pytest.raises(StoreError, match="nosuch://store': cannot be read: Protocol not known: nosuch"):
        StoreTeacher(path="nosuch://store").provides()


def test_a_subset_in_another_order_trains_alike(captured, data, teacher_dir, make_model_dir, tmp_path):
    """Other data, batches, epochs and packing than at capture: all that counts is which tokens are asked for."""
    recipe = {
        "student": {"model": str(make_model_dir(layers=2, seed=3))},
        "source": {"type": "dataset", "data": str(data), "max_length": SHORT, "limit": 5},
        "objective": [{"type": "logits"}, {"type": "hidden", "pairs": [[0, 1], [1, 3]]}],
        "train": {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "pack_length": 60},
        "seed": 11,
    }
    teachers = {"stored": {"type": "store", "path": str(captured)}, "live": {"type": "model", "model": str(teacher_dir)}}
    losses = [
        [row["loss"] for row in limbeck.train(recipe | {"teacher": its}, tmp_path / name).metrics()] for name, its in teachers.items()
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
