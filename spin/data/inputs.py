"""What a run reads before anything is loaded: its tokenizer and its data sets."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from spin import config
from spin.config import SPINConfig
from spin.core.ranks import World
from spin.data.chat import ChatTokenizer
from spin.data.dataset import PromptDataset, PromptSource, check_is_dataset
from spin.data.dates import fix_date
from spin.data.read import check_fits_model, unknown_ids
from spin.data.tokenizer import PromptTokenizer
from spin.data.torchtune_tokenizer import adapt_tokenizer

log = logging.getLogger(__name__)


def read_inputs(
    cfg: SPINConfig, model: nn.Module, world: World
) -> tuple[PromptTokenizer, PromptSource, PromptDataset, tuple[int, ...]]:
    """The config's tokenizer, its training and its validation set (without one what ``validation_fraction`` holds out,
    if anything), and the ids of the model's vocabulary that the tokenizer lacks. A ``DataError`` if they do not fit the
    model. Collective."""
    tokenizer = adapt_tokenizer(config.instantiate(cfg.tokenizer))
    fix_date(tokenizer, Path(cfg.output_dir), world, cfg.resume)
    reading = {"tokenizer": tokenizer, "max_seq_len": model.max_seq_len}
    prompts: PromptSource = config.instantiate(cfg.dataset, **reading)
    val_prompts = PromptDataset()
    if cfg.validation_dataset is not None:
        val_prompts = config.instantiate(cfg.validation_dataset, **reading)
    elif isinstance(prompts, PromptDataset):
        val_prompts = prompts.held_out or val_prompts
    for dataset in (prompts, val_prompts):
        check_is_dataset(dataset)
    stop_token_ids = (*tokenizer.eos_ids, *cfg.sampling.stop_token_ids)
    check_fits_model(model, tokenizer, stop_token_ids, prompts, val_prompts)
    folder = cfg.checkpointer.get("checkpoint_dir")
    if isinstance(tokenizer, ChatTokenizer) and folder and (warning := tokenizer.foreign_tokens(folder)):
        log.warning(warning)
    return tokenizer, prompts, val_prompts, unknown_ids(model, tokenizer)
