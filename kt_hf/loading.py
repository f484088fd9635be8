"""Loading models and processors for tasks: checkpoints or fresh configurations, labels mapped by name.

Weights come from safetensors alone, remote code is off, and a head is never replaced unless asked.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kt_hf.errors import DataError, HubError, IntegrityError, KtError, RecipeError, nearest
from kt_hf.recipe import Model
from kt_hf.task import FACTS, Loaded

logger = logging.getLogger(__name__)

OWN = {"kt_hf_dual_encoder": "kt_hf.dual_encoder", "kt_hf_fusion": "kt_hf.fusion_model"}
"""Model types of our own -> the module that registers them with transformers."""


@contextmanager
def loading(what: str):
    """Turn the libraries' loading errors into one line of cause and one of remedy."""
    try:
        yield
    except KtError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        name = type(error).__name__
        if "trust_remote_code" in text or "remote code" in text:
            raise IntegrityError(
                f"{what} asks to run code of its own ({text[:200]})",
                "kt_hf does not run remote code; use a model of transformers",
            ) from error
        if (
            name in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
            or "offline" in text.lower()
            or "connect" in text.lower()
        ):
            raise HubError(
                f"{what} is no local folder, and the Hub was not reached ({name})",
                "name an existing folder, or load without HF_HUB_OFFLINE",
            ) from error
        if (
            name in ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HfHubHTTPError")
            or "is not a valid model identifier" in text
        ):
            raise HubError(
                f"{what} was not found on the Hub: {text[:200]}", "check the name, the revision and the token"
            ) from error
        if "Repo id must" in text:
            raise RecipeError(
                f"{what}: there is no such folder", "name an existing folder, or a Hub id (NAME or OWNER/NAME)"
            ) from error
        if name == "SafetensorError" or "safetensors" in text.lower():
            raise IntegrityError(
                f"{what}: {text[:300]}", "the weights must be intact safetensors files; convert or fetch them again"
            ) from error
        raise RecipeError(
            f"{what} cannot be loaded: {name}: {text[:300]}",
            "check model.path, model.config and model.config_overrides",
        ) from error


def config_of(ref: Model, **changes: Any) -> Any:
    """The configuration of a checkpoint or of a fresh model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    changes = {**(ref.config_overrides or {}), **changes}
    source = ref.path or ref.config
    if ref.attn_implementation:
        changes["attn_implementation"] = ref.attn_implementation
    with loading(f"model '{source}'"):
        if ref.path is None and source in CONFIG_MAPPING:
            unknown = set(changes) - set(CONFIG_MAPPING[source]().to_dict()) - {"attn_implementation", "num_labels"}
            if unknown:
                word = sorted(unknown)[0]
                raise RecipeError(
                    f"model.config_overrides.{word}: a {source} configuration has no such field",
                    nearest(word, CONFIG_MAPPING[source]().to_dict()),
                )
            return AutoConfig.for_model(source, **changes)
        if ref.path is None and not Path(source).exists() and "/" not in source:
            raise RecipeError(
                f"model.config: '{source}' is neither a model type nor a folder", nearest(source, CONFIG_MAPPING)
            )
        try:
            return AutoConfig.from_pretrained(source, revision=ref.revision, trust_remote_code=False, **changes)
        except ValueError as error:  # transformers does not know our own types before their modules are imported
            module = next((module for name, module in OWN.items() if f"`{name}`" in str(error)), None)
            if module is None:
                raise
            importlib.import_module(module)
            return AutoConfig.from_pretrained(source, revision=ref.revision, trust_remote_code=False, **changes)


def unset_fields(ref: Model, wanted: dict[str, Any]) -> dict[str, Any]:
    """Of these fields of a configuration those that it has and that the user did not set."""
    known = config_of(ref).to_dict()
    return {k: v for k, v in wanted.items() if k in known and k not in (ref.config_overrides or {})}


def dtype_of(ref: Model) -> Any:
    return "auto" if ref.dtype == "auto" else getattr(torch, ref.dtype)


def load_model(
    auto: Any,
    ref: Model,
    labels: list[str] | None = None,
    by_class: Callable[[nn.Module], list[str]] | None = None,
    /,
    **changes: Any,
) -> Loaded:
    """A model of the class family `auto` (an `AutoModelFor...`), with a head for `labels` where these are given.

    by_class: names the modules that have an output for every class, where a new set of classes does not make all of the
    head new.
    """
    loaded = _load_model(auto, ref, labels, by_class, **changes)
    return _cut_head(loaded, f"model '{ref.path}'") if ref.cut_head else loaded


def _cut_head(loaded: Loaded, what: str) -> Loaded:
    """Without the outputs for classes that the data do not have: the model then chooses among the data's."""
    names, ids = loaded.labels or [], loaded.label_ids or []
    if ids == list(range(len(names))):
        return loaded
    model: Any = loaded.model
    inside = [module for name in head_modules(model) for module in model.get_submodule(name).modules()]
    layers = [module for module in inside if isinstance(module, nn.Linear) and module.out_features == len(names)]
    if len(layers) != 1:
        raise RecipeError(
            f"{what}: its head ends in no linear layer with an output for each of {len(names)} classes",
            "leave model.cut_head out; classes that the data lack then count as wrong answers",
        )
    layer = layers[0]
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach()[ids].clone()))
    layer.out_features = model.num_labels = len(ids)
    loaded.labels, loaded.label_ids = [names[i] for i in ids], list(range(len(ids)))
    model.config.id2label, model.config.label2id = _label_maps(loaded.labels)
    return loaded


def _load_model(
    auto: Any,
    ref: Model,
    labels: list[str] | None,
    by_class: Callable[[nn.Module], list[str]] | None,
    /,
    **changes: Any,
) -> Loaded:
    if is_adapter(ref):
        return load_adapter(auto, ref, labels)
    config = config_of(ref, **changes)
    if ref.path is None:
        if labels is not None:
            config.id2label, config.label2id = _label_maps(labels)
        with loading(f"model.config '{ref.config}'"):
            model = auto.from_config(config, dtype=None if ref.dtype == "auto" else dtype_of(ref))
        new = [name for name, _ in model.named_parameters()]
        return Loaded(model, None, labels, _identity(labels), {"config": ref.config}, new_parameters=new)

    what, replace = f"model '{ref.path}'", False
    check_shards(Path(str(ref.path)))
    if labels is None and "num_labels" in changes and has_head(auto, config):
        former = config_of(ref).num_labels
        replace = former != changes["num_labels"]
        if replace and not ref.replace_head:
            raise RecipeError(
                f"{what} has a head of {former} outputs, the data ask for {changes['num_labels']}",
                "set model.replace_head=true for a new head",
            )
    names = labels
    ids = _identity(labels)
    if labels is not None:
        if has_head(auto, config):
            names, ids, replace = match_labels(labels, list_labels(config), what, ref.replace_head)
        if replace or not has_head(auto, config):
            config.id2label, config.label2id = _label_maps(labels)
            names, ids = labels, _identity(labels)
    if torch.get_default_device().type == "meta":  # a plan: labels are matched, weights are not wanted
        with loading(what):
            return Loaded(auto.from_config(config), None, names, ids, {"path": str(ref.path)})
    with loading(what):
        model, report = auto.from_pretrained(
            ref.path,
            config=config,
            revision=ref.revision,
            dtype=dtype_of(ref),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=replace,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"]) + sorted(key[0] for key in report.get("mismatched_keys") or [])
    renewed = _fresh_modules(model) if by_class is None else by_class(model)
    fresh = sorted({*_fresh_modules(model), *renewed})
    if replace:
        if by_class is None or not report.get("mismatched_keys"):  # else transformers has begun them as is due
            for name in renewed:
                for module in model.get_submodule(name).modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
        missing = [n for n, _ in model.named_parameters() if n.startswith(tuple(f"{m}." for m in renewed))]
    absent = [key for key in missing if not key.startswith(tuple(f"{m}." for m in fresh)) and "pooler" not in key]
    if absent:
        raise IntegrityError(
            f"{what} lacks {len(absent)} weights of its backbone ({_some(absent)})",
            "the checkpoint is for another architecture, or incomplete",
        )
    if missing:
        logger.info("new in %s: %s", what, ", ".join(missing))
    origin = {"path": str(ref.path), "revision": commit_of(ref)}
    return Loaded(model, None, names, ids, origin, new_parameters=missing)


def check_shards(folder: Path) -> None:
    """Refuse a folder whose index names files that are not there, are torn, or lie elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(f"{index} cannot be read ({type(error).__name__})", "fetch the model again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise IntegrityError(f"{index} names the shard {name!r} outside of its folder", "do not use this model")
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder} lacks the shard '{name}', which its index names", "fetch the model again")
        try:
            with safe_open(str(folder / name), framework="pt"):
                pass
        except SafetensorError as error:
            raise IntegrityError(
                f"the shard '{name}' of {folder} is torn: {' '.join(str(error).split())[:200]}", "fetch it again"
            ) from error


def commit_of(ref: Model, file: str = "config.json") -> str | None:
    """The commit of the Hub's repository that was loaded, as the client's cache knows it; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if ref.path is None or Path(ref.path).exists():
        return None
    found = try_to_load_from_cache(str(ref.path), file, revision=ref.revision)
    return Path(found).parent.name if isinstance(found, str) else ref.revision


_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def local(ref: Model) -> Model:
    """The reference with a Hub id replaced by the folder of its files, and its revision by the commit they are of."""
    if ref.path is None or Path(ref.path).exists():
        return ref
    from huggingface_hub import snapshot_download

    with loading(f"model '{ref.path}'"):
        folder = snapshot_download(
            str(ref.path), revision=ref.revision, allow_patterns=list(_MODEL_FILES), ignore_patterns=["*/*"]
        )
    return Model(**{**ref.given, "path": folder, "revision": Path(folder).name})


def recorded(path: str | Path) -> dict[str, Any]:
    """What stands beside a model that was made here, in a folder or on the Hub: `task`, `settings` of it, `labels` of
    an adapter. Empty for all others."""
    file: Any = Path(path) / FACTS
    if not Path(path).exists():
        from transformers.utils import cached_file

        quiet = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
        try:
            file = cached_file(str(path), FACTS, **{f"_raise_exceptions_for_{what}": no for what, no in quiet.items()})
        except (OSError, ValueError):  # no such repository, no name of one: who loads the model says so
            return {}
    if file is None or not Path(file).is_file():
        return {}
    try:
        found = json.loads(Path(file).read_text())
    except ValueError as error:
        raise IntegrityError(f"{file} cannot be read: {error}", "remove it, or fetch it again") from error
    return found if isinstance(found, dict) else {}


def without_weights(folder: Path, name: str) -> nn.Module:
    """A model of a class of transformers as a folder's configuration has it, on the meta device: for its structure."""
    import transformers

    config = config_of(Model(path=str(folder)))
    own = OWN.get(config.model_type)
    cls = getattr(importlib.import_module(own) if own else transformers, name, None)
    if cls is None:
        raise RecipeError(f"'{folder}' is a {name}, which is no class of transformers", "use a model of transformers")
    with loading(f"the structure of '{folder}'"), torch.device("meta"):
        return cls(config)


def model_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Of tensors in a checkpoint's files -> their names in the model, as transformers loads them: some architectures
    are called otherwise in files, and a backbone's files lack the first part of a name, or a model does. Those alone
    that are one tensor in both."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known, found = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [c for c in found if isinstance(c, WeightRenaming)]
    converters = [c for c in found if isinstance(c, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "") or None
    renamed = {n: rename_source_key(n, renamings, converters, prefix, known) for n in names}
    return {n: name for n, (name, converted) in renamed.items() if converted is None and name in known}


def ties(model: Any) -> dict[str, str]:
    """Name of a tied weight -> name of the one that it is a copy of."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def merged(model: Any) -> nn.Module:
    """A peft model with its adapter merged in. Weights that are tied, and of which one is adapted, are parted before:
    peft adds to what they share."""
    weights = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for module in model.modules():
        layer: Any = module.get_base_layer() if hasattr(module, "lora_A") else None  # type: ignore[operator]
        weight = getattr(layer, "weight", None)
        if weight is not None and weights[id(weight)] > 1:
            weights[id(weight)] -= 1
            layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return model.merge_and_unload()


ADAPTER = "adapter_config.json"


def is_adapter(ref: Model) -> bool:
    return ref.path is not None and (Path(ref.path) / ADAPTER).is_file()


def load_adapter(auto: Any, ref: Model, labels: list[str] | None) -> Loaded:
    """A folder with a peft adapter: its base model with the adapter merged in."""
    from peft import PeftModel

    folder = Path(str(ref.path))
    if not (folder / "adapter_model.safetensors").is_file():
        raise IntegrityError(f"{folder} has no adapter_model.safetensors", "adapters are loaded from safetensors alone")
    described = json.loads((folder / ADAPTER).read_text())
    base_path = described.get("base_model_name_or_path")
    own = recorded(folder).get("labels")
    base = load_model(
        auto,
        Model(path=base_path, revision=described.get("revision"), dtype=ref.dtype, replace_head=True),
        own if labels is not None else None,
    )
    with loading(f"adapter '{ref.path}'"):
        model = merged(PeftModel.from_pretrained(base.model, str(folder)))
    names, ids = labels, _identity(labels)
    if labels is not None and own is not None:
        names, ids, replace = match_labels(labels, own, f"adapter '{ref.path}'", ref.replace_head)
        if replace:
            raise RecipeError(
                f"the head of the adapter '{ref.path}' cannot be replaced", "export it as `save: merged` first"
            )
    return Loaded(model, None, names, ids, {"path": str(ref.path), "base_model": base_path})


def has_head(auto: Any, config: Any) -> bool:
    """Whether the checkpoint was saved with the head that this family of models has."""
    try:
        expected = auto._model_mapping[type(config)]
    except KeyError:
        raise RecipeError(
            f"a model of type '{config.model_type}' has no {auto.__name__}",
            "choose a model or a task that fit each other",
        ) from None
    if config.model_type == "timm_wrapper" and not config.architectures:  # as timm itself writes its folders
        return config.num_labels > 0
    classes = expected if isinstance(expected, tuple) else (expected,)
    return bool(set(config.architectures or []) & {cls.__name__ for cls in classes})


def list_labels(config: Any) -> list[str]:
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def known_labels(ref: Model) -> list[str] | None:
    """The class names that a model itself knows; None where its files name none."""
    folder = Path(str(ref.path))
    if (folder / ADAPTER).is_file():
        return recorded(folder).get("labels")
    if (folder / "open_clip_config.json").is_file():
        return None
    return list_labels(config_of(ref))


def _identity(labels: list[str] | None) -> list[int] | None:
    return None if labels is None else list(range(len(labels)))


def _label_maps(labels: list[str]) -> tuple[dict[int, str], dict[str, int]]:
    return dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}


def label_key(label: str) -> str:
    """What makes two names of a class the same."""
    return " ".join(str(label).replace("_", " ").replace("-", " ").casefold().split())


def match_labels(data: list[str], model: list[str], what: str, replace: bool) -> tuple[list[str], list[int], bool]:
    """(the model's labels, data class -> model class, whether the head is to be replaced)."""
    if data == model:
        return model, list(range(len(data))), False
    position = {label_key(name): i for i, name in enumerate(model)}
    times = Counter(label_key(name) for name in model)  # some name all that they do not use alike
    if all(times[label_key(name)] == 1 for name in data):
        return model, [position[label_key(name)] for name in data], False
    generic = all(label_key(name) == f"label {i}" for i, name in enumerate(model))
    if generic and len(model) == len(data) and not replace:
        logger.warning(
            "%s does not name its labels; they are taken in the order of the data: %s", what, ", ".join(data)
        )
        return data, list(range(len(data))), False
    if replace:
        return data, list(range(len(data))), True
    unknown = [name for name in data if label_key(name) not in position]
    raise RecipeError(
        f"{what} has labels {_some(model)}, the data {_some(data)}: {_some(unknown)} unknown to the model",
        "set model.replace_head=true for a new head, or name the classes to keep with data.labels",
    )


def _some(words: Iterable[str]) -> str:
    listed = [str(w) for w in words]
    return ", ".join(listed[:8]) + (f" ... ({len(listed)})" if len(listed) > 8 else "")


def _fresh_modules(model: nn.Module) -> list[str]:
    return [name for name in head_modules(model) if any(True for _ in model.get_submodule(name).parameters())]


def _timm_layers(model: nn.Module, inner: Any) -> list[list[str]]:
    """As timm itself groups the parameters of its models, without the head."""
    from timm.models import group_parameters

    ids = {id(p): name for name, p in model.named_parameters()}
    own = dict(inner.timm_model.named_parameters())
    head = {id(p) for p in inner.timm_model.get_classifier().parameters()}
    groups = group_parameters(inner.timm_model, inner.timm_model.group_matcher(coarse=False))
    found = [[own[name] for name in groups[key]] for key in sorted(groups)]
    named = [[ids[id(p)] for p in layer if id(p) in ids and id(p) not in head] for layer in found]
    return [layer for layer in named if layer]


def head_modules(model: nn.Module) -> list[str]:
    """Names of the top-level modules beside the backbone. An adapter's wrapper is looked through."""
    inner = unwrap(model)
    if hasattr(inner, "timm_model"):
        head = inner.timm_model.get_classifier()  # type: ignore[operator, union-attr]
        return [
            name for name, child in inner.named_modules() if child is head and any(True for _ in child.parameters())
        ]
    prefix = getattr(inner, "base_model_prefix", "")
    if not prefix or not hasattr(inner, prefix):
        return []
    return [name for name, child in inner.named_children() if name != prefix and any(True for _ in child.parameters())]


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside of a peft wrapper."""
    found: Any = model
    return found.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_layers(model: nn.Module, root: nn.Module | None = None) -> list[list[str]]:
    """Parameter names of the backbone by layer, from the input: what precedes the blocks, each block, what follows
    them.

    The blocks are the module list with the most parameters. `root` is the backbone when it is not the base model.
    """
    inner = unwrap(model)
    if root is None and hasattr(inner, "timm_model"):
        return _timm_layers(model, inner)
    if root is None:
        prefix = getattr(inner, "base_model_prefix", "")
        root = getattr(inner, prefix, inner) if prefix else inner
    if not isinstance(root, nn.Module):
        raise RecipeError(
            f"{type(inner).__name__} has no backbone that can be told from its head", "freeze by pattern instead"
        )
    ids = {id(p): name for name, p in model.named_parameters()}
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    blocks = max(lists, key=_size, default=None)
    owner = {id(p): i for i, block in enumerate(blocks or []) for p in block.parameters()}
    groups: list[list[str]] = [[] for _ in range((len(blocks) if blocks is not None else 0) + 2)]
    seen_block = False
    for parameter in root.parameters():
        if id(parameter) not in ids:
            continue
        if id(parameter) in owner:
            seen_block = True
            groups[owner[id(parameter)] + 1].append(ids[id(parameter)])
        else:
            groups[-1 if seen_block else 0].append(ids[id(parameter)])
    return [group for group in groups if group]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def places(model: Any) -> int:
    """The longest text that the model has places for. RoBERTa's kin counts them from behind the padding token's."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return 2**31
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    first = next((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), 0)
    return longest - first


# --- processors
# --------------------------------------------------------------------------------------------------------


def load_tokenizer(ref: Model, texts: Iterable[str] | None = None, causal: bool = False) -> Any:
    """The model's tokenizer, or, for a fresh model without one, a small one trained on `texts`."""
    from transformers import AutoTokenizer

    source = ref.processor or ref.path or ref.config
    if source is not None and (ref.processor or ref.path or Path(str(source)).exists() or "/" in str(source)):
        with loading(f"tokenizer '{source}'"):
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=ref.revision, trust_remote_code=False, **(ref.processor_overrides or {})
            )
    elif texts is not None:
        tokenizer = train_tokenizer(texts, causal, **(ref.processor_overrides or {}))
    else:
        raise RecipeError("a fresh text model needs a tokenizer", "name one: model.processor=DIR_OR_HUB_ID")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(
                f"the tokenizer of '{source}' has neither a padding nor an end token",
                "give model.processor with a pad_token",
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(
            "the tokenizer of '%s' has no padding token; its end token '%s' serves", source, tokenizer.eos_token
        )
    return tokenizer


def encode(
    tokenizer: Any,
    texts: Any,
    pairs: Any = None,
    *,
    max_length: int,
    truncation: Any = True,
    target: bool = False,
    **how: Any,
) -> Any:
    """Tokens of texts, or of pairs of texts, cut at `max_length`. target: as the tokenizer has what is to be written.
    how: further arguments of the tokenizer.

    A call of a fast tokenizer leaves its cut in the tokenizer, and with it in the file that is exported: in processes
    that have preprocessed rows, but not in those that found them in the cache. So what was there is put back.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    given = {"text_target": texts} if target else {"text": texts, "text_pair": pairs}
    if backend is None:
        return tokenizer(**given, truncation=truncation, max_length=max_length, **how)
    cut, padding = backend.truncation, backend.padding
    encoded = tokenizer(**given, truncation=truncation, max_length=max_length, **how)
    backend.no_truncation()
    if cut:
        backend.enable_truncation(**cut)
    if padding:
        backend.enable_padding(**padding)
    return encoded


def train_tokenizer(
    texts: Iterable[str], causal: bool = False, vocab_size: int = 2000, model_max_length: int = 512
) -> Any:
    """A tokenizer of our own for a fresh model: WordPiece with [CLS] and [SEP], or byte-level BPE for causal models."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trainer: Any
    if causal:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    else:
        special = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
        # The WordPiece trainer numbers its pieces differently in every process, and ranks and resumed runs must agree;
        # the one for BPE does not. So: the pieces of BPE, each for the beginning of a word and for the rest of one.
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=max(vocab_size // 2, 1), special_tokens=list(special.values()), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        found = tokenizer.get_vocab()
        whole = sorted(found, key=found.__getitem__)
        pieces = [*whole, *(f"##{piece}" for piece in whole[len(special) :])]
        tokenizer.model = models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")  # type: ignore[call-arg]
        tokenizer.decoder = decoders.WordPiece()
        cls, sep = (tokenizer.token_to_id(special[name]) for name in ("cls_token", "sep_token"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model_max_length, **special)


def load_image_processor(ref: Model, config: Any) -> Any:
    """The model's image processor, or, for a fresh model, one that resizes to the model's size and normalises to [-1,
    1]."""
    from transformers import AutoImageProcessor, ViTImageProcessor

    source = ref.processor or ref.path or ref.config
    has_own = source is not None and (
        ref.processor
        or not Path(str(source)).is_dir()
        or (Path(str(source)) / "preprocessor_config.json").exists()
        or (Path(str(source)) / "processor_config.json").exists()
    )
    if has_own and (ref.processor or ref.path or Path(str(source)).exists() or "/" in str(source)):
        with loading(f"image processor '{source}'"):
            return AutoImageProcessor.from_pretrained(
                source, revision=ref.revision, trust_remote_code=False, **(ref.processor_overrides or {})
            )
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return ViTImageProcessor(**{"size": {"height": height, "width": width}, **(ref.processor_overrides or {})})


def load_image_processor_by_kind(ref: Model, config: Any) -> Any:
    """The model's image processor, or for a fresh model the one of its kind, which pipelines need; it resizes to the
    model's size."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as KNOWN

    known = KNOWN.get(config.model_type)
    if ref.processor or ref.path or known is None or "/" in str(ref.config):
        return load_image_processor(ref, config)
    name = known["torchvision"] if isinstance(known, dict) else known[0] if isinstance(known, tuple) else known
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    own = {"size": {"height": height, "width": width}, "do_center_crop": False}
    return getattr(transformers, name)(**{**own, **(ref.processor_overrides or {})})


def tokenizer_signature(tokenizer: Any) -> dict[str, Any]:
    """A fingerprint of the vocabulary: two tokenizers that give the same ids give the same."""
    import hashlib

    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return {"vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16], "vocabulary_size": len(tokenizer)}


def image_signature(processor: Any) -> dict[str, Any]:
    """What an image processor does to pixel values."""
    fields = (
        "size",
        "crop_size",
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
    )
    found = processor.to_dict()
    return {"normalisation": {k: found[k] for k in fields if found.get(k) is not None}}


def check_data(condition: bool, cause: str, remedy: str) -> None:
    if not condition:
        raise DataError(cause, remedy)
