"""A LoRA adapter out of a full fine-tuning: what a model has learnt since its base, module by module, as a product of
two thin matrices.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt_hf import checkpoint, folding, loading, merging
from kt_hf.adapter_merge import check_size
from kt_hf.adapters import Pair, as_matrix, ranks_of, write_adapter
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.functional import low_rank
from kt_hf.merge_engine import SLACK, Memory, one_thread_each
from kt_hf.merging import Tensors, written_aside
from kt_hf.progress import Bytes
from kt_hf.task import FACTS
from kt_hf.tensor_files import open_model

logger = logging.getLogger(__name__)

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""End of a class's name -> peft's word for its task."""


@dataclass
class _Plan:
    """Which module's change becomes a product, which tensors are held in full with the modules that these belong to,
    and which are left out."""

    low_rank: dict[str, nn.Module] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tied: bool = False
    copies: dict[str, str] = field(default_factory=dict)
    """Tied weights that are not in the file, and that peft asks for -> those that they are copies of."""


def extract(
    model: Path,
    base: Path,
    base_name: str,
    output: Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    only_low_rank: bool = False,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> str:
    """Write an adapter that makes the base into the model, as near as it can; returns what is to be said of it.

    rank: of each module at most. error: the relative error (Frobenius) that each module may have; the smallest rank
    that keeps it. base_name: the base as the adapter is to call it. only_low_rank: leave out biases, norms and what
    else is no matrix, all but a head. dtype: of the adapter; default: the model's.
    """
    if rank is None and error is None:
        raise RecipeError("neither --rank nor --error was given", "say how large the adapter may be, or how exact")
    check_size(rank, error)
    if output.exists() or output.is_symlink():
        raise RecipeError(f"the output '{output}' exists", "name a folder that does not, or remove it")
    name = (merging.config(model).get("architectures") or [None])[0]
    if name is None:
        raise RecipeError(f"'{model}' does not say of which class it is", "give a model of transformers")
    structure = loading.without_weights(model, name)
    after, before = _by_name(model, structure, whole=True), _by_name(base, structure)
    ties = loading.ties(structure)
    for target, source in ties.items():  # of what is tied, one copy
        if target in after and source in after and _same(after[target], after[source]):
            del after[target]
    _refuse_other_shapes(after, before, structure, str(model), str(base))
    plan = _plan(structure, after, before, ties, only_low_rank)
    pairs, full, total, lost = _factors(plan, after, before, rank, error, output.name, threads)
    if not pairs:
        raise RecipeError(f"'{model}' and '{base}' do not differ in any layer", "name the model's real base")
    kind = dtype or next(t.dtype for t in after.values() if t.is_floating_point())
    pairs = {m: Pair(p.a.to(kind), p.b.to(kind), 1.0, p.embedding) for m, p in pairs.items()}
    biases = [n for n in plan.full if n.endswith(".bias") and not _within(n, plan.saved)]
    said: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "modules_to_save": plan.saved or None,
        "bias": "none" if not biases else "lora_only" if all(n[:-5] in pairs for n in biases) else "all",
        "fan_in_fan_out": any(_turned(m) for m in plan.low_rank.values()),
        **({"ensure_weight_tying": True} if plan.tied else {}),
        **_task(structure, name),
    }
    with checkpoint.disk(output), written_aside(output) as staged:
        size = write_adapter(staged, said, pairs, full)
        folding.copy_words(model, staged)
        _write_facts(model, staged)
    whole = sum(t.numel() * t.element_size() for t in after.values())
    if plan.left_out:
        left = sum(_norm2(after[n], before.get(n)) for n in plan.left_out)
        some = ", ".join(plan.left_out[:5]) + (f" and {len(plan.left_out) - 5} more" if len(plan.left_out) > 5 else "")
        logger.warning("left out, with %.2g of the change's squared norm: %s", left / (total + left or 1), some)
        total, lost = total + left, lost + left
    return (
        f"{len(pairs)} modules of {ranks_of(pairs)}, {1 - lost / total:.2%} of the change's squared norm kept "
        f"(relative error {math.sqrt(lost / total):.3g}), {len(full)} tensors in full; "
        f"{size / 1e6:.3g} MB of {whole / 1e6:.3g} MB"
    )


# --- what becomes of which tensor ------------------------------------------------------------------------------------


def _plan(structure: nn.Module, after: Tensors, before: Tensors, ties: dict[str, str], only_low_rank: bool) -> _Plan:
    heads = _heads(structure)
    plan, whole, modules = _Plan(), set(heads), dict(structure.named_modules())
    changed = [n for n, t in after.items() if n not in before or not _same(t, before[n])]
    shared = {name for pair in ties.items() for name in pair if not all(n in after for n in pair)}
    for name in changed:
        parent, _, last = name.rpartition(".")
        owner, old = _owner(name, modules), name in before
        adaptable = owner == parent and _can_be_low_rank(modules[owner]) and old
        if _within(name, heads):
            continue
        if adaptable and last == "weight" and name not in shared:
            plan.low_rank[owner] = modules[owner]
        elif only_low_rank and old and name not in shared:
            plan.left_out.append(name)
        elif adaptable and last == "bias":
            plan.full.append(name)  # a bias is loaded by its own name
        elif _is_most(modules[owner], structure):  # a parameter of the whole model cannot be held without all of it
            plan.left_out.append(name)
        else:
            whole.add(owner)
            plan.tied = plan.tied or name in shared
    plan.saved = sorted(m for m in whole if not any(m != w and m.startswith(f"{w}.") for w in whole))
    plan.low_rank = {m: layer for m, layer in plan.low_rank.items() if not _within(f"{m}.", plan.saved)}
    plan.full = [n for n in plan.full if not _within(n, plan.saved)]
    plan.full += [n for n in after if _within(n, plan.saved)]
    plan.copies = {
        t: s for t, s in ties.items() if t not in after and s in after and (_within(t, plan.saved) or s in plan.full)
    }
    return plan


def _heads(structure: nn.Module) -> list[str]:
    """What is held in full, as peft expects it: the task's own layers, but not the output for words."""
    words = getattr(structure, "get_output_embeddings", lambda: None)()
    return [
        n for n in loading.head_modules(structure) if words is None or words not in structure.get_submodule(n).modules()
    ]


def _owner(name: str, modules: dict[str, nn.Module]) -> str:
    """The module to be held where a tensor is: PyTorch's attention reads its layers' weights without calling them."""
    parts = name.split(".")[:-1]
    for i in range(len(parts) + 1):
        if isinstance(modules.get(".".join(parts[:i])), nn.MultiheadAttention):
            return ".".join(parts[:i])
    return ".".join(parts)


def _can_be_low_rank(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, (nn.Linear, nn.Embedding)) or _turned(module)


def _turned(module: nn.Module) -> bool:
    """Transformers' name for GPT-2's linear layer, whose inputs come first."""
    return type(module).__name__ == "Conv1D"


def _is_most(module: nn.Module, structure: nn.Module) -> bool:
    return 2 * sum(p.numel() for p in module.parameters()) > sum(p.numel() for p in structure.parameters())


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _by_name(folder: Path, structure: nn.Module, whole: bool = False) -> Tensors:
    """A checkpoint's tensors by their names in the model. whole: refuse what is not one tensor there, too."""
    model = open_model(folder)
    names = loading.model_names(structure, model)
    odd = [n for n, t in model.items() if n not in names and t.is_floating_point()]
    if whole and odd:
        raise RecipeError(
            f"'{folder}' holds {odd[0]}, which is no tensor of a {type(structure).__name__} ({len(odd)} such)",
            "an adapter is extracted from models whose files hold their weights one by one",
        )
    return {name: model[file] for file, name in names.items()}


def _refuse_other_shapes(after: Tensors, before: Tensors, structure: nn.Module, model: str, base: str) -> None:
    heads = _heads(structure)
    for name in after.keys() & before.keys():
        if after[name].shape != before[name].shape:
            if not _within(name, heads):
                raise RecipeError(
                    f"{name} is {list(after[name].shape)} in '{model}' and {list(before[name].shape)} in '{base}'",
                    "extract from models of one shape and one vocabulary",
                )
            del before[name]
    if not after.keys() & before.keys():
        raise RecipeError(f"'{model}' and '{base}' have no tensor in common", "name the model's real base")


# --- numbers ---------------------------------------------------------------------------------------------------------


def _factors(
    plan: _Plan, after: Tensors, before: Tensors, rank: int | None, error: float | None, name: str, threads: int | None
) -> tuple[dict[str, Pair], Tensors, float, float]:
    """Products by module, tensors held in full, and the squared norms of the whole change and of what is lost of it."""

    def one(module: str) -> tuple[Pair, low_rank.Factors]:
        layer, key = plan.low_rank[module], f"{module}.weight"
        with torch.no_grad(), memory.hold(8 * after[key].numel()):
            change = after[key].to(torch.float32, copy=True).sub_(before[key])
            embedding = isinstance(layer, nn.Embedding)
            if not math.isfinite(float(change.sum())):
                raise IntegrityError(f"{key} has values that are not finite", "make or fetch the model again")
            found = low_rank.factored(as_matrix(change, embedding or _turned(layer)), rank, error)
        kernel = change.shape[2:] if change.dim() > 2 else ()
        a = found.a_RI.reshape(found.rank, -1, *kernel)
        return Pair(a, found.b_OR.reshape(*found.b_OR.shape, *(1 for _ in kernel)), 1.0, embedding), found

    memory = Memory(max([SLACK, *(8 * after[f"{m}.weight"].numel() for m in plan.low_rank)]))
    progress = Bytes(f"extracting {name}", sum(_bytes(after[f"{m}.weight"]) for m in plan.low_rank))
    pairs: dict[str, Pair] = {}
    total = lost = 0.0
    try:
        with one_thread_each(threads or torch.get_num_threads()) as workers:
            for module, (pair, found) in zip(plan.low_rank, workers.map(one, plan.low_rank), strict=True):
                progress.add(_bytes(after[f"{module}.weight"]))
                total, lost = total + found.total, lost + found.lost
                if pair.rank:
                    pairs[module] = pair
    finally:
        progress.close()
    full = {n: after[n] for n in plan.full}
    full |= {t: after[s] for t, s in plan.copies.items()}
    total += sum(_norm2(t, before.get(n)) for n, t in full.items() if n in before)
    return pairs, full, total, lost


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a.dtype) if a.dtype != b.dtype else b)


def _norm2(after: torch.Tensor, before: torch.Tensor | None) -> float:
    if not after.is_floating_point():
        return 0.0
    change = after.double() if before is None else after.double() - before.double()
    return float((change**2).sum())


# --- what is written beside ------------------------------------------------------------------------------------------


def _task(structure: nn.Module, name: str) -> dict[str, Any]:
    for end, word in _TASKS.items():
        if name.endswith(end):
            return {"task_type": word}
    return {"auto_mapping": {"base_model_class": name, "parent_library": type(structure).__module__}}


def _write_facts(model: Path, staged: Path) -> None:
    """The labels, which an adapter's folder has no configuration for."""
    facts = loading.recorded(model)
    if merging.config(model).get("id2label"):
        from kt_hf.recipe import Model

        facts["labels"] = loading.list_labels(loading.config_of(Model(path=str(model))))
    if facts:
        (staged / FACTS).write_text(json.dumps(facts))
