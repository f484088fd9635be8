"""Metrics as `evaluate.Metric` classes of our own over scikit-learn, seqeval, sacreBLEU, rouge_score, jiwer and
pycocotools: they need no network.

Any other metric is loaded by its Hub name through `evaluate.load`.

Shapes: N examples, K counts of each.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from kt_hf.errors import HubError, RecipeError
from kt_hf.functional import detection

logging.getLogger("evaluate").setLevel(logging.ERROR)


class _SklearnMetric(evaluate.Metric):
    """A metric of class numbers; `score` computes it."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", inputs_description="class numbers", features=features
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        return {
            self.name: float(self.score(np.asarray(references), np.asarray(predictions), **kwargs))
            if len(references)
            else 0.0
        }

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        raise NotImplementedError


class Accuracy(_SklearnMetric):
    """Share of examples whose class is right, in [0, 1]."""

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        from sklearn.metrics import accuracy_score

        return accuracy_score(references, predictions, sample_weight=sample_weight)


class MacroF1(_SklearnMetric):
    """Unweighted mean over classes of F1, in [0, 1]."""

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        from sklearn.metrics import f1_score

        return f1_score(references, predictions, average="macro", zero_division=0, sample_weight=sample_weight)


class MatthewsCorrelation(_SklearnMetric):
    """Matthews correlation coefficient, in [-1, 1]."""

    def score(self, references: np.ndarray, predictions: np.ndarray, sample_weight: Any = None) -> float:
        from sklearn.metrics import matthews_corrcoef

        return matthews_corrcoef(references, predictions, sample_weight=sample_weight)


class _EntityMetric(evaluate.Metric):
    """A metric of entities, which are found in lists of tags as CoNLL's script does (seqeval's default)."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        features = datasets.Features({"predictions": tags, "references": tags})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", inputs_description="tags of rows", features=features
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        found = getattr(seqeval(), f"{self.name.removeprefix('entity_')}_score")
        return {self.name: float(found(references, predictions, zero_division=0)) if references else 0.0}


class EntityF1(_EntityMetric):
    """F1 over entities of all types together: right where type, first and last word are. In [0, 1]."""


class EntityPrecision(_EntityMetric):
    """Share of the predicted entities that are right, in [0, 1]."""


class EntityRecall(_EntityMetric):
    """Share of the true entities that are found, in [0, 1]."""


def seqeval() -> Any:
    """The library's metrics. Raises `RecipeError` where it is not installed."""
    try:
        from seqeval.metrics import sequence_labeling
    except ImportError:
        raise RecipeError(
            "entities are measured by seqeval, which is not installed",
            "pip install kt_hf[token-classification], or measure token_accuracy alone",
        ) from None
    return sequence_labeling


class _TextMetric(evaluate.Metric):
    """A metric of written texts against one reference each, in two steps: `counts` of each example, and the score of
    their (weighted) sum. So a resampled corpus costs a sum."""

    library = "sacrebleu"
    extra = "seq2seq"
    """Of this package, that installs the library."""
    instead = "perplexity"

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", inputs_description="texts", features=features
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        return {self.name: self.score(self.counts(predictions, references).sum(0)) if len(predictions) else 0.0}

    def counts(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """counts_NK of matches and sizes, int64 or float64."""
        raise NotImplementedError

    def score(self, sums_K: np.ndarray) -> float:
        """The metric of a corpus with these sums, in [0, 1]."""
        raise NotImplementedError

    def signature(self) -> str:
        """How it was computed, for those who want to compare figures."""
        return ""


class Bleu(_TextMetric):
    """Corpus BLEU as sacreBLEU computes it (Post 2018, A Call for Clarity in Reporting BLEU Scores, arXiv:1804.08771),
    divided by 100. tokenizer: sacreBLEU's name of one; by config_name."""

    @functools.cached_property
    def scorer(self) -> Any:
        from sacrebleu.metrics import BLEU

        name = self.config_name or "default"
        return BLEU(tokenize=None if name == "default" else name)

    def counts(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        return np.asarray(self.scorer._extract_corpus_statistics(predictions, [references]), dtype=np.int64)

    def score(self, sums_K: np.ndarray) -> float:
        return self.scorer._compute_score_from_stats([float(x) for x in sums_K]).score / 100

    def signature(self) -> str:
        self.scorer.num_refs = 1
        return str(self.scorer.get_signature())


class Chrf(Bleu):
    """chrF (Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation) as sacreBLEU computes it, divided
    by 100."""

    @functools.cached_property
    def scorer(self) -> Any:
        from sacrebleu.metrics import CHRF

        scorer = CHRF()
        scorer._force = True  # its warning of texts that are cut into tokens is about BLEU, which gives it, too
        return scorer


class Rouge(_TextMetric):
    """Mean over examples of ROUGE's F1 (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries) by
    rouge_score, in [0, 1]; by config_name: rouge1, rouge2, or rougeL. It knows a to z and 0 to 9 alone: letters with
    accents split words, and what has none of these scores 0."""

    library = "rouge_score"

    def counts(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        name = str(self.config_name)
        scorer = RougeScorer([name], use_stemmer=False)
        pairs = zip(references, predictions, strict=True)
        return np.array([[scorer.score(*pair)[name].fmeasure, 1.0] for pair in pairs]).reshape(-1, 2)

    def score(self, sums_K: np.ndarray) -> float:
        return float(sums_K[0] / sums_K[1]) if sums_K[1] else 0.0


class BoxPrecision(evaluate.Metric):
    """COCO's mean average precision and recall of boxes (Lin et al. 2014, Microsoft COCO, arXiv:1405.0312) by
    pycocotools, in [0, 1], in two steps: what is found in every image, and figures of all. Boxes are (left, top, right,
    bottom); labels count classes."""

    def _info(self) -> evaluate.MetricInfo:
        boxes, numbers = datasets.List(datasets.List(datasets.Value("float64"))), datasets.List(datasets.Value("int64"))
        truth = {"boxes": boxes, "labels": numbers}
        said = {**truth, "scores": datasets.List(datasets.Value("float64"))}
        features = datasets.Features({"predictions": said, "references": truth})
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", inputs_description="boxes of images", features=features
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, Any]:
        return self.figures(self.judge(predictions, references))

    def judge(self, predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> Any:
        """The library's `COCOeval` with what is found in every image, for the classes that there are. Raises
        `RecipeError` where it is not installed."""
        if importlib.util.find_spec("pycocotools") is None:
            raise RecipeError(
                "detections are measured by pycocotools, which is not installed", "pip install 'kt_hf[detection]'"
            )
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        classes = sorted({int(label) for row in references for label in row["labels"]})
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
            pair = []
            for rows in (references, predictions):
                coco = COCO()
                coco.dataset = {
                    "images": [{"id": i} for i in range(len(rows))],
                    "categories": [{"id": c} for c in classes],
                    "annotations": _annotations(rows),
                }
                coco.createIndex()
                pair.append(coco)
            judge = COCOeval(*pair, "bbox")
            judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [[0, 1e10]], ["all"], [100]
            judge.evaluate()
            judge.accumulate()
        return judge

    def figures(self, judge: Any) -> dict[str, Any]:
        """The metrics by name, and `by_class`: the average precision of every class."""
        precision_TRC, recall_TC = judge.eval["precision"][..., 0, 0], judge.eval["recall"][..., 0, 0]
        return {
            "mean_average_precision": float(precision_TRC.mean()),
            "average_precision_50": float(precision_TRC[0].mean()),
            "average_precision_75": float(precision_TRC[5].mean()),
            "mean_average_recall": float(recall_TC.mean()),
            "by_class": {c: float(precision_TRC[..., i].mean()) for i, c in enumerate(judge.params.catIds)},
        }

    def rankings(self, judge: Any) -> list[detection.Ranking]:
        """Of every class what is found, for figures of drawn images."""
        images = len(judge.params.imgIds)
        rankings = []
        for i in range(len(judge.params.catIds)):
            found = judge.evalImgs[i * images : (i + 1) * images]  # None: neither a box nor a detection of the class
            scores = [np.asarray(one["dtScores"] if one else (), dtype=np.float64) for one in found]
            hits = [one["dtMatches"] > 0 if one else np.zeros((10, 0), bool) for one in found]
            rankings.append(detection.rank(scores, hits, np.array([len(one["gtIds"]) if one else 0 for one in found])))
        return rankings


def _annotations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        scores = row.get("scores", [None] * len(row["labels"]))
        for box, label, score in zip(row["boxes"], row["labels"], scores, strict=True):
            left, top, right, bottom = (float(x) for x in box)
            sides = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            one = {"id": len(found) + 1, "image_id": i, "category_id": int(label), "iscrowd": 0, **sides}
            found.append(one if score is None else {**one, "score": float(score)})
    return found


class WordErrorRate(_TextMetric):
    """Substituted, left out and inserted words by jiwer, over the words of the references. 0 is best; above 1 where
    more is wrong than there is."""

    library = "jiwer"
    extra = "speech"
    instead = "loss"

    def counts(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        pairs = zip(references, predictions, strict=True)
        return np.array([self.of_pair(*pair) for pair in pairs], dtype=np.int64).reshape(-1, 2)

    def of_pair(self, reference: str, prediction: str) -> tuple[int, int]:
        """(edits, size of the reference)."""
        import jiwer

        return _edits(jiwer.process_words(reference, prediction))

    def score(self, sums_K: np.ndarray) -> float:
        edits, size = float(sums_K[0]), float(sums_K[1])
        return edits / size if size else (math.inf if edits else 0.0)


class CharacterErrorRate(WordErrorRate):
    """The same of characters, blanks among them."""

    def of_pair(self, reference: str, prediction: str) -> tuple[int, int]:
        import jiwer

        return _edits(jiwer.process_characters(reference, prediction))


def _edits(found: Any) -> tuple[int, int]:
    right = found.hits + found.substitutions + found.deletions
    return found.substitutions + found.deletions + found.insertions, right


OWN: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "matthews_correlation": MatthewsCorrelation,
    "entity_f1": EntityF1,
    "entity_precision": EntityPrecision,
    "entity_recall": EntityRecall,
}
TEXTS: dict[str, type[_TextMetric]] = {
    "bleu": Bleu,
    "chrf": Chrf,
    "rouge1": Rouge,
    "rouge2": Rouge,
    "rougeL": Rouge,
    "wer": WordErrorRate,
    "cer": CharacterErrorRate,
}
"""Of written texts, beside their references."""


@functools.cache
def load(name: str) -> evaluate.EvaluationModule:
    """A metric by name: ours, or one of the Hub's. Raises `HubError` when that cannot be reached."""
    if name in OWN:
        metric = OWN[name](keep_in_memory=True)
        metric.info.metric_name = name
        return metric
    try:
        return evaluate.load(name)
    except Exception as error:
        raise HubError(
            f"metric '{name}' is none of ours ({', '.join(OWN)}), nor did the Hub give it ({type(error).__name__})",
            "check its name and the network",
        ) from error


@functools.cache
def of_texts(name: str, tokenizer: str = "default") -> _TextMetric:
    """One of `TEXTS`. Raises `RecipeError` where its library is not installed."""
    cls = TEXTS[name]
    if importlib.util.find_spec(cls.library) is None:
        raise RecipeError(
            f"metric '{name}' needs {cls.library}, which is not installed",
            f"pip install 'kt_hf[{cls.extra}]', or choose other metrics, such as {cls.instead}",
        )
    return cls(config_name=name if cls is Rouge else tokenizer, keep_in_memory=True)


def weighted(name: str, truth: np.ndarray, guess: np.ndarray, known_N: np.ndarray, weights_N: np.ndarray) -> float:
    """One of our metrics with example weights, for resampling; `truth` and `guess` are those of the known examples."""
    return float(load(name).score(truth, guess, sample_weight=weights_N[known_N]))  # type: ignore[attr-defined]


def compute(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Several metrics of the same class numbers."""
    found: dict[str, float] = {}
    for name in names:
        result = load(name).compute(predictions=predictions, references=references) or {}
        found[name] = float(next(iter(result.values())))
    return found
