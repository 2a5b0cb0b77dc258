"""Self-Play fIne-tuNing (SPIN, arXiv 2401.01335) for torchtune models: the parts that the recipes wire together."""

from spin.core.noise import drop_import_remarks

__version__ = "0.1.0"

drop_import_remarks()  # before torchao, wherever that is imported first
