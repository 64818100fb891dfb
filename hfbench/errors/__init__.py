"""The errors that hfbench raises on purpose, each a sentence that a user can act on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hfbench.errors.harmless import message


class HfbenchError(Exception):
    """A problem that the user can mend; the command line prints it without a traceback.

    Its text holds no credential, and nothing that a terminal would obey, whoever named what is in
    it.

    Attributes:
        exit_code: What the process ends with.
    """

    exit_code = 2

    def __init__(self, text: str = "") -> None:
        super().__init__(message(text))

    @classmethod
    def from_problems(cls, source: str, problems: Sequence[str]) -> HfbenchError:
        """Put every problem found in one source into one error.

        Args:
            source: What was read, such as a file name.
            problems: One sentence each, at least one.
        """
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls("\n".join([f"{source} has {count}:", *(f"  {line}" for line in problems)]))


class RecipeError(HfbenchError):
    """A recipe, or an override of one, does not say what to run."""


class DeviceError(HfbenchError):
    """This machine, or this launch, cannot do what the recipe asks for."""


class DataError(HfbenchError):
    """A data set cannot be read as labelled images."""


class ModelError(HfbenchError):
    """A model or its image processor cannot be loaded or does not fit the recipe."""


class HubError(HfbenchError):
    """The Hub refused, or could not be reached."""


class ResultError(HfbenchError):
    """A run's result is missing or cannot be read."""


class ComparisonError(HfbenchError):
    """Two results cannot be set against each other."""


class Interrupted(HfbenchError):  # noqa: N818 - stopping is no error
    """The user stopped the run; what was done is saved.

    Exit code 130 is the shells' convention for "ended by SIGINT" (128 + 2).
    """

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[str]) -> str:
    """Write names in quotes, as in "a", "b" and "c"; of more than twelve the first eleven."""
    quoted = [f'"{name}"' for name in names]
    if len(quoted) > 12:
        quoted = [*quoted[:11], f"{len(quoted) - 11} more"]
    return (
        " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)
    )


def briefly(error: Exception | str) -> str:
    """Cut an error of many problems to the first of them, for a list of what was left out."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[:2]) + (" …" if len(lines) > 2 else "")
