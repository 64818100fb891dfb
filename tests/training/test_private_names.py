"""Names of the libraries that are not public and that we use: each is there, and is still called.

One that is renamed would fail in silence: an override that nobody calls, an attribute that is set
and never read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainingArguments

from hfbench.errors import Interrupted
from hfbench.training.resuming import ResumableTrainer
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer
from tests.builders import tiny_recipe, vit_config, write_model
from tests.training.test_run import interrupt_after

OVERRIDDEN = sorted(
    {
        name
        for ours in (BenchTrainer, ResumableTrainer)
        for name, value in vars(ours).items()
        if callable(value) and name != "__init__" and hasattr(Trainer, name)
    }
)


def test_what_we_override_is_what_trainer_has() -> None:
    # The methods of our own are listed, so that a renamed one of Trainer's shows up among them.
    own = sorted(
        {
            name
            for ours in (BenchTrainer, ResumableTrainer)
            for name, value in vars(ours).items()
            if callable(value) and not name.startswith("__") and not hasattr(Trainer, name)
        }
    )
    assert own == [
        "_evaluate_or_stop",
        "_halt",
        "_keeps_last",
        "_load_weights",
        "_loss_sum_of_all_sessions",
        "_make_up_for",
        "_save_clock",
        "_save_of_our_own",
        "_saves_at_once",
        "_see_dtype",
        "_share_buffers",
        "_signalled",
        "_write_checkpoint",
        "close_loaders",
        "mean_training_loss",
        "say_out_of_memory",
        "skipped_steps",
    ]


def test_every_override_is_called_in_a_run_that_stops_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: Counter[str] = Counter()
    for name in OVERRIDDEN:
        ours = BenchTrainer if name in vars(BenchTrainer) else ResumableTrainer
        method = vars(ours)[name]

        def counted(
            self: Any, *args: Any, name: str = name, method: Any = method, **kw: Any
        ) -> Any:
            called[name] += 1
            return method(self, *args, **kw)

        monkeypatch.setattr(ours, name, counted)
    recipe = tiny_recipe(
        write_model(tmp_path / "vit", vit_config()),
        pretrained=True,
        preprocessing={"location": "device"},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "runs")
    run_recipe(recipe, tmp_path / "runs", resume=True)
    assert sorted(called) == OVERRIDDEN


@pytest.mark.parametrize(
    ("holder", "names"),
    [
        (TrainingArguments(output_dir="unused", use_cpu=True), ["_n_gpu"]),
        (AcceleratorState, ["_shared_state"]),
        (GradientState, ["_set_sync_gradients"]),
        (Accelerator, ["unscale_gradients", "clip_grad_norm_", "optimizer_step_was_skipped"]),
        (torch.amp.GradScaler("cpu"), ["_per_optimizer_states", "update", "get_scale"]),
        (torch.compile(torch.nn.Identity(), backend="eager"), ["_orig_mod"]),
        (torch.nn.modules.batchnorm, ["_BatchNorm"]),
        (torch.nn.modules.dropout, ["_DropoutNd"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_private_attribute_is_there(holder: Any, names: list[str]) -> None:
    assert [name for name in names if not hasattr(holder, name)] == []
