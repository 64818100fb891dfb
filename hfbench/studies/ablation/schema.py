"""What an ablation leaves behind: its schema, units in the names, and how it is loaded."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from hfbench.comparison.ratio import Ratio
from hfbench.errors import ResultError
from hfbench.machine.bounds import parse_json, read_text
from hfbench.machine.environment import Environment
from hfbench.recipe.schema import Recipe, local_path
from hfbench.results.windows import FirstLoss, Window

ABLATION_VERSION = 1
ABLATIONS_FOLDER = "ablations"
ABLATION_FILE = "ablation.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Part):
    """One window, and when it was measured: in which round, as which of its windows (from 1)."""

    configuration: str
    round: int
    position: int
    window: Window


class FullRun(_Part):
    """One whole run of a configuration; its folder is ``<recipe>.<configuration>/<run id>``."""

    configuration: str
    seed: int
    run_id: str
    execution_seconds: float


class Accuracy(_Part):
    """Test accuracy of a configuration, and what it differs from that of ``none``.

    Attributes:
        value: Mean over the runs, in [0, 1].
        points: Less that of ``none``, in percentage points, over the same seeds; ``None`` for
            ``none``, or if they cannot be compared.
        low: Lower end of its 95 % interval, as in ``hfbench compare``.
        high: Upper end.
        verdict: ``not worse``, ``worse`` or ``undecided``.
    """

    value: float
    points: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str | None = None


class Row(_Part):
    """One configuration.

    Attributes:
        name: Of the configuration.
        label: In words.
        also: What else comes to the same configuration.
        techniques: That are turned on.
        settings: Dotted names of the recipe, and values, that differ from ``none``.
        effective_batch_size: Images of an optimizer step.
        speedup: Over ``none``: of images per second in the same round; of execution time with the
            same seed if these are whole runs; ``None`` if not measured.
        verdict: ``baseline``, ``faster``, ``slower``, ``no difference shown``, ``undecided`` or
            ``failed``.
        samples_per_second: Geometric mean over the rounds.
        seconds_per_step: The same, of an optimizer step; ``None`` of whole runs.
        data_wait_share: Of the time; mean, in [0, 1].
        peak_process_memory_mib: Median over the rounds.
        peak_device_memory_mib: The same; ``None`` on a CPU.
        first_loss: Against what it should be; ``None`` if it could not be measured.
        not_applied: What was asked for and not seen, a sentence each.
        failure: Why it was not measured.
        accuracy: Of whole runs; else ``None``.
    """

    name: str
    label: str
    also: list[str]
    techniques: list[str]
    settings: dict[str, Any]
    effective_batch_size: int
    speedup: Ratio | None
    verdict: str
    samples_per_second: float | None
    seconds_per_step: float | None
    data_wait_share: float | None
    peak_process_memory_mib: float | None
    peak_device_memory_mib: float | None
    first_loss: FirstLoss | None
    not_applied: list[str]
    failure: str | None
    accuracy: Accuracy | None = None

    @property
    def flagged(self) -> bool:
        """Whether the first loss is not what it should be."""
        return self.first_loss is not None and self.first_loss.flagged


class Contribution(_Part):
    """What one technique contributes.

    Attributes:
        technique: Its name.
        detail: What exactly was turned on.
        alone: Gain over ``none``; ``None`` if not measured.
        with_others: Gain of ``all`` over all but it; ``None`` if it is not among "all".
        interaction: `with_others` / `alone`: 1 if the techniques do not touch each other.
    """

    technique: str
    detail: str
    alone: Ratio | None
    with_others: Ratio | None
    interaction: Ratio | None


class NotMeasured(_Part):
    """A technique that cannot have an effect here, with the reason."""

    technique: str
    reason: str


class Ablation(_Part):
    """What each technique of a recipe contributes on one machine.

    Attributes:
        full: Whether these are whole runs; their rounds are seeds.
        rounds: That were asked for.
        finished_rounds: In which every configuration was measured.
        steps: Optimizer steps of a window of ``none``; the others see as many images; ``None`` of
            whole runs.
        seconds: Wall time of everything.
        rows: One of each configuration, ``none`` first.
        contributions: One of each technique.
        not_run: Techniques that cannot have an effect here.
        verdict: The sentence on top.
        findings: Further sentences: flags, interactions, failures.
        notes: What a reader has to know.
        windows: Everything that was measured.
        runs: The same, of whole runs.
    """

    schema_version: int = ABLATION_VERSION
    created_at: str
    recipe: Recipe
    recipe_sha256: str
    environment: Environment
    full: bool = False
    rounds: int
    finished_rounds: int
    steps: int | None
    seconds: float
    verdict: str
    findings: list[str]
    notes: list[str]
    rows: list[Row]
    contributions: list[Contribution]
    not_run: list[NotMeasured]
    windows: list[Measured]
    runs: list[FullRun] = []

    _folder: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path | None:
        """Where it is kept; ``None`` if it was not saved."""
        return self._folder

    @property
    def judged(self) -> str:
        """How differences were told from noise, a sentence; empty if each was judged by itself."""
        if not any(row.speedup and row.speedup.p is not None for row in self.rows):
            return ""
        return (
            "Each interval is of one ratio; a difference is said where it is shown among all "
            "ratios of this ablation together (Holm, 5 %)."
        )

    @property
    def flagged(self) -> list[Row]:
        """Configurations whose first loss is not what it should be."""
        return [row for row in self.rows if row.flagged]

    def row(self, name: str) -> Row:
        """Return a configuration by its name."""
        return next(row for row in self.rows if row.name == name)


def make_ablation_folder(recipe: Recipe, root: Path) -> Path:
    """Make ``root/ablations/<recipe name>/<UTC time>-<hash>``; sorted by name is by time.

    Raises:
        ResultError: If that cannot be.
    """
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    folder = root / ABLATIONS_FOLDER / recipe.name / f"{moment}-{recipe.digest()[:8]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ResultError(f"--output-dir: {folder} cannot be made: {error}") from None
    return folder


def load_ablation(path: str | os.PathLike[str]) -> Ablation:
    """Load an ablation.

    Args:
        path: ``ablation.json``, its folder, or ``ablations/<recipe name>``, which stands for its
            newest.

    Raises:
        ResultError: If there is none, or it cannot be read.
    """
    place = local_path(path)
    found = [place] if place.is_file() else [place / ABLATION_FILE]
    if not found[0].is_file():
        found = sorted(place.glob(f"*/{ABLATION_FILE}"))
    if not found:
        raise ResultError(f"{path} holds no {ABLATION_FILE}; make one with: hfbench ablate RECIPE")
    file = found[-1]
    try:
        content = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise ResultError(f"{file} cannot be read: {error}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != ABLATION_VERSION:
        raise ResultError(
            f"{file} has schema_version {version}, expected {ABLATION_VERSION}; run hfbench ablate "
            "again."
        )
    try:
        ablation = Ablation.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ResultError.from_problems(str(file), problems) from None
    ablation._folder = file.parent
    return ablation
