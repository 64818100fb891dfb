"""Float16's loss scale: how many optimizer steps it cost, and whether it has settled.

Gradients that float16 cannot hold are scaled up. torch begins at 2**16; where that overflows, it
skips the optimizer's step and halves the scale (Micikevicius et al., Mixed Precision Training,
arXiv 1710.03740). A skipped step counts as a step everywhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Halvings from torch's first scale to one that scales nothing, and a few more.
SETTLING_STEPS = 20
_WORTH_SAYING = 0.01  # of all optimizer steps


class LossScale:
    """Watches a gradient scaler without waiting for the device.

    accelerate does not notice a skipped step where the optimizer is fused, so that the learning
    rate's schedule runs on; and where it notices, it says so only until the next step.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        """Begin to count.

        Args:
            scaler: accelerate's; its `update` ends each step.
        """
        self._scaler = scaler
        self._update = scaler.update
        self._overflows: Tensor | int = 0  # on the device
        scaler.update = self._count_and_update  # type: ignore[method-assign]

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped in this session; waits for the device."""
        return int(self._overflows)

    @property
    def scale(self) -> float:
        """What the next loss is multiplied by; waits for the device."""
        return float(self._scaler.get_scale())

    def start_at(self, scale: float) -> None:
        """Set the scale before the first step."""
        self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": scale})

    def _count_and_update(self, new_scale: Any = None) -> None:
        # One number per optimizer and device, above 0 if a gradient was not finite; where
        # gradients lie on several devices, one of them is enough.
        found = [
            number
            for state in self._scaler._per_optimizer_states.values()
            for number in state["found_inf_per_device"].values()
        ]
        if found:
            overflowed = sum(number.to(found[0].device) for number in found) > 0
            self._overflows = self._overflows + overflowed
        self._update(new_scale)


def say_skipped(skipped: int | None, steps: int) -> str | None:
    """Say that more than 1 % of the optimizer steps were skipped; ``None`` otherwise."""
    if not skipped or skipped <= _WORTH_SAYING * steps:
        return None
    return (
        f"{skipped} of {steps} optimizer steps ({100 * skipped / steps:.0f} %) were skipped, since "
        "gradients overflowed in float16: less was trained than the number of steps says. bf16 "
        "needs no loss scale; longer training makes the first steps matter less."
    )
