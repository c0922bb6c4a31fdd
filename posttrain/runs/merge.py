"""One model out of several without training: the mean of the checkpoints, or task arithmetic on a common base."""

from __future__ import annotations

from posttrain.config import MergeMethod, MergeRun
from posttrain.merge import average, task_arithmetic
from posttrain.run_folder import RunFolder


def run(cfg: MergeRun) -> str:
    """Merge, and return the folder of the model. The run folder's manifest says what it was made from."""
    folder = RunFolder.open(cfg)
    if folder.finished:
        print(f"{folder.path}: finished before; nothing to do")
        folder.close()
        return str(folder.model)
    if (
        not folder.model.exists()
    ):  # it appears whole; a process that was killed after that has nothing left to do
        if cfg.method is MergeMethod.average:
            average(cfg.models, str(folder.model))
        else:
            assert cfg.base is not None
            task_arithmetic(cfg.base, cfg.models, cfg.weights(), str(folder.model))
    folder.finish()
    print(f"{cfg.method.value} of {len(cfg.models)} models: {folder.model}")
    return str(folder.model)
