"""``spin models``: which models are trained, from the table that builds them."""

from __future__ import annotations

from collections.abc import Sequence

from spin.cli import parser_of
from spin.core.texts import markdown_table
from spin.model.families import FAMILIES

# By model_type: what was run on a GPU besides the tests that every family passes there.
GPU_RUNS: dict[str, str] = {
    "llama": "whole runs of 1B and 8B, steps of 4B shapes",
    "qwen3": "iterations and steps of 4B shapes, also with vLLM; QLoRA of 14B",
    "gemma3_text": "iterations and steps of 4B shapes, also with vLLM",
}
# What is refused, and why.
REFUSED = {
    "gpt-oss": "attention sinks and MXFP4 experts",
    "Qwen3-Next, Qwen3.5, LFM2, Granite 4 hybrid, Nemotron-H, Falcon-H1": "layers with a recurrent state, which packed "
    "rows would carry from one response into the next",
    "Mixtral, DeepSeek-V3, GLM-4.5 and other mixtures of experts but Qwen3's": "their routers are not built here",
    "towers for images and sound": "responses are text; of Gemma 3 the text part is trained and exported",
    "GGUF, GPTQ, AWQ, FP8, MXFP4 folders": "weights are trained unquantized; the error names the way back",
    "rope_type dynamic beyond the model's own context, longrope beyond its original one": "the rotation of every token "
    "would depend on the length of its sequence; within those lengths they train",
}


def page() -> str:
    """The tables as Markdown."""
    trained = [(f"`{name}`", row.models, GPU_RUNS.get(name, "")) for name, row in sorted(FAMILIES.items())]
    tables = (
        markdown_table(("model_type", "models", "run on a GPU besides the tests"), trained),
        "Refused with one sentence:",
        markdown_table(("what", "why"), list(REFUSED.items())),
    )
    return "\n\n".join(tables)


def main(argv: Sequence[str]) -> None:
    """Prints the tables."""
    parser_of("models", "List the models that are trained, by the model_type of their config.json.").parse_args(argv)
    print(page())
