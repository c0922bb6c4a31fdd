"""Loading of tokenizers. Refuses one without a chat template: prompts could not be told from replies."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.config import UserError


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint directory or hub id.

    Raises:
        UserError: nothing loadable at ``path``, no chat template, no fast tokenizer, or no end-of-sequence token.
    """
    key = f"model.path={str(path)!r}"
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise UserError(f"{key}: no such directory; give a Hugging Face checkpoint directory or a hub id")
    try:  # files of a user, or a hub that may not answer
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key}: no tokenizer could be loaded ({reason}); give a checkpoint with one"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"{key}: the tokenizer has no chat template; add chat_template.jinja beside tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{key}: only a slow tokenizer is there, without character offsets; save a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}: the tokenizer has no eos_token; name the end mark in tokenizer_config.json")
    return tokenizer
