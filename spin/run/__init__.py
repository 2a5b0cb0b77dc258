"""Plan, progress, stop and log of a run."""
