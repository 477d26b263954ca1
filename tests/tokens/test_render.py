"""Chat templates to ids and target masks: what is scored, what is refused, what truncation takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from tokenizers import processors

from helpers import chatml, make_tokenizer
from limbeck.errors import DataError
from limbeck.tokens.render import render, render_all
from limbeck.tokens.sample import Conversation

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
LONG = 10_000


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(*messages, tools=()):
    return Conversation(messages=tuple(messages), tools=tuple(tools), where="data.jsonl:7")


TWO_TURNS = chat(user("What is the weather?"), assistant("It is sunny."), user("And the dog?"), assistant("The dog sleeps."))
WITH_TOOLS = chat(
    {"role": "system", "content": "You are a helpful assistant."},
    user("What is the weather in Paris?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    assistant("It is sunny in Paris."),
    user("And two and three?"),
    assistant("five"),
    tools=[WEATHER],
)


def targets(sample, tokenizer):
    """The runs of target tokens, as text."""
    runs, previous = [], False
    for token, is_target in zip(sample.ids, sample.is_target, strict=True):
        if is_target and not previous:
            runs.append([])
        if is_target:
            runs[-1].append(int(token))
        previous = is_target
    return [tokenizer.decode(run) for run in runs]


def without(template, *parts):
    for part in parts:
        assert part in template
        template = template.replace(part, "")
    return template


def refusal(conversation, tokenizer):
    with pytest.raises(DataError) as caught:
        render(conversation, tokenizer, LONG)
    return str(caught.value)


# ---- what is scored


def test_tool_conversation_by_hand(tokenizer):
    pieces = [
        ("<|im_start|>system\nYou are a helpful assistant.\n\n<tools>\n" + json.dumps(WEATHER) + "\n</tools><|im_end|>\n", False),
        ("<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n<|im_start|>assistant\n", False),
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>', True),
        ("\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is sunny in Paris.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd two and three?<|im_end|>\n<|im_start|>assistant\n", False),
        ("five<|im_end|>", True),
        ("\n", False),
    ]
    encoded = [(tokenizer.encode(text, add_special_tokens=False), is_target) for text, is_target in pieces]
    sample = render(WITH_TOOLS, tokenizer, LONG)
    assert sample.ids.tolist() == [token for ids, _ in encoded for token in ids]
    assert sample.is_target.tolist() == [is_target for ids, is_target in encoded for _ in ids]
    assert sample.num_total == len(sample.ids)
    assert sample.num_scored == sample.num_targets_total == sum(sample.is_target)


@pytest.mark.parametrize("conversation", [TWO_TURNS, WITH_TOOLS])
def test_generation_markers_give_the_same_as_prefixes(conversation, tokenizer, fresh_tokenizer):
    expected = render(conversation, tokenizer, LONG)
    markers_without_eos = chatml(True).replace("{{- '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{- '<|im_end|>' }}")
    markers_with_newline = chatml(True).replace("{% endgeneration %}{{- '\\n' }}", "{{- '\\n' }}{% endgeneration %}")
    for template in (chatml(generation=True), markers_without_eos, markers_with_newline):
        assert template != chatml()
        fresh_tokenizer.chat_template = template
        sample = render(conversation, fresh_tokenizer, LONG)
        assert sample.ids.tolist() == expected.ids.tolist()
        assert sample.is_target.tolist() == expected.is_target.tolist()


@pytest.mark.parametrize("content", [" yes", "  yes", "yes ", "yes  ", "é🦊"])
def test_generation_markers_where_offsets_are_trimmed(content, fresh_tokenizer):
    """With trimmed offsets, transformers' own mask loses all turns (space first) or runs on over the user's (space last)."""
    fresh_tokenizer.chat_template = chatml(True).replace("{{- '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{- '<|im_end|>' }}")
    fresh_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    sample = render(chat(user("hi"), assistant(content), user("more?"), assistant("no")), fresh_tokenizer, LONG)
    assert targets(sample, fresh_tokenizer) == [f"{content}<|im_end|>", "no<|im_end|>"]


def last_turn_only(separator):
    return (
        f"{{%- for message in messages %}}{{{{- message.role + '{separator}' }}}}"
        "{%- if loop.last %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
        "{%- else %}{{- message.content }}{%- endif %}{%- endfor %}"
    )


def test_generation_markers_may_leave_turns_out(fresh_tokenizer):
    fresh_tokenizer.chat_template = last_turn_only(":\\n")
    assert targets(render(TWO_TURNS, fresh_tokenizer, LONG), fresh_tokenizer) == ["The dog sleeps.<|im_end|>"]


def test_a_token_across_the_start_of_generation_is_generated(fresh_tokenizer):
    fresh_tokenizer.chat_template = last_turn_only(": ")
    assert targets(render(TWO_TURNS, fresh_tokenizer, LONG), fresh_tokenizer) == [" The dog sleeps.<|im_end|>"]


def test_generation_markers_around_nothing_are_refused(fresh_tokenizer):
    fresh_tokenizer.chat_template = chatml() + "{% generation %}{% endgeneration %}"
    assert "cover no token" in refusal(TWO_TURNS, fresh_tokenizer)


def test_eos_is_learned_although_it_is_the_pad_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sample = render(TWO_TURNS, tokenizer, LONG)
    assert targets(sample, tokenizer) == ["It is sunny.<|im_end|>", "The dog sleeps.<|im_end|>"]
    assert sum(sample.is_target & (sample.ids == tokenizer.eos_token_id)) == 2


def test_consecutive_assistant_turns(tokenizer):
    sample = render(chat(user("hi"), assistant("one"), assistant("two")), tokenizer, LONG)
    assert targets(sample, tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_turn_without_end_token_keeps_its_last_white_space(fresh_tokenizer):
    fresh_tokenizer.chat_template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + ': ' + message.content + '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant:' }}{%- endif %}"
    )
    assert targets(render(TWO_TURNS, fresh_tokenizer, LONG), fresh_tokenizer)[0] == " It is sunny.\n"


def test_the_id_of_a_sample_does_not_depend_on_max_length(tokenizer):
    whole, cut = render(TWO_TURNS, tokenizer, LONG), render(TWO_TURNS, tokenizer, 30)
    assert whole.sample_id == cut.sample_id
    assert cut.ids.tolist() == whole.ids[:30].tolist()
    assert (cut.num_total, cut.num_targets_total) == (len(whole.ids), whole.num_scored)
    assert whole.sample_id != render(WITH_TOOLS, tokenizer, LONG).sample_id


# ---- prompt and completion


@pytest.mark.parametrize("template", [None, "{{ raise_exception('unused') }}"])
@pytest.mark.parametrize("post", ["$A", "<|endoftext|> $A", "$A <|im_end|>", "<|endoftext|> $A <|im_end|>"])
def test_completion(post, template, fresh_tokenizer):
    fresh_tokenizer.chat_template = template
    special = [(name, fresh_tokenizer.convert_tokens_to_ids(name)) for name in ("<|endoftext|>", "<|im_end|>")]
    fresh_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    start = [0] if post.startswith("<") else []
    prompt, completion = (fresh_tokenizer.encode(text, add_special_tokens=False) for text in ("Two and two is", " four."))
    sample = render(Conversation(prompt="Two and two is", completion=" four."), fresh_tokenizer, LONG)
    assert sample.ids.tolist() == [*start, *prompt, *completion, 2]
    assert sample.is_target.tolist() == [False] * len([*start, *prompt]) + [True] * (len(completion) + 1)


def test_completion_with_specials_written_out(fresh_tokenizer):
    special = [("<|endoftext|>", 0)]
    fresh_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
    plain = render(Conversation(prompt="a", completion="b"), fresh_tokenizer, LONG)
    written = render(Conversation(prompt="<|endoftext|>a", completion="b<|im_end|>"), fresh_tokenizer, LONG)
    assert plain.ids.tolist() == written.ids.tolist() == [0, *fresh_tokenizer.encode("ab", add_special_tokens=False), 2]


def test_completion_without_prompt_scores_all_but_the_first_token(tokenizer):
    sample = render(Conversation(prompt="", completion="The dog"), tokenizer, LONG)
    assert sample.is_target.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_completion_without_eos_token_is_refused(fresh_tokenizer):
    fresh_tokenizer.eos_token = None
    assert "no eos token" in refusal(Conversation(prompt="a", completion="b", where="x.jsonl:1"), fresh_tokenizer)


# ---- what is refused


def test_no_assistant_turn(tokenizer):
    message = refusal(chat(user("hi")), tokenizer)
    assert message.startswith("data.jsonl:7: ") and "no message of role 'assistant'" in message


def test_no_chat_template(fresh_tokenizer):
    fresh_tokenizer.chat_template = None
    message = refusal(TWO_TURNS, fresh_tokenizer)
    assert "no chat template" in message and "`prompt` and `completion`" in message and "instruct" in message


def test_template_that_raises(fresh_tokenizer):
    fresh_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = refusal(TWO_TURNS, fresh_tokenizer)
    assert message.startswith("data.jsonl:7: ") and "roles must alternate" in message


def test_template_that_is_not_jinja(fresh_tokenizer):
    fresh_tokenizer.chat_template = "{% if %}"
    assert refusal(TWO_TURNS, fresh_tokenizer).startswith("data.jsonl:7: ")


@pytest.mark.parametrize("generation", [False, True])
def test_tools_that_the_template_ignores(generation, fresh_tokenizer):
    fresh_tokenizer.chat_template = without(
        chatml(generation), "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    ).replace("{%- if tools %}", "{%- if false %}")
    conversation = chat(user("hi"), assistant("yes"), tools=[WEATHER])
    assert "tools are given" in refusal(conversation, fresh_tokenizer)
    assert render(chat(user("hi"), assistant("yes")), fresh_tokenizer, LONG).num_scored


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "dropped"),
    [
        ("{%- for call in message.tool_calls or [] %}", "{%- for call in [] %}", "tool call 'get_weather' of messages.2"),
        ("(call.arguments | tojson)", "'{}'", "arguments of a tool call of messages.2"),
        (
            "{%- elif message.role == 'assistant' %}",
            "{%- elif message.role == 'tool' %}{%- elif message.role == 'assistant' %}",
            "messages.3 (tool)",
        ),
        ("{{- first.content + '\\n\\n' }}", "", "the content of messages.0 (system)"),
        ("{%- if message.content %}", "{%- if message.content and not message.tool_calls %}", "the content of messages.2 (assistant)"),
    ],
)
def test_messages_that_the_template_leaves_out(old, new, dropped, generation, fresh_tokenizer):
    """The name of a dropped call is still in the rendered list of tools, so a search for it in the text would be content."""
    assert old in chatml(generation)
    fresh_tokenizer.chat_template = chatml(generation).replace(old, new)
    messages = list(WITH_TOOLS.messages)
    messages[2] = {**messages[2], "content": "I look it up."}
    message = refusal(chat(*messages, tools=[WEATHER]), fresh_tokenizer)
    assert message.startswith("data.jsonl:7: ") and "leaves out" in message and dropped in message


def test_only_the_messages_left_out_are_named(fresh_tokenizer):
    fresh_tokenizer.chat_template = chatml().replace(
        "{%- elif message.role == 'assistant' %}", "{%- elif message.role == 'tool' %}{%- elif message.role == 'assistant' %}"
    )
    assert "leaves out the content of messages.3 (tool);" in refusal(WITH_TOOLS, fresh_tokenizer)


def test_template_that_rewrites_earlier_turns(fresh_tokenizer):
    """As Qwen3's does: the thoughts of all turns but the last are dropped."""
    fresh_tokenizer.chat_template = chatml().replace(
        "{{- message.content }}", "{{- message.content if loop.last else message.content.split('</think>')[-1] }}"
    )
    thinking = "<think>hm</think>It is sunny."
    once = render(chat(user("Weather?"), assistant(thinking)), fresh_tokenizer, LONG)
    assert targets(once, fresh_tokenizer) == [f"{thinking}<|im_end|>"]
    message = refusal(chat(user("Weather?"), assistant(thinking), user("Dog?"), assistant("Sleeps.")), fresh_tokenizer)
    assert message.startswith("data.jsonl:7: turn 1 (assistant)") and "otherwise when more follows" in message
    assert "hm</think>" in message


def test_template_whose_generation_prompt_is_not_in_the_text(fresh_tokenizer):
    fresh_tokenizer.chat_template = chatml().replace(
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}",
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>' }}",
    )
    message = refusal(TWO_TURNS, fresh_tokenizer)
    assert "turn 1 (assistant)" in message and "up to its start" in message


def test_tokens_that_merge_across_the_start_of_a_turn():
    merging = make_tokenizer(sentences=["a\n\n\nb " * 20])
    assert len(merging.encode("\n\n\n")) == 2
    message = refusal(chat(user("hi"), assistant("\n\nyes")), merging)
    assert "turn 1 (assistant)" in message and "merge" in message


def test_first_message_of_the_assistant(tokenizer, fresh_tokenizer):
    greeting = chat(assistant("Hello."), user("hi"), assistant("yes"))
    assert "turn 0 (assistant)" in refusal(greeting, tokenizer)
    fresh_tokenizer.chat_template = chatml(generation=True)
    assert targets(render(greeting, fresh_tokenizer, LONG), fresh_tokenizer) == ["Hello.<|im_end|>", "yes<|im_end|>"]


@pytest.mark.parametrize("generation", [False, True])
def test_nothing_is_learned_from_the_context(generation, fresh_tokenizer):
    """A prompt that is a list of messages may hold turns of the assistant: few-shot examples, or somebody else's."""
    fresh_tokenizer.chat_template = chatml(generation)
    whole = render(TWO_TURNS, fresh_tokenizer, LONG)
    for num_context, expected in ((0, 2), (1, 2), (2, 1), (3, 1)):
        sample = render(replace(TWO_TURNS, num_context=num_context), fresh_tokenizer, LONG)
        assert sample.ids.tolist() == whole.ids.tolist()
        assert targets(sample, fresh_tokenizer) == ["It is sunny.<|im_end|>", "The dog sleeps.<|im_end|>"][-expected:]
    assert "no message of role 'assistant'" in refusal(replace(TWO_TURNS, num_context=4), fresh_tokenizer)


# ---- plain text


def test_every_token_of_a_text_is_a_target_but_the_first(tokenizer):
    sample = render(Conversation(text="The weather in Paris"), tokenizer, LONG)
    assert tokenizer.decode(sample.ids) == "The weather in Paris<|im_end|>"
    assert sample.is_target.tolist() == [False, *[True] * (len(sample.ids) - 1)]
    assert render(Conversation(text="The weather in Paris<|im_end|>"), tokenizer, LONG).ids.tolist() == sample.ids.tolist()


def test_a_text_begins_as_the_tokenizer_begins_it(fresh_tokenizer):
    start = fresh_tokenizer.bos_token
    template = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, fresh_tokenizer.bos_token_id)])
    fresh_tokenizer.backend_tokenizer.post_processor = template
    sample = render(Conversation(text="dog"), fresh_tokenizer, LONG)
    assert fresh_tokenizer.decode(sample.ids) == f"{start}dog<|im_end|>"
    assert not sample.is_target[0] and sample.is_target[1:].all()
    assert render(Conversation(text=f"{start}dog"), fresh_tokenizer, LONG).ids.tolist() == sample.ids.tolist()


# ---- whole data sets


def test_report(tokenizer):
    whole = [render(conversation, tokenizer, LONG) for conversation in (TWO_TURNS, WITH_TOOLS)]
    samples, report = render_all([TWO_TURNS, WITH_TOOLS, TWO_TURNS], tokenizer, LONG)
    assert [sample.sample_id for sample in samples] == [whole[0].sample_id, whole[1].sample_id, whole[0].sample_id]
    num_tokens = 2 * len(whole[0].ids) + len(whole[1].ids)
    num_scored = 2 * whole[0].num_scored + whole[1].num_scored
    assert asdict(report) == {
        "num_rows": 3,
        "num_samples": 3,
        "num_duplicates": 1,
        "num_tokens": num_tokens,
        "num_scored": num_scored,
        "share_scored": num_scored / num_tokens,
        "num_truncated": 0,
        "num_dropped": 0,
        "tokens_cut": 0,
        "targets_cut": 0,
        "num_split": 0,
        "num_too_long": 0,
        "num_too_short": 0,
        "formats": {},
    }


def test_truncation_is_counted(tokenizer):
    whole = [render(conversation, tokenizer, LONG) for conversation in (TWO_TURNS, WITH_TOOLS)]
    first_target = int(whole[0].is_target.argmax())
    max_length = first_target + 2
    samples, report = render_all([TWO_TURNS, WITH_TOOLS], tokenizer, max_length)
    assert [len(sample.ids) for sample in samples] == [max_length]  # the first targets of the other come later
    assert (report.num_rows, report.num_samples, report.num_dropped, report.num_truncated) == (2, 1, 1, 2)
    assert (report.num_tokens, report.num_scored) == (max_length, 2)
    assert report.num_tokens + report.tokens_cut == sum(len(sample.ids) for sample in whole)
    assert report.num_scored + report.targets_cut == sum(sample.num_scored for sample in whole)


def test_a_row_that_just_fits_is_not_truncated(tokenizer):
    length = render(TWO_TURNS, tokenizer, LONG).num_total
    assert render_all([TWO_TURNS], tokenizer, length)[1].num_truncated == 0
    assert render_all([TWO_TURNS], tokenizer, length - 1)[1].num_truncated == 1


@pytest.mark.parametrize("conversations", [[], [TWO_TURNS, WITH_TOOLS]])
def test_nothing_to_learn_is_refused(conversations, tokenizer):
    with pytest.raises(DataError, match=f"no token to learn in any of {len(conversations)} rows at max_length 5"):
        render_all(conversations, tokenizer, 5)
