"""Check on a machine with one or more GPUs whatever needs CUDA, with one command:

    python benchmarks/gpu_check.py                     # a table, gpu_check.json, exit code 1 if a check fails
    python benchmarks/gpu_check.py --only no_syncs     # some of the checks; figures of the others are kept
    python benchmarks/gpu_check.py --device cpu        # a dry run of what runs there; speed and memory are not judged

Needs torch, transformers, accelerate, peft and safetensors, and neither an installation of kt_hf nor data: inputs are
random, models come from configurations. Each check runs apart; one that breaks shows its error and counts as failed.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its sums only so
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent


def find_kt_hf() -> None:
    """This repository's packages, installed or not. Without pydantic nothing is validated: a stand-in takes the notes
    that signatures carry for it."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("kt_hf_plugins") is None:
        spec = importlib.util.spec_from_file_location(
            "kt_hf_plugins", ROOT / "plugins" / "__init__.py", submodule_search_locations=[str(ROOT / "plugins")]
        )
        assert spec is not None
        sys.modules["kt_hf_plugins"] = importlib.util.module_from_spec(spec)
    try:
        import pydantic  # noqa: F401
    except ImportError:
        stand_in: Any = types.ModuleType("pydantic")
        stand_in.Field = stand_in.ConfigDict = lambda *args, **kwargs: None
        sys.modules["pydantic"] = stand_in


find_kt_hf()
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DistributedDataParallelKwargs  # noqa: E402
from ratios import paired  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    ResNetConfig,
    ViTConfig,
)
from turns import Turn, Turns  # noqa: E402

from kt_hf import Strategy, randomness, zero3  # noqa: E402
from kt_hf.errors import NonFiniteError  # noqa: E402
from kt_hf.facts import Run  # noqa: E402
from kt_hf.recipe import Data, Model, Training  # noqa: E402
from kt_hf.task import Loaded, Scores, Task  # noqa: E402
from kt_hf.trainer import Result, Trainer, half, planned_steps  # noqa: E402

# --- data, tasks, one training

VOCABULARY, LENGTH, SIDE, CLASSES = 512, 64, 32, 10
SIZES: dict[str, dict[str, Any]] = {  # small for arithmetic, with weights wide enough to learn fast; large for speed
    "small": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    },
    "large": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}


class Table:
    """Rows of tensors by column, as the loader asks for them."""

    def __init__(self, **columns: torch.Tensor):
        self.columns = {**columns, "index": torch.arange(len(next(iter(columns.values()))))}
        self.column_names = list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["index"])

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            return self.columns[which].tolist()
        return {
            name: values[which].tolist() if values.dim() == 1 else list(values[which])
            for name, values in self.columns.items()
        }

    def select(self, rows: list[int]) -> Table:
        which = torch.tensor(rows, dtype=torch.int64)
        return Table(**{name: values[which] for name, values in self.columns.items() if name != "index"})


class Tensors(Task):
    """What the tasks here share: rows are tensors already."""

    cache_rows, metric = False, "loss"
    greater_is_better = False

    def load(self, ref: Model, info: Any) -> Loaded:
        return Loaded(self.model(**ref.config_overrides or {}))

    def model(self, **sizes: Any) -> torch.nn.Module:
        raise NotImplementedError

    def preprocess(self, rows: Any, loaded: Loaded, train: bool, augment: Any = None) -> dict[str, Any]:
        return rows

    def collate(self, rows: Any, loaded: Loaded) -> dict[str, Any]:
        return {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}

    def signature(self, loaded: Loaded) -> dict[str, Any]:
        return {}

    def predict(self, model: Any, batch: Any, context: Any) -> dict[str, torch.Tensor]:
        values, _, _ = self.loss(self.forward(model, batch), batch)
        return {"values": values.view(len(batch["index"]), -1).mean(1)}

    def measure(self, predictions: Any, loaded: Loaded, info: Any) -> Scores:
        return Scores({"loss": float(predictions["values"].mean())})


class Tokens(Tensors):
    """A causal language model on random tokens that repeat, so that there is something to learn."""

    unit = "token"

    def model(self, **sizes: Any) -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **sizes))

    def forward(self, model: Any, batch: Any, **kwargs: Any) -> Any:
        return model(input_ids=batch["input_ids"], use_cache=False, **kwargs)

    def loss(self, outputs: Any, batch: Any, label_smoothing: float = 0.0) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="none"), None, "token"

    def units(self, batch: Any) -> dict[str, Any]:
        rows, length = batch["input_ids"].shape
        return {"example": rows, "token": rows * (length - 1)}

    def scores(self, outputs: Any, batch: Any) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        return logits, torch.ones(len(logits), device=logits.device)


class Pictures(Tensors):
    """Images of noise around a level that tells the class; a vision transformer or, for `kind` resnet, convolutions."""

    def __init__(self, kind: str = "vit"):
        self.kind = kind

    def model(self, **sizes: Any) -> torch.nn.Module:
        vit = {"image_size": SIDE, "patch_size": 8, "num_labels": CLASSES, **sizes}
        resnet = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
        config = ViTConfig(**vit) if self.kind == "vit" else ResNetConfig(num_labels=CLASSES, **resnet)
        return AutoModelForImageClassification.from_config(config)

    def forward(self, model: Any, batch: Any, **kwargs: Any) -> Any:
        return model(pixel_values=batch["pixel_values"], **kwargs)

    def loss(self, outputs: Any, batch: Any, label_smoothing: float = 0.0) -> Any:
        return F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none"), None, "example"

    def scores(self, outputs: Any, batch: Any) -> Any:
        return outputs.logits.float(), torch.ones(len(outputs.logits), device=outputs.logits.device)

    def head(self, model: Any) -> list[str]:
        return ["classifier"]


class Pairs(Tensors):
    """Images and texts of a CLIP model; only a strategy gives an objective."""

    has_loss = False

    def model(self, **sizes: Any) -> torch.nn.Module:
        text = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, **sizes}
        text.update(bos_token_id=0, pad_token_id=1, eos_token_id=VOCABULARY - 1)
        vision = {"image_size": SIDE, "patch_size": 8, **sizes}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))

    def towers(self, model: Any) -> dict[str, Any]:
        return {}

    def forward(self, model: Any, batch: Any, **kwargs: Any) -> Any:
        out = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], **kwargs)
        return SimpleNamespace(
            image_embeds=out.image_embeds,
            text_embeds=out.text_embeds,
            logit_scale=model.logit_scale.exp(),
            logit_bias=None,
        )


def rows(task: Tensors, count: int) -> Table:
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(VOCABULARY - 16, (count, 1), generator=draw)
    tokens = starts + torch.arange(LENGTH) % 8
    classes = torch.randint(CLASSES, (count,), generator=draw)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=draw) + classes[:, None, None, None] - CLASSES / 2
    if isinstance(task, Tokens):
        return Table(input_ids=tokens)
    if isinstance(task, Pictures):
        return Table(pixel_values=pixels, labels=classes, label=classes)
    return Table(pixel_values=pixels, input_ids=tokens)


class Bench:
    """The device, and how a training is made on it."""

    def __init__(self, device: str, folder: Path):
        self.cuda, self.folder = device == "cuda", folder
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        self.accelerator = Accelerator(cpu=not self.cuda, kwargs_handlers=handlers)
        zero3.load_whole(self.accelerator)
        self.number = 0

    def trainer(
        self,
        stack: dict[str, Strategy],
        task: Tensors | None = None,
        size: str = "small",
        name: str = "",
        **settings: Any,
    ) -> Trainer:
        self.number += 1
        task, batch = task or Tokens(), settings.pop("per_device_train_batch_size", 8)
        splits = {"train": rows(task, 256 if size == "large" else 64), "validation": rows(task, 16)}
        names = [str(i) for i in range(CLASSES)] if isinstance(task, Pictures) else None
        facts = {"name": "random", "roles": {}, "labels": names, "counts": {}, "path": ""}
        source = f"random-{type(task).__name__}-{len(splits['train'])}"
        info: Any = SimpleNamespace(splits=splits, fingerprint=source, stream=None, **facts)
        given = {"max_steps": 12, "learning_rate": 5e-3, "adam_epsilon": 1e-4, "logging_steps": 1, "eval_steps": 0}
        training: Any = Training(**{**given, "per_device_train_batch_size": batch, **settings})
        randomness.seed_all("load", training.seed)
        loaded = task.load(self.reference(size), info)
        loaded.labels, loaded.label_ids = names, list(range(CLASSES)) if names else None
        steps = planned_steps(training, len(info.splits["train"]), self.accelerator.num_processes)
        folder = self.folder / (name or f"training-{self.number}")
        teacher = self.reference("small")
        run = Run(
            self.accelerator, training.seed, folder, task, loaded, info, steps, lambda ref: teacher, half(training)
        )
        return Trainer(run, loaded, stack, training, Data("random"))

    @staticmethod
    def reference(size: str) -> Any:
        return Model(path=None, config="of the task", config_overrides=SIZES[size])

    def forget(self) -> None:
        """Former trainings out of memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def strategy(name: str, **settings: Any) -> Strategy:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["kt_hf.strategy"]
    module, _, cls = points[name].partition(":")
    return getattr(importlib.import_module(module), cls)(**settings)


def finetune() -> dict[str, Strategy]:
    return {"finetune": strategy("finetune")}


def weights(result: Result) -> dict[str, torch.Tensor]:
    return {k: v.detach().float().cpu().clone() for k, v in result.loaded.model.state_dict().items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys(), "other weights"
    return max((a[n] - b[n]).abs().max().item() for n in a if a[n].numel())


def losses(result: Result) -> torch.Tensor:
    return torch.tensor([point["loss"] for point in result.curve])


def shown(curve: torch.Tensor) -> str:
    return f"loss {curve[0]:.2f} to {curve[-1]:.2f}"


def moved(result: Result, bench: Bench, task: Tensors) -> float:
    """How far the training went, so that a small difference between two of them says something."""
    return distance(weights(result), start(bench, task))


def start(bench: Bench, task: Tensors) -> dict[str, torch.Tensor]:
    """The weights that trainings begin with."""
    randomness.seed_all("load", 42)
    return {k: v.float() for k, v in task.load(bench.reference("small"), None).model.state_dict().items()}


# --- the checks: each returns (passed, figure); None for passed means: not judged here


class NotHere(Exception):
    """What a check lacks on this machine."""


def need_cuda(bench: Bench) -> None:
    if not bench.cuda:
        raise NotHere("needs CUDA")


def against_float32(bench: Bench, tolerance: float, **settings: Any) -> tuple[bool, str]:
    exact = losses(bench.trainer(finetune(), max_steps=30).run())
    other = losses(bench.trainer(finetune(), max_steps=30, **settings).run())
    off = ((other - exact).abs() / exact).max().item()
    learned = bool(exact[-1] < 0.8 * exact[0])
    return (
        0 < off < tolerance and learned,
        f"{shown(exact)}; losses off by at most {off:.2e} (above 0, below {tolerance:g})",
    )


def bf16(bench: Bench) -> tuple[bool, str]:
    return against_float32(bench, 0.02, bf16=True)


def fp16(bench: Bench) -> tuple[bool, str]:
    """The first steps may overflow and are skipped while the scale falls: compared are the ends."""
    exact = losses(bench.trainer(finetune(), max_steps=60).run())
    other = losses(bench.trainer(finetune(), max_steps=60, fp16=True).run())
    off = (other[-1] - exact[-1]).abs().item() / (exact[0] - exact[-1]).abs().item()
    passed = 0 < off < 0.05 and bool(exact[-1] < 0.8 * exact[0])
    return passed, f"{shown(exact)}; its end off by {off:.3%} of what was learned (above 0, below 5 %)"


class Watched(Strategy):
    """From the third step to the last but one, whatever waits for the device is told as a warning."""

    def after_step(self, model: Any, progress: float) -> None:
        step = round(progress * 12)
        torch.cuda.set_sync_debug_mode("warn" if 2 <= step < 10 else "default")


def waits() -> str | None:
    """Whose code asked for what waits, innermost: a line of transformers or of this repository."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if "transformers" in path.parts:
            return f"transformers/{path.name}:{frame.lineno}"
        if path.is_relative_to(ROOT):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return None


def no_syncs(bench: Bench) -> tuple[bool, str]:
    """Waits within a model's own forward are told apart: no loop can mend them."""
    need_cuda(bench)
    found: collections.Counter[str] = collections.Counter()

    def note(message: Any, *args: Any) -> None:
        if "called a synchronizing" in str(message):  # torch also warns that the mode itself is young
            found[waits() or "unknown"] += 1

    extras: tuple[dict[str, Strategy], ...] = ({}, {"ema": strategy("ema")})
    extras += ({"distill": strategy("distill", teacher="teacher")}, {"lora": strategy("lora", r=4)})
    settings = {"logging_steps": 12, "optim": "adamw_torch_fused"}
    trainings = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            for task in (Pictures(), Tokens()):
                for more in ({}, {"bf16": True}):
                    for extra in extras:
                        base = {} if "lora" in extra else finetune()
                        bench.trainer({**base, **extra, "watched": Watched()}, task, **settings, **more).run()
                        trainings += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours = [where for where in found if not where.startswith("transformers/")]
    shown = ", ".join(f"{where} ({count})" for where, count in found.most_common()) or "none"
    return not ours, f"8 steps of {trainings} trainings (plain, bf16; ema, distill, lora); waits: {shown}"


class Loops:
    """Our trainer and a hand-written loop that also clips, schedules and logs every ten steps, on the same batches."""

    def __init__(self, bench: Bench, steps: int):
        self.bench, self.steps, self.task = bench, steps, Tokens()
        self.size, self.batch = ("large", 128) if bench.cuda else ("small", 8)
        table = rows(self.task, 4 * self.batch)
        items = [
            self.task.collate([{k: v[i] for k, v in table.columns.items()} for i in range(n, n + self.batch)], None)  # type: ignore[arg-type]
            for n in range(0, len(table), self.batch)
        ]
        self.batches = [{k: v.pin_memory() for k, v in item.items()} if bench.cuda else item for item in items]

    def bare(self, turn: Turn = lambda: None) -> None:
        device = self.bench.accelerator.device
        torch.manual_seed(42)
        model = self.task.model(**SIZES[self.size]).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        total = torch.zeros((), device=device)
        for step in range(self.steps):
            turn()
            batch = {k: v.to(device, non_blocking=True) for k, v in self.batches[step % len(self.batches)].items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bench.cuda):
                outputs = self.task.forward(model, batch)
            loss = self.task.loss(outputs, batch)[0].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            if step % 10 == 9:
                total.item()
                total.zero_()

    def ours(self, turn: Turn = lambda: None) -> None:
        settings = {"max_steps": self.steps, "logging_steps": 10, "bf16": self.bench.cuda, "optim": "adamw_torch_fused"}
        trainer = self.bench.trainer(
            finetune(), self.task, self.size, per_device_train_batch_size=self.batch, **settings
        )
        step = trainer.step

        def taken(*given: Any) -> None:
            turn()
            step(*given)

        trainer.step = taken  # type: ignore[method-assign]
        trainer.run()


def step_ratio(bench: Bench) -> tuple[bool | None, str]:
    """Block after block of ten steps in turns. Passed or failed where the whole interval is on one side of the
    limit."""
    blocks = 30 if bench.cuda else 8
    loops = Loops(bench, 10 * (blocks + 2))
    seconds = Turns({"bare": loops.bare, "ours": loops.ours}, 10, bench.synchronize).go()
    ours, bare = (seconds[name][1:] for name in ("ours", "bare"))  # the first block warms up
    middle, low, high = paired(ours, bare)
    each = statistics.median(bare) * 100
    figure = f"{middle:.3f} of the bare loop [{low:.3f}, {high:.3f}] over {len(bare)} blocks of 10 steps; limit 1.01"
    noisy = low <= 1.01 < high
    if noisy:
        figure += ", which this machine is too noisy to judge"
    return (high <= 1.01 if bench.cuda and not noisy else None), f"{figure}; the bare loop's step takes {each:.2f} ms"


def memory(bench: Bench) -> tuple[bool, str]:
    need_cuda(bench)
    loops, peaks = Loops(bench, 5), []
    for run in (loops.bare, loops.ours):
        run()  # the first time libraries take memory of their own
        bench.forget()
        run()
        peaks.append(bench.peak())
    ratio = peaks[1] / peaks[0]
    return ratio <= 1.02, f"peak {ratio:.3f} of the bare loop's (limit 1.02)"


def checkpoint_and_resume(bench: Bench) -> tuple[bool, str]:
    class Stop(Strategy):
        def after_step(self, model: Any, progress: float) -> None:
            if progress > 0.55:
                raise InterruptedError

    def stack() -> dict[str, Strategy]:
        return {**finetune(), "ema": strategy("ema")}

    figures, passed = [], True
    for settings in ({}, {"bf16": True}, *([{"fp16": True}] if bench.cuda else [])):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            name = f"resumed-{'-'.join(settings)}"
            whole = weights(bench.trainer(stack(), **settings).run())
            try:
                bench.trainer({**stack(), "stop": Stop()}, name=name, save_steps=6, **settings).run()
            except InterruptedError:
                pass
            resumed = bench.trainer(stack(), name=name, save_steps=6, **settings)
            again = weights(resumed.run())
            off = distance(whole, again)
        finally:
            torch.use_deterministic_algorithms(False)
        assert resumed.saved >= 6, "it did not resume"
        figures.append(f"{'-'.join(settings) or 'float32'} {'bit-equal' if off == 0 else f'off by {off:.1e}'}")
        passed &= off == 0
    return passed, ", ".join(figures)


class Breaks(Strategy):
    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        return {"broken": step.once(step.outputs.logits.float().sum() * (float("inf") if step.step == 4 else 0.0))}


def non_finite(bench: Bench) -> tuple[bool, str]:
    def stack() -> dict[str, Strategy]:
        return {**finetune(), "breaks": Breaks()}

    try:
        bench.trainer(stack()).run()
        return False, "it did not stop"
    except NonFiniteError as error:
        stopped = "step 5" in error.cause
    skipped = bench.trainer(stack(), non_finite="skip").run()
    finite = all(tensor.isfinite().all() for tensor in weights(skipped).values())
    count = skipped.cost.get("skipped_steps")
    return (
        stopped and finite and count == 1,
        f"stop: at step 5 {stopped}; skip: {count} skipped, weights finite {finite}",
    )


def fused(bench: Bench) -> tuple[bool, str]:
    found = [bench.trainer(finetune(), optim=name).run() for name in ("adamw_torch", "adamw_torch_fused")]
    off, went = distance(weights(found[0]), weights(found[1])), moved(found[0], bench, Tokens())
    return (
        off < 1e-5 < 1e-3 < went,
        f"off by {off:.1e} from the optimizer that is not fused (limit 1e-5; moved {went:.1e})",
    )


def torch_compile(bench: Bench) -> tuple[bool, str]:
    plain = losses(bench.trainer(finetune()).run())
    other = losses(bench.trainer(finetune(), torch_compile=True).run())
    off = ((other - plain).abs() / plain).max().item()
    return off < 1e-3, f"losses off by at most {off:.1e} (limit 1e-3)"


def channels_last(bench: Bench) -> tuple[bool, str]:
    plain = losses(bench.trainer(finetune(), Pictures("resnet")).run())
    other = losses(bench.trainer(finetune(), Pictures("resnet"), channels_last=True).run())
    off = ((other - plain).abs() / plain).max().item()
    return off < 1e-3, f"losses off by at most {off:.1e} (limit 1e-3)"


STACKS: dict[str, tuple[type[Tensors], dict[str, dict[str, Any]]]] = {
    "finetune": (Tokens, {"finetune": {"freeze": ["*embed_tokens*"]}}),
    "lora": (Tokens, {"lora": {"r": 4}}),
    "distill": (Pictures, {"distill": {"teacher": "teacher"}}),
    "ema": (Pictures, {"ema": {"decay": 0.8}}),
    "contrastive": (Pairs, {"contrastive": {}}),
    "balance": (Pictures, {"balance": {}}),
    "lora+distill+ema": (Pictures, {"lora": {"r": 4}, "distill": {"teacher": "teacher"}, "ema": {"decay": 0.8}}),
}


def strategies(bench: Bench) -> tuple[bool, str]:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["kt_hf.strategy"]
    untried, wrong = set(points) - set(STACKS), []
    for name, (task, stack) in STACKS.items():
        for settings in ({}, {"bf16": True}):
            built = {n: strategy(n, **given) for n, given in stack.items()}
            evaluate = {"eval_steps": 10} if task.has_loss else {}
            curve = losses(bench.trainer(built, task(), max_steps=30, **evaluate, **settings).run())
            if not (curve.isfinite().all() and curve[-5:].mean() < curve[:5].mean()):
                wrong.append(f"{name} {'bf16' if settings else ''}: {shown(curve)}")
    figure = f"{len(STACKS)} stacks in float32 and bf16: finite, and the loss falls"
    if untried or wrong:
        figure = "; ".join([*wrong, *([f"no case for {', '.join(sorted(untried))}"] if untried else [])])
    return not untried and not wrong, figure


LAUNCHES = {
    "DDP": {},
    "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    "ZeRO-3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    },
}
"""What `accelerate launch` would set."""


def ranks(bench: Bench, count: int, kind: str) -> float:
    """Distance between a training on `count` processes (a launch of this file) and on this one."""
    from safetensors.torch import load_file

    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    own = {} if bench.cuda else {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [*command, __file__, "--device", "cuda" if bench.cuda else "cpu", "--child", str(folder)],
        env={**os.environ, **own, **LAUNCHES[kind]},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    found = load_file(folder / "weights.safetensors")
    assert (folder / "checkpoints-sharded").exists() == (kind != "DDP"), "it was not sharded"
    ours = child_training(bench, 1)
    assert distance(ours, start(bench, Pictures())) > 1e-3, "nothing was trained"
    return distance(ours, found)


def child_training(bench: Bench, world: int) -> dict[str, torch.Tensor]:
    trainer = bench.trainer(
        {"lora": strategy("lora", r=4), "ema": strategy("ema", decay=0.8)},
        Pictures(), per_device_train_batch_size=16 // world, save_steps=6, eval_steps=6,
    )  # fmt: skip
    found = weights(trainer.run())
    if trainer.sharded is not None and bench.accelerator.is_main_process:
        (bench.folder / "checkpoints-sharded").mkdir()
    return found


def fsdp_one_rank(bench: Bench) -> tuple[bool, str]:
    off = ranks(bench, 1, "FSDP2")
    return off < 1e-5, f"lora and ema, sharded over one process, off by {off:.1e} (limit 1e-5)"


def zero3_one_rank(bench: Bench) -> tuple[bool, str]:
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHere("needs deepspeed")
    off = ranks(bench, 1, "ZeRO-3")
    return off < 1e-5, f"lora and ema, sharded over one process, off by {off:.1e} (limit 1e-5)"


def several_gpus(bench: Bench) -> tuple[bool, str]:
    count = min(torch.cuda.device_count(), 8) if bench.cuda else 2
    count = 1 << (count.bit_length() - 1) if count else 0
    if count < 2:
        raise NotHere("needs two GPUs")
    kinds = [kind for kind in LAUNCHES if kind != "ZeRO-3" or importlib.util.find_spec("deepspeed") is not None]
    off = {kind: ranks(bench, count, kind) for kind in kinds}
    found = ", ".join(f"{kind} off by {value:.1e}" for kind, value in off.items())
    return max(off.values()) < 1e-4, f"{count} processes: {found} from one (limit 1e-4)"


CHECKS: dict[str, Callable[[Bench], tuple[bool | None, str]]] = {
    "bf16": bf16,
    "fp16": fp16,
    "no_syncs": no_syncs,
    "fused": fused,
    "non_finite": non_finite,
    "checkpoint_and_resume": checkpoint_and_resume,
    "channels_last": channels_last,
    "torch_compile": torch_compile,
    "strategies": strategies,
    "fsdp_one_rank": fsdp_one_rank,
    "zero3_one_rank": zero3_one_rank,
    "several_gpus": several_gpus,
    "memory": memory,
    "step_ratio": step_ratio,
}


def run_checks(bench: Bench, names: list[str], debug: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        begun = time.perf_counter()
        try:
            passed, figure = CHECKS[name](bench)
            result = "not judged" if passed is None else "passed" if passed else "FAILED"
        except NotHere as error:
            result, figure = "not here", str(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            result, figure = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
            if debug:
                traceback.print_exc()
        found[name] = {"result": result, "figure": figure, "seconds": round(time.perf_counter() - begun, 1)}
        print(f"{name:24}{result:12}{figure}", flush=True)
    return found


def machine(cuda: bool) -> dict[str, Any]:
    import accelerate
    import peft
    import transformers

    libraries = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, peft)}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {"gpus": gpus, "cuda": torch.version.cuda, "python": platform.python_version(), **libraries}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check whatever needs CUDA.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu runs what runs without one", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.child:
        from safetensors.torch import save_file

        bench = Bench(options.device, options.child)
        found = child_training(bench, bench.accelerator.num_processes)
        if bench.accelerator.is_main_process:
            save_file({k: v.contiguous() for k, v in found.items()}, options.child / "weights.safetensors")
        return 0
    about = machine(options.device == "cuda")
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checks = run_checks(Bench(options.device, Path(folder)), options.only, options.debug)
    facts = {"device": options.device, "machine": about}
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    if {name: known.get(name) for name in facts} == facts:  # what was found here before stays
        both = {**known["checks"], **checks}
        checks = {name: both[name] for name in CHECKS if name in both}
    options.output.write_text(json.dumps({**facts, "checks": checks}, indent=1) + "\n")
    failed = [name for name, found in checks.items() if found["result"] == "FAILED"]
    print(f"\n{len(checks) - len(failed)} of {len(checks)} without failure; figures in {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
