"""The YAML that mergekit reads: what such a file says, checked as a whole before anything else is read.

Written from mergekit's documented format, so that its users need not rewrite what they have. What cannot be honoured is
refused by name. How it becomes a merge: kt_hf/mergekit_merge.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kt_hf.errors import Collector, nearest
from kt_hf.layerwise import gradient
from kt_hf.recipe_yaml import from_yaml
from kt_hf.settings import shorten

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float64", "float16", "bfloat16")
MODEL_FREE = ("union", "base")


class Ref(NamedTuple):
    """A model: a folder or a Hub id, its revision, and the adapter that is folded into it first."""

    path: str
    revision: str | None = None
    adapter: Ref | None = None

    def __str__(self) -> str:
        own = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{own}+{self.adapter}" if self.adapter else own


@dataclass(frozen=True)
class Source:
    """A model within a slice: all of it, or a range of its layers, with parameters of its own."""

    model: Ref
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the result: those of its sources, merged."""

    sources: tuple[Source, ...]
    base: Ref | None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Config:
    """What a file says. whole: it lists `models`, not `slices`."""

    method: str
    slices: tuple[Slice, ...]
    base: Ref | None
    whole: bool
    parameters: Mapping[str, Any]
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: str | None
    pad_to_multiple_of: int | None
    chat_template: str | None

    @property
    def models(self) -> list[Ref]:
        """All that occur, the base first, else in their order."""
        found = [*([self.base] if self.base else []), *(s.base for s in self.slices if s.base)]
        return list(dict.fromkeys([*found, *(source.model for s in self.slices for source in s.sources)]))


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """kind: float or bool. of_models: one per model, else of the merge. default: None where there is none."""

    kind: type
    of_models: bool = False
    default: Any = None
    required: bool = False
    valid: tuple[float, float] | None = None
    """From where to where a value is honoured; None: all are."""


_WEIGHT = Parameter(float, True, required=True)


def _task_vectors(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    return {
        "weight": _WEIGHT,
        "density": Parameter(float, True, 1.0),
        "normalize": Parameter(bool, default=normalize),
        "rescale": Parameter(bool, default=rescale),
        "lambda": Parameter(float, default=1.0),
        "int8_mask": Parameter(bool, default=False),
        **more,
    }


_GAMMA, _EPSILON = Parameter(float, True, 0.01), Parameter(float, True, 0.15)
METHODS: dict[str, dict[str, Parameter]] = {
    "linear": {"weight": _WEIGHT, "normalize": Parameter(bool, default=True)},
    "slerp": {"t": Parameter(float, required=True)},
    "nuslerp": {
        "weight": _WEIGHT,
        "nuslerp_flatten": Parameter(bool, default=True, valid=(True, True)),
        "nuslerp_row_wise": Parameter(bool, default=False, valid=(False, False)),
    },
    "task_arithmetic": _task_vectors(False, False),
    "ties": _task_vectors(True, False),
    "dare_linear": _task_vectors(False, True),
    "dare_ties": _task_vectors(False, True),
    "della_linear": _task_vectors(False, True, epsilon=_EPSILON),
    "della": _task_vectors(True, True, epsilon=_EPSILON),
    "breadcrumbs": _task_vectors(False, False, gamma=_GAMMA),
    "breadcrumbs_ties": _task_vectors(False, False, gamma=_GAMMA),
    "model_stock": {"filter_wise": Parameter(bool, default=False, valid=(False, False))},
    "karcher": {
        "max_iter": Parameter(float, default=10, valid=(10, float("inf"))),
        "tol": Parameter(float, default=1e-5, valid=(0.0, 1e-5)),
    },
    "passthrough": {"scale": Parameter(float, True)},
}
NOT_HERE = ("arcee_fusion", "multislerp", "nearswap", "ram", "ramplus_tl", "sce")
"""Methods of mergekit that have no counterpart here."""
BASED = (*(name for name in METHODS if "lambda" in METHODS[name]), "slerp", "model_stock")
"""Those that need a base."""
_ALL = {name for parameters in METHODS.values() for name in parameters}
_ALL |= {"normalize_weights", "eps", "select_topk", "r", "alpha"}
"""Parameters that some method of mergekit has; it lets those pass that the chosen one has not, and so do we."""


def value_at(setting: Any, name: str, t: float) -> Any:
    """The plain value of a setting for a tensor of that name at a depth; None where no filter fits."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        fits = (c for c in setting if c.get("filter") in (None, "*") or c["filter"] in name)
        chosen = next(fits, None)
        return None if chosen is None else value_at(chosen["value"], name, t)
    if isinstance(setting, dict):
        return value_at([setting], name, t)
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], bool):
        return setting[int(t * (len(setting) - 1))]
    return gradient(setting, t)


def resolve(
    parameters: Mapping[str, Parameter], scopes: Sequence[Mapping[str, Any]], name: str, t: float
) -> dict[str, Any]:
    """Plain values for one tensor, from the first scope that has one; a required one may be missing."""
    found: dict[str, Any] = {}
    for key, parameter in parameters.items():
        values = (value_at(scope[key], name, t) for scope in scopes if key in scope)
        value = next((v for v in values if v is not None), None)
        if value is not None or not parameter.required:
            found[key] = parameter.default if value is None else value
    return found


# --- reading ---------------------------------------------------------------------------------------------------------

_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name",
)  # fmt: skip


def read(path: str | os.PathLike[str]) -> Config:
    """What a file says. Raises `RecipeError` with all its mistakes, and `IntegrityError` where it asks for Python
    objects."""
    raw = from_yaml(os.fspath(path), "start with `merge_method:`, and `models:` or `slices:`")
    collect = Collector()
    config = _Reader(collect).config(raw)
    collect.raise_if_any()
    return config


class _Reader:
    def __init__(self, collect: Collector):
        self.add, self.collect = collect.add, collect

    def config(self, raw: dict[str, Any]) -> Config:
        self.keys(raw, _TOP, "")
        method = raw.get("merge_method")
        if method in NOT_HERE:
            self.add(f"merge_method: {method} is none of ours", f"use mergekit, or one of {', '.join(METHODS)}")
        elif method not in METHODS:
            self.add(f"merge_method: got {shorten(method)}", nearest(str(method), METHODS))
        known = METHODS.get(str(method), {})
        base = self.model(raw["base_model"], "base_model") if raw.get("base_model") is not None else None
        if "modules" in raw:
            self.add("modules: parts of a model cannot be merged apart", "list `models`, which merges all parts alike")
        given = [key for key in ("models", "slices") if raw.get(key)]
        if len(given) != 1 and "modules" not in raw:
            self.add(f"{' and '.join(given) or 'neither models nor slices'} given", "give one of models and slices")
        if given[:1] == ["models"]:
            slices = [self.models(raw["models"], base, known)]
        else:
            slices = self.slices(raw.get("slices") or [], base, known)
        parameters = self.parameters(raw.get("parameters"), known, "parameters")
        tokenizer, pad = self.tokenizer(raw)
        config = Config(
            method=str(method),
            slices=tuple(s for s in slices if s is not None),
            base=base,
            whole=given[:1] == ["models"],
            parameters=parameters,
            dtype=self.dtype(raw, "dtype"),
            out_dtype=self.dtype(raw, "out_dtype"),
            tokenizer_source=tokenizer,
            pad_to_multiple_of=pad,
            chat_template=self.chat_template(raw),
        )
        if not self.collect.mistakes:
            self.together(config, known)
        return config

    def keys(self, raw: Mapping[Any, Any], valid: Sequence[str], where: str) -> None:
        for key in raw:
            if key not in valid:
                place = f"{where}.{key}".strip(".")
                remedy = f"mergekit leaves it out in silence: take it out. {nearest(str(key), valid)}"
                self.add(f"{place}: unknown setting", remedy)

    def models(self, raw: Any, base: Ref | None, known: Mapping[str, Parameter]) -> Slice | None:
        sources = self.sources(raw, "models", ("model", "parameters"), known)
        if not sources:
            return None
        if base is not None and base not in [s.model for s in sources]:
            sources.append(Source(base))  # mergekit counts it among the models
        return Slice(tuple(sources), base, where="models")

    def slices(self, raw: Any, base: Ref | None, known: Mapping[str, Parameter]) -> list[Slice | None]:
        if not isinstance(raw, list):
            self.add(f"slices: got {shorten(raw)}", "a list, each with `sources`")
            return []
        return [self.slice(item, f"slices.{i}", base, known) for i, item in enumerate(raw)]

    def slice(self, raw: Any, where: str, base: Ref | None, known: Mapping[str, Parameter]) -> Slice | None:
        if not isinstance(raw, dict):
            self.add(f"{where}: got {shorten(raw)}", "a mapping with `sources`")
            return None
        self.keys(raw, ("sources", "parameters", "base_model", "residual_weight"), where)
        if raw.get("residual_weight") is not None:
            self.add(f"{where}.residual_weight: mergekit has no use for it", "take it out")
        if raw.get("base_model") is not None:
            base = self.model(raw["base_model"], f"{where}.base_model")
        sources = self.sources(
            raw.get("sources"), f"{where}.sources", ("model", "layer_range", "parameters"), known, ranged=True
        )
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(lengths) > 1:
            self.add(
                f"{where}.sources: layer_ranges of {' and '.join(map(str, sorted(lengths)))} layers",
                "give ranges of one length",
            )
        own = self.parameters(raw.get("parameters"), known, f"{where}.parameters")
        return Slice(tuple(sources), base, own, where) if sources else None

    def sources(
        self, raw: Any, where: str, keys: Sequence[str], known: Mapping[str, Parameter], ranged: bool = False
    ) -> list[Source]:
        if not isinstance(raw, list) or not raw:
            self.add(f"{where}: got {shorten(raw)}", "a list of models, each with `model`")
            return []
        found: list[Source] = []
        for i, item in enumerate(raw):
            place = f"{where}.{i}"
            item = {"model": item} if isinstance(item, str) and not ranged else item
            if not isinstance(item, dict) or "model" not in item:
                self.add(f"{place}: got {shorten(item)}", "a mapping with `model`")
                continue
            self.keys(item, keys, place)
            model = self.model(item["model"], f"{place}.model")
            layers = self.layers(item.get("layer_range"), f"{place}.layer_range") if ranged else None
            own = self.parameters(item.get("parameters"), known, f"{place}.parameters", of_model=True)
            if model is not None and model in [s.model for s in found]:
                self.add(f"{place}.model: '{model}' stands there twice", "name it once, with its weight")
            elif model is not None:
                found.append(Source(model, layers, own))
        return found

    def model(self, raw: Any, where: str) -> Ref | None:
        given, adapter = raw, None
        if isinstance(raw, dict):
            self.keys(raw, ("model", "lora", "override_architecture", "path", "revision"), where)
            if raw.get("override_architecture"):
                self.add(
                    f"{where}.override_architecture: merges go by the tensors, not by the architecture", "take it out"
                )
            given, adapter = raw.get("model", raw), raw.get("lora")
        if isinstance(given, str) and not os.path.exists(given) and "+" in given:
            given, _, adapter = given.partition("+")
        model = self.place(given, where)
        if model is None or not adapter:
            return model
        lora = self.place(adapter, f"{where}.lora")
        return model._replace(adapter=lora) if lora else None

    def place(self, raw: Any, where: str) -> Ref | None:
        path, revision = (raw.get("path"), raw.get("revision")) if isinstance(raw, dict) else (raw, None)
        if not isinstance(path, str) or not path:
            self.add(f"{where}: got {shorten(raw)}", "a folder, or a Hub id as NAME, OWNER/NAME or OWNER/NAME@REVISION")
            return None
        if not os.path.exists(path):
            path, _, named = path.partition("@")
            revision = named or revision
        return Ref(path, revision)

    def layers(self, raw: Any, where: str) -> tuple[int, int] | None:
        whole = isinstance(raw, list) and len(raw) == 2 and all(type(n) is int for n in raw)
        if whole and 0 <= raw[0] < raw[1]:
            return raw[0], raw[1]
        self.add(f"{where}: got {shorten(raw)}", "[first, last + 1], counted from 0")
        return None

    def parameters(
        self, raw: Any, known: Mapping[str, Parameter], where: str, of_model: bool = False
    ) -> dict[str, Any]:
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self.add(f"{where}: got {shorten(raw)}", nearest("", known))
            return {}
        found = {}
        for key, setting in raw.items():
            parameter = known.get(key)
            if parameter is not None and (parameter.of_models or not of_model):
                found[key] = self.setting(setting, parameter, f"{where}.{key}")
            elif known and key not in _ALL:
                self.add(f"{where}.{key}: unknown parameter", nearest(str(key), known))
            elif known and key != "int8_mask":
                logger.warning("%s.%s has no effect there: left out, as mergekit does", where, key)
        return found

    def setting(self, raw: Any, parameter: Parameter, where: str) -> Any:
        """With its scalars converted; [] where it is wrong."""
        if isinstance(raw, dict):
            raw = [raw]
        if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
            return self.conditions(raw, parameter, where)
        if isinstance(raw, list):
            if not raw:
                self.add(f"{where}: got []", "a value, or several from the first layer to the last")
            return [self.scalar(item, parameter, where) for item in raw]
        return self.scalar(raw, parameter, where)

    def conditions(self, raw: list[Any], parameter: Parameter, where: str) -> list[Any]:
        found = []
        for i, item in enumerate(raw):
            place = f"{where}.{i}"
            whole = isinstance(item, dict) and "value" in item and isinstance(item.get("filter"), (str, type(None)))
            if not whole or isinstance(item["value"], dict):
                self.add(f"{place}: got {shorten(item)}", "a mapping with `value`, and `filter`, a part of names")
                continue
            self.keys(item, ("filter", "value"), place)
            value = self.setting(item["value"], parameter, place)
            found.append({"filter": item.get("filter"), "value": value})
        return found

    def scalar(self, raw: Any, parameter: Parameter, where: str) -> Any:
        value: Any = None
        if parameter.kind is bool:
            words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
            value = raw if isinstance(raw, bool) else words.get(str(raw).lower(), {0: False, 1: True}.get(raw))
        elif not isinstance(raw, bool):
            try:
                value = float(raw)
            except (TypeError, ValueError):
                value = None
            if value is not None and (value != value or abs(value) == float("inf")):
                value = None
        if value is None:
            self.add(f"{where}: got {shorten(raw)}", "true or false" if parameter.kind is bool else "a number")
        elif parameter.valid is not None and not parameter.valid[0] <= value <= parameter.valid[1]:
            word = str(parameter.default).lower()
            self.add(f"{where}: {str(value).lower()} is not done here", f"leave it out, or write {word}")
        return value

    def dtype(self, raw: Mapping[str, Any], key: str) -> str | None:
        found = raw.get(key)
        word = str(found).removeprefix("torch.") if found is not None else None
        if word is not None and word not in DTYPES:
            self.add(f"{key}: got {shorten(found)}", nearest(word, DTYPES))
            return None
        return word

    def tokenizer(self, raw: Mapping[str, Any]) -> tuple[str | None, int | None]:
        """(where the vocabulary comes from, what its size is a multiple of)."""
        source, block, pad = raw.get("tokenizer_source"), raw.get("tokenizer"), None
        where = "tokenizer_source"
        if source is not None and block is not None:
            self.add("tokenizer_source and tokenizer exclude each other", "give one of them")
        elif block is not None and not isinstance(block, dict):
            self.add(f"tokenizer: got {shorten(block)}", "a mapping with `source`")
        elif block is not None:
            self.keys(block, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
            source, pad, where = block.get("source", "union"), block.get("pad_to_multiple_of"), "tokenizer.source"
            if block.get("tokens"):
                self.add(
                    "tokenizer.tokens: rows of single tokens cannot be chosen here",
                    "take it out: a model without a token takes the base's row, else the mean of those that have it",
                )
            if pad is not None and (type(pad) is not int or pad < 1):
                self.add(f"tokenizer.pad_to_multiple_of: got {shorten(pad)}", "a whole number from 1 on")
        if isinstance(source, str) and source not in MODEL_FREE:
            source = source.removeprefix("model:")  # as mergekit once had it
        if source is not None and source not in MODEL_FREE:
            model = self.model(source, where)
            source = str(model) if model else None
        return source, pad

    def chat_template(self, raw: Mapping[str, Any]) -> str | None:
        found = raw.get("chat_template")
        if found is None or found == "auto":
            return found
        if not isinstance(found, str) or "{" not in found:
            self.add(
                f"chat_template: got {shorten(found)}, and mergekit's own templates are not ours",
                "write the template itself, in Jinja, or auto for that of most models",
            )
            return None
        return found

    def together(self, config: Config, known: Mapping[str, Parameter]) -> None:
        """What is right by itself and wrong together."""
        for part in config.slices:
            self.count(config, part)
            for source in part.sources:
                if source.model == part.base and config.method in BASED:
                    continue
                scopes = (source.parameters, part.parameters, config.parameters)
                for key, parameter in known.items():
                    shared = scopes if parameter.of_models else scopes[1:]
                    if parameter.required and not any(key in scope for scope in shared):
                        of = f" of '{source.model}'" if parameter.of_models else ""
                        self.add(f"{part.where}: {config.method} needs the parameter {key}{of}", "give it there")
        if config.tokenizer_source not in (None, *MODEL_FREE, *map(str, config.models)):
            self.add(
                f"tokenizer_source: '{config.tokenizer_source}' is none of the models",
                nearest(str(config.tokenizer_source), [*MODEL_FREE, *map(str, config.models)]),
            )

    def count(self, config: Config, part: Slice) -> None:
        """Whether a method takes so many models, and such a base."""
        method, based = config.method, part.base in [s.model for s in part.sources]
        others = len(part.sources) - based
        if method in BASED and not based:
            remedy = "name a base_model" + ("" if config.whole else ", and list it among the sources")
            self.add(f"{part.where}: {method} needs a base", remedy)
        elif method == "slerp" and others != 1:
            self.add(f"{part.where}: slerp takes the base and one more model, not {others}", "name two")
        elif method == "model_stock" and others < 2:
            self.add(f"{part.where}: model_stock takes two models beside the base, or more", "name more models")
        elif method == "nuslerp" and (part.base is not None or others != 2):
            self.add(f"{part.where}: nuslerp is done here for two models without a base", "leave base_model out")
        elif method == "passthrough" and len(part.sources) != 1:
            names = " and ".join(f"'{s.model}'" for s in part.sources)
            self.add(f"{part.where}: passthrough takes one model, not {names}", "name one, and no other as base_model")
