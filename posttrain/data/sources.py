"""Sources of a run -> `Prompt`s for RL, MOPD and evaluation, or `TrainingSample`s for SFT.

Owns the row format: ``messages`` (OpenAI style; in SFT an assistant message with ``train: false`` has no loss), ``domain``,
``answer``, ``tools``, ``system``, ``reasoning``, ``id``, and ``chat_template_kwargs``, variables for the chat template such
as ``enable_thinking``; every other field lands in `Prompt.metadata`. A conversation with ``token_ids``, as `posttrain sample` writes it,
is trained on as it was sampled: its text is not tokenised again. Refuses, with file, line and field: malformed messages,
rows without what the verifier reads, prompts and conversations that are too long, ids that occur twice, token ids of
another tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.config import DataConfig, SourceConfig, UserError
from posttrain.data import chat
from posttrain.data.memo import remembered
from posttrain.data.rows import BadRows, Row, RowError, read_rows
from posttrain.records import Prompt, TrainingSample

DEFAULT_DOMAIN = "default"
ROLES = ("system", "developer", "user", "assistant", "tool")
OWN_FIELDS = {"messages", "domain", "answer", "tools", "system", "id"}
EMPTY: tuple[Any, ...] = (None, "", [])  # what counts as a missing field
ENCODE_ROWS = 1024  # rows tokenized in one call

T = TypeVar("T")
Encoded = TypeVar("Encoded")


def sources_of(data: DataConfig, *, eval: bool = False) -> dict[str, SourceConfig]:
    """Named sources of training (or held-out) data; `data.path` counts as one source named `data`.

    Raises:
        UserError: none is configured, or both the shorthand and named sources are.
    """
    path, sources, prefix = (
        (data.eval_path, data.eval_sources, "eval_") if eval else (data.path, data.sources, "")
    )
    if path is not None and sources:
        raise UserError(
            f"data.{prefix}path={path!r}: data.{prefix}sources is set as well; give one of the two"
        )
    if path is not None:
        return {"data": SourceConfig(path=path)}
    if not sources:
        raise UserError(
            f"data.{prefix}path=None: no data; give data.{prefix}path=FILE.jsonl or data.{prefix}sources.NAME.path=FILE"
        )
    return dict(sources)


def source_weights(data: DataConfig) -> dict[str, float]:
    """Mixture weight of every training source."""
    return {name: source.weight for name, source in sources_of(data).items()}


@remembered
def load_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    eval: bool = False,
    domain: str | None = None,
    required_fields: Sequence[str] = (),
    skipped: list[str] | None = None,
) -> list[Prompt]:
    """All prompts in source order, tokenized with the generation prompt.

    Args:
        max_tokens: what the context leaves for a prompt; `data.max_prompt_tokens` can only lower it.
        eval: read the held-out sources.
        domain: keep this domain alone.
        required_fields: fields that every row must have, for the verifier; `"answer|tests"` accepts either.
        skipped: receives `file:line: field: reason` of every row dropped under `data.on_bad_row=skip`.

    Raises:
        UserError: a bad row under `fail`, or nothing left.
    """
    limit, limit_key = max_tokens, "the context leaves room for"
    if data.max_prompt_tokens is not None and data.max_prompt_tokens < max_tokens:
        limit, limit_key = data.max_prompt_tokens, "data.max_prompt_tokens allows"
    loader = _Loader(data=data, eval=eval, domain=domain)
    prompts: list[Prompt] = []
    ids: dict[str, str] = {}
    shown: set[str] = set()

    def check(row: Row, source: SourceConfig) -> _Parsed:
        parsed = _parse_row(row.values, source)
        _require_fields(row.values, required_fields)
        if parsed.messages[-1]["role"] == "assistant":
            raise RowError("messages", "a prompt must not end with an assistant message")
        former = ids.setdefault(parsed.prompt_id, row.where)
        if former != row.where:
            what = "id" if "id" in row.values else "row"
            raise RowError("id", f"the {what} occurs twice, first at {former} ({parsed.prompt_id!r})")
        return parsed

    def encode(batch: list[_Parsed]) -> list[np.ndarray]:
        return chat.encode_texts(tokenizer, [_render_prompt(tokenizer, parsed, shown) for parsed in batch])

    for name, row, parsed, token_ids in loader.load(check, encode):
        if len(token_ids) > limit:
            reason = f"the prompt has {len(token_ids)} tokens, more than the {limit} that {limit_key}"
            loader.bad.reject(row.where, RowError("messages", reason))
            continue
        prompts.append(_prompt(name, row, parsed, token_ids))
    loader.finish(len(prompts), skipped)
    return prompts


@remembered
def load_conversations(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    eval: bool = False,
    domain: str | None = None,
    skipped: list[str] | None = None,
) -> list[TrainingSample]:
    """All conversations as SFT samples, loss on assistant tokens only, every weight 1.

    Arguments and errors as in `load_prompts`; a row must end with an assistant message, or hold ``token_ids``,
    ``loss_mask`` and ``text`` of a sampled conversation.
    """
    loader = _Loader(data=data, eval=eval, domain=domain)
    samples: list[TrainingSample] = []
    shown: set[str] = set()

    def check(row: Row, source: SourceConfig) -> _Parsed:
        parsed = _parse_row(row.values, source)
        if "token_ids" in row.values:
            parsed.sampled = _parse_sampled(row.values, tokenizer)
            return parsed
        if parsed.messages[-1]["role"] != "assistant":
            raise RowError("messages", "a conversation to train on must end with an assistant message")
        _attach_reasoning(parsed.messages, row.values.get("reasoning"))
        return parsed

    def encode(batch: list[_Parsed]) -> list[tuple[np.ndarray, np.ndarray]]:
        rendered = [_render_conversation(tokenizer, p, shown) for p in batch if p.sampled is None]
        masked = iter(chat.mask_texts(tokenizer, rendered) if rendered else [])
        return [next(masked) if parsed.sampled is None else parsed.sampled for parsed in batch]

    for _, row, parsed, (token_ids, loss_mask) in loader.load(check, encode):
        if len(token_ids) > max_tokens:
            reason = (
                f"the conversation has {len(token_ids)} tokens, more than algorithm.max_tokens={max_tokens}"
            )
            loader.bad.reject(row.where, RowError("messages", reason))
            continue
        weights = np.ones(len(token_ids), dtype=np.float32)
        samples.append(
            TrainingSample(token_ids=token_ids, loss_mask=loss_mask, weights=weights, domain=parsed.domain)
        )
    loader.finish(len(samples), skipped)
    return samples


def describe(records: Iterable[Prompt | TrainingSample]) -> dict[str, dict[str, float]]:
    """Per domain: number of rows, mean and largest number of tokens, for logs and the manifest."""
    lengths: dict[str, list[int]] = {}
    for record in records:
        lengths.setdefault(record.domain, []).append(len(record.token_ids))
    return {
        domain: {"num_rows": len(n), "mean_tokens": round(float(np.mean(n)), 1), "max_tokens": max(n)}
        for domain, n in sorted(lengths.items())
    }


@dataclass(kw_only=True, slots=True)
class _Parsed:
    prompt_id: str
    domain: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    options: chat.Options = None  # chat_template_kwargs
    sampled: tuple[np.ndarray, np.ndarray] | None = None  # ids and loss mask that the row holds itself


@dataclass(kw_only=True, slots=True)
class _Loader:
    """Reads, checks and encodes the rows of all sources in batches, under one bad-row policy."""

    data: DataConfig
    eval: bool
    domain: str | None
    bad: BadRows = field(init=False)
    domains_seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.bad = BadRows(policy=self.data.on_bad_row)

    def load(
        self,
        check: Callable[[Row, SourceConfig], _Parsed],
        encode: Callable[[list[_Parsed]], list[Encoded]],
    ) -> Iterator[tuple[str, Row, _Parsed, Encoded]]:
        """(source name, row, parsed row, what ``encode`` made of it) of every good row."""
        for name, source in sources_of(self.data, eval=self.eval).items():
            for batch in _batches(self._checked(name, source, check), ENCODE_ROWS):
                for (row, parsed), encoded in self._encoded(batch, encode):
                    yield name, row, parsed, encoded

    def finish(self, num_kept: int, skipped: list[str] | None) -> None:
        """Report what was dropped; UserError if nothing is left."""
        self.bad.log(num_kept)
        if skipped is not None:
            skipped += self.bad.skipped
        if num_kept:
            return
        key = "data.eval_path" if self.eval else "data.path"
        if self.domain is not None and self.domain not in self.domains_seen:
            seen = ", ".join(sorted(self.domains_seen)) or "none"
            raise UserError(f"domain={self.domain!r}: no row of that domain; the data has: {seen}")
        raise UserError(
            f"{key}: no usable row is left, {len(self.bad.skipped)} were dropped (data.on_bad_row=skip)"
        )

    def _checked(
        self, name: str, source: SourceConfig, check: Callable[[Row, SourceConfig], _Parsed]
    ) -> Iterator[tuple[Row, _Parsed]]:
        key = f"data.{'eval_' if self.eval else ''}" + ("path" if name == "data" else f"sources.{name}.path")
        for row in read_rows(source, key, self.bad):
            try:
                parsed = check(row, source)
            except RowError as error:
                self.bad.reject(row.where, error)
                continue
            self.domains_seen.add(parsed.domain)
            if self.domain is None or parsed.domain == self.domain:
                yield row, parsed

    def _encoded(
        self, batch: list[tuple[Row, _Parsed]], encode: Callable[[list[_Parsed]], list[Encoded]]
    ) -> Iterator[tuple[tuple[Row, _Parsed], Encoded]]:
        try:
            encoded = encode([parsed for _, parsed in batch])
        except (UserError, RowError):  # one row of the batch is at fault: find out which, and name it
            yield from self._encoded_singly(batch, encode)
        else:
            yield from zip(batch, encoded, strict=True)

    def _encoded_singly(
        self, batch: list[tuple[Row, _Parsed]], encode: Callable[[list[_Parsed]], list[Encoded]]
    ) -> Iterator[tuple[tuple[Row, _Parsed], Encoded]]:
        for row, parsed in batch:
            try:
                encoded = encode([parsed])[0]
            except RowError as error:
                self.bad.reject(row.where, error)
            except UserError as error:
                self.bad.reject(row.where, RowError("messages", str(error)))
            else:
                yield (row, parsed), encoded


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _parse_row(values: dict[str, Any], source: SourceConfig) -> _Parsed:
    domain = source.domain if source.domain is not None else values.get("domain")
    if domain is None:
        domain = DEFAULT_DOMAIN
    if not isinstance(domain, str) or not domain:
        raise RowError("domain", f"expected a non-empty string, found {domain!r}")
    messages = _parse_messages(values)
    tools = values.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools", "expected a list of OpenAI-style tool objects")
    options = _parse_options(values)
    prompt_id = values.get("id")
    if prompt_id is None:
        prompt_id = _content_id(domain, messages, tools, values.get("answer"), options)
    elif isinstance(prompt_id, bool) or not isinstance(prompt_id, (str, int)) or prompt_id == "":
        raise RowError("id", f"expected a string or an integer, found {prompt_id!r}")
    return _Parsed(prompt_id=str(prompt_id), domain=domain, messages=messages, tools=tools, options=options)


def _parse_options(values: dict[str, Any]) -> chat.Options:
    """Variables of the chat template; null counts as not given, as a Parquet column has it."""
    options = values.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise RowError("chat_template_kwargs", f"expected an object, found {type(options).__name__}")
    if values.get("enable_thinking") is not None:
        raise RowError("enable_thinking", 'give it as "chat_template_kwargs": {"enable_thinking": ...}')
    return {name: value for name, value in (options or {}).items() if value is not None} or None


def _parse_sampled(
    values: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] int32 and loss mask [T] bool of a sampled conversation. The ids must spell the row's ``text``, so that
    those of another tokenizer are not taken for words of this one."""
    token_ids, mask = values["token_ids"], values.get("loss_mask")
    if not isinstance(token_ids, list) or not token_ids or any(type(i) is not int for i in token_ids):
        raise RowError("token_ids", "expected a non-empty list of integers")
    if not isinstance(mask, list) or len(mask) != len(token_ids) or any(bit not in (0, 1) for bit in mask):
        raise RowError("loss_mask", f"expected a 0 or 1 for each of the {len(token_ids)} token_ids")
    if mask[0] or not any(mask):
        raise RowError(
            "loss_mask", "expected a 0 for the first token, which nothing precedes, and a 1 somewhere"
        )
    in_vocabulary = all(0 <= token_id < len(tokenizer) for token_id in token_ids)
    if not in_vocabulary or tokenizer.decode(token_ids, skip_special_tokens=False) != values.get("text"):
        raise RowError(
            "token_ids",
            "they do not spell the row's text with this model's tokenizer; sample with a model of the same vocabulary",
        )
    return np.array(token_ids, dtype=np.int32), np.array(mask, dtype=bool)


def _parse_messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in values:
        raise RowError("messages", "the field is missing")
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowError("messages", "expected a non-empty list of {role, content} objects")
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    messages = [_with_calls(f"messages[{index}]", message) for index, message in enumerate(messages)]
    system = values.get("system")
    if system is None:
        return messages
    if not isinstance(system, str):
        raise RowError("system", f"expected a string, found {type(system).__name__}")
    if messages[0]["role"] in ("system", "developer"):
        raise RowError("system", "messages begin with a system message as well; give one of the two")
    return [{"role": "system", "content": system}, *messages]


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise RowError(name, f"expected an object, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"{name}.role", f"found {role!r}, expected one of {', '.join(ROLES)}")
    train, weight = message.get("train"), message.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        raise RowError(f"{name}.train", "expected true or false (weight: 1 or 0)")
    if role != "assistant" and (train or weight):
        raise RowError(
            f"{name}.train", f"only assistant messages are trained on, and this is of role {role!r}"
        )
    if not isinstance(content, str) and not (
        role == "assistant" and content is None and message.get("tool_calls")
    ):
        raise RowError(f"{name}.content", f"expected a string, found {type(content).__name__}")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RowError(f"{name}.reasoning_content", f"expected a string, found {type(reasoning).__name__}")


def _with_calls(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """A copy whose tool calls have objects as arguments: OpenAI writes them as JSON text, templates (and vLLM) expect
    objects, and would quote a text once more."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise RowError(f"{name}.tool_calls", "expected a list, in an assistant message")
    return {**message, "tool_calls": [_call(f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]}


def _call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(name, 'expected {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments")
    try:  # what a user wrote
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        raise RowError(f"{name}.function.arguments", f"not JSON: {arguments!r}") from None
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _require_fields(values: dict[str, Any], required: Sequence[str]) -> None:
    for names in required:
        if all(values.get(name) in EMPTY for name in names.split("|")):
            raise RowError(names, "the field is missing or empty, and the reward of this run reads it")


def _attach_reasoning(messages: list[dict[str, Any]], reasoning: Any) -> None:
    """The row's `reasoning` belongs to its last assistant message."""
    if reasoning is None:
        return
    if not isinstance(reasoning, str):
        raise RowError("reasoning", f"expected a string, found {type(reasoning).__name__}")
    if messages[-1].get("reasoning_content") not in (None, reasoning):
        raise RowError("reasoning", "the last message has another reasoning_content; give one of the two")
    messages[-1]["reasoning_content"] = reasoning


def _content_id(
    domain: str, messages: list[dict[str, Any]], tools: Any, answer: Any, options: chat.Options
) -> str:
    parts = [domain, messages, tools, answer, *([options] if options else [])]
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _render_prompt(tokenizer: PreTrainedTokenizerBase, parsed: _Parsed, shown: set[str]) -> str:
    text = chat.render(tokenizer, parsed.messages, parsed.tools, options=parsed.options)
    _check_tools(tokenizer, parsed, text, shown, add_generation_prompt=True)
    return text


def _render_conversation(
    tokenizer: PreTrainedTokenizerBase, parsed: _Parsed, shown: set[str]
) -> tuple[str, list[chat.Span]]:
    text, spans = chat.render_with_spans(tokenizer, parsed.messages, parsed.tools, parsed.options)
    _check_tools(tokenizer, parsed, text, shown, add_generation_prompt=False)
    return text, spans


def _check_tools(
    tokenizer: PreTrainedTokenizerBase,
    parsed: _Parsed,
    text: str,
    shown: set[str],
    add_generation_prompt: bool,
) -> None:
    """A template that ignores tools would drop them without a word. ``shown``: tool lists that proved to be shown."""
    if not parsed.tools or (signature := str(parsed.tools)) in shown:
        return
    if text == chat.render(tokenizer, parsed.messages, None, add_generation_prompt, parsed.options):
        raise RowError("tools", "the chat template leaves tools out; describe them in a system message")
    shown.add(signature)


def _prompt(name: str, row: Row, parsed: _Parsed, token_ids: np.ndarray) -> Prompt:
    return Prompt(
        prompt_id=parsed.prompt_id,
        source=name,
        domain=parsed.domain,
        messages=parsed.messages,
        token_ids=token_ids,
        answer=row.values.get("answer"),
        tools=parsed.tools,
        metadata={key: value for key, value in row.values.items() if key not in OWN_FIELDS},
    )
