"""Driver's handle on all teachers: which teacher scores which domain, and where it lives.

Owns the mapping domain -> teacher -> workers. Checkpoints in Transformers share ``teacher_workers.num_workers``
workers: equal ones (by fingerprint) are held once, LoRA adapters sit on one copy of their base, and with more workers
than checkpoints the spare workers hold copies. A vLLM engine or a server has a worker of its own, which ends with it.
Passes references, never tensors. Refuses a domain without teacher. A worker that dies is started again by Ray and
loads what it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

from posttrain.config import ModelConfig, TeacherBackend, TeacherWorkerConfig, UserError
from teachers.check import key_of
from teachers.checkpoint import locate
from teachers.fingerprint import num_bytes
from teachers.teacher import Teacher
from teachers.worker import ScoringTask, TeacherWorker, base_of

if TYPE_CHECKING:
    from teachers.direct import Examination

# Of a checkpoint in vLLM that is loaded a second time, in Transformers, for the direct forward of the preflight.
MAX_DIRECT_BYTES = 8 * 2**30
MAX_RESTARTS = 3  # of one worker, and of one scoring call
RESTART_WAIT_S = 5.0  # for idle workers to say which process they are


@dataclass(kw_only=True, slots=True)
class _Worker:
    actor: Any
    process: str | None = None  # as it last said; Ray gives a worker that died another
    death: str | None = None  # in Ray's words, where there will be no other
    pending: list[ray.ObjectRef] = field(default_factory=list)  # open calls

    @property
    def num_pending(self) -> int:
        if self.pending:
            count = len(self.pending)
            _, self.pending = ray.wait(self.pending, num_returns=count, timeout=0, fetch_local=False)
        return len(self.pending)


class TeacherPool:
    """Start with `TeacherPool.start`; needs an initialised Ray."""

    def __init__(self, cfg: TeacherWorkerConfig, model: ModelConfig) -> None:
        self._cfg = cfg
        self._model = model
        self._shared: list[_Worker] = []  # Transformers
        self._own: dict[str, _Worker] = {}  # teacher key -> worker of its engine or server
        self._num_started = 0
        self._restarts: list[tuple[str, str]] = []
        self._names: dict[str, str] = {}  # domain -> teacher as the user named it
        self._keys: dict[str, str] = {}  # domain -> key: back end and fingerprint
        self._teachers: dict[str, Teacher] = {}  # key -> what is loaded
        self._places: dict[str, list[_Worker]] = {}  # key of the base -> workers that hold it
        self._signal, self._top_k = "sampled", 64
        # Hash of an LM head -> its number, for good: scores with that number outlive a swap.
        self._numbers: dict[str, int] = {}
        self._head_ids: dict[str, int] = {}  # key -> number of its LM head; signal full
        self.heads: dict[int, ray.ObjectRef] = {}  # number -> reference to the LM head [V, H]

    @classmethod
    def start(cls, cfg: TeacherWorkerConfig, model: ModelConfig) -> TeacherPool:
        """Start the shared workers; they come up in the background and hold nothing until `set_teachers`.

        Where there are GPUs and the config does not say how many teachers get, the workers start with the first
        `set_teachers` instead: what is to spare is only known once learner and rollout workers have theirs.
        """
        pool = cls(cfg, model)
        if cfg.num_gpus_per_worker is not None or ray.cluster_resources().get("GPU", 0.0) == 0:
            pool._start_shared()
        return pool

    def set_teachers(
        self, teachers: dict[str, Teacher] | dict[str, str], signal: str = "sampled", top_k: int = 64
    ) -> list[dict[str, Any]]:
        """Make ``teachers`` (domain -> teacher, or checkpoint directory) the teachers, loading new ones and freeing
        former ones. Call it between two steps: former engines end at once.

        ``signal`` and ``top_k`` (`algorithm.signal`, `algorithm.top_k`) decide what `score` gives; with ``full`` the
        LM heads are in `heads`, equal ones once. Waits until all are loaded. Returns one row per worker for the
        events of the run. Raises `UserError` for teachers that are not there or damaged, and for a signal that a
        back end cannot give; then set the former ones again before scoring.
        """
        resolved = {
            domain: Teacher(key=f"teachers.{domain}", path=teacher) if isinstance(teacher, str) else teacher
            for domain, teacher in teachers.items()
        }
        keys = {domain: key_of(teacher) for domain, teacher in resolved.items()}
        loaded: dict[str, Teacher] = {}
        for domain, teacher in resolved.items():
            loaded.setdefault(keys[domain], _located(teacher))
        shared = {key: t for key, t in loaded.items() if t.backend is TeacherBackend.transformers}
        own = {key: t for key, t in loaded.items() if key not in shared}
        for key in [key for key in self._own if key not in own]:
            ray.kill(self._own.pop(key).actor)
        if shared and not self._shared:
            self._start_shared()
        rows, places = self._load_shared(shared, signal)
        new = [key for key in own if key not in self._own]
        for key in new:
            self._own[key] = self._start_own(own[key].backend)
        try:
            rows += ray.get(
                [self._own[key].actor.set_teachers.remote({key: own[key]}, signal) for key in own]
            )
        except BaseException:
            for key in new:
                ray.kill(self._own.pop(key).actor)
            raise
        workers = [*self._shared, *(self._own[key] for key in own)]
        for i, (worker, row) in enumerate(zip(workers, rows, strict=True)):
            self._note_process(i, worker, f"{row['host']}:{row['pid']}")
        self._own = {key: self._own[key] for key in own}  # in the order of the rows
        self._places = places | {key: [self._own[key]] for key in own}
        self._names = {domain: teacher.name for domain, teacher in resolved.items()}
        self._keys, self._teachers = keys, loaded
        self._signal, self._top_k = signal, top_k
        self._number_heads([row.pop("heads", {}) for row in rows])
        return [{"worker": i, **row} for i, row in enumerate(rows)]

    def _number_heads(self, held: list[dict[str, str]]) -> None:
        """``held`` is key -> hash of the head, by worker. Fetches each new head once."""
        hashes = {key: digest for part in held for key, digest in part.items()}
        for digest in sorted(set(hashes.values())):
            self._numbers.setdefault(digest, len(self._numbers))
        self._head_ids = {key: self._numbers[digest] for key, digest in hashes.items()}
        sources = {number: key for key, number in self._head_ids.items()}
        self.heads = {
            number: self.heads[number]
            if number in self.heads
            else self._places[base_of(key)][0].actor.head.remote(key, self._teachers[key])
            for number, key in sources.items()
        }

    def pop_restarts(self) -> list[tuple[str, str]]:
        """(worker, reason) of the workers that died and that Ray started again since the last call; ``worker`` counts
        as the rows of `set_teachers` do. One that does not answer soon is asked again by the next call; of one that is
        dead for good `check_alive` speaks."""
        workers = [*self._shared, *self._own.values()]
        asked = [worker.actor.process.remote() for worker in workers]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=RESTART_WAIT_S)
        for i, (worker, ref) in enumerate(zip(workers, asked, strict=True)):
            if ref in ready:
                try:  # a worker that died
                    self._note_process(i, worker, ray.get(ref))
                except ActorUnavailableError:  # it may come again
                    continue
                except (RayActorError, OutOfMemoryError) as error:
                    worker.death = str(error).splitlines()[0]
        restarts, self._restarts = self._restarts, []
        return restarts

    def check_alive(self) -> None:
        """`UserError` where `pop_restarts` found a worker of the teachers in use that Ray no longer starts again."""
        for worker in [*self._shared, *self._own.values()]:
            if worker.death is not None:
                raise UserError(
                    f"teacher_workers.num_workers={self._cfg.num_workers}: a teacher process died, after"
                    f" {MAX_RESTARTS} restarts for good ({worker.death}); start the same command again to resume from the"
                    " last checkpoint, and if it was memory (`dmesg` names what the kernel killed) with a smaller"
                    " teacher_workers.max_tokens_per_batch"
                )

    def _note_process(self, index: int, worker: _Worker, process: str) -> None:
        if worker.process not in (None, process):
            reason = f"process {worker.process} died; {process} took its place and loads its teachers again"
            self._restarts.append((f"teachers-{index}", reason))
        worker.process = process

    @property
    def domains(self) -> list[str]:
        """Domains that have a teacher now."""
        return list(self._keys)

    def score(self, domain: str, group_refs: list[Any]) -> ray.ObjectRef:
        """Reference to ``list[TeacherScores]``: every rollout of every group of one domain, in order.

        Goes to the worker with the fewest open calls among those that hold the teacher. Getting the reference
        raises `teachers.scores.TeacherScoreError` if the teacher gave a score that is not finite.
        """
        return self.score_all({domain: group_refs})[domain]

    def score_all(self, group_refs: dict[str, list[Any]]) -> dict[str, ray.ObjectRef]:
        """As `score`, by domain; one call a worker, in which adapters of one base share their batches. An error of one
        domain is that of all domains of the call."""
        calls: dict[int, tuple[_Worker, list[str]]] = {}
        for domain in group_refs:
            if domain not in self._keys:
                raise UserError(
                    f"teachers.{domain}.path=None: domain {domain!r} has no teacher (there are"
                    f" {', '.join(self._keys)}); give teachers.{domain}.path=DIR"
                )
            worker = min(
                self._places[base_of(self._keys[domain])],
                key=lambda worker: (
                    worker.num_pending + (len(calls[id(worker)][1]) if id(worker) in calls else 0)
                ),
            )
            calls.setdefault(id(worker), (worker, []))[1].append(domain)
        return {
            domain: ref
            for worker, domains in calls.values()
            for domain, ref in zip(domains, self._call(worker, domains, group_refs), strict=True)
        }

    def _call(
        self, worker: _Worker, domains: list[str], group_refs: dict[str, list[Any]]
    ) -> list[ray.ObjectRef]:
        """One reference a domain."""
        tasks = [
            ScoringTask(
                key=self._keys[domain],
                teacher=self._teachers[self._keys[domain]],
                name=self._names[domain],
                group_refs=list(group_refs[domain]),
                head_id=self._head_ids.get(self._keys[domain]),
            )
            for domain in domains
        ]
        if len(tasks) == 1:  # of one return value Ray makes no list
            refs = [worker.actor.score.remote(tasks[0], self._signal, self._top_k)]
        else:
            call = worker.actor.score_all.options(num_returns=len(tasks))
            refs = call.remote(tasks, self._signal, self._top_k)
        worker.pending += refs
        return refs

    def examine(
        self, domain: str, token_ids: list[np.ndarray], scores: list[np.ndarray]
    ) -> Examination | None:
        """``scores`` of fixed texts by the teacher of ``domain``, against a direct forward of its checkpoint.

        A checkpoint in vLLM is loaded for this in a process of its own, which ends with the call. None where there is
        no checkpoint to load: a server's, and one in vLLM of more than `MAX_DIRECT_BYTES`.
        """
        key = self._keys[domain]
        teacher = self._teachers[key]
        if teacher.backend is TeacherBackend.transformers:
            worker = self._places[base_of(key)][0]
            return ray.get(worker.actor.examine.remote(key, teacher, token_ids, scores))
        if teacher.backend is TeacherBackend.server or num_bytes(teacher.path) > MAX_DIRECT_BYTES:
            return None
        direct = self._start(0.0)
        try:
            plain = replace(teacher, backend=TeacherBackend.transformers)
            return ray.get(direct.actor.examine.remote(key_of(plain), plain, token_ids, scores))
        finally:
            ray.kill(direct.actor)

    def shutdown(self) -> None:
        """Stop the workers; open calls are lost."""
        for worker in [*self._shared, *self._own.values()]:
            ray.kill(worker.actor)
        self._shared, self._own = [], {}

    def _load_shared(
        self, teachers: dict[str, Teacher], signal: str
    ) -> tuple[list[dict[str, Any]], dict[str, list[_Worker]]]:
        """Spread the bases over the shared workers, each adapter with its base."""
        sizes = {base_of(key): num_bytes(teacher.path) for key, teacher in teachers.items()}
        indices = place(sizes, len(self._shared))
        held = [
            {key: teacher for key, teacher in teachers.items() if i in indices[base_of(key)]}
            for i in range(len(self._shared))
        ]
        rows = ray.get(
            [w.actor.set_teachers.remote(part, signal) for w, part in zip(self._shared, held, strict=True)]
        )
        return rows, {base: [self._shared[i] for i in where] for base, where in indices.items()}

    def _start_shared(self) -> None:
        num_gpus = self._cfg.num_gpus_per_worker
        if num_gpus is None:
            spare = ray.available_resources().get("GPU", 0.0) >= self._cfg.num_workers
            num_gpus = 1.0 if spare else 0.0
        self._shared = [self._start(num_gpus) for _ in range(self._cfg.num_workers)]

    def _start_own(self, backend: TeacherBackend) -> _Worker:
        num_gpus = 0.0
        if backend is TeacherBackend.vllm and ray.cluster_resources().get("GPU", 0.0):
            given = self._cfg.num_gpus_per_worker
            num_gpus = float(self._cfg.vllm.get("tensor_parallel_size", 1)) if given is None else given
        return self._start(num_gpus, has_engine=backend is TeacherBackend.vllm)

    def _start(self, num_gpus: float, has_engine: bool = False) -> _Worker:
        actor = ray.remote(TeacherWorker).options(
            num_cpus=0, num_gpus=num_gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
        )
        index, self._num_started = self._num_started, self._num_started + 1
        return _Worker(actor=actor.remote(self._cfg, self._model, index, has_engine))


def _located(teacher: Teacher) -> Teacher:
    """With absolute folders: a worker may have another working directory."""
    if teacher.backend is TeacherBackend.server:
        return teacher
    adapter = teacher.adapter and str(Path(teacher.adapter).expanduser().resolve())
    folder = locate(teacher.path, f"{teacher.key}.path", teacher.revision)
    return replace(teacher, path=str(folder.resolve()), adapter=adapter)


def place(sizes: dict[str, int], num_workers: int) -> dict[str, list[int]]:
    """Workers of each checkpoint, given its bytes.

    Fewer checkpoints than workers: copies, evenly. Otherwise the largest first to the worker that holds least.
    """
    if not sizes:
        return {}
    order = sorted(sizes, key=lambda folder: (-sizes[folder], folder))
    if len(order) <= num_workers:
        return {folder: list(range(i, num_workers, len(order))) for i, folder in enumerate(order)}
    load = [0] * num_workers
    places: dict[str, list[int]] = {}
    for folder in order:
        index = min(range(num_workers), key=lambda i: (load[i], i))
        places[folder] = [index]
        load[index] += sizes[folder]
    return places
