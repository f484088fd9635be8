"""Tiny data, tiny models and a way to run one training without a recipe, shared by the trainer's tests."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from kt_hf_plugins.distill import Distill
from kt_hf_plugins.ema import Ema
from kt_hf_plugins.finetune import Finetune
from kt_hf_plugins.image_classification import ImageClassification
from kt_hf_plugins.lora import Lora
from kt_hf_plugins.text_classification import TextClassification
from PIL import Image

from kt_hf import randomness
from kt_hf.data import DataInfo
from kt_hf.facts import Run
from kt_hf.recipe import Data, Model, Training
from kt_hf.trainer import Result, Trainer, half, planned_steps

LABELS = ["cat", "dog", "owl"]
WORDS = [f"word{i}" for i in range(40)]
STRATEGIES = {"finetune": Finetune, "lora": Lora, "distill": Distill, "ema": Ema}
BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}


def accelerator() -> Accelerator:
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "true") == "true"
    return Accelerator(cpu=on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])


def image_info(train: int = 26, validation: int = 7, labels: list[str] | None = None, seed: int = 0) -> DataInfo:
    """Images of noise around a level that tells the class."""
    random = np.random.default_rng(seed)
    labels = labels or LABELS

    def split(n: int, first: int) -> datasets.Dataset:
        y = random.integers(0, len(labels), n)
        pixels = (random.normal(0, 40, (n, 8, 8, 3)) + 60 + 60 * y[:, None, None, None]).clip(0, 255).astype(np.uint8)
        columns = {"image": [Image.fromarray(p) for p in pixels], "label": y, "index": np.arange(first, first + n)}
        kinds = {"image": datasets.Image(), "label": datasets.Value("int64"), "index": datasets.Value("int64")}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    splits = {"train": split(train, 0), "validation": split(validation, 0), "test": split(5, 0)}
    return DataInfo(
        "shapes", splits, {"image": "image", "label": "label"}, list(labels), f"images-{train}-{validation}-{seed}"
    )


def text_info(train: int = 26, validation: int = 7, seed: int = 0) -> DataInfo:
    """Texts of 2 to 9 words, in which some words tell the class."""
    random = np.random.default_rng(seed)

    def split(n: int) -> datasets.Dataset:
        y = random.integers(0, 3, n)
        texts = [" ".join(WORDS[(13 * c + w) % 40] for w in random.integers(0, 13, random.integers(2, 10))) for c in y]
        return datasets.Dataset.from_dict({"text": texts, "label": y, "index": np.arange(n)})

    splits = {"train": split(train), "validation": split(validation), "test": split(5)}
    return DataInfo(
        "words", splits, {"text": "text", "label": "label"}, list(LABELS), f"texts-{train}-{validation}-{seed}"
    )


def task_and_info(kind: str, **sizes: Any) -> tuple[Any, DataInfo]:
    return (
        (ImageClassification(), image_info(**sizes)) if kind == "image" else (TextClassification(), text_info(**sizes))
    )


def config(kind: str, **changes: Any) -> Model:
    if kind == "resnet":
        return Model(
            config="resnet",
            config_overrides={**RESNET, **changes},
            processor_overrides={"size": {"height": 16, "width": 16}},
        )
    return Model(
        config="vit" if kind == "image" else "bert", config_overrides={**(VIT if kind == "image" else BERT), **changes}
    )


def make_trainer(
    folder: Path,
    kind: str = "image",
    strategies: dict[str, Any] | None = None,
    *,
    model: Model | None = None,
    task: Any = None,
    info: DataInfo | None = None,
    data: dict[str, Any] | None = None,
    until: float = 1.0,
    streams: Any = None,
    world: int | None = None,
    **training: Any,
) -> Trainer:
    """A trainer over tiny data. `strategies`: name -> settings, or a strategy that is already built."""
    own_task, own_info = (
        task_and_info("text" if kind == "text" else "image") if info is None or task is None else (task, info)
    )
    task, info = task or own_task, info or own_info
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_steps": 0,
        "weight_decay": 0.01,
    }
    t = Training(**{**settings, **training})
    a = accelerator()
    randomness.seed_all("load", t.seed)
    loaded = task.load(model or config(kind), info)
    steps = planned_steps(t, len(info.splits["train"]), a.num_processes)
    run = Run(a, t.seed, Path(folder), task, loaded, info, steps, resolve, half(t))
    stack = {
        n: s if not isinstance(s, dict) else STRATEGIES[n](**s)
        for n, s in ({"finetune": {}} if strategies is None else strategies).items()
    }
    return Trainer(run, loaded, stack, t, Data("memory", **(data or {})), None, streams, until)


def train(folder: Path, kind: str = "image", strategies: dict[str, Any] | None = None, **rest: Any) -> Result:
    return make_trainer(folder, kind, strategies, **rest).run()


def resolve(ref: Any) -> Model:
    return ref if isinstance(ref, Model) else Model(path=str(ref))


def teacher(folder: Path, kind: str = "image", info: DataInfo | None = None, **changes: Any) -> str:
    """The folder of a saved teacher, wider than the student."""
    task, own = task_and_info("text" if kind == "text" else "image")
    torch.manual_seed(123)
    loaded = task.load(config(kind, **{"hidden_size": 24, **changes} if kind != "resnet" else changes), info or own)
    task.save(loaded, folder)
    return str(folder)


def weights(result: Result) -> dict[str, torch.Tensor]:
    """The exported weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in result.loaded.model.state_dict().items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights of one architecture."""
    assert a.keys() == b.keys()
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a if a[n].numel())


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def initial(kind: str = "image", seed: int = 42, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights from which `train` starts."""
    task, info = task_and_info("text" if kind == "text" else "image")
    randomness.seed_all("load", seed)
    return copy.deepcopy(task.load(config(kind, **changes), info).model.state_dict())


def pair_info(train: int = 22, seed: int = 0) -> DataInfo:
    """Images with captions that name their class and a number."""
    info = image_info(train, 7, seed=seed)
    random = np.random.default_rng(seed)
    for name, rows in info.splits.items():
        texts = [f"{LABELS[y]} {WORDS[random.integers(0, 40)]} {WORDS[random.integers(0, 40)]}" for y in rows["label"]]
        info.splits[name] = rows.add_column("text", texts)
    return DataInfo("pairs", info.splits, {**info.roles, "text": "text"}, info.labels, f"pairs-{train}-{seed}")


def contrastive_case() -> dict[str, Any]:
    """What `make_trainer` needs for a dual encoder."""
    from kt_hf_plugins.contrastive import Contrastive
    from kt_hf_plugins.zero_shot_image_classification import ZeroShotImageClassification

    vit = {"config": "vit", "config_overrides": VIT}
    bert = {"config": "bert", "config_overrides": BERT}
    model = Model(image=Model(**vit), text=Model(**bert), projection_dim=8)
    return {
        "task": ZeroShotImageClassification(templates=["a {}"]),
        "info": pair_info(),
        "model": model,
        "strategies": {"finetune": {}, "contrastive": Contrastive()},
    }


CASES = ("finetune", "lora", "distill", "ema", "lora+distill+ema")


def stack(names: str, teacher_folder: str) -> dict[str, Any]:
    """Strategies by their joined names."""
    settings = {
        "finetune": {},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "ema": {"decay": 0.8},
        "distill": {"teacher": teacher_folder, "alpha": 0.4, "temperature": 3.0},
    }
    return {name: settings[name] for name in names.split("+")}


def counted(found):
    """Of (scores_NC, weight_N) those that weigh something."""
    scores_NC, weight_N = found
    return scores_NC[weight_N > 0]
