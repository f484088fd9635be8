"""`Train(search=...)`: what may be searched, which trials that gives, and that the best on validation data is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import VIT
from test_recipe import changed, mistakes, raw_of

from kt_hf import Data, Ensemble, Evaluate, Model, Recipe, Strategy, Train, launch, register, run, search, trainer
from kt_hf.errors import NonFiniteError, RecipeError

RATES = [1e-2, 1e-4]
QUICK = {"max_steps": 6, "per_device_train_batch_size": 16, "eval_steps": 3, "report_to": "none", "num_threads": 1}


@register("strategy", "pull")
class Pull(Strategy):
    """Adds `strength` times the size of the logits; an infinite one where `broken`."""

    def __init__(self, *, strength: float = 0.0, broken: bool = False):
        super().__init__()
        self.strength, self.broken = strength, broken

    def describe(self) -> str:
        return f"pulls by {self.strength}"

    def loss(self, step):
        size = step.mean(step.outputs.logits.abs().mean(-1))
        return {"size": size * (float("inf") if self.broken else self.strength)}


def recipe(tried: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    given: dict[str, Any] = {"strategies": ["finetune", "pull"], "search": tried, "seeds": 2, **changes}
    data = given.pop("data", Data("digits", "target", k_shot=4, max_examples={"validation": 60, "test": 40}))
    return Recipe([Train("a", **given)], data=data, model=Model(config="vit", config_overrides=VIT), training=QUICK)


def of(found: dict[str, Any], **settings: Any) -> Any:
    """The stage of a recipe whose search is that."""
    return changed(recipe(found, **settings)).stages[0]


# --- the grammar ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tried", "cause", "remedy"),
    [
        ({"training.learning_rat": [1]}, "search.training.learning_rat: unknown setting", "'learning_rate'"),
        ({"training.learning_rate": [1e-3, -1]}, "search.training.learning_rate: got -1", "greater than 0"),
        ({"training.learning_rate": 1e-3}, "search.training.learning_rate: got 0.001", "a list of values"),
        ({"training.learning_rate": []}, "an empty list", "values to try"),
        ({"training.learning_rate": [1e-3, 1e-3]}, "stands there twice", "once"),
        ({"training.learning_rate": [[1e-3, 1e-2]]}, "a list in a list", "one list"),
        ({"training.seed": [1, 2]}, "trials share seed", "valid:"),
        ({"task": ["a", "b"]}, "search.task: this is no setting to choose", "share task, data"),
        ({"data.path": ["a", "b"]}, "search.data.path: this is no setting to choose", "share task, data"),
        ({"strategies.finetun.freeze_layers": [1]}, "no strategy 'finetun'", "'finetune'"),
        ({"strategies.finetune": [1]}, "this is no setting to choose", "strategies.NAME.SETTING"),
        ({"training.weight_decay": {"low": 0, "high": 1}}, "how often", "trials=8"),
        ({"training.weight_decay": {"low": 0, "high": 1, "log": True}, "trials": 2}, "got {'low': 0", "low > 0"),
        ({"training.weight_decay": {"low": 2, "high": 1}, "trials": 2}, "got {'low': 2", "low < high"),
        ({"training.weight_decay": {"low": -1, "high": 1}, "trials": 2}, "weight_decay: got -1", "greater"),
        ({"training.weight_decay": [0.1], "trials": 0}, "search.trials: got 0", "1 to 256"),
        ({"training.max_steps": list(range(1, 300))}, "299 combinations, more than 256", "trials=16"),
        ({"training.max_steps": [5], "training.num_train_epochs": [1.0]}, "replaces what another", "leave one"),
        ({"training.warmup_ratio": [0.0, 0.1], "training.warmup_steps": [0, 3]}, "replaces what another", "leave one"),
        ({"training.optim": ["sgd", "adamw_torch"], "training.momentum": [0.9]}, "momentum and optim=adamw", "sgd"),
    ],
)
def test_mistakes_are_named_before_anything_is_imported(tried, cause, remedy):
    found = mistakes(recipe(tried))
    assert any(cause in m.cause and remedy in m.remedy for m in found), [str(m) for m in found]
    assert all(m.cause.startswith("stages.a.search") for m in found)


def test_all_mistakes_come_together():
    tried = {"training.lerning_rate": [1], "strategies.lora.r": [4], "data.name": ["x"], "trials": "many"}
    assert len(mistakes(recipe(tried))) == 4


@pytest.mark.parametrize("rate", [[1e-3, 1e-2], "auto"])
def test_one_choice_of_the_rate_is_enough(rate):
    training = {"learning_rate": rate}
    found = mistakes(recipe({"training.learning_rate": [1e-3, 1e-2]}, training=training))
    assert ["contradict" in m.cause for m in found] == [True]
    assert not mistakes(recipe({"training.weight_decay": [0.0, 0.1]}, training={"learning_rate": [1e-3]}))


@pytest.mark.parametrize(
    ("tried", "told"),
    [
        ({"strategies.finetune.freeze_layer": [1]}, "search.strategies.finetune.freeze_layer: unknown setting"),
        ({"strategies.finetune.freeze_layers": [0, -2]}, "search.strategies.finetune.freeze_layers: got -2"),
        ({"strategies.finetune.freeze_layers": [0, 9]}, "freeze_layers: got 9, the backbone has 4"),
    ],
)
def test_settings_of_strategies_are_checked_before_training(tried, told, tmp_path):
    with pytest.raises(RecipeError, match=told):
        run(recipe(tried), tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


def test_without_labelled_validation_rows_nothing_is_chosen(tmp_path):
    from test_merging import shapes

    folder = Path(shapes(tmp_path / "data", {}))
    datasets.Dataset.from_parquet(str(folder / "validation.parquet")).remove_columns("label").to_parquet(
        str(folder / "validation.parquet")
    )
    for given in ({"tried": {"training.learning_rate": RATES}}, {"training": {"learning_rate": RATES}}):
        with pytest.raises(RecipeError, match="needs labelled validation rows"):
            run(recipe(**given, data=Data(str(folder))), tmp_path / "out")


def test_the_command_line_adds_changes_and_takes_away():
    tried = {"training.learning_rate": RATES, "strategies.finetune.freeze_layers": [0, 1]}
    nested = {"training": {"learning_rate": RATES}, "strategies": {"finetune": {"freeze_layers": [0, 1]}}}
    assert raw_of(recipe(tried))["stages"][0]["search"] == nested
    fewer = changed(recipe(tried), "training.learning_rate=1e-3").stages[0]
    assert search.axes(fewer.search) == {"strategies.finetune.freeze_layers": [0, 1]}
    assert changed(recipe(tried), "stages.a.training.learning_rate=1e-3").stages[0].search == fewer.search
    more = changed(recipe(tried), "stages.a.search.strategies.pull.strength=[0.1, 0.2]", "stages.a.search.trials=3")
    more = more.stages[0]
    assert len(search.axes(more.search)) == 3 and len(search.trials(more)) == 3
    assert len(search.trials(changed(recipe(), "stages.a.search.strategies.pull.strength=[1, 2]").stages[0])) == 2


# --- the trials -------------------------------------------------------------------------------------------------------


def test_a_grid_is_tried_in_its_order():
    stage = of({"training.learning_rate": [1e-3, 1e-2], "strategies.finetune.freeze_layers": [0, 2]})
    assert [tuple(t.values()) for t in search.trials(stage)] == [(1e-3, 0), (1e-3, 2), (1e-2, 0), (1e-2, 2)]
    assert search.trials(of({}, training={"learning_rate": [1e-3]})) == [{"training.learning_rate": 1e-3}]
    assert search.trials(changed(recipe()).stages[0]) == [{}]


def test_draws_are_distinct_within_their_ranges_and_follow_from_the_seed():
    tried = {
        "training.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "training.weight_decay": {"low": 0.0, "high": 1.0},
        "strategies.finetune.freeze_layers": {"low": 0, "high": 2},
        "training.optim": ["sgd", "adamw_torch"],
        "trials": 40,
    }
    found = search.trials(of(tried))
    assert len({json.dumps(t) for t in found}) == 40 and found == search.trials(of(tried))
    assert found != search.trials(of(tried, training={"seed": 7}))
    rates = [t["training.learning_rate"] for t in found]
    assert all(1e-5 <= r <= 1e-1 for r in rates) and sum(r < 1e-3 for r in rates) in range(10, 31), "half of them"
    assert {t["strategies.finetune.freeze_layers"] for t in found} == {0, 1, 2}
    assert all(isinstance(t["training.weight_decay"], float) for t in found)
    few = {"training.max_steps": {"low": 1, "high": 3}, "training.optim": ["sgd", "adafactor"], "trials": 4}
    assert len(search.trials(of(few))) == 4 and len(search.trials(of({**few, "trials": 9}))) == 6


def test_a_trial_is_the_stage_with_other_settings():
    stage = of({"training.num_train_epochs": [1.0, 2.0], "strategies.pull.strength": ["0.5"]})
    given = {("a", "strategy:pull"): {"strength": 0.0, "broken": False}, ("a", "strategy:finetune"): {}}
    trial, settings = search.apply(stage, given, search.trials(stage)[1])
    assert (trial.training.num_train_epochs, trial.training.max_steps) == (2.0, -1), "epochs take the steps' place"
    assert settings["a", "strategy:pull"] == {"strength": 0.5, "broken": False}, "converted as typed in"
    assert stage.training.max_steps == 6 and given["a", "strategy:pull"]["strength"] == 0.0


# --- whole runs -------------------------------------------------------------------------------------------------------

TRIED = {"training.learning_rate": RATES, "strategies.pull.strength": [5.0, 0.0]}


def untimed(value: Any) -> Any:
    from kill_harness import without_timings

    return without_timings(value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("search") / "out"
    return folder, run(recipe(TRIED), folder)


def test_the_best_on_validation_data_is_kept_for_all_seeds(searched, tmp_path):
    folder, report = searched
    entry = report["stages"][0]
    first, second = entry["trials"]
    assert first == second and [t["chosen"] for t in first].count(True) == 1 and len(first) == 4
    best = next(t for t in first if t["chosen"])
    assert best["validation"] == max(t["validation"] for t in first) > min(t["validation"] for t in first)
    pull = {"pull": {"strength": best["settings"]["strategies.pull.strength"]}}
    rate = {"learning_rate": best["settings"]["training.learning_rate"]}
    again = run(recipe(None, strategies=["finetune", pull], training=rate), tmp_path / "typed")
    assert files(folder / "a") == files(tmp_path / "typed" / "a"), "both seeds, bit for bit"
    assert again["stages"][0]["metrics"] == entry["metrics"]


def test_every_trial_scores_what_its_settings_score(searched, tmp_path):
    """The score is that of the exported model on validation data."""
    trial = searched[1]["stages"][0]["trials"][0][0]
    strength = trial["settings"]["strategies.pull.strength"]
    alone = recipe(
        None,
        strategies=["finetune", {"pull": {"strength": strength}}],
        training={"learning_rate": trial["settings"]["training.learning_rate"]},
        seeds=1,
    )
    found = run(alone, tmp_path / "out")["stages"][0]["curves"][0]["evaluation"][-1]
    assert found["step"] == 6 and found["accuracy"] == trial["validation"]


def test_report_page_and_card_show_the_trials(searched):
    folder, report = searched
    entry = report["stages"][0]
    best = next(t for t in entry["trials"][0] if t["chosen"])
    assert entry["settings"]["search"] == {k: list(v) for k, v in TRIED.items()}
    assert entry["settings"]["training"]["learning_rate"] == best["settings"]["training.learning_rate"]
    assert entry["settings"]["pull"]["strength"] == best["settings"]["strategies.pull.strength"]
    assert any("pulls by" in line for line in entry["description"])
    vain = sum(t["seconds"] for t in entry["trials"][0] if not t["chosen"])
    assert entry["cost"]["trials_seconds"] == pytest.approx(vain)
    assert any("to choose the settings of a" in note for note in report["notes"])
    page = (folder / "report.html").read_text()
    assert "Settings tried" in page and "pull.strength" in page and page.count("chosen") >= 1
    card = (folder / "a" / "model" / "README.md").read_text()
    assert "search:" in card and "strategies.pull.strength" in card
    assert not (folder / "a" / "trials").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [9, 12, 16], ids=["within trial 2", "at its end", "within trial 3"])
def test_killed_within_a_search_and_continued_equals_never_killed(at, searched, tmp_path, monkeypatch):
    """Trials have 6 steps; every 2 of them are saved."""
    real, done = trainer.Trainer.step, []

    def step(self, *given):
        if len(done) == at:
            raise Killed
        done.append(self.run_facts.folder.name)
        return real(self, *given)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    saving = {**QUICK, "save_steps": 2}
    whole = recipe(TRIED)
    whole.given["training"] = saving
    with pytest.raises(Killed):
        run(whole, tmp_path / "out")
    made, at = len(done), 10**6
    report = run(whole, tmp_path / "out")
    rest = done[made:]
    assert "1-of-4" not in rest, "a finished trial is run again"
    lost = made % 6 % 2
    assert len(rest) == 5 * 6 - made + lost, "more than the steps since the last checkpoint were made again"
    assert (
        files(tmp_path / "out" / "a").items()
        >= {k: v for k, v in files(searched[0] / "a").items() if "checkpoints" not in k}.items()
    )
    mine, theirs = (untimed(r["stages"][0]) for r in (report, searched[1]))
    assert mine["trials"] == theirs["trials"] and mine["metrics"] == theirs["metrics"]
    assert mine["curves"] == theirs["curves"]


def test_a_trial_that_is_not_finite_loses(tmp_path):
    report = run(recipe({"strategies.pull.broken": [True, False]}, seeds=1), tmp_path / "out")
    broken, whole = report["stages"][0]["trials"][0]
    assert broken["validation"] is None and "non-finite at step 1" in broken["failed"] and whole["chosen"]
    assert "not finite" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(NonFiniteError, match="none of 2 trials") as caught:
        tried = {"strategies.pull.broken": [True], "training.learning_rate": RATES}
        run(recipe(tried, seeds=1), tmp_path / "none")
    assert caught.value.exit_code == 7


def test_lower_may_be_better_and_the_first_of_equals_is_taken():
    from kt_hf.stages import _best

    assert _best([0.2, 0.5, 0.5], True) == 1 and _best([None, 3.0, 2.0, 2.0], False) == 2
    assert _best([None, None], True) is None


def test_a_list_of_learning_rates_is_a_search(tmp_path):
    listed = run(recipe(None, training={"learning_rate": RATES}, seeds=1), tmp_path / "a")["stages"][0]
    spelled = run(recipe({"training.learning_rate": RATES}, seeds=1), tmp_path / "b")["stages"][0]
    assert untimed(listed["trials"]) == untimed(spelled["trials"]) and listed["metrics"] == spelled["metrics"]
    assert files(tmp_path / "a" / "a" / "model") == files(tmp_path / "b" / "a" / "model")
    assert listed["settings"]["search"] == {"training.learning_rate": RATES}


def test_a_trial_that_stopped_early_is_taken_from_where_it_stopped(tmp_path):
    """Nothing is learned with this rate: the first evaluation is the best, the third one ends the training."""
    training = {"max_steps": 12, "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    tried = {"strategies.pull.strength": [0.0, 1.0]}
    report = run(recipe(tried, training={**training, "learning_rate": 1e-9}, seeds=1), tmp_path / "out")
    entry = report["stages"][0]
    evaluations = entry["curves"][0]["evaluation"]
    assert [point["step"] for point in evaluations] == [1, 2, 3] and entry["cost"]["optimizer_steps"] == 3
    assert entry["trials"][0][0]["chosen"] and entry["trials"][0][0]["validation"] == evaluations[0]["accuracy"]


def test_the_plan_tells_trials_and_steps(tmp_path, capsys):
    tried = {"training.max_steps": [4, 6], "strategies.pull.strength": [0.0, 1.0]}
    options = launch.parser().parse_intermixed_args(["--print", "--output-dir", str(tmp_path / "out")])
    launch.execute(recipe(tried), options, "r")
    out = capsys.readouterr().out
    assert "search: the best of 4 trials on validation data, 20 steps in all" in out
    assert "training.max_steps of [4, 6]" in out and not (tmp_path / "out").exists()


def test_progress_says_which_trial(tmp_path, caplog):
    with caplog.at_level("INFO", "kt_hf"):
        launch.set_up_logging(False)
        import logging

        logging.getLogger("kt_hf").propagate = True
        run(recipe({"strategies.pull.strength": [0.0, 1.0, 2.0]}, seeds=1), tmp_path / "out")
    said = [r.getMessage() for r in caplog.records]
    assert any("a trial 2 of 3: strength 1: accuracy" in line for line in said), said


@pytest.mark.slow
def test_two_ranks_choose_what_one_process_chooses(tmp_path):
    """With a fusion of two trained models with other classes behind it, evaluated again."""
    one = run(whole_recipe(32), tmp_path / "one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    for mine, theirs in zip(one["stages"], two["stages"], strict=True):
        assert [t["settings"] for t in mine["trials"][0] if t["chosen"]] == [
            t["settings"] for t in theirs["trials"][0] if t["chosen"]
        ]
        for name, found in mine["metrics"].items():
            assert theirs["metrics"][name]["value"] == pytest.approx(found["value"], abs=1e-6), (mine["name"], name)
        assert mine["summary"].keys() == theirs["summary"].keys()
        for key, values in mine["summary"].items():
            assert values == pytest.approx(theirs["summary"][key], rel=1e-3, abs=1e-3), (mine["name"], key)


def whole_recipe(batch: int) -> Recipe:
    """Of four classes; rows that do not divide by two."""
    names, few = ["zero", "one", "two", "three"], {"validation": 61, "test": 43}
    data = {
        "low": Data("digits", "source", labels=names[:2], max_examples=few),
        "high": Data("digits", "source", labels=names[2:], max_examples=few),
        "both": Data("digits", "source", labels=names[::-1], max_examples=few),
    }
    stages = [
        Train("low", data="low", search={"training.learning_rate": [1e-5, 1e-2]}),
        Train("high", data="high", search={"strategies.finetune.freeze_layers": [2, 0]}, seeds=1),
        Ensemble("mixed", {"mean": {"weights": "fit"}}, data="both", models=["@low", "@high"]),
        Ensemble("fused", "weighted", data="both", models=["@low", "@high"]),
        Evaluate("again", data="both", model="@fused"),
    ]
    model = Model(config="vit", config_overrides=VIT)
    training = {**QUICK, "per_device_train_batch_size": batch, "learning_rate": 1e-2, "adam_epsilon": 1e-4}
    return Recipe(stages, data=data, model=model, training={**training, "max_steps": 15})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(whole_recipe(16), sys.argv[1])
