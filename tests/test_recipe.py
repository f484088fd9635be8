"""The grammar: what may be written, how it is changed from outside, and how mistakes are reported."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kt_hf import Data, Ensemble, Evaluate, Merge, Model, Recipe, Train, launch
from kt_hf import recipe as grammar
from kt_hf.errors import Collector, IntegrityError, KtError, Mistakes, RecipeError
from kt_hf.nouns import Schedule, Tracker
from kt_hf.recipe_yaml import read_value

ROOT = Path(__file__).parent.parent


def example() -> Recipe:
    return Recipe(
        name="example",
        data=Data("digits", "target", k_shot=3, columns={"image": "image"}),
        model=Model("@source", dtype="bfloat16"),
        training={"num_train_epochs": 20, "learning_rate": 5e-4, "warmup_ratio": 0.1},
        stages=[
            Train(
                "source",
                data=Data("digits", "source"),
                model=Model(config="vit", config_overrides={"hidden_size": 32}),
                training={"num_train_epochs": 2, "learning_rate": 3e-3},
                when_used=True,
            ),
            Train(
                "student", strategies=["lora", {"distill": {"teacher": "@source", "temperature": 4.0}}, "ema"], seeds=2
            ),
            Merge("soup", "uniform_soup", models=["@student"]),
        ],
    )


def several() -> Recipe:
    return Recipe(
        data={"a": Data("digits", "source"), "b": Data("digits", "target")},
        model=Model(config="vit"),
        stages=[Train("one", data="a"), Train("two", data="b", model="@one", training={"max_steps": 7})],
    )


def changed(recipe: Recipe, *arguments: str) -> Recipe:
    """The recipe resolved, with the arguments of a command line."""
    raw, collect = raw_of(recipe, *arguments), Collector()
    resolved = grammar.resolve(raw, collect)
    collect.raise_if_any()
    return resolved


def raw_of(recipe: Recipe, *arguments: str) -> dict[str, Any]:
    collect = Collector()
    raw = launch.read_changes(launch.parser().parse_intermixed_args(arguments), grammar.normalise(recipe), collect)
    collect.raise_if_any()
    return raw


def stage(recipe: Recipe, name: str) -> Any:
    return next(s for s in recipe.stages if s.name == name)


def mistakes(recipe: Any, *arguments: str) -> list[KtError]:
    collect = Collector()
    raw = launch.read_changes(launch.parser().parse_intermixed_args(arguments), grammar.normalise(recipe), collect)
    resolved = grammar.resolve(raw, collect)
    try:
        grammar.raise_all(resolved, collect)
        grammar.check_plugins(resolved, collect)
        collect.raise_if_any()
    except Mistakes as several_:
        return several_.mistakes
    return []


# --- nouns ---


def test_stages_get_the_recipes_defaults_and_keep_their_own() -> None:
    recipe = changed(example())
    source, student = stage(recipe, "source"), stage(recipe, "student")
    assert (source.training.num_train_epochs, student.training.num_train_epochs) == (2, 20)
    assert source.model.config == "vit" and student.model.path == "@source"
    assert source.data[1].name == "source" and student.data[1].name == "target"
    assert student.training.warmup_ratio == source.training.warmup_ratio == 0.1
    assert [grammar.named(s)[0] for s in source.strategies] == ["finetune"]


def test_missing_required_settings_do_not_stop_a_recipe_file() -> None:
    stages: list[Any] = [Merge("m"), Ensemble("e"), Train("t")]  # type: ignore[call-arg]
    causes = [m.cause for m in mistakes(Recipe(stages=stages, data=Data(name="x")))]  # type: ignore[call-arg]
    assert "stages.m.method: missing" in causes and "stages.m.models: missing" in causes
    assert "stages.e.models: missing" in causes and "data.path: missing" in causes
    assert "stages.t: no model" in causes


def test_a_path_object_and_numpy_numbers_are_plain() -> None:
    import numpy as np

    data = Data(Path("some") / "folder", k_shot=np.int64(3))  # type: ignore[arg-type]
    raw = grammar.normalise(Recipe(data=data, stages=[Train("t")]))
    assert raw["data"] == {"path": "some/folder", "k_shot": 3} and type(raw["data"]["k_shot"]) is int


def test_seeds_of_a_merge_over_one_seeded_stage_are_its_parents() -> None:
    recipe = changed(example())
    assert stage(recipe, "student").seeds == 2 and stage(recipe, "soup").seeds == 1


def test_unused_helper_stages_are_left_out() -> None:
    assert [s.name for s in changed(example()).stages] == ["source", "student", "soup"]
    alone = changed(example(), "model=DIR", "stages.student.strategies=[lora]")
    assert [s.name for s in alone.stages] == ["student", "soup"]


# --- overrides ---


def test_lists_are_entered_by_name_and_by_index() -> None:
    for path in ("stages.student.strategies.distill", "stages.1.strategies.1", "stages.1.strategies.1.distill"):
        raw = raw_of(example(), f"{path}.temperature=2.5")
        assert raw["stages"][1]["strategies"][1] == {"distill": {"teacher": "@source", "temperature": 2.5}}
    assert raw_of(example(), "stages.student.strategies.lora.r=4")["stages"][1]["strategies"][0] == {"lora": {"r": 4}}
    raw = raw_of(example(), "stages.student.strategies=[lora,ema]", "stages.student.strategies.ema.decay=0.5")
    assert raw["stages"][1]["strategies"] == [{"lora": {}}, {"ema": {"decay": 0.5}}]
    raw = raw_of(example(), "stages.student.strategies.distill={teacher: T}")
    assert raw["stages"][1]["strategies"][1] == {"distill": {"teacher": "T"}}
    assert raw_of(example(), "stages.soup.models.0=OTHER")["stages"][2]["models"] == ["OTHER"]
    assert raw_of(example(), "stages.soup.models.0.dtype=float16")["stages"][2]["models"][0]["path"] == "@student"


def test_the_default_strategy_can_be_set() -> None:
    raw = raw_of(example(), "stages.source.strategies.finetune.freeze_layers=2")
    assert raw["stages"][0]["strategies"] == [{"finetune": {"freeze_layers": 2}}]


def test_stages_named_like_settings_are_found() -> None:
    recipe = Recipe(data="digits", model=Model(config="vit"), stages=[Train("data"), Train("train", seeds=2)])
    raw = raw_of(recipe, "stages.data.seeds=3", "stages.train.seeds=4")
    assert [s["seeds"] for s in raw["stages"]] == [3, 4]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("stages.nobody.seeds=2", "there is no 'nobody'"),
        ("stages.student.strategies.distil.temperature=2", "did you mean 'distill'"),
        ("stages.9.seeds=2", "there is no '9'"),
        ("name.x=2", "'name' is a single value"),
        ("seeds", "cannot read the argument"),
        ("a..b=1", "cannot read the argument"),
        ("=1", "cannot read the argument"),
        ("training.max_step=1", "did you mean 'max_steps'"),
        ("data.k_shots=1", "did you mean 'k_shot'"),
        ("model.dtyp=auto", "did you mean 'dtype'"),
        ("stages.student.modell=x", "did you mean 'model'"),
        ("trainng.max_steps=1", "did you mean 'training'"),
    ],
)
def test_overrides_that_lead_nowhere_name_the_nearest(argument: str, part: str) -> None:
    found = mistakes(example(), argument)
    assert any(part in str(m) for m in found), found
    assert len(found) == 1


def test_another_model_or_data_set_starts_blank_and_other_overrides_apply() -> None:
    raw = raw_of(example(), "model=DIR", "data.path=FOLDER")
    assert raw["model"] == {"path": "DIR"} and raw["data"] == {"path": "FOLDER"}
    raw = raw_of(example(), "data.k_shot=5", "data.path=FOLDER", "model.dtype=float16", "model.path=DIR")
    assert raw["data"] == {"path": "FOLDER", "k_shot": 5} and raw["model"] == {"path": "DIR", "dtype": "float16"}
    assert raw_of(example(), "data.k_shot=5")["data"]["name"] == "target"
    assert raw_of(example(), "model.config=bert")["model"] == {"config": "bert"}
    assert raw_of(example(), "data={path: F, seed: 3}")["data"] == {"path": "F", "seed": 3}
    assert raw_of(example(), "stages.source.model.config=bert")["stages"][0]["model"] == {"config": "bert"}
    assert raw_of(example(), "stages.source.model=DIR")["stages"][0]["model"] == {"path": "DIR"}


def test_one_of_several_data_sets() -> None:
    assert raw_of(several(), "data.b.path=F")["data"] == {"a": {"path": "digits", "name": "source"}, "b": {"path": "F"}}
    assert raw_of(several(), "data.b=F", "data.b.seed=1")["data"]["b"] == {"path": "F", "seed": 1}
    assert "name one of them: data.a.path, data.b.path" in str(mistakes(several(), "data.path=F")[0])
    recipe = changed(several(), "stages.two.data.k_shot=4")
    assert stage(recipe, "two").data[1].path == "digits" and stage(recipe, "two").data[1].k_shot == 4
    assert stage(changed(several(), "stages.two.data=a"), "two").data[0] == "a"
    assert "there is no data set 'c'" in str(mistakes(several(), "stages.two.data=c")[0])


def test_parts_of_one_data_set_move_together() -> None:
    """What they share described the old place; what tells them apart stays."""
    parts = Recipe(
        data={
            "a": Data("digits", "source", labels=["one"], drop=["empty"]),
            "b": Data("digits", "source", labels=["two"], drop=["empty"], k_shot=2),
        },
        model="DIR",
        stages=[Evaluate("e", data="a"), Evaluate("f", data="b")],
    )
    moved = {"a": {"path": "F", "labels": ["one"]}, "b": {"path": "F", "labels": ["two"], "k_shot": 2}}
    assert raw_of(parts, "data.path=F")["data"] == moved
    again = raw_of(parts, "data.path=F", "data.b.labels=[three]", "data.a.k_shot=1")["data"]
    assert again["b"] == {**moved["b"], "labels": ["three"]} and again["a"]["k_shot"] == 1


def test_towers_are_replaced_one_by_one() -> None:
    recipe = Recipe(
        data="digits",
        model=Model(image={"config": "vit"}, text={"config": "bert", "revision": "x"}, projection_dim=8),
        stages=[Evaluate("e", model="DIR")],
    )
    raw = raw_of(recipe, "model.text=DIR")
    assert raw["model"] == {"image": {"config": "vit"}, "text": {"path": "DIR"}, "projection_dim": 8}
    raw = raw_of(recipe, "model=OTHER")
    assert raw["model"] == {"path": "OTHER"}
    raw = raw_of(example(), "model.image=A", "model.text=B")
    assert raw["model"] == {"dtype": "bfloat16", "image": {"path": "A"}, "text": {"path": "B"}}


def test_training_from_outside_holds_for_all_stages() -> None:
    recipe = changed(example(), "training.learning_rate=1e-4")
    assert {stage(recipe, n).training.learning_rate for n in ("source", "student")} == {1e-4}
    recipe = changed(example(), "training.max_steps=60")
    assert {stage(recipe, n).training.max_steps for n in ("source", "student")} == {60}
    recipe = changed(example(), "training.max_steps=60", "stages.source.training.max_steps=5")
    assert [stage(recipe, n).training.max_steps for n in ("source", "student")] == [5, 60]
    recipe = changed(several(), "stages.one.training.seed=1", "training.seed=2")
    assert [stage(recipe, n).training.seed for n in ("one", "two")] == [1, 2]


def test_settings_that_replace_one_another() -> None:
    recipe = changed(example(), "training.warmup_steps=10")
    assert stage(recipe, "student").training.warmup_steps == 10 and stage(recipe, "student").training.warmup_ratio == 0
    recipe = changed(several(), "training.num_train_epochs=2")
    assert all(s.training.max_steps == -1 and s.training.num_train_epochs == 2 for s in recipe.stages)
    recipe = changed(example(), "training.max_steps=9", "stages.source.training.num_train_epochs=1")
    assert stage(recipe, "source").training.max_steps == -1 and stage(recipe, "student").training.max_steps == 9
    both = mistakes(example(), "training.warmup_steps=10", "training.warmup_ratio=0.2")
    assert ["contradict" in m.cause for m in both] == [True]


def test_tasks() -> None:
    assert raw_of(example(), "task=image-classification")["task"] == {"image-classification": {}}
    raw = raw_of(example(), "task.text-classification.max_length=9", "task=text-classification")
    assert raw["task"] == {"text-classification": {"max_length": 9}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-1", -1),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("007", "007"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("12e45678", "12e45678"),
        ("a: b", "a: b"),
        ("a #b", "a #b"),
        ("@source", "@source"),
        ("[@a, @b]", ["@a", "@b"]),
        ("[1e-4, 3e-4]", [1e-4, 3e-4]),
        ("{a: [no, 1]}", {"a": ["no", 1]}),
        ("'3'", "3"),
        ("a=b", "a=b"),
        ("[unclosed", "[unclosed"),
    ],
)
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert read_value(text) == value and type(read_value(text)) is type(value)


def test_a_config_file_comes_before_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "more.yaml"
    config.write_text("training: {max_steps: 5, seed: 1}\ndata: {k_shot: 7}\nstages: {source: {seeds: 2}}\n")
    raw = raw_of(example(), "--config", str(config), "training.seed=2", "data.path=F")
    assert raw["training"]["max_steps"] == 5 and raw["training"]["seed"] == 2 and raw["stages"][0]["seeds"] == 2
    assert raw["data"] == {"path": "F", "k_shot": 7}
    config.write_text("data: {path: G, k_shot: 7}\n")
    assert raw_of(example(), "--config", str(config), "data.path=F")["data"] == {"path": "F"}
    config.write_text("stages: [{train: only}]\n")
    assert raw_of(example(), "--config", str(config)) == {"stages": [{"train": "only"}]}


def test_a_configs_stages_take_part_in_resolution(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("a: [\n")
    found = mistakes(example(), "--config", str(config), "seeds=0")
    assert len(found) == 2 and "is not YAML" in found[0].cause


# --- YAML ---


def test_the_resolved_recipe_comes_back_the_same(tmp_path: Path) -> None:
    for recipe in (example(), several()):
        raw = grammar.normalise(recipe)
        collect = Collector()
        resolved = grammar.resolve(raw, collect)
        written = grammar.resolved_yaml(resolved, raw, grammar.check_plugins(resolved, collect))
        collect.raise_if_any()
        (tmp_path / "recipe.yaml").write_text(grammar.to_yaml(written))
        again = grammar.normalise(grammar.from_yaml(str(tmp_path / "recipe.yaml")))
        second = grammar.resolve(again, collect)
        collect.raise_if_any()
        rewritten = grammar.resolved_yaml(second, again, grammar.check_plugins(second, collect))
        assert rewritten == written
        assert [vars(s.training) for s in second.stages if isinstance(s, Train)] == [
            {**vars(s.training), "given": t.training.given}
            for s, t in zip(resolved.stages, second.stages, strict=True)
            if isinstance(s, Train)
        ]


def test_text_that_looks_like_something_else_stays_text() -> None:
    from kt_hf import recipe_yaml

    for text in (
        "1e-4",
        "no",
        "on",
        "007",
        "1:30",
        "2024-01-01",
        "null",
        "~",
        "3",
        "0.5",
        "@a",
        "",
        "a: b",
        "é 日本",
        "0x1f",
    ):
        assert recipe_yaml.load(grammar.to_yaml({"x": text, "l": [text]})) == {"x": text, "l": [text]}
    for number in (1e-5, 3, -2, 1e16, 0.1, True, None):
        assert recipe_yaml.load(grammar.to_yaml({"x": number})) == {"x": number}


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (b"", 2, "holds nothing"),
        (b"- a\n", 2, "holds a list"),
        ("name: caf\u00e9\n".encode("latin-1"), 2, "not UTF-8"),
        (b"x" * 10_000_000, 2, "larger than"),
        (b"a: [1\nb: 2\n", 2, "not YAML"),
        (b"[" * 20_000, 2, "not YAML"),
        (b"name: a\nname: b\n", 2, "stands there twice"),
        (b"model: @source\n", 2, "write references in quotes"),
        (b"a: !!python/object/apply:os.system ['touch pwned']\n", 4, "asks for Python objects"),
        (b"a: !!python/name:os.system\n", 4, "asks for Python objects"),
        (b"\x00\x01", 2, "not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, code: int, part: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(KtError, match=part) as error:
        grammar.from_yaml(str(tmp_path / "recipe.yaml"))
    assert error.value.exit_code == code
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="unfolds to more"):
        grammar.from_yaml(str(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text("a: &a [*a]\n")
    with pytest.raises(RecipeError, match="unfolds to more"):
        grammar.from_yaml(str(tmp_path / "r.yaml"))
    with pytest.raises(RecipeError, match="cannot read"):
        grammar.from_yaml(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/tmp/x", "a\\b"])
def test_names_that_lead_out_of_the_folder(name: str) -> None:
    for recipe in ({"stages": [{"train": name}]}, {"name": name, "stages": [{"train": "a"}]}):
        with pytest.raises(IntegrityError, match="leads out of") as error:
            grammar.resolve(grammar.normalise(recipe), Collector())
        assert error.value.exit_code == 4


# --- mistakes ---


def test_all_mistakes_are_reported_together() -> None:
    recipe = Recipe(
        model="DIR",
        data=Data("digits", k_shots=3),  # unknown key
        training={
            "learning_rate": -1,
            "num_train_epochs": math.nan,
            "max_steps": "many",
            "warmup_steps": 3,
            "warmup_ratio": 0.5,
        },
        stages=[
            Train("a", strategies=["lorra", {"distill": {"temperature": -1.0, "alfa": 0.5}}], training={"seed": -3}),
            Train("a", model="@b", compare=["majorty"]),
            Merge("b", "uniform_soup", models=[]),
        ],
    )
    text = "\n".join(str(m) for m in mistakes(recipe))
    for part in (
        "data.k_shots: unknown setting",
        "did you mean 'k_shot'",
        "training.learning_rate: got -1",
        "training.num_train_epochs: got nan",
        "training.max_steps: got 'many'",
        "warmup_ratio and warmup_steps contradict",
        "no strategy called 'lorra'",
        "did you mean 'lora'",
        "stages.a.strategies.distill.teacher: missing",
        "stages.a.strategies.distill.temperature: got -1.0",
        "stages.a.strategies.distill.alfa: unknown setting",
        "did you mean 'alpha'",
        "stages.a.training.seed: got -3",
        "two stages have this name",
        "'@b' does not come before this stage",
        "did you mean 'majority'",
        "stages.b.models: empty",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["training.max_steps=true"], "got True"),
        (["training.max_steps=0"], "max_steps: got 0"),
        (["training.max_steps=1.5"], "got 1.5"),
        (["training.max_steps=99999999999999999999"], "less than or equal to"),
        (["training.learning_rate=1e999"], "learning_rate"),
        (["training.learning_rate=.inf"], "learning_rate: got inf"),
        (["training.learning_rate=[]"], "an empty list"),
        (["training.learning_rate=[1e-3, 1e-3]"], "a value stands there twice"),
        (["training.optim=adamw"], "did you mean 'adamw_torch'"),
        (["training.lr_scheduler_type=cosin"], "did you mean 'cosine'"),
        (["training.report_to=wandbb"], "did you mean 'wandb'"),
        (["training.report_to=[none,wandb]"], "contradict"),
        (["training.momentum=0.9"], "momentum is a setting of sgd"),
        (["training.bf16=maybe"], "bf16: got 'maybe'"),
        (["training.bf16=true", "training.fp16=true"], "fp16 and bf16 contradict"),
        (["training.load_best_model_at_end=true", "training.eval_steps=0"], "contradict"),
        (["training=5"], "training: got 5"),
        (["data.validation_size=2.5"], "a whole number of rows"),
        (["data.labels=[a,a]"], "stands there twice"),
        (["data.labels=[]"], "an empty list"),
        (["data.drop=[dupes]"], "data.drop"),
        (["data.k_shot=0"], "data.k_shot: got 0"),
        (["data.seed=-1"], "data.seed: got -1"),
        (["data.path="], "data.path"),
        (["model.path=A", "model.config=B"], "path and config contradict"),
        (["model=null", "stages.source.model=null"], "no model"),
        (["model.dtype=int8"], "model.dtype: got 'int8'"),
        (["seeds=0"], "seeds: got 0"),
        (["seeds=3", "stages.student.seeds=2"], "has 3 seeds, this stage 2"),
        (["name=" + "x" * 500], "is no name for a recipe"),
        (["stages.source.train=report.html", "stages.student.strategies=[lora]", "model=DIR"], "is taken by a file"),
        (["stages=[]"], "stages: empty"),
        (["stages=5"], "stages: got 5"),
        (["stages=[{trian: a}]"], "did you mean 'train'"),
        (["stages=[{train: a, merge: b}]"], "one verb for each stage"),
        (["stages=[{train: 'a b'}]"], "no name for a stage"),
        (["stages.student.strategies=[lora, lora]"], "stands there twice"),
        (["stages.soup.method=ties_"], "no merge called 'ties_'"),
        (["task=image-clasification"], "did you mean 'image-classification'"),
        (["stages.student.strategies=[{lora: {r: 0}}]"], "lora.r: got 0"),
        (["stages.student.strategies=[{lora: 5}]"], "expected a mapping"),
    ],
)
def test_single_mistakes(arguments: list[str], part: str) -> None:
    found = mistakes(example(), *arguments)
    assert any(part in str(m) for m in found), [str(m) for m in found]
    assert all(m.exit_code == 2 and "\n" not in m.cause and len(m.cause) < 400 for m in found)


def test_references() -> None:
    base = Recipe(
        data="digits",
        model=Model(config="vit"),
        stages=[Train("a"), Ensemble("e", models=["@a"]), Evaluate("v", model="@e")],
    )
    assert mistakes(base) == []
    for text, part in (
        ("@b", "is no stage"),
        ("@e", "is an ensemble"),
        ("@v", "only evaluates"),
        ("@t", "does not come before this stage"),
    ):
        recipe = copy.deepcopy(base)
        recipe.given["stages"].append(Train("t", model=text))
        assert part in str(mistakes(recipe)), text
    recipe = copy.deepcopy(base)
    recipe.given["stages"].append(Train("t", strategies=[{"distill": {"teacher": "@e"}}]))
    recipe.given["stages"].append(Train("p", model=Model(config="@a", processor="@a")))
    assert mistakes(recipe) == []
    recipe.given["stages"].append(Evaluate("fresh", model=Model(config="vit")))
    assert "a fresh model has learned nothing" in str(mistakes(recipe))


def test_the_lists_of_names_are_those_of_the_libraries() -> None:
    import typing

    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from transformers import SchedulerType

    assert set(typing.get_args(Schedule)) == {s.value for s in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert {str(name) for name in LOGGER_TYPE_TO_CLASS} <= set(typing.get_args(Tracker))


WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    math.nan,
    math.inf,
    "",
    "x",
    "..",
    [],
    {},
    [1],
    {"a": 1},
    {1: 2},
    [[]],
    {"a": {"b": []}},
]


def test_no_recipe_crashes_the_check() -> None:
    """Whatever stands anywhere in a recipe is either right or a mistake."""
    draw = random.Random(0)
    for trial in range(400):
        raw = grammar.normalise(draw.choice([example, several])())
        for _ in range(draw.randint(1, 3)):
            node: Any = raw
            while True:
                key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
                if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
                    node = node[key]
                    continue
                if draw.random() < 0.2 and isinstance(node, dict):
                    del node[key]
                else:
                    node[key] = copy.deepcopy(draw.choice(WRONG))
                break
            if not raw:
                break
        collect = Collector()
        try:
            before = copy.deepcopy(raw)
            grammar.resolve(grammar.normalise(raw), collect)
        except KtError:
            continue
        except Exception as error:
            raise AssertionError(f"trial {trial}: {before!r}") from error


# --- torch ---

SCRIPT = """
import sys
from kt_hf import Data, Model, Recipe, Train, main
recipe = Recipe(data=Data("digits"), model=Model(config="vit"), stages=[Train("a", {strategies})])
try:
    main(recipe, {arguments})
except SystemExit as stop:
    heavy = [m for m in ("torch", "transformers", "datasets", "kt_hf_plugins.lora") if m in sys.modules]
    print("EXIT", stop.code, *heavy)
"""


def script(strategies: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(strategies=strategies, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_grammar_and_names_are_checked_without_torch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script('["lorra"]', "training.max_step=1", "seeds=0", "--output-dir", str(out))
    assert done.stdout.split() == ["EXIT", "2"], done
    assert "3 mistakes in the recipe" in done.stderr and "Traceback" not in done.stderr
    facts = json.loads((out / "error.json").read_text())
    assert facts["code"] == 2 and len(facts["mistakes"]) == 3
    assert all(m["cause"] and m["remedy"] for m in facts["mistakes"])


def test_plugins_settings_are_checked_before_data_and_with_the_rest(tmp_path: Path) -> None:
    done = script('[{"lora": {"rr": 1}}]', "seeds=0", "data.path=nowhere/at/all", "--output-dir", str(tmp_path / "out"))
    assert done.stdout.split()[:2] == ["EXIT", "2"], done
    assert "seeds: got 0" in done.stderr and "stages.a.strategies.lora.rr: unknown setting" in done.stderr


def test_importing_and_building_recipes_is_cheap() -> None:
    code = "import sys, runpy; runpy.run_path('recipes/quickstart.py'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "recipes").glob("*.py")))
def test_recipes_have_no_mistakes(name: str) -> None:
    import runpy

    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["recipe"]
    assert mistakes(recipe) == []
    assert recipe.name
