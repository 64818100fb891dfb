"""What the world does to a run: a full disk, no memory, a lost process. The one place that tells.

Libraries raise such failures under many names, some of them as plain `RuntimeError`. `explain`
finds the cause in an exception and everything that led to it; a real bug is not explained, and
keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfbench.errors import HfbenchError, first_line

_DISK_FULL = "the disk is full. Make room on it, or write elsewhere (--output-dir)"
_CAUSES = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: "your share of the disk is used up. Make room, or write elsewhere (--output-dir)",
    errno.EFBIG: "a file would become larger than the system allows (ulimit -f, file system)",
    errno.EROFS: "the file system has become read-only. Look at the disk, or write elsewhere",
    errno.EIO: "the disk, or the connection to it, fails. Look at the system's log (dmesg)",
    errno.EACCES: "it may not be written or read. Give it the rights, or write elsewhere",
    errno.EPERM: "the system does not allow it. Give it the rights, or write elsewhere",
    errno.EMFILE: "too many files are open. Allow more (ulimit -n), or use fewer loader workers",
    errno.ENFILE: "too many files are open on this machine. End what holds them",
    errno.ENOMEM: "there is no memory left. Use a smaller batch, or fewer loader workers",
    errno.ESTALE: "a network file system has lost it. Mount it again",
    errno.ENOTCONN: "a network file system has gone. Mount it again",
}
_MEMORY = (
    "there is no memory left. Make per_device_train_batch_size smaller and "
    "gradient_accumulation_steps as much larger, or use fewer loader workers"
)
# What libraries say instead of an errno, and what it stands for. torch's archive writer hides it.
_SAYINGS = (
    (r"\(os error (\d+)\)|\[Errno (\d+)\]", None),
    (r"No space left on device", _DISK_FULL),
    (r"PytorchStreamWriter failed|unexpected pos \d+ vs|inline_container", _DISK_FULL),
    (r"bad_alloc|[Cc]annot allocate memory", _MEMORY),  # not as a RuntimeError
)
# What out of memory is called on an accelerator, apart from torch's own kind of error: by the
# driver, and by libraries that allocate for themselves (CUDA, cuBLAS, cuDNN, HIP, MPS, XPU).
_OUT_OF_MEMORY = re.compile(
    r"(?:CUDA|HIP|XPU|MPS|MUSA|NPU)\b.*out of memory|"
    r"CU(?:BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED|"
    r"(?:hip|roc)blas_status_memory_error|HIPBLAS_STATUS_ALLOC_FAILED|miopenStatusAllocFailed|"
    r"UR_RESULT_ERROR_OUT_OF_(?:DEVICE|HOST|RESOURCES)|cudaErrorMemoryAllocation|"
    r"DefaultCPUAllocator: |[Cc](?:an't|annot) allocate memory|not enough memory|bad_alloc"
)
_FILES = re.compile(r"Too many open files")
_WORKER = re.compile(
    r"DataLoader worker .*(?:exited unexpectedly|killed by signal)|DataLoader timed out"
)
_SHARED_MEMORY = re.compile(
    r"shared memory(?: object|\(shm\))|unable to write to file </torch_|unable to mmap \d+ bytes|"
    r"[Bb]us error|/dev/shm"
)
_LOST = re.compile(
    r"[Cc]onnection (?:closed|reset) by peer|NCCL (?:error|communicator was aborted)|"
    r"Rank \d+ (?:exited|failed)|\[.*gloo.*\].*(?:[Tt]imed out|[Bb]roken pipe|peer)|"
    r"DistStoreError|DistNetworkError|DistBackendError"
)
_WORKER_ADVICE = (
    "Run without workers (training_args.dataloader_num_workers=0), prepare images on the device "
    "(preprocessing.location=device), or give more memory (in a container: --shm-size)"
)


class WorldError(HfbenchError):
    """Something outside of recipe and program failed: the disk, the memory, another process."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was out, of an accelerator or, where the system refuses it, of the host.

    Under whatever name: torch has a kind of its own for its own allocator alone.
    """
    return any(_lacked_memory(link) for link in _chain(error))


def say_out_of_memory(error: BaseException, device: Any, doing: str, batch_size: int) -> str:
    """Say what ran out of memory and what to do.

    Args:
        error: That `is_out_of_memory` knows.
        device: As torch prints it.
        doing: ``training`` or ``evaluating``, whose batch it was.
        batch_size: Images of it, on a device.
    """
    name, advice = {
        "evaluating": ("per_device_eval_batch_size", "Make it smaller: that changes no result."),
    }.get(
        doing,
        (
            "per_device_train_batch_size",
            "Halve it, and double gradient_accumulation_steps to keep the effective batch.",
        ),
    )
    return f"{device} ran out of memory at {name}={batch_size}: {first_line(error)} {advice}"


def _lacked_memory(error: BaseException) -> bool:
    # torch is not imported here: what only reads results does without it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    of_a_worker = _WORKER.search(text) or _SHARED_MEMORY.search(text)
    found = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)
    return bool(found and not of_a_worker)


def explain(error: BaseException, folder: Path | None = None) -> str | None:
    """Say what happened, where, and what to do.

    Args:
        error: That ended the work.
        folder: Of the run, if it was made.

    Returns:
        Sentences; ``None`` if it is a failure of the program itself.
    """
    if folder is not None and isinstance(error, OSError) and not folder.exists():
        return f"{folder} is gone: it was moved or removed while the run went on."
    for link in _chain(error):
        found = _explain_one(link)
        if found:
            return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what led to it; a bug in handling a failure is still a bug."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        implied = None if link.__suppress_context__ else link.__context__
        link = link.__cause__ or (implied if _is_torch_error(link) else None)


def _explain_one(error: BaseException) -> str | None:
    text = str(error)
    if _FILES.search(text) and isinstance(error, RuntimeError):
        return f"{_sentence(_CAUSES[errno.EMFILE])} ({first_line(error)})."
    if _WORKER.search(text) or (_is_torch_error(error) and _SHARED_MEMORY.search(text)):
        kind = "ran out of shared memory" if _SHARED_MEMORY.search(text) else "died"
        return f"A loader worker {kind}: {first_line(error)} {_WORKER_ADVICE}."
    if isinstance(error, OSError) and error.errno in _CAUSES:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{_CAUSES[error.errno]} ({os.strerror(error.errno)})."
    if _lacked_memory(error):
        return f"{_sentence(_MEMORY)} ({first_line(error)})."
    if not _is_torch_error(error):
        return None
    if type(error).__name__.startswith("Dist") or _LOST.search(text):
        return f"Another process of this run was lost: {first_line(error)} Read what it said."
    for pattern, cause in _SAYINGS:
        match = re.search(pattern, text)
        if match is None:
            continue
        number = next((int(group) for group in match.groups() if group), 0)
        said = cause or _CAUSES.get(number)
        if said:
            return f"{_sentence(said)} ({first_line(error)})."
    return None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _is_torch_error(error: BaseException) -> bool:
    """Tell whether a library raised it that has no kinds of its own for such failures."""
    return isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith(
        ("safetensors", "torch", "multiprocessing")
    )


class PatientStream:
    """Standard output or error that goes silent where nobody reads it any more, or it is full.

    A run is worth hours, a line of output nothing: a reader that went away, a log on a full disk or
    a terminal that hung up must not end it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:  # a letter that it lacks
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            self._go_silent()
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._go_silent()

    def _go_silent(self) -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(silent, self._stream.fileno())  # what is still to be flushed goes there too
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
        finally:
            os.close(silent)


def write_patiently() -> None:
    """Let no line of output end the program, whatever stands behind stdout and stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: >&-
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
        if not isinstance(stream, PatientStream):
            setattr(sys, name, PatientStream(stream))
