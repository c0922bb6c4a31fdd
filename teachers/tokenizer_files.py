"""What decides whether two checkpoints read the same text and the same token ids in the same way, from their files.

Owns vocabulary, marks and chat template as they lie on the disk, and whether two templates say the same.
`teachers.tokenization` compares what the tokenizers make of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import UserError
from teachers.checkpoint import read_json

# The pad token is left out: nobody samples it, and fine-tuned checkpoints often change it.
SPECIAL_TOKENS = ("bos_token", "eos_token")


@dataclass(kw_only=True, slots=True)
class TokenizerFiles:
    """What decides whether two checkpoints read the same token ids in the same way."""

    vocabulary: dict[str, int]
    special: dict[str, str | None]  # role -> token
    special_ids: frozenset[int]
    chat_template: str | None


def read_tokenizer(folder: Path, key: str) -> TokenizerFiles:
    """Vocabulary, special tokens and chat template of a checkpoint folder."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _read_slow_tokenizer(folder, key)
    content = read_json(file, folder, key)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{key}={str(folder)!r}: tokenizer.json has no model; copy it again")
    model_vocab = content["model"].get("vocab", {})
    if isinstance(model_vocab, list):  # Unigram: [token, score] in the order of the ids
        model_vocab = {row[0]: i for i, row in enumerate(model_vocab)}
    added = content.get("added_tokens", [])
    return TokenizerFiles(
        vocabulary=dict(model_vocab) | {token["content"]: token["id"] for token in added},
        special=_read_special(folder, key),
        special_ids=frozenset(token["id"] for token in added if token.get("special")),
        chat_template=_read_chat_template(folder, key),
    )


def _read_special(folder: Path, key: str) -> dict[str, str | None]:
    special: dict[str, str | None] = dict.fromkeys(SPECIAL_TOKENS)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(folder / name, folder, key) if (folder / name).is_file() else {}
        for role in SPECIAL_TOKENS:
            token = content.get(role)
            if token is not None:
                special[role] = token["content"] if isinstance(token, dict) else token
    return special


def _read_chat_template(folder: Path, key: str) -> str | None:
    """The file wins over tokenizer_config.json, as in Transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text().strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name, folder, key).get("chat_template")
            if isinstance(template, list):  # several named templates
                template = next((t["template"] for t in template if t["name"] == "default"), None)
            if template is not None:
                return str(template).strip()
    return None


def _read_slow_tokenizer(folder: Path, key: str) -> TokenizerFiles:
    """Tokenizers without tokenizer.json are read by Transformers, which imports more than file reading does."""
    from transformers import AutoTokenizer

    try:  # the folder is someone else's, and Transformers raises half a dozen types for what is missing
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}={str(folder)!r}: no tokenizer.json there and no tokenizer that loads ({reason}); copy the"
            " tokenizer files of the student"
        ) from None
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerFiles(
        vocabulary=dict(tokenizer.get_vocab()),
        special={role: getattr(tokenizer, role) for role in SPECIAL_TOKENS},
        special_ids=frozenset(tokenizer.all_special_ids),
        chat_template=template.strip() if template else None,
    )


def same_template(one: str | None, other: str | None) -> bool:
    """Whether two chat templates are the same program: comments and spaces inside their tags are not text."""
    if one == other:
        return True
    return (
        one is not None and other is not None and _parsed(one) is not None and _parsed(one) == _parsed(other)
    )


def _parsed(template: str) -> object | None:
    """Its syntax tree, read with the settings of Transformers; None where it cannot be read."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """``{% generation %}``, with which Transformers marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    extensions: list[Any] = ["jinja2.ext.loopcontrols", Generation]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    try:  # someone else's template
        return environment.parse(template)
    except (TemplateSyntaxError, RecursionError):
        return None
