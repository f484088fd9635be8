"""Text-to-text generation: decoder inputs, masks, counts, writing, metrics of texts, saving. Models are made here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import task_grid
import torch
from datasets import Dataset, Features, Translation
from helpers import counted
from kt_hf_plugins.text2text_generation import Text2TextGeneration
from safetensors.torch import load_file, save_file

from kt_hf import Data, Loaded, Model, evaluation, inference, metrics, testing
from kt_hf.bundle import Bundle
from kt_hf.data import DataInfo, prepare
from kt_hf.errors import DataError, IntegrityError, RecipeError
from kt_hf.language import IGNORED
from kt_hf.roles import find_roles, fitting_tasks
from kt_hf.testing import bench
from kt_hf.writing import from_bytes, start_of, to_bytes

ATTENTION = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
WIDTHS = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.3, "max_position_embeddings": 40}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "t5": {**T5, "dropout_rate": 0.0, "initializer_factor": 2.0},
    "bart": {**WIDTHS, **ATTENTION, "dropout": 0.0},
    "marian": {**WIDTHS, **ATTENTION, "dropout": 0.0, "init_std": 2.0},
}
COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "pale": "blass"}
THINGS = {"stone": "Stein", "river": "Fluss", "house": "Haus", "lamp": "Lampe", "cloud": "Wolke"}
SOURCES = [f"The {c} {t} is near." for c in COLOURS for t in THINGS]
TARGETS = [f"{t} ist {c} und nah, {t}!" for c in COLOURS.values() for t in THINGS.values()]


def rows(count: int, first: int = 0) -> Dataset:
    numbers = [(7 * i + first) % len(SOURCES) for i in range(count)]
    return Dataset.from_dict({"source": [SOURCES[i] for i in numbers], "target": [TARGETS[i] for i in numbers]})


def info() -> DataInfo:
    splits = {name: rows(n).add_column("index", np.arange(n)) for name, n in (("train", 20), ("test", 7))}
    return DataInfo("colours", splits, {"source": "source", "target": "target"}, None, "colours")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as files; 7 rows of test, which two do not divide."""
    found = tmp_path_factory.mktemp("colours")
    for name, count, first in (("train", 20, 0), ("validation", 6, 3), ("test", 7, 5)):
        rows(count, first).rename_columns({"source": "en", "target": "de"}).to_parquet(found / f"{name}.parquet")
    return found


def model(kind: str, **changes: Any) -> Model:
    overrides = {**SIZES[kind], **changes}
    return Model(config=kind, config_overrides=overrides, processor_overrides={"vocab_size": 320})


def fresh(kind: str = "bart", changes: Any = None, **settings: Any) -> tuple[Any, Loaded]:
    torch.manual_seed(0)
    task = Text2TextGeneration(**{"max_target_length": 24, **settings})
    loaded = task.load(model(kind, **(changes or {})), info())
    loaded.model.eval()
    return task, loaded


def batch_of(task: Any, loaded: Loaded, sources: list[str], targets: list[str] | None = None) -> dict[str, Any]:
    given = {"source": sources, **({"target": targets} if targets else {})}
    columns = task.preprocess(given, loaded, train=True)
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(len(sources))], loaded)


def predicted(task: Any, loaded: Loaded) -> dict[str, np.ndarray]:
    bundle = Bundle(loaded, task, {})
    return evaluation.predict(bundle, bundle, bench.cpu_accelerator(), info(), "test", 3)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_the_loss_is_that_of_transformers(kind: str) -> None:
    """With unequal targets: the model's own loss is a mean over tokens, and its own shift gives the same inputs."""
    task, loaded = fresh(kind)
    batch = batch_of(task, loaded, SOURCES[:3], [TARGETS[0], "Stein", "Ja, ja."])
    values_N, weight_N, unit = task.loss(task.forward(loaded.model, batch), batch)
    values_N, weight_N = values_N[weight_N > 0], weight_N[weight_N > 0]
    names = ("input_ids", "attention_mask", "labels")
    own = loaded.model(**{name: batch[name] for name in names}).loss
    torch.testing.assert_close(values_N.mean(), own, rtol=1e-5, atol=1e-6)
    assert unit == "token" and float(weight_N.sum()) == int(task.units(batch)["token"]) == len(values_N)
    assert len(values_N) == int((batch["labels"] != IGNORED).sum()) < batch["labels"].numel()
    parts = [task.loss(task.forward(loaded.model, b), b)[0].sum() for b in split(batch)]
    torch.testing.assert_close(sum(parts), values_N.sum(), rtol=1e-5, atol=1e-5)


def split(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 3))]


@pytest.mark.parametrize("kind", SIZES)
def test_padding_changes_nothing(kind: str) -> None:
    task, loaded = fresh(kind)
    sources, targets = ["The red stone is near.", "lamp"], [TARGETS[0], "Wolke"]
    both = batch_of(task, loaded, sources, targets)
    alone = [batch_of(task, loaded, [s], [t]) for s, t in zip(sources, targets, strict=True)]
    with torch.no_grad():
        outputs = task.forward(loaded.model, both)
        single = [task.forward(loaded.model, b) for b in alone]
        scores = torch.cat([counted(task.scores(o, b)) for o, b in zip(single, alone, strict=True)])
        vectors = torch.cat([task.features(o, b) for o, b in zip(single, alone, strict=True)])
        found, parts = task.predict(loaded.model, both, {}), [task.predict(loaded.model, b, {}) for b in alone]
    torch.testing.assert_close(counted(task.scores(outputs, both)), scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.features(outputs, both), vectors, rtol=1e-4, atol=1e-5)
    for name, values in found.items():
        torch.testing.assert_close(values, torch.cat([p[name] for p in parts]), rtol=1e-5, atol=1e-5)
    assert found["written"].shape == (2, 24), "as wide as the settings say, so that parts fit together"


def test_labels_end_and_padding_is_ignored() -> None:
    task, loaded = fresh(max_source_length=5, max_target_length=6)
    end, pad = loaded.processor.eos_token_id, loaded.processor.pad_token_id
    batch = batch_of(task, loaded, [SOURCES[0], ""], [TARGETS[0], ""])
    assert batch["input_ids"].shape == (2, 5) and batch["attention_mask"].sum(1).tolist() == [5, 1]
    assert batch["labels"][0, -1] == end and batch["labels"][1].tolist() == [end, *[IGNORED] * 5]
    assert batch["input_ids"][1].tolist() == [end, *[pad] * 4]
    whole = loaded.processor(TARGETS[0])["input_ids"]
    assert batch["labels"][0, :-1].tolist() == whole[:5]
    assert loaded.processor.backend_tokenizer.truncation is None


def test_a_prefix_travels_with_the_model(tmp_path: Path) -> None:
    task, loaded = fresh("t5", prefix="to German: ")
    ids = task.preprocess({"source": ["lamp"]}, loaded, train=False)["input_ids"][0]
    assert loaded.processor.decode(ids) == "to German: lamp"
    task.save(loaded, tmp_path)
    plain = Text2TextGeneration()
    again = plain.load(Model(path=str(tmp_path)), info())
    assert plain.preprocess({"source": ["lamp"]}, again, train=False)["input_ids"] == [ids]
    without = Text2TextGeneration(prefix="")
    bare = without.load(Model(path=str(tmp_path)), info())
    ids = without.preprocess({"source": ["lamp"]}, bare, train=False)["input_ids"]
    assert ids == [loaded.processor("lamp")["input_ids"]]
    assert task.signature(loaded)["preprocessing"] != without.signature(bare)["preprocessing"], "cached rows know it"


# --- writing and its metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("beams", [1, 3])
def test_predict_writes_what_generate_does(kind: str, beams: int, tmp_path: Path) -> None:
    """Plain transformers alone, one row at a time, against the task in batches, and `kt-hf predict`."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    task, loaded = fresh(kind, num_beams=beams)
    task.save(loaded, tmp_path)
    found = from_bytes(predicted(task, loaded)["prediction"])
    plain, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    expected = []
    for text in info().splits["test"]["source"]:
        ids = tokenizer(text, return_tensors="pt")
        given = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
        out = plain.generate(**given, max_new_tokens=24, num_beams=beams, do_sample=False)
        expected.append(tokenizer.decode(out[0], skip_special_tokens=True))
    assert found == expected and len(set(found)) > 1
    if beams == 1:
        Dataset.from_dict({"source": info().splits["test"]["source"]}).to_parquet(tmp_path / "rows.parquet")
        table = inference.predict(str(tmp_path), [str(tmp_path / "rows.parquet")], max_new_tokens=24)
        assert table["prediction"] == expected and table["input"] == list(info().splits["test"]["source"])
        assert inference.predict(str(tmp_path), [SOURCES[0]], max_new_tokens=3)["prediction"][0] in found[0]


def test_figures_are_those_of_the_libraries() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    said, wanted = [TARGETS[3][:-4] + "nah!", TARGETS[1], "", "the stone is red"], [*TARGETS[3:6], "the red stone is"]
    corpora = {"bleu": sacrebleu.corpus_bleu(said, [wanted]), "chrf": sacrebleu.corpus_chrf(said, [wanted])}
    for name, corpus in corpora.items():
        metric = metrics.of_texts(name)
        assert metric.compute(predictions=said, references=wanted)[metric.name] == pytest.approx(corpus.score / 100)
        counts = metric.counts(said, wanted)
        twice = getattr(sacrebleu, f"corpus_{name}")([*said, said[0]], [[*wanted, wanted[0]]]).score / 100
        assert metric.score(np.array([2.0, 1, 1, 1]) @ counts) == pytest.approx(twice, rel=1e-12)
    scorer = RougeScorer(["rouge1", "rougeL"])
    for name in ("rouge1", "rougeL"):
        expected = np.mean([scorer.score(w, s)[name].fmeasure for w, s in zip(wanted, said, strict=True)])
        assert metrics.of_texts(name).score(metrics.of_texts(name).counts(said, wanted).sum(0)) == pytest.approx(
            expected
        )
    assert (
        "tok:13a" in metrics.of_texts("bleu").signature() and "tok:char" in metrics.of_texts("bleu", "char").signature()
    )


def test_measured_on_the_rows_own_texts() -> None:
    """References are not those that the tokenizer gives back: they are neither cut nor changed."""
    import sacrebleu

    task, loaded = fresh(max_target_length=4)
    found = predicted(task, loaded)
    wanted = list(info().splits["test"]["target"])
    assert from_bytes(found["reference"]) == wanted
    written = TARGETS[0]
    found |= {"prediction": to_bytes([written] * 7)}
    found |= {name: metrics.of_texts(name).counts([written] * 7, wanted) for name in task.of_texts}
    scores = task.measure(found, Loaded(None, None), info())  # type: ignore[arg-type]  # as the report does it
    assert scores.metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu([written] * 7, [wanted]).score / 100) != 0
    assert scores.notes["bleu"].startswith("sacreBLEU / 100; nrefs:1|case:mixed")
    for name, (values, weights) in scores.examples.items():
        assert scores.metrics[name] == pytest.approx((values * weights).sum() / weights.sum())
    for name, statistic in scores.statistics.items():
        assert scores.metrics[name] == pytest.approx(statistic(np.ones(7)))
    table = task.table(found, loaded, info())
    assert table["reference"] == wanted and {len(column) for column in table.values()} == {7}


def test_metrics_of_tokens_alone_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task, loaded = fresh(metrics=["perplexity"])
    monkeypatch.setattr(loaded.model, "generate", None)
    found = predicted(task, loaded)
    assert set(found) == {"nll", "tokens", "correct", "index"}
    scores = task.measure(found, loaded, info())
    assert set(scores.metrics) == {"perplexity", "loss", "token_accuracy"}
    assert task.metric == "perplexity" and not task.greater_is_better
    assert Text2TextGeneration().metric == "bleu" and Text2TextGeneration().greater_is_better
    with pytest.raises(RecipeError, match="no 'blue'") as error:
        Text2TextGeneration(metrics=["blue"])
    assert "bleu" in error.value.remedy


def test_texts_as_bytes() -> None:
    texts = ["grün", "", "a\nb", "雪"]
    assert from_bytes(to_bytes(texts)) == texts and from_bytes(to_bytes([""])) == [""]


# --- models and roles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_a_saved_model_is_the_same(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    task, loaded = fresh(kind)
    config, tokenizer = loaded.model.config, loaded.processor
    assert start_of(loaded.model) == tokenizer.pad_token_id and config.vocab_size == len(tokenizer)
    assert loaded.model.generation_config.forced_eos_token_id is None
    task.save(loaded, tmp_path)
    again = task.load(Model(path=str(tmp_path)), info())
    assert task.signature(again) == task.signature(loaded)
    assert AutoTokenizer.from_pretrained(tmp_path)(TARGETS)["input_ids"] == tokenizer(TARGETS)["input_ids"]
    batch = batch_of(task, loaded, SOURCES[:3], TARGETS[:3])
    with torch.no_grad():
        for other in (again.model.eval(), AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()):
            assert torch.equal(task.forward(other, batch).logits, task.forward(loaded.model, batch).logits)
    assert inference.infer_task(str(tmp_path)) == "text2text-generation"
    names = [name for layer in task.layers(loaded.model) for name in layer]
    assert len(names) == len(set(names)) == len(dict(loaded.model.named_parameters()))
    blocks = [[name for name in layer if ".0." in name or ".1." in name] for layer in task.layers(loaded.model)]
    assert sum(bool(block) for block in blocks) >= 4, "the layers of the encoder and of the decoder, each"


def test_models_that_would_be_silently_wrong_are_refused(tmp_path: Path) -> None:
    task, loaded = fresh("bart", {"tie_word_embeddings": False})
    task.save(loaded, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="no language-model head"):
        task.load(Model(path=str(tmp_path)), info())
    loaded.processor.save_pretrained(tmp_path / "tokenizer")
    small = {**SIZES["t5"], "vocab_size": 100}
    with pytest.raises(RecipeError, match=r"\d+ tokens, the model embeddings for 100"):
        task.load(Model(config="t5", config_overrides=small, processor=str(tmp_path / "tokenizer")), info())
    with pytest.raises(RecipeError, match="AutoModelForSeq2SeqLM"):
        task.load(
            Model(config="bert", config_overrides={"hidden_size": 16}, processor=str(tmp_path / "tokenizer")), info()
        )


def test_without_its_library_a_metric_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.of_texts.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="metric 'bleu' needs sacrebleu") as error:
        fresh()
    assert "seq2seq" in error.value.remedy and "perplexity" in error.value.remedy
    assert fresh(metrics=["perplexity"])


def test_roles(folder: Path) -> None:
    def found(row: dict[str, Any], **columns: str) -> list[str]:
        return [name for name, _ in fitting_tasks(Dataset.from_list([row]).features, columns)]

    task = Text2TextGeneration()
    features = Dataset.from_list([{"id": "x", "article": "a", "highlights": "b"}]).features
    assert find_roles(features, task.roles) == {"source": "article", "target": "highlights"}
    assert found({"en": "a", "de": "b"}, source="en", target="de") == ["text2text-generation"]
    assert "text2text-generation" in found({"source": "a", "target": "b"})
    assert "text2text-generation" not in found({"document": "a", "label": "b"})
    assert "text2text-generation" not in found({"sentence": "a", "label": 1})
    prepared = prepare("colours", Data(str(folder), columns={"source": "en", "target": "de"}), task)
    assert prepared.counts["test"] == 7 and prepared.counts["empty"] == 0
    assert next(iter(prepared.texts())).startswith("The") and any("ist" in text for text in prepared.texts())


@pytest.mark.parametrize("streaming", [False, True])
def test_translation_structs(tmp_path: Path, streaming: bool) -> None:
    """As many sets on the Hub have them: one column with a field for each language."""
    both = [{"en": s, "de": t} for s, t in zip(SOURCES, TARGETS, strict=True)]
    languages = Features({"translation": Translation(["en", "de"])})
    for split_name in ("train", "validation", "test"):
        rows = Dataset.from_dict({"translation": both}, features=languages)
        rows.to_parquet(tmp_path / f"{split_name}.parquet")
    columns = {"source": "translation.en", "target": "translation.de"}
    data = Data(str(tmp_path), columns=columns, streaming=streaming)
    prepared = prepare("structs", data, Text2TextGeneration())
    assert list(prepared.splits["test"]["target"]) == TARGETS and prepared.roles == columns
    assert prepared.splits["train"][0]["source"] == SOURCES[0]
    if streaming:
        plain = [{"translation": pair} for pair in both[:3]]
        refined = prepared.stream.refine(plain, [0, 1, 2])  # type: ignore[union-attr]
        assert [row["target"] for row in refined] == TARGETS[:3]
    with pytest.raises(RecipeError, match=r"no column 'translation\.fr'"):
        prepare("structs", Data(str(tmp_path), columns={**columns, "target": "translation.fr"}), Text2TextGeneration())


def test_empty_rows_are_counted(tmp_path: Path) -> None:
    given = {"source": ["a b", "", "c d", "e f"], "target": ["x", "y", " ", "z"]}
    for split_name in ("train", "validation", "test"):
        Dataset.from_dict(given).to_parquet(tmp_path / f"{split_name}.parquet")
    kept = prepare("gaps", Data(str(tmp_path), drop=["empty"]), Text2TextGeneration())
    assert kept.counts["empty"] == 6 and kept.counts["test"] == 2
    with pytest.raises(DataError, match="none of the 2 examples"):
        nothing = {name: np.zeros(2) for name in ("nll", "tokens", "correct")}
        Text2TextGeneration().measure(nothing, Loaded(None), SimpleNamespace())  # type: ignore[arg-type]


# --- in recipes ------------------------------------------------------------------------------------------------------


def test_it_conforms() -> None:
    testing.check_task("text2text-generation")
    testing.check_strategy("lora", task="text2text-generation")
    testing.check_strategy("distill", task="text2text-generation")


def test_every_strategy(folder: Path, tmp_path: Path) -> None:
    """Ensembles are refused where texts are to be written, and work where only given targets are scored."""
    data = Data(str(folder), columns={"source": "en", "target": "de"})
    task = {"text2text-generation": {"metrics": ["perplexity"]}}
    report = task_grid.run_grid(tmp_path / "out", data, model("t5"), task)
    assert report["uniform"]["metrics"]["perplexity"]["value"] == report["again"]["metrics"]["perplexity"]["value"]
    assert report["together"]["metrics"]["perplexity"]["low"] < report["together"]["metrics"]["perplexity"]["value"]
    model_folder = str(tmp_path / "out" / "together" / "model")
    with pytest.raises(RecipeError, match="does not write"):
        inference.predict(model_folder, [SOURCES[0]])
    settings = ["data.columns.source=en", "data.columns.target=de"]
    found = inference.evaluate(model_folder, str(folder), settings)["metrics"]["perplexity"]["value"]
    assert found == pytest.approx(report["together"]["metrics"]["perplexity"]["value"])
    with pytest.raises(RecipeError, match="but does not write"):
        inference.evaluate(model_folder, str(folder), [*settings, "task.text2text-generation.metrics=[bleu]"])


@pytest.mark.slow
def test_two_ranks_and_the_report(folder: Path, tmp_path: Path) -> None:
    from kt_hf import Recipe, Train, run

    data = Data(str(folder), columns={"source": "en", "target": "de"})
    training = {"max_steps": 60, "per_device_train_batch_size": 10, "learning_rate": 5e-3, "eval_steps": 30}
    recipe = Recipe(
        [Train("one", training=training)],
        task={"text2text-generation": {"max_target_length": 30}},
        data=data,
        model=model("bart", init_std=0.1),
    )
    report = run(recipe, tmp_path / "out")["stages"][0]
    assert report["metrics"]["bleu"]["value"] > 0 and report["metrics"]["bleu"]["high"] is not None
    assert report["summary"]["bleu"].startswith("sacreBLEU / 100; nrefs:1")
    settings = ["data.columns.source=en", "data.columns.target=de", "task.text2text-generation.max_target_length=30"]
    one = task_grid.compare_ranks(
        tmp_path, str(tmp_path / "out" / "one"), str(folder), "text2text-generation", settings
    )
    for name, figure in one["metrics"].items():
        assert figure["value"] == pytest.approx(report["metrics"][name]["value"], rel=1e-5)
    assert one["notes"]["chrf"].startswith("sacreBLEU / 100")
