"""`kt-hf merge`: a merge of folders or Hub ids without a recipe, a task or data."""

from __future__ import annotations

import filecmp
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_hf import registry
from kt_hf.errors import Collector, IntegrityError, RecipeError, nearest
from kt_hf.overrides import parse_override
from kt_hf.tensor_files import read_size

FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Origin:
    """A parent: how it was named, where its files are, and the Hub's commit that they are of."""

    name: str
    folder: Path
    revision: str | None


def merge(
    method: str,
    models: Sequence[str],
    output: str | Path,
    *,
    base: str | None = None,
    given: dict[str, Any] | None = None,
    dtype: str | None = None,
    compute: str = "float32",
    max_shard_size: str | int | None = None,
    threads: int | None = None,
    vocabulary: str = "equal",
    new_rows: str = "average",
) -> str:
    """Merge models into a new folder; returns a line on what was done.

    method, given: a registered merge and its settings. models, base: folders or Hub ids. dtype: of the result; default:
    the first parent's. compute: float32 or float64. max_shard_size: such as `5GB`. threads: default as torch's.
    vocabulary, new_rows: what is done where tokenizers differ; see kt_hf/vocabularies.py.

    Raises:
        RecipeError: mistakes in what was asked for, parents that do not fit each other, an output that exists.
        IntegrityError: files that are missing or torn, weights that are not finite.
    """
    import torch

    from kt_hf import merging, vocabularies

    output = Path(output)
    check_words(dtype, compute, threads)
    shard_bytes = read_size(max_shard_size) if max_shard_size is not None else None
    built = _build(method, given or {}, models, base)
    refuse_existing(output)
    parents = [find(name) for name in models]
    found_base = find(base) if base is not None else None
    everyone = [*parents, *([found_base] if found_base else [])]
    policies = "bring them to one vocabulary: --vocabulary union, first, or the name of a model"
    refuse_other_meanings(everyone, len(parents), words=policies if vocabulary == "equal" else None)
    names = [p.name for p in parents]
    found = vocabularies.choose(vocabulary, [(o.name, o.folder) for o in everyone], base, rows=new_rows)
    with merging.Parents([p.folder for p in parents], names, vocabulary=found) as opened:
        built.fit(merging.MergeRun(len(parents), names, True, _without_data))
        began = time.perf_counter()
        opened_base = merging.Parents([found_base.folder], [found_base.name], vocabulary=found) if found_base else None
        size = merging.merge(
            built,
            opened,
            opened_base,
            output,
            out_dtype=getattr(torch, dtype) if dtype else None,
            compute=getattr(torch, compute),
            shard_bytes=shard_bytes,
            threads=threads,
            files={"README.md": card(output.name, method, given or {}, parents, found_base)},
        )
    seconds = time.perf_counter() - began
    return f"merged {len(parents)} models by {method} into {output}: {size / 1e9:.3g} GB in {seconds:.1f} s"


def separate(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Names of models and settings `key=value`, which an option that takes several words swallows together."""
    models = [word for word in words if "=" not in word or os.path.exists(word)]
    collect, given = Collector(), {}
    for word in words:
        if word not in models:
            with collect():
                path, value = parse_override(word)
                given[".".join(path)] = value
    collect.raise_if_any()
    return models, given


def check_words(dtype: str | None, compute: str, threads: int | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise RecipeError(f"--dtype {dtype} is none that a merge writes", nearest(dtype, FLOATS))
    if compute not in ("float32", "float64"):
        raise RecipeError(f"merges are not computed in {compute}", nearest(compute, ("float32", "float64")))
    if threads is not None and threads < 1:
        raise RecipeError(f"--threads {threads} is no number of threads", "give 1 or more")


def refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise RecipeError(f"the output '{output}' exists", "name a folder that does not, or remove it")


def _build(name: str, given: dict[str, Any], models: Sequence[str], base: str | None) -> Any:
    """The method with its settings, if it can do without data."""
    from kt_hf import layerwise
    from kt_hf.merge import check_parents

    cls: Any = registry.load("merge", name)
    collect = Collector()
    valid = layerwise.validate(cls, given, name, collect)
    collect.raise_if_any()
    method = layerwise.build(name, cls, valid)
    if method.needs_validation:
        raise RecipeError(
            f"{name} needs validation data, which `kt-hf merge` has not",
            f'write a recipe with data and a stage Merge("soup", "{name}", models=[...]), and use `kt-hf run`',
        )
    check_parents(name, method, models, base)
    return method


def _without_data(weights: Sequence[float]) -> float:
    raise RecipeError(
        "this merge scores candidates on validation data, which `kt-hf merge` has not",
        "write a recipe with data and a Merge stage, and use `kt-hf run`",
    )


def find(name: str, revision: str | None = None) -> Origin:
    """A folder, or what the Hub has under an id."""
    folder = Path(name)
    if folder.is_dir():
        return Origin(name, folder, None)
    if folder.exists():
        raise RecipeError(f"'{name}' is a file", "name the model's folder, or its id on the Hub")
    from kt_hf.loading import local
    from kt_hf.recipe import Model

    found = local(Model(path=name, revision=revision))
    return Origin(name, Path(str(found.path)), found.revision)


def refuse_other_meanings(models: Sequence[Origin], parents: int, words: str | None) -> None:
    """Weights of one shape may mean different things: another kind of model, other labels, other words. A base need not
    have the parents' labels. words: what to do about other vocabularies; None where they are brought together."""
    first = models[0]
    for i, other in enumerate(models[1:], 1):
        mine, theirs = _meaning(first.folder), _meaning(other.folder)
        if words is not None and not _same_file(first.folder / _TOKENIZER, other.folder / _TOKENIZER):
            mine, theirs = mine | _words(first.folder), theirs | _words(other.folder)
        for key in mine.keys() & theirs.keys():
            if mine[key] != theirs[key] and (i < parents or key != "labels"):
                raise RecipeError(
                    f"'{first.name}' and '{other.name}' differ in their {key}",
                    words
                    if words is not None and key in ("vocabulary", "special tokens")
                    else "merge models of one architecture, with the same labels and vocabulary",
                )


_TOKENIZER = "tokenizer.json"


def _same_file(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def _meaning(folder: Path) -> dict[str, Any]:
    from kt_hf.merging import config

    found = config(folder)
    facts: dict[str, Any] = {"model type": found["model_type"]} if "model_type" in found else {}
    if found.get("id2label"):
        facts["labels"] = found["id2label"]
    return facts


def _words(folder: Path) -> dict[str, Any]:
    path = folder / _TOKENIZER
    if not path.is_file():
        return {}
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or []}
        return {"vocabulary": tokenizer["model"].get("vocab"), "special tokens": added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} cannot be read ({type(error).__name__})", "fetch this model again") from error


def card(title: str, method: str, given: dict[str, Any], parents: Sequence[Origin], base: Origin | None) -> str:
    from kt_hf.loading import recorded
    from kt_hf.merging import config
    from kt_hf.model_card import model_card

    return model_card(
        title,
        task=recorded(parents[0].folder).get("task"),
        sentence=f"A merge of {len(parents)} models by {method}, not measured.",
        base_model_relation="merge",
        parents=[(p.name, p.revision) for p in parents],
        settings={method: given, **({"base": base.name} if base else {})},
        library_name="transformers" if config(parents[0].folder) else "open_clip",
        tags=["merge"],
    )
