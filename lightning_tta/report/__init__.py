"""Finished runs as tables and figures: in the terminal, as Markdown and as one HTML page. Imports no torch."""

from lightning_tta.report.document import write_report

__all__ = ["write_report"]
