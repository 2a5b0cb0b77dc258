"""``from spin import SPIN``: a run from Python, in a notebook or a script; the same recipes as ``spin run``."""

from __future__ import annotations

import gc
import html
import importlib
import json
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from spin.core.errors import ConfigError
from spin.core.files import SFT_STAGE, replace_text
from spin.core.progress import Cell, show_on
from spin.core.terminal import printable

if TYPE_CHECKING:
    import pandas as pd

    from spin.config import SPINConfig

_one_at_a_time = threading.Lock()  # progress, seeds and the process group are the process's


@dataclass(frozen=True)
class Result:
    """What a run has written, as far as it has come. As the last value of a notebook's cell it is its report.

    Args:
        folder (Path): the run's ``output_dir``.
    """

    folder: Path

    @property
    def metrics(self) -> pd.DataFrame:
        """``metrics.jsonl``, a row for each step."""
        import pandas as pd

        from spin.run.folder import read_json_lines

        return pd.DataFrame(read_json_lines(self.folder / "metrics.jsonl"))

    @property
    def models(self) -> dict[int, Path]:
        """The Hugging Face folder, or the adapter's, of each iteration that is finished."""
        from spin.run.folder import iteration_folders, model_of

        found = {number: model_of(folder) for number, folder in iteration_folders(self.folder).items()}
        return {number: model for number, model in found.items() if model is not None}

    def report(self) -> Path:
        """Writes ``report.html`` into the folder, as ``spin report`` does, and gives its path."""
        replace_text(self.folder / "report.html", self._page())
        return self.folder / "report.html"

    def chat(self, message: str, iteration: int | None = None, max_new_tokens: int = 512) -> str:
        """The answer of an iteration's model, as ``spin chat`` gives it.

        Args:
            message (str): what the user says, in a conversation of its own.
            iteration (int | None): from 0; None is the last that is finished.
            max_new_tokens (int): of the answer at most.

        Returns:
            str: the answer.

        Raises:
            OutputError: If the iteration has no model.
        """
        from spin.cli.chat_model import ChatModel
        from spin.run.folder import exported_model

        model = ChatModel(exported_model(self.folder, iteration)[1])
        return "".join(model.answer([{"role": "user", "content": message}], max_new_tokens, None))

    def _page(self) -> str:
        from spin.report import read_run, render

        return render(read_run(self.folder))

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self._page())}" style="width:100%;height:40em;border:0"></iframe>'


class SPIN:
    """A run in this process, on one GPU or the CPU.

    With ``model`` and ``data`` it is what ``spin new`` sizes for this machine, written to ``<output_dir>.yaml`` and
    read from there the next time; with ``config`` it is that one. The same call resumes a run that was stopped.

    Args:
        model (str | Path | None): Hugging Face folder, or a name on huggingface.co.
        data (str | Path | None): prompts with real responses: a file, glob, folder, or a data set's name.
        config (str | Path | None): a file, or the name of a packaged config; None: chosen for model and data.
        method (Literal["full", "lora", "qlora"] | None): what is trained, for ``model`` and ``data``; None is full.
        **options (Any): keys of the config: ``seed=1``, ``optimizer={"lr": 1e-6}`` or ``**{"optimizer.lr": 1e-6}``.

    Attributes:
        config (SPINConfig): complete.

    Raises:
        SpinError: What the command line prints as ``error: ...``.

    Example:
        >>> run = SPIN(model="Qwen/Qwen3-0.6B", data="mine.jsonl", method="lora")
        >>> run.sft()
        >>> result = run.train()
        >>> result.metrics.tail()
        >>> result.chat("What is a kludge?")
    """

    config: SPINConfig

    def __init__(
        self,
        model: str | Path | None = None,
        data: str | Path | None = None,
        *,
        config: str | Path | None = None,
        method: Literal["full", "lora", "qlora"] | None = None,
        **options: Any,
    ) -> None:
        from spin.config import SPINConfig, complete, load_config

        if isinstance(data, list | tuple) and len(data) > 1 and all(isinstance(each, str | Path) for each in data):
            from spin.cli.new import several_files

            raise ConfigError(f"data is one source; there are {several_files([str(each) for each in data])}")
        for name, value in {"model": model, "data": data, "config": config}.items():
            if not isinstance(value, str | Path | None):
                raise ConfigError(
                    f"{name} is a {type(value).__name__}: expected a path or a name. A resume reads it again, so rows "
                    'lie in a file: pandas.DataFrame(rows).to_json("mine.jsonl", orient="records", lines=True).'
                )
        if method not in (None, "full", "lora", "qlora"):
            raise ConfigError(f"method={method!r}: expected 'full', 'lora' or 'qlora'.")
        overrides = [f"{key}={json.dumps(value, default=_plain)}" for key, value in options.items()]
        if config is None:
            if model is None or data is None:
                raise ConfigError("SPIN(model=..., data=...) or SPIN(config=...): one of them says what to train.")
            config = _drafted(str(model), str(data), method, overrides, options)
        elif method is not None:
            raise ConfigError(
                f"method={method!r} is for model=... and data=...: config={str(config)!r} itself says what is trained. "
                f"The packaged configs are 'full', 'lora' and 'qlora': config={method!r}."
            )
        else:
            named = {"model.path": model, "dataset.source": data}
            overrides += [f"{key}={json.dumps(str(value))}" for key, value in named.items() if value is not None]
        self.config = complete(load_config(str(config), overrides), SPINConfig)

    def sft(self) -> Result:
        """Fine-tunes on the real responses, by the section ``sft`` of the config: what :meth:`train` then starts from.

        Returns:
            Result: of the folder ``sft`` in the run's.

        Raises:
            SpinError: What the command line prints as ``error: ...``.
        """
        return self._run("spin_sft", "SFTRecipe", Path(self.config.output_dir) / SFT_STAGE)

    def train(self) -> Result:
        """Plays and trains, from wherever the run stands to its end, or until it is interrupted.

        Returns:
            Result: what the run has written.

        Raises:
            SpinError: What the command line prints as ``error: ...``.
        """
        return self._run("spin_recipe", "SPINRecipe", Path(self.config.output_dir))

    def _run(self, module: str, name: str, folder: Path) -> Result:
        import torch

        if not _one_at_a_time.acquire(blocking=False):
            raise ConfigError("another run is going on in this process. Wait for it, or start this one by `spin run`.")
        with ExitStack() as ends:
            ends.callback(_one_at_a_time.release)
            ends.callback(torch.cuda.empty_cache)
            ends.callback(gc.collect)  # a model and its hooks refer to each other
            recipe = getattr(importlib.import_module(module), name)(self.config)
            if "ipykernel" in sys.modules:
                ends.callback(show_on, show_on(_in_cell()))
            try:
                recipe.setup()
                recipe.train()
            finally:
                recipe.cleanup()
                del recipe
        return Result(folder)


def _in_cell() -> Cell:
    """Progress in the cell of a notebook that is being run."""
    from IPython.display import HTML, display

    shown = display(HTML(""), display_id=True)
    return Cell(lambda text: shown.update(HTML(text)))


def _plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _drafted(model: str, data: str, method: str | None, overrides: Sequence[str], options: dict[str, Any]) -> Path:
    """The file that ``spin new`` writes for a run, or wrote when it began."""
    import torch

    from spin.cli.draft import Machine, draft
    from spin.config import read_yaml

    folder = Path(options.get("output_dir") or f"runs/{Path(data).stem}")
    file = folder.with_name(f"{folder.name}.yaml")
    if file.is_file():
        found = read_yaml(file)
        if (OmegaConf.select(found, "model.path"), OmegaConf.select(found, "dataset.source")) != (model, data):
            raise ConfigError(f"{file}: was made for another model or data. Remove it, or give another output_dir.")
        return file
    arguments: Any = SimpleNamespace(model=model, data=data, method=method, out=file)
    gpus = 0 if options.get("device") == "cpu" else min(1, torch.cuda.device_count())
    text, report = draft(arguments, Machine.here(gpus), [f"output_dir={folder}", *overrides])
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, text)
    print(printable("\n".join([*report, f"written   {file}"])))
    return file
