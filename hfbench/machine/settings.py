"""Process-wide switches: set aside while hfbench measures, and put back afterwards.

torch, transformers and accelerate keep much of what decides how fast and how exactly a model is
trained in one place for the whole process. What the program around has set must not decide a
result, and what one run sets must reach neither the next one nor that program.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from hfbench.errors import DeviceError
from hfbench.machine import allocator, connection

Undo = Callable[[], None]

_at_work = threading.Lock()


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Do one thing at a time in this process, independent of its switches, and put them back.

    Args:
        what: Is done, as people say it.

    Raises:
        DeviceError: If something is at work already, in another thread or around this call, or if
            the process is in a state in which nothing can be trained.
    """
    if not _at_work.acquire(blocking=False):
        raise DeviceError(
            f"{what}: hfbench is at work in this process already, and two at once would change "
            "each other's settings and speed. Wait until the other call has returned, or start "
            "each in a process of its own, one after the other: hfbench suite does."
        )
    try:
        with restored():
            yield
    finally:
        _at_work.release()


@contextmanager
def restored_if_idle() -> Iterator[None]:
    """Do as `restored`, unless hfbench is at work: then the defaults are set, and stay.

    For what may be done beside a run, such as a prediction.
    """
    if _at_work.acquire(blocking=False):
        try:
            with restored():
                yield
        finally:
            _at_work.release()
    else:
        with torch.inference_mode(False), torch.enable_grad():
            yield


@contextmanager
def restored() -> Iterator[None]:
    """Set process-wide switches to their defaults while inside; put everything back afterwards.

    Torch's threads stay as they are: they belong to the machine, and results name them.

    Raises:
        DeviceError: If the caller's own context decides where tensors are made.
    """
    with ExitStack() as kept:
        for keep in _KEEPERS:
            kept.callback(keep())
        _check_default_device()
        with torch.inference_mode(False), torch.enable_grad():
            yield


@contextmanager
def quick_collections() -> Iterator[None]:
    """Leave what is there now out of garbage collections.

    Trainer collects in each call, twice around each window, and takes 0.4 s each to walk through
    all that was imported. A program that has frozen objects itself keeps them frozen: there is no
    way to release some of them alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def set_tf32(enabled: bool | None) -> None:
    """Switch TF32 for matrix products and convolutions alike; ``None`` sets torch's defaults.

    These are TF32 for convolutions, and none for matrix products. transformers sets one global
    switch, only once in a process, which torch 2.11 does not apply to cuDNN's convolutions. The
    older switches are set too: torch refuses to read them where they contradict the newer ones,
    and Inductor reads them.
    """
    backends: Any = torch.backends
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"
    _set_older_switches("high" if enabled else "highest", enabled is not False)
    matmul, convolution = {True: ("tf32", "tf32"), False: ("ieee", "ieee")}.get(
        enabled,  # type: ignore[arg-type]
        ("none", "tf32"),
    )
    backends.cuda.matmul.fp32_precision = matmul
    for name in ("conv", "rnn"):
        getattr(backends.cudnn, name).fp32_precision = convolution
    for name in ("matmul", "conv", "rnn"):  # of CPUs: "medium" would mean bfloat16 there
        getattr(backends.mkldnn, name).fp32_precision = "none"


def read_tf32() -> dict[str, bool]:
    """Return whether ``matmul`` and ``convolution`` compute in TF32, on a GPU that has it."""
    backends: Any = torch.backends
    places = {"matmul": backends.cuda.matmul, "convolution": backends.cudnn.conv}
    return {name: place.fp32_precision == "tf32" for name, place in places.items()}


@contextmanager
def tf32_set(enabled: bool | None) -> Iterator[None]:
    """Switch TF32 as `set_tf32` while inside."""
    put_back = _keep_tf32()
    try:
        set_tf32(enabled)
        yield
    finally:
        put_back()


def _set_older_switches(matmul: str | None, convolution: bool | None) -> None:
    with warnings.catch_warnings():  # torch 2.11 advises the newer ones
        warnings.simplefilter("ignore")
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution


def _check_default_device() -> None:
    if torch.get_default_device().type != "cpu":
        raise DeviceError(
            f"Tensors are made on {torch.get_default_device()} by default, since this call is "
            "inside `with torch.device(…)`. Call hfbench outside of it; the recipe decides where "
            "it trains."
        )


def _keep_generators() -> Undo:
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = _accelerator_module()
    suffix = "_all" if hasattr(module, "get_rng_state_all") else ""
    of_device = getattr(module, f"get_rng_state{suffix}")() if module else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if module:
            getattr(module, f"set_rng_state{suffix}")(of_device)

    return put_back


def _accelerator_module() -> Any:
    device = torch.accelerator.current_accelerator(check_available=True)
    return torch.get_device_module(device) if device else None


def _keep_environment() -> Undo:
    before = dict(os.environ)

    def put_back() -> None:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    return put_back


def _keep_tf32() -> Undo:
    backends: Any = torch.backends
    places = [backends, backends.cudnn, backends.cuda.matmul]
    places += [getattr(backends.cudnn, name) for name in ("conv", "rnn")]
    places += [getattr(backends.mkldnn, name) for name in ("matmul", "conv", "rnn")]
    before = [place.fp32_precision for place in places]
    older: list[Any] = []
    for read in (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32):
        try:
            older.append(read())
        except RuntimeError:  # the newer switches contradict it, and count
            older.append(None)
    set_tf32(None)

    def put_back() -> None:
        backends.fp32_precision = before[0]
        backends.cudnn.fp32_precision = "none"
        _set_older_switches(*older)
        for place, value in zip(places[1:], before[1:], strict=True):
            # What is read may be inherited; where that explains it, it goes on being inherited.
            # Torch itself says "tf32" for cuDNN.
            place.fp32_precision = "none"
            if place.fp32_precision != value or place in places[3:5]:
                place.fp32_precision = value

    return put_back


def _keep_torch() -> Undo:
    """Keep what torch has a function to read and one to set for."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    values: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
    ]
    switches = [
        (cudnn, "enabled", True),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", False),
        (cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
        (cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    ]
    threads = torch.get_num_threads()
    read = [get() for get, _, _ in values]
    seen = [getattr(place, name) for place, name, _ in switches]
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    anomaly, checks_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    for _, put, value in values:
        put(value)
    for place, name, value in switches:
        setattr(place, name, value)
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)

    def put_back() -> None:
        for (_, put, _), value in zip(values, read, strict=True):
            put(value)
        for (place, name, _), value in zip(switches, seen, strict=True):
            setattr(place, name, value)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)
        torch.autograd.set_detect_anomaly(anomaly, checks_nan)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    return put_back


def _keep_default_device() -> Undo:
    before = torch.get_default_device()
    if before.type == "cpu":
        return lambda: None
    torch.set_default_device(None)
    if torch.get_default_device() == before:  # a context's, not the process's
        return lambda: None
    return lambda: torch.set_default_device(before)


def _keep_autocast() -> Undo:
    """Leave the caller's autocast.

    To turn it off is not enough: copies of weights in lower precision are kept until the outermost
    context ends, and would be used for steps after they had changed.
    """
    kinds = {"cpu", *([device.type] if (device := torch.accelerator.current_accelerator()) else [])}
    enabled = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    caches = torch.is_autocast_cache_enabled()
    levels = torch.autocast_increment_nesting() - 1
    for _ in range(levels + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)

    def put_back() -> None:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(caches)
        for kind, value in enabled.items():
            torch.set_autocast_enabled(kind, value)
        for _ in range(levels):
            torch.autocast_increment_nesting()

    return put_back


def _keep_accelerate() -> Undo:
    """Keep the states that all of accelerate's objects share; Trainer makes new ones."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]

    def put_back() -> None:
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)

    return put_back


def _keep_offline() -> Undo:
    """Keep whether the Hub may be asked: one lost connection is not for ever."""
    from huggingface_hub import constants

    before, by_us = constants.HF_HUB_OFFLINE, connection.switched_off()

    def put_back() -> None:
        constants.HF_HUB_OFFLINE = before
        connection.note_switched_off(by_us)
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = before

    return put_back


def _keep_logging() -> Undo:
    """Keep what transformers says, which Trainer sets anew."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    return lambda: logging.set_verbosity(level)


def _keep_allocator() -> Undo:
    before = allocator.keeps_freed_memory()
    return lambda: allocator.keep_freed_memory(before)


_KEEPERS: tuple[Callable[[], Undo], ...] = (
    _keep_generators,
    _keep_environment,
    _keep_tf32,
    _keep_torch,
    _keep_default_device,
    _keep_autocast,
    _keep_accelerate,
    _keep_offline,
    _keep_logging,
    _keep_allocator,
)
