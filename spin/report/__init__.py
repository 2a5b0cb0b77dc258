"""One HTML file for a run: curves, responses side by side, and advice. No script, no network, no other files."""

from spin.report.advice import advice
from spin.report.page import render
from spin.report.record import RunRecord, read_run

__all__ = ["RunRecord", "advice", "read_run", "render"]
