"""Stages as a runner would hand them to the report, of drawn numbers. Shapes: S seeds, N test examples, C classes."""

from __future__ import annotations

import numpy as np

from kt_hf.evidence import SeedEvidence, StageEvidence
from kt_hf.functional import scoring

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def predictions(accuracy: float, truth_N, difficulty_N, generator, num_classes: int):
    """Class numbers, right with about this probability: hard examples are hard for every model."""
    latent_N = 0.8 * difficulty_N + 0.6 * generator.standard_normal(len(truth_N))
    right_N = latent_N < np.quantile(latent_N, min(max(accuracy, 0.0), 1.0))
    wrong_N = (truth_N + generator.choice([1, 2, num_classes - 1], len(truth_N), p=[0.5, 0.2, 0.3])) % num_classes
    return np.where(right_N, truth_N, wrong_N)


def seed_evidence(seed: int, truth_N, guess_N, num_classes: int, steps: int = 0, **extra) -> SeedEvidence:
    """What a runner knows of one seed of a classification stage."""
    generator = np.random.default_rng([seed, int(truth_N.sum()), int((truth_N == guess_N).sum())])
    hits_N = (truth_N == guess_N).astype(float)
    accuracy = float(hits_N.mean())

    def macro_f1(weights_N) -> float:
        return scoring.macro_f1(guess_N, truth_N, num_classes, weights_N)

    curve, evaluations = [], []
    for step in range(10, steps + 1, 10):
        loss = 2.0 * (1 - accuracy) + 2.0 * float(np.exp(-3 * step / steps)) + 0.05 * float(generator.standard_normal())
        curve.append({"step": step, "loss": loss, "learning_rate": 1e-3 * (1 - step / steps), "terms": {"task": loss}})
        if step % 50 == 0:
            evaluations.append({"step": step, "accuracy": accuracy * (1 - float(np.exp(-4 * step / steps)))})
    return SeedEvidence(
        seed=seed,
        index_N=np.arange(len(truth_N)),
        metrics={"accuracy": accuracy, "macro_f1": macro_f1(np.ones(len(truth_N)))},
        examples={"accuracy": (hits_N, np.ones(len(truth_N)))},
        statistics={"macro_f1": macro_f1},
        references_N=truth_N,
        predictions_N=guess_N,
        curve=curve,
        evaluations=evaluations,
        **extra,
    )


def stage(
    name: str,
    accuracy: float,
    seeds: int = 3,
    kind: str = "train",
    num_examples: int = 597,
    labels=None,
    compare=(),
    trained: int = 211_770,
    cost: float = 12.0,
    spread: float = 0.01,
    trials: bool = True,
    lineage=None,
    description=("finetune: all parameters train",),
) -> StageEvidence:
    """A classification stage whose seeds scatter by `spread` around `accuracy`."""
    labels = list(labels or DIGITS)
    world = np.random.default_rng(7)
    truth_N = world.integers(0, len(labels), num_examples)
    difficulty_N = world.standard_normal(num_examples)
    found = []
    for seed in range(seeds):
        generator = np.random.default_rng([seed, *name.encode()])
        own = accuracy + spread * float(generator.standard_normal())
        guess_N = predictions(own, truth_N, difficulty_N, generator, len(labels))
        rates = [1e-4, 3e-4, 1e-3] if trials and kind == "train" else []
        tried = [
            {
                "settings": {"training.learning_rate": r},
                "learning_rate": r,
                "metric": "accuracy",
                "validation": own - 0.03 * abs(i - 1),
                "seconds": cost / 3,
                "chosen": i == 1,
            }
            for i, r in enumerate(rates)
        ]
        seconds = cost * (1 + 0.03 * seed)
        found.append(
            seed_evidence(
                seed,
                truth_N,
                guess_N,
                len(labels),
                steps=200 if kind == "train" else 0,
                cost={
                    "seconds": seconds,
                    "examples_per_second": 6400 / seconds,
                    "optimizer_steps": 200 if kind == "train" else 0,
                    "peak_memory_bytes": 1_038_041_088,
                    "trained_parameters": trained if kind == "train" else 0,
                    "total_parameters": 211_770,
                    "size_on_disk_bytes": 856_086,
                },
                lineage=lineage or {"base_model": "@source", "data": "target"},
                trials=tried,
            )
        )
    majority_N = np.full(num_examples, int(np.bincount(truth_N).argmax()))
    return StageEvidence(
        name=name,
        kind=kind,
        task="ImageClassification",
        data={
            "name": "target",
            "path": "digits",
            "split": "test",
            "fingerprint": "bde70b11c5dd0bec",
            "counts": {
                "train": 800,
                "validation": 100,
                "test": num_examples,
                "duplicates": 2,
                "overlap": 1,
                "empty": 0,
            },
        },
        metric="accuracy",
        higher_is_better=True,
        seeds=found,
        description=description,
        labels=labels,
        compare=compare,
        baselines={
            "majority": seed_evidence(0, truth_N, majority_N, len(labels)),
            "zero_shot": "the model has no trained head for these labels",
        },
        settings={"learning_rate": [1e-4, 3e-4, 1e-3], "max_steps": 200, "per_device_train_batch_size": 32}
        if kind == "train"
        else {},
    )


def large() -> list[StageEvidence]:
    """Fourteen stages of all kinds, most with three seeds."""
    against = ["majority", "zero_shot", "@scratch"]
    stages = [stage("scratch", 0.79, compare=["majority"], lineage={"config": "vit", "data": "target"})]
    stages += [
        stage("finetune", 0.88, compare=against),
        stage("lora", 0.865, compare=[*against, "@finetune"], trained=9_472, cost=9),
    ]
    stages += [
        stage("probe", 0.72, compare=against, trained=810, cost=3),
        stage("distill_from_finetune", 0.845, compare=against, trained=110_000, cost=15),
    ]
    stages += [stage("distill_and_ema_with_a_long_name", 0.85, compare=against, trained=110_000, cost=16)]
    stages += [
        stage(f"variant_{i}", 0.80 + 0.012 * i, compare=["@scratch"], trained=50_000 * (i + 1), cost=8 + i)
        for i in range(4)
    ]
    stages += [
        stage(
            "uniform_soup",
            0.86,
            1,
            "merge",
            compare=["@finetune"],
            cost=1.2,
            lineage={"parents": ["@finetune[0]", "@finetune[1]"]},
        )
    ]
    stages += [stage("greedy_soup", 0.885, 1, "merge", compare=["majority", "@finetune"], cost=2.1)]
    stages += [stage("mean", 0.895, 1, "ensemble", compare=["@finetune"], cost=1.9)]
    stages += [stage("outside", 0.60, 1, "evaluate", compare=["majority"], cost=0.4, lineage={"model": "org/model"})]
    return stages


def perplexity_stage(name: str, level: float, seeds: int = 3, compare=()) -> StageEvidence:
    """A language model: perplexity is no mean over examples, and of its loss every example has its tokens as weight."""
    world = np.random.default_rng(3)
    tokens_N, base_N = world.integers(20, 200, 150).astype(float), world.normal(3.0, 0.4, 150)
    found = []
    for seed in range(seeds):
        nll_N = base_N + level + 0.05 * np.random.default_rng([seed, *name.encode()]).standard_normal(150)

        def perplexity(weights_N, nll_N=nll_N) -> float:
            counted_N = weights_N * tokens_N
            return float(np.exp((nll_N * counted_N).sum() / counted_N.sum()))

        metrics = {"perplexity": perplexity(np.ones(150)), "loss": float((nll_N * tokens_N).sum() / tokens_N.sum())}
        found.append(
            SeedEvidence(
                seed,
                np.arange(150),
                metrics,
                {"loss": (nll_N, tokens_N)},
                {"perplexity": perplexity},
                cost={"seconds": 3.0},
            )
        )
    data = {"name": "text", "split": "test", "fingerprint": "feed", "counts": {"test": 150}}
    return StageEvidence(
        name, "train", "TextGeneration", data, "perplexity", False, found, lower_metrics=("loss",), compare=compare
    )
