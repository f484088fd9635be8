"""kt_hf: one grammar for moving knowledge between models on the Hugging Face stack.

Importing this package is cheap: names are resolved when they are used.
"""

import importlib
import time
from typing import TYPE_CHECKING

__version__ = "0.1.0"
BEGAN = time.time()
"""Code that was written later may not be the code that runs here."""

_HOMES = {
    "Recipe": "recipe",
    "Data": "recipe",
    "Model": "recipe",
    "Training": "recipe",
    "Train": "recipe",
    "Merge": "recipe",
    "Ensemble": "recipe",
    "Evaluate": "recipe",
    "run": "runner",
    "main": "launch",
    "register": "registry",
    "Task": "task",
    "Loaded": "task",
    "Role": "task",
    "Strategy": "strategy",
    "Stream": "strategy",
    "MergeMethod": "merge",
    "EnsembleMethod": "ensemble",
    "ModelRef": "settings",
    "DataRef": "settings",
    "KtError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from kt_hf.ensemble import EnsembleMethod as EnsembleMethod
    from kt_hf.errors import KtError as KtError
    from kt_hf.launch import main as main
    from kt_hf.merge import MergeMethod as MergeMethod
    from kt_hf.recipe import (
        Data as Data,
    )
    from kt_hf.recipe import (
        Ensemble as Ensemble,
    )
    from kt_hf.recipe import (
        Evaluate as Evaluate,
    )
    from kt_hf.recipe import (
        Merge as Merge,
    )
    from kt_hf.recipe import (
        Model as Model,
    )
    from kt_hf.recipe import (
        Recipe as Recipe,
    )
    from kt_hf.recipe import (
        Train as Train,
    )
    from kt_hf.recipe import (
        Training as Training,
    )
    from kt_hf.registry import register as register
    from kt_hf.runner import run as run
    from kt_hf.settings import DataRef as DataRef
    from kt_hf.settings import ModelRef as ModelRef
    from kt_hf.strategy import Strategy as Strategy
    from kt_hf.strategy import Stream as Stream
    from kt_hf.task import Loaded as Loaded
    from kt_hf.task import Role as Role
    from kt_hf.task import Task as Task


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kt_hf' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kt_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
