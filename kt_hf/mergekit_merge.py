"""`kt-hf merge --config FILE.yml`: a merge as mergekit's YAML describes it (kt_hf/mergekit_yaml.py), with mergekit's
numbers.

Each tensor is a job of its own: its method has the parameters that hold for its name and depth. Depth is mergekit's:
from 0 to 1 over the layers of a slice, and 0 for what stands before and after the layers.

Shapes: M models.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kt_hf import kinship, layerwise, merging, registry
from kt_hf.blocks import Block, blocks, depths
from kt_hf.errors import Collector, RecipeError
from kt_hf.functional import task_vectors
from kt_hf.functional.magnitude import Keep, KeepBetween, num_kept
from kt_hf.kinship import Kinship
from kt_hf.merge import MergeMethod
from kt_hf.merge_command import Origin, card, check_words, find, refuse_existing, refuse_other_meanings
from kt_hf.merge_engine import Job
from kt_hf.mergekit_yaml import BASED, METHODS, Config, Ref, Slice, read, resolve
from kt_hf.merging import Tensors
from kt_hf.randomness import number

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
"""What a configuration may call its number of layers."""


def merge(
    path: str | Path,
    output: str | Path,
    *,
    compute: str | None = None,
    max_shard_size: str | int | None = None,
    threads: int | None = None,
    check: bool = True,
    dry_run: bool = False,
) -> str:
    """Merge as a file in mergekit's format says, into a new folder; returns a line on what was done. A model with an
    adapter (`model+adapter`) is folded first.

    compute: float32 or float64; default: float64 where the file's `dtype` is that. Others: as in `merge_command.merge`.

    Raises:
        RecipeError: mistakes in the file, all together, models that do not fit it or each other, an output that exists.
        IntegrityError: files that are missing or torn, weights that are not finite.
    """
    from kt_hf.tensor_files import read_size

    output, config = Path(output), read(path)
    check_words(None, compute or "float32", threads)
    how: dict[str, Any] = {
        "compute": getattr(torch, compute or ("float64" if config.dtype == "float64" else "float32")),
        "shard_bytes": read_size(max_shard_size) if max_shard_size is not None else None,
        "threads": threads,
    }
    refuse_existing(output)
    with _found(config.models, output) as found:
        return _merge(
            config, found, output, text=Path(path).read_text(encoding="utf-8-sig"), check=check, dry_run=dry_run, **how
        )


@contextmanager
def _found(models: Sequence[Ref], output: Path) -> Iterator[dict[Ref, Origin]]:
    """Where the models are; those with an adapter are folded beside the output, and gone on leaving."""
    from kt_hf.adapters import open_adapter
    from kt_hf.folding import fold

    found = {ref: find(ref.path, ref.revision) for ref in models}
    if not any(ref.adapter for ref in models):
        yield found
        return
    with merging.hidden(output.with_name(f".{output.name}.folded"), output) as room:
        for i, (ref, origin) in enumerate(found.items()):
            if ref.adapter:
                adapter = find(ref.adapter.path, ref.adapter.revision)
                fold(open_adapter(adapter.folder, str(ref.adapter)), origin.folder, room / str(i))
                found[ref] = replace(origin, name=str(ref), folder=room / str(i))
        yield found


def _merge(
    config: Config,
    found: dict[Ref, Origin],
    output: Path,
    *,
    text: str,
    check: bool,
    dry_run: bool,
    compute: torch.dtype,
    shard_bytes: int | None,
    threads: int | None,
) -> str:
    from kt_hf import vocabularies
    from kt_hf.trial import try_out

    parents = [origin for ref, origin in found.items() if ref != config.base]
    all_of_them = [*parents, *(origin for ref, origin in found.items() if ref == config.base)]
    policies = "bring them to one vocabulary: tokenizer_source: union, base, or one of the models"
    words = policies if config.tokenizer_source is None else None
    refuse_other_meanings(all_of_them, len(parents), False, words=words)
    donor = found[config.models[0]]
    vocabulary = None
    if config.tokenizer_source is not None:
        policy = {"base": "first"}.get(config.tokenizer_source, config.tokenizer_source)
        origins = [(str(ref), origin.folder) for ref, origin in found.items()]
        base = str(config.base) if config.base else None
        vocabulary = vocabularies.choose(policy, origins, base, multiple_of=config.pad_to_multiple_of or 1)
    opened = merging.Parents(
        [o.folder for o in found.values()], [str(r) for r in found], vocabulary=vocabulary, alike=config.whole
    )
    models = dict(zip(found, opened.models, strict=True))
    began, tried = time.perf_counter(), 0.0

    def verify(folder: Path) -> None:
        nonlocal tried
        start = time.perf_counter()
        try_out(folder)
        tried = time.perf_counter() - start

    plan = Plan(config, models, {ref: merging.config(origin.folder) for ref, origin in found.items()})
    jobs = plan.jobs()
    kin = _kinship(config, models) if config.whole else None
    if kin is not None:
        kin.warn()
    if dry_run:
        said = f"nothing was written: {len(jobs)} tensors can be made of {len(found)} models by {config.method}"
        return f"{kin.table()}\n{said}" if kin is not None else said
    files: dict[str, Any] = dict(vocabulary.files) if vocabulary else {}
    if config.chat_template is not None:
        folders = [origin.folder for origin in found.values()]
        files |= _templated(config.chat_template, folders, donor.folder, files)
    files["README.md"] = card(
        output.name,
        config.method,
        dict(config.parameters),
        parents or [donor],
        found.get(config.base or Ref("")),
        kin.summary() if kin is not None else "",
    )
    files["mergekit_config.yml"] = text
    dtype = config.out_dtype or config.dtype
    single, shard_bytes = merging.layout(donor.folder, shard_bytes)
    size = merging.write(
        jobs,
        donor.folder,
        output,
        out_dtype=getattr(torch, dtype) if dtype else _own_dtype(models[config.models[0]], jobs),
        compute=compute,
        single=single,
        shard_bytes=shard_bytes,
        threads=threads,
        files=files,
        verify=verify if check else None,
        configure=lambda settings: plan.configured(vocabulary.configured(settings) if vocabulary else settings),
    )
    seconds = time.perf_counter() - began - tried
    return f"merged {len(found)} models by {config.method} into {output}: {size / 1e9:.3g} GB in {seconds:.1f} s"


def _kinship(config: Config, models: Mapping[Ref, Tensors]) -> Kinship:
    """How near the models are to each other, and to the base of a method that has one."""
    base = config.base if config.method in BASED and len(models) > 1 else None
    parents = [ref for ref in models if ref != base]
    return kinship.measure(
        [str(ref) for ref in parents], [models[ref] for ref in parents], models[base] if base is not None else None
    )


def _templated(template: str, models: Sequence[Path], donor: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """Files of a tokenizer with another chat template; `auto` is that of most models."""
    if template == "auto":
        found = [t.strip() for t in map(_template, models) if t]
        if not found:
            return {}
        template = max(found, key=found.count)
    written: dict[str, str] = {"chat_template.jinja": template}
    content = files.get("tokenizer_config.json") or _text(donor / "tokenizer_config.json")
    if content:
        settings = json.loads(content)
        settings.pop("chat_template", None)
        written["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return written


def _template(model: Path) -> str | None:
    own = json.loads(_text(model / "tokenizer_config.json") or "{}").get("chat_template")
    return _text(model / "chat_template.jinja") or (own if isinstance(own, str) else None)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _own_dtype(donor: Tensors, jobs: Mapping[str, Job]) -> torch.dtype | None:
    """The donor's dtype, where it has one and others have others."""
    own = {t.dtype for t in donor.values() if t.is_floating_point()}
    others = {job.like.dtype for job in jobs.values() if job.like.is_floating_point()}
    return own.pop() if len(own) == 1 and others != own else None


# --- which tensor becomes which ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A tensor of the result: the slice that it belongs to, what it is called in each of the slice's models, and its
    depth there."""

    part: Slice
    names: tuple[str, ...]
    depth: float


class Plan:
    """What becomes of each tensor, and of the configuration."""

    def __init__(self, config: Config, models: Mapping[Ref, Tensors], configs: Mapping[Ref, dict[str, Any]]):
        self.config, self.models, self.configs = config, models, configs
        self.layers: list[tuple[Ref, int]] = []
        """Of each layer of the result the model that its settings are taken from, and which layer it is there."""
        self.counts: dict[Ref, int] = {}
        self._methods: dict[str, MergeMethod] = {}
        self.outputs = self._whole(config.slices[0]) if config.whole else self._sliced()

    def _whole(self, part: Slice) -> dict[str, Output]:
        names = list(self.models[part.sources[0].model])
        placed = blocks(names)
        return {n: Output(part, (n,) * len(part.sources), _depth(placed.get(n))) for n in names}

    def _sliced(self) -> dict[str, Output]:
        placed = {
            ref: self._stack(ref) for ref in dict.fromkeys(s.model for p in self.config.slices for s in p.sources)
        }
        collect = Collector()
        for part in self.config.slices:
            with collect():
                self._check_layers(part)
        collect.raise_if_any()
        found = self._outside(self.config.slices[0], placed, 0.0)
        for part in self.config.slices:
            found |= self._layers(part, placed)
        return found | self._outside(self.config.slices[-1], placed, 1.0)

    def _outside(self, part: Slice, placed: Mapping[Ref, Mapping[str, Block]], depth: float) -> dict[str, Output]:
        """What stands before the layers, or after them."""
        model = part.sources[0].model
        found = [n for n, d in depths(list(self.models[model])).items() if n not in placed[model] and d == depth]
        return {name: Output(part, (name,) * len(part.sources), 0.0) for name in found}

    def _stack(self, ref: Ref) -> dict[str, Block]:
        placed = blocks(list(self.models[ref]))
        stacks = {(b.stack, b.count) for b in placed.values()}
        if len(stacks) != 1 or any(not n.startswith(f"{b.stack}.{b.index}.") for n, b in placed.items()):
            raise RecipeError(
                f"'{ref}' has {len(stacks)} stacks of layers that slices could be taken of"
                if len(stacks) != 1
                else f"the layers of '{ref}' are not numbered in one list",
                "list `models` instead of `slices`",
            )
        self.counts[ref] = stacks.pop()[1]
        return placed

    def _check_layers(self, part: Slice) -> None:
        for i, source in enumerate(part.sources):
            assert source.layers is not None
            if source.layers[1] > self.counts[source.model]:
                raise RecipeError(
                    f"{part.where}.sources.{i}.layer_range: got {list(source.layers)}, and '{source.model}' has "
                    f"{self.counts[source.model]} layers",
                    f"end at {self.counts[source.model]} or before",
                )

    def _layers(self, part: Slice, placed: Mapping[Ref, Mapping[str, Block]]) -> dict[str, Output]:
        """Of one slice, renumbered."""
        ranges = [source.layers or (0, 0) for source in part.sources]
        first, count, found = part.sources[0].model, ranges[0][1] - ranges[0][0], {}
        for i in range(count):
            here = [n for n, b in placed[first].items() if b.index == ranges[0][0] + i]
            for name in here:
                stack, rest = placed[first][name].stack, name.split(f".{ranges[0][0] + i}.", 1)[1]
                names = tuple(f"{stack}.{begin + i}.{rest}" for begin, _ in ranges)
                depth = i / (count - 1) if count > 1 else 1.0
                found[f"{stack}.{len(self.layers)}.{rest}"] = Output(part, names, depth)
            self.layers.append((first, ranges[0][0] + i))
        return found

    def jobs(self) -> dict[str, Job]:
        if not self.config.whole:
            self._refuse_differences()
        twins = self._twins()
        collect, found = Collector(), {}
        for name, output in self.outputs.items():
            with collect():
                found[name] = self._job(twins.get(name, name), self.outputs[twins.get(name, name)], output)
        collect.raise_if_any()
        return found

    def _of(self, part: Slice) -> Iterator[tuple[Ref, Tensors]]:
        """The tensors that each model of a slice gives, under the names of the result."""
        own = [(name, output) for name, output in self.outputs.items() if output.part is part]
        for i, source in enumerate(part.sources):
            model = self.models[source.model]
            yield source.model, {name: model[o.names[i]] for name, o in own if o.names[i] in model}

    def _refuse_differences(self) -> None:
        for part in self.config.slices:
            (first, mine), *others = self._of(part)
            for other, theirs in others:
                merging.refuse_differences(str(first), mine, str(other), theirs)

    def _twins(self) -> dict[str, str]:
        return {k: v for part in self.config.slices for k, v in merging.twins([t for _, t in self._of(part)]).items()}

    def _job(self, known: str, settings: Output, output: Output) -> Job:
        part = output.part
        tensors = {
            s.model: (str(s.model), self.models[s.model][n]) for s, n in zip(part.sources, output.names, strict=True)
        }
        based = self.config.method in BASED and part.base in tensors
        models = [ref for ref in tensors if not (based and ref == part.base)]
        if based and self.config.method == "slerp":
            models = [ref for ref in (part.base, *models) if ref is not None]
        sources = tuple(tensors[ref] for ref in models)
        base = tensors[part.base] if based and part.base is not None else None
        if not sources:
            assert base is not None
            return Job(known, (base,))
        if not sources[0][1].is_floating_point():
            return Job(known, sources)
        method = self._method(known, settings, models)
        return Job(known, sources, method, base if method is not None and method.needs_base else None)

    def _method(self, name: str, output: Output, models: Sequence[Ref]) -> MergeMethod | None:
        """The method for a tensor, the same object for the same parameters."""
        part, parameters = output.part, METHODS[self.config.method]
        above = (part.parameters, self.config.parameters)
        shared = {key: p for key, p in parameters.items() if not p.of_models}
        own = {key: p for key, p in parameters.items() if p.of_models}
        given = resolve(shared, above, name, output.depth)
        by_model = {s.model: (s.parameters, n) for s, n in zip(part.sources, output.names, strict=True)}
        each = [resolve(own, (by_model[m][0], *above), by_model[m][1], output.depth) for m in models]
        missing = [
            f"{k} of '{m}'"
            for m, e in zip(models, each, strict=True)
            for k, p in own.items()
            if p.required and k not in e
        ]
        missing += [k for k, p in shared.items() if p.required and k not in given]
        if missing:
            raise RecipeError(
                f"{part.where}: no filter of {' and '.join(missing)} fits {name}", "give a value without a filter, too"
            )
        key = repr((given, each))
        if key not in self._methods:
            try:
                built = build(self.config.method, given, each)
            except RecipeError as error:
                raise RecipeError(f"{part.where}: {error.cause} (for {name})", error.remedy) from None
            self._methods[key] = built if built is not None else _COPY
        return None if self._methods[key] is _COPY else self._methods[key]

    # --- the configuration

    def configured(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The donor's configuration for the layers of the result."""
        if self.config.whole:
            return settings
        donor = self.config.models[0]
        count = self.counts.get(donor, self.counts[self.layers[0][0]])
        found = [part for part in _parts(settings) if any(part.get(key) == count for key in LAYER_COUNTS)]
        if not found:
            raise RecipeError(
                f"config.json of '{donor}' does not say that it has {count} layers", f"under {', '.join(LAYER_COUNTS)}"
            )
        for part in found:
            self._set_layers(part, count)
        return settings

    def _set_layers(self, part: dict[str, Any], count: int) -> None:
        for key, value in list(part.items()):
            if key in LAYER_COUNTS and value == count:
                part[key] = len(self.layers)
            elif not isinstance(value, list) or "layer" not in key or not value:
                continue
            elif len(value) == count and not _indices(value, count):
                part[key] = [self._setting(key, ref, layer) for ref, layer in self.layers]
            elif _indices(value, count):
                part[key] = [i for i, (ref, layer) in enumerate(self.layers) if layer in self._list(key, ref)]

    def _list(self, key: str, ref: Ref) -> list[Any]:
        lists = [part[key] for part in _parts(self.configs[ref]) if isinstance(part.get(key), list)]
        return lists[0] if lists else []

    def _setting(self, key: str, ref: Ref, layer: int) -> Any:
        values = self._list(key, ref)
        if layer >= len(values):
            raise RecipeError(f"config.json of '{ref}' has no {key} of layer {layer}", "complete it there")
        return values[layer]


def _parts(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and those within it."""
    return [settings, *(v for v in settings.values() if isinstance(v, dict))]


def _indices(value: list[Any], count: int) -> bool:
    """Whether a list names some of the layers, instead of saying something of each."""
    numbers = all(type(v) is int and 0 <= v < count for v in value)
    return numbers and len(set(value)) == len(value) and (len(value) != count or count > 2)


def _depth(block: Block | None) -> float:
    if block is None:
        return 0.0
    return block.index / (block.count - 1) if block.count > 1 else 1.0


# --- methods ----------------------------------------------------------------------------------------------------------


def build(name: str, given: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> MergeMethod | None:
    """The method with mergekit's numbers; None for a copy. given: parameters of the whole, each: of the models."""
    if name == "passthrough":
        scale = each[0]["scale"]
        return None if scale is None or scale == 1 else Sum([scale])
    if name in ("linear", "nuslerp"):
        weights = [float(e["weight"]) for e in each]
        total = sum(weights)
        if name == "nuslerp":
            return _plugin("slerp", t=weights[1] / total if abs(total) >= 1e-6 else 0.5)
        if not given["normalize"]:
            return Sum(weights)
        if abs(total) < 1e-9:
            raise RecipeError("the weights add up to 0, and normalize divides by that", "give others")
        return merging.WeightedMean(weights)
    if name == "slerp":
        return _plugin("slerp", t=given["t"], linear_above=0.9995)
    if name in ("model_stock", "karcher"):
        return _plugin(name)
    sparsify, _, consensus = name.partition("_")
    sparsify = {"task": "none", "ties": "trim"}.get(sparsify, sparsify)
    return TaskVectors(sparsify, name in ("ties", "della") or consensus == "ties", given, each)


def _plugin(name: str, **given: Any) -> MergeMethod:
    cls: Any = registry.load("merge", name)
    method: MergeMethod = layerwise.build(name, cls, given)
    return method


class Sum(MergeMethod):
    """The weighted sum of the parents."""

    elementwise = True

    def __init__(self, weights_M: Sequence[float]):
        self.weights_M = weights_M

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        total = tensors_M[0] * self.weights_M[0]
        for tensor, weight in zip(tensors_M[1:], self.weights_M[1:], strict=True):
            total.add_(tensor, alpha=weight)
        return total


_COPY = Sum([1.0])


class TaskVectors(MergeMethod):
    """The base plus the task vectors, each made sparse in a way of its own, added up or averaged by elected sign: what
    mergekit's task_arithmetic, ties, dare, della and breadcrumbs have in common. Unlike our methods of these names, it
    has a density for each model."""

    needs_base = True
    as_stored = True
    order_matters = True

    def __init__(self, sparsify: str, elect: bool, given: Mapping[str, Any], each: Sequence[Mapping[str, Any]]):
        self.sparsify, self.elect, self.each = sparsify, elect, each
        self.weights_M = [float(e["weight"]) for e in each]
        self.densities_M = [float(e["density"]) if sparsify != "none" else 1.0 for e in each]
        self.rescale, self.scaling = bool(given["rescale"]), float(given["lambda"])
        self.divide_by: task_vectors.Division = "weights" if given["normalize"] else "none"
        self.elementwise = not elect and all(d >= 1 for d in self.densities_M)  # type: ignore[misc]
        if not elect and given["normalize"] and abs(sum(self.weights_M)) >= 1e-8:
            self.scaling /= sum(self.weights_M)
        if elect and given["normalize"] and min(self.weights_M) < 0:
            raise RecipeError(
                f"a weight of {min(self.weights_M)}, and normalize divides by the sum of weights",
                "give weights of 0 or more, or normalize: false",
            )
        for e in each if sparsify == "della" else []:
            density, epsilon = e["density"], e["epsilon"]
            if 0 < density < 1 and not 0 <= epsilon < min(density, 1 - density):
                raise RecipeError(
                    f"density {density:g} with epsilon {epsilon:g} gives likelihoods outside of 0 to 1",
                    "choose 0 <= epsilon < min(density, 1 - density)",
                )

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        assert base is not None
        unit = task_vectors.row_length(base) if self.sparsify == "della" else 1
        sparse_M = []
        for i, tensor in enumerate(tensors_M):
            make = self._sparse(name, i, tensor, base)
            dropped = self.rescale and 0 < self.densities_M[i] < 1
            sparse_M.append(task_vectors.keeping_l1(make, tensor, base, unit) if dropped else make())
        how: task_vectors.Combination = "ties" if self.elect else "linear"
        return task_vectors.by_parts(base, tensors_M, sparse_M, self.weights_M, self.scaling, how, self.divide_by, unit)

    def _sparse(self, name: str, i: int, tensor: torch.Tensor, base: torch.Tensor) -> Callable[[], task_vectors.Sparse]:
        """What makes a model's task vector sparse, again and again the same."""
        density, count = self.densities_M[i], tensor.numel()
        if density >= 1 or not count:
            return lambda: task_vectors.all_of_it
        if density <= 0:
            return lambda: torch.zeros_like
        if self.sparsify == "trim":
            return partial(copy.copy, Keep(tensor, num_kept(density, count), base))
        if self.sparsify == "breadcrumbs":
            return _breadcrumbs(tensor, base, density, self.each[i]["gamma"])

        def make() -> task_vectors.Sparse:
            source = np.random.SFC64(number(self.sparsify, 0, name, i))
            if self.sparsify == "dare":
                return partial(task_vectors.drop, density=density, source=source, rescale=False)
            epsilon = 2 * self.each[i]["epsilon"]  # from the least to the most likely; mergekit's is half of that
            return task_vectors.dropping_by_rank(base, density, epsilon, source, rescale=False)

        return make


def _breadcrumbs(
    tensor: torch.Tensor, base: torch.Tensor, density: float, gamma: float
) -> Callable[[], task_vectors.Sparse]:
    """As many as mergekit keeps: it rounds down, to none at all too, and leaves fewer outliers out before it keeps less
    than the density."""
    count = tensor.numel()
    kept = int(density * count)
    if not kept:
        return lambda: torch.zeros_like
    return partial(copy.deepcopy, KeepBetween(tensor, min(int(gamma * count), count - kept), kept, base))
