"""Fixtures of the embedded generator's tests: a small trained model, and prompts for it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import load_llama_weights, tiny_lm_model

TEXTS = [
    "What is a hacker?",
    "kludge: /kluhj/",
    "Unix",
    "A bug in the",
    "This is the story of how a programmer found that the machine on the second floor",
    "1. [common]",
    "The word foo means",
    "In the beginning",
    "/flaym/ vi. To post an email message intended to insult and provoke; to speak incessantly and rabidly on some",
]


@pytest.fixture(scope="session")
def tokenizer(tiny_lm):
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture(scope="session")
def hf_model(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def trained(tiny_lm):
    model = tiny_lm_model()
    load_llama_weights(model, tiny_lm)
    return model


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in TEXTS]
