"""Process-wide switches: no run depends on those of the program around, and none leaves its own."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

from hfbench.errors import DeviceError, HfbenchError
from hfbench.machine import connection
from hfbench.machine.allocator import keep_freed_memory, keeps_freed_memory
from hfbench.machine.settings import alone, quick_collections, restored, restored_if_idle, set_tf32
from hfbench.models.inference import predict
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import Result
from hfbench.studies.ablation.measure import ablate
from hfbench.studies.doctor.examine import examine
from hfbench.studies.tune.tuning import tune
from hfbench.studies.windows import Bench, with_arguments
from hfbench.training.run import run_recipe
from hfbench.training.trainer import build_training_arguments
from tests.builders import tiny_recipe


def switches() -> dict[str, Any]:
    """Return everything process-wide that a run could leave behind."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    places = (backends, cudnn, cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "fp32_precision": [place.fp32_precision for place in places],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "older": (cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "cudnn": (cudnn.benchmark, cudnn.deterministic, cudnn.enabled),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "threads": torch.get_num_threads(),
        "anomaly": torch.is_anomaly_enabled(),
        "offline": (constants.HF_HUB_OFFLINE, connection.switched_off()),
        "verbosity": transformers_logging.get_verbosity(),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "kept_memory": keeps_freed_memory(),
        "accelerate": [
            dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)
        ],
    }


@pytest.fixture
def untouched() -> Iterator[None]:
    """Put back what a test sets, and fail if that leaves something."""
    before = switches()
    with restored():
        yield
    assert switches() == before


# Everything that would leave something: precision, determinism, memory, level of messages.
BUSY: dict[str, Any] = {
    "bf16": True,
    "full_determinism": True,
    "log_level": "error",
    "max_steps": 2,
}


def busy_recipe(**training_args: Any) -> Recipe:
    recipe = tiny_recipe(**(BUSY | training_args))
    model = recipe.model.model_copy(update={"keep_freed_memory": True, "cudnn_benchmark": True})
    return recipe.model_copy(update={"model": model})


DOORS: dict[str, Callable[[Path], Any]] = {
    "run_recipe": lambda root: run_recipe(busy_recipe(), root),
    "ablate": lambda root: ablate(busy_recipe(), root, steps=1, rounds=2),
    "tune": lambda root: tune(busy_recipe(), root / "best.json", seconds=0.1),
    "examine": lambda root: examine(busy_recipe(), 0.1),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    "door",
    [pytest.param(n, marks=pytest.mark.slow if n in ("ablate", "tune") else ()) for n in DOORS],
)
def test_switches_are_put_back(door: str, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False
    transformers_logging.set_verbosity(45)
    before = switches()
    DOORS[door](tmp_path)
    assert switches() == before


@pytest.mark.usefixtures("untouched")
def test_switches_are_put_back_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(HfbenchError):
        run_recipe(with_arguments(busy_recipe(), optim="adamw_apex_fused"), tmp_path)


@pytest.mark.usefixtures("untouched")
def test_switches_are_put_back_after_a_window() -> None:
    bench = Bench(tiny_recipe())
    with restored():
        before = switches()
        bench.measure_window(1, 1, busy_recipe())
        bench.measure_first_loss(busy_recipe())
        assert switches() == before


def test_random_search_draws_other_values_each_time(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = [draw() for _ in range(3)]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    found = [draw()]
    for number in range(2):
        run_recipe(tiny_recipe(max_steps=1, seed=number), tmp_path)
        found.append(draw())
    assert found == expected


# What the program around has set


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _rough_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        set_tf32(None)


@contextmanager
def _all_of(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "grad disabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: _default_device("meta"),
    "deterministic": _deterministic,
    "rough products": _rough_products,
    "several": lambda: _all_of(
        torch.no_grad(), _default_dtype(torch.float64), _deterministic(), _rough_products()
    ),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


def outcome(result: Result) -> Any:
    return result.training.train_loss, result.metrics


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what runs find where nothing was set."""
    root = tmp_path_factory.mktemp("plain")
    return {
        precision: outcome(run_recipe(tiny_recipe(bf16=precision == "bf16", max_steps=4), root))
        for precision in ("fp32", "bf16")
    }


FAST = ("inference_mode", "several")


@pytest.mark.parametrize(
    "surrounding",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in SURROUNDINGS],
)
def test_surroundings_do_not_change_a_run(
    surrounding: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    with SURROUNDINGS[surrounding]():
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
        result = run_recipe(tiny_recipe(max_steps=4), tmp_path)
        after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()
    assert outcome(result) == plain["fp32"]
    assert after == before


def test_autocast_around_a_run_in_lower_precision_keeps_no_old_weights(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = run_recipe(tiny_recipe(bf16=True, max_steps=4), tmp_path)
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert outcome(result) == plain["bf16"]


def test_device_context_around_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"), pytest.raises(DeviceError, match=r"Tensors are made on meta"):
        run_recipe(tiny_recipe(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("surrounding", ["several", "autocast"])
def test_surroundings_do_not_stop_windows(surrounding: str, tmp_path: Path) -> None:
    with SURROUNDINGS[surrounding]():
        assert ablate(tiny_recipe(), tmp_path, steps=1, rounds=2).finished_rounds == 2


# Two at once


@pytest.mark.parametrize("door", DOORS)
def test_two_at_once_are_refused(door: str, tmp_path: Path) -> None:
    found: list[BaseException] = []

    def second() -> None:
        try:
            DOORS[door](tmp_path)
        except HfbenchError as error:
            found.append(error)

    with alone("the first"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        with pytest.raises(DeviceError, match="at work"):  # called by an observer, say
            DOORS[door](tmp_path)
    assert "at work in this process already" in str(found[0])
    assert list(tmp_path.iterdir()) == []


def test_run_in_a_thread_of_its_own_is_right(plain: dict[str, Any], tmp_path: Path) -> None:
    found: list[Result] = []
    recipe = tiny_recipe(max_steps=4)
    thread = threading.Thread(target=lambda: found.append(run_recipe(recipe, tmp_path)))
    with torch.no_grad():
        thread.start()
        thread.join()
    assert outcome(found[0]) == plain["fp32"]


def test_prediction_beside_a_run_leaves_its_switches() -> None:
    with alone("run_recipe"):
        torch.use_deterministic_algorithms(True)
        with restored_if_idle():
            assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("untouched")
def test_failed_prediction_leaves_nothing(tmp_path: Path) -> None:
    with torch.no_grad(), pytest.raises(HfbenchError):
        predict(str(tmp_path), [tmp_path / "none.png"])


# Single switches


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("enabled", [True, False, None])
def test_tf32_can_be_read_in_every_way(enabled: bool | None) -> None:
    # torch refuses to read the older switches where they contradict the newer ones.
    torch.backends.fp32_precision = "tf32"  # transformers' switch
    with restored():
        set_tf32(enabled)
        assert torch.backends.cuda.matmul.allow_tf32 is bool(enabled)
        assert torch.backends.cudnn.allow_tf32 is (enabled is not False)
        assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "none"
    assert torch.backends.cuda.matmul.fp32_precision == "none"


@pytest.mark.usefixtures("untouched")
def test_windows_after_tf32_are_without(tmp_path: Path) -> None:
    set_tf32(True)
    build_training_arguments(tiny_recipe(), tmp_path)
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    assert torch.get_float32_matmul_precision() == "highest"


def test_lost_connection_is_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_switched_off", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with restored():
        connection.use_cache_if_unreachable()
        assert (constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"]) == (True, "1")
        assert connection.switched_off()
    assert (constants.HF_HUB_OFFLINE, connection.switched_off()) == (False, False)
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.usefixtures("untouched")
def test_kept_memory_of_the_program_around_stays() -> None:
    keep_freed_memory(True)
    kept = keeps_freed_memory()
    with restored():
        keep_freed_memory(False)
    assert keeps_freed_memory() is kept
    keep_freed_memory(False)


def test_frozen_objects_of_the_program_around_stay_frozen() -> None:
    import gc

    gc.freeze()
    before = gc.get_freeze_count()
    with quick_collections():
        pass
    assert gc.get_freeze_count() > 0.99 * before > 0  # some are freed all the same

    with alone("b"):
        pass


def test_compile_details_of_another_recipe_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    with restored():
        build_training_arguments(with_arguments(tiny_recipe(), torch_compile=True), tmp_path)
        assert "ACCELERATE_DYNAMO_MODE" not in os.environ
    assert os.environ["ACCELERATE_DYNAMO_MODE"] == "max-autotune"
