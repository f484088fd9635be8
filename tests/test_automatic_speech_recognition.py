"""Speech recognition: alignments, decoders, vocabularies, edits, exports. Models are made here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import task_grid
import torch

from kt_hf import Data, Loaded, Recipe, Train, audio, evaluation, inference, metrics, registry, run, testing, writing
from kt_hf.bundle import Bundle
from kt_hf.data import DataInfo, prepare
from kt_hf.errors import DataError, RecipeError, RowError
from kt_hf.language import IGNORED
from kt_hf.reading import in_memory
from kt_hf.recipe import Model
from kt_hf.roles import fitting_tasks
from kt_hf.testing import bench, waits

SpeechRecognition = registry.load("task", "automatic-speech-recognition")
KIT = SpeechRecognition.conformance["model"]
TINY = KIT["config_overrides"]
RATE = {"sampling_rate": 8000}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
DECODER = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, **HEADS, "dropout": 0.0, "init_std": 0.4}
OF_MOON = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "initializer_range": 0.4}
MOON = {"hidden_size": 16, "intermediate_size": 24, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = {"vocab_size": 270}
MODELS: dict[str, dict[str, Any]] = {
    "wav2vec2": KIT,
    "group norm": {**KIT, "config_overrides": {**TINY, "feat_extract_norm": "group", "do_stable_layer_norm": False}},
    "hubert": {**KIT, "config": "hubert"},
    "whisper": {
        "config": "whisper",
        "config_overrides": {**DECODER, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 40},
        "processor_overrides": {**VOCABULARY, **RATE, "hop_length": 80, "n_fft": 200},
    },
    "speech_to_text": {
        "config": "speech_to_text",
        "config_overrides": {**DECODER, "conv_channels": 16, "input_feat_per_channel": 16, "max_target_positions": 40},
        "processor_overrides": {**VOCABULARY, **RATE},
    },
    "moonshine": {
        "config": "moonshine",
        "config_overrides": {**MOON, **OF_MOON, "max_position_embeddings": 40},
        "processor_overrides": {**VOCABULARY, **RATE},
    },
}
OF_FRAMES = ("wav2vec2", "group norm", "hubert")
OF_DECODERS = ("whisper", "speech_to_text", "moonshine")
_START, _QUIET = "startoftranscript", "notimestamps"
TASK = "automatic-speech-recognition"
SETTINGS = {"max_seconds": 1.0, "max_target_length": 20}
QUICK = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "eval_steps": 0}


def sounds(count: int, seed: int = 0) -> datasets.Dataset:
    """At least a sixth of a second, which the coarsest of the models needs."""
    rows = SpeechRecognition.sample(2 * count, np.random.default_rng(seed)).to_list()
    found = []
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        waves = [audio.decode(row["audio"], 8000, 0) for row in (one, two, one)]
        content = audio.wav(np.concatenate(waves), 8000)
        found.append({"audio": {"bytes": content, "path": None}, "text": f"{one['text']} {two['text']}"})
    return in_memory(
        found, datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string")})
    )


def info(train: int = 12) -> DataInfo:
    splits = {}
    for seed, (name, count) in enumerate((("train", train), ("test", 7))):
        splits[name] = sounds(count, seed).add_column("index", np.arange(count))
    return DataInfo("tones", splits, {"audio": "audio", "text": "text"}, None, "tones")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tones")
    for seed, (name, count) in enumerate((("train", 12), ("validation", 5), ("test", 7))):
        sounds(count, seed).rename_column("text", "sentence").to_parquet(found / f"{name}.parquet")
    return found


def fresh(kind: str = "wav2vec2", **settings: Any) -> tuple[Any, Loaded]:
    torch.manual_seed(0)
    task = SpeechRecognition(**{**SETTINGS, **settings})
    loaded = task.load(Model(**MODELS[kind]), info())
    loaded.model.eval()
    return task, loaded


def batch_of(task: Any, loaded: Loaded, rows: Any) -> dict[str, Any]:
    columns = task.preprocess({name: rows[name] for name in ("audio", "text")}, loaded, train=True)
    count = len(rows["text"])
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], loaded)


def predicted(task: Any, loaded: Loaded) -> dict[str, np.ndarray]:
    bundle = Bundle(loaded, task, {})
    return evaluation.predict(bundle, bundle, bench.cpu_accelerator(), info(), "test", 3)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_transformers(kind: str) -> None:
    """Of frames it sums over alignments, one row at a time; of decoders it is a mean over tokens."""
    task, loaded = fresh(kind)
    batch = batch_of(task, loaded, info().splits["test"][:4])
    values, weight, unit = task.loss(task.forward(loaded.model, batch), batch)
    assert unit == "token" and float(weight.sum()) == float(task.units(batch)["token"])
    assert float(weight.sum()) == int((batch["labels"] != IGNORED).sum())
    names = ("input_values", "input_features", "attention_mask", "labels")
    total = 0.0
    for i in range(4):
        alone = batch_of(task, loaded, info().splits["test"][i : i + 1])
        given = {name: alone[name] for name in names if name in alone}
        loaded.model.config.ctc_loss_reduction = "sum"
        own = loaded.model(**given).loss
        own = float(own.detach()) * (1 if kind in OF_FRAMES else alone["labels"].shape[1])
        total += own
        parts = task.loss(task.forward(loaded.model, alone), alone)
        assert float((parts[0] * parts[1]).detach().sum()) == pytest.approx(own, rel=1e-4)
    assert float((values * weight).detach().sum()) == pytest.approx(total, rel=1e-4)
    values.sum().backward()


@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind: str) -> None:
    """Models that heed no mask are measured on each row alone."""
    task, loaded = fresh(kind)
    rows = info().splits["test"]
    both, alone = batch_of(task, loaded, rows[:3]), [batch_of(task, loaded, rows[i : i + 1]) for i in range(3)]
    assert len(set(both["lengths"].tolist())) > 1
    with torch.no_grad():
        outputs = task.forward(loaded.model, both, output_hidden_states=True)
        single = [task.forward(loaded.model, one, output_hidden_states=True) for one in alone]
        vectors = torch.cat([task.features(o, b) for o, b in zip(single, alone, strict=True)])
        found, parts = task.predict(loaded.model, both, {}), [task.predict(loaded.model, one, {}) for one in alone]
        scores, weight = task.scores(outputs, both)
        scored = [task.scores(o, b) for o, b in zip(single, alone, strict=True)]
    torch.testing.assert_close(task.features(outputs, both), vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[weight > 0], torch.cat([s[w > 0] for s, w in scored]), rtol=1e-4, atol=1e-4)
    assert float(weight.sum()) == pytest.approx(3), "a row counts 1, whatever its length"
    torch.testing.assert_close(found["nll"], torch.cat([part["nll"] for part in parts]), rtol=1e-4, atol=1e-4)
    texts = [loaded.processor.text(ids.numpy()) for ids in found["written"]]
    assert texts == [loaded.processor.text(part["written"][0].numpy()) for part in parts]


@pytest.mark.parametrize("kind", MODELS)
def test_a_gpu_is_waited_for_by_alignments_alone(kind: str) -> None:
    """Also where rows are run one by one, as those of teachers may be."""
    task, loaded = fresh(kind)
    batch = batch_of(task, loaded, info().splits["test"][:3])
    with waits.watching(loaded.model) as watch:
        outputs = task.forward(loaded.model.train(), batch)
        values, weight, _ = task.loss(outputs, batch)
        torch.autograd.grad((values * weight).sum(), outputs.logits)
        task.scores(outputs, batch)
        task.scores(task.forward(loaded.model.eval(), batch), batch)
    found = {wait.name for wait in watch.found}
    assert found == (set(task.waits) if "blank" in batch else set())


def test_a_text_that_is_too_long_for_its_frames_teaches_nothing() -> None:
    task, loaded = fresh()
    rows = info().splits["test"][:2]
    batch = batch_of(task, loaded, {"audio": rows["audio"], "text": [rows["text"][0], "la" * 200]})
    values, weight, _ = task.loss(task.forward(loaded.model, batch), batch)
    assert values[0] > 0 and values[1] == 0 and weight[1] == 400 and math.isfinite(float(values.sum()))
    values.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in loaded.model.parameters() if p.grad is not None)


# --- what transformers says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_pipeline_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    from transformers import pipeline

    task, loaded = fresh(kind)
    task.save(loaded, tmp_path / "model")
    assert inference.infer_task(str(tmp_path / "model")) == TASK
    waves = [audio.decode(value, 8000, 0) for value in info().splits["test"]["audio"]]
    for i, wave in enumerate(waves):
        (tmp_path / f"{i}.wav").write_bytes(audio.wav(wave, 8000))
    files = [str(tmp_path / f"{i}.wav") for i in range(len(waves))]
    said = inference.predict(str(tmp_path / "model"), files, max_new_tokens=12)
    pipe: Any = pipeline(TASK, model=str(tmp_path / "model"))  # type: ignore
    given = {} if kind in OF_FRAMES else {"max_new_tokens": 12}
    theirs = [pipe(wave.copy(), **given)["text"] for wave in waves]
    assert said["prediction"] == theirs and len(set(theirs)) > 1
    again = task.load(Model(path=str(tmp_path / "model")), info())
    assert task.signature(again) == task.signature(loaded)
    names = [name for layer in task.layers(loaded.model) for name in layer]
    assert len(names) == len(set(names)) and len(task.layers(loaded.model)) >= 3


def test_greedy_reading_collapses_and_leaves_out_blanks() -> None:
    task, loaded = fresh()
    heard = loaded.processor
    ids = heard.tokenizer.convert_tokens_to_ids(["l", "l", "<pad>", "l", "a", "a", "|", "|", "m", "<pad>", "<pad>"])
    assert heard.text(np.array([*ids, -100, -100])) == "lla m" and heard.text(np.array([-100])) == ""
    assert task.predict(loaded.model, batch_of(task, loaded, info().splits["test"][:2]), {})["written"].shape[0] == 2


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_of_the_training_texts(tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    task, loaded = fresh()
    task.save(loaded, tmp_path)
    names = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(names, key=names.get) == ["<pad>", "<unk>", "|", *sorted({*"lamiso"})]
    assert loaded.model.config.vocab_size == len(names) and loaded.model.config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("la mi")["input_ids"] == [names[c] for c in "la|mi"]
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "Wav2Vec2Processor"
    spelled = SpeechRecognition(case="upper", remove="l")
    assert spelled.plain(" la  mi, so ") == "A MI, SO"
    names = spelled.load(Model(**KIT), info()).processor.tokenizer.get_vocab()
    assert "A" in names and not {"a", "L"} & set(names)


def test_the_targets_of_a_decoder() -> None:
    """They end, also where they are cut, and do not begin with what the decoder is given to start with."""
    task, loaded = fresh("whisper", max_target_length=6)
    heard, model = loaded.processor, loaded.model
    start, quiet, end = (heard.tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in (_START, _QUIET, "endoftext"))
    assert heard.start == start == model.generation_config.decoder_start_token_id
    ids = heard.tokens("la", 20)
    assert ids[0] == quiet and ids[-1] == end and ids.count(end) == 1 and heard.text(np.array([start, *ids])) == "la"
    cut = heard.tokens("la mi so la mi so so so xyz", 6)
    assert len(cut) == 6 and cut[-1] == end and cut[0] == quiet
    batch = batch_of(task, loaded, info().splits["test"][:2])
    assert writing.shifted(batch["labels"], model)[:, :2].tolist() == [[start, quiet]] * 2


def test_texts_that_a_vocabulary_cannot_spell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task, loaded = fresh()
    task.save(loaded, tmp_path)

    def load(texts: list[str], **settings: Any) -> None:
        other = info(len(texts))
        rows = other.splits["train"].remove_columns("text").add_column("text", texts)
        other.splits["train"] = rows
        SpeechRecognition(**settings).load(Model(path=str(tmp_path)), other)

    with pytest.raises(RecipeError, match=r"no tokens for 100% of the characters") as error:
        load(["LA MI"] * 3)
    assert "task.case" in error.value.remedy
    load(["LA MI"] * 3, case="lower")
    assert not caplog.records
    load(["la mi!"] * 3)
    assert "20 % of the characters of the training texts: !" in caplog.text
    with pytest.raises(RecipeError, match="stands for blanks"):
        other = info(3)
        rows = other.splits["train"].remove_columns("text").add_column("text", ["a|b"] * 3)
        other.splits["train"] = rows
        SpeechRecognition().load(Model(**KIT), other)


def test_a_pretrained_backbone_gets_a_head(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    config = AutoConfig.for_model("wav2vec2", **TINY)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    fresh()[1].processor.extractor.save_pretrained(tmp_path)
    assert AutoFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 8000
    loaded = SpeechRecognition().load(Model(path=str(tmp_path)), info())
    assert sorted(loaded.new_parameters) == ["lm_head.bias", "lm_head.weight"]
    assert loaded.model.config.vocab_size == len(loaded.processor.tokenizer) == 10 - 1


def test_models_that_are_refused(tmp_path: Path) -> None:
    for kind in ("bert", "dia"):
        with pytest.raises(RecipeError, match=f"type '{kind}' does not recognise speech"):
            SpeechRecognition().load(Model(config=kind), info())
    with pytest.raises(RecipeError, match="reads input_features, Wav2Vec2FeatureExtractor makes input_values"):
        SpeechRecognition().load(Model(config="wav2vec2-bert", config_overrides=BERT), info())
    with pytest.raises(RecipeError, match="does not write what it hears by a decoder of its own"):
        SpeechRecognition().load(
            Model(
                config="qwen3_asr",
            ),
            info(),
        )
    short = {**MODELS["whisper"]["config_overrides"], "max_source_positions": 60}
    with pytest.raises(RecipeError, match=r"max_source_positions=60 are 1.2 s") as error:
        SpeechRecognition().load(Model(**{**MODELS["whisper"], "config_overrides": short}), info())
    assert "multiple of 50" in error.value.remedy
    with pytest.raises(RecipeError, match="is not told which language"):
        fresh(spoken_language="german")
    task, loaded = fresh()
    batch = batch_of(task, loaded, info().splits["test"][:2])
    with pytest.raises(RecipeError, match="no label smoothing"):
        task.loss(task.forward(loaded.model, batch), batch, label_smoothing=0.1)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    task, loaded = fresh(max_seconds=0.3)
    wave = np.sin(np.arange(2800) / 9) * 0.5
    for value, message in (
        ({"bytes": audio.wav(wave, 8000), "path": None}, "0.3[0-9]* s long, above 0.3 s"),
        ({"bytes": audio.wav(wave[:20], 8000), "path": None}, "0.003 s of sound give no frame"),
        ({"bytes": b"no sound", "path": None}, "cannot be decoded"),
    ):
        with pytest.raises(RowError, match=message):
            task.preprocess({"audio": [value], "text": ["la"]}, loaded, True)
    rows = sounds(6).to_list()
    rows[2]["audio"] = {"bytes": audio.wav(np.tile(wave, 20), 8000), "path": None}
    rows[4]["audio"] = {"bytes": b"RIFF", "path": None}
    features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
    for name in ("train", "validation", "test"):
        in_memory(rows, features).to_parquet(tmp_path / f"{name}.parquet")
    found = prepare("tones", Data(str(tmp_path), drop=["unreadable"]), SpeechRecognition(max_seconds=2.0))
    assert found.splits["test"]["index"][:] == [0, 1, 3, 5] and found.counts["unreadable"] == 6
    given = {"task": {TASK: {"max_seconds": 2.0}}, "model": KIT, "training": QUICK}
    with pytest.raises(DataError, match=r"row 2: the sound is 7\.0 s long, above 2 s"):
        run(Recipe([Train("one")], data=Data(str(tmp_path)), **given), tmp_path / "out")


def test_roles(folder: Path) -> None:
    def tasks(**columns: Any) -> list[str]:
        return [name for name, _ in fitting_tasks(datasets.Features({"audio": datasets.Audio(), **columns}))]

    text, label = datasets.Value("string"), datasets.ClassLabel(names=["a", "b"])
    assert tasks(sentence=text) == [TASK] and tasks(text=text, speaker=text) == [TASK]
    assert tasks(label=label, speaker=text) == ["audio-classification"] and tasks(speaker=text) == []
    prepared = prepare("tones", Data(str(folder)), SpeechRecognition())
    assert prepared.roles == {"audio": "audio", "text": "sentence"} and prepared.counts["empty"] == 0


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_jiwer() -> None:
    import jiwer

    said, wanted = ["the cat sat", "", "on on the mat", "x"], ["the cat sat down", "a b", "on the mat", ""]
    for name, theirs in (("wer", jiwer.wer), ("cer", jiwer.cer)):
        metric = metrics.of_texts(name)
        counts = metric.counts(said, wanted)
        assert metric.score(counts.sum(0)) == pytest.approx(theirs(wanted, said))
        assert metric.compute(predictions=said, references=wanted)[metric.name] == pytest.approx(theirs(wanted, said))
        twice = theirs([*wanted, wanted[0]], [*said, said[0]])
        assert metric.score(np.array([2.0, 1, 1, 1]) @ counts) == pytest.approx(twice)
    assert metrics.of_texts("wer").score(np.array([2, 0])) == math.inf
    assert metrics.of_texts("wer").score(np.array([0, 0])) == 0


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_measured_on_the_rows_own_texts(kind: str) -> None:
    import jiwer

    task, loaded = fresh(kind, case="upper")
    found = predicted(task, loaded)
    scores = task.measure(found, Loaded(None, None), info())  # type: ignore[arg-type]  # as the report does it
    table = task.table(found, loaded, info())
    assert table["reference"] == list(info().splits["test"]["text"])
    said, wanted = ([task.plain(text) for text in table[name]] for name in ("prediction", "reference"))
    assert scores.metrics["wer"] == pytest.approx(jiwer.wer(wanted, said)) and scores.metrics["wer"] > 0
    assert scores.metrics["cer"] == pytest.approx(jiwer.cer(wanted, said))
    for name, statistic in scores.statistics.items():
        assert scores.metrics[name] == pytest.approx(statistic(np.ones(7)))
    values, weights = scores.examples["loss"]
    assert scores.metrics["loss"] == pytest.approx((values * weights).sum() / weights.sum())
    assert task.metric == "wer" and not task.greater_is_better
    with pytest.raises(RecipeError, match="no 'war'"):
        SpeechRecognition(metrics=["war"])


def test_without_its_library_a_metric_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.of_texts.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="metric 'wer' needs jiwer") as error:
        fresh()
    assert "kt_hf[speech]" in error.value.remedy and "loss" in error.value.remedy
    assert fresh(metrics=["loss"])


# --- in recipes ------------------------------------------------------------------------------------------------------


def test_it_conforms() -> None:
    testing.check_task(TASK)
    testing.check_strategy("distill", task=TASK)


def test_outputs_of_frozen_layers_are_kept(folder: Path, tmp_path: Path) -> None:
    """Also where the layers above write into them, as wav2vec 2.0 does at padding."""
    found = []
    for keep in (False, True):
        strategies = [{"finetune": {"freeze_layers": 2}}]
        training = {**QUICK, "cache_frozen": keep, "max_steps": 6}
        recipe = Recipe([Train("one", strategies=strategies)], data=Data(str(folder)), model=KIT, training=training)
        found.append(run(recipe, tmp_path / str(keep))["stages"][0])
    assert found[0]["metrics"]["loss"]["value"] == pytest.approx(found[1]["metrics"]["loss"]["value"], rel=1e-5)


def test_frames_of_an_ensemble_are_read_as_of_one_model(tmp_path: Path) -> None:
    task, loaded = fresh()
    batch = batch_of(task, loaded, info().splits["test"][:3])
    with torch.no_grad():
        scores, weight = task.scores(task.forward(loaded.model, batch), batch)
        ours = task.predict(loaded.model, batch, {})
    found = task.from_scores(scores.log_softmax(-1), weight, batch)
    assert torch.equal(found["written"], ours["written"]) and torch.equal(found["tokens"], ours["tokens"])
    torch.testing.assert_close(found["nll"], ours["nll"])
    task, loaded = fresh("whisper")
    batch = batch_of(task, loaded, info().splits["test"][:3])
    with pytest.raises(RecipeError, match="does not write"):
        task.from_scores(scores, weight, batch)


@pytest.mark.slow
def test_every_strategy(folder: Path, tmp_path: Path) -> None:
    """On a decoder; the grid has them on frames. Ensembles are refused where texts are to be written."""
    data, model = Data(str(folder)), MODELS["whisper"]
    report = task_grid.run_grid(tmp_path / "out", data, model, {TASK: {**SETTINGS, "metrics": ["loss"]}})
    assert report["uniform"]["metrics"]["loss"]["value"] == report["again"]["metrics"]["loss"]["value"]
    assert report["together"]["metrics"]["loss"]["high"] is not None
    together = str(tmp_path / "out" / "together" / "model")
    found = inference.evaluate(together, str(folder))["metrics"]["loss"]["value"]
    assert found == pytest.approx(report["together"]["metrics"]["loss"]["value"], rel=1e-5)
    with pytest.raises(RecipeError, match="does not write"):
        inference.evaluate(together, str(folder), [f"task.{TASK}.metrics=[wer]"])


@pytest.mark.slow
def test_two_ranks_write_as_one(folder: Path, tmp_path: Path) -> None:
    task, loaded = fresh("speech_to_text")
    (tmp_path / "model").mkdir()
    task.save(loaded, tmp_path / "model")
    settings = [f"task.{TASK}.{name}={value}" for name, value in SETTINGS.items()]
    task_grid.compare_ranks(tmp_path, str(tmp_path / "model"), str(folder), TASK, settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_it_learns(kind: str, folder: Path, tmp_path: Path) -> None:
    """What is learnt is what is written: the texts of the training rows, from their sounds."""
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    for name in ("train", "validation", "test"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    overrides = {**MODELS[kind]["config_overrides"], **({"init_std": 0.1} if kind == "whisper" else {})}
    training = {"max_steps": 400, "per_device_train_batch_size": 12, "learning_rate": 1e-2, "eval_steps": 0}
    model = {**MODELS[kind], "config_overrides": overrides}
    recipe = Recipe([Train("one")], data=Data(str(tmp_path)), task={TASK: SETTINGS}, model=model, training=training)
    assert run(recipe, tmp_path / "out")["stages"][0]["metrics"]["wer"]["value"] < 0.5
