"""Runs at the same time share the cache of decoded images, and none sees half of a file."""

from __future__ import annotations

import os
from pathlib import Path

from tests.data.test_images import picture, saved, table
from tests.integration.commands import WarmCommand, only_run, read_result


def test_runs_that_decode_at_the_same_time_see_the_same_images(
    warm: WarmCommand, tmp_path: Path
) -> None:
    cache = Path(os.environ["HF_HOME"]) / "datasets" / "hfbench-decoded"
    before = set(cache.glob("*"))
    images = [picture(n, size=(32, 32)) for n in range(400)]
    path = saved(
        tmp_path, table(images, [n % 2 for n in range(400)]), table(images[:10], [0, 1] * 5)
    )
    arguments = [
        "recipe",
        "quickstart_untuned",
        f"dataset.name_or_path={path}",
        "training_args.max_steps=1",
        "training_args.eval_strategy=no",
    ]

    started = [warm.start([*arguments, "-o", f"runs{n}"], tmp_path) for n in range(3)]
    for run in started:
        run.wait().check()
    written = set(cache.glob("*")) - before
    assert len(written) == 2  # one file a split, nothing half written
    assert {file.suffix for file in written} == {".pixels"}
    times = {file: file.stat().st_mtime_ns for file in written}
    warm.run([*arguments, "-o", "runs3"], tmp_path).check()
    assert {file: file.stat().st_mtime_ns for file in written} == times

    data = [read_result(only_run(tmp_path / f"runs{n}"))["data"] for n in range(4)]
    assert data[0]["train_fingerprint"] != data[0]["eval_fingerprint"]
    assert all(other == data[0] for other in data)
