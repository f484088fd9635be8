"""The model card: what a model is, where it comes from, what the evidence says of it.

The front matter goes through huggingface_hub, never through string formatting. Local paths are reduced to their last
component.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kt_hf.errors import RecipeError
from kt_hf.hub import scrub

_LOCAL_PATH = re.compile(
    r"(?<![\w.:/\\~-])(?:file://|~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"<>|,;:]+[/\\])+([^\s/\\'\"<>|,;:]*)"
)


def model_card(
    model_name: str,
    *,
    task: str | None,
    sentence: str = "",
    base_model: str | None = None,
    base_revision: str | None = None,
    base_model_relation: str | None = None,
    parents: Sequence[tuple[str, str | None]] = (),
    teacher: Sequence[tuple[str, str | None]] = (),
    datasets: Sequence[tuple[str, str | None, str | None]] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    library_name: str = "transformers",
    license: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The text of README.md: YAML front matter with a model index, then the same facts for people.

    Args:
        task: pipeline tag, such as `text-classification`; None where nothing is known of it.
        sentence: what the evidence says.
        base_model: Hub id or local path of the model that training started from; None for a merge, whose parents
            stand in for it. base_revision: its commit, where that is known.
        base_model_relation: `finetune`, `adapter`, `merge` or `quantized`.
        parents, teacher: pairs (name, revision).
        datasets: triples (name, split, revision or fingerprint).
        metrics: mappings with `name`, `value`, and where known `low`, `high` (bounds of the interval), `seeds` (how
            many), `dataset` and `split` (default: those of the first of `datasets`).
        settings: plain values, printed as YAML.

    Local paths are reduced to their last component, and what looks like a token is blanked out.

    Raises:
        RecipeError: `base_model_relation` is none of the four.
    """
    from huggingface_hub import ModelCard, ModelCardData

    relations = ("finetune", "adapter", "merge", "quantized")
    if base_model_relation is not None and base_model_relation not in relations:
        raise RecipeError(f"unknown base_model_relation '{base_model_relation}'", f"valid: {', '.join(relations)}")
    bases = [base_model] if base_model else [name for name, _ in parents]
    ids = list(dict.fromkeys(name for name in bases if _is_hub_id(name)))
    results = _eval_results(task, datasets, metrics)
    data = ModelCardData(
        base_model=(ids[0] if len(ids) == 1 else ids) or None,
        base_model_relation=base_model_relation if ids else None,
        datasets=list(dict.fromkeys(name for name, _, _ in datasets if _is_hub_id(name))) or None,
        eval_results=results or None,
        library_name=library_name,
        license=license,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=_portable(model_name) if results else None,
        pipeline_tag=task,
        tags=["kt_hf", *tags],
    )
    body = [f"# {_cell(_portable(model_name))}", _portable(sentence)]
    body += _section("Origin", _origin_lines(base_model, base_revision, base_model_relation, parents, teacher))
    body += _section("Data", [f"- {_dataset_text(*dataset)}" for dataset in datasets])
    body += _section("Evaluation", _metric_lines(datasets, metrics))
    body += _section("Settings", _settings_lines(settings))
    front = f"---\n{data.to_yaml()}\n---\n\n"
    text = scrub(front + "\n\n".join(part for part in body if part) + "\n")
    return str(ModelCard(text))  # parsed again: a card that the Hub could not read fails here


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _eval_results(
    task: str | None, datasets: Sequence[tuple[str, str | None, str | None]], metrics: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """One entry of the model index per metric with a finite value; JSON and the Hub know no NaN."""
    from huggingface_hub import EvalResult

    results = []
    for metric in metrics:
        if task is None or not math.isfinite(float(metric["value"])):
            continue
        name, split, fingerprint = _dataset_of(metric, datasets)
        bounds = {"low": metric.get("low"), "high": metric.get("high"), "num_seeds": metric.get("seeds")}
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=_portable(name),
                dataset_name=_portable(name),
                dataset_split=split,
                dataset_revision=fingerprint,
                metric_type=str(metric["name"]),
                metric_name=str(metric["name"]),
                metric_value=float(metric["value"]),
                metric_args={key: _plain(value) for key, value in bounds.items() if value is not None} or None,
            )
        )
    return results


def _dataset_of(
    metric: Mapping[str, Any], datasets: Sequence[tuple[str, str | None, str | None]]
) -> tuple[str, str | None, str | None]:
    name, split = metric.get("dataset"), metric.get("split")
    for dataset in datasets:
        if name in (None, dataset[0]) and split in (None, dataset[1]):
            return dataset
    return name or (datasets[0][0] if datasets else "not recorded"), split, None


def _origin_lines(
    base_model: str | None,
    revision: str | None,
    relation: str | None,
    parents: Sequence[tuple[str, str | None]],
    teacher: Sequence[tuple[str, str | None]],
) -> list[str]:
    lines = (
        [f"- base model: {_model_text(base_model, revision)}{f' ({relation})' if relation else ''}"]
        if base_model
        else []
    )
    lines += [f"- parent: {_model_text(*parent)}" for parent in parents]
    return lines + [f"- teacher: {_model_text(*model)}" for model in teacher]


def _model_text(name: str, revision: str | None) -> str:
    return f"`{_cell(_name(name))}`" + (f" at revision `{_cell(_portable(revision))}`" if revision else "")


def _dataset_text(name: str, split: str | None, fingerprint: str | None) -> str:
    facts = [f"split `{_cell(split)}`" if split else "", f"revision `{_cell(fingerprint)}`" if fingerprint else ""]
    return ", ".join([f"`{_cell(_name(name))}`", *(fact for fact in facts if fact)])


def _metric_lines(
    datasets: Sequence[tuple[str, str | None, str | None]], metrics: Sequence[Mapping[str, Any]]
) -> list[str]:
    if not metrics:
        return []
    rows = ["| metric | value | interval | seeds | data |", "|---|---|---|---|---|"]
    for metric in metrics:
        name, split, _ = _dataset_of(metric, datasets)
        low, high = metric.get("low"), metric.get("high")
        interval = "" if low is None or high is None else f"[{float(low):.4g}, {float(high):.4g}]"
        where = _name(name) + (f" ({split})" if split else "")
        cells = (metric["name"], f"{float(metric['value']):.4g}", interval, metric.get("seeds") or "", where)
        rows.append("| " + " | ".join(_cell(str(cell)) for cell in cells) + " |")
    return rows


def _settings_lines(settings: Mapping[str, Any] | None) -> list[str]:
    if not settings:
        return []
    import yaml

    text = yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True, width=100).rstrip()
    fence = "```"
    while fence in text:  # a setting may itself hold a fence
        fence += "`"
    return [f"{fence}yaml", text, fence]


def _plain(value: Any) -> Any:
    """The value as YAML and JSON know it, without paths of this machine."""
    if isinstance(value, Mapping):
        return {_portable(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return _name(str(value))
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, int | float) or hasattr(value, "item"):  # numpy's and torch's scalars
        return value.item() if hasattr(value, "item") else float(value)
    return _portable(str(value))


def _portable(text: str) -> str:
    """The text with every absolute path in it reduced to its last component."""
    return _LOCAL_PATH.sub(lambda match: match.group(1) or Path(match.group(0)).name, text)


def _is_local(name: str) -> bool:
    """Whether a model or data set is named by a path; an id on the Hub has at most one slash."""
    return name.startswith(("/", "~", ".", "file:")) or "\\" in name or name.count("/") > 1 or name.startswith("@")


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not _is_local(name) and scrub(name) == name


def _name(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if _is_local(name) else _portable(name)


def _cell(text: str) -> str:
    """One line that cannot end a table cell or a code span."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
