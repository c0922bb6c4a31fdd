"""Whether two tokenizer.json give the same ids for the same text, whatever their files look like.

Owns the probe texts: what normalizers, pre-tokenizers and added tokens are known to treat differently. A teacher that
was trained on other ids for the same text scores the student's ids as if they were misspelt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Neither of these changes what a text without padding becomes.
INERT = ("padding", "truncation", "post_processor", "decoder", "version")

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello World HELLO hello",
    " leading and trailing ",
    "two  spaces   three    four",
    "\ttab\n\nlines\r\nreturn",
    "0 1 12 123 1234 12345 3.14159 1,000,000",
    "def f(x):\n    return x**2  # square\n",
    '{"a": [1, 2.5, null], "b": "c\\n"}',
    "don't can't I'll it's we've",
    "x=1;y==2!=3<=4>=5&&6||7",
    "$\\frac{a}{b}=\\sqrt{c}$",
    "https://example.org/path?q=1&r=2#top",
    "caf\u00e9 na\u00efve \u00fcber",  # composed
    "cafe\u0301 nai\u0308ve u\u0308ber",  # the same letters, decomposed
    "\ufb01ne \u2460 \uff21\uff22\uff23 \u00bd",  # compatibility forms
    "\u4f60\u597d\uff0c\u4e16\u754c \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "no\u00a0break\u2003em\u200bzero",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2026",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a",
    "",
)


def same_ids(student: Path, teacher: Path) -> tuple[str, str | None]:
    """(what was compared, the first difference or None) of two checkpoint folders.

    Reads tokenizer.json alone; a folder without one was compared by its vocabulary, which is said.
    """
    files = [folder / "tokenizer.json" for folder in (student, teacher)]
    if not all(file.is_file() for file in files):
        return "no tokenizer.json to compare", None
    contents = [json.loads(file.read_text()) for file in files]
    changed = sorted(
        key for key in {*contents[0], *contents[1]} - {*INERT} if contents[0].get(key) != contents[1].get(key)
    )
    if not changed:
        return "equal files", None
    texts = [*PROBES, *_around_added_tokens(contents)]
    encoders = [_load(file) for file in files]
    for text in texts:
        ours, theirs = (_encode(encoder, text) for encoder in encoders)
        if ours != theirs:
            where = " and ".join(changed)
            return (
                "",
                f"{text!r} gives {_short(theirs)} and the student's {_short(ours)} (files differ in {where})",
            )
    return f"same ids on {len(texts)} texts", None


def _around_added_tokens(contents: list[dict[str, Any]]) -> list[str]:
    """Added tokens with and without space and letters beside them: lstrip, rstrip, single_word, normalized."""
    added = {token["content"] for content in contents for token in content.get("added_tokens", [])}
    return [f"a{token}b {token} {token}{token}\n{token.upper()}" for token in sorted(added)]


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:  # a file of someone else; the library raises a bare Exception
        return Tokenizer.from_file(str(file))
    except Exception as error:
        return error


def _encode(encoder: Any, text: str) -> list[int] | str:
    """Ids, or "refused": a tokenizer may refuse a text, and then both must."""
    if isinstance(encoder, Exception):
        return f"no tokenizer ({' '.join(str(encoder).split())[:80]})"
    try:  # the library raises a bare Exception for text outside the vocabulary
        return list(encoder.encode(text, add_special_tokens=False).ids)
    except Exception:
        return "refused"


def _short(ids: list[int] | str) -> str:
    return ids if isinstance(ids, str) else f"{ids[:8]}{' ...' if len(ids) > 8 else ''}"
