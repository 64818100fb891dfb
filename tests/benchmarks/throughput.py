"""Measure hfbench against the standard path and against the limit of the machine.

    python -m tests.benchmarks.throughput --data DIR --model DIR [--case NAME]... [--json FILE]

Each arm is a process that waits while another measures; windows alternate, so that what disturbs
the machine disturbs all of them alike. Ratios are of the windows of one round, with a 95 % interval
over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hfbench.comparison.intervals import ratio_interval
from tests.benchmarks.arms import Measurement, Spec

CASES = {
    # Name: (model, pretrained, image size, batch, bfloat16 where it is fast)
    "mobilenetv2_64": ("", True, 64, 64, False),
    "resnet10t_32": ("resnet10t", False, 32, 128, True),
}
TARGETS = (
    # What, measure, numerator, denominator, at least
    ("training, device / limit", "train", "device", "limit"),
    ("training, device / limit with kept memory", "train", "device", "limit_kept"),
    ("training, device / standard", "train", "device", "standard"),
    ("training, device / standard with workers", "train", "device", "standard_workers"),
    ("training, device as plain as the standard path / standard", "train", "plain", "standard"),
    ("training, host / standard", "train", "host", "standard"),
    ("evaluation, device / standard", "evaluate", "device", "standard"),
    ("evaluation, device / limit", "evaluate", "device", "limit"),
    ("evaluation, device / limit with kept memory", "evaluate", "device", "limit_kept"),
    ("evaluation, host / standard", "evaluate", "host", "standard"),
)


class Arm:
    """A process that measures when it is told to."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name, self.spec = name, spec
        self.found: dict[str, list[Measurement]] = {"train": [], "evaluate": []}
        self.peak_memory_mib = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.arms", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("VERBOSE") else None,
            text=True,
            env=os.environ | {"STARTED_AT": str(time.time())},
        )
        self.first_step_seconds = float(self._read()["first_step_seconds"])

    def measure(self, what: str, steps: int) -> Measurement:
        self._write(f"{what} {steps}")
        return Measurement(**self._read())

    def stop(self) -> None:
        self._write("stop")
        self.peak_memory_mib = float(self._read()["peak_memory_mib"])
        self.process.communicate(timeout=120)

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early; set VERBOSE=1 to see why.")
        return dict(json.loads(line))


def specs_of(case: str, options: argparse.Namespace) -> dict[str, Spec]:
    """Return the arms of a case: the same model, data, batch and optimizer."""
    model, pretrained, size, batch, bf16 = CASES[case]
    limit = Spec(
        arm="limit",
        data=options.data,
        model=model or options.model,
        pretrained=pretrained,
        image_size=size,
        batch=options.batch or batch,
        eval_batch=options.eval_batch,
        train_images=options.train_images,
        eval_images=options.eval_images,
        bf16=bf16 and not options.fp32,
        channels_last=True,
    )
    plain = replace(limit, bf16=False, channels_last=False)
    hub = {} if pretrained else {"model": f"timm/{model}"}
    return {
        "standard": replace(plain, arm="standard"),
        "standard_workers": replace(plain, arm="standard", workers=os.cpu_count() or 1),
        "host": replace(plain, arm="host", **hub),
        "plain": replace(plain, arm="device", **hub),
        "device": replace(limit, arm="device", keep_freed_memory=True, **hub),
        "limit": limit,
        "limit_kept": replace(limit, keep_freed_memory=True),
    }


def run_case(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start all arms one after the other, then let them take turns."""
    arms = []
    for name, spec in specs_of(case, options).items():
        arms.append(Arm(name, spec))
        print(f"{case}: {name}: first step after {arms[-1].first_step_seconds:.1f} s", flush=True)
    steps = {}
    for arm in arms:
        rate = arm.measure("train", 2)
        steps[arm.name] = max(
            2, round(options.seconds * rate.images / rate.seconds / arm.spec.batch)
        )
        arm.measure("evaluate", 0)
    for round_ in range(options.rounds):
        for arm in arms[round_ % len(arms) :] + arms[: round_ % len(arms)]:
            arm.found["train"].append(arm.measure("train", steps[arm.name]))
            arm.found["evaluate"].append(arm.measure("evaluate", 0))
        print(f"{case}: round {round_ + 1} of {options.rounds}", flush=True)
    for arm in arms:
        arm.stop()
    return summarize(arms)


def summarize(arms: list[Arm]) -> dict[str, Any]:
    """Return medians of each arm, and ratios with their intervals."""
    by_name = {arm.name: arm for arm in arms}

    def rates(name: str, what: str) -> list[float]:
        return [m.images / m.seconds for m in by_name[name].found[what]]

    table = {}
    for arm in arms:
        data = [m.data_cpu_seconds for m in arm.found["train"] if m.data_cpu_seconds is not None]
        images = arm.found["train"][0].images
        table[arm.name] = {
            "train_images_per_second": statistics.median(rates(arm.name, "train")),
            "evaluation_images_per_second": statistics.median(rates(arm.name, "evaluate")),
            "data_cpu_seconds_per_1000_images": statistics.median(data) / images * 1000
            if data
            else None,
            "cpu_seconds_per_1000_images": statistics.median(
                m.cpu_seconds / m.images * 1000 for m in arm.found["train"]
            ),
            "peak_memory_mib": arm.peak_memory_mib,
            "first_step_seconds": arm.first_step_seconds,
        }
    ratios = {}
    for title, what, above, below in TARGETS:
        pairs = zip(rates(above, what), rates(below, what), strict=True)
        found = ratio_interval([one / other for one, other in pairs])
        ratios[title] = [found.value, found.low, found.high]
    return {"arms": table, "ratios": ratios, "specs": {a.name: asdict(a.spec) for a in arms}}


def show(case: str, found: dict[str, Any]) -> None:
    """Print a case as Markdown."""
    columns = {
        "train_images_per_second": ("train img/s", ".0f"),
        "evaluation_images_per_second": ("eval img/s", ".0f"),
        "data_cpu_seconds_per_1000_images": ("data CPU s / 1,000", ".4f"),
        "cpu_seconds_per_1000_images": ("all CPU s / 1,000", ".2f"),
        "peak_memory_mib": ("peak MiB", ".0f"),
        "first_step_seconds": ("first step s", ".1f"),
    }
    print(f"\n{case}\n\n| arm | " + " | ".join(title for title, _ in columns.values()) + " |")
    print("|---|" + "---|" * len(columns))
    for name, row in found["arms"].items():
        cells = ["–" if row[k] is None else format(row[k], f) for k, (_, f) in columns.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| ratio | median | 95 % |\n|---|---|---|")
    for title, (middle, low, high) in found["ratios"].items():
        print(f"| {title} | {middle:.2f} | {low:.2f} to {high:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="uoft-cs/cifar10", help="CIFAR-10: folder or Hub name")
    parser.add_argument(
        "--model", default="timm/mobilenetv2_100.ra_in1k", help="a MobileNetV2 checkpoint"
    )
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a training window")
    parser.add_argument("--batch", type=int, help="instead of the case's")
    parser.add_argument("--eval-batch", type=int, default=128)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--eval-images", type=int, default=4_096)
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 in any arm")
    parser.add_argument("--json", type=Path, help="write everything measured there")
    options = parser.parse_args()
    everything = {}
    for case in options.case or CASES:
        everything[case] = run_case(case, options)
        show(case, everything[case])
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
