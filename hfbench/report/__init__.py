"""A report of many runs, as Markdown and as one HTML page that needs nothing else.

`sets` finds which runs belong together, the modules of sections and figures say what was found
(`verdicts`, `reference`, `details`, `closing`) as a `document`, and `markdown` and `page` write it.
"""

from hfbench.report.build import write_report

__all__ = ["write_report"]
