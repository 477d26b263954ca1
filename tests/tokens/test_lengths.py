"""Rows that are longer than a sample may be: cut, split or left out; and rows that are too short. What is lost is counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from helpers import make_tokenizer
from limbeck.errors import DataError
from limbeck.tokens.render import Limits, RenderReport, TooLong, render, render_all, render_sets, render_whole
from limbeck.tokens.sample import Conversation, Sample

LONG = 10_000
TEXT = Conversation(text="The quick brown fox jumps over the lazy dog, and the dog sleeps on.", format="text")
CHAT = Conversation(
    messages=(
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": "It is sunny in Paris today."},
        {"role": "user", "content": "And two and three?"},
        {"role": "assistant", "content": "The answer is five."},
    ),
    format="messages",
)
PLAIN = make_tokenizer()
STARTING = make_tokenizer()
STARTING.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="<|im_start|> $A", special_tokens=[("<|im_start|>", STARTING.bos_token_id)]
)


def scored(sample: Sample) -> list[int]:
    return [int(token) for token, is_target in zip(sample.ids[1:], sample.is_target[1:], strict=True) if is_target]


@pytest.mark.parametrize("tokenizer", [PLAIN, STARTING], ids=["plain", "starting"])
@pytest.mark.parametrize("conversation", [TEXT, CHAT], ids=["text", "chat"])
@settings(deadline=None, max_examples=40)
@given(max_length=st.integers(2, 40))
def test_pieces_lose_no_target_and_repeat_none(tokenizer: Any, conversation: Conversation, max_length: int) -> None:
    whole = render(conversation, tokenizer, LONG)
    samples, report = render_all([conversation], tokenizer, max_length, too_long="split")
    assert [token for sample in samples for token in scored(sample)] == scored(whole)
    assert all(2 <= len(sample.ids) <= max_length for sample in samples)
    assert report.num_scored == whole.num_scored and report.targets_cut == 0
    assert (report.num_rows, report.num_samples) == (1, len(samples))
    assert report.num_split == (len(whole.ids) > max_length) and report.num_truncated == 0
    if max_length >= len(whole.ids):
        assert samples[0].sample_id == whole.sample_id


@pytest.mark.parametrize("tokenizer", [PLAIN, STARTING], ids=["plain", "starting"])
def test_a_piece_has_the_one_token_of_context_that_it_would_have_alone(tokenizer: Any) -> None:
    """What the tokenizer puts before any text, or else the last token of the piece before."""
    whole = render(TEXT, tokenizer, LONG).ids.tolist()
    samples, report = render_all([TEXT], tokenizer, 8)
    pieces = [sample.ids.tolist() for sample in samples]
    assert len(pieces) == -(-(len(whole) - 1) // 7)
    if tokenizer is STARTING:
        assert [piece[0] for piece in pieces] == [STARTING.bos_token_id] * len(pieces)
        assert [token for piece in pieces for token in piece[1:]] == whole[1:]
    else:
        assert [piece[0] for piece in pieces[1:]] == [piece[-1] for piece in pieces[:-1]]
        assert pieces[0] + [token for piece in pieces[1:] for token in piece[1:]] == whole
    assert report.num_tokens == len(whole) + len(pieces) - 1
    assert len({sample.sample_id for sample in samples}) == len(samples)


def test_a_piece_is_a_sample_of_its_own() -> None:
    """It has the id that the same tokens have wherever they come from, so that a capture finds it."""
    samples, _ = render_all([TEXT], PLAIN, 8)
    alone = [render_all([Conversation(text=PLAIN.decode(sample.ids))], PLAIN, LONG)[0][0] for sample in samples[-1:]]
    assert alone[0].ids.tolist() == samples[-1].ids.tolist()
    assert alone[0].sample_id == samples[-1].sample_id


def outcome(too_long: TooLong | None, conversation: Conversation, max_length: int) -> tuple[list[Sample], RenderReport]:
    """With a short row beside it, so that something is left."""
    short = Conversation(prompt="a", completion="b")
    ((samples,), report) = render_sets([[conversation, short]], PLAIN, Limits(max_length, too_long=too_long))
    return samples[:-1], report


@pytest.mark.parametrize("conversation", [TEXT, CHAT], ids=["text", "chat"])
def test_policies(conversation: Conversation) -> None:
    whole = render(conversation, PLAIN, LONG)
    max_length = len(whole.ids) - 3
    cut, report = outcome("cut", conversation, max_length)
    assert [sample.ids.tolist() for sample in cut] == [whole.ids[:max_length].tolist()]
    assert cut[0].sample_id == whole.sample_id, "another max_length finds the same capture"
    assert (report.num_truncated, report.tokens_cut, report.targets_cut) == (1, 3, whole.num_scored - cut[0].num_scored)
    dropped, report = outcome("drop", conversation, max_length)
    assert dropped == [] and (report.num_rows, report.num_samples, report.num_too_long, report.num_truncated) == (2, 1, 1, 0)
    assert outcome("drop", conversation, len(whole.ids))[1].num_too_long == 0
    split, report = outcome("split", conversation, max_length)
    assert report.num_split == 1 and sum(sample.num_scored for sample in split) == whole.num_scored
    default, _ = outcome(None, conversation, max_length)
    expected = split if conversation is TEXT else cut
    assert [sample.sample_id for sample in default] == [sample.sample_id for sample in expected]


def test_pieces_without_a_target_are_left_out_and_counted() -> None:
    whole = render(CHAT, PLAIN, LONG)
    samples, report = render_all([CHAT], PLAIN, 5, too_long="split")
    num_pieces = -(-(len(whole.ids) - 1) // 4)
    assert 0 < len(samples) < num_pieces
    assert report.num_dropped == 0
    assert report.num_tokens + report.tokens_cut == len(whole.ids) + num_pieces - 1
    no_target = Conversation(prompt="The quick brown fox jumps over", completion="dog")
    _, report = outcome("split", no_target, len(render(no_target, PLAIN, LONG).ids) - 1)
    assert report.num_dropped == 0 and report.num_split == 1


def test_short_rows_are_left_out_and_counted() -> None:
    length = len(render(TEXT, PLAIN, LONG).ids)
    rows = [TEXT, CHAT, Conversation(text="fox")]
    samples, report = render_all(rows, PLAIN, LONG, min_length=length)
    assert [sample.sample_id for sample in samples] == [render(row, PLAIN, LONG).sample_id for row in (TEXT, CHAT)]
    assert (report.num_rows, report.num_samples, report.num_too_short, report.num_dropped) == (3, 2, 1, 0)
    assert report.formats == {"text": 1, "messages": 1}
    assert render_all(rows, PLAIN, LONG, min_length=length + 1)[1].num_too_short == 2


def test_a_text_of_nothing_has_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="no token to learn"):
        render_all([Conversation(text="")], PLAIN, LONG)
    assert render_whole(Conversation(text=""), STARTING).is_target.tolist() == [False, True]


def test_several_sets_have_one_report() -> None:
    sets, report = render_sets([[TEXT, TEXT], [], [CHAT]], PLAIN, Limits(LONG))
    assert [len(samples) for samples in sets] == [2, 0, 1]
    assert (report.num_rows, report.num_samples, report.num_duplicates) == (3, 3, 1)
    assert report.formats == {"text": 2, "messages": 1}
