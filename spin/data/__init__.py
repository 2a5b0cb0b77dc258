"""From a data set to pairs in packed rows."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.data.chat import ChatTokenizer
    from spin.data.collate import spin_custom_collate
    from spin.data.dataset import PromptDataset, PromptSource
    from spin.data.mixture import MixedPromptDataset, mixed_prompt_dataset
    from spin.data.order import epoch_order, history_window, iteration_items, iteration_samples
    from spin.data.read import prompt_dataset
    from spin.data.stream import PromptStream
    from spin.data.tokenizer import PromptTokenizer
    from spin.data.torchtune_tokenizer import TorchtuneTokenizer, adapt_tokenizer
    from spin.pairs.packing import PackedRow, RowLayout, pack_batch, pack_row, plan_rows
    from spin.pairs.store import PairStore
    from spin.types import Pair, Prompt, Response
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "ChatTokenizer",
    "MixedPromptDataset",
    "PackedRow",
    "Pair",
    "PairStore",
    "Prompt",
    "PromptDataset",
    "PromptSource",
    "PromptStream",
    "PromptTokenizer",
    "Response",
    "RowLayout",
    "TorchtuneTokenizer",
    "adapt_tokenizer",
    "epoch_order",
    "history_window",
    "iteration_items",
    "iteration_samples",
    "mixed_prompt_dataset",
    "pack_batch",
    "pack_row",
    "plan_rows",
    "prompt_dataset",
    "spin_custom_collate",
]
