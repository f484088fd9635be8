"""Audio classification: decoding, resampling, models, augmentation, exports."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch

from kt_hf import Data, Recipe, Train, audio, augmenting, inference, randomness, registry, run
from kt_hf.data import prepare
from kt_hf.errors import DataError, RecipeError, RowError
from kt_hf.reading import in_memory
from kt_hf.recipe import Model

AudioClassification = registry.load("task", "audio-classification")
WAV2VEC2 = AudioClassification.conformance["model"]
AST = {
    "config": "audio-spectrogram-transformer",
    "config_overrides": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 16,
        "max_length": 24,
        "patch_size": 4,
        "time_stride": 4,
        "frequency_stride": 4,
    },
}
NAMES = ["low", "middle", "high"]
TASK = {"audio-classification": {"max_seconds": 0.2}}
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "eval_steps": 2}


def sound(height: float, seconds: float = 0.15, rate: int = 8000, channels: int = 1, kind: str = "WAV") -> bytes:
    time = np.arange(round(seconds * rate)) / rate
    wave = (np.sin(2 * np.pi * height * time) * 0.5).astype(np.float32)
    content = io.BytesIO()
    soundfile.write(content, np.stack([wave] * channels, 1), rate, format=kind)
    return content.getvalue()


def folder(path: Path, **splits: int) -> Path:
    path.mkdir(exist_ok=True)
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=NAMES)})
    for split, count in (splits or {"train": 12, "validation": 6, "test": 7}).items():
        rows = []
        for i in range(count):
            content = sound((300, 900, 2500)[i % 3], 0.1 + 0.02 * (i % 4))
            rows.append({"audio": {"bytes": content, "path": None}, "label": i % 3})
        in_memory(rows, features).to_parquet(path / f"{split}.parquet")
    return path


def recipe(
    path: Path, model: dict[str, Any] = WAV2VEC2, data: Any = None, stages: Any = None, **training: Any
) -> Recipe:
    return Recipe(
        data=Data(str(path), **(data or {})),
        task=TASK,
        model=model,
        training={**QUICK, **training},
        stages=stages or [Train("one")],
    )


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_sound_becomes_one_channel_at_the_models_rate(kind):
    wave = audio.decode({"bytes": sound(400, 0.5, 44100, 2, kind), "path": None}, 16000, 0)
    assert wave.dtype == np.float32 and abs(len(wave) - 8000) <= 1
    strongest = np.abs(np.fft.rfft(wave)).argmax() * 16000 / len(wave)
    assert strongest == pytest.approx(400, abs=3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "there is no sound"),
        ({"bytes": b"no sound", "path": None}, "cannot be decoded"),
        ({"bytes": b"", "path": None}, "cannot be decoded"),
        ({"bytes": sound(1)[:30], "path": None}, "cannot be decoded|holds no sound"),
        ({"bytes": None, "path": "absent.wav"}, "cannot be decoded"),
    ],
)
def test_broken_sound_is_named_by_its_row(value, message):
    with pytest.raises(RowError, match=message):
        audio.decode(value, 8000, 7)


def test_a_broken_row_stops_a_training_by_its_number(tmp_path):
    path = folder(tmp_path)
    rows = datasets.Dataset.from_parquet(str(path / "train.parquet")).cast_column("audio", datasets.Audio(decode=False))
    listed = rows.to_list()
    listed[5]["audio"] = {"bytes": b"RIFF....", "path": None}
    in_memory(listed, datasets.Features({**rows.features, "audio": datasets.Audio()})).to_parquet(
        path / "train.parquet"
    )
    with pytest.raises(DataError, match="row 5: it cannot be decoded"):
        run(recipe(path), tmp_path / "out")


@pytest.mark.parametrize("model", [WAV2VEC2, AST], ids=["wav2vec2", "spectrogram transformer"])
def test_a_recipe_and_its_export(model, tmp_path):
    path = folder(tmp_path / "data")
    stages = [
        Train("first", compare=["majority"]),
        Train("second", strategies=["lora", {"distill": {"teacher": "@first"}}, "ema"]),
    ]
    report = run(recipe(path, model, stages=stages), tmp_path / "out")
    assert [s["metric"] for s in report["stages"]] == ["accuracy"] * 2
    (tmp_path / "x.wav").write_bytes(sound(300))
    (tmp_path / "y.flac").write_bytes(sound(2500, kind="FLAC", rate=16000))
    files = [str(tmp_path / "x.wav"), str(tmp_path / "y.flac")]
    saved = str(tmp_path / "out" / "first" / "model")
    assert inference.infer_task(saved) == "audio-classification"
    said = inference.predict(saved, files, task=None)
    assert set(said["prediction"]) <= set(NAMES) and said["input"] == files


def test_the_pipeline_of_transformers_gives_the_same(tmp_path):
    """On waves that fill the length that the task pads to: the pipeline pads to the longest of its own batch."""
    from transformers import pipeline

    run(recipe(folder(tmp_path / "data")), tmp_path / "out")
    saved = str(tmp_path / "out" / "one" / "model")
    task = AudioClassification(max_seconds=0.2)
    content = {"bytes": sound(700, 0.2), "path": None}
    info = prepare("d", Data(str(tmp_path / "data")), task)
    loaded = task.load(Model(path=saved), info)
    rows = task.preprocess({"audio": [content]}, loaded, False)
    batch = task.collate([{**{k: v[0] for k, v in rows.items()}, "index": 0}], loaded)
    with torch.no_grad():
        ours = task.forward(loaded.model.eval(), batch).logits.softmax(-1)[0]
    wave = audio.decode(content, 8000, 0)
    theirs = pipeline("audio-classification", model=saved)({"raw": wave, "sampling_rate": 8000}, top_k=None)
    assert {e["label"]: pytest.approx(e["score"], abs=1e-5) for e in theirs} == dict(
        zip(NAMES, ours.tolist(), strict=True)
    )


def test_a_prediction_does_not_depend_on_its_batch(tmp_path):
    task = AudioClassification(max_seconds=0.2)
    info = prepare("d", Data(str(folder(tmp_path))), task)
    torch.manual_seed(0)
    loaded = task.load(Model(**WAV2VEC2), info)
    model = loaded.model.eval()
    raw = info.splits["test"][:]
    rows = task.preprocess(raw, loaded, False)
    rows = [{**{k: v[i] for k, v in rows.items()}, "index": i} for i in range(7)]
    with torch.no_grad():
        together = task.forward(model, task.collate(rows, loaded)).logits
        apart = torch.cat([task.forward(model, task.collate([row], loaded)).logits for row in rows])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(augmenting.OWN["audio"]))
def test_changes_of_waves_draw_from_the_seed_alone(name):
    wave = np.sin(np.arange(800) / 5).astype(np.float32)
    change = augmenting.transforms([name], "audio")
    assert change is not None
    found = []
    for seed in (1, 1, 2):
        randomness.seed_all(seed)
        found.append(change(wave.copy()))
    assert found[0].dtype == np.float32 and found[0].shape == wave.shape and np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2]) and not np.array_equal(found[0], wave)


def test_noise_has_the_ratio_that_was_asked_for():
    wave = np.sin(np.arange(80000) / 5).astype(np.float32)
    change = augmenting.transforms([{"Noise": {"low": 20, "high": 20}}], "audio")
    assert change is not None
    noise = change(wave) - wave
    assert 10 * np.log10(np.square(wave).mean() / np.square(noise).mean()) == pytest.approx(20, abs=0.2)


def test_words_are_left_out_or_masked():
    text = " ".join(f"w{i}" for i in range(400))
    dropped, masked = (augmenting.transforms([name], "text") for name in ("WordDropout", "WordMask"))
    assert dropped is not None and masked is not None
    randomness.seed_all(0)
    assert 320 < len(dropped(text).split()) < 390 and set(dropped(text).split()) < set(text.split())
    assert 30 < masked(text).split().count("[MASK]") < 90 and len(masked(text).split()) == 400
    everything = augmenting.transforms([{"WordDropout": {"p": 1.0}}], "text")
    assert everything is not None and everything("only words") == "only"


@pytest.mark.parametrize(
    ("spec", "medium", "message"),
    [
        ("Nose", "audio", "there is no 'Nose' for audio\ndid you mean 'Noise'"),
        ({"Noise": {"lo": 1}}, "audio", "unknown setting"),
        ({"Shift": {"share": 2}}, "audio", "data.augment.Shift.share"),
        ({"Noise": {"low": 9, "high": 1}}, "audio", "low=9.0 is above"),
        ("RandomRotation", "text", "there is no 'RandomRotation' for text"),
        ("WordDropout", "image", "torchvision has no transform 'WordDropout'"),
        ("WordDropout", "", "rows are not augmented"),
        ("RandomRotaton", None, "torchvision has no transform"),
    ],
)
def test_wrong_augmentation_is_refused(spec, medium, message):
    with pytest.raises(RecipeError, match=message):
        augmenting.transforms([spec], medium)


def test_augmented_waves_are_trained_on_and_do_not_depend_on_workers(tmp_path):
    from safetensors.torch import load_file

    path = folder(tmp_path / "data")
    augment = {"augment": ["Noise", {"Shift": {"share": 0.3}}]}

    def weights(name: str, data: Any, **training: Any) -> dict[str, torch.Tensor]:
        run(recipe(path, data=data, **training), tmp_path / name)
        return load_file(tmp_path / name / "one" / "model" / "model.safetensors")

    plain, one, two = weights("a", {}), weights("b", augment), weights("c", augment, dataloader_num_workers=2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], plain[name]) for name in one)
