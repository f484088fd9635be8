"""Fusion of images, texts, sounds and tables: digits of scikit-learn, told in four ways."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import task_grid
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

from kt_hf import Data, Recipe, Train, audio, fusion_model, inference, registry, run, testing
from kt_hf.data import prepare
from kt_hf.errors import DataError, RecipeError
from kt_hf.reading import in_memory
from kt_hf.recipe import Model

NAME = "multimodal-classification"
Multimodal = registry.load("task", NAME)
TOWERS = {name: Multimodal.conformance["model"][name] for name in ("image", "text")}
WAV2VEC2 = registry.load("task", "audio-classification").conformance["model"]
SOUND = {**WAV2VEC2, "config_overrides": {**WAV2VEC2["config_overrides"], "mask_time_prob": 0.0}}
MODEL = {**TOWERS, "audio": SOUND, "projection_dim": 16}
WORDS = ["zero", "one", "two"]
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none", "num_threads": 1, "eval_steps": 0}
FUSIONS = ("sum", "concatenation", "gate", "cross_attention")


def picture(pixels: np.ndarray) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def plain_rows(rows: datasets.Dataset) -> list[dict[str, Any]]:
    return rows.cast_column("image", datasets.Image(decode=False)).to_list()


def digits(count: int, start: int = 0, label: Any = None) -> datasets.Dataset:
    """A picture of a digit, its name, a tone of its own height, and the sums of the picture's rows and columns."""
    found = load_digits(n_class=3)
    rows = []
    for i in range(start, start + count):
        digit, pixels = int(found.target[i]), found.images[i]
        time = np.arange(800 + 40 * (i % 3)) / 8000
        content = audio.wav(np.sin(2 * np.pi * (300, 800, 2000)[digit] * time) * 0.5, 8000)
        rows.append(
            {
                "image": picture((pixels * 15).astype(np.uint8)),
                "text": f"this is {WORDS[digit]} of {i}",
                "audio": {"bytes": content, "path": None},
                "table": [*pixels.sum(0), *pixels.sum(1)],
                "label": digit if label is None else label(digit),
            }
        )
    kinds = {"image": datasets.Image(), "audio": datasets.Audio(decode=False)}
    kinds |= {"text": datasets.Value("string"), "table": datasets.List(datasets.Value("float64"))}
    answer = datasets.ClassLabel(names=WORDS) if label is None else _kind(label(0))
    return in_memory(rows, datasets.Features({**kinds, "label": answer}))


def _kind(value: Any) -> Any:
    return datasets.List(datasets.Value("string")) if isinstance(value, list) else datasets.Value("float32")


def folder(path: Path, label: Any = None, change: Any = None, leave: tuple[str, ...] = (), **counts: int) -> Path:
    """7 rows of test, which two do not divide."""
    path.mkdir(exist_ok=True)
    for i, (split, count) in enumerate({"train": 18, "validation": 6, "test": 7, **counts}.items()):
        rows = digits(count, 150 * i, label).remove_columns(list(leave))
        (rows if change is None else change(split, rows)).to_parquet(path / f"{split}.parquet")
    return path


def loaded(path: Path, model: dict[str, Any] = MODEL, **settings: Any) -> tuple[Any, Any, Any]:
    task = Multimodal(max_seconds=0.12, **settings)
    info = prepare("d", Data(str(path)), task)
    torch.manual_seed(0)
    found = task.load(Model(**model), info)
    found.model.eval()
    return task, info, found


def batch_of(task: Any, rows: dict[str, Any], made: Any) -> dict[str, Any]:
    columns = task.preprocess({k: v for k, v in rows.items() if k != "index"}, made, False)
    count = len(next(iter(columns.values())))
    return task.collate([{**{k: v[i] for k, v in columns.items()}, "index": i} for i in range(count)], made)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("digits"))


def test_it_conforms() -> None:
    testing.check_task(NAME)
    testing.check_strategy("ema", task=NAME)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_fused(fusion: str, plain: Path) -> None:
    """Every fusion by its formula, from the projections that the model gives beside."""
    task, info, made = loaded(plain, fusion=fusion, shared_layers=1)
    batch = batch_of(task, info.splits["test"][:3], made)
    with torch.no_grad():
        outputs = task.forward(made.model, batch)
        embeds = [getattr(outputs, f"{name}_embeds") for name in ("image", "text", "audio", "table")]
        inner = made.model.fusion
        hidden = [F.gelu(F.layer_norm(inner.shared[0](x), (16,))) for x in embeds]
        if fusion == "cross_attention":
            assert inner.fused_width == 16
            moved = {**batch, "table": batch["table"] + 5}
            assert not torch.allclose(task.forward(made.model, moved).logits, outputs.logits)
            return
        expected = {
            "sum": lambda: sum(hidden),
            "concatenation": lambda: torch.cat(hidden, -1),
            "gate": lambda: sum(
                gate * x
                for gate, x in zip(
                    inner.gates(torch.cat(hidden, -1)).unflatten(-1, (4, 16)).softmax(1).unbind(1), hidden, strict=True
                )
            ),
        }[fusion]()
        torch.testing.assert_close(outputs.pooler_output, expected)
        torch.testing.assert_close(outputs.logits, made.model.classifier(expected))


@pytest.mark.parametrize("fusion", ["concatenation", "cross_attention"])
def test_a_prediction_does_not_depend_on_what_is_beside_it(fusion: str, plain: Path) -> None:
    """Texts and sounds of several lengths are padded; chunks of a batch give what the whole gives."""
    task, info, made = loaded(plain, fusion=fusion)
    rows = info.splits["test"][:4]
    rows["text"][1] = "two " * 12
    batch = batch_of(task, rows, made)
    with torch.no_grad():
        whole = task.forward(made.model, batch).logits
        for i in range(4):
            alone = batch_of(task, {k: v[i : i + 1] for k, v in rows.items()}, made)
            torch.testing.assert_close(task.forward(made.model, alone).logits[0], whole[i], rtol=1e-4, atol=1e-5)
            part = task.forward(made.model, task.part(batch, i, i + 1)).logits[0]
            torch.testing.assert_close(part, whole[i], rtol=1e-4, atol=1e-5)


def test_shared_layers_are_the_same_for_all_media(plain: Path) -> None:
    sizes = {}
    for count in (0, 2):
        _, _, made = loaded(plain, fusion="sum", shared_layers=count)
        sizes[count] = sum(p.numel() for p in made.model.parameters())
        head = Multimodal().head(made.model)
        assert sum("shared" in name for name in head) == count and "classifier" in head
        inside = {n for layer in Multimodal().layers(made.model) for n in layer}
        outside = {n for n, _ in made.model.named_parameters() if n.startswith(tuple(f"{name}." for name in head))}
        assert inside | outside == {n for n, _ in made.model.named_parameters()} and not inside & outside
    assert sizes[2] - sizes[0] == 2 * (2 * 16 + 16 * 32 + 32 + 32 * 16 + 16)


def test_tables_are_standardised_by_the_training_rows(plain: Path, tmp_path: Path) -> None:
    """In other units, a table says the same; mean and deviation are saved with the weights."""

    def in_other_units(split: str, rows: Any) -> Any:
        return rows.map(lambda row: {"table": [1000 * x - 7 for x in row["table"]]})

    other = folder(tmp_path / "data", change=in_other_units)
    found = []
    for path in (plain, other):
        task, info, made = loaded(path)
        with torch.no_grad():
            found.append(task.forward(made.model, batch_of(task, info.splits["test"][:5], made)).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    task.save(made, tmp_path / "model")
    table = np.array(info.splits["train"]["table"])
    saved = load_file(tmp_path / "model" / "model.safetensors")
    np.testing.assert_allclose(saved["fusion.table_model.mean"].numpy(), table.mean(0), rtol=1e-5)
    np.testing.assert_allclose(saved["fusion.table_model.deviation"].numpy()[1:7], table.std(0)[1:7], rtol=1e-5)


@pytest.mark.parametrize("fusion", ["gate", "cross_attention"])
def test_predict_is_what_plain_code_says(fusion: str, plain: Path, tmp_path: Path) -> None:
    """The saved folder, loaded by transformers' own classes; towers and their processors, too."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModelForSequenceClassification, AutoTokenizer

    task, info, made = loaded(plain, fusion=fusion, fusion_layers=2, shared_layers=1)
    task.save(made, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(model) is fusion_model.FusionForClassification
    rows = info.splits["test"][:]
    waves = [soundfile.read(io.BytesIO(value["bytes"]), dtype="float32")[0] for value in rows["audio"]]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    how = {"padding": "max_length", "max_length": 960, "truncation": True, "return_tensors": "pt"}
    sounds = extractor(waves, sampling_rate=8000, **how)
    with torch.no_grad():
        chances = model(
            **AutoTokenizer.from_pretrained(tmp_path)(rows["text"], padding=True, return_tensors="pt"),
            **AutoImageProcessor.from_pretrained(tmp_path)(
                [picture.convert("RGB") for picture in rows["image"]], return_tensors="pt"
            ),
            **{f"audio_{name}": value for name, value in sounds.items()},
            table=torch.tensor(rows["table"]),
        ).logits.softmax(-1)
    assert inference.infer_task(str(tmp_path)) == NAME
    # The sounds are shorter than the five seconds of the task's defaults: they are padded further, which is masked.
    said = inference.predict(str(tmp_path), [str(plain / "test.parquet")])
    assert said["prediction"] == [WORDS[int(i)] for i in chances.argmax(1)]
    np.testing.assert_allclose(said["probability"], chances.max(1).values.numpy(), rtol=1e-4)
    shown = inference.evaluate(str(tmp_path), str(plain), task=NAME)
    expected = float((chances.argmax(1) == torch.tensor(rows["label"])).float().mean())
    assert shown["metrics"]["accuracy"]["value"] == pytest.approx(expected)


def test_media_that_are_asked_for(plain: Path, tmp_path: Path) -> None:
    assert fusion_model.media(loaded(plain)[2].model.config) == ["image", "text", "audio", "table"]
    assert fusion_model.media(loaded(plain, media=["table", "image"])[2].model.config) == ["image", "table"]
    assert fusion_model.media(loaded(plain, media=["text"])[2].model.config) == ["text"]
    image = {"image": MODEL["image"], "projection_dim": 8}
    assert fusion_model.media(loaded(plain, image)[2].model.config) == ["image", "table"]
    with pytest.raises(RecipeError, match="there is no tower for audio"):
        loaded(plain, image, media=["image", "audio"])
    with pytest.raises(RecipeError, match="cross_attention of text alone"):
        loaded(plain, media=["text"], fusion="cross_attention")
    with pytest.raises(DataError, match="the data have no text"):
        loaded(folder(tmp_path / "less", leave=("text",)))
    with pytest.raises(RecipeError, match="does not fuse several media"):
        loaded(plain, {"config": "bert"})


def test_towers_of_models_of_several(plain: Path, tmp_path: Path) -> None:
    """A tower is taken out of a fused model, and out of a dual encoder; its processor comes along."""
    task, info, made = loaded(plain)
    task.save(made, tmp_path / "fused")
    dual = registry.load("task", "zero-shot-image-classification")()
    both = prepare("d", Data(str(plain)), dual)
    other = dual.load(Model(**TOWERS, projection_dim=8), both)
    dual.save(other, tmp_path / "dual")
    given = {"image": str(tmp_path / "dual"), "audio": str(tmp_path / "fused"), "projection_dim": 8}
    _, _, again = loaded(plain, given)
    for mine, theirs in (("vision_model", other.model.vision_model), ("audio_model", made.model.fusion.audio_model)):
        found, expected = getattr(again.model.fusion, mine).state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert again.processor.processor.feature_extractor.sampling_rate == 8000
    batch_of(task, info.splits["test"][:2], again)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", None, "1 rows of train have no image, row 3 the first"),
        ("audio", None, "1 rows of train have no audio, row 3 the first"),
        ("text", None, "row 3: there is no text"),
        ("table", None, "row 3 has no table"),
        ("table", [1.0, 2.0], "row 3 has a table of 2 numbers, the first one of 16"),
        ("table", [float("nan")] * 16, "row 3: number 0 of the table is nan"),
    ],
)
def test_a_row_without_a_medium_is_named(column: str, value: Any, message: str, tmp_path: Path) -> None:
    def spoil(split: str, rows: Any) -> Any:
        raw = plain_rows(rows)
        if split == "train":
            raw[3][column] = value
        return in_memory(raw, rows.features)

    path = folder(tmp_path / "data", change=spoil)
    recipe = Recipe([Train("one", training=QUICK)], data=Data(str(path)), task={NAME: {}}, model=MODEL)
    with pytest.raises(DataError, match=message):
        run(recipe, tmp_path / "out")
    if value is None:
        task = Multimodal()
        kept = prepare("d", Data(str(path), drop=["empty"]), task).splits["train"]
        assert len(kept) == 17 and 3 not in kept["index"]


@pytest.mark.parametrize(
    ("label", "metric"), [(lambda digit: float(digit), "pearson"), (lambda digit: WORDS[: digit + 1], "micro_f1")]
)
def test_numbers_and_several_classes(label: Any, metric: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "data", label)
    recipe = Recipe(
        [Train("one", training={**QUICK, "max_steps": 2})],
        data=Data(str(path)),
        task={NAME: {"media": ["image", "table"]}},
        model=MODEL,
    )
    found = run(recipe, tmp_path / "out")["stages"][0]
    assert found["metric"] == metric and np.isfinite(found["metrics"][metric]["value"])


def test_augmentation_changes_the_images(plain: Path) -> None:
    task, info, made = loaded(plain)
    rows = {k: v for k, v in info.splits["test"][:2].items() if k != "index"}
    dark = task.preprocess(rows, made, True, lambda picture: picture.point(lambda x: 0))
    same = task.preprocess(rows, made, True, None)
    assert (dark["pixel_values"] == -1).all() and not torch.equal(dark["pixel_values"], same["pixel_values"])
    assert torch.equal(dark["audio_input_values"][0], same["audio_input_values"][0])
    _, _, alone = loaded(plain, media=["text", "table"])
    with pytest.raises(RecipeError, match="augment changes images"):
        task.preprocess(rows, alone, True, lambda picture: picture)


# --- in recipes -------------------------------------------------------------------------------------------------------


def test_it_learns_from_the_medium_that_knows(tmp_path: Path) -> None:
    """Pictures of noise and a table that tells: the table is found."""
    random = np.random.default_rng(0)

    def noise(split: str, rows: Any) -> Any:
        pixels = random.integers(0, 255, (len(rows), 8, 8), dtype=np.uint8)
        raw = [{**row, "image": picture(p)} for row, p in zip(plain_rows(rows), pixels, strict=True)]
        return in_memory(raw, rows.features)

    path = folder(tmp_path / "data", change=noise, train=120, test=100)
    recipe = Recipe(
        [Train("one", training={**QUICK, "max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-3})],
        data=Data(str(path)),
        task={NAME: {"media": ["image", "table"], "fusion": "gate"}},
        model=MODEL,
    )
    assert run(recipe, tmp_path / "out")["stages"][0]["metrics"]["accuracy"]["value"] > 0.7


def test_a_teacher_of_other_media_is_refused(plain: Path, tmp_path: Path) -> None:
    stages = [
        Train("teacher", task={NAME: {"media": ["image", "table"]}}),
        Train("student", strategies=[{"distill": {"teacher": "@teacher"}}], task={NAME: {"media": ["text", "table"]}}),
    ]
    recipe = Recipe(stages, data=Data(str(plain)), model=MODEL, training={**QUICK, "max_steps": 1})
    with pytest.raises(RecipeError, match="differ in media"):
        run(recipe, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["gate", "cross_attention"])
def test_every_strategy(fusion: str, plain: Path, tmp_path: Path) -> None:
    task = {NAME: {"fusion": fusion, "max_seconds": 0.12}}
    report = task_grid.run_grid(tmp_path / "out", Data(str(plain)), MODEL, task)
    assert report["uniform"]["metrics"]["accuracy"]["value"] == report["again"]["metrics"]["accuracy"]["value"]
    trained = str(tmp_path / "out" / "frozen" / "model")
    settings = [f"task.{NAME}.max_seconds=0.12"]
    one = inference.evaluate(trained, str(plain), settings, task=NAME)
    assert one["metrics"]["accuracy"]["value"] == pytest.approx(report["frozen"]["metrics"]["accuracy"]["value"])
