"""Character-level tokenizer of the tiny models: one token per printable ASCII character, and five marks.

Owns the vocabulary and the chat template. Refuses characters outside printable ASCII (the tokenizer raises): a
silently dropped character would change a task without a trace. There is no padding token of its own (padding is
masked everywhere, and an id that never occurs would still be sampled from time to time), so `pad` is the end mark.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
END_MARK = MARKS[0]
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
VOCABULARY = (*MARKS, *CHARACTERS)

# One line per role. The end mark belongs to the assistant alone: it is what the policy samples to end its turn.
CHAT_TEMPLATE = """
{%- if tools -%}
{{- '<|system|>' -}}
{%- for tool in tools -%}
{{- (tool.function or tool).name -}}{%- if not loop.last -%}{{- ' ' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role in ('system', 'user', 'tool') -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{%- if message.tool_calls -%}
{{- raise_exception('tool_calls are not rendered by this template: write the call into content') -}}
{%- endif -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{%- if message.reasoning_content -%}{{- '<think>' + message.reasoning_content + '</think>' -}}{%- endif -%}
{{- (message.content or '') + '<|end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".strip()


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """The tokenizer; ids follow `VOCABULARY`, the end mark is id 0 and is both EOS and padding."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_MARK,
        pad_token=END_MARK,
        additional_special_tokens=list(MARKS[1:]),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == len(VOCABULARY)
    return tokenizer
