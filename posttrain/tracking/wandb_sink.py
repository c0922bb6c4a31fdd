"""Weights & Biases: offline unless told otherwise, no account, no prompt, no network, silent.

Owns the run id, kept in ``wandb_id`` of the run folder so that a resumed run continues; all of wandb's files lie in
``wandb/`` of the run folder. The x-axis of every chart is our step: after a crash wandb may see a step twice, which
metrics.jsonl never does. Collects no machine, code or git data: start-up stays under a second or two.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from posttrain.config import TrackingConfig, UserError, WandbMode

ID_FILE = "wandb_id"
ALERT_QUIET_S = 900


def check_account(cfg: TrackingConfig) -> None:
    """Raises `UserError` for online mode without an API key. Asks no server."""
    if cfg.wandb != WandbMode.online:
        return
    import wandb

    if not wandb.api.api_key:
        raise UserError(
            "tracking.wandb='online': no API key; run `wandb login`, set WANDB_API_KEY, or use tracking.wandb=offline"
        )


class WandbSink:
    """One wandb run."""

    def __init__(self, run_dir: Path, cfg: TrackingConfig, run_name: str, config: dict[str, Any]) -> None:
        """Start or continue the run. Raises `UserError` for online mode without an API key."""
        import wandb

        check_account(cfg)
        self._run = wandb.init(
            mode=cfg.wandb.value,
            project=cfg.project,
            entity=cfg.entity,
            name=run_name,
            id=_run_id(run_dir),
            # Offline segments of one id are joined by `wandb sync`; there is no server to ask.
            resume="allow" if cfg.wandb == WandbMode.online else None,
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def alert(self, name: str, text: str) -> None:
        """A notice by mail or chat, as the account has it; one of the same ``name`` is quiet for `ALERT_QUIET_S`."""
        self._run.alert(name, text, level="WARN", wait_duration=ALERT_QUIET_S)

    def finish(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(run_dir: Path) -> str:
    file = run_dir / ID_FILE
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()
