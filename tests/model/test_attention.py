"""The patched attention equals torchtune's where it is right, transformers' where it is not, and a naive sum always."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtune.models.gemma2 import gemma2
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerCrossAttentionLayer

from spin.core.errors import ConfigError
from spin.model.attention import attach_kv, detach_kv, patch_attention
from spin.model.gemma2 import final_softcap, fix_gemma2_softcap
from tests.families import FAMILIES, FROM_HF, MODELS, VOCAB_SIZE, hf_twin


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def _prefix_row(prompt: int, *responses: int, pad: int = 0) -> SimpleNamespace:
    """Tokens, positions and mask of a row [prompt | response | response ... | padding] whose responses share the
    prompt."""
    segments = [0] * prompt
    positions = list(range(prompt))
    for number, length in enumerate(responses, start=1):
        segments += [number] * length
        positions += range(prompt, prompt + length)
    segments += [-1] * pad
    positions += range(pad)
    segment, order = torch.tensor(segments), torch.arange(len(segments))
    causal = order[:, None] >= order[None]
    same = segment[:, None] == segment[None]
    to_prompt = (segment[None] == 0) & (segment[:, None] > 0)
    mask = causal & (same | to_prompt)
    return SimpleNamespace(
        tokens=_tokens(1, len(segments), seed=3),
        mask=mask[None],
        positions=torch.tensor(positions)[None],
        segment=segment,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_torchtune_forward_and_gradients(name):
    model = FAMILIES[name]()
    patched = copy.deepcopy(model)
    patch_attention(patched)
    tokens = _tokens(2, 24)

    expected, got = model(tokens), patched(tokens)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).mean().backward()
    (got * weights).mean().backward()
    for (parameter_name, want), (_, have) in zip(model.named_parameters(), patched.named_parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad, rtol=1e-4, atol=1e-6, msg=parameter_name)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name):
    model = FAMILIES[name]()
    patch_attention(model)
    assert fix_gemma2_softcap(model) == (name == "gemma2") == ("unembed" in vars(model))
    twin = hf_twin(name, model)
    tokens = _tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), twin(tokens).logits, rtol=1e-5, atol=5e-5)


def test_torchtune_gemma2_differs_from_transformers_unless_fixed():
    """Guards the reason for spin/model/gemma2.py: if torchtune is fixed, this fails and the file can go."""
    model = FAMILIES["gemma2"]()
    tokens = _tokens(1, 20)
    with torch.no_grad():
        reference = hf_twin("gemma2", model)(tokens).logits
        assert (model(tokens) - reference).abs().max() > 1
        assert final_softcap(model) is None
        fix_gemma2_softcap(model)
        fix_gemma2_softcap(model)  # twice is once
        torch.testing.assert_close(model(tokens), reference, rtol=1e-5, atol=5e-5)
        assert final_softcap(model) == 10.0
        # the head's own way: output(norm(h)), then the cap
        model.set_num_output_chunks(2)
        torch.testing.assert_close(torch.cat(model(tokens), dim=1), reference, rtol=1e-5, atol=5e-5)


def test_fix_gemma2_defaults_are_the_released_caps():
    """torchtune's gemma2_2b builder passes 30 to attention and 50 to the output; config.json of Gemma 2 says 50 and
    30."""
    model = gemma2(
        vocab_size=32, num_layers=2, num_heads=2, head_dim=8, num_kv_heads=1, embed_dim=16, intermediate_dim=16,
        max_seq_len=16, hidden_capping_value=30.0, final_capping_value=50.0,
    )  # fmt: skip
    assert fix_gemma2_softcap(model)
    assert [m.softcapping for m in model.modules() if isinstance(m, Gemma2Attention)] == [50.0, 50.0]
    assert final_softcap(model) == 30.0


@pytest.mark.parametrize("name", MODELS)
def test_prefix_shared_row_equals_separate_sequences(name):
    """Both responses see the prompt and not each other. Gemma 2's window of 8 positions is shorter than the prompt and
    than the row: torchtune's row-index window would hide the prompt from the second response."""
    model = MODELS[name]()
    patch_attention(model)
    row = _prefix_row(12, 9, 11, pad=3)
    with torch.no_grad():
        packed = model(row.tokens, mask=row.mask, input_pos=row.positions)[0]
        for number in (1, 2):
            own = (row.segment == 0) | (row.segment == number)
            alone = model(row.tokens[:, own])[0]
            torch.testing.assert_close(packed[row.segment == number], alone[12:], rtol=1e-5, atol=5e-5)


def test_torchtune_gemma2_window_is_wrong_in_packed_rows():
    """Without the patch the row above fails: this test shows that the one before can."""
    model = FAMILIES["gemma2"]()
    row = _prefix_row(12, 9, 11)
    with torch.no_grad():
        packed = model(row.tokens, mask=row.mask, input_pos=row.positions)[0]
        alone = model(row.tokens[:, row.segment != 1])[0]
    assert (packed[row.segment == 2] - alone[12:]).abs().max() > 1e-2


def test_softcapped_attention_against_a_naive_sum():
    """One head at a time, one query at a time, in float64, straight from the formula of Gemma 2."""
    attention = Gemma2Attention(
        embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, max_seq_len=32, sliding_window_size=3, softcapping=2.0,
        query_pre_attn_scalar=7, q_proj=nn.Linear(8, 16, bias=False), k_proj=nn.Linear(8, 8, bias=False),
        v_proj=nn.Linear(8, 8, bias=False), output_proj=nn.Identity(),
    ).double()  # fmt: skip
    patch_attention(attention)
    x = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[4:, 2:4] = False  # tokens 4 and 5 are a second continuation of tokens 0 and 1
    got = attention(x, x, mask=mask[None], input_pos=positions)[0]

    q = attention.q_proj(x)[0].view(6, 4, 4)
    k, v = attention.k_proj(x)[0].view(6, 2, 4), attention.v_proj(x)[0].view(6, 2, 4)
    for i in range(6):
        for head in range(4):
            seen = [j for j in range(6) if mask[i, j] and positions[0, i] - positions[0, j] < 3]
            scores = torch.stack([2 * torch.tanh(q[i, head] @ k[j, head // 2] / math.sqrt(7) / 2) for j in seen])
            want = (scores.softmax(0)[:, None] * torch.stack([v[j, head // 2] for j in seen])).sum(0)
            torch.testing.assert_close(got[i, head * 4 : head * 4 + 4], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_values_do_not_depend_on_gradients(name, dtype):
    """Reference log-probs are computed without gradients, the policy's with: the first loss is ln 2 only if both
    agree."""
    model = MODELS[name]().to(dtype)
    patch_attention(model)
    row = _prefix_row(20, 30, 40, pad=6)
    arguments = {"mask": row.mask, "input_pos": row.positions}
    with_gradients = model(row.tokens, **arguments)
    assert with_gradients.requires_grad
    with torch.no_grad():
        assert torch.equal(model(row.tokens, **arguments), with_gradients)
        assert torch.equal(model.train()(row.tokens, **arguments), with_gradients)


@pytest.mark.parametrize("name", ["llama3_2", "gemma2"])
def test_no_input_is_written_to(name):
    """torchtune's Gemma 2 scales q in place, which breaks autograd for projections that keep their output."""
    model = FAMILIES[name]()
    patch_attention(model)
    kept = []
    for module in model.modules():
        if isinstance(module, MultiHeadAttention | Gemma2Attention):
            module.q_proj.register_forward_hook(lambda m, i, out: kept.append((out, out.detach().clone())))
    model(_tokens(1, 10)).sum().backward()
    assert kept and all(torch.equal(out, before) for out, before in kept)


def test_names_stay_and_patching_twice_is_once():
    model = FAMILIES["qwen2"]()
    before = list(model.state_dict())
    patch_attention(model)
    forwards = [layer.attn.forward for layer in model.layers]
    patch_attention(model)
    assert [layer.attn.forward for layer in model.layers] == forwards
    assert list(model.state_dict()) == before


def test_activation_checkpointing_and_deepcopy():
    model = FAMILIES["llama3_2"]()
    model.layers = nn.ModuleList([checkpoint_wrapper(layer) for layer in model.layers])
    patch_attention(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.layers[0].parameters()).mul_(2)
    tokens = _tokens(1, 12)
    assert not torch.equal(other(tokens), model(tokens))  # the copy attends with its own weights
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama3_2", "gemma2", *FROM_HF])
def test_layers_trace_without_graph_breaks(name):
    """The ``eager`` backend runs Dynamo only: no compiler is needed, and fullgraph raises at the first break."""
    torch._dynamo.reset()
    model = MODELS[name]()
    patch_attention(model)
    row = _prefix_row(12, 9, 11)
    expected = model(row.tokens, mask=row.mask, input_pos=row.positions)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    got = model(row.tokens, mask=row.mask, input_pos=row.positions)
    torch.testing.assert_close(got, expected)
    got.sum().backward()


class OtherAttention(nn.Module):
    pass


class OwnForward(MultiHeadAttention):
    def forward(self, x, y=None, *, mask=None, input_pos=None):
        return x


def _unknown(model):
    model.layers[1].attn = OtherAttention()


def _own_forward(model):
    model.layers[0].attn.__class__ = OwnForward


def _none(model):
    model.layers = nn.ModuleList()


def _cross(model):
    layer = model.layers[0]
    layer.attn.pos_embeddings = None
    model.layers[0] = TransformerCrossAttentionLayer(layer.attn, layer.mlp)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown, r"'layers\.1'.*OtherAttention"),
        (_own_forward, r"'layers\.0\.attn' \(OwnForward\)"),
        (_none, "no torchtune attention module"),
        (_cross, r"'layers\.0' attends to an encoder"),
    ],
)
def test_what_the_patch_cannot_stand_in_for_is_refused(change, message):
    model = FAMILIES["llama3_2"]()
    change(model)
    with pytest.raises(ConfigError, match=message):
        patch_attention(model)


# --- the slot cache ---


def _decode(model: nn.Module, view, tokens: list[int], positions: list[int]) -> torch.Tensor:
    pos = torch.tensor(positions)
    length = max(positions) + 1
    view.decode(pos, length)
    mask = torch.arange(length)[None, None] <= pos[:, None, None]
    return model(torch.tensor(tokens)[:, None], mask=mask, input_pos=pos[:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_cache_equals_full_forwards(name):
    """Three sequences of different lengths in slots of their own, one prefilled later, one moved, the cache grown."""
    model = FAMILIES[name]()
    patch_attention(model)
    sequences = [_tokens(1, n, seed=n)[0] for n in (14, 5, 9)]
    with torch.no_grad():
        full = [model(s[None])[0] for s in sequences]
        view = attach_kv(model, slots=3, capacity=16)

        def check(logits, expected):
            torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)

        # slots 0 and 1: prompts of 10 and 3 tokens, padded to 10
        view.prefill(0)
        padded = torch.zeros(2, 10, dtype=torch.long)
        padded[0], padded[1, :3] = sequences[0][:10], sequences[1][:3]
        logits = model(padded)
        check(torch.stack([logits[0, 9], logits[1, 2]]), [full[0][9], full[1][2]])
        check(_decode(model, view, [sequences[0][10], sequences[1][3]], [10, 3]), [full[0][10], full[1][3]])
        # a third sequence arrives in slot 2
        view.prefill(2)
        check(model(sequences[2][None, :6])[:, 5], [full[2][5]])
        ids = [sequences[0][11], sequences[1][4], sequences[2][6]]
        check(_decode(model, view, ids, [11, 4, 6]), [full[0][11], full[1][4], full[2][6]])
        # sequence 1 is done: sequence 2 moves to its slot, and the cache grows
        view.move([2], [1], length=7)
        view.grow(40)
        check(_decode(model, view, [sequences[0][12], sequences[2][7]], [12, 7]), [full[0][12], full[2][7]])
        heads, head_dim = (4 if name == "phi3" else 2), (32 if "gemma" in name else 16)
        assert all(kv.shape == (3, heads, 40, head_dim) for layer in view.layers for kv in (layer.k, layer.v))
        detach_kv(model)
        torch.testing.assert_close(model(sequences[0][None])[0], full[0])


def test_cache_in_another_dtype():
    model = FAMILIES["llama3_2"]()
    patch_attention(model)
    tokens = _tokens(1, 9)
    with torch.no_grad():
        full = model(tokens)[0, 8]
        view = attach_kv(model, slots=1, capacity=9, dtype=torch.bfloat16)
        view.prefill(0)
        model(tokens[:, :8])
        got = _decode(model, view, [int(tokens[0, 8])], [8])[0]
    assert view.layers[0].k.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, full, rtol=0.05, atol=0.2)


def test_cache_needs_the_patch():
    with pytest.raises(ConfigError, match="patch_attention"):
        attach_kv(FAMILIES["llama3_2"](), slots=1, capacity=8)
