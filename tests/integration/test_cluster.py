"""A local Ray: on the loopback address alone, behind a token, with the driver's import path; gone when the driver is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DRIVER = """
import json, os, sys, time
import ray
from posttrain import cluster
from posttrain.config import RayConfig

cluster.start(RayConfig(object_store_gb=0.2))
cluster.start(RayConfig(object_store_gb=0.2))  # a second call changes nothing

@ray.remote
class Worker:
    def look(self):
        import only_here
        return only_here.VALUE

    def spin(self):
        while True:
            sum(range(10**6))

workers = [Worker.remote() for _ in range(2)]
values = ray.get([w.look.remote() for w in workers])
workers[0].spin.remote()
session = os.path.realpath(ray._private.worker._global_node.get_session_dir_path())
print(json.dumps({"values": values, "address": ray.get_runtime_context().gcs_address, "session": session,
                  "token": os.environ["RAY_AUTH_TOKEN"],
                  "cpus": ray.cluster_resources()["CPU"]}), flush=True)
sys.stdin.read()
cluster.stop()
time.sleep(8)  # longer than the watcher waits: it must leave the driver alone
"""


def of_session(session: str) -> list[int]:
    """Processes that have a file of this Ray session open."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:  # it may end while we look
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any(link.startswith(session + "/") for link in links):
            found.append(int(pid))
    return found


def listening(pids: list[int]) -> set[str]:
    """Hexadecimal addresses on which these processes listen, from /proc/net."""
    inodes = set()
    for pid in pids:
        try:  # it may end while we look
            for fd in os.listdir(f"/proc/{pid}/fd"):
                inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            continue
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                addresses.add(fields[1].rpartition(":")[0])
    return addresses


@pytest.fixture
def driver(tmp_path):
    (tmp_path / "only_here.py").write_text("VALUE = 7\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_ADDRESS": "127.0.0.1:1"
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.path.insert(0, '')\n" + DRIVER],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


def knock(address: str, token: str | None) -> subprocess.CompletedProcess[str]:
    """Speak to Ray's control service as another process of this machine would."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    code = f"from ray._raylet import GcsClient; GcsClient(address={address!r}).internal_kv_keys(b'x', b'y', timeout=5)"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


def wait_until_empty(session: str, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (left := of_session(session)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def test_local_ray_and_a_killed_driver(driver):
    line = driver.stdout.readline()
    assert line, "the driver died"
    info = json.loads(line)
    assert info["values"] == [7, 7], "modules of the working directory import in workers"
    assert info["cpus"] >= 16
    assert info["address"].startswith("127.0.0.1:")

    members = of_session(info["session"])
    assert len(members) >= 5
    addresses = listening([*members, driver.pid])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert addresses and addresses <= loopback

    for token, welcome in ((None, False), ("f" * 64, False), (info["token"], True)):
        answer = knock(info["address"], token)
        assert (answer.returncode == 0) is welcome, answer.stderr
        assert welcome or "InvalidAuthToken" in answer.stderr

    driver.kill()
    assert wait_until_empty(info["session"], timeout_s=20) == []


def test_stop_ends_everything(driver):
    info = json.loads(driver.stdout.readline())
    driver.stdin.close()
    assert driver.wait(timeout=60) == 0
    assert wait_until_empty(info["session"], timeout_s=20) == []
