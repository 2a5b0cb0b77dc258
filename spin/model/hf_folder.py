"""Reads a model folder: its config, the files of its weights; or says what else it is and what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spin.core.errors import CheckpointError
from spin.core.files import read_json
from spin.core.hub import is_hub_name
from spin.core.terminal import counted, some_of
from spin.model.families import FAMILIES, decoder_config
from spin.model.hf_config import CONFIG, check_values

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_AGAIN = "Download the model again."
_NO_CONFIG = "Every Hugging Face model has one: download the model again."
_RESAVE = (
    "python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained({arguments})"
    '.save_pretrained("OUT")\''
)
_FAMILIES = f"SPIN trains text decoders of model_type {', '.join(FAMILIES)}. Choose such a model."
# What a folder may be in place of a Hugging Face model's: files that show it, and what to do
_FORMATS = {
    ("consolidated*.safetensors",): (
        "consolidated.safetensors is Mistral's own layout. Download the repository's config.json and "
        "model-*.safetensors, which hold the same weights."
    ),
    ("consolidated*.pth",): (
        "consolidated.*.pth is Meta's own layout. Use the Hugging Face repository of the model, or convert it: "
        "python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir {folder} --output_dir OUT"
    ),
    ("model_index.json",): "A diffusers pipeline, which makes images. " + _FAMILIES,
    (".metadata", "*.distcp"): (
        "A checkpoint of torch.distributed.checkpoint, not a model folder. Of a run of SPIN the models are in "
        "iteration_NNN/hf_model; its checkpoint is for resume."
    ),
    ("global_step*", "zero_to_fp32.py"): (
        "A DeepSpeed checkpoint. Write the model with save_pretrained first (zero_to_fp32.py gives its weights)."
    ),
}
_WEIGHTS = {
    ("*.bin", "*.pt", "*.pth", "*.ckpt"): (
        "It holds {names}, which can run code when loaded and are not read. Download the repository's safetensors, or "
        "write them: " + _RESAVE.format(arguments='"{folder}"')
    ),
    ("*.h5", "*.msgpack", "*.onnx", "onnx", "*.npz", "*.tflite", "*.mlpackage"): (
        "It holds {names}, of another framework. Download the repository's *.safetensors."
    ),
    ("params.json",): "It is in Meta's or Mistral's own layout. Use the Hugging Face repository of the model.",
}
# How a quantized model becomes one that can be trained, by a part of the method's name.
_UNQUANTIZED = {
    "mxfp4": "transformers writes it in bf16 with quantization_config=Mxfp4Config(dequantize=True)",
    "fp8": "transformers writes it in bf16 with quantization_config=FineGrainedFP8Config(dequantize=True)",
    "bitsandbytes": "transformers writes it in bf16 with model.dequantize() before save_pretrained",
    "compressed": "transformers writes it in bf16 with quantization_config=CompressedTensorsConfig("
    "run_compressed=False)",
}


def check_local(name: str) -> None:
    """What :func:`read_config` raises of a model's folder; nothing of a name on huggingface.co."""
    if os.path.exists(name) or not is_hub_name(name):
        read_config(Path(name) / CONFIG)


def read_config(file: Path, remedy: str | None = None) -> dict[str, Any]:
    """A config.json, with the types and ranges of its values checked.

    Raises a CheckpointError if it is missing or broken, of a model that SPIN cannot train, or has values that no model
    has; ``remedy`` says what to do about the first two.
    """
    folder = file.parent
    if not folder.is_dir():
        if folder.exists():
            kind = "a GGUF file" if folder.suffix == ".gguf" else "a file"
            raise CheckpointError(
                f"{folder}: {kind}, expected a folder. {_gguf(folder) or 'Name the folder it is in.'}"
            )
        raise CheckpointError(
            f"{folder}: no such folder. A model is a Hugging Face folder on this disk: of a download (`hf download "
            "NAME --local-dir FOLDER`), or iteration_NNN/hf_model of a run."
        )
    if not file.exists():
        raise CheckpointError(f"{file}: no such file. {remedy or _other_kind(folder) or _NO_CONFIG}")
    remedy = remedy or _NO_CONFIG
    config = text_config(read_json(file, CheckpointError, remedy, allow_nan=True))
    fault = _unfit(config)
    if fault is not None:
        raise CheckpointError(f"{file}: {fault}")
    missing = [key for key in ("hidden_size", "num_attention_heads", "num_hidden_layers") if key not in config]
    if missing:
        raise CheckpointError(f"{file}: no {', '.join(missing)}; this is not the config of a text decoder. {_FAMILIES}")
    check_values(config, file)
    return config


_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the decoder in a multimodal Gemma 3; others as they are.

    transformers leaves out the soft cap of its logits.
    """
    inner = config.get("text_config")
    if config.get("model_type") != "gemma3" or not isinstance(inner, dict):
        return config
    defaults = decoder_config({"model_type": "gemma3_text"})  # real folders leave them out
    inner = {key: getattr(defaults, key) for key in _SIZES} | inner
    outer = {key: value for key, value in config.items() if not key.endswith("_config")}
    own = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "final_logit_softcapping": None}
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
    return {**outer, **inner, **own, "tie_word_embeddings": tied}


# Where a multimodal folder has its decoder, in two generations of names, and what else it has.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_name(name: str) -> str | None:
    """The name that a stored tensor has in a folder of the decoder alone; None: it belongs to another part."""
    for prefix, own in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None if name.startswith(_OTHER_PARTS) else name


def _unfit(config: dict[str, Any]) -> str | None:
    """Why a config's model cannot be trained, whatever its numbers are."""
    quantization = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        name = str(method or ("MLX" if "quantization" in config else "unknown method"))[:40]
        return f"the weights are quantized ({name}). {_unquantize(name)}"
    family, architectures = config.get("model_type"), config.get("architectures") or []
    known = [str(each) for each in architectures] if isinstance(architectures, list) else []
    said = f" ({', '.join(known[:3])})" if known else ""
    if isinstance(family, str) and family not in FAMILIES:
        inside = " It is a model of several parts (text, images, sound)." if "text_config" in config else ""
        return f"model_type is {family[:60]!r}{said}.{inside} {_FAMILIES}"
    if any("For" in each for each in known) and not any("ForCausalLM" in each for each in known):
        return (
            f"architectures is {', '.join(known[:3])}, which does not write text: its head is another one. "
            "Name a folder of a ...ForCausalLM model."
        )
    return None


def _unquantize(method: str) -> str:
    way = next((text for part, text in _UNQUANTIZED.items() if part in method.lower().replace("_", "")), None)
    original = "Use the unquantized original, which most repositories name (base_model, or the name without the suffix)"
    return f"SPIN trains unquantized weights. {original}" + (f"; or {way}." if way else ".")


def read_hf_config(checkpoint_dir: str | Path) -> dict[str, Any]:
    """A folder's config.json, after a check that the weights it needs are there, without opening them.

    Raises a CheckpointError if the folder, its config.json or its safetensors files are missing, broken or quantized,
    or if it is a folder of another kind.
    """
    folder = Path(checkpoint_dir)
    config = read_config(folder / CONFIG)
    weight_files(folder)
    return config


def _gguf(path: Path) -> str | None:
    if path.suffix != ".gguf":
        return None
    return (
        f"{path.name} is GGUF, llama.cpp's format. Use the original's folder with safetensors; or write one, which is "
        "as exact as the GGUF: " + _RESAVE.format(arguments=f'"{path.parent}", gguf_file="{path.name}"')
    )


def _names(folder: Path, *patterns: str) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def _match(folder: Path, kinds: dict[tuple[str, ...], str]) -> str | None:
    for patterns, message in kinds.items():
        names = _names(folder, *patterns)
        if names:
            return message.replace("{folder}", str(folder)).replace("{names}", some_of(names, 5))
    return None


def _other_kind(folder: Path) -> str | None:
    """What a folder without config.json is, and what to do; None if it has weights and nothing else is known of it."""
    if (folder.parent / CONFIG).is_file() and _names(folder, "consolidated*", "params.json"):
        return f"These are the original's own files; the Hugging Face model is {folder.parent}: name that one."
    found = _other_format(folder)
    if found:
        return found
    if (folder / "snapshots").is_dir() and (folder / "refs").is_dir():
        snapshots = sorted(str(path.parent) for path in folder.glob(f"snapshots/*/{CONFIG}"))
        listed = ": " + ", ".join(snapshots) if snapshots else ""
        return f"A folder of the Hugging Face cache: name the snapshot in it{listed}."
    models = sorted(str(path) for path in [*folder.glob("hf_model"), *folder.glob("*/hf_model")])
    if models:
        return f"A run's folder; name one of its models: {', '.join(models)}."
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"Name the folder of a model in it: {', '.join(inside[:10])}."
    if _names(folder, "*.safetensors"):
        return None
    nothing = "Nothing in this folder is a model's. checkpoint_dir is a folder with config.json and safetensors."
    return _match(folder, _WEIGHTS) or nothing


def _other_format(folder: Path) -> str | None:
    gguf = _names(folder, "*.gguf")
    if not _names(folder, ADAPTER_CONFIG, "adapter_model*.safetensors"):
        return _gguf(folder / gguf[0]) if gguf else _match(folder, _FORMATS)
    try:
        base = read_json(folder / ADAPTER_CONFIG, CheckpointError, "").get("base_model_name_or_path")
    except CheckpointError:
        base = None
    of = f" of {base[:200]!r}" if isinstance(base, str) and base else ""
    return (
        f"An adapter of peft{of}, without its base. Merge it into the base: python -c 'from peft import "
        f'AutoPeftModelForCausalLM as M; M.from_pretrained("{folder}").merge_and_unload().save_pretrained("OUT")\' and '
        "name OUT; of a LoRA run of SPIN the merged model is hf_model next to it (checkpointer.export_merged=true)."
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model of a folder, sorted by name; a CheckpointError if one is missing, or
    if there are two models.

    The index names them; without one, ``model.safetensors`` alone, else all of ``model-*-of-*``, else all. So files in
    other layouts that lie next to them (Mistral's ``consolidated.safetensors``) are left alone.
    """
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index, CheckpointError, _AGAIN, allow_nan=True).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{index}: no weight_map of tensors to files. {_AGAIN}")
        files = [folder / name for name in sorted(set(names))]
        outside = [file.name for file in files if file.parent != folder]
        if outside:
            raise CheckpointError(f"{index}: names files outside the folder: {', '.join(outside)}.")
        # unlike Path.is_file, no error for a name that is too long for a file
        missing = [file.name[:100] for file in files if not os.path.isfile(file)]
        if missing:
            raise CheckpointError(
                f"{folder}: {INDEX} names {len(files)} files, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing. {_AGAIN}"
            )
        single = folder / "model.safetensors"
        if single not in files and single.is_file():
            raise CheckpointError(
                f"{folder}: two models, {single.name} and that of {INDEX} ({counted(len(files), 'file')}). Programs "
                "differ in which they load. Remove one of the two; the index goes with its files."
            )
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(path for path in folder.glob("model-*-of-*.safetensors") if path.is_file())
    if files:
        announced = files[0].stem.rsplit("-of-", 1)[1]
        if announced != f"{len(files):0{len(announced)}d}":
            raise CheckpointError(f"{folder}: {len(files)} of {announced.lstrip('0')} safetensors files. {_AGAIN}")
        return files
    files = [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if path.is_file() and not path.name.startswith(("adapter_model", "consolidated"))
    ]
    if not files:
        found = _other_format(folder) or _match(folder, _WEIGHTS) or "Download or save the model as safetensors."
        raise CheckpointError(f"{folder}: no *.safetensors file of a model. {found}")
    return files


_QUANTIZED_NAMES = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    "_blocks": "mxfp4",
}


def quantized(tensors: dict[str, str]) -> str | None:
    """How stored tensors, given with safetensors' names of their dtypes, are quantized, and what to do; or None."""
    for name, dtype in tensors.items():
        method = next((method for ending, method in _QUANTIZED_NAMES.items() if name.endswith(ending)), None)
        if method is None and dtype.startswith("F8"):
            method = "fp8"
        if method is None and name.endswith(".scales") and dtype not in ("F32", "F64"):
            method = "gptq, awq or MLX"
        if method is not None:
            return f"the weights are quantized ({method}; {name} is {dtype}). {_unquantize(method)}"
    return None


def broken_file(file: Path, error: object) -> str:
    """What is wrong with a safetensors file that cannot be opened for ``error``, and what to do."""
    try:
        with file.open("rb") as stream:
            head = stream.read(42)
    except OSError:
        head = b""
    if head.startswith(b"version https://git-lfs"):
        return f"{file}: a pointer of Git LFS in place of the file. Run `git lfs pull` in the folder."
    return f"{file}: not a complete safetensors file ({error}). {_AGAIN}"
