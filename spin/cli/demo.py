"""``spin demo``: the quickstart in any folder, from the model to what to do next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spin.cli import parser_of, run
from spin.config.files import load_config
from spin.core.command import spin_command

_CONFIG = "quickstart/smollm2_135M_cpu"
_TEXT = (
    f"Two iterations of self-play of a 135M-parameter model on this machine's CPU, in a few minutes, after a download "
    f"of 93 MB. What it runs: {spin_command('run', 'spin_recipe', '--config', _CONFIG)}"
)


def main(argv: Sequence[str]) -> int | None:
    """Makes the model's folder, runs the recipe, and says what can be done with the result."""
    # read when torch is loaded; threads that wait for each other sleep, and a model this small has no use for many
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    cfg = load_config(_CONFIG)
    parser = parser_of("demo", _TEXT)
    parser.add_argument("--out", metavar="FOLDER", default=cfg.output_dir, help="of the run (default: %(default)s)")
    parser.add_argument("--only-model", action="store_true", help=f"make {cfg.model.path} and train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_args(argv)

    from spin.cli.demo_model import make_model

    make_model(Path(cfg.model.path))
    if args.only_model:
        return None
    try:
        run.main(["spin_recipe", "--config", _CONFIG, f"output_dir={args.out}", *args.overrides])
    except SystemExit as ended:
        if ended.code or not any(Path(args.out).glob("iteration_*/hf_model")):
            raise
    new = spin_command("new", "--model", "Qwen/Qwen3-0.6B", "--data", "mine.jsonl")
    print(f"  your own:    {new}\n  every key:   {spin_command('cp', _CONFIG, 'my.yaml', '--full')}")
    return None
