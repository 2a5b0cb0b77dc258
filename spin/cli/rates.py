"""The rates that times are estimated from: one table, each with the GPU, the file and the date of its measurement.

What stands in no file of ``benchmarks/results`` is a data sheet's figure or an assumption, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A kind of GPU: its data sheet, and what was measured of it."""

    memory_gib: float  # as the driver reports it
    tflops: float  # dense bf16
    memory_gb_per_second: float


GPUS = {
    "H100": GPU(79.2, 989, 3350),
    "H200": GPU(139.8, 989, 4800),
    "A100-80": GPU(79.2, 312, 2039),
    "A100-40": GPU(39.4, 312, 1555),
    "L40S": GPU(44.5, 362, 864),
}


def kind_of_gpu(name: str) -> str | None:
    """Which of ``GPUS`` a driver's name means: "NVIDIA A100-SXM4-80GB" is an A100-80."""
    return next((kind for kind in GPUS if all(part in name for part in kind.split("-"))), None)


@dataclass(frozen=True)
class Rate:
    """A number, and where it comes from."""

    value: float
    gpu: str  # of GPUS
    source: str  # a file of benchmarks/results, or what was assumed
    date: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether a file holds the measurement."""
        return self.source.endswith(".json")


# Fractions of the data sheet's TFLOP/s, by the least work that the pairs need; a kind that has none takes the H200's
TRAIN_FRACTION = {
    "H200": Rate(471.0 / 989, "H200", "scaling_h200x4.json", "2026-11-28"),  # Llama 3.1 8B, whole steps on one GPU
    "H100": Rate(465.6 / 989, "H100", "h100_llama3_2_1b_short.json", "2026-11-24"),  # Llama 3.2 1B
}
TRAIN_FRACTION_ADAPTERS = {
    "H200": Rate(459.8 / 989, "H200", "h200_8b_lora_iteration.json", "2026-11-24"),  # Llama 3.1 8B
}
# How many times as fast an optimizer step is with enable_float8_training, by the weights of a layer: Llama 3.2 1B, and
# 8 layers of Llama 3.1 8B. Smaller layers were not measured; no gain is counted for them.
FLOAT8_SPEEDUP = {
    60_817_408: Rate(695.1 / 571.8, "H200", "h200_float8.json", "2026-11-28"),
    218_103_808: Rate(1138.7 / 850.6, "H200", "h200_float8.json", "2026-11-28"),
}
SCORE_FRACTION = {
    "H200": Rate(510.9 / 989, "H200", "peers_reference.json", "2026-11-25"),  # Llama 3.2 1B
    "H100": Rate(494.7 / 989, "H100", "h100_llama3_2_1b_short.json", "2026-11-24"),
}
# Bytes of bf16 weights and cache a second in a step of generation, prompts' time taken off: Llama 3.1 8B on an H200,
# 256 prompts of 199 tokens, responses of 256; 64 at a time by the embedded generator, 128 on each GPU by vLLM. Other
# kinds: by the data sheets' memory bandwidth.
DECODE_GB_PER_SECOND = {
    "full": Rate(2540, "H200", "h200_8b_full_iteration.json", "2026-11-24"),
    "lora": Rate(1630, "H200", "h200_8b_lora_iteration.json", "2026-11-24"),
    "qlora": Rate(930, "H200", "h200_8b_qlora_iteration.json", "2026-11-25"),
    "vllm": Rate(1360, "H200", "scaling_h200x4_iteration.json", "2026-11-28"),
}
# GB/s that a host writes: a state of 48 GB and an export of 16 GB in 58.3 s
DISK_GB_PER_SECOND = Rate(64.2 / 58.3, "H200", "scaling_h200x4_iteration.json", "2026-11-28")
# Between two GPUs of a host, and between a GPU and pinned CPU memory while the other one copies too: a layer of an 8B
GATHER_GB_PER_SECOND = Rate(225.8, "H200", "h200x2_links.json", "2026-11-28")
REDUCE_GB_PER_SECOND = Rate(250.4, "H200", "h200x2_links.json", "2026-11-28")
BUS_GB_PER_SECOND = Rate(52.6, "H200", "h200x2_links.json", "2026-11-28")
LINK_FRACTION = Rate(0.8, "H100", "assumed: links between hosts reach 0.8 of their rate")
CPU_OPTIMIZER_GB_PER_SECOND = Rate(20, "H100", "assumed: a rank's optimizer moves 20 GB/s in CPU memory")
DENSE = Rate(1, "H100", "assumed: experts run at a dense model's fraction of the GPU's rate")
