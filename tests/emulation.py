"""A GPU's ways on a CPU: float16 with a gradient scaler, a device that is behind, a faked CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

INITIAL_SCALE = 65_536.0  # torch's


def emulate_float16(
    monkeypatch: pytest.MonkeyPatch, scale: float = INITIAL_SCALE
) -> list[torch.amp.GradScaler]:
    """Let ``fp16`` train on a CPU as on a GPU: autocast to float16, and a real gradient scaler.

    accelerate leaves both out on a CPU, and hfbench refuses it.

    Returns:
        Every scaler that is made from now on.
    """
    made: list[torch.amp.GradScaler] = []
    original = Accelerator.__init__

    def build(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.state.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            made.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", build)
    for module in ("runner", "windows"):
        monkeypatch.setattr(f"hfbench.{module}.check_machine", lambda recipe: [])
    return made
