"""Held-out loss of SFT, which weights had the lowest, and when to stop.

Owns ``best/step_N`` of the run folder: models of the lowest loss so far, one for every checkpoint that is kept, because a
resumed run goes on from what its checkpoint knew. Training does not notice a validation: it draws no random number.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from posttrain.config import SFTAlgorithm, UserError
from posttrain.learner.group import LearnerGroup
from posttrain.records import SampleRef
from posttrain.run_folder import RunFolder


class Validation:
    """Measures ``samples`` (held-out conversations; empty without ``validate_every``) on the learner's weights."""

    def __init__(
        self, cfg: SFTAlgorithm, samples: list[SampleRef], learner: LearnerGroup, folder: RunFolder
    ) -> None:
        self._cfg = cfg
        self._samples = samples
        self._learner = learner
        self._folder = folder
        self._best_loss: float | None = None
        self._best_step = 0
        self._num_worse = 0  # validations since the lowest loss

    def metrics(self, step: int) -> dict[str, float]:
        """validation/loss/<domain> and /all after the update of ``step``, where it is due; else nothing. A collective of
        the learner that also saves the model if it is the best so far and weights may be gone back to."""
        every = self._cfg.validate_every
        if every == 0 or (step % every and step != self._cfg.steps):
            return {}
        losses = self._learner.validate(self._samples)
        if self._cfg.early_stop_patience is not None:
            self._compare(step, losses["all"])
        return {f"validation/loss/{domain}": loss for domain, loss in losses.items()}

    @property
    def stop(self) -> bool:
        """Whether the last `early_stop_patience` validations brought nothing."""
        patience = self._cfg.early_stop_patience
        return patience is not None and self._num_worse >= patience

    def save_model(self) -> None:
        """`model/` of the run: the best weights where the run may stop early, else those of the learner."""
        if self._cfg.early_stop_patience is None or not self._best_step:
            self._learner.save_model(self._folder.model)
            return
        print(
            f"{self._folder.model}: weights of step {self._best_step}, loss {self._best_loss:.4f}", flush=True
        )
        target = self._folder.model
        aside = target.with_name(".model.writing")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(self._best(self._best_step), aside, copy_function=_link)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"loss": self._best_loss, "step": self._best_step, "num_worse": self._num_worse}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """What the checkpoint knew. Raises `UserError` where the best model that it names is gone."""
        if state is None or self._cfg.early_stop_patience is None:
            return
        if state["step"] and not self._best(state["step"]).is_dir():
            raise UserError(
                f"algorithm.early_stop_patience={self._cfg.early_stop_patience}: {self._best(state['step'])}, the best"
                " model of this run so far, is gone; start over with fresh=true"
            )
        self._best_loss, self._best_step, self._num_worse = state["loss"], state["step"], state["num_worse"]

    def prune(self) -> None:
        """Remove the models that no checkpoint names any more; after a checkpoint was written."""
        named = {self._best_step}
        for file in self._folder.path.glob("checkpoints/step_*/state.json"):
            known = json.loads(file.read_text())["state"].get("validation")
            named.add(known["step"] if known else 0)
        for model in self._best(0).parent.glob("step_*"):
            if int(model.name.removeprefix("step_")) not in named:
                shutil.rmtree(model)

    def _compare(self, step: int, loss: float) -> None:
        if self._best_loss is None or loss < self._best_loss:
            self._best_loss, self._best_step, self._num_worse = loss, step, 0
            self._learner.save_model(self._best(step))
        else:
            self._num_worse += 1

    def _best(self, step: int) -> Path:
        return self._folder.path / "best" / f"step_{step}"


def _link(source: str, target: str) -> None:
    """One file twice without its bytes twice, where the file system can."""
    try:  # the user's disk
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
