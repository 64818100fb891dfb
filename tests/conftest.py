"""What all tests share: no network, one thread, caches of their own, and the real data."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path

import pytest

# Before any library reads them. Two processes of two threads each wait for each other on two cores.
_CACHE = tempfile.TemporaryDirectory(prefix="hfbench-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and tests send it
for _name in ("HF_TOKEN", "HF_ENDPOINT", "HF_DATASETS_CACHE", "WORLD_SIZE", "RANK"):
    os.environ.pop(_name, None)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections.

    Trainer collects in each run, and all libraries' objects take 0.4 s a time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _cpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests see the same CPU everywhere: many have no units for bfloat16."""
    monkeypatch.setattr("hfbench.machine.precision.measure_bfloat16_slowdown", lambda: 1.0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real CIFAR and a pretrained checkpoint, beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data" / "cifar10").is_dir():
        pytest.skip("needs ../shared with data/cifar10, data/cifar100 and models/mobilenetv2_100")
    return folder
