"""`kt-hf merge`: a merge of folders or Hub ids without a recipe, a task or data."""

from __future__ import annotations

import filecmp
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kt_hf import heads, registry
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
    head: str | None = None,
    given: dict[str, Any] | None = None,
    dtype: str | None = None,
    compute: str = "float32",
    max_shard_size: str | int | None = None,
    threads: int | None = None,
    vocabulary: str = "equal",
    new_rows: str = "average",
    dry_run: bool = False,
    check: bool = True,
    fold: bool = False,
    **adapter: Any,
) -> str:
    """Merge models into a new folder; returns lines on what was done. Adapters alone give an adapter; among models, or
    with `fold`, each is folded into its base first.

    method, given: a registered merge and its settings. models, base: folders or Hub ids. head: the parent whose head,
    configuration and files are kept where heads differ, or `all`: a model for each. dtype: of the result; default: the
    first parent's. compute: float32 or float64. max_shard_size: such as `5GB`. threads: default as torch's. dry_run:
    check and compare, and write nothing. check: load the result and ask it something before it gets its name. adapter:
    what an adapter is to be, as `kt_hf.adapter_merge.How` has it. vocabulary, new_rows: what is done where tokenizers
    differ; see kt_hf/vocabularies.py.

    Raises:
        RecipeError: mistakes in what was asked for, parents that do not fit each other, an output that exists.
        IntegrityError: files that are missing or torn, weights that are not finite.
    """
    from kt_hf.adapters import is_adapter
    from kt_hf.folding import folded

    output = Path(output)
    check_words(dtype, compute, threads)
    shard_bytes = read_size(max_shard_size) if max_shard_size is not None else None
    built = _build(method, given or {}, models, base or "what the adapters adapt")
    refuse_existing(output)
    parents = [find(name) for name in models]
    how: dict[str, Any] = {"dtype": dtype, "compute": compute, "threads": threads}
    if not fold and all(is_adapter(p.folder) for p in parents):
        if head is not None or dry_run or vocabulary != "equal":
            raise RecipeError("--head, --vocabulary and --dry-run are of models, not of adapters", "fold them: --fold")
        said = _merge_adapters(built, method, parents, output, base=base, given=given or {}, adapter=adapter, **how)
    else:
        if words := [f"--{word.replace('_', '-')}" for word in adapter]:
            raise RecipeError(f"{', '.join(words)}: of adapters alone", "leave it out, or merge adapters into one")
        _build(method, given or {}, models, base)
        with folded([(p.name, p.folder) for p in parents], base, output) as folders:
            parents = [replace(p, folder=folder) for p, folder in zip(parents, folders, strict=True)]
            how |= {
                "vocabulary": vocabulary,
                "new_rows": new_rows,
                "head": head,
                "dry_run": dry_run,
                "check": check,
                "shard_bytes": shard_bytes,
            }
            said = _merge_models(built, method, parents, output, base=base, given=given or {}, **how)
    return said


def _merge_models(
    built: Any,
    method: str,
    parents: Sequence[Origin],
    output: Path,
    *,
    base: str | None,
    given: dict[str, Any],
    dtype: str | None,
    compute: str,
    shard_bytes: int | None,
    threads: int | None,
    head: str | None,
    dry_run: bool,
    check: bool,
    vocabulary: str,
    new_rows: str,
) -> str:
    import torch

    from kt_hf import merging, vocabularies
    from kt_hf.trial import try_out

    found_base = find(base) if base is not None else None
    everyone = [*parents, *([found_base] if found_base else [])]
    policies = "bring them to one vocabulary: --vocabulary union, first, or the name of a model"
    refuse_other_meanings(everyone, len(parents), head is not None, policies if vocabulary == "equal" else None)
    names = [p.name for p in parents]
    common = vocabularies.choose(vocabulary, [(o.name, o.folder) for o in everyone], base, rows=new_rows)
    built.fit(merging.MergeRun(len(parents), names, True, _without_data))
    opened_base = merging.Parents([found_base.folder], [found_base.name], vocabulary=common) if found_base else None
    began, size, tried = time.perf_counter(), 0, 0.0

    def verify(folder: Path) -> None:
        nonlocal tried
        start = time.perf_counter()
        try_out(folder)
        tried += time.perf_counter() - start

    for kept, folder in _heads(head, names, output):
        with merging.Parents([p.folder for p in parents], names, kept, vocabulary=common) as opened:
            kinship = opened.kinship(opened_base)
            if dry_run:
                kinship.warn()
                merging.plan(built, opened, opened_base)
                return f"{kinship.table()}\nnothing was written: {len(parents)} models can be merged by {method}"
            if not size:
                kinship.warn()
            size += merging.merge(
                built,
                opened,
                opened_base,
                folder,
                out_dtype=getattr(torch, dtype) if dtype else None,
                compute=getattr(torch, compute),
                shard_bytes=shard_bytes,
                threads=threads,
                verify=verify if check else None,
                files={"README.md": card(folder.name, method, given, parents, found_base, kinship.summary())},
            )
    seconds = time.perf_counter() - began - tried
    return (
        f"merged {len(parents)} models by {method} into {output}: {size / 1e9:.3g} GB in {seconds:.1f} s; "
        f"{kinship.summary()}"
    )


def _heads(head: str | None, names: Sequence[str], output: Path) -> list[tuple[int | None, Path]]:
    """(whose head is kept, where the model goes): one, or for `all` one for each parent, in a folder by its name."""
    if head != "all":
        return [(heads.place(head, names) if head is not None else None, output)]
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    if len(set(short)) < len(short):
        short = [f"{i}-{name}" for i, name in enumerate(short)]
    return [(i, output / name) for i, name in enumerate(short)]


def _merge_adapters(
    built: Any,
    method: str,
    parents: Sequence[Origin],
    output: Path,
    *,
    base: str | None,
    given: dict[str, Any],
    adapter: dict[str, Any],
    dtype: str | None,
    compute: str,
    threads: int | None,
) -> str:
    import torch

    from kt_hf import merging
    from kt_hf.adapter_merge import How, merge_adapters
    from kt_hf.adapters import open_adapter

    names, began = [p.name for p in parents], time.perf_counter()
    built.fit(merging.MergeRun(len(parents), names, True, _without_data))
    text = merge_adapters(
        built,
        method,
        [open_adapter(p.folder, p.name) for p in parents],
        output,
        how=How(**adapter),
        base=base,
        dtype=getattr(torch, dtype) if dtype else None,
        compute=getattr(torch, compute),
        threads=threads,
        files={"README.md": card(output.name, method, {**given, **adapter}, parents, None, library="peft")},
    )
    seconds = time.perf_counter() - began
    return f"merged {len(parents)} adapters by {method} into {output}: {text} in {seconds:.1f} s"


def extract_lora(
    model: str,
    base: str,
    output: str | Path,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    **how: Any,
) -> str:
    """Make an adapter out of a full fine-tuning of `base`; returns a line on what was done. how: as
    `kt_hf.extraction.extract` has it."""
    import torch

    from kt_hf.extraction import extract

    check_words(dtype, "float32", threads)
    began = time.perf_counter()
    found, found_base = find(model), find(base)
    kind = getattr(torch, dtype) if dtype else None
    text = extract(found.folder, found_base.folder, base, Path(output), dtype=kind, threads=threads, **how)
    return f"extracted {text}, into {output} in {time.perf_counter() - began:.1f} s"


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
    split = "validation" if method.needs_validation else method.measures_on
    if split is not None:
        raise RecipeError(
            f"{name} needs {'training' if split == 'train' else split} data, which `kt-hf merge` has not",
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


def refuse_other_meanings(models: Sequence[Origin], parents: int, one_head: bool, words: str | None) -> None:
    """Weights of one shape may mean different things: another kind of model, other labels, other words. A base need not
    have the parents' labels, nor need parents of which one head is kept. words: what to do about other vocabularies;
    None where they are brought together."""
    first = models[0]
    for i, other in enumerate(models[1:], 1):
        mine, theirs = _meaning(first.folder), _meaning(other.folder)
        if words is not None and not _same_file(first.folder / _TOKENIZER, other.folder / _TOKENIZER):
            mine, theirs = mine | _words(first.folder), theirs | _words(other.folder)
        for key in mine.keys() & theirs.keys():
            if mine[key] != theirs[key] and (key != "labels" or (i < parents and not one_head)):
                remedy = "merge models of one architecture, with the same labels and vocabulary"
                if key == "labels":
                    remedy += f"; or keep one's head, or all: --head {other.name}, --head all"
                if words is not None and key in ("vocabulary", "special tokens"):
                    remedy = words
                raise RecipeError(f"'{first.name}' and '{other.name}' differ in their {key}", remedy)


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


def card(
    title: str,
    method: str,
    given: dict[str, Any],
    parents: Sequence[Origin],
    base: Origin | None,
    kinship: str = "",
    library: str | None = None,
) -> str:
    from kt_hf.loading import recorded
    from kt_hf.merging import config
    from kt_hf.model_card import model_card

    return model_card(
        title,
        task=recorded(parents[0].folder).get("task"),
        sentence=f"A merge of {len(parents)} {'adapters' if library else 'models'} by {method}, not measured."
        + (f" Kinship of the parents: {kinship}." if kinship else ""),
        base_model_relation="merge",
        parents=[(p.name, p.revision) for p in parents],
        settings={method: given, **({"base": base.name} if base else {})},
        library_name=library or ("transformers" if config(parents[0].folder) else "open_clip"),
        tags=["merge"],
    )
