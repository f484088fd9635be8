"""The nouns of the grammar: `Recipe`, `Data`, `Model`, `Training` and the four stages.

They only record what they are given, so that a recipe file never fails half-way: all mistakes of a recipe are found
together by `checking.resolve`, before torch is imported. What a noun accepts is its constructor's signature.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from typing import Annotated, Any, Literal

from pydantic import Field

from kt_hf import settings

Positive = Annotated[int, Field(gt=0, le=10**9)]
NotNegative = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Repetitions = Annotated[int, Field(gt=0, le=1000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=100)]
Named = str | dict[str, Any]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Tracker = Literal[
    "none", "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"
]


class Noun:
    """Records the settings it was given. After `resolve`, its settings are attributes with defaults filled in."""

    given: dict[str, Any]

    def __init_subclass__(cls) -> None:
        """Let a constructor accept that settings are missing; that too is found when all mistakes are."""
        super().__init_subclass__()
        if "__init__" not in cls.__dict__:
            return

        @functools.wraps(cls.__init__)
        def accept(self: Noun, *args: Any, **kwargs: Any) -> None: ...

        cls.__init__ = accept  # type: ignore[method-assign, assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> Noun:
        noun = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(noun, *args, **kwargs)
        given = dict(list(bound.arguments.items())[1:])
        given.update(given.pop("unknown", {}))
        noun.given = given
        for name, (_, parameter) in settings.parameters(cls).items():
            noun.__dict__[name] = None if parameter.default is parameter.empty else parameter.default
        noun.__dict__.update(given)
        return noun

    def __getattr__(self, name: str) -> Any:  # settings are attributes; this tells type checkers so
        raise AttributeError(f"{type(self).__name__} has no setting '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Noun:
        return type(self)(**copy.deepcopy(self.given, memo))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.given.items())})"

    def plain(self) -> dict[str, Any]:
        return plain(self.given)


class Data(Noun):
    """A data set.

    path: a folder with train/validation/test files, one file, a Hub id, or `digits` (scikit-learn's, for trying
    things out). name: configuration of that data set. columns: role -> column, where they are ambiguous. splits: our
    split -> theirs. where: column -> value or values to keep. labels: names of the classes to keep. k_shot: training
    examples per class. max_examples: at most so many rows per split. validation_size: fraction or number of training
    rows held out when there is no validation split. drop: kinds of rows to drop (all are counted). augment: changes
    of training rows, by name: torchvision v2 transforms of images; WordDropout, WordMask of texts; Noise, Gain, Shift,
    TimeMask, FrequencyMask of sound. label_noise: share of training labels that get another class, for experiments.
    seed: of the subsets, splits and such labels. streaming: read training rows as they are used, in random order within
    every `shuffle_buffer` rows; labels, sizes and baselines are then those of the first rows.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        *,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        splits: dict[Literal["train", "validation", "test"], str] | None = None,
        where: dict[str, Any] | None = None,
        labels: list[str | int] | None = None,
        k_shot: Positive | None = None,
        max_examples: Positive | dict[Literal["train", "validation", "test"], Positive] | None = None,
        validation_size: Annotated[float, Field(gt=0, le=10**9)] = 0.1,
        drop: list[Literal["empty", "duplicates", "overlap", "unlabelled", "unreadable"]] | None = None,
        augment: list[Named] | None = None,
        label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        seed: Seed = 0,
        streaming: bool = False,
        shuffle_buffer: Positive = 1000,
        **unknown: Any,
    ): ...


class Model(Noun):
    """A model: a checkpoint (`path`), or a fresh one (`config`).

    path: a folder, a Hub id, or `@stage`. config: a model type such as `vit` or a folder or Hub id with a
    config.json; `config_overrides` changes its fields. processor: where the tokenizer or image processor comes from,
    if not from the model; replace_head: give the model a new head when its labels differ from the data's. cut_head:
    take those outputs of its head away whose classes the data do not have. image, text, audio, projection_dim: the
    towers of a model that is made of several, and the width of the space they share.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        config: str | None = None,
        config_overrides: dict[str, Any] | None = None,
        processor: str | None = None,
        processor_overrides: dict[str, Any] | None = None,
        replace_head: bool = False,
        cut_head: bool = False,
        image: Named | None = None,
        text: Named | None = None,
        audio: Named | None = None,
        projection_dim: Positive = 512,
        **unknown: Any,
    ): ...


class Training(Noun):
    """Settings of the training loop, with the names and meanings of transformers' `TrainingArguments`.

    learning_rate: one, or a list from which the best on validation data is taken (tried with the stage's first seed),
    or `auto`: a range test of at most 100 steps on the training data, undone afterwards, with the stage's first seed.
    eval_steps, save_steps: every so many optimizer steps; a value below 1 is a fraction of the run, 0 is never.
    Without a value, evaluation is after every epoch but at most ten times, and nothing is saved before the end.
    metric_for_best_model: with load_best_model_at_end or early_stopping_patience; the task's first metric by default.
    num_threads: CPU threads of a rank. non_finite: `stop` on a loss or gradient that is not finite, or `skip` such
    steps and count them. torch_compile, channels_last: compile the model; keep images with channels last.
    profile_steps: write a trace of so many steps to `<stage>/logs/trace.json`. train_sampling_strategy: order of the
    training rows; `group_by_length` makes batches of rows of about the same length, which saves padding.
    packing: leave padding out, without one row seeing another. Where the loss is about tokens, several short rows share
    one of the task's max_length tokens, and a row of a batch is then such a bin; else rows stay rows, and the layers of
    the model run on their real tokens.
    cache_frozen: compute the outputs of frozen lower layers once and read them from disk in every epoch; `auto`: where
    that is right and pays. cache_frozen_limit: bytes of such outputs, in GB. report_to: trackers that show the curves,
    TensorBoard by default; those of services take account and address from their own environment variables.
    """

    def __init__(
        self,
        *,
        learning_rate: Literal["auto"] | Rate | list[Rate] = 5e-5,
        num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0,
        max_steps: Annotated[int, Field(ge=-1, le=10**9)] = -1,
        per_device_train_batch_size: Annotated[int, Field(gt=0, le=10**6)] = 8,
        per_device_eval_batch_size: Annotated[int, Field(gt=0, le=10**6)] = 64,
        gradient_accumulation_steps: Annotated[int, Field(gt=0, le=10**6)] = 1,
        weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0,
        adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8,
        max_grad_norm: Annotated[float, Field(ge=0)] = 1.0,
        optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"] = "adamw_torch_fused",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        lr_scheduler_type: Schedule = "linear",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        warmup_ratio: Fraction = 0.0,
        warmup_steps: NotNegative = 0,
        label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        bf16: bool = False,
        fp16: bool = False,
        torch_compile: bool = False,
        channels_last: bool = False,
        gradient_checkpointing: bool = False,
        forward_chunk_size: NotNegative = 0,
        eval_steps: Annotated[float, Field(ge=0, le=10**9)] | None = None,
        save_steps: Annotated[float, Field(ge=0, le=10**9)] = 0.0,
        save_total_limit: Positive = 2,
        logging_steps: Positive = 10,
        load_best_model_at_end: bool = False,
        metric_for_best_model: str | None = None,
        greater_is_better: bool | None = None,
        early_stopping_patience: Positive | None = None,
        report_to: Tracker | list[Tracker] | None = None,
        train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random",
        packing: bool = False,
        dataloader_num_workers: Annotated[int, Field(ge=0, le=1024)] = 0,
        dataloader_drop_last: bool = False,
        cache_frozen: Literal["auto"] | bool = False,
        cache_frozen_limit: Annotated[float, Field(gt=0, le=1e6)] = 4.0,
        full_determinism: bool = False,
        non_finite: Literal["stop", "skip"] = "stop",
        profile_steps: NotNegative = 0,
        num_threads: Annotated[int, Field(ge=0, le=4096)] = 0,
        seed: Seed = 42,
        **unknown: Any,
    ): ...


class Stage(Noun):
    """What the four stages share: a name, and the settings that override the recipe's."""

    verb = ""


class Train(Stage):
    """Trains a model with a stack of strategies, each written as its name or as `{name: settings}`.

    search: settings by their paths (`training.x`, `strategies.name.x`), each with a list of values to try, or a range
    `{low, high, log}`; the best on validation data is kept. With `trials`, so many combinations are drawn. compare:
    baselines of the report: `majority`, `zero_shot` (this stage's model before training), or `@stage`. when_used: leave
    the stage out unless another one refers to it. push_to_hub: repository for the stage's model.
    """

    verb = "train"

    def __init__(
        self,
        name: str,
        strategies: list[Named] | None = None,
        *,
        task: Named | None = None,
        data: settings.DataRef | None = None,
        model: settings.ModelRef | None = None,
        training: dict[str, Any] | None = None,
        search: dict[str, Any] | None = None,
        seeds: Repetitions | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        push_to_hub: str | None = None,
        **unknown: Any,
    ): ...


class Merge(Stage):
    """Merges models in weight space. Over one seeded stage it takes all seeds as parents, or with `seeds` of its own
    one for each of them; over several stages, seed i of each. The report has it beside the parent that is the best on
    validation data and the mean of the parents' outputs.

    base: what the parents were trained from. head: the parent, as `models` names it, whose head is kept where heads
    differ. fallback: `best_parent` takes the place of a merge that is worse than it on validation data. dtype: of the
    result; the first parent's by default. compute: what is computed in. max_shard_size: of a file, such as `5GB`.
    vocabulary: where the parents' tokenizers differ, `union`, `first`, `base` or one of `models`; new_rows: what a
    parent gets for a token that it has not, `average` or `copy` (docs/merging.md).
    """

    verb = "merge"

    def __init__(
        self,
        name: str,
        method: Named,
        *,
        models: list[settings.ModelRef],
        base: settings.ModelRef | None = None,
        head: str | None = None,
        fallback: Literal["best_parent"] | None = None,
        dtype: Literal["float32", "float64", "float16", "bfloat16"] | None = None,
        compute: Literal["float32", "float64"] = "float32",
        max_shard_size: str | int | None = None,
        task: Named | None = None,
        data: settings.DataRef | None = None,
        seeds: Repetitions | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        push_to_hub: str | None = None,
        vocabulary: str = "equal",
        new_rows: Literal["average", "copy"] = "average",
        **unknown: Any,
    ): ...


class Ensemble(Stage):
    """Combines models in output space; the result is a folder of members."""

    verb = "ensemble"

    def __init__(
        self,
        name: str,
        method: Named = "mean",
        *,
        models: list[settings.ModelRef],
        task: Named | None = None,
        data: settings.DataRef | None = None,
        seeds: Repetitions | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        **unknown: Any,
    ): ...


class Evaluate(Stage):
    """Measures a model that it does not change (zero-shot, a published checkpoint)."""

    verb = "evaluate"

    def __init__(
        self,
        name: str,
        *,
        model: settings.ModelRef | None = None,
        task: Named | None = None,
        data: settings.DataRef | None = None,
        seeds: Repetitions | None = None,
        compare: list[str] | None = None,
        when_used: bool = False,
        **unknown: Any,
    ): ...


class Recipe(Noun):
    """The whole: stages, and the defaults that a stage may override.

    data: one data set, or a mapping of names to data sets. seeds: repetitions of every stage. push_to_hub: repository
    for the last stage's model.
    """

    def __init__(
        self,
        stages: list[Any],
        *,
        name: str | None = None,
        task: Named | None = None,
        data: Any = None,
        model: Named | None = None,
        training: dict[str, Any] | None = None,
        seeds: Repetitions = 1,
        push_to_hub: str | None = None,
        **unknown: Any,
    ): ...


STAGES: dict[str, type[Stage]] = {cls.verb: cls for cls in (Train, Merge, Ensemble, Evaluate)}
BASELINES = ("majority", "zero_shot")
PARENTS = ("best_parent", "parents_ensemble")
"""Baselines that a merge always has where they can be measured."""
TOWERS = ("image", "text", "audio")
"""Settings of a `Model` that are models."""


def plain(value: Any) -> Any:
    """Nouns to mappings, tuples to lists, paths to text: what YAML can hold. A stage becomes `{verb: name, ...}`."""
    if isinstance(value, Noun):
        given = {key: plain(v) for key, v in value.given.items()}
        if isinstance(value, Stage):
            return {value.verb: given.pop("name", ""), **given}
        return given
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return plain(value.tolist())
    return value


def named(item: Any) -> tuple[str, Any]:
    """A plugin in a recipe, `"lora"` or `{"lora": {...}}`, as (name, settings)."""
    if isinstance(item, str):
        return item, {}
    name, given = next(iter(item.items()))
    return str(name), {} if given is None else given


def verb_of(item: Any) -> str | None:
    """The verb of a stage written as a mapping; None where it is no stage, or is two."""
    verbs = [verb for verb in STAGES if verb in item] if isinstance(item, dict) else []
    return verbs[0] if len(verbs) == 1 else None


def name_of(item: Any) -> str:
    """What an item of a list goes by: a stage's own name, the single key of a plugin, else its text."""
    verb = verb_of(item)
    if verb is not None and isinstance(item[verb], str):
        return str(item[verb])
    if isinstance(item, dict) and len(item) == 1:
        return str(next(iter(item)))
    return str(item)
