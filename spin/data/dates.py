"""One date for a run: what a chat template writes as today's stays that of the run's first start.

Llama 3.1 and 3.2, SmolLM3, Granite and Mistral Small write the day into every prompt. A run that resumes the next day,
and workers and ranks on two sides of midnight, must ask the opponent what the others ask.
"""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

from spin.core.errors import DataError
from spin.core.files import file_lock, read_json, replace_text
from spin.core.ranks import World, broadcast_object, raise_on_all_ranks
from spin.data.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

DATE_FILE = "template_date.json"
_KIND = "spin.template_date"


def fix_date(tokenizer: PromptTokenizer, output_dir: Path, world: World, *runs: str | Path | None) -> None:
    """Gives a tokenizer whose template reads the date that of the run. Collective, by what rank 0 finds.

    It is ``tokenizer.date`` where that is set; else that of the first of ``runs`` that has one (folders of other runs,
    or checkpoints and models in them; a config's ``resume`` too); else what ``output_dir`` keeps; else today.
    ``output_dir`` keeps it from then on, in ``template_date.json``. Nothing may have been encoded before.
    """
    if not getattr(tokenizer, "reads_date", False):
        return
    date, file = getattr(tokenizer, "date", None), output_dir / DATE_FILE
    with raise_on_all_ranks(world, DataError):
        if world.is_main:
            with file_lock(file):  # workers of one run start at once
                kept = _read(file) if file.is_file() else None
                found = None if date else known_date(*runs)
                date = date or found or kept or datetime.date.today().isoformat()
                if kept is None or (found and found != kept):
                    replace_text(file, json.dumps({"kind": _KIND, "date": date}) + "\n")
            log.info("The chat template's date is %s (tokenizer.date; kept in %s)", date, file)
    tokenizer.date = broadcast_object(date, world)  # type: ignore[attr-defined]


def known_date(*folders: str | Path | None) -> str | None:
    """The date (ISO) that the first of these run folders keeps which has one. A folder may also be up to two levels
    within a run's: ``iteration_001/hf_model``, ``checkpoints/step_00000010``. ``auto`` and ``never`` name none."""
    for folder in (Path(each).absolute() for each in folders if each not in (None, "auto", "never")):
        for place in (folder, *folder.parents[:2]):
            if (place / DATE_FILE).is_file():
                return _read(place / DATE_FILE)
    return None


def _read(file: Path) -> str:
    remedy = "Write the day of the run's first start into it, or set tokenizer.date to that and remove the file."
    content = read_json(file, DataError, remedy)
    try:
        if content.get("kind") == _KIND:
            return datetime.date.fromisoformat(str(content.get("date"))).isoformat()
    except ValueError:
        pass
    raise DataError(f'{file}: expected {{"kind": "{_KIND}", "date": "YYYY-MM-DD"}}. {remedy}')
