"""What this project takes of torchtune 0.6.1, in one place. Nothing of ``torchtune.training``, which cannot be imported
with torchao 0.16 and later.

torchtune is not maintained any more: what it stops doing has to be replaced here. Other modules import its names from
here; CONTRIBUTING.md lists the few places that cannot.
"""

# isort: off
# Names that torchtune does not export. Gemma 2's are changed from outside (spin.model.gemma2), the others recognized.
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune, gemma2_tune_to_hf

# Weights: Hugging Face's names and layouts in and out.
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.models.phi3 import phi3_hf_to_tune, phi3_tune_to_hf
from torchtune.models.qwen2 import qwen2_hf_to_tune, qwen2_tune_to_hf

# The modules of a decoder.
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import FeedForward, FrozenNF4Linear, MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings
from torchtune.modules import TiedLinear, TransformerCrossAttentionLayer, TransformerDecoder
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear
# isort: on

__all__ = [
    "LORA_ATTN_MODULES",
    "DoRALinear",
    "FeedForward",
    "FrozenNF4Linear",
    "Gemma2Attention",
    "Gemma2FinalNorm",
    "GemmaNormEmbeddings",
    "GemmaRMSNorm",
    "Llama3ScaledRoPE",
    "LoRALinear",
    "MultiHeadAttention",
    "Phi3RotaryPositionalEmbeddings",
    "Qwen2RotaryPositionalEmbeddings",
    "RMSNorm",
    "RotaryPositionalEmbeddings",
    "TiedLinear",
    "TransformerCrossAttentionLayer",
    "TransformerDecoder",
    "TransformerSelfAttentionLayer",
    "gemma2_hf_to_tune",
    "gemma2_tune_to_hf",
    "hf_to_tune",
    "phi3_hf_to_tune",
    "phi3_tune_to_hf",
    "qwen2_hf_to_tune",
    "qwen2_tune_to_hf",
    "tune_to_hf",
]
