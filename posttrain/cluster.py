"""Starts or joins Ray for a run, and ends it.

Owns how a local Ray is set up: bound to the loopback address alone, token authentication with a token of its own,
no dashboard, no usage report, the driver's import path handed to every worker. All of it dies with the driver, even
by ``kill -9``: Ray's servers are bound to the driver process and the workers to Ray's, and a watcher ends what is
left. Refuses to fall back: an address that cannot be joined is an error, never a reason to start another Ray. Actors
of this project share cores, so a local Ray offers more logical CPUs than the machine may have.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.config import RayConfig, UserError

MIN_LOGICAL_CPUS = 16  # a small pipeline has about six actors, whatever the machine
CONNECT_TIMEOUT_S = 10
LOCAL_ENVIRONMENT = {
    # Ray's switch for clusters of one machine: every server then listens on 127.0.0.1 only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}

# Ends whatever still has a log of this Ray session open some seconds after the driver is gone: Ray's own agents would
# stay for a minute, a worker that is stuck for ever. It notices the driver's end by the end of its standard input.
WATCHER = """
import os, sys, time
session, driver = sys.argv[1] + "/", int(sys.argv[2])
sys.stdin.read()
time.sleep(5)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        files = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        if int(pid) not in (os.getpid(), driver) and any(f.startswith(session) for f in files):
            os.kill(int(pid), 9)
    except OSError:
        pass
"""

_watcher: subprocess.Popen[bytes] | None = None


def start(cfg: RayConfig) -> None:
    """Start Ray on this machine, or join ``cfg.address``. Does nothing if this process already has Ray.

    Raises:
        UserError: the address cannot be reached or refuses the token, or /dev/shm is too small for the object store.
    """
    import ray

    if ray.is_initialized():
        return
    if cfg.address is None:
        _start_local(cfg)
    else:
        _join(cfg)


def stop() -> None:
    """Leave Ray; a local one ends with all its processes."""
    global _watcher
    import ray

    ray.shutdown()
    if _watcher is not None:
        _watcher.kill()
        _watcher.wait()
        _watcher = None


def import_roots() -> list[str]:
    """Folders that a worker needs on its import path to find what the driver finds: absolute, without duplicates."""
    repository = str(Path(__file__).resolve().parent.parent)
    outside = [
        p for p in sys.path if p and not p.startswith((sys.prefix, sys.base_prefix)) and os.path.isdir(p)
    ]
    return list(dict.fromkeys([os.getcwd(), *(os.path.abspath(p) for p in outside), repository]))


def _start_local(cfg: RayConfig) -> None:
    import ray

    _check_shared_memory(cfg.object_store_gb)
    os.environ.update(LOCAL_ENVIRONMENT)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ["PYTHONPATH"] = os.pathsep.join(import_roots())
    _reread_environment()
    try:  # Ray's own processes: its errors here are plain Exceptions
        ray.init(
            address="local",  # RAY_ADDRESS must not send the run elsewhere
            include_dashboard=False,
            num_cpus=cfg.num_cpus or max(os.cpu_count() or 1, MIN_LOGICAL_CPUS),
            object_store_memory=int(cfg.object_store_gb * 2**30),
            log_to_driver=cfg.log_to_driver,
            configure_logging=False,
        )
    except Exception as error:
        if type(error) is not Exception:  # what it refuses of its arguments has a type
            raise
        ray.shutdown()
        raise UserError(
            f"ray.address=null: Ray does not start on this machine ({' '.join(str(error).split())[:300]}); where it is only"
            " busy, start the same command again; Ray's logs are in /tmp/ray/session_latest/logs"
        ) from error
    _watch(ray._private.worker._global_node.get_session_dir_path())


def _watch(session_dir: str) -> None:
    global _watcher
    _watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCHER, os.path.realpath(session_dir), str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal must not end it
    )


def _join(cfg: RayConfig) -> None:
    import ray

    _knock(str(cfg.address))
    try:  # another machine is the other side
        ray.init(
            address=cfg.address,
            log_to_driver=cfg.log_to_driver,
            configure_logging=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(import_roots())}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(str(cfg.address), error) from error


def _knock(address: str) -> None:
    """Whether anybody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" or a name that Ray resolves
    try:  # another machine is the other side
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"ray.address={address!r}: cannot be joined ({reason}); start Ray there with `ray start --head`,"
        " set RAY_AUTH_MODE and RAY_AUTH_TOKEN if it asks for a token, or leave ray.address out to use this machine"
    )


def _reread_environment() -> None:
    """Ray reads these settings when it is imported, which may have been before they were set."""
    import ray._private.ray_constants as constants
    import ray._raylet as native  # a compiled module without type information

    constants.ENABLE_RAY_CLUSTER = False
    settings: Any = native
    settings.Config.initialize("")
    settings.AuthenticationTokenLoader.instance().reset_cache()


def _check_shared_memory(object_store_gb: float) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return
    stats = os.statvfs(shm)
    free_gb = stats.f_bavail * stats.f_frsize / 2**30
    if free_gb < object_store_gb:
        raise UserError(
            f"ray.object_store_gb={object_store_gb}: /dev/shm has {free_gb:.2f} GiB free; give a smaller"
            " ray.object_store_gb or a larger /dev/shm (docker run --shm-size)"
        )
