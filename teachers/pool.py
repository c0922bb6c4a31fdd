"""Driver's handle on all teachers: which checkpoint scores which domain, and where it lives.

Owns the mapping domain -> checkpoint -> workers. Equal checkpoints (by fingerprint) are held once; with more
workers than checkpoints the spare workers hold copies, with fewer each holds several. Passes references, never
tensors. Refuses a domain without teacher. A worker that dies is started again by Ray and loads what it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from posttrain.config import ModelConfig, TeacherWorkerConfig, UserError
from teachers.checkpoint import locate
from teachers.fingerprint import fingerprint, num_bytes
from teachers.worker import TeacherWorker

if TYPE_CHECKING:
    from teachers.direct import Examination

MAX_RESTARTS = 3  # of one worker, and of one scoring call


class TeacherPool:
    """Start with `TeacherPool.start`; needs an initialised Ray."""

    def __init__(self, cfg: TeacherWorkerConfig, model: ModelConfig) -> None:
        self._cfg = cfg
        self._model = model
        self._workers: list[Any] = []
        self._pending: list[list[ray.ObjectRef]] = []  # open calls of each worker
        self._names: dict[str, str] = {}  # domain -> path as the user gave it
        self._keys: dict[str, str] = {}  # domain -> fingerprint
        self._folders: dict[str, str] = {}  # fingerprint -> folder that is loaded
        self._places: dict[str, list[int]] = {}  # fingerprint -> workers that hold it

    @classmethod
    def start(cls, cfg: TeacherWorkerConfig, model: ModelConfig) -> TeacherPool:
        """Start the workers; they come up in the background and hold nothing until `set_teachers`.

        Where there are GPUs and the config does not say how many teachers get, the workers start with the first
        `set_teachers` instead: what is to spare is only known once learner and rollout workers have theirs.
        """
        pool = cls(cfg, model)
        if cfg.num_gpus_per_worker is not None or ray.cluster_resources().get("GPU", 0.0) == 0:
            pool._start_workers(cfg.num_gpus_per_worker or 0.0)
        return pool

    def set_teachers(self, teachers: dict[str, str]) -> list[dict[str, Any]]:
        """Make ``teachers`` (domain -> checkpoint directory) the teachers, loading new ones and freeing former ones.

        Waits until all are loaded. Returns one row per worker for the events of the run. Raises `UserError` for
        checkpoints that are not there or damaged.
        """
        if not self._workers:
            spare = ray.available_resources().get("GPU", 0.0) >= self._cfg.num_workers
            self._start_workers(1.0 if spare else 0.0)
        keys = {domain: fingerprint(path, f"teachers.{domain}.path") for domain, path in teachers.items()}
        folders: dict[str, str] = {}
        for domain, path in teachers.items():
            folders.setdefault(keys[domain], str(locate(path, f"teachers.{domain}.path").resolve()))
        places = place({key: num_bytes(folder) for key, folder in folders.items()}, len(self._workers))
        held = [
            {key: folders[key] for key, indices in places.items() if i in indices}
            for i in range(len(self._workers))
        ]
        rows = ray.get(
            [worker.set_teachers.remote(part) for worker, part in zip(self._workers, held, strict=True)]
        )
        self._names, self._keys, self._folders, self._places = dict(teachers), keys, folders, places
        return [{"worker": i, **row} for i, row in enumerate(rows)]

    @property
    def domains(self) -> list[str]:
        """Domains that have a teacher now."""
        return list(self._keys)

    def score(self, domain: str, group_refs: list[Any]) -> ray.ObjectRef:
        """Reference to ``list[TeacherScores]``: every rollout of every group of one domain, in order.

        Goes to the worker with the fewest open calls among those that hold the teacher. Getting the reference
        raises `teachers.scorer.TeacherScoreError` if the teacher gave a score that is not finite.
        """
        if domain not in self._keys:
            raise UserError(
                f"teachers.{domain}.path=None: domain {domain!r} has no teacher (there are"
                f" {', '.join(self._keys)}); give teachers.{domain}.path=DIR"
            )
        key = self._keys[domain]
        index = min(self._places[key], key=self._num_pending)
        ref = self._workers[index].score.remote(
            key, self._folders[key], self._names[domain], list(group_refs)
        )
        self._pending[index].append(ref)
        return ref

    def examine(self, domain: str, token_ids: list[np.ndarray], scores: list[np.ndarray]) -> Examination:
        """``scores`` of fixed texts by the teacher of ``domain``, against a direct forward of its checkpoint."""
        key = self._keys[domain]
        worker = self._workers[self._places[key][0]]
        return ray.get(worker.examine.remote(key, self._folders[key], token_ids, scores))

    def shutdown(self) -> None:
        """Stop the workers; open calls are lost."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers, self._pending = [], []

    def _start_workers(self, num_gpus: float) -> None:
        actor = ray.remote(TeacherWorker).options(
            num_cpus=0, num_gpus=num_gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
        )
        self._workers = [actor.remote(self._cfg, self._model) for _ in range(self._cfg.num_workers)]
        self._pending = [[] for _ in self._workers]

    def _num_pending(self, index: int) -> int:
        refs = self._pending[index]
        if refs:
            _, self._pending[index] = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return len(self._pending[index])


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
