"""The model card of an exported model: base, data, iterations, beta, and the hashes that tie them together."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

import spin
from spin.config import escaped, plain
from spin.core.errors import OutputError
from spin.core.files import SFT_STAGE, file_sha256
from spin.core.hub import hub_name, is_hub_name
from spin.core.terminal import counted, printable
from spin.core.texts import markdown_table, plain_text, turns
from spin.data import PairStore
from spin.data.rows import kind_of
from spin.model.hf_folder import ADAPTER_CONFIG
from spin.report.record import is_number
from spin.run.folder import data_sources, iteration_folders, read_config, read_json_lines
from spin.training.schedules import per_iteration

_SAMPLES, _SAMPLE_CHARS = 3, 1000  # shown, and of a text
_LIMITS = """## Limits

The model learned to respond as its data do, in content, style and length. Self-play adds neither knowledge nor safety:
what the base model gets wrong, or must not be used for, holds here too. The figures above are those of training; they
do not evaluate the model's use."""
_CITATION = """## Citation

```bibtex
@inproceedings{chen2024selfplay,
  title     = {Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models},
  author    = {Chen, Zixiang and Deng, Yihe and Yuan, Huizhuo and Ji, Kaixuan and Gu, Quanquan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.01335}
}
```"""
_CHAT = """messages = [{"role": "user", "content": "What is self-play?"}]
"""
_USE_MODEL = (
    """from transformers import pipeline

chat = pipeline("text-generation", MODEL)
"""
    + _CHAT
    + """print(chat(messages, max_new_tokens=128)[0]["generated_text"][-1]["content"])"""
)
_USE_ADAPTER = (
    """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

base = AutoModelForCausalLM.from_pretrained(BASE)
model = PeftModel.from_pretrained(base, MODEL).merge_and_unload()
model.generation_config = GenerationConfig.from_pretrained(MODEL)  # with the tokens that end a response
chat = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(MODEL))
"""
    + _CHAT
    + """print(chat(messages, max_new_tokens=128)[0]["generated_text"][-1]["content"])"""
)


def model_card(
    run: Path,
    iteration: int,
    model: Path,
    base_model: str | None = None,
    license_id: str | None = None,
    name: str | None = None,
) -> str:
    """Writes a model card; ``name`` is the model's on huggingface.co, None the folder that the card lies in."""
    cfg = read_config(run)
    if cfg is None:
        raise OutputError(f"{run / 'config.yaml'}: missing, so it is not known how the model was made.")
    for key, kind in (("checkpointer.checkpoint_dir", str), ("max_iterations", int)):
        if not isinstance(found := OmegaConf.select(cfg, key), kind):
            raise OutputError(f"{run / 'config.yaml'}: {key} is {found!r}; it is not known how the model was made.")
    base_model = base_model or hub_name(cfg.checkpointer.checkpoint_dir)
    base = base_model or Path(cfg.checkpointer.checkpoint_dir).name
    sources = [cfg.get("dataset"), *((OmegaConf.select(cfg, "dataset.sources") or {}).values())]
    named = [each.get("source") for each in sources if OmegaConf.is_dict(each)]
    datasets = [each for each in named if isinstance(each, str) and _is_data_set(each)]
    start = cfg.checkpointer.checkpoint_dir if name is None else base
    cfg = OmegaConf.create(escaped(_without_folders(plain(cfg))))  # a reference to the environment stays one
    is_adapter = (model / ADAPTER_CONFIG).is_file()
    head = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "torchtune", "conversational", *(["lora"] if is_adapter else [])],
        **({"base_model": base_model} if base_model else {}),
        **({"datasets": datasets} if datasets else {}),
        **({"license": license_id} if license_id else {}),
    }
    title, what = (
        f"{base}, SPIN iteration {iteration}",
        (
            f"{base} after {counted(iteration + 1, 'iteration')} of self-play fine-tuning "
            "([SPIN](https://arxiv.org/abs/2401.01335)): in each one, the model learns to prefer the real responses of "
            "a supervised data set to its own."
        ),
    )
    if run.resolve().name == SFT_STAGE:
        title, what = f"{base}, fine-tuned", f"{base} after supervised fine-tuning on the real responses of a data set."
    elif (run / SFT_STAGE).is_dir():
        what += " It was fine-tuned on them before."
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        f"{what} Made with spin-torchtune {spin.__version__}.",
        "## Use\n\n" + _usage(name, base_model or start, is_adapter),
        *_samples(run, iteration),
        "## How it was made\n\n" + markdown_table(("", ""), _settings(cfg)),
        "## Iterations\n\n" + _iterations(run, cfg, iteration),
        "Loss is that of the first step of an iteration, where two equal models stand, and of its last; acc the "
        "fraction of pairs whose real response gained more than the generated one, at the last step; "
        "validation loss the mean negative log-prob per token of real responses, in nats.",
        _LIMITS,
        "## Hashes\n\n" + markdown_table(("what", "hash"), _hashes(run, iteration, model)),
        f"## Config\n\n```yaml\n{yaml.safe_dump(plain(cfg), sort_keys=False, allow_unicode=True)}```",
        _CITATION,
    ]
    return printable("\n\n".join(sections) + "\n")


def _without_folders(value: Any) -> Any:
    """A config's values; of an absolute path the model's name on huggingface.co or the last part alone."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~/")) and value.count("/") > 1 and "\n" not in value
    return hub_name(value) or Path(value).name if is_path else value


def _is_data_set(source: str) -> bool:
    return is_hub_name(source) and not kind_of(Path(source)) and not os.path.exists(source)


def _usage(name: str | None, base: str, is_adapter: bool) -> str:
    """Code that runs as it is: by the model's name, or in the folder that the card lies in."""
    model = name or "."
    code = _USE_ADAPTER if is_adapter else _USE_MODEL
    for word, value in (("MODEL", model), ("BASE", base)):
        code = re.sub(rf"\b{word}\b", lambda _, value=value: json.dumps(value), code)  # type: ignore[misc]
    serve = [base, "--enable-lora", "--lora-modules", f"spin={model}"] if is_adapter else [model]
    where = "" if name else "In this folder:\n\n"
    return f"{where}```python\n{code}\n```\n\nor, as a server, `vllm serve {shlex.join(serve)}`."


def _samples(run: Path, iteration: int) -> list[str]:
    """The section of responses to the run's fixed prompts, if it has any: before self-play, and by this model."""
    rows = read_json_lines(run / "fixed_prompts.jsonl")
    before, after = (
        {str(row.get("sample_id")): row for row in rows if row.get("iteration") == n} for n in (0, iteration + 1)
    )
    shown = [(before[sample], row) for sample, row in after.items() if sample in before][:_SAMPLES]
    if not shown:
        return []
    blocks = []
    for old, new in shown:
        parts = [(f"[{role or 'prompt'}]", text) for role, text in turns(new.get("prompt"))]
        parts += [
            ("[before self-play]", plain_text(old.get("response"))),
            ("[this model]", plain_text(new.get("response"))),
        ]
        text = "\n\n".join(
            f"{head}\n{text if len(text) <= _SAMPLE_CHARS else text[:_SAMPLE_CHARS] + ' … (cut here)'}"
            for head, text in parts
        )
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # nothing in a text ends the block
        blocks.append(f"{fence}text\n{text}\n{fence}")
    return ["## Samples\n\nResponses to the same prompts:\n\n" + "\n\n".join(blocks)]


def _settings(cfg: DictConfig) -> list[tuple[str, str]]:
    always = {
        "prompts of a step": "global_batch_size",
        "epochs of an iteration": "max_epochs",
        "beta": "loss.beta",
        "loss": "loss.loss_type" if "loss_type" in cfg.loss else "loss._component_",
        "learning rate": "optimizer.lr",
        "optimizer": "optimizer._component_",
        "temperature": "sampling.temperature",
        "longest response, tokens": "sampling.max_new_tokens",
        "seed": "seed",
    }
    where_used = {
        "samples of an iteration, streamed": "dataset.limit" if OmegaConf.select(cfg, "dataset.streaming") else "",
        "responses to a prompt": "pairs.responses_per_prompt",
        "checker of responses, besides self-play": "pairs.checker._component_",
        "earlier iterations trained on": "pairs.history",
        "weight of the real responses' log-prob": "nll_weight",
    }
    unused = {"responses to a prompt": 1}
    rows = [("started from", f"`{cfg.checkpointer.checkpoint_dir}`"), ("data", f"`{data_sources(cfg)}`")]
    for label, key in {**always, **where_used}.items():
        value = OmegaConf.select(cfg, key) if key else None
        if value is not None and not (label in where_used and value == unused.get(label, 0)):
            rows.append((label, str(value)))
    return rows


def _iterations(run: Path, cfg: DictConfig, last: int) -> str:
    metrics = read_json_lines(run / "metrics.jsonl")
    beta = plain(OmegaConf.select(cfg, "loss.beta"))
    rows = []
    for iteration in range(last + 1):
        own = [row for row in metrics if row.get("iteration") == iteration]
        steps = [row for row in own if is_number(row.get("loss"))]
        val = [n for row in own if is_number(n := row.get("val_loss"))]
        rows.append(
            (
                str(iteration),
                str(per_iteration(beta, iteration, cfg.max_iterations)),
                str(len(steps)),
                f"{steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}" if steps else "unknown",
                f"{steps[-1]['acc']:.3f}" if steps and is_number(steps[-1].get("acc")) else "unknown",
                f"{val[-1]:.4f}" if val else "none",
            )
        )
    return markdown_table(("iteration", "beta", "steps", "loss", "acc", "validation loss"), rows)


def _hashes(run: Path, last: int, model: Path) -> list[tuple[str, str]]:
    """Weights by value (the opponents'), data and tokenizer as the stores' manifests have them, files by SHA-256."""
    rows = []
    for iteration, folder in iteration_folders(run).items():
        manifest = folder / "responses" / "manifest.json"
        if iteration > last or not manifest.is_file():
            continue
        fingerprint = PairStore.open(manifest.parent).manifest["fingerprint"]
        if iteration == 0:
            rows += [(name, fingerprint[name]) for name in ("dataset", "tokenizer") if name in fingerprint]
        rows.append((f"opponent of iteration {iteration}", fingerprint["opponent"]))
    rows += [(file.name, f"sha256 {file_sha256(file)}") for file in sorted(model.glob("*.safetensors"))]
    return [(what, f"`{digest}`") for what, digest in rows]
