"""Linear layers on packed weights compute what they compute without, and are as before afterwards."""

import pytest
import torch
from torch import nn

from spin.generators.prepacked import prepacked
from spin.model.torchtune import LoRALinear, TiedLinear


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embeddings = nn.Embedding(300, 64)
        self.plain = nn.Linear(64, 96)
        self.adapted = LoRALinear(96, 64, rank=4, alpha=8)
        self.output = TiedLinear(self.embeddings) if tied else nn.Linear(64, 300, bias=False)

    def forward(self, x):
        return self.output(self.adapted(self.plain(self.embeddings(x)).relu()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_products_on_packed_weights_are_the_same(tied, dtype):
    torch.manual_seed(0)
    model = Model(tied).to(dtype)
    ids = torch.randint(300, (3, 5))
    expected = model(ids)
    with prepacked(model):
        assert "forward" in vars(model.plain) and "forward" in vars(model.output.linear if tied else model.output)
        assert "forward" not in vars(model.adapted)  # its base weights are its own affair
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
        torch.testing.assert_close(model(ids), expected, **tolerance)
        torch.testing.assert_close(model(ids[:1]), expected[:1], **tolerance)
    assert torch.equal(model(ids), expected)
    model.plain.weight.mul_(2)  # as an optimizer does: the next generation packs the weights of that time
    with prepacked(model):
        packed = model(ids)
    torch.testing.assert_close(packed, model(ids), **tolerance)
