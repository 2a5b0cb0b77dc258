"""trackio as a metric logger: a local SQLite file, or a private Space of Hugging Face."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.config import plain


class TrackioLogger:
    """Logs to trackio. Without ``space_id`` nothing leaves this machine: the metrics are in ``TRACKIO_DIR``, by default
    trackio's folder in the Hugging Face cache, and ``trackio show`` draws them.

    Args:
        project (str): the project.
        name (str | None): the run, which is continued if it is there; None names it as the folder ``output_dir``.
        group (str | None): the group of runs.
        space_id (str | None): ``name`` or ``organisation/name`` of a Space, made if it is not there; the token is that
            of ``hf auth login``, or ``HF_TOKEN``.
        private (bool): whether a new Space is private.

    Raises:
        ImportError: If trackio is not installed.
    """

    def __init__(
        self,
        project: str = "spin",
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        private: bool = True,
    ) -> None:
        import trackio

        self._trackio: Any = trackio
        self._project, self._name = project, name
        self._settings: dict[str, Any] = {"group": group, "space_id": space_id, "private": private}

    def log_config(self, config: Any) -> None:
        """Starts the run, with its config."""
        name = self._name or Path(config.output_dir).name
        settings = {**self._settings, "config": plain(config)}
        self._run: Any = self._trackio.init(self._project, name, resume="allow", embed=False, **settings)

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        self._run.log(dict(payload), step=step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Logs rows, all with the same columns, as a table."""
        table = self._trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Ends the run when all is written or sent."""
        self._trackio.finish()
