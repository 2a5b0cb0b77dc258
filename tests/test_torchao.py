"""The newest torchao that pyproject.toml allows, in processes of their own; other tests have the environment's.

`tune run` and torchtune's metric loggers end at torchao 0.15, where peft does not begin yet.
"""

import re

import pytest

from tests.recipes.helpers import TINY_LORA, command_line
from tests.torchao_versions import needs_newest, with_newest

pytestmark = [pytest.mark.slow, needs_newest]
LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, merged, adapter = sys.argv[1:]
tokens = torch.arange(3, 23).reshape(2, 10)
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    expected = load(merged)(tokens).logits
    found = PeftModel.from_pretrained(load(base), adapter)(tokens).logits
    assert not torch.allclose(load(base)(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # it learned something
torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
"""


def test_a_run_whose_adapter_peft_loads(tmp_path, tiny_lm):
    """`spin run` from a config to a folder; merged by this package and by peft, the logits are the same."""
    out = tmp_path / "out"
    short = ("max_iterations=1", "optimizer.lr=1e-2", "validation_dataset=null", "checkpointer.export_dtype=fp32")
    words = command_line(out, *short, config=TINY_LORA, program=["-m", "spin", "run", "spin_recipe"])
    output = with_newest(words)
    assert "Finished after" in output
    for noise in ("cpp extensions", "Failed to load", "is an Enum subclass", "Traceback"):
        assert noise not in output
    with_newest(["-c", LOAD, str(tiny_lm), *(str(out / "iteration_000" / name) for name in ("hf_model", "adapter"))])
    with_newest(["-m", "spin", "export", str(out), "--adapter"])
    adapter = out / "iteration_000" / "adapter"
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), flags=re.DOTALL)[1]
    assert with_newest(["-c", f"import os; os.chdir({str(adapter)!r})\n{code}"]).strip()  # the code on the card


@pytest.mark.long
def test_adapters_quantized_bases_and_8_bit_moments_are_right():
    """Their own tests, with peft unpatched; none of them may be skipped for want of a torchao."""
    files = ["checkpoint/test_peft.py", "model/test_adapters.py", "training/test_optim.py"]
    stops = "tests/recipes/test_stops.py::test_adapters_stop_too"
    options = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    output = with_newest([*options, *(f"tests/{file}" for file in files), stops], timeout=1200)
    assert " passed" in output and "peft refuses torchao" not in output


def test_what_needs_torchtune_training_says_so(tmp_path):
    """A metric logger of torchtune's: refused by name before anything is loaded, with the remedy."""
    logger = "metric_logger={_component_: torchtune.training.metric_logging.StdoutLogger}"
    code = (
        "import sys; from spin.cli import main\n"
        f"sys.argv = {command_line(tmp_path, logger, program=[''])!r}\n"
        "import spin_recipe\n"
        "assert 'torchtune.training' not in sys.modules\n"
        "try:\n    spin_recipe.recipe_main()\nexcept SystemExit as end:\n    assert end.code == 1"
    )
    assert "pip install 'torchao<0.16'" in with_newest(["-c", code])
