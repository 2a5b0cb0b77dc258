"""Plan, progress, stop and log of a run."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.core.errors import Stopped
    from spin.run.folder import lock_output_dir
    from spin.run.log import RunLog
    from spin.run.messages import best_by_validation, finish_message, iteration_summary, sample_rows
    from spin.run.plan import RunPlan
    from spin.run.resume import (
        check_files_agree,
        check_unchanged,
        compare_own_code,
        doubts_after_sft,
        inputs_of_config,
        run_fingerprint,
    )
    from spin.run.stopping import StopRequest, resume_hint
    from spin.run.trackio import TrackioLogger
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "RunLog",
    "RunPlan",
    "StopRequest",
    "Stopped",
    "TrackioLogger",
    "best_by_validation",
    "check_files_agree",
    "check_unchanged",
    "compare_own_code",
    "doubts_after_sft",
    "finish_message",
    "inputs_of_config",
    "iteration_summary",
    "lock_output_dir",
    "resume_hint",
    "run_fingerprint",
    "sample_rows",
]
