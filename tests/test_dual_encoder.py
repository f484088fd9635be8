"""Dual encoders of every family, retrieval metrics, and contrastive training."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from kt_hf_plugins.contrastive import Contrastive
from kt_hf_plugins.zero_shot_image_classification import ZeroShotImageClassification, text_id
from PIL import Image
from torch import nn
from torch.nn import functional as F

from kt_hf import Model
from kt_hf.bundle import Bundle, Position
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.functional.losses import clip_rows, siglip_rows
from kt_hf.functional.retrieval import ranks as retrieval_ranks
from kt_hf.task import Loaded

if TYPE_CHECKING:
    from kt_hf.data import DataInfo

WORDS = ["red", "green", "blue"]
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 8,
}
BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
DISTIL = {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2, "max_position_embeddings": 16}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 12,
}
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 10, "width": 16, "heads": 2, "layers": 2},
}


def tower(config: str, overrides: dict[str, Any]) -> Model:
    return Model(config=config, config_overrides=overrides)


FAMILIES = {
    "vit_bert": Model(image=tower("vit", VIT), text=tower("bert", BERT), projection_dim=12),
    "resnet_bert": Model(image=tower("resnet", RESNET), text=tower("bert", BERT), projection_dim=12, processor=None),
    "vit_distilbert": Model(image=tower("vit", VIT), text=tower("distilbert", DISTIL), projection_dim=12),
    "clip": Model(config="clip", config_overrides={"projection_dim": 12, "text_config": TEXT, "vision_config": VIT}),
    "siglip": Model(
        config="siglip", config_overrides={"text_config": {**TEXT, "projection_size": 16}, "vision_config": VIT}
    ),
    "open_clip": Model(config="open_clip:ViT-B-32", config_overrides=OPEN_CLIP),
}


def make_info(text: Any = "string", labels: list[str] | None = WORDS, rows: int = 8) -> DataInfo:
    import datasets

    from kt_hf.data import DataInfo

    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(rows)]
    columns: dict[str, Any] = {"image": images, "index": list(range(rows))}
    features: dict[str, Any] = {"image": datasets.Image(), "index": datasets.Value("int64")}
    if text is not None:
        captions = [f"a {WORDS[i % 3]} thing number {i}" for i in range(rows)]
        columns["text"] = captions if text == "string" else [[c, f"{c} again"] for c in captions]
        features["text"] = datasets.Value("string") if text == "string" else datasets.Sequence(datasets.Value("string"))
    if labels is not None:
        columns["label"] = [i % 3 for i in range(rows)]
        features["label"] = datasets.Value("int64")
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return DataInfo("toy", {"train": data}, {k: k for k in columns if k != "index"}, labels, "0")


INFO: Any = make_info() if multiprocessing.parent_process() is None else None  # the two ranks below need no data


def make_batch(
    task: Any, loaded: Loaded, rows: Any = (0, 1, 2, 3), train: bool = True, info: DataInfo = INFO
) -> dict[str, Any]:
    raw = info.splits["train"][list(rows)]
    columns = task.preprocess({k: v for k, v in raw.items() if k != "index"}, loaded, train)
    listed = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return task.collate([{**row, "index": i} for row, i in zip(listed, raw["index"], strict=True)], loaded)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> (task, fresh model, the folder it was saved to); built once."""
    made: dict[str, Any] = {}

    def get(family: str) -> tuple[ZeroShotImageClassification, Loaded, Path]:
        if family not in made:
            torch.manual_seed(0)
            task = ZeroShotImageClassification()
            loaded = task.load(FAMILIES[family], INFO)
            loaded.model.eval()
            with torch.no_grad():
                loaded.model.logit_scale.add_(0.1)
            folder = tmp_path_factory.mktemp(family)
            task.save(loaded, folder)
            made[family] = (task, loaded, folder)
        return made[family]

    return get


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs(built: Any, family: str) -> None:
    task, loaded, _ = built(family)
    batch = make_batch(task, loaded)
    outputs = task.forward(loaded.model, batch)
    width = 16 if family == "siglip" else 12
    for embeds_BD in (outputs.image_embeds, outputs.text_embeds):
        assert embeds_BD.shape == (4, width) and embeds_BD.dtype == torch.float32
        torch.testing.assert_close(embeds_BD.norm(dim=1), torch.ones(4))
    assert outputs.logit_scale.shape == () and torch.equal(
        outputs.logit_scale, loaded.model.logit_scale.exp().reshape(())
    )
    assert (outputs.logit_bias is not None) == (family == "siglip")
    assert task.features(outputs, batch) is outputs.image_embeds
    context = task.context(loaded.model, loaded, INFO, torch.device("cpu"))
    found = task.predict(loaded.model, batch, context)
    assert found["scores"].shape == (4, 3) and found["text_id"].dtype == torch.int64
    rows = (1, 3)
    part = task.forward(loaded.model, make_batch(task, loaded, rows))
    torch.testing.assert_close(part.text_embeds, outputs.text_embeds[list(rows)], atol=1e-5, rtol=1e-5)
    assert len(loaded.new_parameters) >= 3


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "open_clip"])
def test_plain_transformers_loads_the_export(built: Any, family: str) -> None:
    from transformers import AutoModel, AutoProcessor

    task, loaded, folder = built(family)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model) is type(loaded.model)
    processor = AutoProcessor.from_pretrained(folder)
    raw = INFO.splits["train"][:4]
    padding: Any = {"padding": "max_length", "max_length": 12} if family == "siglip" else {"padding": True}
    inputs = processor(text=raw["text"], images=raw["image"], return_tensors="pt", **padding)
    names = ("pixel_values", "input_ids", "attention_mask")
    with torch.no_grad():
        plain = model.eval()(**{k: v for k, v in inputs.items() if k in names})
        ours = task.forward(loaded.model, make_batch(task, loaded))
    torch.testing.assert_close(plain.image_embeds, ours.image_embeds)
    torch.testing.assert_close(plain.text_embeds, ours.text_embeds)


def test_open_clip_loads_the_export(built: Any) -> None:
    import open_clip

    task, loaded, folder = built("open_clip")
    assert sorted(p.name for p in folder.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    raw = INFO.splits["train"][:4]
    with torch.no_grad():
        image, text, scale = model.eval()(torch.stack([preprocess(i) for i in raw["image"]]), tokenizer(raw["text"]))
        ours = task.forward(loaded.model, make_batch(task, loaded))
    torch.testing.assert_close(image, ours.image_embeds)
    torch.testing.assert_close(text, ours.text_embeds)
    assert torch.equal(scale, ours.logit_scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_its_own_export(built: Any, family: str) -> None:
    task, loaded, folder = built(family)
    again = task.load(Model(path=str(folder)), INFO)
    assert again.kind == loaded.kind and again.new_parameters == []
    assert task.signature(again) == task.signature(loaded)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.model.state_dict().items())


def test_a_missing_pooler_starts_as_identity(tmp_path: Path) -> None:
    from transformers import AutoModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

    classifier = ViTForImageClassification(ViTConfig(**VIT)).eval()
    classifier.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    task = ZeroShotImageClassification()
    loaded = task.load(Model(image=str(tmp_path / "vit"), text=tower("bert", BERT), projection_dim=12), INFO)
    model: Any = loaded.model.eval()
    assert {"vision_model.pooler.dense.weight", "visual_projection.weight"} <= set(loaded.new_parameters)
    assert "vision_model.layernorm.weight" not in loaded.new_parameters
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = classifier.vit(pixels).last_hidden_state
        torch.testing.assert_close(model.vision_model(pixels).pooler_output, tokens[:, 0])
        task.save(loaded, tmp_path / "both")
        again = AutoModel.from_pretrained(tmp_path / "both").eval()
        torch.testing.assert_close(again.vision_model(pixels).pooler_output, tokens[:, 0])


def test_towers_of_a_dual_encoder(built: Any) -> None:
    task, loaded, folder = built("clip")
    taken = task.load(Model(image=str(folder), text=tower("bert", BERT), projection_dim=8), INFO)
    ours, theirs = taken.model.vision_model.state_dict(), loaded.model.vision_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_unsafe_or_wrong_models_are_refused(built: Any, tmp_path: Path) -> None:
    task, _, folder = built("open_clip")
    described = json.loads((folder / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(IntegrityError, match="safetensors"):
        task.load(Model(path=str(tmp_path)), INFO)
    described["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(IntegrityError, match="code of its own"):
        task.load(Model(path=str(tmp_path)), INFO)
    with pytest.raises(RecipeError, match="open_clip has no model"):
        task.load(Model(config="open_clip:ViT-B-33"), INFO)
    with pytest.raises(RecipeError, match="no dual encoder"):
        task.load(tower("vit", VIT), INFO)
    with pytest.raises(RecipeError, match="no scores"):
        task.scores(None, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_parts(built: Any, family: str) -> None:
    task, loaded, _ = built(family)
    names = {name for name, _ in loaded.model.named_parameters()}
    towers = task.towers(loaded.model)
    image, text = ({n for layer in towers[t] for n in layer} for t in ("image", "text"))
    layers = task.layers(loaded.model)
    assert image and text and not image & text and image | text == {n for layer in layers for n in layer}
    rest = names - image - text
    assert all("proj" in n or n.startswith("logit_") or n.startswith("text_model.head") for n in rest), rest
    assert sum(len(layer) for layer in layers) == len(image | text)
    if family == "vit_bert":
        assert [len(t) for t in towers.values()] == [4, 4]
        assert any("patch_embeddings" in n for n in layers[0]) and any("word_embeddings" in n for n in layers[0])
        assert task.head(loaded.model) == ["visual_projection", "text_projection"]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_in_training_alone(built: Any) -> None:
    _, loaded, _ = built("clip")
    info = make_info("strings")
    task = ZeroShotImageClassification()
    task.settle(info)
    assert task.random_rows
    first = [text_id(f"a {WORDS[i % 3]} thing number {i}") for i in range(8)]
    assert make_batch(task, loaded, range(8), train=False, info=info)["text_id"].tolist() == first
    drawn = {tuple(make_batch(task, loaded, range(8), info=info)["text_id"].tolist()) for _ in range(4)}
    assert len(drawn) > 1
    task = ZeroShotImageClassification(captions="first")
    task.settle(info)
    assert not task.random_rows and make_batch(task, loaded, range(8), info=info)["text_id"].tolist() == first


def test_classes_stand_in_for_captions(built: Any) -> None:
    _, loaded, _ = built("clip")
    info = make_info(None)
    task = ZeroShotImageClassification(templates=["some {} thing"])
    task.settle(info)
    ids = make_batch(task, loaded, info=info)["text_id"].tolist()
    assert ids == [text_id(f"some {WORDS[i % 3]} thing") for i in range(4)]
    evaluated = make_batch(task, loaded, train=False, info=info)
    found = task.predict(loaded.model, evaluated, task.context(loaded.model, loaded, info, torch.device("cpu")))
    assert found.keys() == {"image_embeds", "scores", "label"}
    metrics = task.measure({k: v.detach().numpy() for k, v in found.items()}, loaded, info).metrics
    assert metrics.keys() == {"accuracy", "macro_f1"}


def test_metric_follows_the_data() -> None:
    task = ZeroShotImageClassification()
    task.settle(make_info(labels=None))
    assert task.metric == "text_retrieval_recall@1"
    task.settle(INFO)
    assert task.metric == "accuracy"


# --- retrieval --------------------------------------------------------------------------------------------------------


def naive_hits(queries: np.ndarray, candidates: np.ndarray, ids: np.ndarray, k: int) -> list[float]:
    hits = []
    for i in range(len(queries)):
        similar = [float(queries[i] @ c) for c in candidates]
        # a wrong candidate goes before a right one of the same similarity
        order = sorted(range(len(candidates)), key=lambda j: (-similar[j], ids[j] == ids[i]))
        hits.append(float(any(ids[j] == ids[i] for j in order[:k])))
    return hits


@pytest.mark.parametrize("kinds", [40, 7, 1])
def test_recalls_equal_a_naive_loop(kinds: int) -> None:
    random = np.random.default_rng(kinds)
    ids = random.integers(0, kinds, 40)
    images, texts = random.integers(-2, 3, (2, 40, 5)).astype(np.float32)  # integers, so that there are many exact ties
    task = ZeroShotImageClassification()
    found = task.measure(
        {"image_embeds": images, "text_embeds": texts, "text_id": ids}, Loaded(nn.Identity()), make_info(labels=None)
    )
    for k in (1, 5, 10):
        for name, pair in (("text_retrieval", (images, texts)), ("image_retrieval", (texts, images))):
            hits = naive_hits(*pair, ids, k)
            assert found.examples[f"{name}_recall@{k}"][0].tolist() == hits
            assert found.metrics[f"{name}_recall@{k}"] == pytest.approx(np.mean(hits))


def test_recalls_by_hand() -> None:
    image = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    text = np.eye(3, dtype=np.float32)[
        [1, 0, 2, 2]
    ]  # the first two captions are swapped; the last two are the same caption
    assert retrieval_ranks(image, text, np.array([1, 2, 3, 3])).tolist() == [3, 3, 0, 0]
    assert retrieval_ranks(image, text, np.array([1, 1, 3, 3])).tolist() == [0, 0, 0, 0]
    # image 2 is found by the caption of row 3 only if both captions are the same text
    other = np.eye(3, dtype=np.float32)[[1, 0, 0, 2]]
    assert retrieval_ranks(image, other, np.array([1, 2, 3, 3])).tolist() == [3, 3, 0, 0]
    assert retrieval_ranks(image, other, np.array([1, 2, 3, 4])).tolist() == [3, 3, 3, 0]
    collapsed = np.ones((4, 3), dtype=np.float32)
    assert retrieval_ranks(collapsed, collapsed, np.arange(4)).tolist() == [3, 3, 3, 3]
    assert retrieval_ranks(collapsed * np.nan, collapsed, np.arange(4)).tolist() == [3, 3, 3, 3]
    assert text_id("A  dog\n") == text_id("a dog") != text_id("two dogs")


def test_recalls_in_blocks() -> None:
    random = np.random.default_rng(0)
    images, texts = random.normal(size=(2, 2500, 8)).astype(np.float32)
    ids = random.integers(0, 2000, 2500)
    whole = retrieval_ranks(images, texts, ids)
    some = np.array([0, 1023, 1024, 2499])
    similar, right = images @ texts.T, ids[:, None] == ids[None]
    expected = [int((similar[i][~right[i]] > similar[i][right[i]].max()).sum()) for i in some]
    assert whole[some].tolist() == expected


# --- contrastive ------------------------------------------------------------------------------------------------------


def normal(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_clip_loss_is_symmetric_in_its_modalities() -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    image, text, scale, bias, none = normal(5, 0), normal(5, 1), torch.tensor(7.0), torch.tensor(-2.0), torch.tensor(0)
    one = clip_rows(image, text, image, text, scale, None, none).mean()
    torch.testing.assert_close(one, clip_rows(text, image, text, image, scale, None, none).mean())
    torch.testing.assert_close(one, ClipLoss()(image, text, scale))
    other = siglip_rows(image, text, image, text, scale, bias, none).mean()
    torch.testing.assert_close(other, siglip_rows(text, image, text, image, scale, bias, none).mean())
    torch.testing.assert_close(other, SigLipLoss()(image, text, scale, bias))


class Linear(nn.Module):
    """Two towers of one matrix each, with SigLIP's scale and, on request, bias."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image, self.text = (nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        if bias:
            self.logit_bias = nn.Parameter(torch.tensor(-1.0))


class LinearTask(ZeroShotImageClassification):
    def forward(self, model: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        image, text = (F.normalize(batch[k] @ getattr(model, k), dim=1) for k in ("image", "text"))
        bias = getattr(model, "logit_bias", None)
        return SimpleNamespace(
            image_embeds=image, text_embeds=text, logit_scale=model.logit_scale.exp(), logit_bias=bias
        )


SHARES = {"even": [3, 3], "uneven": [4, 2], "empty": [6, 0]}


def gradients(kind: str, share: list[int], rank: int, world: int) -> dict[str, torch.Tensor]:
    """The window's gradient as the trainer forms it: a backward on every rank, then the average over ranks."""
    data = {k: torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i, k in enumerate(("image", "text"))}
    start, size = (sum(share[:rank]), share[rank]) if world > 1 else (0, 6)
    batch = {k: v[start : start + size] if size else v[:1] for k, v in data.items()}
    batch["index"] = torch.arange(max(size, 1))
    task, model, strategy = LinearTask(), Linear(bias=False), Contrastive(loss=kind)  # type: ignore[arg-type]
    loaded = Loaded(model, new_parameters=["logit_scale"])
    strategy.setup(model, SimpleNamespace(task=task, rank=rank, world=world, loaded=loaded))
    bundle = Bundle(loaded, task, {"contrastive": strategy})
    position = Position(
        0,
        0.0,
        0,
        1,
        0,
        rank,
        world,
        {"train": {"example": torch.tensor(6.0)}},
        {"train": share if world > 1 else [size]},
    )
    terms = bundle("loss", batch, {}, position)
    torch.stack([v for v in terms.values() if v.requires_grad]).sum().backward()
    found = {name: p.grad.clone() for name, p in bundle.named_parameters() if p.grad is not None}
    found["loss"] = terms[f"contrastive/{kind}"].detach()
    for value in found.values():
        if world > 1:
            torch.distributed.all_reduce(value)
            value /= world
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {
        f"{kind} {name}": gradients(kind, share, rank, 2)
        for kind in ("clip", "siglip")
        for name, share in SHARES.items()
    }
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        plain = {case: {k: v.tolist() for k, v in values.items()} for case, values in found.items()}
        (Path(folder) / "found.json").write_text(json.dumps(plain))


def test_two_ranks_give_the_one_rank_loss_and_gradient(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    for case, values in found.items():
        expected = gradients(case.split()[0], [6], 0, 1)
        assert values.keys() == expected.keys() and any("logit_scale" in k for k in values)
        assert ("strategies.contrastive.logit_bias" in values) == case.startswith("siglip")
        for name, value in values.items():
            torch.testing.assert_close(torch.tensor(value), expected[name], atol=1e-6, rtol=1e-5, msg=f"{case} {name}")


def run_of(task: Any, loaded: Loaded) -> Any:
    return SimpleNamespace(task=task, rank=0, world=1, loaded=loaded)


@pytest.mark.parametrize("family", ["vit_bert", "resnet_bert", "siglip", "open_clip"])
def test_one_locked_step(family: str) -> None:
    torch.manual_seed(0)
    task = ZeroShotImageClassification()
    loaded = task.load(FAMILIES[family], INFO)
    strategy = Contrastive(loss="siglip" if family == "siglip" else "clip", lock_image=True)
    strategy.setup(loaded.model, run_of(task, loaded))
    strategy.ready(loaded.model, run_of(task, loaded))
    image = {n for layer in task.towers(loaded.model)["image"] for n in layer}
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    bundle = Bundle(loaded, task, {"contrastive": strategy}, chunk=3).train()
    optimizer = torch.optim.SGD([p for p in bundle.parameters() if p.requires_grad], lr=1.0)
    counts = {"train": {"example": torch.tensor(8.0)}}
    batch = make_batch(task, loaded, range(8))
    terms = bundle("loss", batch, {}, Position(0, 0.0, 0, 1, 0, 0, 1, counts, {"train": [8]}))
    assert sorted(terms) == sorted([f"contrastive/{strategy.kind}", "contrastive/logit_scale"])
    terms[f"contrastive/{strategy.kind}"].backward()
    missing = [n for n, p in bundle.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing
    optimizer.step()
    after = loaded.model.state_dict()
    for name in image:  # and the running statistics of a locked tower stand still
        assert torch.equal(before[name], after[name]), name
    assert all(torch.equal(before[n], after[n]) for n in before if "running_" in n)
    projection = {"open_clip": "visual.proj", "siglip": "text_model.head.weight"}.get(
        family, "visual_projection.weight"
    )
    assert not torch.equal(before[projection], after[projection])
    text = next(n for n in task.towers(loaded.model)["text"][1] if n.endswith("weight"))
    assert not torch.equal(before[text], after[text])


def test_chunks_equal_the_whole(built: Any) -> None:
    task, loaded, _ = built("vit_bert")
    batch = make_batch(task, loaded, range(8))
    position = Position(0, 0.0, 0, 1, 0, 0, 1, {"train": {"example": torch.tensor(8.0)}}, {"train": [8]})
    strategy = Contrastive()
    found = []
    for chunk in (0, 3):
        loaded.model.zero_grad()
        bundle = Bundle(loaded, task, {"contrastive": strategy}, chunk=chunk).eval()
        bundle("loss", batch, {}, position)["contrastive/clip"].backward()
        found.append({n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)


def test_scale_and_bias() -> None:
    task = ZeroShotImageClassification()
    linear, open_clip_like = Linear(bias=True), Linear(bias=False)
    open_clip_like.register_parameter("logit_bias", None)
    for model, new, scale, bias in (
        (linear, [], 1.0, -1.0),  # trained before: kept
        (linear, ["logit_scale", "logit_bias"], math.log(10), -10.0),
        (open_clip_like, ["logit_scale"], math.log(10), -10.0),
    ):
        strategy = Contrastive(loss="siglip")
        strategy.setup(model, run_of(task, Loaded(model, new_parameters=new)))
        assert model.logit_scale.item() == pytest.approx(scale) and model.logit_bias.item() == bias
        assert not list(strategy.parameters())
    strategy, model = Contrastive(), Linear(bias=True)
    strategy.setup(model, run_of(task, Loaded(model, new_parameters=["logit_scale"])))
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and not model.logit_bias.requires_grad
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    strategy.after_step(model, 0.0)
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_open_clip_exports_the_bias_it_was_given(tmp_path: Path) -> None:
    import open_clip

    task = ZeroShotImageClassification()
    loaded = task.load(FAMILIES["open_clip"], INFO)
    Contrastive(loss="siglip").setup(loaded.model, run_of(task, loaded))
    with torch.no_grad():
        loaded.model.logit_bias.fill_(-3.0)  # type: ignore[union-attr, operator]
    task.save(loaded, tmp_path)
    assert open_clip.create_model(f"local-dir:{tmp_path}").logit_bias.item() == -3.0
    assert task.load(Model(path=str(tmp_path)), INFO).model.logit_bias.item() == -3.0  # type: ignore[union-attr, operator]


def test_locking_is_checked(built: Any) -> None:
    task, loaded, _ = built("vit_bert")
    model: Any = loaded.model
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        strategy = Contrastive(lock_text=True, unlocked_layers=2)
        strategy.setup(model, run_of(task, loaded))
        layers = task.towers(model)["text"]
        on = {n for n, p in model.named_parameters() if p.requires_grad}
        assert (
            not on & {n for layer in layers[:-2] for n in layer} and {n for layer in layers[-2:] for n in layer} <= on
        )
        model.text_model.requires_grad_(True)
        with pytest.raises(RecipeError, match="locked tower"):
            strategy.ready(model, run_of(task, loaded))
        with pytest.raises(RecipeError, match="unlocked_layers"):
            Contrastive(lock_text=True, unlocked_layers=4).setup(model, run_of(task, loaded))
        with pytest.raises(RecipeError, match="no image and text towers"):
            Contrastive().setup(nn.Linear(2, 2), run_of(SimpleNamespace(), Loaded(nn.Identity())))
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
