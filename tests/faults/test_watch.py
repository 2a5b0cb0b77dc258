"""The collapse watch: every limit warns, stops or rolls back, at the right moment and with its number."""

import json
import math
import random

import pytest
from spin_recipe import SPINRecipe

from spin.config import SPINConfig, complete, load_config
from spin.config.schema import Watch
from spin.core.errors import CheckpointError, CollapseError
from spin.core.ranks import init_world
from spin.data import Pair, PairStore, Response
from spin.training.watch import LIMITS, CollapseMonitor, response_metrics
from tests.recipes.helpers import REPO, metrics_of, run, step_of, stops_at

QUIET = {name: {"limit": None, "action": "warn"} for name in LIMITS}
SHORT = ("max_iterations=2", "max_epochs=1", "validation_dataset=null", "watch.truncated_fraction.limit=null")


def watch(window=2, is_main=True, **limits):
    return CollapseMonitor({"window": window, **QUIET, **limits}, "runs/my run", is_main)


def step(rise=0.0, acc=0.5, margin=0.0):
    return {"real_nll_rise": rise, "acc": acc, "margin": margin}


@pytest.mark.parametrize(
    ("name", "limit", "value", "shown"),
    [
        ("real_nll_rise", 0.2, step(rise=0.3), "30% above that at the iteration's start"),
        ("acc", 0.9, step(acc=0.95), "acc is 0.950"),
        ("margin", 3.0, step(margin=3.5), "margin is 3.50"),
    ],
)
def test_steps(name, limit, value, shown, caplog):
    """The mean of two steps counts: one bad step among good ones is no alarm, two are; a warning comes once."""
    for action in ("stop", "rollback"):
        watched = watch(**{name: {"limit": limit, "action": action}})
        assert watched.can_roll_back == (action == "rollback")
        assert watched.step(0, 1, value) is None  # the window is not full
        assert watched.step(0, 2, step()) is None
        assert watched.step(0, 3, value) is None
        alarm = watched.step(0, 4, value)
        assert shown in alarm.message and f"watch.{name}.limit={limit}" in alarm.message
        assert alarm.rolls_back == (action == "rollback")
    watched = watch(**{name: {"limit": limit, "action": "warn"}})
    for i in range(1, 6):
        assert watched.step(3, i, value) is None
    assert caplog.text.count(shown) == 1 and "Iteration 3" in caplog.text
    watched.step(4, 1, value)  # an iteration starts with an empty window
    assert caplog.text.count(shown) == 1
    watched.step(4, 2, value)
    assert caplog.text.count(shown) == 2
    quiet = watch(is_main=False, **{name: {"limit": limit, "action": "warn"}})
    quiet.step(0, 1, value), quiet.step(0, 2, value)
    assert caplog.text.count(shown) == 2


def test_gains_and_steps_without_comparisons_are_no_alarm_and_the_state_is_resumed():
    watched = watch(window=1, **{name: {"limit": 1.0, "action": "stop"} for name in ("real_nll_rise", "margin")})
    assert watched.step(0, 1, step(rise=-0.5, margin=-50.0)) is None
    assert watched.step(0, 2, {"lr": 1.0}) is None
    watched, again = (watch(acc={"limit": 0.9, "action": "stop"}) for _ in range(2))
    watched.step(0, 1, step(acc=1.0))
    again.load_state_dict(json.loads(json.dumps(watched.state_dict())))
    assert again.step(0, 2, step(acc=1.0)) is not None


def test_validation_loss_against_the_lowest_so_far(caplog):
    """The losses of a run that collapsed: its fourth is eight times the first, and nothing else moved."""
    limits = {"val_loss": {"limit": 0.25, "action": "warn"}, "val_loss_collapse": {"limit": 1.0, "action": "rollback"}}
    watched = watch(**limits)
    assert watched.can_roll_back
    watched.lowest_val_loss = 0.019
    assert watched.step(0, 40, {"val_loss": 0.0235}) is None and not caplog.text
    assert watched.step(1, 40, {"val_loss": 0.028}) is None
    assert "Iteration 1: the validation loss is 0.028, 47% above its lowest" in caplog.text
    again = watch(**limits)
    again.load_state_dict(json.loads(json.dumps(watched.state_dict())))
    for resumed in (watched, again):
        alert = resumed.step(2, 40, {"val_loss": 0.15})
        assert alert.rolls_back and "watch.val_loss_collapse.limit=1.0" in alert.message
    assert watch(**limits).step(0, 1, {"val_loss": 9.0}) is None  # the first that is measured


@pytest.mark.parametrize(
    ("form", "arm", "seed", "warns", "stops"),
    [
        ("four_epochs", "spin_fast", 0, 0, 1),
        ("four_epochs", "spin", 0, None, None),
        ("four_epochs", "spin_fast_beta1", 0, None, None),
        ("four_epochs", "spin_drop_equal", 0, None, None),
        ("full", "spin_faster", 0, None, 0),
        ("full", "spin_faster", 1, None, 0),
        ("full", "spin_faster", 2, 0, 1),
        *(("full", arm, seed, None, None) for arm in ("spin", "spin_fast", "spin_k4") for seed in range(3)),
        *(("half_billion", arm, seed, None, 0) for arm in ("spin_fast", "spin_fast_beta1") for seed in range(2)),
        *(("half_billion", arm, 2, None, 1) for arm in ("spin_fast", "spin_fast_beta1")),
        *(("half_billion", "gentle_spin_fast", seed, None, 0) for seed in range(3)),
        *(("half_billion", f"spin{kind}", seed, None, None) for kind in ("", "_hot", "_checker") for seed in range(3)),
        *(("half_billion", "gentle_spin", seed, warns, None) for seed, warns in enumerate((0, None, 0))),
        *(("full", "paper_spin_fast", seed, None, 0) for seed in (0, 1, 2, 6, 8)),
        ("four_epochs", "paper_spin_fast", 0, None, 0),
        *(
            ("small", "spin_fast", seed, warns, stops)
            for seed, warns, stops in ((0, None, 0), (1, 2, None), (2, None, 1))
        ),
        *(("small", "spin_fast_beta1", seed, warns, None) for seed, warns in enumerate((2, None, 1))),
    ],
)
def test_default_limits_on_real_models_that_self_play_ruined(form, arm, seed, warns, stops, caplog):
    """The experiments' validation losses, as docs/restarts.md has them: a large model's collapse is warned of or
    stopped in its first iteration, but for two that began late and are stopped in their second."""
    jobs = json.loads((REPO / f"docs/experiments/checkable_{form}.json").read_text())
    its_start = next((f"{kind}_start" for kind in ("gentle", "paper") if arm.startswith(kind)), "start")
    start, measured = (
        next(job for job in jobs if (job["arm"], job["seed"]) == (each, seed)) for each in (its_start, arm)
    )
    watched = CollapseMonitor(Watch(), "runs/my run", is_main=True)
    watched.lowest_val_loss = start["iterations"][-1]["val_loss"]
    losses = enumerate(row["val_loss"] for row in measured["iterations"])
    stopped = next((i for i, loss in losses if watched.step(i, 48, {"val_loss": loss}) is not None), None)
    assert stopped == stops and (f"Iteration {warns}: the validation loss" in caplog.text) == (warns is not None)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_no_number_passes_every_limit_and_is_not_the_lowest(loss):
    watched = watch(val_loss={"limit": 100.0, "action": "stop"})
    assert watched.step(0, 1, {"val_loss": 2.0}) is None
    assert f"the validation loss is {loss}" in watched.step(0, 2, {"val_loss": loss}).message
    assert watched.lowest_val_loss == 2.0
    assert watched.step(0, 3, {"lr": 1.0}) is None


def test_responses_equal_to_the_real_ones(tmp_path):
    store = PairStore.open_or_create(tmp_path / "responses", {"opponent": "w"}, 2)
    for shard, response in enumerate(([2, 3], [2])):
        store.write_shard(shard, [Pair(f"s{shard}", 0, [1], [2, 3], [Response(response, "stop")])])
    found = response_metrics(tmp_path, tmp_path, init_world("cpu"))
    assert found["equal_fraction"] == 0.5
    with pytest.raises(CollapseError, match=r"50.0% of the opponent's responses equal the real ones"):
        watch(equal_fraction={"limit": 0.4, "action": "stop"}).start(0, found)


def test_responses_against_iteration_0(tmp_path):
    """Lengths 2 and 4, then 9 and 3: twice as long; one of two is cut."""
    world = init_world("cpu")
    for name, lengths in (("first", (2, 4)), ("now", (9, 3))):
        store = PairStore.open_or_create(tmp_path / name / "responses", {"opponent": "w"}, 2)
        for shard, length in enumerate(lengths):
            reason = "length" if length == 9 else "stop"
            store.write_shard(shard, [Pair(f"s{shard}", 0, [1], [2], [Response([5] * length, reason)])])
    found = response_metrics(tmp_path / "now", tmp_path / "first", world)
    assert found == {"truncated_fraction": 0.5, "equal_fraction": 0.0, "length_drift": 2.0}
    gone = response_metrics(tmp_path / "now", tmp_path / "gone", world)
    assert gone == {"truncated_fraction": 0.5, "equal_fraction": 0.0}
    watch().start(1, found)
    quiet = watch(length_drift={"limit": 2.0, "action": "stop"})
    quiet.start(1, found)
    assert quiet.metrics == {"length_drift": 2.0, "equal_fraction": 0.0}
    for limit, drift in ((1.9, 2.0), (1.9, 0.5)):
        strict = watch(length_drift={"limit": limit, "action": "stop"})
        with pytest.raises(CollapseError, match=f"{drift:.2f} times as long as in iteration 0.*Nothing was trained"):
            strict.start(1, found | {"length_drift": drift})
    with pytest.raises(CollapseError, match=r"50\.0%.* pairs 'runs/my run/iteration_000/responses' --sample 5`"):
        watch(truncated_fraction={"limit": 0.4, "action": "rollback"}).start(0, found)


def collapses(iteration):
    """A recipe whose margin is 9 throughout an iteration."""

    class Collapses(SPINRecipe):
        def train_single_step(self, batch):
            step = super().train_single_step(batch)
            step.metrics |= {"margin": 9.0} if step.metrics["iteration"] == iteration else {}
            return step

    return Collapses


def without_margin(output_dir):
    return [{name: value for name, value in row.items() if name != "margin"} for row in metrics_of(output_dir)]


@pytest.mark.slow
def test_stop_saves_first_and_only_a_change_resumes(tmp_path):
    """Each other limit makes one more step, the last of them the iteration's last."""
    stops = ("watch.window=2", "watch.margin.action=stop")
    for step, limit in ((2, 3.0), (3, 3.1), (4, 3.2), (5, 3.3)):
        limits = (*stops, f"watch.margin.limit={limit}")
        with pytest.raises(CollapseError, match=f"margin is 9.00 .*The run is saved at step {step}; change"):
            run(tmp_path, *SHORT, *limits, recipe_class=collapses(0))
        for _ in range(2):
            with pytest.raises(CollapseError, match="margin is 9.00 .*The run was stopped there; .*margin.limit=null"):
                run(tmp_path, *SHORT, *limits, recipe_class=collapses(0))
        assert metrics_of(tmp_path)[-1]["step"] == step
        assert (tmp_path / "checkpoints" / f"step_{step:08d}").is_dir()
    assert (tmp_path / "iteration_000" / "hf_model").is_dir()
    with pytest.raises(CollapseError, match="Iteration 1: .* The run is saved at step 7"):
        run(
            tmp_path / "copy", *SHORT, *limits, f"resume={tmp_path / 'checkpoints' / 'step_00000005'}",
            "nll_weight=0.5", "resume_with_changes=[nll_weight]", recipe_class=collapses(1),
        )  # fmt: skip
    finished = run(tmp_path, *SHORT)
    unbroken = run(tmp_path / "unbroken", *SHORT)
    assert finished.final_weights == unbroken.final_weights
    assert without_margin(tmp_path) == without_margin(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [0, 1])
def test_rollback_starts_the_iteration_again(tmp_path, iteration):
    """Its steps are undone although only one state is kept, its pairs are not made again, and an optimizer of half the
    rate gives the run that had it from the iteration's start."""
    limits = ("watch.window=3", "watch.margin.action=rollback", "checkpointer.keep_last=1", "save_interval=1")
    message = f"Iteration {iteration}: the margin is 9.00.*back at the iteration's start"
    with pytest.raises(CollapseError, match=message):
        run(tmp_path, *SHORT, *limits, recipe_class=collapses(iteration))
    states = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert states == (["step_00000005"] if iteration else [])
    pairs = tmp_path / f"iteration_00{iteration}" / "pairs" / "manifest.json"
    made = pairs.stat().st_mtime_ns
    rates = "optimizer.lr=[1e-4,5e-5]" if iteration else "optimizer.lr=[5e-5,1e-4]"
    again = run(tmp_path, *SHORT, *limits, rates, "resume_with_changes=[optimizer]")
    assert pairs.stat().st_mtime_ns == made
    unbroken = run(tmp_path / "unbroken", *SHORT, rates)
    assert metrics_of(tmp_path) == metrics_of(tmp_path / "unbroken")
    assert again.final_weights == unbroken.final_weights


def test_a_rollback_to_a_checkpoint_that_was_not_kept_removes_none(tmp_path):
    """Step 5, where iteration 1 starts, went while no limit could roll back: the run so far must not go too."""
    few = ("watch.window=2", "checkpointer.keep_last=1", "save_interval=1")
    run(tmp_path, *SHORT, *few, recipe_class=stops_at(7))
    with pytest.raises(CheckpointError, match=r"^Iteration 1: the margin is 9.00.*cannot go back to step 5"):
        run(tmp_path, *SHORT, *few, "watch.margin.action=rollback", recipe_class=collapses(1))
    states = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert states == ["step_00000008"]  # two steps of 9 from step 7 on pass the limit
    assert step_of(run(tmp_path, *SHORT, *few)) == 10
    drift = {row["iteration"]: row["length_drift"] for row in metrics_of(tmp_path)}
    assert drift[0] == 1.0 and 0 < drift[1] != 1.0


def test_responses_that_are_truncated_stop_the_run_before_it_trains(tmp_path):
    changes = ("max_iterations=1", "validation_dataset=null", "watch.truncated_fraction.action=stop")
    with pytest.raises(CollapseError, match="truncated by sampling.*Nothing was trained on these responses yet"):
        run(tmp_path, *changes)
    assert not (tmp_path / "iteration_000" / "pairs").exists()
    assert (tmp_path / "iteration_000" / "responses").exists()


@pytest.fixture(scope="module")
def sorting(tmp_path_factory):
    """Overrides that have the packaged config go on from a Llama of 137,792 parameters, fine-tuned by ``spin_sft`` (at
    3e-3, for 12 epochs) until it sorted 195 of 200 held-out lists of five numbers."""
    folder, draw = tmp_path_factory.mktemp("sorting"), random.Random(0)
    for name, count in (("train", 512), ("held_out", 100)):
        lists = ([draw.randint(1, 99) for _ in range(5)] for _ in range(count))
        rows = ({"prompt": f"s {_text(each)}", "response": f"#{_text(sorted(each))}"} for each in lists)
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return (
        f"model.path={REPO / 'tests/assets/sorter'}", f"dataset.source={folder / 'train.jsonl'}", "device=cpu",
        f"validation_dataset={{_component_: spin.data.prompt_dataset, source: {folder / 'held_out.jsonl'}}}",
        "compile=false", "enable_activation_checkpointing=false", "optimizer.fused=false", "compute_dtype=fp32",
        "sampling.max_new_tokens=24", "pairs.row_tokens=1024", "generator.batch_size=512", "global_batch_size=32",
        "dataset.max_prompt_tokens=64", "dataset.max_response_tokens=64", "max_iterations=2", "val_check_interval=8",
    )  # fmt: skip


def _text(numbers):
    return " ".join(map(str, numbers))


def selfplay(*overrides):
    recipe = SPINRecipe(complete(load_config("full", list(overrides)), SPINConfig))
    recipe.setup()
    try:
        recipe.train()
    finally:
        recipe.cleanup()


@pytest.mark.slow
def test_a_fine_tuned_model_that_self_play_ruins_is_noticed_and_the_model_before_it_named(sorting, tmp_path, caplog):
    """At a thirtieth of fine-tuning's rate and with beta 0.1 the model unlearns; the SPIN loss shows nothing."""
    ruins = ("optimizer.lr=1e-4", "loss.beta=0.1", "max_epochs=2", "pairs.equal_to_real=keep")
    with pytest.raises(CollapseError, match="watch.val_loss_collapse.limit=0.4, action stop"):
        selfplay(*sorting, *ruins, f"output_dir={tmp_path}")
    assert "above its lowest so far: the policy unlearns" in caplog.text and "Best model: the start by" in caplog.text
    steps = [row for row in metrics_of(tmp_path) if "loss" in row]
    assert steps[-1]["iteration"] == 0 and len(steps) <= 32
    assert sum(row["loss"] for row in steps) / len(steps) == pytest.approx(math.log(2), abs=0.02)


@pytest.mark.slow
def test_the_packaged_configs_choices_keep_a_fine_tuned_model(sorting, tmp_path, caplog):
    """A hundredth of fine-tuning's rate, beta 1, one epoch, no equal pairs."""
    selfplay(*sorting, "optimizer.lr=3e-5", f"output_dir={tmp_path}")
    losses = [row["val_loss"] for row in metrics_of(tmp_path) if "val_loss" in row]
    assert max(losses) < 1.1 * losses[0] and "unlearns" not in caplog.text
