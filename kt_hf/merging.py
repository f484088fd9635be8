"""Merges of checkpoints: what goes in is checked, merged tensor by tensor (kt_hf/merge_engine.py) and written as a
model directory that is there as a whole or not at all.

Shapes: M parents.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kt_hf import checkpoint, configurations, heads, kinship
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.functional.averaging import weighted_mean
from kt_hf.kinship import Kinship
from kt_hf.merge import MergeMethod
from kt_hf.merge_engine import Fusion, Job, finite
from kt_hf.progress import Bytes
from kt_hf.tensor_files import SHARD_BYTES, Spec, Writer, open_model, weight_files

if TYPE_CHECKING:
    from kt_hf.measuring import Parent
    from kt_hf.vocabularies import Vocabulary

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
"""What a parent's folder may hold beside: it would be taken for weights of the merged model."""
_SHOWN = 20
"""Differences that are listed; of more, the number."""


class Parents:
    """The parents' tensors, memory-mapped for reading. Checked on opening: the same names and shapes.

    head: the place of the parent whose head is kept, where the others' may differ; the result then has its names,
    configuration and files, which are otherwise those of the first. vocabulary: one that all are brought to. alike:
    False for parents that are not merged as wholes, whose names and shapes are for the caller to check.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        names: Sequence[str],
        head: int | None = None,
        *,
        vocabulary: Vocabulary | None = None,
        alike: bool = True,
    ):
        self.folders, self.labels, self.first, self.vocabulary = list(folders), list(names), head or 0, vocabulary
        for folder, label in zip(self.folders, self.labels, strict=True):
            if "quantization_config" in config(folder):
                remedy = "merge the models as they were before they were quantised"
                raise RecipeError(f"'{label}' is quantised: its weights are no numbers that can be averaged", remedy)
        self.models = [open_model(folder) for folder in folders]
        _drop_tied_copies(self.models, config(self.folders[self.first]))
        if vocabulary is not None:
            self.models = [vocabulary.aligned(f, m) for f, m in zip(self.folders, self.models, strict=True)]
        self.kept: set[str] = set()
        if not alike:
            return
        if head is not None:
            self._keep_head()
        shared = self.shared
        for i, (label, model) in enumerate(zip(self.labels, self.models, strict=True)):
            if i != self.first:
                refuse_differences(self.labels[self.first], shared, label, model)
                self._compare_settings(i)

    @property
    def shared(self) -> Tensors:
        """What all parents have, as the parent has it of which the result's files are."""
        return {n: t for n, t in self.models[self.first].items() if n not in self.kept}

    def _compare_settings(self, i: int) -> None:
        names = [self.labels[self.first], self.labels[i]]
        mine, theirs = config(self.folders[self.first]), config(self.folders[i])
        if differ := configurations.compare(mine, theirs, names):
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            said = "; ".join(differ[:5]) + more
            logger.warning("'%s' has the result's settings, and those of '%s' differ: %s", *names, said)

    def _keep_head(self) -> None:
        """Leave the other parents their backbones alone, under the names that those have beside the head that stays."""
        starts = [heads.prefix(config(f), list(m)) for f, m in zip(self.folders, self.models, strict=True)]
        wanted = starts[self.first]
        if not any(starts):
            self._keep_head_by_class()
            return
        self.kept = self.models[self.first].keys() - heads.backbone(self.models[self.first], wanted)
        for i, (start, model) in enumerate(zip(starts, self.models, strict=True)):
            if i != self.first:
                bare = {n: model[n] for n in sorted(heads.backbone(model, start))}
                self.models[i] = heads.renamed(bare, start, wanted)

    def _keep_head_by_class(self) -> None:
        """The same where names do not tell backbones."""
        found = [
            heads.by_class(folder, config(folder), model)
            for folder, model in zip(self.folders, self.models, strict=True)
        ]
        self.kept, labels = found[self.first], [config(folder).get("id2label") for folder in self.folders]
        if not self.kept and any(told != labels[0] for told in labels):
            raise RecipeError(
                f"which part of '{self.labels[self.first]}' is its head is not known, and labels differ",
                "merge models with the same labels",
            )
        for i, own in enumerate(found):
            if i != self.first:
                self.models[i] = {n: t for n, t in self.models[i].items() if n not in own}
        if self.kept:
            logger.info("head of '%s': %s", self.labels[self.first], ", ".join(sorted(self.kept)))

    def __enter__(self) -> Parents:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.models = []

    def kinship(self, base: Parents | None) -> Kinship:
        """How near the parents are to each other and to the base."""
        shared = self.shared
        start = base_tensors(self, base) if base is not None else None
        return kinship.measure(self.labels, [{n: m[n] for n in shared} for m in self.models], start)

    def check_finite(self) -> None:
        def check(model: Tensors) -> str | None:
            return next((n for n, t in model.items() if t.is_floating_point() and not finite(t)), None)

        with ThreadPoolExecutor(min(len(self.models), torch.get_num_threads())) as workers:
            for label, name in zip(self.labels, workers.map(check, self.models), strict=True):
                if name is not None:
                    raise IntegrityError(
                        f"parent '{label}' has non-finite values in {name}", "leave it out of the merge"
                    )


def config(folder: Path) -> dict[str, Any]:
    """config.json of a model directory; empty where there is none, as for OpenCLIP."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder / 'config.json'} cannot be read ({error})", "fetch this model again") from error
    return found if isinstance(found, dict) else {}


def refuse_differences(label: str, first: Tensors, other_label: str, other: Tensors, extra: bool = False) -> None:
    """Raise `RecipeError` with what differs between two models. extra: the second may have more tensors."""
    odd = [f"{n} is not in '{other_label}'" for n in first if n not in other]
    odd += [f"{n} is not in '{label}'" for n in other if n not in first and not extra]
    for name in first.keys() & other.keys():
        a, b = first[name], other[name]
        if a.shape != b.shape:
            odd.append(f"{name} is {list(a.shape)} in '{label}' and {list(b.shape)} in '{other_label}'")
        elif a.dtype != b.dtype and not (a.is_floating_point() and b.is_floating_point()):
            odd.append(f"{name} is {a.dtype} in '{label}' and {b.dtype} in '{other_label}'")
    if odd:
        odd.sort()
        more = [f"and {len(odd) - _SHOWN} more"] if len(odd) > _SHOWN else []
        raise RecipeError(
            f"'{label}' and '{other_label}' differ in {len(odd)} tensors: {'; '.join([*odd[:_SHOWN], *more])}",
            "merge models of one architecture and shape, with the same labels and vocabulary; "
            "where heads alone differ, name the model whose head is kept as `head`",
        )


def _drop_tied_copies(models: Sequence[Tensors], settings: dict[str, Any]) -> None:
    """Where weights are tied, some checkpoints hold them once and some twice: what only some hold, and is a copy of
    what all hold, is left out."""
    parts = [settings, *(v for v in settings.values() if isinstance(v, dict))]
    if any(part.get("tie_word_embeddings") is False for part in parts):
        return
    common = set.intersection(*(set(model) for model in models))
    for name in sorted(set().union(*models) - common):
        holders = [model for model in models if name in model]
        if all(any(_same(m[name], m[other]) for other in common if m[other].dim() > 1) for m in holders):
            logger.info("%s is a tied copy that not all parents hold: left out", name)
            for model in holders:
                del model[name]


def twins(models: Sequence[Tensors]) -> dict[str, str]:
    """Names of matrices that are copies of another in every model -> that one: a method that goes by the name, as those
    do that draw at random, must not part what is tied."""
    found: dict[tuple[Any, ...], str] = {}
    copies = {}
    for name, tensor in models[0].items():
        if tensor.dim() < 2 or not tensor.numel() or not tensor.is_floating_point():
            continue
        beginnings = [bytes(m[name].reshape(-1)[:64].view(torch.uint8).tolist()) for m in models]
        other = found.setdefault((tensor.shape, *beginnings), name)
        if other != name and all(_same(m[name], m[other]) for m in models):
            copies[name] = other
    return copies


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


class MergeRun:
    """What a merge that searches or measures may ask.

    score: weights_M -> validation metric of the weighted mean of the parents, and of the base where that has a weight.
    higher_is_better: of that metric. evaluate: gets one weight per parent, and one more for the base. parent: loads
    the model of a number, with its data. known: validation scores of parents that were measured before.
    """

    def __init__(
        self,
        num_parents: int,
        names: Sequence[str],
        higher_is_better: bool,
        evaluate: Callable[[list[float]], float],
        parent: Callable[[int], Parent] | None = None,
        known: Mapping[int, float] | None = None,
    ):
        self.num_parents, self.names, self.higher_is_better = num_parents, list(names), higher_is_better
        self._evaluate, self._parent, self.known = evaluate, parent, dict(known or {})
        self.scores: list[dict[str, Any]] = []

    def parent(self, i: int) -> Parent:
        """A parent's model, loaded anew, with the data that it can be asked on."""
        if self._parent is None:
            raise RecipeError("this merge runs its parents on data, which are not there", "write a recipe with data")
        return self._parent(i)

    def alone(self, i: int) -> float:
        """The validation score of one parent; not measured again where it is known."""
        if i not in self.known:
            self.known[i] = self.score([1.0 if k == i else 0.0 for k in range(self.num_parents)])
        return self.known[i]

    def score(self, weights_M: Sequence[float], base_weight: float = 0.0) -> float:
        weights = [float(w) for w in weights_M] + ([float(base_weight)] if base_weight else [])
        value = self._evaluate(weights)
        self.scores.append({"weights": weights, "score": value})
        return value

    def better(self, a: float, b: float) -> bool:
        """Whether score `a` is at least as good as `b`."""
        return a >= b if self.higher_is_better else a <= b


class WeightedMean(MergeMethod):
    """The weighted mean of the parents, for scoring candidates, and of the base where a weight more is given. Those of
    weight 0 are left out exactly."""

    elementwise = True

    def __init__(self, weights_M: Sequence[float]):
        self.weights_M = weights_M

    def tensor(self, name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None, stats: Any) -> torch.Tensor:
        given = [*tensors_M, *([base] if base is not None else [])]
        used = [(t, w) for t, w in zip(given, self.weights_M, strict=False) if w]
        if not used:  # all of the weight is the base's, which does not have this head
            used = [(t, 1.0) for t in tensors_M]
        return weighted_mean([t for t, _ in used], [w for _, w in used])


def merge(
    method: MergeMethod,
    parents: Parents,
    base: Parents | None,
    folder: Path,
    *,
    out_dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    stats: Sequence[Mapping[str, torch.Tensor]] = (),
    keep_ties: bool = True,
    files: Mapping[str, str | bytes | None] | None = None,
    **options: Any,
) -> int:
    """Write the merged model directory: the first parent's files, or those of the parents' common vocabulary, with
    merged weights. Returns the bytes of those.

    stats: what the method has measured of every parent. out_dtype, shard_bytes, files, options: as `write` has them; by
    default one file where the first parent is one.
    """
    jobs = plan(method, parents, base, stats, keep_ties)
    like, common = parents.folders[parents.first], parents.vocabulary
    single, shard_bytes = layout(like, shard_bytes)
    return write(
        jobs,
        like,
        folder,
        out_dtype=out_dtype,
        single=single,
        shard_bytes=shard_bytes,
        files={**(common.files if common else {}), **(files or {})},
        configure=common.configured if common else None,
        **options,
    )


def layout(like: Path, shard_bytes: int | None) -> tuple[str, int | None]:
    """(name of a single file, bytes of a shard) of a model like another, where nothing else was said."""
    sources = weight_files(like)
    single = sources[0].name if len(sources) == 1 else "model.safetensors"
    if shard_bytes is None and len(sources) > 1:
        shard_bytes = SHARD_BYTES
    if single == "open_clip_model.safetensors":
        shard_bytes = None  # its readers know no shards
    return single, shard_bytes


def plan(
    method: MergeMethod,
    parents: Parents,
    base: Parents | None,
    stats: Sequence[Mapping[str, torch.Tensor]] = (),
    keep_ties: bool = True,
) -> dict[str, Job]:
    """What becomes of each tensor where one method merges all of them: a head that is kept stays as it is, and one that
    the base does not have is the parents' mean. keep_ties: what is a copy of another tensor in all parents stays one.
    """
    start = base_tensors(parents, base) if base is not None else {}
    _check_buffers(parents)
    labels, shared = _distinct(parents.labels), parents.shared
    if base is not None and (lacks := [n for n in shared if n not in start]):
        shown = ", ".join(lacks[:4]) + (f" and {len(lacks) - 4} more" if len(lacks) > 4 else "")
        logger.warning("the base '%s' has no such head: the parents' mean is taken of %s", base.labels[0], shown)
    tied = twins([{n: m[n] for n in shared} for m in parents.models]) if keep_ties else {}
    mean = WeightedMean([1.0] * len(parents.models))
    methods = method.for_tensors([n for n, t in shared.items() if t.is_floating_point()])
    jobs = {}
    for name, tensor in parents.models[parents.first].items():
        if name in parents.kept or not tensor.is_floating_point():
            jobs[name] = Job(name, ((labels[parents.first], tensor),))
            continue
        sources = tuple(zip(labels, (m[name] for m in parents.models), strict=True))
        own = (base.labels[0], start[name]) if base is not None and name in start else None
        known = tied.get(name, name)
        how = mean if method.needs_base and own is None else methods[known]
        jobs[name] = Job(known, sources, how, own, [found.get(known) for found in stats] or None)
    return jobs


def base_tensors(parents: Parents, base: Parents) -> Tensors:
    """The base's tensors by the names that the result has: without the head where it has none, or another. Raises
    `RecipeError` where it lacks a part of the backbone."""
    found, shared = base.models[0], parents.shared
    if any(n not in found or found[n].shape != t.shape for n, t in shared.items()):
        mine = heads.prefix(config(parents.folders[parents.first]), list(shared))
        if not (mine and heads.backbone(found, mine)):
            found = heads.renamed(found, heads.prefix(config(base.folders[0]), list(found)), mine)
        lacks = [n for n, t in shared.items() if n not in found or found[n].shape != t.shape]
        if mine and not any(n.startswith(mine) for n in lacks):
            shared = {n: t for n, t in shared.items() if n.startswith(mine)}
    refuse_differences(parents.labels[parents.first], shared, base.labels[0], found, extra=True)
    return {n: found[n] for n in shared}


def write(
    jobs: Mapping[str, Job],
    like: Path,
    folder: Path,
    *,
    out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float32,
    single: str = "model.safetensors",
    shard_bytes: int | None = None,
    threads: int | None = None,
    sync: bool = True,
    files: Mapping[str, str | bytes | None] | None = None,
    verify: Callable[[Path], None] | None = None,
    configure: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> int:
    """Write a model directory: tensors as the jobs say, and the other files of `like`. Returns the weights' bytes.

    out_dtype: of what is a floating point number; default: what a job's first source has. shard_bytes: of a file at
    most; default: one file, `single`. threads: default as torch's. sync: outlast a loss of power. files: contents to
    write beside, or in place of others, by name; None leaves one out. verify: called with the folder before it gets its
    name. configure: what becomes of config.json.
    """
    specs = [
        Spec(n, out_dtype if out_dtype and job.like.is_floating_point() else job.like.dtype, tuple(job.like.shape))
        for n, job in jobs.items()
    ]
    with checkpoint.disk(folder), written_aside(folder) as staged:
        copy_files(like, staged, out_dtype, configure)
        writer = Writer(staged, specs, single, shard_bytes)
        progress = Bytes(f"merging into {folder.name}", writer.total)
        try:
            Fusion(jobs, writer, compute).run(threads or torch.get_num_threads(), progress.add, sync)
            writer.finish()
        finally:
            progress.close()
            writer.close()
        for name, content in (files or {}).items():
            if content is None:
                (staged / name).unlink(missing_ok=True)
            else:
                (staged / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if verify is not None:
            verify(staged)
        return writer.total


def _distinct(labels: Sequence[str]) -> list[str]:
    """The same parent may be there twice."""
    return [label if label not in labels[:i] else f"{label} ({i + 1})" for i, label in enumerate(labels)]


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside that becomes `folder` if all goes well, in place of what is there."""
    with hidden(folder.with_name(f".{folder.name}.partial"), folder) as staged:
        yield staged
        checkpoint.fsync_folder(staged)
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
        checkpoint.fsync_folder(folder.parent)


@contextmanager
def hidden(room: Path, folder: Path) -> Iterator[Path]:
    """An empty folder for making `folder`, which is gone on leaving unless it was renamed. What a killed process left
    is removed by the next; two at once are kept apart by a lock of the kernel."""
    room.mkdir(parents=True, exist_ok=True)
    handle = os.open(room, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(room).st_ino != os.fstat(handle).st_ino:
                raise BlockingIOError(errno.EWOULDBLOCK, "another process has just finished")
        except (BlockingIOError, FileNotFoundError) as error:
            raise RecipeError(f"another merge writes {folder}", "wait for it, or name another folder") from error
        for path in room.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield room
        finally:
            if room.exists() and os.stat(room).st_ino == os.fstat(handle).st_ino:  # else renamed; another's by now
                shutil.rmtree(room, ignore_errors=True)
    finally:
        os.close(handle)


def copy_files(
    first: Path,
    folder: Path,
    out_dtype: torch.dtype | None,
    configure: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Configuration, tokenizer and what else a parent's folder holds, but no weights, no index of them, and no card."""
    for path in first.iterdir():
        weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in ("README.md", ".gitattributes"):
            shutil.copyfile(path, folder / path.name)
    if (first / "modules.json").is_file():  # of sentence-transformers: settings of its modules lie in folders
        for path in first.glob("*_*/*"):
            if path.suffix in _OTHER_WEIGHTS:
                raise RecipeError(f"{path} has weights beside those of the model", "merge models without such modules")
            if path.is_file():
                (folder / path.parent.name).mkdir(exist_ok=True)
                shutil.copyfile(path, folder / path.parent.name / path.name)
    if (out_dtype is not None or configure is not None) and (settings := config(folder)):
        settings = configure(settings) if configure is not None else settings
        if out_dtype is not None:
            _set_dtype(settings, str(out_dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _set_dtype(settings: dict[str, Any], word: str) -> None:
    """In a configuration and in those within it: it is what the model is loaded in."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _set_dtype(value, word)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str):
            settings[key] = word


def _check_buffers(parents: Parents) -> None:
    """Say which buffers of whole numbers differ, and that they are the first parent's; refuse what looks like weights
    that were quantised."""
    first = parents.shared
    numbers = [n for n, t in first.items() if not t.is_floating_point()]
    differ = [n for n in numbers if not all(torch.equal(m[n], first[n]) for m in parents.models)]
    for name in differ:
        tensor = first[name]
        if tensor.dim() > 1 and tensor.element_size() == 1 and tensor.dtype != torch.bool:
            remedy = "merge the models as they were before they were quantised"
            raise RecipeError(f"{name} holds whole numbers of one byte that differ: weights that are quantised", remedy)
    if differ:
        some = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
        logger.warning(
            "buffers that are no floating point numbers are those of '%s', and others differ: %s",
            parents.labels[parents.first],
            some,
        )


def batch_statistics(model: nn.Module) -> list[nn.Module]:
    """Modules that keep running statistics of batches, which weight averaging makes wrong; not those whose statistics
    never move, as in backbones of detectors."""
    kept = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), torch.Tensor)]
    return [m for m in kept if hasattr(m, "reset_running_stats")]


def reestimate(model: nn.Module, run_batches: Callable[[], Iterator[Any]], forward: Callable[[Any], Any]) -> int:
    """Reset batch statistics and estimate them as the mean over training batches. Returns the number of batches.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima", section 3.2 (arXiv:1803.05407).
    """
    modules: list[Any] = batch_statistics(model)
    momenta = [m.momentum for m in modules]
    model.eval()
    for module in modules:
        module.reset_running_stats()
        module.momentum = None  # a plain mean over batches
        module.train()
    count = 0
    with torch.no_grad():
        for batch in run_batches():
            forward(batch)
            count += 1
    for module, momentum in zip(modules, momenta, strict=True):
        module.momentum = momentum
    model.eval()
    return count
