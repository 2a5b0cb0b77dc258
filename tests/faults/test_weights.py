"""Weights that are not finite: noticed when they are loaded, after the last update, and before anything is exported."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from spin_recipe import SPINRecipe

from spin.checkpoint import SPINCheckpointer
from spin.core.errors import CheckpointError, NonFiniteError
from spin.core.ranks import init_world
from spin.model.build import build_model, prepare_model
from tests.quantizable import QUANTIZED, quantizable
from tests.recipes.helpers import adapters_config, changing_loss, run, run_adapters, step_of, tiny_config

SHORT = ("max_iterations=1", "max_epochs=1", "lr_scheduler.warmup=0", "optimizer.weight_decay=0")
NO_VALIDATION = (*SHORT, "validation_dataset=null")


def saved(folder):
    """What a run has left for others to load."""
    exports = [str(p.relative_to(folder)) for p in folder.glob("*/*") if p.name in ("hf_model", "adapter")]
    return sorted(exports) + sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- the last update


@pytest.mark.parametrize(
    ("run_of", "changes", "message"),
    [
        (run, (*NO_VALIDATION, "optimizer.lr=1e9"), "step 1: log-prob of the last batch is nan after the last update"),
        (
            run_adapters,
            (*NO_VALIDATION, "optimizer.lr=1e10", "model.lora_alpha=1e18"),
            r"step 1: log-prob of the last batch is .*resume_with_changes=\[optimizer\]",
        ),
        (run, (*SHORT, "optimizer.lr=1e9"), "step 1: val_loss is nan after the last update, though every weight is"),
    ],
    ids=["all weights", "adapters", "validation"],
)
def test_a_step_far_too_large_exports_nothing_and_says_so(tmp_path, run_of, changes, message):
    """The weights are finite; what they give is not."""
    with pytest.raises(NonFiniteError, match=message):
        run_of(tmp_path, *changes, "max_steps=1")
    assert saved(tmp_path) == []


class Poisons(SPINRecipe):
    """Writes NaN into one tensor after its second step, which no loss of a row needs to see."""

    def train_single_step(self, batch):
        step = super().train_single_step(batch)
        if step_of(self) == 2:
            with torch.no_grad():
                self._model.tok_embeddings.weight[-1, -1] = math.nan  # a token that no text has
        return step


def test_the_tensors_are_named_and_the_last_good_checkpoint_is_kept(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 2: .*NaN or infinity in the weights tok_embeddings\.weight\."):
        run(tmp_path, *NO_VALIDATION, "save_interval=1", "checkpointer.keep_last=1", recipe_class=Poisons)
    assert saved(tmp_path) == ["step_00000001"]
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in the weights tok_embeddings\.weight\."):
        run(tmp_path, *NO_VALIDATION, "max_steps=2", recipe_class=Poisons)
    assert saved(tmp_path) == ["step_00000001"]
    assert step_of(run(tmp_path, *NO_VALIDATION)) == 5  # and the run can go on from there
    assert saved(tmp_path)[-1] == "step_00000005" and "iteration_000/hf_model" in saved(tmp_path)


def test_a_batch_that_is_left_out_is_not_taken_for_the_weights(tmp_path):
    """``on_nonfinite: skip`` with a last batch that has no finite loss: the weights are those of before, and good."""

    def poison(recipe, losses):
        return losses * math.nan if step_of(recipe) == 4 else losses

    class LastBatch(changing_loss(poison)):
        def _eval_losses(self, pairs):
            raise AssertionError("the batch that was left out was asked again")

    changes = ("on_nonfinite=skip", "save_interval=5", "validation.table_rows=0")
    run(tmp_path, *NO_VALIDATION, *changes, recipe_class=LastBatch)
    assert "iteration_000/hf_model" in saved(tmp_path)


# ---- exports


@pytest.fixture
def model(tiny_lm):
    """The trained tiny model, and the ranks."""
    world = init_world("cpu")
    model = build_model(tiny_config("unused").model, torch.float32)
    prepare_model(model, world, compute_dtype=torch.float32)
    SPINCheckpointer(str(tiny_lm), "unused", "LLAMA3_2").load_model(model, world)
    return model, world


def test_fp16_that_cannot_hold_a_weight_is_refused_by_name_and_the_old_export_stands(model, tiny_lm, tmp_path):
    model, world = model
    checkpointer = SPINCheckpointer(str(tiny_lm), str(tmp_path), "LLAMA3_2", export_dtype="fp16")
    out = checkpointer.export(model, 0, world)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with torch.no_grad():
        model.layers[1].mlp.w2.weight[3, 5] = 65504.0  # the largest that it holds
    checkpointer.export(model, 1, world)
    with torch.no_grad():
        model.layers[1].mlp.w2.weight[3, 5] = -65520.0
        model.norm.scale[0] = 1e5
    with pytest.raises(
        CheckpointError, match=r"float16 ends at 6\.55e\+04, .*layers\.1\.mlp\.w2\.weight, norm\.scale go"
    ):
        checkpointer.export(model, 0, world)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["hf_model"]
    SPINCheckpointer(str(tiny_lm), str(tmp_path), "LLAMA3_2", export_dtype="bf16").export(model, 0, world)
    checkpointer.close()


# ---- loading


def poisoned(tiny_lm, folder, value=math.nan):
    """A copy of a model folder with one number that is none."""
    if not folder.exists():
        shutil.copytree(tiny_lm, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][1, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "kind"), [(math.nan, "full"), (-math.inf, "full"), (math.inf, "lora"), (math.nan, "nf4")]
)
def test_a_model_folder_with_nan_is_refused_before_any_response(tmp_path, tiny_lm, value, kind):
    """Before it is quantized too."""
    folder = quantizable(tiny_lm, tmp_path / "model") if kind == "nf4" else tmp_path / "model"
    poisoned(tiny_lm, folder, value)
    config_of = tiny_config if kind == "full" else adapters_config
    quantized = QUANTIZED if kind == "nf4" else ()
    recipe = SPINRecipe(config_of(tmp_path / "out", *SHORT, *quantized, f"checkpointer.checkpoint_dir={folder}"))
    with pytest.raises(
        CheckpointError, match=rf"{folder}: NaN or infinity in model\.layers\.2\.mlp\.up_proj\.weight \(model\.safetens"
    ):
        recipe.setup()
    assert not (tmp_path / "out" / "iteration_000").exists()


def test_a_checkpoint_with_nan_is_neither_saved_nor_loaded(model, tmp_path, monkeypatch):
    model, world = model
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2", async_save=False)
    with torch.no_grad():
        model.norm.scale[0] = math.inf
    arguments = {"model": model, "optimizer": None, "world": world}
    with pytest.raises(NonFiniteError, match=r"step_00000001: NaN or infinity in the weights norm\.scale\."):
        checkpointer.save(step=1, state={}, **arguments)
    assert list(checkpointer.checkpoints_dir.glob("*")) == []
    with monkeypatch.context() as patch:
        patch.setattr("spin.checkpoint.checkpointer.check_weights", lambda *_: None)
        path = checkpointer.save(step=1, state={}, **arguments)
    with pytest.raises(CheckpointError, match=r"step_00000001: was saved with NaN or infinity in norm\.scale"):
        checkpointer.load(path, **arguments)
