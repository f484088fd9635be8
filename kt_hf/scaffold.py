"""`kt-hf new-plugin`: an installable package with a strategy that works, its test and a page about it."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path

from kt_hf import registry
from kt_hf.errors import RecipeError

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "@NAME@"
version = "0.1.0"
description = "A strategy for kt_hf"
requires-python = ">=3.11"
dependencies = ["kt_hf"]

[project.entry-points."kt_hf.strategy"]
@NAME@ = "@MODULE@:@CLASS@"

[tool.setuptools]
py-modules = ["@MODULE@"]
"""

MODULE = '''\
"""L2-SP: transfer that does not wander far from where it started. An example to replace with a method of your own."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from kt_hf import Strategy


class @CLASS@(Strategy):
    """Pulls trained weights towards their starting values.

    loss = task + alpha / 2 * sum_i (w_i - w0_i)^2 + beta / 2 * sum_j w_j^2, where w0 are the weights at the start, i
    runs over weights that came from a checkpoint and j over new ones, such as a fresh head (the paper's L2-SP penalty).
    """

    paper = "Li, Grandvalet, Davoine 2018, Explicit Inductive Bias for Transfer Learning, arXiv:1802.01483"
    scope = "weights"  # the loss is about the weights: accumulation and several processes need no care
    neutral = {"alpha": 0.0, "beta": 0.0}  # with these it is as if it were not there; `kt-hf check-plugin` tries that

    def __init__(self, *, alpha: Annotated[float, Field(ge=0)] = 0.1, beta: Annotated[float, Field(ge=0)] = 0.01):
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.pulled: list[str] = []
        self.decayed: list[str] = []

    def describe(self) -> str:
        return f"pulls weights towards the start with {self.alpha:g}, new ones towards 0 with {self.beta:g}"

    def ready(self, model: nn.Module, run: Any) -> None:
        """Anchors are buffers: moved, saved and resumed without a further line."""
        new = tuple(run.loaded.new_parameters)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.decayed = [name for name, _ in trained if name.endswith(new)] if new else []
        self.pulled = [name for name, _ in trained if name not in self.decayed]
        for i, (_, p) in enumerate((n, p) for n, p in trained if n in self.pulled):
            self.register_buffer(f"anchor_{i}", p.detach().clone())

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        weights = dict(step.model.named_parameters())
        terms: dict[str, torch.Tensor] = {}
        if self.alpha and self.pulled:
            pairs = [(weights[name], self.get_buffer(f"anchor_{i}")) for i, name in enumerate(self.pulled)]
            distance = torch.stack([(w.float() - anchor.float()).square().sum() for w, anchor in pairs]).sum()
            terms["start"] = step.once(self.alpha / 2 * distance)
        if self.beta and self.decayed:
            size = torch.stack([weights[name].float().square().sum() for name in self.decayed]).sum()
            terms["zero"] = step.once(self.beta / 2 * size)
        return terms
'''

TEST = '''\
"""Whether the strategy keeps its word: every rule that `kt-hf check-plugin @NAME@` tries."""

from @MODULE@ import @CLASS@

from kt_hf.testing import check_strategy


def test_it_conforms():
    check_strategy(@CLASS@)
'''

README = """\
# @NAME@

A strategy for kt_hf. It pulls weights towards where they started (L2-SP); replace that in
`@MODULE@.py` with a method of your own.

```
pip install -e .
kt-hf show @NAME@
kt-hf check-plugin @NAME@
pytest
```

In a recipe:

```python
Train("mine", strategies=["finetune", {"@NAME@": {"alpha": 0.1}}])
```

Hooks of a strategy: `kt_hf/strategy.py`. State lives in buffers and parameters, the model arrives as an argument, and
means are taken by `step.mean`; the kit names the rule where one of these is broken.
"""


def write(name: str, where: str | Path = ".") -> Path:
    """Write the package of a new strategy into `where/name` and return that folder. Nothing is overwritten."""
    module = check_name(name)
    folder = Path(where) / name
    if folder.exists():
        raise RecipeError(f"'{folder}' exists", "choose another name, or another --dir")
    words = {"@NAME@": name, "@MODULE@": module, "@CLASS@": "".join(part.capitalize() for part in module.split("_"))}
    files = {"pyproject.toml": PYPROJECT, f"{module}.py": MODULE, f"test_{module}.py": TEST, "README.md": README}
    folder.mkdir(parents=True)
    for path, text in files.items():
        for word, value in words.items():
            text = text.replace(word, value)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def check_name(name: str) -> str:
    """The module's name. Raises `RecipeError` for what cannot be a package, or is one already."""
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or len(name) > 64:
        raise RecipeError(
            f"'{name}' is no name for a plugin",
            "use lower-case letters and digits, with single '-' or '_' between, such as my-strategy",
        )
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise RecipeError(f"a module '{module}' exists already", "choose another name")
    taken = registry.entries().get(("strategy", name))
    if taken is not None:
        raise RecipeError(f"the strategy '{name}' exists already, in {taken.distribution}", "choose another name")
    return module
