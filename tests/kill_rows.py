"""The rows of the kill harness: plain settings of recipes, and the points at which their processes are killed.

Together they cover every registered strategy, stacks, dropout, random augmentation, accumulation, 0 and 2 workers, 1
and 2 ranks, every optimizer and every kind of task. `{data}` is the folder that `write_data` fills.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kill_harness import Row

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"config": "vit", "config_overrides": {**SMALL, **DROPOUT, "image_size": 8, "patch_size": 4}}
BERT = {"config": "bert", "config_overrides": {**SMALL, **DROPOUT, "max_position_embeddings": 32}}
GPT2 = {
    "config": "gpt2",
    "config_overrides": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.2},
    "processor_overrides": {"vocab_size": 300},
}
LLAMA = {
    "config": "llama",
    "config_overrides": {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 128, "attention_dropout": 0.1},
    "processor_overrides": {"vocab_size": 300},
}
RESNET = {
    "config": "resnet",
    "config_overrides": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "processor_overrides": {"size": {"height": 16, "width": 16}},
}
DUAL = {"image": VIT, "text": BERT, "projection_dim": 8}

TURNED = {"augment": [{"RandomRotation": {"degrees": 30}}]}
SIZES = {"max_examples": {"train": 26, "validation": 9, "test": 9}}
DIGITS = {"path": "digits", "name": "target", **SIZES}
CAPTIONS = {"path": "digits", "name": "captions", **SIZES, **TURNED}
TEXTS = {"path": "{data}/texts"}
DOCUMENTS = {"path": "{data}/documents"}
STREAMED = {"streaming": True, "shuffle_buffer": 7}
"""Blocks end within batches; a file has three row groups."""

TRAINING = {
    "max_steps": 19,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 3,
    "eval_steps": 4,
    "logging_steps": 5,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_ratio": 0.2,
    "num_threads": 1,
    "report_to": "none",
}
"""An epoch has 7 steps: checkpoints 3 and 6 lie in the first, 9 and 12 in the second; points of the curve and
evaluations lie between them."""

IN_ONE_EPOCH = [{"step": 4, "micro_batch": 1}, {"step": 5}, {"random": True}]
"""Twice in the first epoch, once of these in the middle of an accumulation window; then at some time."""
WITHOUT_WINDOWS = [{"step": 4}, {"step": 5}, {"random": True}]
CACHE = [
    {"op": r"open .*\.incomplete/.*\.arrow$"},
    {"op": r"open .*\.incomplete/dataset_info\.json$", "nth": 2},
    {"op": r"rename .*\.incomplete "},
    {"op": r"open .*/tmp\w+$", "nth": 3},
    {"op": r"rename .*/tmp\w+ "},
]
"""While a table becomes Arrow files, and while texts become tokens."""
EMA = {"ema": {"decay": 0.8}}
LORA = {"lora": {"r": 4, "lora_dropout": 0.1}}
DISTILL = {"distill": {"teacher": "@teacher", "alpha": 0.4, "temperature": 3.0}}


def recipe(data: Any, model: Any, strategies: list[Any], task: Any = None, before: Any = (), **training: Any) -> Any:
    """A recipe with one training `main`, and stages before it."""
    found = {"data": data, "model": model, "training": {**TRAINING, **training}}
    found["stages"] = [*before, {"train": "main", "strategies": strategies}]
    return {**found, "task": task} if task else found


def teacher(model: dict[str, Any]) -> dict[str, Any]:
    """A stage that makes a wider teacher in a few steps."""
    wider = {**model, "config_overrides": {**model["config_overrides"], "hidden_size": 24}}
    return {"train": "teacher", "model": wider, "training": {"max_steps": 5}}


def save_points() -> list[dict[str, Any]]:
    """Before every change of the file system that a save makes, in the middle of every write, and in every rotation.

    Each comes in a process that resumed from what the one before left: at 6, until the rename is made; later points
    fall into later saves.
    """
    staged = r"\.step-000009\.partial"
    found: list[dict[str, Any]] = [{"step": 7}, {"op": f"mkdir .*/{staged}$"}]
    for name, size in (("state.safetensors", 5000), ("trainer.json", 100), ("manifest.json", 100)):
        found += [{"op": f"open .*{staged}/{name}", "tear": size}] if name == "state.safetensors" else []
        found += [{"op": f"open .*{staged}/{name}"}, {"op": f"fsync .*{staged}/{name}"}]
    found += [{"op": f"fsync .*{staged}$"}, {"op": f"rename .*{staged}"}, {"op": "fsync .*/checkpoints$"}]
    found += [{"op": r"rename .*\.removed$"}]
    found += [{"op": rf"remove .*\.removed/{name}"} for name in ("state", "trainer", "manifest")]
    return [*found, {"op": r"rmdir .*\.removed"}, {"random": True}]


ROWS = [
    Row(
        "rotation, accumulation, deterministic algorithms",
        recipe({**DIGITS, **TURNED}, VIT, [{"finetune": {"layer_decay": 0.8}}], full_determinism=True),
        IN_ONE_EPOCH,
    ),
    Row(
        "text, 2 workers, SGD with momentum, cosine; first while the data are read and preprocessed",
        recipe(
            {"path": "{data}/cold"},
            BERT,
            ["finetune"],
            dataloader_num_workers=2,
            optim="sgd",
            momentum=0.9,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
        ),
        [*CACHE, *WITHOUT_WINDOWS],
        cold=True,
    ),
    Row(
        "rotation, 2 workers, accumulation",
        recipe({**DIGITS, **TURNED}, VIT, [LORA], dataloader_num_workers=2),
        IN_ONE_EPOCH,
    ),
    Row(
        "a teacher's stage before, killed in both",
        recipe({**DIGITS, **TURNED}, VIT, [DISTILL], before=[teacher(VIT)]),
        [{"training": "teacher.42", "step": 4}, {"training": "main.42", "step": 1}, *IN_ONE_EPOCH],
    ),
    Row(
        "text, best model, patience, one checkpoint",
        recipe(
            TEXTS,
            BERT,
            [EMA],
            load_best_model_at_end=True,
            early_stopping_patience=6,
            eval_steps=2,
            save_total_limit=1,
            optim="adamw_torch",
        ),
        IN_ONE_EPOCH,
    ),
    Row(
        "CLIP's loss, rotation",
        recipe(
            CAPTIONS,
            DUAL,
            ["finetune", "contrastive"],
            "zero-shot-image-classification",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
        ),
        WITHOUT_WINDOWS,
    ),
    Row(
        "SigLIP's loss in chunks, 2 workers",
        recipe(
            CAPTIONS,
            DUAL,
            [{"contrastive": {"loss": "siglip"}}, EMA],
            "zero-shot-image-classification",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            forward_chunk_size=2,
            dataloader_num_workers=2,
        ),
        WITHOUT_WINDOWS,
    ),
    Row(
        "text, packed, 2 workers, accumulation",  # batches of four rows, so that there is padding to leave out
        recipe(
            TEXTS,
            BERT,
            [LORA, DISTILL, EMA],
            before=[teacher(BERT)],
            packing=True,
            dataloader_num_workers=2,
            per_device_train_batch_size=4,
            save_steps=2,
        ),
        [{"training": "main.42", "step": 2, "micro_batch": 1}, {"training": "main.42", "step": 3}, {"random": True}],
    ),
    Row(
        "2 ranks, rotation, accumulation",
        recipe({**DIGITS, **TURNED}, VIT, ["finetune"], per_device_train_batch_size=1),
        [{"step": 4, "micro_batch": 1, "rank": 1}, {"step": 5, "rank": 0}, {"random": True}],
        ranks=2,
    ),
    Row(
        "2 ranks, text, 2 workers",
        recipe(
            TEXTS,
            BERT,
            [LORA, DISTILL, EMA],
            before=[teacher(BERT)],
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            dataloader_num_workers=2,
        ),
        [{"training": "main.42", "step": 4}, {"training": "main.42", "step": 5}, {"random": True}],
        ranks=2,
    ),
    Row(
        "2 ranks, SigLIP's loss, rotation",
        recipe(
            CAPTIONS,
            DUAL,
            [{"contrastive": {"loss": "siglip"}}],
            "zero-shot-image-classification",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
        ),
        WITHOUT_WINDOWS,
        ranks=2,
    ),
    Row(
        "text generation, Adafactor, TensorBoard",
        recipe(DOCUMENTS, GPT2, ["finetune"], "text-generation", optim="adafactor", report_to="tensorboard"),
        IN_ONE_EPOCH,
    ),
    Row(
        "text generation, gradient checkpointing, bf16",
        recipe(DOCUMENTS, LLAMA, [LORA, EMA], "text-generation", gradient_checkpointing=True, bf16=True),
        IN_ONE_EPOCH,
    ),
    Row(
        "batch statistics, rotation",
        recipe({**DIGITS, **TURNED}, RESNET, ["finetune", EMA, "balance"], label_smoothing_factor=0.1),
        IN_ONE_EPOCH,
    ),
    Row(
        "a learning rate chosen of two, killed in each trial",
        recipe(DIGITS, VIT, [{"finetune": {"linear_probe": True}}], learning_rate=[1e-2, 1e-3]),
        [
            {"training": "1-of-2.42", "step": 4},
            {"training": "1-of-2.42", "step": 18},
            {"training": "2-of-2.42", "step": 4},
            {"training": "2-of-2.42", "step": 10},
        ],
    ),
    Row(
        "two seeds, a soup and an ensemble of them",
        {
            **recipe({**DIGITS, **TURNED}, VIT, ["finetune"], max_steps=9),
            "stages": [
                {"train": "main", "seeds": 2},
                {"merge": "soup", "method": "greedy_soup", "models": ["@main"]},
                {"ensemble": "both", "method": "mean", "models": ["@main"]},
            ],
        },
        [
            {"training": "main.42", "step": 5},
            {"training": "1.43", "step": 1},
            {"training": "1.43", "step": 7},
            {"op": r"rename .*/seeds/1/\.stage\.partial"},
            {"op": r"open .*/soup/\.\.candidate\.partial/model"},
            {"op": r"rename .*/soup/\.stage\.partial"},
            {"op": r"rename .*/both/\.stage\.partial"},
        ],
        ends="finished",
    ),
    Row(
        "in every part of a save and of a rotation, one checkpoint kept",
        recipe({**DIGITS, **TURNED}, VIT, ["finetune", EMA], max_steps=40, save_total_limit=1),
        save_points(),
    ),
    Row(
        "in every part of the export and of the report; a finished stage is skipped",
        recipe(
            DIGITS, VIT, ["finetune"], before=[{"train": "first", "strategies": [LORA], "training": {"max_steps": 4}}]
        ),
        [{"training": "first.42", "step": 3}, {"op": r"rename .*/first/\.stage\.partial"}, {"sweep": "main"}],
        ends="finished",
    ),
    Row(
        "text grouped by length, 2 workers, accumulation",
        recipe(TEXTS, BERT, ["finetune"], train_sampling_strategy="group_by_length", dataloader_num_workers=2),
        IN_ONE_EPOCH,
    ),
    Row(
        "text generation, packed, accumulation",
        recipe(DOCUMENTS, GPT2, [LORA, EMA], {"text-generation": {"max_length": 24}}, packing=True),
        IN_ONE_EPOCH,
    ),
    Row(
        "streamed text, 2 workers, accumulation",
        recipe({**TEXTS, **STREAMED}, BERT, ["finetune", EMA], dataloader_num_workers=2),
        IN_ONE_EPOCH,
    ),
    Row(
        "2 ranks, streamed text generation",
        recipe({**DOCUMENTS, **STREAMED}, GPT2, ["finetune"], "text-generation", per_device_train_batch_size=1),
        IN_ONE_EPOCH,
        ranks=2,
    ),
]
LAUNCHED = 2
"""Rows with a real launcher; they stand in test_kill.py."""


def write_data(folder: Path) -> None:
    """Parquet folders `texts` (text, label), `cold` (others of the same kind) and `documents` (text), with rows of many
    lengths."""
    write_texts(folder, ("texts", "documents"), 0)
    write_texts(folder, ("cold",), 1)


def write_texts(folder: Path, names: tuple[str, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(40)]
    for split, count in (("train", 26), ("validation", 9), ("test", 9)):
        classes = random.integers(0, 3, count)
        drawn = [(c, random.integers(0, 13, random.integers(2, 20))) for c in classes]
        columns = {"text": [" ".join(words[(13 * c + w) % 40] for w in row) for c, row in drawn]}
        for name in names:
            if name != "documents":
                columns["label"] = [("cat", "dog", "owl")[c] for c in classes]
            else:
                columns.pop("label", None)
            (folder / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), folder / name / f"{split}.parquet", row_group_size=10)


def axes(row: Row) -> set[str]:
    """What of the covering set a row has."""
    text = json.dumps(row.recipe)
    training = row.recipe["training"]
    found = {f"strategy {name}" for name in row.strategies()}
    found |= {f"{row.ranks} ranks", f"{training.get('dataloader_num_workers', 0)} workers"}
    found |= {f"accumulation {training['gradient_accumulation_steps']}", training.get("optim", "adamw_torch_fused")}
    words = ("RandomRotation", "hidden_dropout_prob", "resid_pdrop", "streaming", "packing", "group_by_length")
    found |= {word for word in words if word in text}
    found |= {"stack"} if len(row.strategies()) > 1 else set()
    return found
