"""What SFT trains on, token by token: message shapes against text with the trained parts in [[ ]], written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.config import DataConfig, UserError
from posttrain.data.sources import load_conversations, load_prompts

# ChatML in short, with tool calls. PLAIN shows every thought; THINKING shows those after the last question alone, an empty
# one in a last answer without, and takes enable_thinking: as the stock templates of thinking models do.
TEMPLATE = r"""
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{- '<s>tools' -}}{%- for t in tools -%}{{- ' ' + t.function.name -}}{%- endfor -%}{{- '</s>\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{- '<s>' + m.role + '\n' + m.content + '</s>\n' -}}
{%- else -%}
{{- '<s>assistant\n' -}}
{%- if SHOWN -%}{{- '<think>' + (m.reasoning_content or '') + '</think>' -}}{%- endif -%}
{{- m.content or '' -}}
{%- for c in m.tool_calls or [] -%}
{{- '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' -}}
{%- endfor -%}
{{- '</s>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<s>assistant\n' + PROMPT -}}{%- endif -%}
""".strip()
PLAIN = TEMPLATE.replace("SHOWN", "m.reasoning_content").replace("PROMPT", "''")
THINKING = TEMPLATE.replace(
    "SHOWN", "loop.index0 > last.user and (loop.last or m.reasoning_content)"
).replace("PROMPT", "('<think></think>' if enable_thinking is defined and not enable_thinking else '')")


def marked(template: str) -> str:
    """The same template with generation marks around what the assistant says."""
    return template.replace(
        r"{{- '<s>assistant\n' -}}", r"{{- '<s>assistant\n' -}}{%- generation -%}"
    ).replace(
        r"{{- '</s>\n' -}}" + "\n{%- endif -%}",
        r"{{- '</s>' -}}{%- endgeneration -%}{{- '\n' -}}" + "\n{%- endif -%}",
    )


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that a character may be several, and the two marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", additional_special_tokens=["<s>"]
    )
    made.chat_template = template
    return made


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def says(text: str | None, *calls: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **fields}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
    return message


def row(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


TOOLS = [{"type": "function", "function": {"name": "mul"}}, {"type": "function", "function": {"name": "add"}}]
ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
A, U, S, T = "<s>assistant\n", "<s>user\n", "<s>system\n", "<s>tool\n"
E = "</s>\n"

SHAPES = {
    "one turn": (PLAIN, row(user("hi"), says("hello")), f"{U}hi{E}{A}[[hello</s>]]\n"),
    "system message": (PLAIN, row(system("be brief"), user("hi"), says("yo")), f"{S}be brief{E}{U}hi{E}{A}[[yo</s>]]\n"),
    "system of the row": (PLAIN, row(user("hi"), says("yo"), system="be brief"), f"{S}be brief{E}{U}hi{E}{A}[[yo</s>]]\n"),
    "two turns": (PLAIN, row(user("a"), says("b"), user("c"), says("d")), f"{U}a{E}{A}[[b</s>]]\n{U}c{E}{A}[[d</s>]]\n"),
    "first not trained": (PLAIN, row(user("a"), says("b", train=False), user("c"), says("d")), f"{U}a{E}{A}b{E}{U}c{E}{A}[[d</s>]]\n"),
    "last not trained": (PLAIN, row(user("a"), says("b"), user("c"), says("d", train=False)), f"{U}a{E}{A}[[b</s>]]\n{U}c{E}{A}d{E}"),
    "middle not trained": (
        PLAIN,
        row(user("a"), says("b", train=True), user("c"), says("d", train=False), user("e"), says("f", train=None)),
        f"{U}a{E}{A}[[b</s>]]\n{U}c{E}{A}d{E}{U}e{E}{A}[[f</s>]]\n",
    ),
    "weights of OpenAI": (PLAIN, row(user("a"), says("b", weight=0), user("c"), says("d", weight=1)), f"{U}a{E}{A}b{E}{U}c{E}{A}[[d</s>]]\n"),
    "tool call and result": (
        PLAIN,
        row(user("2*3?"), says(None, ("mul", {"a": 2})), tool("6"), says("6"), tools=TOOLS),
        f'<s>tools mul add{E}{U}2*3?{E}{A}[[<call>mul {{"a": 2}}</call></s>]]\n{T}6{E}{A}[[6</s>]]\n',
    ),
    "arguments as JSON text": (
        PLAIN,
        row(user("2*3?"), says("", ("mul", '{"a": [2, "x"]}')), tool("6"), says("six"), tools=TOOLS),
        f'<s>tools mul add{E}{U}2*3?{E}{A}[[<call>mul {{"a": [2, "x"]}}</call></s>]]\n{T}6{E}{A}[[six</s>]]\n',
    ),
    "words before a call": (
        PLAIN,
        row(user("?"), says("let me see", ("mul", {})), tool("6"), says("6")),
        f"{U}?{E}{A}[[let me see<call>mul {{}}</call></s>]]\n{T}6{E}{A}[[6</s>]]\n",
    ),
    "parallel calls": (
        PLAIN,
        row(user("?"), says(None, ("mul", {"a": 1}), ("add", {"b": 2})), tool("1"), tool("2"), says("3"), tools=TOOLS),
        f'<s>tools mul add{E}{U}?{E}{A}[[<call>mul {{"a": 1}}</call><call>add {{"b": 2}}</call></s>]]\n{T}1{E}{T}2{E}{A}[[3</s>]]\n',
    ),
    "call not trained": (
        PLAIN,
        row(user("?"), says(None, ("mul", {}), train=False), tool("6"), says("6")),
        f"{U}?{E}{A}<call>mul {{}}</call>{E}{T}6{E}{A}[[6</s>]]\n",
    ),
    "ends with a call": (PLAIN, row(user("?"), says(None, ("mul", {}))), f"{U}?{E}{A}[[<call>mul {{}}</call></s>]]\n"),
    "two answers in a row": (PLAIN, row(user("a"), says("b"), says("c")), f"{U}a{E}{A}[[b</s>]]\n{A}[[c</s>]]\n"),
    "reasoning": (PLAIN, row(user("a"), says("b", reasoning_content="hm")), f"{U}a{E}{A}[[<think>hm</think>b</s>]]\n"),
    "reasoning of the row": (PLAIN, row(user("a"), says("b"), reasoning="hm"), f"{U}a{E}{A}[[<think>hm</think>b</s>]]\n"),
    "empty answer": (PLAIN, row(user("a"), says("")), f"{U}a{E}{A}[[</s>]]\n"),
    "same words everywhere": (PLAIN, row(user("42"), says("42"), tool("42"), says("42")), f"{U}42{E}{A}[[42</s>]]\n{T}42{E}{A}[[42</s>]]\n"),
    "unicode": (PLAIN, row(user("naïve 数?"), says("Ω≈ 数学 e\u0301 👩‍🔬")), f"{U}naïve 数?{E}{A}[[Ω≈ 数学 e\u0301 👩‍🔬</s>]]\n"),
    "white space": (PLAIN, row(user(" a\n"), says("\n b \n\n")), f"{U} a\n{E}{A}[[\n b \n\n</s>]]\n"),
    "thinking on": (THINKING, row(user("a"), says("b", reasoning_content="hm"), chat_template_kwargs=ON), f"{U}a{E}{A}[[<think>hm</think>b</s>]]\n"),
    "thinking on, no thought": (THINKING, row(user("a"), says("b"), chat_template_kwargs=ON), f"{U}a{E}{A}[[<think></think>b</s>]]\n"),
    "thinking off": (THINKING, row(user("a"), says("b"), chat_template_kwargs=OFF), f"{U}a{E}{A}<think></think>[[b</s>]]\n"),
    "thoughts of former turns": (
        THINKING,
        row(user("a"), says("b", reasoning_content="x", train=False), user("c"), says("d", reasoning_content="y")),
        f"{U}a{E}{A}b{E}{U}c{E}{A}[[<think>y</think>d</s>]]\n",
    ),
    "thoughts between calls": (
        THINKING,
        row(user("a"), says(None, ("mul", {}), reasoning_content="x"), tool("6"), says("6", reasoning_content="y")),
        f"{U}a{E}{A}[[<think>x</think><call>mul {{}}</call></s>]]\n{T}6{E}{A}[[<think>y</think>6</s>]]\n",
    ),
}  # fmt: skip


def load(folder: Path, template: str, *rows: dict[str, Any]) -> list[str]:
    """Every sample as text, trained parts in [[ ]]."""
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_with(template)
    texts = []
    for sample in load_conversations(DataConfig(path=str(path)), tokenizer, 500):
        text, start = "", 0
        for end in range(1, len(sample.token_ids) + 1):
            if end == len(sample.token_ids) or sample.loss_mask[end] != sample.loss_mask[start]:
                part = tokenizer.decode(sample.token_ids[start:end])
                text += f"[[{part}]]" if sample.loss_mask[start] else part
                start = end
        texts.append(text)
    return texts


@pytest.mark.parametrize("shape", SHAPES)
def test_masks(shape: str, tmp_path: Path) -> None:
    template, given, expected = SHAPES[shape]
    assert load(tmp_path, template, given) == [expected]
    assert marked(template) != template and load(tmp_path, marked(template), given) == [expected]


def test_thinking_and_other_rows_in_one_run(tmp_path: Path) -> None:
    shapes = [SHAPES[name] for name in ("thinking on", "thinking off", "thoughts between calls")]
    assert load(tmp_path, THINKING, *(given for _, given, _ in shapes)) == [text for *_, text in shapes]


REFUSED = {
    "ends with a question": (PLAIN, row(user("a"), says("b"), user("c")), "must end with an assistant message"),
    "nothing trained": (PLAIN, row(user("a"), says("b", train=False)), "no token of the assistant to train on"),
    "a question trained": (PLAIN, row({**user("a"), "train": True}, says("b")), "messages[0].train: only assistant messages"),
    "a half weight": (PLAIN, row(user("a"), says("b", weight=0.5)), "messages[1].train: expected true or false"),
    "former thoughts": (
        THINKING,
        row(user("a"), says("b", reasoning_content="x"), user("c"), says("d")),
        "the whole conversation renders message 1",
    ),
    "a thought with thinking off": (
        THINKING,
        row(user("a"), says("b", reasoning_content="x"), chat_template_kwargs=OFF),
        "the whole conversation renders message 1",
    ),
    "a variable that is not read": (PLAIN, row(user("a"), says("b"), chat_template_kwargs=ON), "the chat template does not read 'enable_thinking'"),
    "a variable of ours": (PLAIN, row(user("a"), says("b"), chat_template_kwargs={"messages": []}), "'messages' is not for a row to set"),
    "a list of variables": (PLAIN, row(user("a"), says("b"), chat_template_kwargs=[1]), "chat_template_kwargs: expected an object"),
    "enable_thinking by itself": (THINKING, row(user("a"), says("b"), enable_thinking=False), "enable_thinking: give it as"),
    "arguments that are no JSON": (PLAIN, row(user("a"), says(None, ("mul", "{a"))), "messages[1].tool_calls[0].function.arguments: not JSON"),
    "a call without a function": (PLAIN, row(user("a"), says("", tool_calls=[{"name": "mul"}])), "messages[1].tool_calls[0]: expected"),
    "calls left out": (
        PLAIN.replace("m.tool_calls or []", "[]"),
        row(user("a"), says("b", ("mul", {}))),
        "leaves the tool_calls out of message 1",
    ),
    "starts with an answer": (PLAIN, row(says("b"), user("c"), says("d")), "where message 0 begins cannot be found"),
}  # fmt: skip


@pytest.mark.parametrize("shape", REFUSED)
def test_refusals_name_the_row(shape: str, tmp_path: Path) -> None:
    template, given, expected = REFUSED[shape]
    with pytest.raises(UserError) as caught:
        load(tmp_path, template, row(user("good"), says("row")), given)
    text = str(caught.value)
    assert "c.jsonl:2: " in text and expected in text and "\n" not in text


def test_prompts_take_variables_of_the_template_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [row(user("a")), row(user("a"), chat_template_kwargs=OFF)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_with(THINKING)
    first, second = load_prompts(DataConfig(path=str(path)), tokenizer, 500)
    assert tokenizer.decode(first.token_ids) == f"{U}a{E}{A}"
    assert tokenizer.decode(second.token_ids) == f"{U}a{E}{A}<think></think>"
    assert first.prompt_id != second.prompt_id
