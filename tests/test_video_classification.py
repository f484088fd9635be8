"""Video classification: frames out of lists and files, one draw of augmentation for a clip, models, exports."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import task_grid
import torch
from PIL import Image

from kt_hf import Data, Recipe, Train, augmenting, inference, randomness, registry, run, testing, video
from kt_hf.data import prepare
from kt_hf.errors import DataError, RecipeError, RowError
from kt_hf.loader import Collate, Rows
from kt_hf.recipe import Model

VideoClassification = registry.load("task", "video-classification")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
OF_JEPA = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_pooler_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "videomae": {**SIZES, "patch_size": 4},
    "timesformer": {**SIZES, "patch_size": 4},
    "vivit": {**SIZES, "tubelet_size": [2, 4, 4]},
    "vjepa2": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 8, **OF_JEPA},
}
NAMES = ["up", "down", "still"]
TINY = {"config": "videomae", "config_overrides": {**MODELS["videomae"], "num_frames": 4, "initializer_range": 0.2}}
TASK = {"video-classification": {"num_frames": 4}}
QUICK = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "eval_steps": 0}


def clips(count: int, seed: int = 0) -> list[list[Image.Image]]:
    return VideoClassification.sample(count, np.random.default_rng(seed))["video"][:]


def folder(path: Path, column: str = "frames", **splits: int) -> Path:
    path.mkdir(exist_ok=True)
    label = datasets.ClassLabel(names=NAMES)
    features = datasets.Features({column: datasets.List(datasets.Image()), "label": label})
    for seed, (split, count) in enumerate((splits or {"train": 9, "validation": 6, "test": 7}).items()):
        columns = {column: clips(count, seed), "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path / f"{split}.parquet")
    return path


def film(frames_THWC: np.ndarray, kind: str = "avi") -> bytes:
    """A file that loses nothing. In Matroska the header does not say how many frames there are."""
    import av

    content = io.BytesIO()
    with av.open(content, "w", format=kind) as container:
        stream: Any = container.add_stream("ffv1", rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "bgr0"
        for frame in frames_THWC:
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(image.reformat(format="bgr0")))
        container.mux(stream.encode())
    return content.getvalue()


def pixels(clip: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in clip])


def loaded_on(path: Path, model: Any, **settings: Any) -> Any:
    task = VideoClassification(**settings)
    info = prepare("clips", Data(str(path)), task)
    torch.manual_seed(0)
    loaded = task.load(Model(**model), info)
    loaded.model.eval()
    return task, info, loaded


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "wanted"), [(8, 8), (8, 4), (7, 4), (90, 16), (100, 7)])
def test_frames_are_taken_as_transformers_does(total: int, wanted: int):
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=wanted)
    assert video.evenly(total, wanted) == theirs.tolist()
    assert video.evenly(3, 6) == [0, 0, 1, 1, 2, 2] and video.evenly(3, None) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["avi", "matroska"])
def test_a_file_and_a_list_of_images_give_the_same(kind: str, tmp_path: Path):
    images = clips(3)[2]
    content = film(pixels(images), kind)
    (tmp_path / "x.film").write_bytes(content)
    for wanted in (None, 4, 9):
        expected = video.clip(images, wanted, 0)
        assert expected.shape == (wanted or 7, 3, 8, 8) and expected.dtype == torch.uint8
        for value in ({"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "x.film")}):
            assert torch.equal(video.clip(value, wanted, 0), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "there is no video"),
        ([], "there is no video"),
        ({"bytes": None, "path": None}, "there is no video"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "differ in size .8x8 and 8x9"),
        ([Image.new("RGB", (8, 8)), None], "frame 1 is missing"),
        ({"bytes": b"no film", "path": None}, "cannot be decoded as video"),
        ({"bytes": b"", "path": None}, "cannot be decoded as video"),
        ({"bytes": None, "path": "absent.mp4"}, "cannot be decoded as video"),
    ],
)
def test_clips_that_cannot_be_used(value: Any, message: str):
    with pytest.raises(RowError, match=message):
        video.clip(value, 4, 0)
    with pytest.raises(RowError, match=message):
        VideoClassification().check({"video": value})


def test_without_a_decoder_files_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(RecipeError, match="needs av") as error:
        video.clip({"bytes": b"film", "path": None}, 4, 0)
    assert "kt_hf[video]" in error.value.remedy and "lists of images" in error.value.remedy


def test_rows_that_cannot_be_used(tmp_path: Path):
    """Named by number where they stop a training; left out on request."""
    rows = datasets.Dataset.from_parquet(str(folder(tmp_path) / "train.parquet"))
    listed = rows.cast_column("frames", datasets.List(datasets.Image(decode=False))).to_list()
    listed[4]["frames"][2]["bytes"] = b"no picture"
    listed[7]["frames"] = []
    datasets.Dataset.from_list(listed, features=rows.features).to_parquet(tmp_path / "train.parquet")
    recipe = {"task": "video-classification", "model": TINY, "training": QUICK}
    with pytest.raises(DataError, match="image of row 4 of train cannot be read"):
        run(Recipe([Train("one")], data=Data(str(tmp_path), drop=["empty"]), **recipe), tmp_path / "one")
    info = prepare("clips", Data(str(tmp_path), drop=["unreadable"]), VideoClassification())
    assert info.counts["unreadable"] == 2 and not {4, 7} & set(info.splits["train"]["index"])
    listed[4] = listed[3]
    datasets.Dataset.from_list(listed, features=rows.features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 7: there is no video"):
        run(Recipe([Train("one")], data=Data(str(tmp_path)), **recipe), tmp_path / "two")
    assert prepare("clips", Data(str(tmp_path), drop=["empty"]), VideoClassification()).counts["empty"] == 1


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_all_frames_of_a_clip_are_changed_alike(tmp_path: Path):
    task, _, loaded = loaded_on(folder(tmp_path), TINY)
    random = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    rows = {"video": [[Image.fromarray(random)] * 5], "label": [0]}
    change = augmenting.transforms([{"RandomCrop": {"size": 6}}, "RandomHorizontalFlip", "ColorJitter"], task.augments)
    found = []
    for seed in (1, 1, 2):
        randomness.seed_all(seed)
        found.append(task.preprocess(rows, loaded, True, change)["pixel_values"][0])
    assert all(torch.equal(frame, found[0][0]) for frame in found[0]), "a clip that stands still does so afterwards"
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], task.preprocess(rows, loaded, True)["pixel_values"][0])


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_says_what_plain_transformers_does(kind: str, tmp_path: Path):
    """Also through transformers' pipeline, on decoded clips: of files it would decode by torchcodec."""
    from transformers import AutoModelForVideoClassification, AutoVideoProcessor, pipeline

    path = folder(tmp_path / "data")
    overrides = {**MODELS[kind], **({"patch_size": 4, "mlp_ratio": 1.5} if kind == "vjepa2" else {})}
    task, info, loaded = loaded_on(path, {"config": kind, "config_overrides": overrides}, num_frames=4)
    task.save(loaded, tmp_path / "model")
    assert inference.infer_task(str(tmp_path / "model")) == "video-classification"
    said = inference.predict(str(tmp_path / "model"), [str(path / "test.parquet")])
    plain = AutoModelForVideoClassification.from_pretrained(tmp_path / "model").eval()
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "model")
    expected = []
    for clip in info.splits["test"]["video"]:
        taken = [np.asarray(clip[i * len(clip) // 4]) for i in range(4)]
        inputs = processor(np.stack(taken), do_sample_frames=False, return_tensors="pt")
        with torch.no_grad():
            expected.append(plain(**inputs).logits.softmax(-1)[0])
    best = [int(chances.argmax()) for chances in expected]
    assert said["prediction"] == [NAMES[i] for i in best] and len(said["prediction"]) == 7
    chances = [float(row[i]) for row, i in zip(expected, best, strict=True)]
    np.testing.assert_allclose(said["probability"], chances, atol=1e-5)
    if kind != "vjepa2":  # whose configuration has no num_frames, which the pipeline reads
        pipe = pipeline("video-classification", model=str(tmp_path / "model"))
        theirs: Any = [pipe(pixels(clip), top_k=1)[0] for clip in info.splits["test"]["video"]]  # type: ignore
        assert [one["label"] for one in theirs] == said["prediction"]
        np.testing.assert_allclose([one["score"] for one in theirs], chances, atol=1e-5)
    batch = Collate(task, loaded)(Rows(info, "test", task, loaded).__getitems__([(0, 0), (0, 1)]))
    with torch.no_grad():
        outputs = task.forward(loaded.model, batch, output_hidden_states=True)
    assert task.features(outputs, batch).shape == (2, 24 if kind == "vjepa2" else 16)
    assert len(task.layers(loaded.model)) >= 3 and "classifier" in task.head(loaded.model)


def test_numbers_of_frames(tmp_path: Path):
    task, info, loaded = loaded_on(folder(tmp_path / "data"), TINY)
    task.save(loaded, tmp_path / "model")
    assert task.preprocess(info.splits["test"][:2], loaded, False)["pixel_values"].shape == (2, 4, 3, 8, 8)
    with pytest.raises(RecipeError, match="num_frames=6, but the model takes 4 frames"):
        VideoClassification(num_frames=6).load(Model(path=str(tmp_path / "model")), info)
    _, _, other = loaded_on(tmp_path / "data", {**TINY, "config_overrides": MODELS["videomae"]}, num_frames=6)
    assert other.model.config.num_frames == 6 and other.processor.num_frames == 6


def test_the_processor_of_an_image_model_serves(tmp_path: Path):
    """Checkpoints of before video processors have an image processor's file."""
    task, info, loaded = loaded_on(folder(tmp_path / "data"), TINY)
    task.save(loaded, tmp_path / "model")
    found = (tmp_path / "model" / "video_preprocessor_config.json").read_text()
    (tmp_path / "model" / "video_preprocessor_config.json").unlink()
    changed = found.replace("video_processor_type", "image_processor_type").replace("VideoProcessor", "ImageProcessor")
    (tmp_path / "model" / "preprocessor_config.json").write_text(changed)
    again = task.load(Model(path=str(tmp_path / "model")), info)
    assert task.signature(again) == task.signature(loaded)


def test_files_and_tables_of_files(tmp_path: Path):
    """`kt-hf predict` on files, and a data set with a column of videos."""
    task, info, loaded = loaded_on(folder(tmp_path / "data"), TINY)
    task.save(loaded, tmp_path / "model")
    expected = inference.predict(str(tmp_path / "model"), [str(tmp_path / "data" / "test.parquet")])
    contents = [film(pixels(clip)) for clip in info.splits["test"]["video"]]
    files = [tmp_path / f"{i}.avi" for i in range(7)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    said = inference.predict(str(tmp_path / "model"), [str(file) for file in files])
    assert said["prediction"] == expected["prediction"] and said["probability"] == expected["probability"]
    features = datasets.Features({"film": datasets.Video(), "label": datasets.ClassLabel(names=NAMES)})
    (tmp_path / "films").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"film": {"bytes": content, "path": None}, "label": i % 3} for i, content in enumerate(contents)]
        inference.in_memory(rows, features).to_parquet(tmp_path / "films" / f"{split}.parquet")
    films = prepare("films", Data(str(tmp_path / "films"), drop=["unreadable"]), task)
    assert films.roles == {"video": "film", "label": "label"} and films.counts["unreadable"] == 0
    assert inference.evaluate(str(tmp_path / "model"), str(tmp_path / "films"))["data"]["num_examples"] == 7


# --- in recipes ------------------------------------------------------------------------------------------------------


def test_it_conforms():
    testing.check_task("video-classification")
    testing.check_strategy("distill", task="video-classification")


@pytest.mark.slow
def test_every_strategy(tmp_path: Path):
    report = task_grid.run_grid(tmp_path / "out", Data(str(folder(tmp_path / "data"))), TINY, TASK)
    assert report["uniform"]["metrics"]["accuracy"]["value"] == report["again"]["metrics"]["accuracy"]["value"]
    assert report["together"]["metrics"]["accuracy"]["high"] is not None
    said = inference.predict(str(tmp_path / "out" / "together" / "model"), [str(tmp_path / "data" / "test.parquet")])
    assert set(said["prediction"]) <= set(NAMES)


@pytest.mark.parametrize("label", ["classes", "number"])
def test_several_classes_and_numbers(label: str, tmp_path: Path):
    kinds = {"classes": datasets.List(datasets.ClassLabel(names=NAMES)), "number": datasets.Value("float32")}
    values = {"classes": [[0], [1, 2], []] * 2, "number": [0.5, 1.5, -1.0] * 2}
    features = datasets.Features({"frames": datasets.List(datasets.Image()), "label": kinds[label]})
    for split in ("train", "validation", "test"):
        columns = {"frames": clips(6), "label": values[label]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    recipe = Recipe([Train("one")], data=Data(str(tmp_path)), model=TINY, training=QUICK)
    found = run(recipe, tmp_path / "out")["stages"][0]
    assert found["metric"] == {"classes": "micro_f1", "number": "pearson"}[label]
