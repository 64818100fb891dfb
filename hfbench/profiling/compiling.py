"""Compilations while a model is trained: how many, and how long they took.

torch.compile compiles a graph for each shape that it meets, the smaller last batch of an epoch
among them: in the midst of what would be steady state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class CompileWatch:
    """Notices compilations between `watch` and its end.

    Attributes:
        count: Of graphs, forward and backward apart.
        seconds: Of the host, for all of them.
        aside_seconds: The part of it that was spent in training steps alone.
    """

    def __init__(self, in_steps: Callable[[], bool]) -> None:
        """Begin with nothing.

        Args:
            in_steps: Tells whether training steps are made now, and not an evaluation.
        """
        self.count, self.seconds, self.aside_seconds = 0, 0.0, 0.0
        self._in_steps = in_steps
        self._began = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notice compilations while inside; dynamo tells of the outermost of nested ones."""
        from torch._dynamo.callback import callback_handler  # a second to import

        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)
        try:
            yield
        finally:
            for callbacks, ours in (
                (callback_handler.start_callbacks, self._begin),
                (callback_handler.end_callbacks, self._end),
            ):
                if ours in callbacks:  # a reset of the compiler has removed them
                    callbacks.remove(ours)

    def _begin(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        seconds = time.perf_counter() - self._began
        self.count += 1
        self.seconds += seconds
        if self._in_steps():
            self.aside_seconds += seconds


def say_compilations(count: int, seconds: float) -> str:
    """Say that a model was compiled after warm-up, and that this is not in its speed."""
    times = "once" if count == 1 else f"{count} times"
    return (
        f"The model was compiled {times} more after warm-up, {seconds:.1f} s in all, for batches "
        "of another size or in another state. That is in the execution time, but not in the "
        "steady-state speed. training_args.dataloader_drop_last=true keeps batches whole."
    )
