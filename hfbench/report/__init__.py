"""A report of many runs, as Markdown and as one HTML page that needs nothing else.

`sets` finds which runs belong together; `verdicts`, `comparisons`, `reference`, `details` and
`closing` say what was found, with figures, as a `document`; `markdown` and `page` write it.
"""

from hfbench.report.build import write_report

__all__ = ["write_report"]
