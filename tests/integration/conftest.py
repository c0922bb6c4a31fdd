"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from posttrain import cluster
from posttrain.config import RayConfig


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of the module's own, as a run starts it."""
    cluster.start(RayConfig(object_store_gb=0.3))
    yield
    cluster.stop()
