"""docs/export.md: an export as GGUF, by llama.cpp's converter, gives the same tokens in llama.cpp."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from tests.recipes.helpers import REPO

LLAMA = REPO / ".cache" / "gguf"
CONTINUE = """
import json, sys
from itertools import islice
from llama_cpp import Llama
file, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = Llama(file, n_ctx=512, verbose=False, type_k=0, type_v=0)  # the cache in float32
assert llm.tokenize(text.encode(), add_bos=False, special=True) == ids
assert "<|im_start|>" in llm.metadata["tokenizer.chat_template"]
print(json.dumps(list(islice(llm.generate(ids, temp=0.0, repeat_penalty=1.0), 40))))
"""


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not LLAMA.is_dir(), reason="no llama.cpp; `make gguf` fetches and compiles it, for minutes")
def test_the_documented_conversion(real_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = (REPO / "docs/export.md").read_text()
    command = re.search(r"^python (llama_cpp_python\S+ runs/jargon .*)$", page, flags=re.MULTILINE)[1]
    words = shlex.split(command.replace("runs/jargon", str(real_model)).replace("bf16", "f32"))
    words = [str(tmp_path / word) if word.endswith(".gguf") else word for word in words]
    done = subprocess.run([sys.executable, *words], cwd=LLAMA, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    question = [{"role": "user", "content": 'What does the hacker slang term "copyleft" mean?'}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    arguments = [str(tmp_path / "jargon.gguf"), text, json.dumps(ids["input_ids"][0].tolist())]
    command = [str(LLAMA / "venv/bin/python"), "-c", CONTINUE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)[: len(expected)] == expected
