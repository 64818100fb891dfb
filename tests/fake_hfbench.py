"""Stands in for hfbench where only starting, killing and resuming are tested: a run takes no time.

A suite starts it as a launcher: ``python fake_hfbench.py FOLDER python -m hfbench recipe …``. What
it says and writes is in ``FOLDER/environment.json`` and ``FOLDER/result.json``, what it did is
added to ``FOLDER/starts``; ``FOLDER/<recipe name>-seed<seed>`` holds a line of Python to do first.
As a doctor it does what is in ``FOLDER/doctor.py``, and adds a line to ``FOLDER/measured``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def run(folder: Path, file: Path, output_dir: Path) -> None:
    """Do what ``hfbench recipe FILE --output-dir DIR --resume`` does, without training."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    recipe = json.loads(file.read_text())
    name, seed = recipe["name"], recipe["training_args"].get("seed", 42)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{name} {seed} {os.getpid()}\n")
    runs = [found.parent for found in output_dir.glob(f"{name}/*/recipe.json")]
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    same = [run for run in unfinished if json.loads((run / "recipe.json").read_text()) == recipe]
    place = same[0] if same else output_dir / name / f"{time.time_ns()}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "recipe.json").write_text(json.dumps(recipe))
    behaviour = folder / f"{name}-seed{seed}"
    if behaviour.exists():
        exec(behaviour.read_text(), {"time": time, "os": os, "sys": sys, "signal": signal})
    result = json.loads((folder / "result.json").read_text())
    result |= {"recipe": recipe, "run_id": place.name}
    result["metrics"]["test"]["accuracy"] = seed / 100
    (place / ".partial").write_text(json.dumps(result))
    (place / ".partial").replace(place / "result.json")


def main() -> None:
    """Find out what is asked for."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    if words[-2:] == ["env", "--json"]:
        print((folder / "environment.json").read_text())  # noqa: T201
        return
    if "doctor" in words:
        with (folder / "measured").open("a") as measured:
            measured.write(f"{Path(words[-4]).stem} {words[-3:]}\n")
        exec((folder / "doctor.py").read_text(), {"sys": sys})
        return
    at = words.index("recipe")
    run(folder, Path(words[at + 1]), Path(words[at + 3]))


if __name__ == "__main__":
    main()
