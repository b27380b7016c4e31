"""The report that people look at: one HTML page, Markdown and LaTeX, from finished runs."""

from lightning_tta.report.write import write_report

__all__ = ["write_report"]
