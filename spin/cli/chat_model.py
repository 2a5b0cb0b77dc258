"""A model to chat with, run by transformers: what its user will get."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import transformers
from omegaconf import OmegaConf

from spin.checkpoint.peft import merge_peft
from spin.core.dtypes import DTYPES, fast_dtype
from spin.core.errors import CheckpointError, DataError, SpinError
from spin.core.files import read_json
from spin.core.hub import hub_name, model_folder
from spin.core.terminal import printable
from spin.data import ChatTokenizer
from spin.data.dates import known_date
from spin.data.messages import ChatMessage
from spin.model.hf_folder import ADAPTER_CONFIG, read_hf_config
from spin.run.folder import read_config, run_of


class ChatModel:
    """A Hugging Face folder, or an adapter of peft merged into its base, on the GPU if there is one.

    Args:
        folder (Path): the model's, or the adapter's, which names its base.
        like (ChatModel | None): whose tokenizer and chat template are taken; None takes the folder's own, or the base's
            if it has none, with the template's options of the run that made the model.

    Attributes:
        name (str): what it is called in the terminal.
        tokenizer (ChatTokenizer): makes the prompts.

    Raises:
        CheckpointError: If weights are missing, damaged, or cannot be loaded by transformers.
        DataError: If the tokenizer or its chat template cannot be used.
    """

    def __init__(self, folder: Path, like: ChatModel | None = None) -> None:
        base, adapter, run = folder, folder / ADAPTER_CONFIG, run_of(folder)
        self.name = (
            f"{run.name}, {folder.absolute().parent.name}" if run else hub_name(folder) or folder.absolute().name
        )
        if adapter.is_file():
            named = read_json(adapter, CheckpointError, "Export it again.").get("base_model_name_or_path")
            base = Path(model_folder(str(named), f"{adapter}: base_model_name_or_path"))
        read_hf_config(base)
        if like is None:
            cfg = read_config(run) if run else None
            self.tokenizer = ChatTokenizer(
                folder if (folder / "tokenizer_config.json").is_file() else base,
                date=known_date(folder),
                template_options=OmegaConf.select(cfg, "tokenizer.template_options") if cfg else None,
            )
        else:
            self.tokenizer = like.tokenizer
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            self._model, found = transformers.AutoModelForCausalLM.from_pretrained(  # nosec B615
                str(base),
                dtype=DTYPES[fast_dtype(None)],
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            if base != folder:
                merge_peft(self._model, folder)
            self._model.to(self._device)
        except SpinError:
            raise
        except Exception as error:  # transformers raises no narrower one
            raise CheckpointError(f"{base}: transformers cannot load it ({type(error).__name__}: {error}).") from error
        if found["missing_keys"]:
            raise CheckpointError(f"{base}: has no weights for {sorted(found['missing_keys'])[0]}. Copy it again.")
        self._context: int = self._model.config.get_text_config().max_position_embeddings

    def answer(self, messages: Sequence[ChatMessage], max_new_tokens: int, temperature: float | None) -> Answer:
        """Answers a conversation whose last message is the user's.

        Args:
            messages (Sequence[ChatMessage]): the conversation so far.
            max_new_tokens (int): where the answer is truncated.
            temperature (float | None): 0 is greedy; None takes the settings of the folder's ``generation_config.json``.

        Returns:
            Answer: generated while it is read.

        Raises:
            DataError: If the template refuses the conversation, or it leaves no room for an answer.
        """
        prompt = self.tokenizer.encode_prompt(messages)
        room = self._context - len(prompt)
        if room < 1:
            raise DataError(f"the conversation has {len(prompt)} tokens, the model reads {self._context}. Type /reset.")
        sampling: dict[str, Any] = {}
        if temperature is not None:
            sampling = {"do_sample": temperature > 0, "temperature": temperature or None}
        if temperature == 0:
            sampling |= {"top_p": None, "top_k": None}  # which greedy decoding would warn of
        ids = torch.tensor([prompt], device=self._device)
        return Answer(
            self._model,
            self.tokenizer,
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": min(max_new_tokens, room),
                "eos_token_id": list(self.tokenizer.eos_ids),
                "pad_token_id": self.tokenizer.pad_id,
                **sampling,
            },
        )


class Answer:
    """An answer that is generated while it is read; afterwards ``text`` is what was read, unescaped."""

    def __init__(self, model: Any, tokenizer: ChatTokenizer, options: dict[str, Any]) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self.text, self.is_truncated = "", False

    def __iter__(self) -> Iterator[str]:
        """The text word by word, control characters escaped; who stops reading, or is interrupted, ends it."""
        pieces: Any = transformers.TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        pieces.text_queue = SimpleQueue()  # an interrupt within Queue.get can leave its lock taken, or released twice
        is_over = threading.Event()

        def is_stopped(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((len(ids),), is_over.is_set(), device=ids.device)

        def generate() -> int:
            try:
                ids = self._model.generate(**self._options, streamer=pieces, stopping_criteria=[is_stopped])
            finally:
                pieces.end()
            return int(ids[0, -1])

        with ThreadPoolExecutor(1) as thread:
            last_token = thread.submit(generate)
            try:
                for piece in pieces:
                    self.text += piece
                    yield printable(piece)
            finally:
                is_over.set()
        self.is_truncated = last_token.result() not in self._tokenizer.eos_ids
