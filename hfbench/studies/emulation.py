"""A GPU's float16 on a CPU, for the self-test and the tests of machines that have no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from hfbench.studies import windows
from hfbench.training import run as runner

_INITIAL_SCALE = 65_536.0  # torch's


@contextmanager
def float16_on_cpu(scale: float = _INITIAL_SCALE) -> Iterator[list[torch.amp.GradScaler]]:
    """Let ``fp16`` train on a CPU as on a GPU: autocast to float16, and a real gradient scaler.

    accelerate leaves both out on a CPU, and hfbench refuses it.

    Args:
        scale: That the scaler begins with.

    Yields:
        Every scaler that is made inside.
    """
    made: list[torch.amp.GradScaler] = []
    original = Accelerator.__init__

    def build(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            made.append(self.scaler)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Accelerator, "__init__", build))
        for module in (runner, windows):
            patches.enter_context(patch.object(module, "check_machine", lambda recipe: []))
        yield made
