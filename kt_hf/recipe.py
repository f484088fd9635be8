"""The grammar, in one place for those who use it.

nouns          `Recipe`, `Data`, `Model`, `Training` and the four stages: what may be written
recipe_yaml    the same as YAML
overrides      changes from the command line and from `--config` files
checking       all mistakes of a recipe, together; the resolved recipe
"""

from kt_hf import settings
from kt_hf.checking import (
    check_plugins,
    check_seeds,
    merges_seeds,
    model_refs,
    raise_all,
    resolve,
    resolved_yaml,
)
from kt_hf.nouns import (
    BASELINES,
    PARENTS,
    STAGES,
    TOWERS,
    Data,
    Ensemble,
    Evaluate,
    Merge,
    Model,
    Named,
    Noun,
    Recipe,
    Stage,
    Train,
    Training,
    named,
    plain,
)
from kt_hf.overrides import Change, leaves, normalise, override, parse_override
from kt_hf.recipe_yaml import from_yaml, to_yaml

__all__ = [
    "BASELINES",
    "PARENTS",
    "STAGES",
    "TOWERS",
    "Change",
    "Data",
    "Ensemble",
    "Evaluate",
    "Merge",
    "Model",
    "Named",
    "Noun",
    "Recipe",
    "Stage",
    "Train",
    "Training",
    "check_plugins",
    "check_seeds",
    "from_yaml",
    "leaves",
    "merges_seeds",
    "model_refs",
    "named",
    "normalise",
    "override",
    "parse_override",
    "plain",
    "raise_all",
    "resolve",
    "resolved_yaml",
    "settings",
    "to_yaml",
]
