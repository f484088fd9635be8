"""Image-text matching: does this text belong to this image? With hard negatives.

Shapes: B rows of a batch, P pairs of a row (its own, and one with a wrong text), N rows of a split, D width of the
space, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from kt_hf import Loaded, Role, Task, classification, images, loading, randomness, tiny
from kt_hf.data import row_hashes
from kt_hf.errors import LEAVE_OUT, DataError, RecipeError, RowError
from kt_hf.functional import scoring
from kt_hf.task import Batch, Scores

ANSWERS = ["mismatch", "match"]
IGNORED = -100
WRONG = "wrong_"
"""Stands before the names of the inputs that are of a wrong text."""
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class Matched:
    """logits_BP2 of no and yes; pooler_output_BF, what is fused of the rows' own pairs; image_embeds_BD and
    text_embeds_BD of length 1; hidden_states are not given."""

    logits: torch.Tensor
    pooler_output: torch.Tensor
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None


class ImageTextMatching(Task):
    """Whether a text belongs to an image.

    Models: two towers (`model.image`, `model.text`) with projections of width `model.projection_dim`, and a fusion:
    `cross_attention`, fusion_layers times, or one of multimodal-classification's. Data: rows with an image and a text,
    or several, of which training takes a random one and evaluation the first; a column `label` with 0 and 1 where
    pairs are given as they are; or a column `wrong_text`. Without these, every row counts twice: with its own text and
    with a wrong one, which is another row's. In evaluation that is fixed by the split: every text is right once and
    wrong once, as far as texts and images differ. In training it is drawn by seed, epoch and row from all training
    rows. negatives: `hard` draws from the rows of the micro-batch instead, in proportion to exp(cosine / temperature)
    of the towers' projections (Li et al. 2021, Align before Fuse, arXiv:2107.07651, section 3.2), so that accumulation
    and processes matter; the strategy `contrastive` with an alpha below 1 learns that similarity beside, and without it
    `hard` is not much harder. max_length: tokens of a text.
    """

    conformance = {
        "roles": ("image", "text"),
        "model": {
            "image": tiny.VIT,
            "text": tiny.BERT,
            "projection_dim": 16,
        },
    }
    roles = (
        Role("image", ("image",), aliases=("img", "pixel_values", "jpg", "png")),
        Role("text", ("string", "strings"), aliases=("caption", "captions", "sentences", "description", "txt")),
        Role("wrong_text", ("string",), False, ("foil", "wrong_caption"), predicted=True),
        Role("label", ("number", "class"), False, ("labels", "match", "target")),
    )
    label_kind = "number"
    unit = "pair"
    cache_rows = False
    augments = "image"
    metrics = ("accuracy", "f1", "roc_auc")

    def __init__(
        self,
        *,
        negatives: Literal["random", "hard"] = "random",
        temperature: Annotated[float, Field(gt=0, le=100)] = 0.07,
        fusion: Literal["cross_attention", "gate", "concatenation", "sum"] = "cross_attention",
        fusion_layers: Annotated[int, Field(ge=1, le=24)] = 1,
        shared_layers: Annotated[int, Field(ge=0, le=24)] = 0,
        max_length: Annotated[int, Field(ge=3)] = 77,
    ):
        self.negatives, self.temperature = negatives, temperature
        self.fusion, self.fusion_layers, self.shared_layers = fusion, fusion_layers, shared_layers
        self.max_length = max_length
        self.draws, self.pool = True, Pool()

    @classmethod
    def architectures(cls) -> frozenset[str]:
        return frozenset({"FusionForMatching"})

    # `fits` stays False: images with texts may as well be for retrieval.

    # --- loading ---

    def load(self, ref: Any, info: Any) -> Loaded:
        from transformers import AutoModelForNextSentencePrediction

        from kt_hf import fusion_model

        self.settle(info)
        if (ref.image is None) != (ref.text is None) or ref.audio is not None:
            raise RecipeError(
                "an image and a text are matched by a tower for each", "give two: model.image and model.text"
            )
        loaded = fusion_model.load(
            AutoModelForNextSentencePrediction,
            ref,
            info,
            ANSWERS,
            ["image", "text"],
            fields={
                "fusion": self.fusion,
                "fusion_layers": self.fusion_layers,
                "shared_layers": self.shared_layers,
            },
        )
        names = fusion_model.media(loading.unwrap(loaded.model).config)  # type: ignore[arg-type]
        if names != ["image", "text"]:
            raise RecipeError(f"the model takes {', '.join(names)}", "take one of an image and a text tower")
        return loaded

    def settle(self, info: Any) -> None:
        """Whether pairs are given or drawn; where they are drawn, rows to evaluate on get their wrong text."""
        if {"label", "wrong_text"} <= set(info.roles):
            raise DataError("rows have both a label and a wrong text", "leave one of them out of data.columns")
        self.draws = "label" not in info.roles and "wrong_text" not in info.roles
        first = next(iter(info.splits.values()))
        self.random_rows = self.draws or isinstance(first["text"][0], list)
        for split, rows in info.splits.items() if self.draws else ():
            if split == "train":
                self.pool = self.pool if self.pool.rows is rows else Pool(rows)
            elif "wrong_text" not in rows.column_names:
                info.splits[split] = rows.add_column("wrong_text", wrong_texts(rows, split))

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {"labels": loaded.labels, **loaded.processor.signature()}

    def towers(self, model: nn.Module) -> dict[str, list[list[str]]]:
        """Parameter names of the `image` and the `text` tower by layer from the input, without their projections."""
        from kt_hf import fusion_model

        return fusion_model.layers(model)

    def layers(self, model: nn.Module) -> list[list[str]]:
        """Both towers' layers as one sequence, by relative depth."""
        from kt_hf import towers

        return towers.by_depth(list(self.towers(model).values()))

    def head(self, model: nn.Module) -> list[str]:
        """All beside the towers: projections, fusion, and what tells whether it matches."""
        from kt_hf import fusion_model

        return fusion_model.heads(model)

    # --- rows ---

    def preprocess(
        self, rows: dict[str, list[Any]], loaded: Loaded, train: bool, augment: Any = None
    ) -> dict[str, Any]:
        for place, image in enumerate(rows["image"]):
            if image is None:
                raise RowError(place, "there is no image", "leave such rows out: data.drop=[empty]")
        pictures = [images.rgb(image) for image in rows["image"]]
        texts = [_pick(place, value, train) for place, value in enumerate(rows["text"])]
        columns: dict[str, Any] = {"image_id": [_number(picture.tobytes()) for picture in pictures]}
        columns["text_id"] = [_number(_plain(text).encode()) for text in texts]
        wrong = rows.get("wrong_text")
        if train and self.draws:
            wrong = [self.pool.draw(*ids) for ids in zip(columns["text_id"], columns["image_id"], strict=True)]
            columns["draw"] = torch.rand(len(texts)).tolist()
        if augment is not None:
            pictures = [augment(picture) for picture in pictures]
        columns |= {**loaded.processor.images(pictures), **loaded.processor.texts(texts, self.max_length)}
        if wrong is not None:
            tokens = loaded.processor.texts([text or "" for text in wrong], self.max_length)
            columns |= {f"{WRONG}{name}": values for name, values in tokens.items()}
            columns["has_wrong"] = [bool(text) for text in wrong]
        if "label" in rows:
            columns["labels"] = [_yes_or_no(place, value) for place, value in enumerate(rows["label"])]
        return columns

    def check(self, row: dict[str, Any]) -> None:
        if "label" in row:
            _yes_or_no(0, row["label"])

    def collate(self, rows: Sequence[dict[str, Any]], loaded: Loaded) -> Batch:
        """Own and wrong texts are padded to one width."""
        names = [name for name in _TOKENS if name in rows[0]]
        texts = [{n: row[f"{prefix}{n}"] for n in names} for prefix in ("", WRONG)[: 1 + _wrong(rows)] for row in rows]
        tokens = loaded.processor.pad({name: [text[name] for text in texts] for name in names})
        batch = {name: values[: len(rows)] for name, values in tokens.items()}
        batch |= {n: torch.stack([row[n] for row in rows]) for n, v in rows[0].items() if isinstance(v, torch.Tensor)}
        batch |= classification.columns(rows, ("index", "image_id", "text_id"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if _wrong(rows):
            batch |= {f"{WRONG}{name}": values[len(rows) :] for name, values in tokens.items()}
            batch["has_wrong"] = torch.tensor([row["has_wrong"] for row in rows])
        if "draw" in rows[0]:
            batch["draw"] = torch.tensor([row["draw"] for row in rows])
        return batch

    def choose(self, model: nn.Module, batch: Batch) -> Batch:
        """Hard negatives, in proportion to how near they are to the image; takes a pass of the towers. A row without
        others in its micro-batch keeps the wrong text that it has."""
        if self.negatives != "hard" or "draw" not in batch:
            return batch
        fusion: Any = loading.unwrap(model).fusion  # type: ignore[union-attr]
        embeds = fusion.embed(fusion.encode(batch))
        image_BD, text_BD = (F.normalize(embeds[name].float(), dim=-1) for name in ("image", "text"))
        others_BB = others(batch)
        near_BB = (image_BD @ text_BD.T / self.temperature).masked_fill(~others_BB, -torch.inf)
        wrong_B, there_B1 = drawn(near_BB.softmax(1).nan_to_num(0.0), batch["draw"]), others_BB.any(1, keepdim=True)
        names = [name for name in _TOKENS if name in batch]
        found = {f"{WRONG}{n}": torch.where(there_B1, batch[n][wrong_B], batch[f"{WRONG}{n}"]) for n in names}
        return {**batch, **found}

    # --- the model's outputs ---

    def forward(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Matched:
        """Each tower sees an image or a text once, also where it is in two pairs."""
        from kt_hf.towers import IMAGE_INPUTS

        inner: Any = loading.unwrap(model)
        rows, pairs = len(batch["index"]), 2 if "has_wrong" in batch else 1
        inputs = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        for name in (name for name in _TOKENS if name in batch):
            inputs[name] = torch.cat([batch[name], batch[f"{WRONG}{name}"]]) if pairs == 2 else batch[name]
        encoded = inner.fusion.encode(inputs)
        encoded["image"] = encoded["image"].repeat(pairs)
        embeds = inner.fusion.embed(encoded)
        fused = inner.fusion.fuse(encoded, embeds)
        image_BD, text_BD = (F.normalize(embeds[name][:rows].float(), dim=-1) for name in ("image", "text"))
        logits_BP2 = inner.matcher(fused).unflatten(0, (pairs, rows)).transpose(0, 1)
        return Matched(logits_BP2, fused[:rows], image_BD, text_BD, inner.logit_scale.exp())

    def loss(
        self, outputs: Any, batch: Batch, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Cross-entropy of every pair, in float32."""
        wanted_BP = answers(batch)
        logits_N2 = outputs.logits.float().flatten(0, 1)
        values_N = F.cross_entropy(logits_N2, wanted_BP.flatten(), reduction="none", label_smoothing=label_smoothing)
        return values_N, (wanted_BP != IGNORED).float().flatten(), "pair"

    def units(self, batch: Batch) -> dict[str, int | torch.Tensor]:
        """Rows, and pairs whose answer is known."""
        return {"example": len(batch["index"]), "pair": (answers(batch) != IGNORED).sum()}

    def scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.logits.float().flatten(0, 1), (answers(batch) != IGNORED).float().flatten()

    def features(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """What is fused of the rows' own pairs."""
        return outputs.pooler_output

    # --- evaluation ---

    def predict(self, model: nn.Module, batch: Batch, context: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.from_scores(self.forward(model, batch).logits.float().flatten(0, 1), torch.empty(0), batch)

    def from_scores(self, scores_NC: torch.Tensor, weight_N: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """`scores`_BP, how much likelier yes is than no, as a logarithm; `label`_BP where that is known."""
        odds_BP = (scores_NC[:, 1] - scores_NC[:, 0]).reshape(len(batch["index"]), -1)
        known = {"label": answers(batch)} if "labels" in batch or "has_wrong" in batch else {}
        return {"scores": odds_BP, **known}

    def measure(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> Scores:
        """accuracy, F1 of `match`, the area under the ROC curve, over pairs; rows are resampled with all of theirs."""
        if "label" not in predictions:
            raise DataError("these rows do not say what belongs together", "name a label: data.columns.label=COLUMN")
        odds_NP, label_NP = predictions["scores"].astype(np.float64), predictions["label"]
        known_NP, guess_NP, truth_NP = label_NP != IGNORED, odds_NP > 0, label_NP == 1
        hits_NP = (guess_NP == truth_NP) & known_NP
        pairs_N = known_NP.sum(1).astype(np.float64)
        if not pairs_N.any():
            raise DataError("no row has a wrong text or a label", "evaluate on more rows, or on labelled ones")
        parts = [guess_NP & truth_NP, guess_NP & ~truth_NP, ~guess_NP & truth_NP]
        counts_N3 = np.stack([(part & known_NP).sum(1) for part in parts], -1).astype(np.float64)
        row_M, where = np.nonzero(known_NP)
        groups_M = np.unique(odds_NP[row_M, where], return_inverse=True)[1]
        positive_M = truth_NP[row_M, where]
        found = Scores({"accuracy": float(hits_NP.sum() / pairs_N.sum())})
        found.examples["accuracy"] = (hits_NP.sum(1) / np.maximum(pairs_N, 1), pairs_N)
        found.statistics["f1"] = lambda w: scoring.f1_of_counts(counts_N3, w)
        found.statistics["roc_auc"] = lambda w: scoring.roc_auc(groups_M, positive_M, w[row_M])
        ones = np.ones(len(pairs_N))
        found.metrics |= {name: statistic(ones) for name, statistic in found.statistics.items()}
        return found

    def table(self, predictions: dict[str, np.ndarray], loaded: Loaded, info: Any) -> dict[str, Any]:
        """Of every row its pairs: the own one, then the one with a wrong text."""
        return {name: list(predictions[name]) for name in ("label", "scores") if name in predictions}

    def answer(self, predictor: Any, info: Any, max_new_tokens: int) -> dict[str, list[Any]]:
        """Whether the pair of every row matches, and the probability that it does."""
        rows = info.splits["test"]
        own = rows.remove_columns([name for name in rows.column_names if name == "wrong_text"])
        plain = type(info)("pairs", {"test": own}, info.roles, None, f"{info.fingerprint}-pairs")
        odds_N = predictor.scores(plain, "test")["scores"][:, 0].astype(np.float64)
        chance_N = 1 / (1 + np.exp(-odds_N))
        return {"prediction": [ANSWERS[int(x > 0)] for x in odds_N], "probability": chance_N.tolist()}

    def majority(
        self, train: dict[str, Any], predictions: dict[str, np.ndarray], loaded: Loaded, info: Any
    ) -> Scores | None:
        """Always the more frequent answer; where pairs are drawn, both are as frequent, and it is `match`."""
        given = [y for y in train.get("label", []) if y is not None and y == y]
        constant = 1.0 if np.mean(given or [1.0]) >= 0.5 else -1.0
        return self.measure({**predictions, "scores": np.full_like(predictions["scores"], constant)}, loaded, info)


# --- pairs -----------------------------------------------------------------------------------------------------------


def answers(batch: Batch) -> torch.Tensor:
    """answers_BP: 1 for a pair that belongs together, 0 for one that does not, IGNORED where that is not known."""
    if "labels" in batch:
        return batch["labels"][:, None]
    own_B = torch.ones_like(batch["index"])
    if "has_wrong" not in batch:
        return own_B[:, None]
    return torch.stack([own_B, torch.where(batch["has_wrong"], 0, IGNORED)], 1)


def others(batch: Batch) -> torch.Tensor:
    """others_BB: whether text j is a wrong one for image i: neither text nor image are the same."""
    text_B, image_B = batch["text_id"], batch["image_id"]
    return (text_B[:, None] != text_B[None]) & (image_B[:, None] != image_B[None])


def drawn(weights_BB: torch.Tensor, draw_B: torch.Tensor) -> torch.Tensor:
    """column_B, drawn in proportion to each row's weights by the row's own number in [0, 1)."""
    reach_BB = weights_BB.double().cumsum(1)
    return (reach_BB <= draw_B.double()[:, None] * reach_BB[:, -1:]).sum(1).clamp(max=weights_BB.shape[1] - 1)


class Pool:
    """The training rows, from which wrong texts are drawn."""

    def __init__(self, rows: datasets.Dataset | None = None):
        self.rows, self.texts = rows, None if rows is None else rows.select_columns(["text"])
        self.repeated = np.zeros(0, dtype=bool)
        if rows is not None:
            _, where, counts = np.unique(row_hashes(rows, ["image"]), return_inverse=True, return_counts=True)
            self.repeated = counts[where] > 1

    def __repr__(self) -> str:  # a part of the key under which preprocessed rows are kept
        return f"{len(self.repeated)} rows"

    def draw(self, text_id: int, image_id: int) -> str | None:
        """Another row's text; None where sixteen draws find none that differs."""
        if self.rows is None or self.texts is None:
            return None
        for place in torch.randint(len(self.rows), (16,)).tolist():
            value = self.texts[place]["text"]
            options = _options(value)
            if not options or any(_number(_plain(option).encode()) == text_id for option in options):
                continue
            if self.repeated[place] and _number(images.rgb(self.rows[place]["image"]).tobytes()) == image_id:
                continue
            return options[int(torch.randint(len(options), ()))]
        return None


def wrong_texts(rows: datasets.Dataset, split: str) -> list[str | None]:
    """A wrong text for every row, a function of the split alone: the next one's on a random circle through all rows,
    or, where text or image are the same, the one after that. None where all rows are the same."""
    texts = [(_options(value) or [""])[0] for value in rows["text"]]
    known = list(zip(map(_plain, texts), row_hashes(rows, ["image"]).tolist(), strict=True))
    random = np.random.default_rng(randomness.number("wrong texts", split, len(rows)) % 2**32)
    circle = random.permutation(len(rows))
    found: list[str | None] = [None] * len(rows)
    for place, row in enumerate(circle):
        following = (circle[(place + step) % len(rows)] for step in range(1, len(rows)))
        differs = (r for r in following if all(a != b for a, b in zip(known[r], known[row], strict=True)) and texts[r])
        other = next(differs, None)
        found[row] = None if other is None else texts[other]
    return found


def _wrong(rows: Sequence[dict[str, Any]]) -> bool:
    return "has_wrong" in rows[0]


def _pick(place: int, value: Any, train: bool) -> str:
    """One of a row's texts: a random one in training, else the first."""
    options = _options(value)
    if not options:
        raise RowError(place, "there is no text", "leave such rows out: data.drop=[empty]")
    return options[int(torch.randint(len(options), ()))] if train and len(options) > 1 else options[0]


def _options(value: Any) -> list[str]:
    """The texts of a row that say something."""
    return [text for text in (value if isinstance(value, list) else [value]) if text and text.strip()]


def _yes_or_no(place: int, value: float | None) -> int:
    if value is None or value != value:
        return IGNORED
    if value not in (0, 1):
        raise RowError(
            place, f"the label is {value:g}", f"write 1 for what belongs together, 0 for others, {LEAVE_OUT}"
        )
    return int(value)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _number(content: bytes) -> int:
    """63 bits by which equal texts and images are known."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1
