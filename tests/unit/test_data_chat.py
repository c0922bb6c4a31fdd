"""Chat templates, loss masks and replies: what is trained on, token by token."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples.tiny.tokenizer import build_tokenizer
from posttrain.config import UserError
from posttrain.data import chat
from posttrain.data.tokenizer import load_tokenizer

TOOLS = [
    {"type": "function", "function": {"name": "mul", "parameters": {"type": "object", "properties": {}}}}
]
EPISODE = [
    {"role": "user", "content": "37 at 46?"},
    {"role": "assistant", "content": "mul(37,46)"},
    {"role": "tool", "content": "1702"},
    {"role": "assistant", "content": "1702"},
]
# ChatML without generation marks, line breaks after the end mark, as the stock templates of many models.
CHATML = """
{%- for message in messages -%}
{{- '<|user|>' + message.role + '\n' + message.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|user|>assistant\n' -}}{%- endif -%}
""".strip()
# Shows an empty thought in the last assistant message only: rendering more messages changes earlier text.
UNSTABLE = """
{%- for message in messages -%}
{{- '<|user|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' and loop.last -%}{{- '<think></think>' -}}{%- endif -%}
{{- message.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|user|>assistant\n' -}}{%- endif -%}
""".strip()


def tokenizer_with(template: str | None = None):
    tokenizer = build_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def masked_text(tokenizer, messages, tools=None) -> tuple[str, str]:
    token_ids, mask = chat.encode_conversation(tokenizer, messages, tools)
    assert token_ids.dtype == np.int32 and mask.dtype == bool and token_ids.shape == mask.shape
    return tokenizer.decode(token_ids), tokenizer.decode(token_ids[mask])


def test_mask_covers_every_assistant_turn_and_its_end_mark_only():
    text, trained = masked_text(tokenizer_with(), EPISODE, TOOLS)
    assert text == (
        "<|system|>mul<|user|>37 at 46?<|assistant|>mul(37,46)<|end|><|tool|>1702<|assistant|>1702<|end|>"
    )
    assert trained == "mul(37,46)<|end|>1702<|end|>"


def test_mask_distinguishes_equal_text_of_tool_and_assistant():
    tokenizer = tokenizer_with()
    token_ids, mask = chat.encode_conversation(tokenizer, EPISODE, TOOLS)
    text = tokenizer.decode(token_ids)
    first = text.index("1702")
    # one token per character apart from the marks: count tokens before the tool's text
    num_before = len(chat.encode_texts(tokenizer, [text[:first]])[0])
    assert not mask[num_before : num_before + 4].any()
    assert mask[-5:].all()


def test_reasoning_is_trained_on():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    assert masked_text(tokenizer_with(), messages)[1] == "<think>c</think>b<|end|>"


def test_mask_by_prefix_without_generation_marks():
    text, trained = masked_text(tokenizer_with(CHATML), EPISODE)
    assert text.count("<|end|>\n") == 4
    # the line break after the end mark belongs to the template
    assert trained == "mul(37,46)<|end|>1702<|end|>"


def test_marks_and_prefixes_agree():
    marked = CHATML.replace(
        "{{- '<|user|>' + message.role + '\n' + message.content + '<|end|>\n' -}}",
        "{{- '<|user|>' + message.role + '\n' -}}{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{- message.content + '<|end|>' -}}{%- endgeneration -%}{%- else -%}{{- message.content + '<|end|>' -}}"
        "{%- endif -%}{{- '\n' -}}",
    )
    assert marked != CHATML
    for first, second in zip(
        chat.encode_conversation(tokenizer_with(CHATML), EPISODE),
        chat.encode_conversation(tokenizer_with(marked), EPISODE),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


def test_unstable_template_without_marks_is_refused_for_several_turns():
    tokenizer = tokenizer_with(UNSTABLE)
    assert masked_text(tokenizer, EPISODE[:2])[1] == "<think></think>mul(37,46)<|end|>"
    with pytest.raises(UserError, match="the whole conversation renders message 1, or what is before it"):
        chat.encode_conversation(tokenizer, EPISODE)


def test_empty_assistant_text_still_trains_the_end_mark():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    assert masked_text(tokenizer_with(), messages)[1] == "<|end|>"


def test_token_across_the_border_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # a byte-pair vocabulary in which the separator and the first letter of the reply merge
    letters = [*"ab: ", "<e>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, ":b"])}, merges=[(":", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", behavior="removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}:{% generation %}{{ m.content }}<e>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="straddles"):
        chat.encode_conversation(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ba"}]
        )
    _, mask = chat.encode_conversation(
        tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}]
    )
    assert mask.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("template", [None, CHATML, UNSTABLE])
def test_prompt_sampled_turn_and_reply_add_up_to_the_rendered_episode(template):
    tokenizer = tokenizer_with(template)
    tools = TOOLS if template is None else None
    prompt = chat.encode_prompt(tokenizer, EPISODE[:1], tools)
    sampled = chat.encode_texts(tokenizer, ["mul(37,46)<|end|>"])[0]
    reply = chat.encode_reply(tokenizer, EPISODE[:2], EPISODE[2:3], tools)
    whole = chat.render(tokenizer, EPISODE[:3], tools)
    assert tokenizer.decode(np.concatenate([prompt, sampled, reply])) == whole


def test_reply_does_not_depend_on_what_was_sampled():
    tokenizer = tokenizer_with()
    odd = [EPISODE[0], {"role": "assistant", "content": "<|tool|>9<|assistant|>"}]
    np.testing.assert_array_equal(
        chat.encode_reply(tokenizer, odd, EPISODE[2:3]),
        chat.encode_reply(tokenizer, EPISODE[:2], EPISODE[2:3]),
    )


def test_reply_needs_an_end_mark_in_the_template():
    tokenizer = tokenizer_with(CHATML.replace("<|end|>", ""))
    with pytest.raises(UserError, match="end mark"):
        chat.encode_reply(tokenizer, EPISODE[:2], EPISODE[2:3])


def test_template_refusal_is_a_user_error():
    with pytest.raises(UserError, match="unknown role"):
        chat.render(tokenizer_with(), [{"role": "robot", "content": "x"}])


def test_unknown_character_is_a_user_error():
    with pytest.raises(UserError, match="tokenizer refuses"):
        chat.encode_prompt(tokenizer_with(), [{"role": "user", "content": "\N{SNOWMAN}"}])


def test_load_tokenizer_round_trip(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert chat.render(tokenizer, EPISODE[:1]) == "<|user|>37 at 46?<|assistant|>"


def test_load_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"model\.path=.*no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.path=.*no tokenizer files .*copy tokenizer\.json there"):
        load_tokenizer(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_ordinary_tokens_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    special = {token["content"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: vocab[token] for token in vocab if token in special}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no tokens but special ones"):
        load_tokenizer(tmp_path)
