"""A teacher behind an OpenAI-compatible vLLM server (`vllm serve`): prompt logprobs of the completions endpoint.

Token ids go out and token ids are checked on return; no text is ever tokenised for a score. Owns the wire: one text a
request, a bounded number at a time, timeouts, retries, the key. Redirects are refused, so that a key goes nowhere
else. `server_gates` asks before a run what can be asked: name, context, tokenizer, vocabulary, kind of logprobs.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import TeacherBackend, TeacherWorkerConfig, UserError
from teachers.backend import TokenScores
from teachers.gates import GateRow, Subject
from teachers.scores import TeacherScoreError, check_finite, check_signal, empty_scores, keep_rows
from teachers.teacher import SIGNALS, Teacher

RETRIED = (408, 425, 429, 500, 502, 503, 504)
MAX_WAIT_S = 8.0
LOWEST = -9999.0  # vLLM writes minus infinity like this
PROBE_TOKENS = 64  # spread over the student's vocabulary
PROBE_TOP = 5


class ServerScorer:
    """A `teachers.backend.Backend`. Nothing is asked before the first score."""

    vocab_size = 0  # a server does not say it; `server_gates` has tried the student's highest id

    def __init__(self, teacher: Teacher, cfg: TeacherWorkerConfig) -> None:
        self.path = teacher.name
        self._teacher = teacher
        self._timeout_s, self._retries = cfg.server_timeout_s, cfg.server_retries
        self._headers = {"Content-Type": "application/json"} | _authorization(cfg.api_key_env)
        self._threads = ThreadPoolExecutor(cfg.server_concurrency, thread_name_prefix="server")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def head(self) -> None:
        """A server gives no LM head."""

    def score(
        self,
        token_ids: list[np.ndarray],
        max_tokens_per_batch: int,
        names: list[str] | None = None,
        signal: str = "sampled",
        top_k: int = 64,
        masks: list[np.ndarray] | None = None,
    ) -> list[TokenScores]:
        """See `teachers.backend.Backend`. The server batches by itself. Raises `TeacherScoreError`, and `UserError`
        when the server refuses a text or cannot be reached."""
        check_signal(self._teacher.key, "server", signal, SIGNALS[TeacherBackend.server])
        k = 0 if signal == "sampled" else top_k
        labels = names or [str(index) for index in range(len(token_ids))]
        scores = list(self._threads.map(lambda ids, name: self._score(ids, k, name), token_ids, labels))
        for score, mask in zip(scores, masks or [], strict=masks is not None):
            keep_rows(score, mask)
        return scores

    def ask(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer to a GET (no body) or POST. Raises `UserError`."""
        data = None if body is None else json.dumps(body).encode()
        problem = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(0.25 * 2**attempt, MAX_WAIT_S))
            request = urllib.request.Request(self._teacher.path + route, data, self._headers)
            try:  # another machine is the other side
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_message(error)}"
                if error.code not in RETRIED:
                    raise self._error(
                        f"{route} was refused ({problem})", "mend the server or the key"
                    ) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise self._error(
            f"no answer to {route} in {self._retries + 1} tries ({problem})",
            "start the server, and the same command goes on",
        )

    def _score(self, token_ids: np.ndarray, k: int, name: str) -> TokenScores:
        scores = empty_scores(len(token_ids), k)
        if len(token_ids) < 2:
            return scores
        body = {"model": self._teacher.model, "prompt": token_ids.tolist(), "prompt_logprobs": k}
        # max_tokens=1 is the least that vLLM takes; the token is thrown away.
        answer = self.ask("/v1/completions", body | {"max_tokens": 1, "temperature": 0.0})
        try:  # written by the other side
            rows = answer["choices"][0]["prompt_logprobs"]
            if len(rows) != len(token_ids):
                raise KeyError(f"{len(rows)} rows for {len(token_ids)} tokens")
            for t in range(1, len(token_ids)):
                row = rows[t]
                scores.logprobs[t] = _logprob(row[str(token_ids[t])])
                if scores.topk_ids is not None and scores.topk_logprobs is not None:
                    top = sorted(row.items(), key=lambda entry: entry[1]["rank"])[:k]
                    scores.topk_ids[t] = [int(token) for token, _ in top]
                    scores.topk_logprobs[t] = [_logprob(entry) for _, entry in top]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TeacherScoreError(
                f"teacher {self.path!r} gave no prompt logprobs for {name} ({type(error).__name__}: {error}); is it a"
                " vLLM server?"
            ) from error
        check_finite(scores.logprobs, self.path, name)
        return scores

    def _error(self, what: str, way_out: str) -> UserError:
        return UserError(f"{self._teacher.key}.path={self._teacher.path!r}: {what}; {way_out}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def server_gates(
    subject: Subject,
    cfg: TeacherWorkerConfig,
    student: Path,
    vocab_size: int,
    max_tokens: int,
    top_k: int = PROBE_TOP,
) -> list[GateRow]:
    """What a server can be asked before a run: whether it holds the model, has room for ``max_tokens`` tokens and one
    more, cuts text as the checkpoint folder ``student``, knows its marks and its highest id, and gives ``top_k`` logprobs
    at temperature 1. One row where it does not answer.

    What no server says has rows that are not measured: its weights, its chat template and its type.
    """
    from transformers import AutoTokenizer

    teacher, unseen = subject.teacher, "a server does not tell"
    tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
    text = tokenizer.decode(list(range(0, len(tokenizer), max(1, len(tokenizer) // PROBE_TOKENS))))
    marks = sorted(tokenizer.all_special_ids)
    try:  # another machine is the other side
        scorer = ServerScorer(teacher, cfg)
        models = {str(card.get("id")): card for card in scorer.ask("/v1/models").get("data", [])}
        if teacher.model not in models:
            has = f"the server has {', '.join(models) or 'no model'}"
            setting = f"{teacher.key}.model={teacher.model!r}"
            return [subject.red("server", "no such model", has, "give one of them", setting=setting)]
        rows = [_context(subject, models[teacher.model].get("max_model_len"), max_tokens)]
        rows.append(_tokenizer(subject, scorer, "tokenizer", text, tokenizer))
        if marks:
            rows.append(_tokenizer(subject, scorer, "special_tokens", tokenizer.decode(marks), tokenizer))
    except UserError as error:
        return [subject.refused("server", "no answer", error)]
    ids = tokenizer.encode(text, add_special_tokens=False)
    try:
        rows.append(_logprobs(subject, scorer, ids, top_k))
    except UserError as error:
        return [subject.refused("server", "no logprobs", error)]
    except TeacherScoreError as error:
        return [subject.red("server", "no logprobs", str(error), "give a server of `vllm serve`")]
    try:
        scorer.score([np.asarray([ids[0], vocab_size - 1], np.int32)], 0, ["the highest id"])
        rows.append(subject.ok("vocabulary", f"takes ids below {vocab_size}"))
    except UserError as error:
        rows.append(subject.refused("vocabulary", f"refuses id {vocab_size - 1}", error))
    unmeasured = ("chat_template", "config", "self_teacher", "tensors", "weights", "foreign")
    return rows + [subject.unmeasured(gate, unseen) for gate in unmeasured]


def _context(subject: Subject, context: int | None, max_tokens: int) -> GateRow:
    if context is None:
        return subject.unmeasured("context", "the server does not tell")
    if context > max_tokens:
        return subject.ok("context", f"{context} tokens")
    return subject.red(
        "context",
        f"{context} tokens",
        f"its context is {context} and a rollout may have {max_tokens} tokens, with one more that vLLM samples",
        "start it with a larger --max-model-len or lower rollout.max_model_len",
    )


def _tokenizer(subject: Subject, scorer: ServerScorer, gate: str, text: str, tokenizer: Any) -> GateRow:
    """``text`` must become the student's ids there, and these the text again."""
    expected = tokenizer.encode(text, add_special_tokens=False)
    body = {"model": subject.teacher.model, "prompt": text, "add_special_tokens": False}
    got = scorer.ask("/tokenize", body).get("tokens")
    if got != expected:
        return subject.red(
            gate,
            "other ids",
            f"another tokenizer than the student's: {text[:30]!r}... is {str(got)[:60]}... there and"
            f" {str(expected)[:60]}... here",
            "only a teacher with the student's tokenizer can score its tokens",
        )
    back = scorer.ask("/detokenize", {"model": subject.teacher.model, "tokens": expected}).get("prompt")
    if back != tokenizer.decode(expected):
        return subject.red(
            gate,
            "other text",
            f"the ids of {text[:30]!r}... come back as {str(back)[:30]!r}...",
            "the server needs the student's tokenizer",
        )
    return subject.ok(gate, f"{len(expected)} ids there and back")


def _logprobs(subject: Subject, scorer: ServerScorer, ids: list[int], top_k: int) -> GateRow:
    score = scorer.score([np.asarray(ids, np.int32)], 0, ["the probe text"], "top_k", top_k)[0]
    assert score.topk_logprobs is not None
    mass = np.exp(score.topk_logprobs[1:].astype(np.float64)).sum(1)
    if score.logprobs.max() > 0 or mass.max() > 1.001:
        return subject.red(
            "server",
            "no logprobs",
            f"its {top_k} likeliest tokens have probability {mass.max():.3g}: these are no logprobs",
            "start the server without --logprobs-mode",
        )
    return subject.ok("server", "answers")


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    if not os.environ.get(variable):
        raise UserError(f"teacher_workers.api_key_env={variable!r}: the variable is not set; export it")
    return {"Authorization": f"Bearer {os.environ[variable]}"}


def _logprob(entry: dict[str, Any]) -> float:
    value = float(entry["logprob"])
    return value if value > LOWEST else -np.inf


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words, where there are some."""
    try:  # written by the other side
        content = json.loads(error.read(4096))
        return str(content.get("error", content).get("message", ""))[:300] or str(error.reason)
    except (ValueError, AttributeError, OSError):
        return str(error.reason)
