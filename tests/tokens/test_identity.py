"""Two tokenizers are the same where every id stands for the same bytes."""

from __future__ import annotations

import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import make_tokenizer
from limbeck.errors import ModelError
from limbeck.tokens.identity import shared_vocabulary, template_hash, vocabulary, vocabulary_hash


def byte_level(tokens, **special):
    """A byte-level tokenizer with exactly this vocabulary: a list of tokens, or a mapping with holes."""
    vocab = tokens if isinstance(tokens, dict) else {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def sentencepiece(tokens, **special):
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


# ---- bytes


def test_byte_level_vocabulary_is_what_the_ids_decode_to(tokenizer):
    pieces = vocabulary(tokenizer)
    assert len(pieces) == len(tokenizer)
    text = "The weather in Zürich 🦊:\t\n  sunny<|im_end|> 天気"
    assert b"".join(pieces[i] for i in tokenizer.encode(text)).decode() == text
    assert sorted(piece for piece in pieces if len(piece) == 1) == [bytes([byte]) for byte in range(256)]
    assert pieces[:3] == [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]


def test_sentencepiece_vocabulary():
    tokens = ["<unk>", "<s>", "</s>", "<0x00>", "<0x0A>", "<0xE2>", "▁", "▁the", "é", "<0x0A", "▁▁"]
    pieces = vocabulary(sentencepiece(tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
    assert pieces == [b"<unk>", b"<s>", b"</s>", b"\0", b"\n", b"\xe2", b" ", b" the", "é".encode(), b"<0x0A", b"  "]


def test_added_tokens_are_their_text():
    """`é` and `Ġ` are letters of the byte alphabet; in an added token they are themselves."""
    tokenizer = byte_level([*ALPHABET, "Ġa"])
    tokenizer.add_tokens(["éĠ", "<｜begin｜>"])
    assert vocabulary(tokenizer)[256:] == [b" a", "éĠ".encode(), "<｜begin｜>".encode()]


def test_control_tokens_inside_the_vocabulary_itself():
    assert vocabulary(byte_level([*ALPHABET, "<｜end▁of｜>"]))[256] == "<｜end▁of｜>".encode()


def test_holes_are_none():
    assert vocabulary(byte_level({"a": 0, "b": 3}))[:4] == [b"a", None, None, b"b"]


# ---- the same or not


def test_equal(tokenizer, fresh_tokenizer):
    assert shared_vocabulary(tokenizer, fresh_tokenizer) == len(tokenizer)
    assert vocabulary_hash(tokenizer) == vocabulary_hash(fresh_tokenizer)


def test_the_same_vocabulary_written_in_another_way():
    """SentencePiece and byte-level files of the same bytes."""
    tokens = ["<0x0A>", "▁the", "a"]
    assert vocabulary_hash(sentencepiece(tokens)) == vocabulary_hash(byte_level(["Ċ", "Ġthe", "a"]))


def test_permuted_vocabulary_of_equal_size_is_refused():
    first = byte_level([*ALPHABET, "Ġa", "Ġb", "Ġc"])
    permuted = byte_level([*ALPHABET, "Ġb", "Ġa", "Ġc"])
    with pytest.raises(ModelError) as caught:
        shared_vocabulary(first, permuted)
    message = str(caught.value)
    assert "2 of 259 ids" in message
    assert "id 256 is ' a' to the student and ' b' to the teacher" in message
    assert vocabulary_hash(first) != vocabulary_hash(permuted)


def test_the_first_differing_ids_are_named():
    with pytest.raises(ModelError) as caught:
        shared_vocabulary(byte_level(ALPHABET), byte_level(ALPHABET[::-1]))
    message = str(caught.value)
    assert "256 of 256 ids" in message and "id 0 is" in message and "id 2 is" in message and "id 3 is" not in message
    assert rf"id 0 is '!' to the student and {bytes([0xAD])!r} to the teacher" in message  # the last letter of the byte alphabet


def test_other_training_text_is_refused(tokenizer):
    with pytest.raises(ModelError, match="ids stand for other bytes"):
        shared_vocabulary(tokenizer, make_tokenizer(sentences=["Entirely other words, xylophones and quartz."]))


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabulary_is_cut(padded, tokenizer, fresh_tokenizer):
    fresh_tokenizer.add_tokens([f"[PAD{i}]" for i in range(7)])
    pair = (fresh_tokenizer, tokenizer) if padded == "student" else (tokenizer, fresh_tokenizer)
    assert shared_vocabulary(*pair) == len(tokenizer) == len(fresh_tokenizer) - 7
    assert vocabulary_hash(tokenizer) != vocabulary_hash(fresh_tokenizer)


def test_a_longer_vocabulary_that_differs_below_is_refused():
    with pytest.raises(ModelError, match=r"1 of 257 ids .*id 256 is ' a' to the student and ' b' to the teacher"):
        shared_vocabulary(byte_level([*ALPHABET, "Ġa"]), byte_level([*ALPHABET, "Ġb", "Ġa"]))


def test_a_much_longer_vocabulary_is_refused():
    """A common start is not a common vocabulary: the teacher would never see the tokens that it was trained on."""
    with pytest.raises(ModelError, match="student's has 256 ids, the teacher's 1281"):
        shared_vocabulary(byte_level(ALPHABET), byte_level([*ALPHABET, *(f"Ġ{i}" for i in range(1025))]))


def test_a_hole_is_not_a_token():
    full, holed = byte_level(["a", "b", "c"]), byte_level({"a": 0, "c": 2})
    with pytest.raises(ModelError, match="id 1 is 'b' to the student and no token to the teacher"):
        shared_vocabulary(full, holed)
    assert shared_vocabulary(holed, byte_level({"a": 0, "c": 2})) == 3
    assert vocabulary_hash(full) != vocabulary_hash(holed)


def test_hashes_keep_borders():
    assert vocabulary_hash(byte_level(["ab", "c"])) != vocabulary_hash(byte_level(["a", "bc"]))


def test_template_hash(tokenizer, fresh_tokenizer):
    assert template_hash(tokenizer) == template_hash(fresh_tokenizer)
    fresh_tokenizer.chat_template += " "
    assert template_hash(tokenizer) != template_hash(fresh_tokenizer)
    fresh_tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    named = template_hash(fresh_tokenizer)
    fresh_tokenizer.chat_template = {"tool_use": "b", "default": "a"}
    assert template_hash(fresh_tokenizer) == named
    fresh_tokenizer.chat_template = None
    assert template_hash(fresh_tokenizer) is None


def test_saved_and_loaded(tokenizer, tokenizer_dir):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert vocabulary_hash(loaded) == vocabulary_hash(tokenizer)
    assert template_hash(loaded) == template_hash(tokenizer)


def test_large_vocabularies_are_fast():
    tokens = [*ALPHABET, *(first + second + third for first in ALPHABET[:64] for second in ALPHABET for third in ALPHABET[:10])]
    tokenizer = byte_level(tokens)
    assert len(tokenizer) > 150_000
    started = time.process_time()
    assert shared_vocabulary(tokenizer, tokenizer) == len(tokens)
    assert time.process_time() - started < 3  # 0.5 s on an idle core
