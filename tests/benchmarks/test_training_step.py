"""The benchmark's count of work, its arms' gradients, and its command on a tiny model."""

import json
import sys
from dataclasses import replace

import arms
import numpy as np
import pytest
import torch
import training_step
import work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spin.core.ranks import shutdown
from spin.data import pack_row
from spin.reference.logprobs import pair_objective, response_logps


@pytest.fixture
def bench():
    """The tiny model, one rank."""
    yield training_step.Bench(training_step.parse_args(["--model", "tiny", "--device", "cpu", "--rounds", "1"]))
    shutdown()


def counted(function):
    """FLOPs of forward and backward by torch's counter; attention through plain products, of which it counts each."""
    # it knows addmm, and not the in-place form
    product = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=product) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("head_products", [3, 4])
def test_the_engine_does_the_counted_work(bench, head_products):
    """Dense attention computes all s * s scores of a row, and padding passes the layers; else nothing is added."""
    pairs = bench.mixed_pairs("short", 4)
    row = pack_row(pairs, 256)
    model = bench.model("eager")
    objective = arms.objective_of(row)
    losses = {3: lambda: pair_objective(model, row, objective)[0], 4: lambda: objective(response_logps(model, row))}
    expected = work.flops(
        bench.sizes, tokens=256, predictions=row.targets.numel(), visible=256 * 256, head_products=head_products
    )
    assert counted(lambda: losses[head_products]().backward()) == expected


def test_the_baseline_does_the_counted_work(bench):
    """Concatenated and padded: every token of both sequences passes the layers and the head."""
    (batch,) = arms.padded_batches(bench.mixed_pairs("short", 4), replace(bench.layout, micro_batch=4))
    sequences, length = batch.tokens.shape
    expected = work.flops(
        bench.sizes, tokens=sequences * length, predictions=sequences * length, visible=sequences * length * length
    )
    model = bench.model("torchtune")
    assert counted(lambda: arms.padded_loss(model, batch, 0).backward()) == expected


def test_sizes_by_hand(bench):
    """Tiny Llama: q and output 64 x 64, k and v 64 x 32, three MLP matrices of 64 x 128, two layers."""
    assert bench.sizes == work.Sizes(2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2, 64, 64, 512)


def test_floor_counts_what_the_mask_shows():
    sizes = work.Sizes(layer_weights=5, layers=3, attention_dim=7, dim=11, vocab_size=13)
    pairs = work.random_pairs([4, 9], [[3, 5], [2, 6, 1]], 13, 1.0)
    row = pack_row(pairs)  # no padding
    expected = work.flops(sizes, tokens=30, predictions=17, visible=int(row.dense_mask().sum()))
    assert work.floor_of_work(sizes, pairs) == expected


@pytest.mark.parametrize("mix", work.MIXES)
def test_lengths_have_the_means_of_the_mix(mix):
    pairs = work.mixed_pairs(mix, 64, 1000, 1.0)
    parts = zip(*((p.prompt_ids, p.real_ids, p.generated[0].token_ids) for p in pairs), strict=True)
    for part, mean in zip(parts, work.MIXES[mix], strict=True):
        lengths = np.array([len(ids) for ids in part])
        assert lengths.mean() == pytest.approx(mean, abs=0.5)
        assert 0.4 < np.log(lengths).std() < 0.7  # log-normal, and as wide as real data
        assert lengths.max() <= work.LONGEST


@pytest.mark.parametrize("name", [name for name in arms.ARMS if name != "padded"])
def test_gradients_of_every_arm_equal_the_baselines(bench, name):
    pairs = bench.mixed_pairs("long", 6)

    def gradients(name):
        arm = arms.ARMS[name]
        bench.zero_grads()
        loss = bench.forward_backward(arm, bench.lay_out(arm, pairs), len(pairs))
        return loss, {key: p.grad.to_local().clone() for key, p in bench.model(arm.variant).named_parameters()}

    expected_loss, expected = gradients("padded")
    loss, got = gradients(name)
    assert 0.1 < expected_loss < 2  # near ln 2: the gradient is not that of a saturated loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert got.keys() == expected.keys()
    for key, wanted in expected.items():
        assert (got[key] - wanted).norm() <= 1e-5 * wanted.norm(), key


def test_kernels_fall_into_groups():
    """Names as torch's profiler gave them on an H100."""
    groups = {
        "matmul": ["nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128"],
        "attention": ["triton_tem_fused_flex_attention_backward_mul_transpose_view_5"],
        "head softmax": [
            "triton_red_fused__to_copy_amax_exp_gather_log_sub_sum_0",
            "triton_poi_fused__to_copy_arange_copy_eq_exp_mul_sub_0",
        ],
        "elementwise, normalization": [
            "triton_poi_fused_mul_silu_3", "triton_red_fused_add_expand_mean_mul_pow_rsqrt_1",
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
        ],
        "optimizer": ["void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"],
        "communication": ["ncclDevKernel_ReduceScatter_Sum_f32_RING_LL"],
        "copies": ["Memcpy DtoD (Device -> Device)"],
        "other": ["something new"],
    }  # fmt: skip
    for group, kernels in groups.items():
        assert {training_step.group_of(kernel) for kernel in kernels} == {group}


def test_all_sections_and_the_table_from_the_file(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.json"
    command = ["training_step.py", "--model", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(out)]
    sections = ["ladder,head", "--mixes", "third"], ["optimizer_step,reference,scaling,profile"]
    for what in sections:
        monkeypatch.setattr(sys, "argv", [*command, "--what", *what])
        training_step.main()
    printed = capsys.readouterr().out
    results = json.loads(out.read_text(encoding="utf-8"))
    assert set(training_step.WHAT) < results.keys()
    assert all(run["pairs_per_second"] > 0 for run in results["ladder"]["third"]["arms"].values())
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--table", str(out)])
    training_step.main()
    table = capsys.readouterr().out
    assert printed.endswith(table)
    for arm in arms.ARMS.values():
        assert arm.title in table
    monkeypatch.setattr(sys, "argv", [*command, "--chunk-tokens", "77"])
    with pytest.raises(SystemExit, match="Choose another --out"):
        training_step.main()
    shutdown()


@pytest.mark.slow
def test_two_ranks_share_the_batch(measured_by):
    """Both ranks' losses and gradients add up to those of fp32 on all pairs, which the command checks itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--model", "tiny", "--device", "cpu", "--rounds", "1", "--what", "ladder", "--arms", "padded,long"]
    results, printed = measured_by(*launcher, "benchmarks/training_step.py", *arguments)
    assert results["setup"]["devices"] == 2
    assert results["check"]["long"]["gradient_deviation"] < 1e-5
    assert printed.count("**Forward and backward**") == 1
