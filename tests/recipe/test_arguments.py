from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from hfbench.recipe.arguments import (
    OWNED,
    REMOVED,
    check_training_args,
    suggest,
    training_argument_fields,
)

NUMBERS = ("learning_rate", "weight_decay", "num_train_epochs", "max_grad_norm", "warmup_steps")
COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
    "seed",
)
SWITCHES = ("fp16", "bf16", "dataloader_pin_memory", "torch_compile", "use_cpu")


def only(**values: Any) -> str:
    (problem,) = check_training_args(values)
    return problem


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("learning_ratee", ["seed", "learning_rate"], "; did you mean learning_rate?"),
        ("xyz", ["seed", "learning_rate"], ""),
        ("seed", [], ""),
    ],
)
def test_suggest_names_the_nearest_or_nothing(name: str, known: list[str], said: str) -> None:
    assert suggest(name, known) == said


def test_defaults_of_the_library_pass_the_check() -> None:
    values = {
        name: field.default
        for name, field in training_argument_fields().items()
        if field.default is not dataclasses.MISSING and name not in OWNED
    }
    # hfbench pushes once, whatever the library's default.
    values["hub_strategy"] = "end"

    assert check_training_args(values) == []


def test_nothing_given_is_no_problem() -> None:
    assert check_training_args({}) == []


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [1, 2.5])
def test_number_may_be_whole_or_not(name: str, value: float) -> None:
    assert check_training_args({name: value}) == []


@pytest.mark.parametrize("name", NUMBERS)
def test_number_in_quotes_says_to_leave_them_out(name: str) -> None:
    problem = only(**{name: "1e-4"})

    assert problem == (
        f'training_args.{name}: found "1e-4", expected a number; write 1e-4 without quotes.'
    )


@pytest.mark.parametrize("text", ["NaN", "inf", "1_000", ".5", "fast"])
def test_text_that_json_has_no_number_for_gets_no_advice_that_would_fail(text: str) -> None:
    assert "without quotes" not in only(learning_rate=text)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}])
def test_number_is_nothing_else(name: str, value: Any) -> None:
    assert f"training_args.{name}: " in only(**{name: value})
    assert "expected a number" in only(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_number_has_to_be_finite(name: str, value: float) -> None:
    assert only(**{name: value}) == f"training_args.{name}: {value} is not a finite number."


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1.5, "found 1.5"),
        (2.0, "found 2.0"),
        (True, "found true"),
        ("4", 'found "4"'),
        (None, "found null"),
    ],
)
def test_count_is_a_whole_number(name: str, value: Any, found: str) -> None:
    problem = only(**{name: value})

    assert problem.startswith(f"training_args.{name}: {found}, expected a whole number")


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "true", "yes", 1.0])
def test_switch_is_true_or_false(name: str, value: Any) -> None:
    assert "expected true or false" in only(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", -1, "it must be at least 0"),
        ("weight_decay", -0.1, "it must be at least 0"),
        ("gradient_accumulation_steps", 0, "it must be at least 1"),
        ("per_device_train_batch_size", 0, "it must be at least 1"),
        ("per_device_eval_batch_size", -3, "it must be at least 1"),
        ("dataloader_num_workers", -1, "it must be at least 0"),
        ("save_total_limit", 0, "it must be at least 1"),
        ("num_train_epochs", 0, "it must be above 0"),
        ("logging_steps", 0, "it must be above 0"),
        ("max_steps", 0, "write -1 to train for num_train_epochs"),
        ("max_steps", -2, "write -1 to train for num_train_epochs"),
        ("label_smoothing_factor", 1, "it must be at least 0 and below 1"),
        ("label_smoothing_factor", -0.1, "it must be at least 0 and below 1"),
        ("adam_beta1", 1.0, "it must be at least 0 and below 1"),
        ("adam_beta2", 1.5, "it must be at least 0 and below 1"),
        ("seed", -1, "it must be at least 0"),
        ("seed", 2**32, "a seed is between 0 and 4294967295"),
        ("data_seed", -1, "a seed is between 0 and 4294967295"),
    ],
)
def test_value_out_of_range_names_the_range(name: str, value: float, said: str) -> None:
    problem = only(**{name: value})

    assert problem.startswith(f"training_args.{name}: {value} is ")
    assert problem.endswith(f"{said}.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("max_steps", -1),
        ("max_steps", 1),
        ("label_smoothing_factor", 0.999),
        ("seed", 2**32 - 1),
        ("warmup_steps", 0.1),
        ("dataloader_num_workers", 0),
        ("save_total_limit", None),
        ("tf32", None),
        ("report_to", "none"),
        ("report_to", ["tensorboard", "trackio"]),
        ("eval_strategy", "epoch"),
    ],
)
def test_value_at_the_edge_of_what_is_allowed_passes(name: str, value: Any) -> None:
    assert check_training_args({name: value}) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("eval_strategy", "epok", '"epok" is no choice; did you mean epoch?'),
        ("lr_scheduler_type", "cosin", '"cosin" is no choice; did you mean cosine?'),
        ("optim", "adamw_torc", '"adamw_torc" is no choice; did you mean adamw_torch?'),
        ("save_strategy", "9", '"9" is no choice; it may be no, steps, epoch, best.'),
    ],
)
def test_value_outside_the_choices_names_the_nearest_or_all(
    name: str, value: str, said: str
) -> None:
    assert only(**{name: value}).startswith(f"training_args.{name}: {said}")


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_removed_name_says_what_to_write_instead(name: str) -> None:
    if name in training_argument_fields():
        pytest.skip("the installed transformers still has it")

    assert only(**{name: True}) == (
        f"training_args.{name}: removed in transformers 5; {REMOVED[name]}."
    )


@pytest.mark.parametrize("name", sorted(OWNED))
def test_argument_that_a_run_decides_itself_is_refused_with_the_reason(name: str) -> None:
    said = only(**{name: None})

    assert said.startswith(f"training_args.{name}: hfbench ")
    assert said.endswith(f"{OWNED[name]}.")


def test_token_is_never_taken_as_an_argument() -> None:
    problem = only(hub_token="hf_secret")

    assert "hf auth login" in problem
    assert "hf_secret" not in problem


def test_advice_for_removed_and_owned_names_leads_to_names_that_exist() -> None:
    fields = training_argument_fields()

    for advice in REMOVED.values():
        if advice.startswith("write "):
            name = advice.split()[1].split("=")[0].rstrip(";")
            assert name in fields, advice
            assert name not in OWNED, advice


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"fp16": True, "bf16": True}, "fp16 and bf16 exclude each other"),
        ({"fp16": True, "use_cpu": True}, "fp16 needs a GPU and use_cpu forbids it"),
        ({"dataloader_prefetch_factor": 2}, "set dataloader_num_workers to 1 or more"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 0},
            "set dataloader_num_workers to 1 or more",
        ),
        ({"load_best_model_at_end": True}, 'eval_strategy="no" and save_strategy="steps"'),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
            'set both to "epoch"',
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, 'set eval_strategy to "epoch"'),
        ({"hub_strategy": "every_save"}, "hfbench pushes once, at the end"),
        (
            {"accelerator_config": {"nonblocking": True}},
            "accelerator_config.nonblocking: unknown; did you mean non_blocking?",
        ),
        (
            {"accelerator_config": {"non_blocking": 1}},
            "accelerator_config.non_blocking: 1 is not true or false.",
        ),
        ({"accelerator_config": {"even_batches": False}}, "leave it out"),
    ],
)
def test_contradiction_says_how_to_resolve_it(values: dict[str, Any], said: str) -> None:
    assert said in only(**values)
    assert only(**values).startswith("training_args")


@pytest.mark.parametrize(
    "values",
    [
        {"fp16": True, "bf16": False},
        {"fp16": False, "use_cpu": True},
        {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"accelerator_config": {"non_blocking": True}},
        {"accelerator_config": None},
    ],
)
def test_settings_that_go_together_pass(values: dict[str, Any]) -> None:
    assert check_training_args(values) == []


def test_all_problems_are_found_at_once() -> None:
    problems = check_training_args(
        {"learning_ratee": 1, "seed": 1.5, "warmup_ratio": 0.1, "output_dir": "x", "optim": "zzz"}
        | {"fp16": True, "bf16": True, "accelerator_config": {"x": 1, "y": 2}}
    )

    assert len(problems) == 8
    assert all(problem.endswith((".", "?")) for problem in problems)


def test_every_problem_ends_as_a_sentence() -> None:
    assert only(accelerator_config={"zzz": 1}).endswith((".", "?"))


accepted = st.fixed_dictionaries(
    {"use_cpu": st.just(True)},
    optional={
        "learning_rate": st.floats(0, 10),
        "weight_decay": st.floats(0, 1),
        "num_train_epochs": st.floats(0.01, 9) | st.integers(1, 9),
        "max_steps": st.just(-1) | st.integers(1, 99),
        "gradient_accumulation_steps": st.integers(-1, 9),
        "per_device_train_batch_size": st.integers(0, 9),
        "dataloader_num_workers": st.integers(0, 2),
        "dataloader_prefetch_factor": st.none() | st.integers(1, 3),
        "fp16": st.booleans(),
        "bf16": st.booleans(),
        "eval_strategy": st.sampled_from(["no", "steps", "epoch", "epok"]),
        "save_strategy": st.sampled_from(["no", "steps", "epoch", "best"]),
        "load_best_model_at_end": st.booleans(),
        "logging_steps": st.sampled_from([1, 10, 0.1, 0]),
        "lr_scheduler_type": st.sampled_from(["linear", "cosine", "reduce_lr_on_plateau"]),
        "warmup_steps": st.sampled_from([0, 0.1, 10, -1]),
        "accelerator_config": st.sampled_from([None, {"non_blocking": True}, {"x": 1}]),
        "optim": st.sampled_from(["adamw_torch", "sgd", "zzz"]),
    },
)


@given(values=accepted)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_what_passes_the_check_is_accepted_by_the_library(values: dict[str, Any]) -> None:
    if not check_training_args(values):
        TrainingArguments(output_dir=str(Path("unused")), **values)


@pytest.mark.parametrize("name", ["logging_steps", "eval_steps", "save_steps"])
def test_steps_above_one_have_to_be_whole(name: str) -> None:
    strategy = {name.replace("steps", "strategy"): "steps"}

    with pytest.raises(ValueError, match="must be an integer if bigger than 1"):
        TrainingArguments(output_dir="unused", use_cpu=True, **strategy, **{name: 1.5})
    assert check_training_args({**strategy, name: 1.5})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"split_batches": True}, "would change the batch size"),
        ({"gradient_accumulation_kwargs": {"num_steps": 4}}, "gradient_accumulation_steps"),
        ("accelerate.json", "write the object itself"),
    ],
)
def test_accelerator_config_must_not_change_the_batch(config: Any, said: str) -> None:
    assert said in only(accelerator_config=config)
