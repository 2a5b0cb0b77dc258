"""One HTML page for runs: curves, tables, responses and advice, as a file without a network or live from loopback.

The charts are drawn by uPlot 1.6.32 (https://github.com/leeoniya/uPlot, MIT), as its npm package has it:
``uPlot.iife.min.js``, ``uPlot.min.css`` and ``uPlot.LICENSE``.
"""

from spin.report.advice import advice, verdict
from spin.report.fixed_prompts import fixed_prompts_table, write_fixed_prompts
from spin.report.page import render
from spin.report.record import RunRecord, read_evaluations, read_run

__all__ = [
    "RunRecord",
    "advice",
    "fixed_prompts_table",
    "read_evaluations",
    "read_run",
    "render",
    "verdict",
    "write_fixed_prompts",
]
