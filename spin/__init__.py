"""Self-Play fIne-tuNing (SPIN, arXiv 2401.01335) for torchtune models: the parts that the recipes wire together, and
:class:`SPIN`, a run from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin.core.noise import drop_import_remarks

if TYPE_CHECKING:
    from spin.cli.api import SPIN as SPIN

__version__ = "0.1.0"

drop_import_remarks()  # before torchao, wherever that is imported first


def __getattr__(name: str) -> Any:
    """``SPIN``, imported when it is asked for."""
    if name != "SPIN":
        from spin.core.terminal import nearest_of

        raise AttributeError(f"module 'spin' has no attribute {name!r}.{nearest_of(name, __dir__())}")
    from spin.cli.api import SPIN

    return SPIN


def __dir__() -> list[str]:
    return [*globals(), "SPIN"]
