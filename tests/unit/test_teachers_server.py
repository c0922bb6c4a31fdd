"""The server back end over real HTTP: a server that answers like `vllm serve` with the scores of a real model, and one
that fails in every way a server can."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config import Dtype, ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from teachers.check import check_teachers
from teachers.gates import Subject, Verdict
from teachers.scorer import Scorer
from teachers.scores import TeacherScoreError
from teachers.server import ServerScorer, server_gates
from teachers.teacher import Teacher
from tests.tiny_models import tiny_qwen3_moe

KEY = "secret-of-the-test"


class Server(ThreadingHTTPServer):
    """Completions, models, tokenize and detokenize of one model; ``faults`` are served first."""

    daemon_threads = False  # joined by server_close: none outlives its test module

    def __init__(self, path: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.faults: list[Any] = []
        self.key: str | None = None
        self.context: int | None = 512
        self.shift = 0  # of the ids of /tokenize
        self.scale = 1.0  # of the logprobs
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.open, self.most_open = 0, 0
        self.delay_s = 0.0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @torch.no_grad()
    def prompt_logprobs(self, ids: list[int], k: int) -> list[Any]:
        with self.lock:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        table = logits.log_softmax(-1) * self.scale
        rows: list[Any] = [None]
        for t in range(1, len(ids)):
            order = table[t - 1].argsort(descending=True).tolist()
            chosen = dict.fromkeys([ids[t], *order[:k]])
            rows.append(
                {str(i): {"logprob": table[t - 1, i].item(), "rank": order.index(i) + 1} for i in chosen}
            )
        return rows


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        server = self.server
        with server.lock:
            server.requests.append((self.path, body))
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.delay_s)
        with server.lock:
            server.open -= 1  # before the answer, which lets the client send its next request
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.send(401, {"error": {"message": "no such key"}})
        if fault == "hang up":
            return self.connection.close()
        if fault == "sleep":
            time.sleep(3.0)
        if fault == "garbage":
            return self.send(200, None, b"<html>")
        if isinstance(fault, dict):
            return self.send(200, fault)
        if fault == "redirect":
            return self.send(302, {}, location=f"{server.url}/elsewhere")
        if isinstance(fault, int):
            return self.send(fault, {"error": {"message": f"fault {fault}"}})
        self.send(*self.result(body))

    def result(self, body: Any) -> tuple[int, Any]:
        server = self.server
        if self.path == "/v1/models":
            return 200, {"data": [{"id": "teacher", "max_model_len": server.context}]}
        if self.path == "/tokenize":
            ids = server.tokenizer.encode(body["prompt"], add_special_tokens=False)
            return 200, {"tokens": [i + server.shift for i in ids]}
        if self.path == "/detokenize":
            return 200, {"prompt": server.tokenizer.decode(body["tokens"])}
        if max(body["prompt"]) >= server.model.config.vocab_size:
            return 400, {"error": {"message": "Token id is out of vocabulary"}}
        rows = server.prompt_logprobs(body["prompt"], body["prompt_logprobs"])
        return 200, {"choices": [{"text": "x", "prompt_logprobs": rows}]}

    def send(self, code: int, content: Any, raw: bytes | None = None, location: str | None = None) -> None:
        payload = raw if raw is not None else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(payload)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("served") / "model", seed=3, num_layers=2)


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Server]:
    server = Server(checkpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("teachers.server.MAX_WAIT_S", 0.01)
    running.faults, running.requests, running.key = [], [], None
    running.context, running.shift, running.scale, running.delay_s, running.most_open = 512, 0, 1.0, 0.0, 0
    return running


def settings(**changes: Any) -> TeacherWorkerConfig:
    return TeacherWorkerConfig(
        **{"server_concurrency": 3, "server_timeout_s": 20.0, "server_retries": 2, **changes}
    )


def teacher(server: Server, model: str = "teacher") -> Teacher:
    return Teacher(key="teachers.math", path=server.url, backend=TeacherBackend.server, model=model)


def texts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60, n).astype(np.int32) for n in lengths]


def test_scores_are_those_of_the_model(server: Server, checkpoint: Path) -> None:
    ids = texts(30, 1, 2, 55, 0)
    found = ServerScorer(teacher(server), settings()).score(ids, 0)
    expected = Scorer(str(checkpoint), ModelConfig(), Dtype.float32).score(ids, 512)
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs.dtype == np.float32 and one.logprobs.shape == other.logprobs.shape
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    bodies = [body for route, body in server.requests if route == "/v1/completions"]
    assert sorted(len(body["prompt"]) for body in bodies) == [2, 30, 55], (
        "nothing is asked for a single token"
    )


def test_top_k(server: Server) -> None:
    [ids] = texts(12)
    [found] = ServerScorer(teacher(server), settings()).score([ids], 0, signal="top_k", top_k=4)
    assert found.topk_ids is not None and found.topk_logprobs is not None
    with torch.no_grad():
        table = server.model(input_ids=torch.from_numpy(ids).long()[None]).logits[0].log_softmax(-1)
    values, indices = table[:-1].topk(4)
    assert found.topk_ids.dtype == np.int32 and found.topk_ids.shape == (12, 4)
    np.testing.assert_array_equal(found.topk_ids[1:], indices.numpy())
    np.testing.assert_allclose(found.topk_logprobs[1:], values.numpy(), atol=1e-5)
    mask = np.arange(12) > 7
    [part] = ServerScorer(teacher(server), settings()).score([ids], 0, None, "top_k_renorm", 4, [mask])
    assert part.topk_ids is not None and not part.topk_ids[~mask].any()
    np.testing.assert_array_equal(part.topk_ids[mask], found.topk_ids[mask])
    np.testing.assert_array_equal(part.logprobs, found.logprobs)


def test_at_most_so_many_at_once(server: Server) -> None:
    server.delay_s = 0.05
    ServerScorer(teacher(server), settings(server_concurrency=3)).score(texts(*[5] * 12), 0)
    assert server.most_open == 3


@pytest.mark.parametrize("fault", [503, 429, "hang up", "sleep", "garbage"])
def test_passing_faults_are_tried_again(server: Server, fault: Any) -> None:
    server.faults = [fault, fault]
    scores = ServerScorer(teacher(server), settings(server_timeout_s=2.0)).score(texts(9), 0)
    assert np.isfinite(scores[0].logprobs).all() and len(server.requests) == 3


def test_lasting_faults_stop_with_the_server_s_words(server: Server) -> None:
    server.faults = [500] * 3
    with pytest.raises(
        UserError, match=r"no answer to /v1/completions in 3 tries \(HTTP 500: fault 500\); start"
    ):
        ServerScorer(teacher(server), settings()).score(texts(9), 0)
    assert len(server.requests) == 3
    server.faults = [400]
    with pytest.raises(UserError, match=r"teachers\.math\.path='http.*was refused \(HTTP 400: fault 400\)"):
        ServerScorer(teacher(server), settings()).score(texts(9), 0)
    assert len(server.requests) == 4, "what was refused is not sent again"
    gone = Teacher(key="teachers.math", path="http://127.0.0.1:9", backend=TeacherBackend.server, model="m")
    with pytest.raises(UserError, match="refused"):
        ServerScorer(gone, settings(server_retries=0)).score(texts(9), 0)


def test_the_key_comes_from_the_environment_and_follows_no_redirect(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    with pytest.raises(UserError, match="HTTP 401: no such key"):
        ServerScorer(teacher(server), settings()).score(texts(5), 0)
    with pytest.raises(UserError, match=r"^teacher_workers\.api_key_env='MY_KEY': the variable is not set"):
        ServerScorer(teacher(server), settings(api_key_env="MY_KEY"))
    monkeypatch.setenv("MY_KEY", KEY)
    scorer = ServerScorer(teacher(server), settings(api_key_env="MY_KEY"))
    scorer.score(texts(5), 0)
    server.faults = ["redirect"]
    with pytest.raises(UserError, match="HTTP 302") as error:
        scorer.score(texts(5), 0)
    assert "/elsewhere" not in [route for route, _ in server.requests] and KEY not in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": [{"prompt_logprobs": None}]},
        {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -1.0}}]}]},
        {"choices": [{"prompt_logprobs": [None] + [{"999": {"logprob": -1.0}}] * 4}]},
        {"choices": [{"prompt_logprobs": [None] + [{"7": {"logprob": None}}] * 4}]},
    ],
)
def test_answers_without_scores(server: Server, answer: Any) -> None:
    server.faults = [answer]
    with pytest.raises(TeacherScoreError, match=r"gave no prompt logprobs for rollout 'a'"):
        ServerScorer(teacher(server), settings()).score([np.full(5, 7, np.int32)], 0, ["rollout 'a'"])


def test_minus_infinity_is_a_broken_score(server: Server) -> None:
    server.faults = [{"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -9999.0}}]}]}]
    with pytest.raises(TeacherScoreError, match=r"gave -inf for token 1 of rollout 'a'"):
        ServerScorer(teacher(server), settings()).score([np.full(2, 7, np.int32)], 0, ["rollout 'a'"])


def test_preflight_of_a_server(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    vocab_size = server.model.config.vocab_size
    student = ModelConfig(path=str(checkpoint))
    rows = {r.gate: r for r in check_teachers({"math": teacher(server)}, student, settings(), 500)}
    assert {row.path for row in rows.values()} == {f"{server.url}#teacher"}
    assert {gate for gate, row in rows.items() if row.verdict is Verdict.unmeasured} == {
        *("chat_template", "config", "self_teacher", "tensors", "weights", "foreign")
    }
    assert {gate for gate, row in rows.items() if row.verdict is Verdict.ok} == {
        *("server", "context", "vocabulary", "special_tokens", "tokenizer", "shared")
    }

    def refusal(gate: str, model: str = "teacher", max_tokens: int = 500, size: int = vocab_size) -> str:
        subject = Subject(domain="math", teacher=teacher(server, model))
        found = server_gates(subject, settings(), checkpoint, size, max_tokens)
        red = [row for row in found if row.verdict is Verdict.red]
        assert red[0].gate == gate
        assert red[0].line().startswith("teachers.math.") and "\n" not in red[0].line()
        return red[0].line()

    found = refusal("server", model="other")
    assert found.startswith("teachers.math.model='other': the server has teacher") and "accept" not in found
    assert "its context is 512 and a rollout may have 512 tokens" in refusal("context", max_tokens=512)
    found = refusal("vocabulary", size=vocab_size + 1)
    assert "Token id is out of vocabulary" in found and "accept=[vocabulary]" in found
    server.shift = 1
    assert "another tokenizer than the student's" in refusal("tokenizer")
    server.shift, server.scale = 0, 0.2
    assert "these are no logprobs" in refusal("server")


def test_a_server_that_is_accepted_by_name(server: Server, checkpoint: Path) -> None:
    server.shift = 1
    student, workers = ModelConfig(path=str(checkpoint)), settings()
    with pytest.raises(UserError, match=r"accept=\[(special_tokens|tokenizer)\]"):
        check_teachers({"math": teacher(server)}, student, workers, 500)
    workers.accept = ["special_tokens", "tokenizer"]
    rows = {r.gate: r.verdict for r in check_teachers({"math": teacher(server)}, student, workers, 500)}
    assert rows["tokenizer"] is rows["special_tokens"] is Verdict.accepted


def test_what_it_cannot_give(server: Server, checkpoint: Path) -> None:
    assert ServerScorer(teacher(server), settings()).head() is None
    expected = (
        r"^algorithm\.signal='full': teachers\.math\.backend=server gives sampled, top_k, top_k_renorm;"
    )
    with pytest.raises(UserError, match=expected):
        ServerScorer(teacher(server), settings()).score(texts(5), 0, signal="full")
    with pytest.raises(UserError, match=expected):
        check_teachers({"math": teacher(server)}, ModelConfig(path=str(checkpoint)), settings(), 64, "full")
    assert server.requests == []
