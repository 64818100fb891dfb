"""Tuning takes what is faster beyond noise, records the rest, and keeps within its time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfbench.errors import DeviceError, Interrupted, ResultError
from hfbench.machine.failures import is_out_of_memory
from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.recipe.techniques import change
from hfbench.results.windows import Window
from hfbench.studies.tune.decision import decide, ratio_of
from hfbench.studies.tune.evaluation import explore_evaluation, measure_evaluation
from hfbench.studies.tune.memory import MemoryForecast, available_mib, resident_mib
from hfbench.studies.tune.offers import (
    LARGER_BATCH,
    MICRO_BATCH,
    Subject,
    describe_subject,
    list_techniques,
    micro_batch_of,
    say_inapplicable,
    setting_of,
)
from hfbench.studies.tune.outcome import describe_search
from hfbench.studies.tune.schema import Measured, Trial, Tuning, check_output, measurements_file
from hfbench.studies.tune.search import Observer, Search
from hfbench.studies.tune.tuning import tune
from hfbench.studies.tune.windows import Budget
from hfbench.studies.windows import Bench, with_arguments
from tests.builders import make_recipe, make_result, tiny_recipe, vit_config, write_model

CPU = Subject("cpu", 2, images=1000, convolutional=True, batch_norm=False, attention=None)
BF16 = {"training_args.bf16": True}
Factors = dict[tuple[str, Any], float]


def make_window(speed: float, steps: int = 2, batch: int = 8, mib: float = 500.0) -> Window:
    """Return a window of a number of images per second."""
    return Window(
        steps=steps,
        warmup_steps=1,
        samples=steps * batch,
        seconds=steps * batch / speed,
        data_wait_seconds=0.0,
        phase_seconds={},
        first_loss=1.0,
        peak_process_memory_mib=mib,
        peak_device_memory_mib=None,
        switches={},
    )


class FakeBench:
    """A machine on which every setting multiplies the speed, with a clock of its own.

    Attributes:
        now: Its clock, in seconds.
        recipes: That were measured, in order.
    """

    def __init__(self, factors: Factors, noise: float = 0.0, speed: float = 100.0) -> None:
        self.factors, self.noise, self.speed = factors, noise, speed
        self.now = 0.0
        self.random = random.Random(0)
        self.recipes: list[Recipe] = []
        self.fails: Callable[[Recipe], Exception | None] = lambda recipe: None
        self.mib_per_image = 10.0
        self.diverges: Callable[[Recipe], bool] = lambda recipe: False

    def measure(self, steps: int, warmup_steps: int, recipe: Recipe) -> Window:
        """Do what `Bench.measure_window` does; `noise` is the standard deviation of logarithms."""
        self.recipes.append(recipe)
        failure = self.fails(recipe)
        if failure is not None:
            raise failure
        speed = self.speed
        for (name, value), factor in self.factors.items():
            speed *= factor if setting_of(recipe, name) == value else 1.0
        speed *= math.exp(self.random.gauss(0.0, self.noise))
        batch = micro_batch_of(recipe)
        images = batch * int(recipe.argument("gradient_accumulation_steps"))
        self.now += 0.1 + (steps + warmup_steps) * images / speed
        window = make_window(speed, steps, images, 500.0 + self.mib_per_image * batch)
        loss = None if self.diverges(recipe) else 1.0
        return window.model_copy(update={"warmup_steps": warmup_steps, "first_loss": loss})


def make_search(
    bench: FakeBench,
    recipe: Recipe | None = None,
    *,
    subject: Subject = CPU,
    seconds: float = 1000.0,
    larger_batch: bool = False,
    limit_mib: float | None = 1e6,
    observer: Observer | None = None,
) -> Search:
    """Return a search on a made-up machine."""
    budget = Budget(seconds, larger_batch, clock=lambda: bench.now)
    memory = MemoryForecast(0.0, limit_mib, on_accelerator=False)
    return Search(recipe or tiny_recipe(), subject, bench.measure, budget, memory, observer)


def run(search: Search) -> dict[str, Trial]:
    """Run a search to its end, and return its trials by technique and detail."""
    search.prepare()
    search.explore()
    search.confirm()
    return {f"{trial.technique}: {trial.detail}": trial for trial in search.trials}


def pairs(*speeds: tuple[float, float]) -> list[Measured]:
    """Return windows A B, A B, … of these speeds."""
    found = []
    for best, candidate in speeds:
        found.append(Measured(candidate=False, window=make_window(best)))
        found.append(Measured(candidate=True, window=make_window(candidate)))
    return found


def make_trial(**changes: Any) -> Trial:
    """Return a trial that was not measured yet."""
    values: dict[str, Any] = {
        "technique": "precision",
        "detail": "bf16",
        "settings": BF16,
        "effect": "",
        "outcome": "not measured",
    }
    return Trial(**(values | changes))


def test_candidate_is_taken_only_if_the_whole_interval_is_above_one() -> None:
    # Logarithms of the ratios 1.2 and 1.25: mean 0.20274, half the difference 0.02041, which is
    # also the standard error of two; Student's t with one degree of freedom is 12.706.
    clear = decide(make_trial(), pairs((100, 120), (100, 125)))
    assert clear.ratio is not None
    assert clear.ratio.value == pytest.approx(1.5**0.5)
    assert (clear.ratio.low, clear.outcome) == (pytest.approx(0.9449, abs=1e-4), "no gain shown")
    clear = decide(make_trial(), pairs((100, 120), (100, 121)))
    assert clear.ratio is not None
    assert clear.ratio.low == pytest.approx(1.1431, abs=1e-4)
    assert clear.outcome == "taken"
    assert clear.samples_per_second == pytest.approx((120 * 121) ** 0.5)
    assert decide(make_trial(), pairs((100, 80), (100, 81))).outcome == "slower"
    assert decide(make_trial(), pairs((100, 102), (100, 97))).outcome == "no gain shown"


def test_one_pair_never_takes_a_candidate() -> None:
    assert decide(make_trial(), pairs((100, 900))).outcome == "no gain shown"
    assert decide(make_trial(), pairs((100, 70))).outcome == "slower"


def test_a_b_b_a_pairs_the_first_two_windows_and_the_last_two() -> None:
    order = ((False, 100), (True, 110), (True, 132), (False, 120))
    windows = [Measured(candidate=c, window=make_window(speed)) for c, speed in order]
    found = ratio_of(windows)
    assert found is not None
    assert (found.value, found.rounds) == (pytest.approx(1.1), 2)
    assert ratio_of(windows[:1]) is None


def test_techniques_are_tried_in_order_each_on_top_of_the_best_so_far() -> None:
    gains = {
        ("preprocessing.location", "device"): 1.5,
        ("training_args.bf16", True): 2.0,
        ("model.memory_format", "channels_last"): 0.9,
        ("model.keep_freed_memory", True): 1.2,
        ("training_args.optim", "adamw_torch_fused"): 1.1,
    }
    bench = FakeBench(gains)
    search = make_search(bench)
    trials = run(search)
    assert [trial.technique for trial in search.trials] == [
        "preprocessing",
        "precision",
        "memory format",
        "kept memory",
        "optimizer",
        "NaN filter",
        MICRO_BATCH,
    ]  # no loader workers: they have nothing to do once the device prepares the images
    taken = [trial.technique for trial in search.trials if trial.outcome == "taken"]
    assert taken == ["preprocessing", "precision", "kept memory", "optimizer"]
    assert trials["memory format: channels_last"].outcome == "slower"
    assert trials["NaN filter: off"].outcome == "no gain shown"
    assert search.best.preprocessing.location == "device"
    assert search.best.model.memory_format == "contiguous"
    assert search.best.model.keep_freed_memory is True
    assert search.speedup is not None
    assert search.speedup.value == pytest.approx(1.5 * 2.0 * 1.2 * 1.1)
    ratio = trials["precision: bf16"].ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)


def test_noise_is_not_taken() -> None:
    # Nothing gains anything. After two, four and six pairs one candidate in forty each may look
    # faster, and only if it does in the end too it stays.
    bench = FakeBench({}, noise=0.05)
    outcomes: list[str] = []
    for _ in range(50):
        search = make_search(bench, seconds=1e6)
        outcomes += [trial.outcome for trial in run(search).values()]
    assert len(outcomes) > 300
    assert outcomes.count("taken") / len(outcomes) < 0.05


def test_candidate_far_behind_is_measured_once() -> None:
    bench = FakeBench({("training_args.bf16", True): 0.5})
    (trial,) = [t for t in run(make_search(bench)).values() if t.technique == "precision"]
    assert (trial.outcome, len(trial.windows)) == ("slower", 2)


def test_what_a_recipe_has_is_turned_off_where_that_is_faster() -> None:
    recipe = make_recipe(
        model={"memory_format": "channels_last"},
        training_args={"bf16": True, "dataloader_num_workers": 2, "optim": "adamw_torch_fused"},
    )
    gains: Factors = {
        ("training_args.bf16", False): 1.3,
        ("model.memory_format", "contiguous"): 1.3,
        ("training_args.optim", "adamw_torch"): 1.3,
        ("training_args.dataloader_num_workers", 1): 1.3,
        ("training_args.dataloader_num_workers", 0): 1.6,
    }
    search = make_search(FakeBench(gains), recipe)
    run(search)
    best = search.best
    assert [best.argument(name) for name in ("bf16", "dataloader_num_workers", "optim")] == [
        False,
        0,
        "adamw_torch",
    ]
    assert best.argument("dataloader_persistent_workers") is False
    assert best.model.memory_format == "contiguous"


def test_workers_are_doubled_while_that_helps_up_to_the_cores() -> None:
    counts = {1: 1.2, 2: 1.5, 4: 1.8, 8: 3.0}
    gains: Factors = {("training_args.dataloader_num_workers", n): f for n, f in counts.items()}
    subject = Subject("cpu", 4, 1000, convolutional=False, batch_norm=False, attention=None)
    search = make_search(FakeBench(gains), subject=subject)
    trials = run(search)
    assert [t.detail for t in trials.values() if t.technique == "loader workers"] == [
        "1 process",
        "2 processes",
        "4 processes",
    ]
    assert search.best.argument("dataloader_num_workers") == 4


@pytest.mark.parametrize(
    ("device", "order"), [("cpu", ["4 images", "16 images"]), ("cuda", ["16 images", "4 images"])]
)
def test_micro_batches_keep_the_effective_batch(device: str, order: list[str]) -> None:
    recipe = tiny_recipe(gradient_accumulation_steps=4)
    subject = Subject(device, 2, 1000, convolutional=False, batch_norm=False, attention=None)
    offers = list(list_techniques(False)[MICRO_BATCH](recipe, subject))
    assert [offer.detail.partition(",")[0] for offer in offers] == order
    for offer in offers:
        applied = offer.apply(recipe)
        assert micro_batch_of(applied) * applied.argument("gradient_accumulation_steps") == 32


def test_micro_batch_grows_as_long_as_it_is_faster() -> None:
    sizes = {16: 1.2, 32: 1.5}
    name = "training_args.per_device_train_batch_size"
    bench = FakeBench({(name, size): factor for size, factor in sizes.items()})
    search = make_search(bench, tiny_recipe(gradient_accumulation_steps=4))
    trials = [t for t in run(search).values() if t.technique == MICRO_BATCH]
    assert [t.settings[name] for t in trials] == [4, 16, 32]
    assert micro_batch_of(search.best) == 32
    assert search.best.argument("gradient_accumulation_steps") == 1
    effective = {
        micro_batch_of(r) * r.argument("gradient_accumulation_steps") for r in bench.recipes[2:]
    }
    assert effective == {32}


def test_micro_batches_that_leave_one_image_to_batch_norm_are_not_offered() -> None:
    subject = Subject("cpu", 2, images=49, convolutional=True, batch_norm=True, attention=None)
    recipe = tiny_recipe(per_device_train_batch_size=6, gradient_accumulation_steps=2)
    offers = list_techniques(False)[MICRO_BATCH]
    assert [o.settings for o in offers(recipe, subject)] == []  # 3 and 12 both leave one over
    dropped = with_arguments(recipe, dataloader_drop_last=True)
    assert len(list(offers(dropped, subject))) == 2


def test_effective_batch_grows_only_if_that_is_asked_for() -> None:
    name = "training_args.per_device_train_batch_size"
    gains: Factors = {(name, 16): 1.3, (name, 32): 1.6, (name, 64): 1.6}
    assert LARGER_BATCH not in {t.technique for t in run(make_search(FakeBench(gains))).values()}
    search = make_search(FakeBench(gains), larger_batch=True)
    trials = [t for t in run(search).values() if t.technique == LARGER_BATCH]
    assert [t.detail for t in trials] == [
        "16 images a step instead of 8",
        "32 images a step instead of 16",
        "64 images a step instead of 32",
    ]
    assert [t.outcome for t in trials] == ["taken", "taken", "no gain shown"]
    best = search.best
    assert best.argument("learning_rate") == search.start.argument("learning_rate")
    notes = _describe(search).notes
    assert any("learning_rate was left alone" in note for note in notes)
    subject = Subject("cpu", 2, images=15, convolutional=True, batch_norm=False, attention=None)
    assert list(list_techniques(True)[LARGER_BATCH](tiny_recipe(), subject)) == []


def _describe(search: Search, *, stopped: bool = False) -> Tuning:
    return describe_search(
        search,
        search.start,
        make_result().environment,
        budget_seconds=90.0,
        seconds=80.0,
        not_applicable={},
        stopped=stopped,
    )


def test_out_of_memory_is_recorded_and_the_search_goes_on() -> None:
    bench = FakeBench({("training_args.optim", "adamw_torch_fused"): 1.5})
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def fail(recipe: Recipe) -> Exception | None:
        if recipe.preprocessing.location == "device":
            return RuntimeError("no kernel image\nfor this device")
        if recipe.argument("bf16"):
            return DeviceError.from_problems("tiny", ["bf16: not here."])
        return error if recipe.model.memory_format == "channels_last" else None

    bench.fails = fail
    search = make_search(bench)
    trials = run(search)
    found = trials["memory format: channels_last"]
    assert (found.outcome, found.ratio) == ("out of memory", None)
    assert found.reason == "CUDA out of memory. Tried to allocate 2.00 GiB."
    found = trials["preprocessing: on the device"]
    assert (found.outcome, found.reason) == ("failed", "no kernel image")
    assert trials["precision: bf16"].reason == "tiny has 1 problem: bf16: not here."
    assert trials["optimizer: adamw_torch_fused"].outcome == "taken"


def test_fast_candidate_without_a_finite_loss_is_not_taken() -> None:
    bench = FakeBench({("training_args.bf16", True): 3.0})
    bench.diverges = lambda recipe: bool(recipe.argument("bf16"))
    search = make_search(bench)
    found = run(search)["precision: bf16"]
    assert (found.outcome, found.reason) == ("failed", "its first loss is not finite")
    assert search.best == search.start


def test_start_that_does_not_fit_is_split_into_smaller_micro_batches() -> None:
    bench = FakeBench({})
    bench.fails = lambda recipe: (
        torch.OutOfMemoryError("no") if micro_batch_of(recipe) > 4 else None
    )
    recipe = tiny_recipe(per_device_train_batch_size=16)
    search = make_search(bench, recipe)
    run(search)
    first = [trial.detail for trial in search.trials if trial.outcome == "out of memory"][:2]
    assert first == [
        "16 images, 1 of them a step, as in the recipe",
        "8 images, 2 of them a step, as in the recipe",
    ]
    assert micro_batch_of(search.start) == 4
    assert search.start.argument("gradient_accumulation_steps") == 4
    bench.fails = lambda recipe: torch.OutOfMemoryError("no room at all")
    with pytest.raises(DeviceError, match=r"batch_size=2: no room at all"):
        make_search(bench, recipe).prepare()


def test_larger_micro_batch_that_would_not_fit_is_not_started() -> None:
    # 500 MiB and 10 an image: 4 take 540 and 8 take 580, so that 500 is the part that stays. For 16
    # the growth of 80 MiB is taken 1.2 times: 580 + 1.2 x 10 x 8 = 676.
    bench = FakeBench({})
    search = make_search(bench, tiny_recipe(gradient_accumulation_steps=4), limit_mib=670)
    found = run(search)[f"{MICRO_BATCH}: 16 images, 2 of them a step"]
    assert found.outcome == "would not fit"
    assert found.reason == "needs about 676 MiB, 670 MiB are available"
    assert 16 not in {micro_batch_of(recipe) for recipe in bench.recipes}
    search = make_search(bench, tiny_recipe(gradient_accumulation_steps=4), limit_mib=680)
    assert run(search)[f"{MICRO_BATCH}: 16 images, 2 of them a step"].outcome == "no gain shown"


def test_memory_that_is_free_is_the_limit_on_a_cpu_and_torch_says_it_on_an_accelerator() -> None:
    room = MemoryForecast(0.0, None, on_accelerator=False).room()
    assert room is not None
    assert room > 100
    assert MemoryForecast(0.0, None, on_accelerator=True).room() is None
    assert MemoryForecast(0.0, 123.0, on_accelerator=True).room() == 123


def test_container_limits_what_is_free(tmp_path: Path) -> None:
    whole = available_mib(tmp_path / "none")
    (tmp_path / "memory.max").write_text(f"{1000 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{900 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {100 * 2**20}\nfile 2\n")
    assert whole > 200
    assert available_mib(tmp_path) == 200
    (tmp_path / "memory.max").write_text("max\n")
    assert available_mib(tmp_path) > 200


def test_memory_that_the_system_refuses_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("seconds", [10.0, 40.0, 120.0])
def test_time_is_kept_and_what_does_not_fit_is_recorded(seconds: float) -> None:
    bench = FakeBench({("training_args.bf16", True): 1.2}, speed=200.0)
    search = make_search(bench, tiny_recipe(gradient_accumulation_steps=2), seconds=seconds)
    trials = run(search)
    assert bench.now <= seconds
    left = [trial for trial in trials.values() if trial.outcome == "not measured"]
    assert all(trial.reason.startswith("no time left") for trial in left)
    assert bool(left) == (seconds < 40)
    measured = sum(len(trial.windows) for trial in trials.values()) + len(search.final)
    assert len(bench.recipes) == measured + 3  # 4 and 8 images, and the start
    if search.best != search.start:
        assert len(search.final) >= 8


def test_slow_machine_is_measured_in_smaller_batches() -> None:
    # 1 % of 100 s is 1 s for a step: at 1 image/s a batch of 2, the smallest, instead of 32.
    bench = FakeBench({("training_args.bf16", True): 2.0}, speed=1.0)
    recipe = tiny_recipe(per_device_train_batch_size=32, gradient_accumulation_steps=2)
    search = make_search(bench, recipe, seconds=100.0)
    trials = run(search)
    assert search.windows.measured_batch == 2
    assert {micro_batch_of(r) for r in bench.recipes} == {4, 2}
    assert micro_batch_of(search.best) == 32
    assert trials["precision: bf16"].outcome == "taken"
    assert (
        "time for batches of 2 only" in trials[f"{MICRO_BATCH}: 16 images, 4 of them a step"].reason
    )
    assert any("Measured on batches of 2" in note for note in _describe(search).notes)


class FakeEvaluation:
    """Evaluations whose speed depends on the batch."""

    def __init__(self, speeds: dict[int, float], mib_per_image: float = 1.0) -> None:
        self.speeds, self.mib_per_image = speeds, mib_per_image
        self.batches: list[int] = []

    def __call__(self, images: int, recipe: Recipe) -> Window:
        """Do what `measure_evaluation` does."""
        batch = int(recipe.argument("per_device_eval_batch_size"))
        self.batches.append(batch)
        if batch not in self.speeds:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return make_window(self.speeds[batch], 1, images, resident_mib() + 10.0 * batch)


def test_evaluation_batch_is_doubled_while_that_is_faster() -> None:
    search = make_search(FakeBench({}))
    search.prepare()
    evaluate = FakeEvaluation({10: 80.0, 20: 100.0, 40: 150.0, 80: 180.0})
    explore_evaluation(search, evaluate, images=200)
    assert [(t.detail, t.outcome, t.reason) for t in search.trials] == [
        ("40 images", "taken", ""),
        ("80 images", "taken", ""),
        ("160 images", "out of memory", "CUDA out of memory."),
    ]
    assert search.best.argument("per_device_eval_batch_size") == 80
    assert micro_batch_of(search.best) == 8
    tuning = _describe(search)
    assert tuning.sentence.endswith("Evaluation: 1.80× with evaluation batch 80 images.")
    assert "evaluation batch 80 images" in tuning.best.description
    assert tuning.best_samples_per_second == tuning.start_samples_per_second  # of training


def test_evaluation_batch_is_halved_where_that_is_faster_and_never_above_the_test_images() -> None:
    search = make_search(FakeBench({}))
    search.prepare()
    explore_evaluation(search, FakeEvaluation({10: 130.0, 5: 100.0, 20: 100.0}), images=39)
    assert [(t.detail, t.outcome) for t in search.trials] == [
        ("10 images", "taken"),
        ("5 images", "slower"),
    ]


def test_evaluation_batch_that_would_not_fit_is_not_started() -> None:
    search = make_search(FakeBench({}), limit_mib=100.0)
    search.prepare()
    evaluate = FakeEvaluation({10: 100.0, 20: 100.0, 40: 200.0})
    explore_evaluation(search, evaluate, images=200)
    assert [t.outcome for t in search.trials] == ["would not fit", "no gain shown"]
    assert 40 not in evaluate.batches


def test_evaluation_is_measured_on_as_many_test_images_as_asked_for() -> None:
    recipe = tiny_recipe(per_device_eval_batch_size=8)
    window = measure_evaluation(Bench(recipe), 12, recipe)
    assert (window.samples, window.steps) == (12, 2)
    assert window.seconds > 0


def test_what_gains_nothing_all_together_is_taken_back() -> None:
    bench = FakeBench({("training_args.bf16", True): 1.5})
    search = make_search(bench)
    search.prepare()
    search.explore()
    bench.factors[("training_args.bf16", True)] = 0.95  # the machine has changed
    search.confirm()
    assert search.best == search.start
    assert "taken" not in {trial.outcome for trial in search.trials}
    tuning = _describe(search)
    assert tuning.sentence.startswith("Nothing pays")
    assert tuning.best.digest() != tuning.recipe.digest()  # its name is another
    assert tuning.best.training_args == tuning.recipe.training_args


def test_techniques_without_effect_are_explained() -> None:
    plain = Subject("cpu", 2, images=4, convolutional=False, batch_norm=False, attention=None)
    recipe = tiny_recipe(
        preprocessing={"location": "device"},
        optim="sgd",
        logging_nan_inf_filter=False,
        per_device_train_batch_size=3,
    )
    assert set(say_inapplicable(recipe, plain, larger_batch=True)) == {
        "memory format",
        "optimizer",
        "NaN filter",
        "attention",
        "loader workers",
        "pinned memory",
        MICRO_BATCH,
        LARGER_BATCH,
        "torch.compile",
    }
    eager = Subject("cuda", 2, images=4, convolutional=True, batch_norm=False, attention="eager")
    offered = {
        name: [o.detail for o in offers(tiny_recipe(), eager)]
        for name, offers in list_techniques(False).items()
    }
    assert offered["attention"] == ["sdpa"]
    assert "cuDNN benchmark" not in offered
    idle = say_inapplicable(tiny_recipe(), eager, larger_batch=False)
    assert "once in a process" in idle["cuDNN benchmark"]
    assert offered["pinned memory"] == ["with non-blocking copies"]


def test_kept_memory_is_offered_on_a_cpu_with_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def offers(recipe: Recipe, subject: Subject) -> list[tuple[str, bool]]:
        name = "model.keep_freed_memory"
        found = list_techniques(False)["kept memory"](recipe, subject)
        return [(offer.detail, offer.settings[name]) for offer in found]

    kept = change(tiny_recipe(), {"model.keep_freed_memory": True}.items())
    assert offers(tiny_recipe(), CPU) == [("on", True)]
    assert offers(kept, CPU) == [("off", False)]
    assert "kept memory" not in say_inapplicable(tiny_recipe(), CPU, larger_batch=False)
    gpu = Subject("cuda", 2, images=1000, convolutional=True, batch_norm=False, attention=None)
    assert offers(tiny_recipe(), gpu) == []
    monkeypatch.setattr("hfbench.studies.tune.offers.can_keep_freed_memory", lambda: False)
    assert offers(tiny_recipe(), CPU) == []
    reasons = say_inapplicable(tiny_recipe(), CPU, larger_batch=False)
    assert reasons["kept memory"] == "for a CPU, with glibc"


def test_subject_is_what_the_model_is(tmp_path: Path) -> None:
    timm = describe_subject(Bench(tiny_recipe()))
    assert (timm.convolutional, timm.batch_norm, timm.attention) == (True, True, None)
    assert (timm.device_type, timm.images) == ("cpu", 48)
    recipe = tiny_recipe(write_model(tmp_path, vit_config()))
    vit = describe_subject(Bench(recipe))
    assert (vit.convolutional, vit.batch_norm, vit.attention) == (False, False, "sdpa")
    attention = list_techniques(False)["attention"]
    assert list(attention(recipe, vit)) == []
    eager = recipe.model.model_copy(update={"attn_implementation": "eager"})
    offered = attention(recipe.model_copy(update={"model": eager}), vit)
    assert [offer.detail for offer in offered] == ["sdpa"]


def test_outputs_that_exist_or_cannot_be_are_refused_together(tmp_path: Path) -> None:
    recipe = make_recipe(name="x" * 92)
    output = tmp_path / "best.json"
    output.touch()
    measurements_file(output).touch()
    with pytest.raises(ResultError) as refused:
        check_output(recipe, output, None, force=False)
    said = str(refused.value)
    assert "hfbench tune has 3 problems" in said
    assert f"{output} is there already" in said
    assert "best.measurements.json is there already" in said
    assert "97 letters" in said
    with pytest.raises(ResultError, match="is the recipe that is tuned"):
        check_output(make_recipe(), output, output, force=True)
    with pytest.raises(ResultError, match="there is no folder"):
        check_output(make_recipe(), tmp_path / "no" / "best.json", None, force=True)
    with pytest.raises(ResultError, match="is a folder"):
        check_output(make_recipe(), tmp_path, None, force=True)
    check_output(make_recipe(), output, None, force=True)


def test_written_recipe_loads_and_its_measurements_are_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "best.json"
    found = tune(tiny_recipe(), output, seconds=2)
    loaded = load_recipe(output)
    assert loaded == found.best
    assert (loaded.name, loaded.variant, loaded.baseline) == ("tiny_best", "fast", "tiny")
    content = json.loads((tmp_path / "best.measurements.json").read_text("utf-8"))
    assert Tuning.model_validate(content) == found
    assert {trial.technique for trial in found.trials} >= {"preprocessing", "precision"}
    assert found.best_samples_per_second > 0
    for trial in found.trials:
        assert len(trial.windows) == 0 or trial.samples_per_second is not None
    with pytest.raises(ResultError, match="is there already"):
        tune(tiny_recipe(), output, seconds=5)


def test_best_recipe_is_not_pushed_over_the_one_that_was_given() -> None:
    search = make_search(FakeBench({}), tiny_recipe(push_to_hub=True, hub_model_id="me/tiny"))
    search.prepare()
    tuning = _describe(search)
    assert "hub_model_id" not in tuning.best.training_args
    assert any("hub_model_id was left out" in note for note in tuning.notes)


def test_ctrl_c_writes_the_best_so_far(tmp_path: Path) -> None:
    class Stop(Observer):
        def tried(self, trial: Trial) -> None:
            raise KeyboardInterrupt

    output = tmp_path / "best.json"
    with pytest.raises(Interrupted, match=r"candidates measured: 1\. The best so far is in"):
        tune(tiny_recipe(), output, seconds=5, observer=Stop())
    assert load_recipe(output).name == "tiny_best"
    content = json.loads(measurements_file(output).read_text("utf-8"))
    assert content["stopped"] is True
    assert len(content["trials"]) == 1
