"""An adapter folded into its base: a full model, written by the merge engine tensor by tensor.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kt_hf import loading, merging
from kt_hf.adapters import Adapter, Pair, is_adapter, open_adapter
from kt_hf.errors import KtError, RecipeError
from kt_hf.merge import MergeMethod
from kt_hf.merging import Tensors
from kt_hf.recipe import Model
from kt_hf.task import FACTS
from kt_hf.tensor_files import open_model

_CLASSES = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
"""peft's word for a task -> transformers' for its model classes."""
_WORDS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece", "chat_template")
_BESIDE = (*_WORDS, "preprocessor_config", "processor_config", FACTS)
"""Beginnings of files that stand beside a model or an adapter, and go along."""


@contextmanager
def folded(folders: Sequence[tuple[str, Path]], base: str | None, beside: Path) -> Iterator[list[Path]]:
    """Folders of full models: of those (label, folder) that are adapters, each folded into its base. These are written
    beside `beside`, and removed on leaving.

    base: where the base is, if not where the adapter says.
    """
    if not any(is_adapter(folder) for _, folder in folders):
        yield [folder for _, folder in folders]
        return
    with merging.hidden(beside.with_name(f".{beside.name}.folded"), beside) as room:
        found = []
        for i, (label, folder) in enumerate(folders):
            if is_adapter(folder):
                adapter = open_adapter(folder, label)
                folder = room / str(i)
                fold(adapter, base_of(adapter, base), folder)
            found.append(folder)
        yield found


def base_of(adapter: Adapter, other: str | None = None) -> Path:
    """The folder of an adapter's base: as its configuration says, else `other`. Raises `KtError`."""
    names = [n for n in (adapter.base, other) if n]
    if not names:
        raise RecipeError(
            f"adapter '{adapter.label}' does not say what it adapts", "name its base: --base DIR_OR_HUB_ID"
        )
    for name in names:
        if Path(name).is_dir():
            return Path(name)
    failed: KtError | None = None
    for name in names:
        try:
            return Path(str(loading.local(Model(path=name, revision=adapter.config.get("revision") or None)).path))
        except KtError as error:
            failed = failed or error
    assert failed is not None
    raise RecipeError(
        f"the base of adapter '{adapter.label}' was not found ({failed.cause})", "say where it is: --base DIR_OR_HUB_ID"
    ) from failed


def fold(adapter: Adapter, base: Path, output: Path) -> None:
    """Write the full model: W + scaling * B A, the biases and what the adapter holds in full, in the base's dtype.

    Weights that were tied, and of which the adapter changes one, are written apart, and the configuration says so.
    """
    with merging.Parents([base], [str(base)]) as parents:
        settings = merging.config(base)
        structure = _Structure(base, class_of(adapter, settings))
        model, names = _as_adapted(parents.models[0], adapter, structure)
        parents.models[0] = model
        dtype = next((t.dtype for t in model.values() if t.is_floating_point()), torch.float32)
        full = {_renamed(names, n): t for n, t in {**adapter.bases, **adapter.full}.items()}
        pairs = {_renamed(names, f"{module}.weight"): pair for module, pair in adapter.pairs.items()}
        untied = _part_ways(model, pairs, full, names, structure)
        model |= {n: t.to(dtype) if t.is_floating_point() else t for n, t in full.items()}
        added = {f"{m}.bias": p.bias * p.scaling for m, p in adapter.pairs.items() if p.bias is not None}
        biases = {_renamed(names, n): t for n, t in added.items()}
        method = Folding(pairs, biases, bool(adapter.config.get("fan_in_fan_out")))
        method.check_model(model, adapter.label)
        # Weights that are copies in the base, and of which the adapter changes one, are to part.
        merging.merge(method, parents, None, output, sync=False, keep_ties=False)
    _finish(adapter, settings, untied, output)


class Folding(MergeMethod):
    """The base's tensors with what the adapter adds to them."""

    def __init__(self, pairs: dict[str, Pair], biases: Tensors, fan_in_fan_out: bool):
        self.pairs, self.biases, self.fan_in_fan_out = pairs, biases, fan_in_fan_out

    def check_model(self, model: Tensors, label: str) -> None:
        for name, pair in self.pairs.items():
            if name not in model:
                raise RecipeError(
                    f"adapter '{label}' adapts {name}, which its base has not",
                    "name the base that it was trained on: --base; or merge by peft's `merge_and_unload`",
                )
            if tuple(model[name].shape) not in self._shapes(pair):
                raise RecipeError(
                    f"{name} is {list(model[name].shape)} in its base, and adapter '{label}' has {list(pair.shape)}",
                    "name the base that it was trained on: --base",
                )
            if pair.magnitude is not None and len(pair.shape) != 2:
                raise RecipeError(f"adapter '{label}': {name} is a convolution with DoRA", "merge it by peft")
        if odd := sorted(self.biases.keys() - model.keys()):
            raise RecipeError(f"adapter '{label}' adds to {odd[0]}, which its base has not", "merge it by peft")

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        weight = tensors_M[0]
        if name in self.biases:
            return weight + self.biases[name]
        pair = self.pairs.get(name)
        if pair is None:
            return weight
        b_OR, a_RI = pair.matrices(weight.dtype)
        turned = len(pair.shape) == 2 and (tuple(weight.shape) != pair.shape or self.fan_in_fan_out or pair.embedding)
        matrix_OI = weight.T if turned else weight.flatten(1)
        matrix_OI.addmm_(b_OR, a_RI, alpha=pair.scaling)  # in place: the engine hands out copies
        if pair.magnitude is not None:
            # Liu et al. 2024, DoRA, equation (5): m (W + s B A) / |W + s B A| by outputs (arXiv:2402.09353)
            matrix_OI *= (pair.magnitude.flatten() / torch.linalg.vector_norm(matrix_OI, dim=1)).unsqueeze(1)
        return weight

    def _shapes(self, pair: Pair) -> list[tuple[int, ...]]:
        """That a weight may have: of GPT-2's layers the inputs come first."""
        if len(pair.shape) != 2:
            return [pair.shape]
        return [pair.shape[::-1]] if pair.embedding else [pair.shape, pair.shape[::-1]]


# --- names -----------------------------------------------------------------------------------------------------------


class _Structure:
    """The adapted model without weights, built where it is asked for: that takes a while."""

    def __init__(self, base: Path, name: str | None):
        self.base, self.name = base, name

    @cached_property
    def model(self) -> Any:
        return loading.without_weights(self.base, self.name) if self.name else None


def _as_adapted(model: Tensors, adapter: Adapter, structure: _Structure) -> tuple[Tensors, dict[str, str]]:
    """A base's tensors as the files of the adapted model hold them, and from a name in that model to that in the files
    where it is another. A backbone's checkpoint may lack the first part of a name (`bert.`), or have it in addition."""
    if all(f"{module}.weight" in model for module in adapter.pairs) or structure.model is None:
        return model, {}
    found, names, prefix = {}, {}, f"{structure.model.base_model_prefix}."
    for file, name in loading.model_names(structure.model, model).items():
        tensor, inner = model[file], name.startswith(prefix)
        if inner != file.startswith(prefix):
            file = f"{prefix}{file}" if inner else file.removeprefix(prefix)
        found[file], names[name] = tensor, file
    return found, names


def _renamed(names: dict[str, str], name: str) -> str:
    return names.get(name, name)


def base_tensors(adapter: Adapter, base: Path, wanted: Sequence[str]) -> Tensors:
    """Those of the base's tensors that are wanted, by their names in the adapted model, as far as it has them."""
    model = open_model(base)
    if any(name not in model for name in wanted):
        structure = _Structure(base, class_of(adapter, merging.config(base))).model
        if structure is not None:
            model = {name: model[file] for file, name in loading.model_names(structure, model).items()}
    return {name: model[name] for name in wanted if name in model}


def _part_ways(
    model: Tensors, pairs: dict[str, Pair], full: Tensors, names: dict[str, str], structure: _Structure
) -> bool:
    """Write tied weights apart where the adapter changes one of them; True if it does."""
    changed = pairs.keys() | full.keys()
    words = max((t.shape[0] for t in model.values() if t.dim() == 2), default=0)
    if not any(n not in model or (model[n].dim() == 2 and model[n].shape[0] >= words) for n in changed):
        return False  # nothing that models tie: spares building one
    ties = {_renamed(names, t): _renamed(names, s) for t, s in loading.ties(structure.model).items()}
    affected = {t: s for t, s in ties.items() if s in model and (t in changed or s in changed)}
    for name in [t for t, s in affected.items() if not {t, s} & pairs.keys() and _equal(full.get(t), full.get(s))]:
        del full[name], affected[name]  # tied in the adapter, too
    for target, source in affected.items():
        model.setdefault(target, model[source])
    return bool(affected)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


# --- files -----------------------------------------------------------------------------------------------------------


def class_of(adapter: Adapter, settings: dict[str, Any]) -> str | None:
    """The model class that was adapted: as peft noted it, as its task has it, else as the base says."""
    noted = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    if noted:
        return str(noted)
    word = _CLASSES.get(adapter.config.get("task_type") or "")
    if word:
        from transformers.models.auto import modeling_auto

        found = getattr(modeling_auto, f"MODEL_FOR_{word}_MAPPING_NAMES").get(settings.get("model_type"))
        if found:
            return str(found)
    return (settings.get("architectures") or [None])[0]


def _finish(adapter: Adapter, settings: dict[str, Any], untied: bool, output: Path) -> None:
    """The configuration of what was adapted: its class, its labels, whether weights are tied; and its own words."""
    if settings:
        found = class_of(adapter, settings)
        if found:
            settings["architectures"] = [found]
        labels = loading.recorded(adapter.folder).get("labels") or _numbered(adapter, settings)
        if labels:
            settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
            settings["label2id"] = {label: i for i, label in enumerate(labels)}
            settings.pop("num_labels", None)
        for part in [settings, *(v for v in settings.values() if isinstance(v, dict))] if untied else []:
            if "tie_word_embeddings" in part or part is settings:
                part["tie_word_embeddings"] = False
        (output / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    copy_words(adapter.folder, output)


def copy_words(source: Path, target: Path) -> None:
    """The files of a tokenizer or another processor, and what kt_hf notes beside a model."""
    for path in source.iterdir():
        if path.is_file() and path.name.startswith(_BESIDE):
            shutil.copyfile(path, target / path.name)


def _numbered(adapter: Adapter, settings: dict[str, Any]) -> list[str]:
    """Names for the outputs of a head that came with the adapter, where nobody wrote down any and the base has another
    number."""
    if adapter.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return []
    wide = {settings.get("hidden_size"), settings.get("d_model"), settings.get("dim")}
    sizes = {t.shape[0] for t in adapter.full.values() if t.dim() == 2} - wide
    known = len(settings.get("id2label") or {}) or 2
    count = sizes.pop() if len(sizes) == 1 else known
    return [] if count == known else [f"LABEL_{i}" for i in range(count)]
