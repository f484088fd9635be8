"""The report's dict: gains, sentences, refusals, notes and the table of the terminal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import synthetic_evidence as synthetic

from kt_hf import evidence
from kt_hf.errors import RecipeError


@pytest.fixture(scope="module")
def large():
    return evidence.build("large", synthetic.large(), seconds=12.5, versions={"kt_hf": "0.1.0"}, replicates=300)


def stage(report, name):
    return next(s for s in report["stages"] if s["name"] == name)


def own_gain(report, name, baseline):
    entry = stage(report, name)
    return next(g for g in entry["gains"] if g["baseline"] == baseline and g["metric"] == entry["metric"])


def test_report_is_json_with_a_schema(large):
    assert large["schema"] == "kt_hf.report/1"
    assert json.loads(json.dumps(large, allow_nan=False)) == large
    first = stage(large, "scratch")
    assert first["metrics"]["accuracy"]["seeds"] == 3 and len(first["metrics"]["accuracy"]["per_seed"]) == 3
    assert first["cost"]["per_seed"]["seconds"] == pytest.approx([12.0, 12.36, 12.72])
    assert first["cost"]["seconds"] == pytest.approx(12.36)
    assert first["cost"]["trials_seconds"] == pytest.approx(8.0)  # the chosen one of three is the run itself
    assert len(first["curves"]) == 3 and first["curves"][0]["training"][0]["step"] == 10


def test_verdicts_of_planted_cases():
    scratch = synthetic.stage("scratch", 0.80)
    again = synthetic.stage("again", 0.80, compare=["@scratch"])
    again.seeds = scratch.seeds
    worse = synthetic.stage("worse", 0.65, compare=["@scratch"])
    better = synthetic.stage("better", 0.92, compare=["@scratch"])
    alone = synthetic.stage("alone", 0.92, seeds=1, compare=["@scratch"])
    report = evidence.build("planted", [scratch, again, worse, better, alone], replicates=500)
    found = {name: own_gain(report, name, "@scratch") for name in ("again", "worse", "better", "alone")}
    assert {k: g["verdict"] for k, g in found.items()} == {
        "again": "no evidence",
        "worse": "hurt",
        "better": "helped",
        "alone": "one seed: no claim",
    }
    assert (found["again"]["value"], found["again"]["low"], found["again"]["high"]) == (0, 0, 0)
    assert found["again"]["sentence"].startswith("again and scratch are equal in accuracy")
    assert found["better"]["sentence"].startswith("better beats scratch by ")
    assert "points of accuracy (95 % interval " in found["better"]["sentence"]
    assert found["better"]["sentence"].endswith(", 3 seeds, 597 test examples): helped.")
    assert found["worse"]["sentence"].startswith("worse trails scratch by ")


def test_lower_is_better_is_said_right():
    stages = [synthetic.perplexity_stage("base", 0.0), synthetic.perplexity_stage("tuned", -0.3, compare=["@base"])]
    stages.append(synthetic.perplexity_stage("spoilt", 0.2, compare=["@base"]))
    report = evidence.build("lm", stages, replicates=300)
    tuned, spoilt = own_gain(report, "tuned", "@base"), own_gain(report, "spoilt", "@base")
    assert tuned["value"] < 0 and tuned["verdict"] == "helped" and "tuned lowers perplexity by" in tuned["sentence"]
    assert spoilt["value"] > 0 and spoilt["verdict"] == "hurt" and "spoilt raises perplexity by" in spoilt["sentence"]
    loss = next(g for g in stage(report, "tuned")["gains"] if g["metric"] == "loss")
    assert loss["verdict"] == "helped" and not loss["higher_is_better"]


def test_classes_and_confusion(large):
    best = stage(large, "finetune")
    counts = np.array(best["confusion"]["counts"])
    assert counts.sum() == 3 * 597
    right = [row["value"] for row in best["per_class"]]
    assert np.diag(counts) / counts.sum(1) == pytest.approx(right)
    gain = own_gain(large, "finetune", "@scratch")["per_class"]
    scratch = [row["value"] for row in stage(large, "scratch")["per_class"]]
    assert [row["value"] for row in gain] == pytest.approx(np.array(right) - scratch)
    assert sum(row["examples"] for row in gain) == 597
    assert stage(large, "finetune")["baselines"]["majority"]["confusion"] is not None


def test_notes_say_what_a_reader_must_know(large):
    notes = "\n".join(large["notes"])
    assert "Validation labels were used to choose the learning rate of scratch, finetune" in notes
    assert "No comparison with zero_shot, because the model has no trained head" in notes
    assert "One seed only: uniform_soup, greedy_soup and mean" in notes and "outside" not in notes
    assert "comparisons were made" in notes and "Unequal tuning" not in notes


def test_unequal_choice_of_learning_rates_is_noted():
    scratch = synthetic.stage("scratch", 0.8, trials=False)
    report = evidence.build("unequal", [scratch, synthetic.stage("tuned", 0.8, compare=["@scratch"])], replicates=50)
    told = "Unequal tuning: tuned had 3 learning rates to choose from, scratch had 1 learning rate to choose from"
    assert any(told in n and "not fair" in n for n in report["notes"])


def test_as_many_other_settings_are_noted_as_such():
    scratch, tuned = synthetic.stage("scratch", 0.8), synthetic.stage("tuned", 0.8, compare=["@scratch"])
    for i, trial in enumerate(trial for seed in tuned.seeds for trial in seed.trials):
        trial["settings"] = {"strategies.finetune.freeze_layers": i % 3}
    report = evidence.build("other", [scratch, tuned], replicates=50)
    told = "tuned had 3 settings to choose from, scratch had 3 learning rates to choose from, not the same"
    assert any(told in n and "in their number alone" in n for n in report["notes"])
    assert any("the learning rate of scratch and the settings of tuned" in n for n in report["notes"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: setattr(s, "task", "TextClassification"), "task: ImageClassification and TextClassification"),
        (lambda s: s.data.update(fingerprint="other"), r"data \(fingerprint\)"),
        (lambda s: [setattr(x, "index_N", x.index_N + 1) for x in s.seeds], "evaluation rows: 50 and 50; 2 rows"),
        (lambda s: [setattr(x, "index_N", x.index_N[::-1]) for x in s.seeds], "their order"),
        (lambda s: setattr(s, "seeds", s.seeds[:2]), r"seeds: \[0, 1, 2\] and \[0, 1\]"),
        (lambda s: setattr(s, "metric", "macro_f1"), "metric: accuracy and macro_f1"),
        (lambda s: setattr(s, "labels", ["x", *s.labels[1:]]), "labels: x, zero"),
    ],
)
def test_a_baseline_of_another_question_is_refused(change, told):
    scratch = synthetic.stage("scratch", 0.8, num_examples=50)
    change(scratch)
    with pytest.raises(RecipeError, match=told) as error:
        evidence.build(
            "x", [scratch, synthetic.stage("tuned", 0.8, num_examples=50, compare=["@scratch"])], replicates=20
        )
    assert "'tuned' and 'scratch' differ in" in error.value.cause


def test_an_unknown_baseline_is_refused():
    with pytest.raises(RecipeError, match="no stage 'nobody'"):
        evidence.build("x", [synthetic.stage("a", 0.8, compare=["@nobody"])], replicates=20)


def test_one_seed_of_a_trained_baseline_allows_no_claim_and_a_fixed_one_does():
    three = synthetic.stage("three", 0.9, compare=["@single", "@outside"])
    single = synthetic.stage("single", 0.6, seeds=1)
    outside = synthetic.stage("outside", 0.6, seeds=1, kind="evaluate", lineage={"model": "org/model"})
    report = evidence.build("x", [single, outside, three], replicates=100)
    assert own_gain(report, "three", "@single")["verdict"] == "one seed: no claim"
    assert own_gain(report, "three", "@outside")["verdict"] == "helped"


def test_a_metric_that_is_not_finite_costs_no_report():
    broken = synthetic.perplexity_stage("broken", 0.0)
    for seed in broken.seeds:
        seed.examples = {"loss": (np.full(150, np.nan), None)}
        seed.metrics = {**seed.metrics, "loss": float("inf")}
    report = evidence.build("x", [broken], replicates=20)
    assert stage(report, "broken")["metrics"]["loss"]["value"] is None
    assert any("No interval of loss" in n for n in report["notes"])
    json.dumps(report, allow_nan=False)


def test_scalars_without_examples_have_a_value_and_no_interval():
    plain = evidence.SeedEvidence(0, np.arange(40), {"recall": 0.25})
    one = evidence.StageEvidence("s", "evaluate", "T", {"name": "d"}, "recall", True, [plain], compare=["majority"])
    report = evidence.build("x", [one])
    found = stage(report, "s")["metrics"]["recall"]
    assert (found["value"], found["low"]) == (0.25, None)
    assert "No comparison with majority, because it was not measured: s." in report["notes"]
    assert "25.0" in evidence.table(report)


def test_table_fits_a_terminal(large):
    text = evidence.table(large)
    assert max(len(line) for line in text.splitlines()) <= 122
    assert "finetune" in text and "@scratch" in text and "helped" in text and "no claim" in text


@pytest.mark.parametrize(
    ("value", "unit", "signed", "text"),
    [
        (0.0513, "share", False, "5.1"),
        (-0.0001, "share", True, "-0.01"),
        (12.345, "", False, "12.3"),
        (0.01234, "", True, "+0.0123"),
    ],
)
def test_amounts(value, unit, signed, text):
    assert evidence.amount(value, unit, signed).lstrip("+") == text.lstrip("+")
