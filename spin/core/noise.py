"""Remarks that other libraries log while they are imported, and that nobody who starts a run can act on."""

from __future__ import annotations

import logging
import warnings

_REMARKS = {
    # its own compiled kernels do not fit this torch; nothing here calls them
    "torchao": ("Skipping import of cpp extensions", "Failed to load "),
    # how torchao registers its enums with torch.compile
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
}


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(remark in record.getMessage() for remark in _REMARKS[record.name])


def drop_import_remarks() -> None:
    """Leaves these remarks out of the log; whatever else their loggers say is shown. Bars of other libraries in a
    notebook ask for ipywidgets, which nothing here needs."""
    for name in _REMARKS:
        logging.getLogger(name).addFilter(_is_shown)
    warnings.filterwarnings("ignore", "IProgress not found")
