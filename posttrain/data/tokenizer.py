"""Loading of tokenizers. Refuses one without a chat template: prompts could not be told from replies.

Transformers makes an empty tokenizer for a directory without tokenizer files; that is refused as well.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.config import UserError

# Vocabularies as the families name them; tokenizer_config.json alone holds none.
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint directory or hub id.

    Raises:
        UserError: nothing loadable at ``path``, no chat template, no fast tokenizer, no vocabulary, or no
            end-of-sequence token.
    """
    key = f"model.path={str(path)!r}"
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise UserError(f"{key}: no such directory; give a Hugging Face checkpoint directory or a hub id")
    _check_files(Path(path), key)
    try:  # files of a user, or a hub that may not answer
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key}: no tokenizer could be loaded ({reason}); give a checkpoint with one"
        ) from error
    if len(tokenizer) - len(tokenizer.get_added_vocab()) < 2:
        raise UserError(
            f"{key}: the tokenizer has no tokens but special ones; copy the tokenizer.json of the model there"
        )
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


def _check_files(folder: Path, key: str) -> None:
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        raise UserError(
            f"{key}: no tokenizer files (tokenizer.json, tokenizer.model, vocab.json) in it; copy tokenizer.json there"
        )
