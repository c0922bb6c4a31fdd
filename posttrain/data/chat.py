"""Between messages and token ids: the one place that applies chat templates.

Owns rendering, the assistant-only loss mask, and the tokens that an environment's reply adds. Refuses to guess: a
template that gives no way to find the assistant's tokens is an error, never an empty or a full mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.config import UserError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]  # characters, end exclusive
Options = dict[str, Any] | None  # variables of the template, such as enable_thinking

# What the template gets from here; a row cannot set them.
OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversations")

# Stands for the text of an assistant message whose tokens are already known; plain letters survive any template.
_STAND_IN = "zqAssistantTextStandsHereqz"


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = None,
    add_generation_prompt: bool = True,
    options: Options = None,
) -> str:
    """The conversation as text. UserError with the template's own reason if it refuses the messages."""
    return _render(tokenizer, messages, tools, add_generation_prompt, options, want_spans=False)[0]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> np.ndarray:
    """[P] int32: ids of the conversation with the generation prompt added."""
    return encode_texts(tokenizer, [render(tokenizer, messages, tools)])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of rendered texts, [P] int32 each; special tokens only where the text spells them."""
    return [np.asarray(ids, dtype=np.int32) for ids in _tokenize(tokenizer, texts)["input_ids"]]


def encode_reply(
    tokenizer: PreTrainedTokenizerBase,
    messages_before: Messages,
    reply_messages: Messages,
    tools: Tools = None,
    options: Options = None,
) -> np.ndarray:
    """[n] int32: what the template adds after an assistant turn that ends with its end mark.

    ``messages_before`` ends with that assistant message (its tokens were sampled, end mark included);
    ``reply_messages`` come from an environment. The result holds the separator after the end mark, the reply and
    the next generation prompt. The sampled text itself is not rendered again, so it cannot change its tokens.

    Raises:
        UserError: the template does not put an end mark right after the assistant's text.
    """
    assert messages_before and messages_before[-1]["role"] == "assistant", "a reply follows an assistant turn"
    assert reply_messages, "an empty reply adds nothing to generate from"
    stand_in = {"role": "assistant", "content": _STAND_IN}
    text = render(tokenizer, [*messages_before[:-1], stand_in, *reply_messages], tools, options=options)
    before, found, after = text.partition(_STAND_IN)
    if not found or _STAND_IN in after:
        raise UserError("chat template: an assistant turn before a reply is not rendered exactly once")
    del before
    mark = _leading_mark(tokenizer, after)
    if mark is None:
        raise UserError(
            f"chat template: {after[:20]!r} follows the assistant's text, not an end mark; "
            "multi-turn episodes need a template that ends assistant turns with a special token"
        )
    return encode_texts(tokenizer, [after[len(mark) :]])[0]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] int32 and loss mask [T] bool for SFT: True on assistant text and its end mark, nothing else.

    Raises:
        UserError: as `render_with_spans`, or a token straddles the border of the assistant's text.
    """
    return mask_texts(tokenizer, [render_with_spans(tokenizer, messages, tools)])[0]


def render_with_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None, options: Options = None
) -> tuple[str, list[Span]]:
    """The whole conversation as text, and the character spans that the assistant wrote and is trained on.

    A turn is what rendering one message more adds to the messages before it and a generation prompt; of it the parts
    between the template's ``{% generation %}`` marks count, where it has some. Both renderings must be beginnings of the
    whole: otherwise the policy would be trained on a text that it never gets to see or to write.

    Raises:
        UserError: they are not, or the template leaves reasoning or tool calls of a trained turn out.
    """
    text, marked = _render(tokenizer, messages, tools, False, options, want_spans=True)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not is_trained(message):
            continue
        begin, end = _turn(tokenizer, messages, index, tools, options, text, bool(marked))
        own = [(max(b, begin), e) for b, e in marked if e > begin and b < end] if marked else [(begin, end)]
        _check_shown(index, message, "".join(text[b:e] for b, e in own))
        spans += own
    return text, spans


def is_trained(message: dict[str, Any]) -> bool:
    """Whether an assistant message counts in the loss: not with ``train: false`` or OpenAI's ``weight: 0``."""
    return message.get("train") is not False and message.get("weight") != 0


def mask_texts(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[tuple[str, list[Span]]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids [T] int32, loss mask [T] bool) of every (text, spans)."""
    encoded = _tokenize(tokenizer, [text for text, _ in rendered], offsets=True)
    pairs = []
    for ids, offsets, (text, spans) in zip(
        encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True
    ):
        pairs.append((np.asarray(ids, dtype=np.int32), _mask(np.asarray(offsets), spans, text)))
    return pairs


def _mask(offsets: np.ndarray, spans: list[Span], text: str) -> np.ndarray:
    """offsets [T, 2] characters -> [T] bool."""
    offsets = offsets.reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=bool)
    for begin, end in spans:
        inside = (starts >= begin) & (ends <= end) & (ends > starts)
        straddles = (starts < end) & (ends > begin) & ~inside & (ends > starts)
        if straddles.any():
            where = int(starts[straddles][0])
            raise UserError(
                f"a token straddles the border of the assistant's text at {text[max(0, where - 10) : where + 10]!r}; "
                "let the message begin with a letter and end the template's turn with a special token"
            )
        mask |= inside
    if not mask.any():
        raise UserError(
            "no token of the assistant to train on; its messages are empty, or all have train=false"
        )
    return mask


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    index: int,
    tools: Tools,
    options: Options,
    full: str,
    has_marks: bool,
) -> Span:
    """Characters of ``full`` that message ``index`` adds to those before it and a generation prompt."""
    before = render(tokenizer, messages[:index], tools, options=options) if index else ""
    after = full
    if index < len(messages) - 1:
        after = render(tokenizer, messages[: index + 1], tools, False, options)
    # White space after the end mark belongs to the template, not to what the policy has to produce.
    end = len(after.rstrip())
    if not full.startswith(before) or full[:end] != after[:end] or end <= len(before):
        raise UserError(
            f"chat template: the whole conversation renders message {index}, or what is before it, otherwise than the "
            'conversation up to there; give the message "train": false, or one row per turn'
        )
    if not index and not has_marks:
        raise UserError(
            "chat template: where message 0 begins cannot be found (no {% generation %} marks, and nothing before it); "
            'give it "train": false'
        )
    return len(before), end


def _check_shown(index: int, message: dict[str, Any], text: str) -> None:
    """A template that ignores a part of a message would drop it without a word."""
    if (message.get("reasoning_content") or "").strip() not in text:
        raise UserError(
            f"the chat template leaves the reasoning out of message {index}; put it into the content"
        )
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in text:
            raise UserError(
                f"the chat template leaves the tool_calls out of message {index}; write them as content"
            )


def _leading_mark(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    marks = {token.content for token in tokenizer.added_tokens_decoder.values()} | {str(tokenizer.eos_token)}
    return max((mark for mark in marks if text.startswith(mark)), key=len, default=None)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools,
    add_generation_prompt: bool,
    options: Options,
    want_spans: bool,
) -> tuple[str, list[Span]]:
    template = tokenizer.get_chat_template(None, tools)
    _check_options(template, options or {}, tokenizer)
    marked = want_spans and "generation" in template and _has_generation_marks(template)
    try:  # templates are programs of their own, and refuse messages in their own ways
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map | (options or {}),
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from error
    return texts[0], [tuple(span) for span in spans[0]] if marked else []


def _check_options(template: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    for name in options:
        if name in OWN_VARIABLES or name in tokenizer.special_tokens_map:
            raise UserError(f"chat_template_kwargs: {name!r} is not for a row to set")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"chat_template_kwargs: the chat template does not read {name!r}")


def _has_generation_marks(template: str) -> bool:
    return any(
        mark in template for mark in ("{% generation", "{%- generation", "{%generation", "{%-generation")
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], offsets: bool = False) -> Any:
    try:  # tokenizers raise a bare Exception on text outside their vocabulary
        return tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,  # lengths are checked by those who know the limit
        )
    except Exception as error:
        raise UserError(f"the tokenizer refuses this text: {error}") from error
