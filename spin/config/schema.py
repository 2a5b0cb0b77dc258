"""The configs of the recipes as typed models: each key's default, type, range, choices and meaning stand here, once.

A recipe of your own adds its keys by a subclass, ``class MyConfig(SPINConfig): my_key: int = 1``, and takes it by
``@config.parse(MyConfig)``. Descriptions are what ``spin cp NAME FILE --full`` writes behind the keys.
"""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from omegaconf import DictConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr
from pydantic.fields import FieldInfo

COMPONENT = "_component_"


class Section(BaseModel):
    """A part of a config: values are not converted (``"3"`` is no number), and no other keys are taken."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    _written: DictConfig | None = PrivateAttr(default=None)  # as config.yaml has it: variables are not resolved

    def __getitem__(self, key: str) -> Any:
        """The value of a key, as in a mapping."""
        return getattr(self, key)

    def keys(self) -> list[str]:
        """The names of all keys: ``**section`` are keyword arguments."""
        return list(type(self).model_fields)


class Component(Section):
    """A section that names a class or function, ``_component_``, and has its arguments beside the recipe's own keys."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    component: str = Field(alias="_component_")
    own: ClassVar[tuple[str, ...]] = ()  # fields that are the recipe's and no arguments
    _where: str = PrivateAttr(default="config")  # the section's place in the config
    _packages: tuple[str, ...] = PrivateAttr(default=())  # of the user's own that it may name

    if TYPE_CHECKING:  # arguments are attributes, of any type

        def __getattr__(self, name: str) -> Any: ...

    def __getitem__(self, key: str) -> Any:
        """The value of an argument."""
        return getattr(self, "component" if key == COMPONENT else key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of an argument, or a default where the section does not have it."""
        return getattr(self, "component" if key == COMPONENT else key, default)


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by the names of their keys."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_of(hint: Any) -> type[Section] | None:
    """The section that a field holds, or may hold."""
    parts = get_args(hint) or (hint,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key of a config: its default (``...``: it must be set), its meaning, and what its value may be."""
    return Field(default=default, description=description, **limits)


def _time_limit(text: str) -> str:
    if not re.fullmatch(r"\d+:\d+:\d+:\d+", text):
        raise ValueError("expected DD:HH:MM:SS, for example 00:03:30:00 for three and a half hours.")
    return text


def _catchable(name: str) -> str:
    if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
        raise ValueError(f"{name!r} is no signal that a run can catch, as SIGTERM is.")
    return name


def _folder(path: str) -> str:
    if not path.strip() or "\0" in path:
        raise ValueError("expected a folder's path.")
    return path


Fraction = Annotated[float, Field(ge=0, le=1, title="a fraction")]
Batches = Annotated[int, Field(ge=0, le=10**9, title="a whole number of batches")]
Limit = Literal[-1] | Batches | Fraction | None
Interval = Batches | Annotated[float, Field(ge=0, le=1, title="a fraction of the epoch")]
Beta = Annotated[float, Field(gt=0, le=1e6)]
LearningRate = Annotated[float, Field(gt=0, le=1e10)]
Text = Annotated[str, Field(min_length=1, title="texts that are not empty")]
TokenId = Annotated[int, Field(title="token ids, which are whole numbers")]
TrainedDtype = Literal["fp32", "bf16"]  # fp16 would need its loss scaled
Attention = Literal["auto", "flex", "dense"]
ACMode = Literal["full", "selective"]
OnNonfinite = Literal["stop", "skip"]
Action = Literal["warn", "stop", "rollback"]
Truncated = Literal["keep", "mask", "drop"]
KeepOrDrop = Literal["keep", "drop"]
Schedule = Literal["linear", "cosine", "constant"]


class Sampling(Section):
    """How responses are generated."""

    temperature: float = key(1.0, "lower if responses are odd; 0: greedy; 1: as the model is", ge=0, le=1e3)
    top_k: int = key(0, "keep the k most probable tokens, against odd responses; 0: all", ge=0, lt=2**31)
    top_p: float = key(1.0, "keep the most probable tokens of this mass, likewise; 1: all", gt=0, le=1)
    repetition_penalty: float = key(1.0, "above 1 against loops: repeated tokens are less probable", gt=0, le=1e3)
    min_new_tokens: int = key(1, "higher against short responses: no stop token before", ge=0, le=2**24)
    max_new_tokens: int = key(256, "the length of your real responses; longer ones are truncated", ge=1, le=2**24)
    stop_token_ids: list[TokenId] = key([], "for stop tokens that the tokenizer does not name")
    stop_strings: list[Text] = key([], "for a base model that goes on after its response: texts that end it")

    @property
    def greedy_by(self) -> str | None:
        """The key, if any, that leaves nothing to chance: all responses to a prompt are then the same."""
        greedy = {
            "temperature": self.temperature < 1e-5,  # from there on vLLM takes the most probable token
            "top_k": self.top_k == 1,
            "top_p": self.top_p <= 1e-6,  # below the largest probability of any distribution over a vocabulary
        }
        return next((name for name, is_greedy in greedy.items() if is_greedy), None)


class Checker(Component):
    """A function of the user's own that says of each response whether it is right: information from outside."""

    right_weight: Fraction = key(0.0, "weight in the loss of responses that it calls right; 0: they are dropped")
    unknown_weight: Fraction = key(1.0, "weight of those of which it says None; 0: they are dropped")
    own: ClassVar[tuple[str, ...]] = ("right_weight", "unknown_weight")


class Pairs(Section):
    """Which pairs are trained on, and how they are packed into rows."""

    responses_per_prompt: int = key(1, "more for more pairs from few prompts; a prompt is computed once", ge=1, le=1024)
    history: int = key(0, "more against forgetting: earlier iterations that are trained on too", ge=0, le=10_000)
    history_fraction: Fraction = key(1.0, "less for shorter iterations: of each earlier iteration's pairs")
    truncated: Truncated = key("keep", "those that max_new_tokens truncated; if there are many: keep | mask | drop")
    equal_to_real: KeepOrDrop = key("keep", "drop if the model knows many responses by heart: keep | drop")
    empty: KeepOrDrop = key("drop", "responses without text; keep if that may be right: keep | drop")
    checker: Checker | None = key(
        None, "if a program can tell right from wrong responses: a function of yours, such as my_checker.check"
    )
    prompts_per_shard: int = key(256, "fewer if often killed: a restart may generate them again", ge=1, le=2**20)
    row_tokens: int = key(8192, "longest packed row; lower when memory runs out; higher is faster", ge=1, le=2**24)
    row_multiple: int = key(128, "higher for fewer shapes to compile; rows are padded to this", ge=1, le=2**16)


class Validation(Section):
    """What is measured on the validation set besides the supervised loss."""

    spin: bool = key(False, "true for SPIN loss and accuracy on held-out prompts; generates for them too")
    at_start: bool = key(True, "false to start sooner; true: also before the first step, for comparison")
    table_rows: int = key(4, "sample responses to read, written at each validation", ge=0, le=10_000)
    fixed_prompts: int = key(
        0, "held-out prompts that are answered before self-play and after each iteration; a few", ge=0, le=1000
    )


class LRScheduler(Section):
    """The learning rate over an iteration."""

    name: Schedule = key("linear", "linear | cosine | constant; restarts in each iteration")
    warmup: Annotated[int, Field(ge=0, le=10**9, title="a whole number of steps")] | Fraction = key(
        0.1, "int: steps; float: fraction of the iteration's steps"
    )
    min_ratio: Fraction = key(0.0, "above 0 if learning stalls at the end: fraction of lr that is left there")


class SFT(Section):
    """The supervised fine-tuning that a run may begin with, by ``spin_sft``; what is not here, the run's keys say."""

    epochs: int = key(1, "more while val_loss still falls: passes over the data set", ge=1, le=10_000)
    lr: LearningRate | None = key(None, "null: 2e-5 for all weights, 3e-4 for adapters; a hundred times that of SPIN")
    lr_scheduler: LRScheduler = LRScheduler(name="cosine")
    limit_train_batches: Limit = key(1.0, "less to try it: fewer steps of an epoch. int: batches; float: fraction")


class WatchLimit(Section):
    """A limit and what passing it does."""

    limit: float | None = key(None, "lower to hear of it earlier; null: no limit", gt=0)
    action: Action = key("warn", "warn | stop | rollback to the iteration's start; the last two where nobody watches")


class LengthLimit(WatchLimit):
    """A limit of a ratio, or of its inverse."""

    limit: float | None = key(2.0, "lower to hear of it earlier; null: no limit", gt=1)


class Watch(Section):
    """What a policy looks like that self-play is ruining."""

    window: int = key(
        20, "more if small batches make noise: steps averaged for real_nll_rise, acc and margin", ge=1, le=10**6
    )
    val_loss: WatchLimit = key(WatchLimit(limit=0.25), "fraction that the validation loss may be above its lowest")
    val_loss_collapse: WatchLimit = key(
        WatchLimit(limit=0.4, action="stop"), "the same, of a model that is being ruined"
    )
    real_nll_rise: WatchLimit = key(
        WatchLimit(limit=0.25), "fraction by which the NLL of real responses may rise in an iteration"
    )
    acc: WatchLimit = key(
        WatchLimit(limit=0.99), "above, the policy prefers nearly every real response: little is left to learn"
    )
    margin: WatchLimit = key(WatchLimit(limit=5.0), "above, the loss is flat")
    truncated_fraction: WatchLimit = key(WatchLimit(limit=0.5), "of an iteration's responses")
    equal_fraction: WatchLimit = key(
        WatchLimit(limit=0.5), "of an iteration's responses, those equal to the real one: nothing is learned from them"
    )
    gradient_checks: Annotated[int, Field(ge=0, le=1000, title="a whole number")] | None = key(
        None,
        "how often in an iteration to compare SPIN's gradient with SFT's; null: up to 4, for 2 % of its steps",
    )
    length_drift: LengthLimit = key(LengthLimit(), "mean length of responses: times, or one in, that of iteration 0")


class Loss(Component):
    """The loss, given beta by the recipe."""

    beta: Beta | list[Beta] = key(..., "the paper's lambda; lower: bigger moves. A list: one per iteration")


class Optimizer(Component):
    """The optimizer, given its learning rate by the recipe."""

    lr: LearningRate | list[LearningRate] = key(..., "lower if real_nll_rise alerts; a list: one per iteration")
    reset_each_iteration: bool = key(True, "false for short iterations: moments stay although the opponent has changed")
    own: ClassVar[tuple[str, ...]] = ("reset_each_iteration",)


def component(name: str, /, **arguments: Any) -> Any:
    """The default of a section that names a component; its arguments hold while the config keeps the component."""
    return {COMPONENT: name, **arguments}


class Config(Section):
    """What the configs of all recipes have."""

    output_dir: Annotated[str, AfterValidator(_folder)] = key(
        "runs/spin", "one for each run: checkpoints, logs, pairs, exports"
    )
    dataset: Component = key(component("spin.data.prompt_dataset"), "prompts with real responses")
    sampling: Sampling = Sampling()
    compute_dtype: Literal["auto", "fp32", "bf16"] = key(
        "auto", "of the arithmetic. auto: bf16 where the device is fast in it | fp32, to compare runs | bf16"
    )
    device: Literal["cpu", "cuda"] | None = key(None, "cuda | cpu, to try a config; null: a GPU if there is one")
    distributed_timeout_seconds: float = key(300, "more for slow storage; ends the run of silent ranks", ge=1, le=86400)
    seed: int = key(42, "another to see how results vary: order of samples, every sampled token", ge=-(2**63), lt=2**63)
    allow_components: list[str] = key([], "packages of yours that _component_ names; on the command line only")


class SPINConfig(Config):
    """The config of ``spin_recipe``."""

    resume: Annotated[str, Field(min_length=1, title="auto, never, or the folder of a checkpoint")] = key(
        "auto", "auto: the newest checkpoint, if any | never: from the start | path of a checkpoint"
    )
    resume_with_changes: list[str] = key([], "keys that you changed on purpose since the run that is resumed")
    model: Component = key(component("spin.model.from_hf", path="???"), "path: a Hugging Face folder or name")
    tokenizer: Component = key(component("spin.data.ChatTokenizer"), "with the folder's own chat template")
    checkpointer: Component = key(component("spin.checkpoint.SPINCheckpointer"), "LoRACheckpointer with adapters")
    validation_dataset: Component | None = key(
        None, "to see overfitting on held-out prompts; null: those of dataset.validation_fraction, if any"
    )
    validation: Validation = Validation()
    generator: Component = key(component("spin.generators.TorchtuneGenerator"), "how the opponent generates")
    pairs: Pairs = Pairs()
    loss: Loss = Field(default=component("spin.loss.SPINLoss", beta=0.1))
    nll_weight: float = key(0.0, "above 0 if real responses lose probability: weight of their NLL", ge=0, le=1e6)
    optimizer: Optimizer = Field(default=component("torch.optim.AdamW", lr=5e-7))
    lr_scheduler: LRScheduler = LRScheduler()
    sft: SFT = key(SFT(), "of spin_sft, fine-tuning before self-play")
    max_iterations: int = key(3, "rounds of self-play; each starts against the policy of the last", ge=1, le=10_000)
    max_epochs: int = key(2, "passes over the pairs in an iteration", ge=1, le=10_000)
    max_steps: Literal[-1] | Annotated[int, Field(ge=1, le=10**9)] | None = key(
        -1, "to try a config: stop after this many optimizer steps in all; -1: no limit"
    )
    max_time: Annotated[str, AfterValidator(_time_limit)] | None = key(
        None, "for a scheduler's limit, DD:HH:MM:SS: save and stop then; the same command resumes"
    )
    global_batch_size: int = key(64, "prompts per optimizer step, over all ranks", ge=1, le=2**20)
    limit_train_batches: Limit = key(
        1.0, "less for shorter iterations, on other prompts. int: batches; float: fraction"
    )
    limit_val_batches: Limit = key(1.0, "less for shorter validations. int: batches; float: fraction")
    val_check_interval: Interval = key(0.5, "int: every n batches; float: fraction of an epoch")
    save_interval: Interval = key(1.0, "less to lose less when killed. int: every n batches; float: of an epoch")
    stop_signals: list[Annotated[str, AfterValidator(_catchable), Field(title="names of signals")]] = key(
        ["SIGINT", "SIGTERM", "SIGUSR1"],
        "your scheduler's: finish the step, save, stop; the same command resumes",
    )
    clip_grad_norm: float | None = key(1.0, "lower if grad_norm jumps; null: no clipping", gt=0)
    on_nonfinite: OnNonfinite = key("stop", "loss or gradient NaN or infinite: stop | skip, in long runs")
    nonfinite_limit: int = key(5, "with skip: stop after this many batches in a row", ge=1, le=10**9)
    logprob_chunk_tokens: int = key(
        2048, "response tokens per slice of the output layer; lower saves memory", ge=1, le=2**24
    )
    dtype: TrainedDtype = key("fp32", "of trained weights; small learning rates hardly move bf16 ones")
    base_dtype: TrainedDtype | None = key(None, "of frozen weights under adapters; null: compute_dtype | bf16 | fp32")
    attention: Attention = key("auto", "auto: FlexAttention on a GPU in bf16 | flex | dense, slow on long rows")
    enable_activation_checkpointing: bool = key(False, "true saves memory, costs about a third more compute")
    ac_mode: ACMode = key("full", "full: every layer | selective, for speed: every ac_option-th")
    ac_option: int | None = key(None, "for ac_mode=selective; higher saves time, lower saves memory", ge=1, le=10_000)
    compile: bool = key(False, "torch.compile each layer: a minute more to start, then 1.5 times faster")
    enable_float8_training: bool = key(
        False,
        "true: the layers' products in float8, for spin_sft; too coarse for self-play; H100 and later, with compile",
    )
    self_test: bool = key(
        True, "false to skip tests of the arithmetic: logits, and the loss of two equal models in each iteration"
    )
    watch: Watch = Watch()
    metric_logger: Component | list[Component] | None = key(
        None, "trackio, W&B, TensorBoard, ...: one or a list of them; null: metrics.jsonl alone"
    )
    log_every_n_steps: int = key(1, "more to spare a slow logging service", ge=1, le=10**9)
    replicas: int = key(1, "HSDP, for slow links between hosts: groups with all of a model", ge=1, le=2**16)
    fsdp_reshard_after_forward: bool = key(True, "false gathers a layer once per step; more memory")
    fsdp_accumulate_unsharded: bool = key(False, "true reduces gradients once per step; 4 bytes more a weight")
    fsdp_cpu_offload: bool = key(False, "true keeps weights and optimizer in CPU memory; slow")
    deterministic: bool = key(False, "true to debug a GPU run: a restart gives the same bits; slower")

    @property
    def checkpointed_every(self) -> int:
        """Every so many-th layer keeps its input alone for backward; 0: none."""
        every = 1 if self.ac_mode == "full" else self.ac_option or 1
        return every if self.enable_activation_checkpointing else 0

    @property
    def metric_loggers(self) -> list[Component]:
        """``metric_logger`` as a list."""
        given = self.metric_logger
        return given if isinstance(given, list) else [] if given is None else [given]


class SFTConfig(SPINConfig):
    """The config of ``spin_sft``: that of the run."""


class GenerateConfig(SPINConfig):
    """The config of ``spin_generate``: that of the run, and which of several machines this one is."""

    worker: int = key(0, "number of this machine, from 0", ge=0, lt=4096)
    num_workers: int = key(1, "machines that generate", ge=1, le=4096)


class EvaluatedModel(Section):
    """A model of an evaluation."""

    name: str | None = key(None, "if folders are called the same; null: the folder's or iteration's")
    checkpoint_dir: str | None = key(None, "Hugging Face folder or name; null for a server, which has its own model")
    model_type: str | None = key(None, "for a builder of torchtune: its name of the weight layout")
    model: Component | None = None
    tokenizer: Component = Field(default=component("spin.data.ChatTokenizer"))
    generator: Component = Field(default=component("spin.generators.TorchtuneGenerator"))


JUDGE_TEMPLATE = """\
Two assistants answered the same prompt. Decide which answer serves the user better: correct, relevant, complete,
clear. Do not let the order of the answers or their length sway you.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Say briefly what decides, then end with your verdict in this form: [[A]] if answer A is better, [[B]] if answer B is
better, [[C]] if neither is.
"""


class Judge(EvaluatedModel):
    """The model that compares two responses."""

    tokenizer: Component | None = None  # type: ignore[assignment]
    sampling: Sampling = Sampling(temperature=0.0, max_new_tokens=512)
    system_prompt: str | None = key(None, "if your judge expects one: precedes every question")
    template: str = key(JUDGE_TEMPLATE, "to ask for other criteria; fields: {prompt}, {first}, {second}, {reference}")
    pattern: str = key(r"\[\[([ABC])\]\]", "goes with the template: a group for A, B or C; the last match counts")


class ExactMatch(Section):
    """How responses are compared with what the data set says."""

    pattern: str | None = key(None, "finds a final answer: its group, at the last match; null: all of the response")
    column: str | None = key(None, "of the data set, with the right answer; null: the real response")
    reference_pattern: str | None = key(None, "as pattern, for the right answer")


class EvaluateConfig(Config):
    """The config of ``spin_evaluate``."""

    candidate: EvaluatedModel = EvaluatedModel()
    baseline: EvaluatedModel = EvaluatedModel()
    verdict: Literal["judge", "exact_match"] = key("judge", "judge | exact_match, for tasks with one right answer")
    judge: Judge = Judge()
    exact_match: ExactMatch = key(ExactMatch(), "read for verdict: exact_match only")
    prompts_per_shard: int = key(64, "fewer if often killed: a restart may generate them again", ge=1, le=2**20)

    @property
    def roles(self) -> tuple[str, ...]:
        """The sections that hold a model which is used."""
        return ("candidate", "baseline", "judge") if self.verdict == "judge" else ("candidate", "baseline")


# Ranges of arguments of components, by section; any other number is below 2**63. The most is far above what makes
# sense, and below what takes a machine down before its own check.
ARGUMENTS: dict[str, tuple[float, float]] = {
    "checkpointer.keep_last": (1, 10**6), "checkpointer.keep_best": (0, 10**6), "checkpointer.keep_exports": (1, 10**6),
    "dataset.limit": (1, 10**12), "dataset.shuffle_buffer": (0, 10**9), "dataset.validation_fraction": (0, 1),
    "generator.batch_size": (1, 2**16), "generator.prefill_batch": (1, 2**16), "generator.concurrency": (1, 2**16),
    "generator.timeout_seconds": (0, 1e7), "generator.wait_seconds": (0, 1e7), "generator.max_model_len": (1, 2**24),
    "model.vocab_size": (1, 2**24), "model.num_layers": (1, 1024), "model.num_heads": (1, 2**16),
    "model.num_kv_heads": (1, 2**16), "model.head_dim": (1, 2**16), "model.embed_dim": (1, 2**20),
    "model.intermediate_dim": (1, 2**22), "model.max_seq_len": (1, 2**24), "model.lora_rank": (1, 2**16),
}  # fmt: skip
