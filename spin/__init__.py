"""Self-Play fIne-tuNing (SPIN, arXiv 2401.01335) for torchtune models: the parts that the recipes wire together."""

__version__ = "0.1.0"
