"""Parents with other heads, a base without one, how near parents are, and what is measured beside a merge."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from helpers import VIT
from safetensors.torch import load_file, save_file
from test_merging import FAST, shapes
from test_timm import saved_by_timm
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    T5Config,
    WhisperConfig,
)

from kt_hf import Data, Merge, Model, Recipe, Train, beside, cli, heads, kinship, merge_command, run, trial
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.folder import finished

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A bare base, and three that were trained from it, each with a head of its own; and a stranger."""
    root = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES))
    base.save_pretrained(root / "base")
    for name, count in (("mood", 2), ("news", 4), ("kind", 6)):
        names = {i: f"{name}{i}" for i in range(count)}
        model = BertForSequenceClassification(
            BertConfig(**SIZES, id2label=names, label2id={v: k for k, v in names.items()})
        )
        model.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.bert.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
    BertModel(BertConfig(**SIZES)).save_pretrained(root / "stranger")
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model.safetensors"))


def test_backbones_merge_and_one_head_is_kept(bert, tmp_path):
    models = [str(bert / name) for name in ("mood", "news", "kind")]
    with pytest.raises(RecipeError, match="differ in their labels") as refused:
        merge_command.merge("uniform_soup", models, tmp_path / "out")
    assert "--head all" in refused.value.remedy
    merge_command.merge("uniform_soup", models, tmp_path / "out", head="news")
    found, parents = weights(tmp_path / "out"), [weights(Path(m)) for m in models]
    assert found.keys() == parents[1].keys()
    for name, tensor in found.items():
        kept = name.startswith("classifier")
        wanted = parents[1][name] if kept else torch.stack([p[name] for p in parents]).mean(0)
        torch.testing.assert_close(tensor, wanted, rtol=0 if kept else 1e-6, atol=0 if kept else 1e-7)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert list(loaded.config.id2label.values()) == [f"news{i}" for i in range(4)]


def test_all_heads_are_kept_over_a_base_without_one(bert, tmp_path):
    models = [str(bert / name) for name in ("mood", "news", "kind")]
    line = ["merge", "task_arithmetic", "--models", *models, "--base", str(bert / "base"), "scaling=0.5"]
    assert cli.main([*line, "--head", "all", "--output", str(tmp_path / "out")]) == 0
    start, parents = weights(bert / "base"), [weights(Path(m)) for m in models]
    for i, name in enumerate(("mood", "news", "kind")):
        found = weights(tmp_path / "out" / name)
        assert found.keys() == parents[i].keys()
        assert torch.equal(found["classifier.weight"], parents[i]["classifier.weight"])
        key = "encoder.layer.1.output.dense.weight"
        moved = sum(p[f"bert.{key}"] - start[key] for p in parents)
        torch.testing.assert_close(found[f"bert.{key}"], start[key] + 0.5 * moved)


def test_a_bare_backbone_may_be_a_parent(bert, tmp_path):
    merge_command.merge("uniform_soup", [str(bert / "base"), str(bert / "mood")], tmp_path / "out", head="mood")
    found, bare, whole = weights(tmp_path / "out"), weights(bert / "base"), weights(bert / "mood")
    for name, tensor in found.items():
        other = bare.get(name.removeprefix("bert."), whole[name])
        torch.testing.assert_close(tensor, (other + whole[name]) / 2)


CLIP = {
    "text_config": {**SIZES, "num_hidden_layers": 1},
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 16, "patch_size": 8},
    "projection_dim": 8,
}
WHISPER = {"d_model": 16, "vocab_size": 60, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 60}


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        ("CLIPForImageClassification", CLIPConfig(**CLIP), ["classifier"]),
        ("WhisperForAudioClassification", WhisperConfig(**WHISPER), ["projector", "classifier"]),
        ("T5ForQuestionAnswering", T5Config(**T5), ["qa_outputs"]),
        ("T5ForTokenClassification", T5Config(**T5), ["classifier"]),
        ("ResNetForImageClassification", ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8), ["classifier"]),
        ("timm", None, ["fc"]),
    ],
)
def test_heads_are_known_by_the_class_where_no_prefix_tells(tmp_path, kind, config, head):
    """Of equal shapes, too: labels that differ are not averaged."""
    folders = {}
    for i, labels in enumerate(
        (["a", "b"], ["c", "d"], ["e", "f"] if kind == "T5ForQuestionAnswering" else list("efg"))
    ):
        torch.manual_seed(i)
        folders[labels[0]] = tmp_path / labels[0]
        if config is None:
            saved_by_timm(tmp_path / labels[0], labels, seed=i)
            continue
        own = copy.deepcopy(config)
        own.id2label, own.label2id = dict(enumerate(labels)), {name: j for j, name in enumerate(labels)}
        getattr(transformers, kind)(own).save_pretrained(tmp_path / labels[0])
    merge_command.merge("uniform_soup", list(map(str, folders.values())), tmp_path / "out", head="c")
    found, parents = weights(tmp_path / "out"), [weights(f) for f in folders.values()]
    kept = {n for n in found if n.startswith(tuple(f"{h}." for h in head))}
    assert kept and found.keys() == parents[1].keys()
    for name, tensor in found.items():
        if name in kept:
            assert torch.equal(tensor, parents[1][name]), name
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([p[name] for p in parents]).mean(0), msg=name)


def test_labels_that_differ_need_a_head_that_is_known(tmp_path):
    for i, label in enumerate("ab"):
        CLIPModel(CLIPConfig(**CLIP, id2label={0: label})).save_pretrained(tmp_path / str(i))
    with pytest.raises(RecipeError, match="is its head is not known, and labels differ"):
        merge_command.merge("uniform_soup", [str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "out", head="0")


def test_the_head_is_named_as_a_parent_is():
    assert heads.place("news", ["a/mood", "a/news/"]) == heads.place("@news", ["@mood", "@news"]) == 1
    for name in ("newz", "x"):
        with pytest.raises(RecipeError, match="names none of the parents"):
            heads.place(name, ["a/x", "b/x", "news"])


def test_backbones_of_other_shapes_are_refused_with_a_head(bert, tmp_path):
    other = BertForSequenceClassification(BertConfig(**{**SIZES, "intermediate_size": 32}))
    other.save_pretrained(tmp_path / "wide")
    with pytest.raises(RecipeError, match=r"bert.encoder.layer.0.intermediate.dense.bias is \[24\] in"):
        merge_command.merge("uniform_soup", [str(bert / "mood"), str(tmp_path / "wide")], tmp_path / "o", head="mood")
    assert not (tmp_path / "o").exists()


def test_settings_that_decide_are_refused_and_others_told(bert, tmp_path, caplog):
    for name, change in (("heads", {"num_attention_heads": 4}), ("eps", {"layer_norm_eps": 1e-6})):
        settings = json.loads((bert / "mood" / "config.json").read_text()) | change
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        (tmp_path / name / "model.safetensors").write_bytes((bert / "mood" / "model.safetensors").read_bytes())
    with pytest.raises(RecipeError, match="num_attention_heads is 2 and 4"):
        merge_command.merge("uniform_soup", [str(bert / "mood"), str(tmp_path / "heads")], tmp_path / "out")
    merge_command.merge("uniform_soup", [str(bert / "mood"), str(tmp_path / "eps")], tmp_path / "out")
    assert "layer_norm_eps: 1e-12 and 1e-06" in caplog.text


def test_strangers_are_told_and_kin_are_not(bert, tmp_path, caplog):
    merge_command.merge("uniform_soup", [str(bert / "base"), str(bert / "stranger")], tmp_path / "out")
    assert "do not seem to come from one model" in caplog.text and "stranger' (cosine" in caplog.text
    caplog.clear()
    said = merge_command.merge("uniform_soup", [str(bert / "mood"), str(bert / "mood")], tmp_path / "kin")
    assert "do not seem" not in caplog.text and "0 to 0 % from their mean" in said


def test_a_dry_run_shows_layers_and_writes_nothing(bert, tmp_path, capsys):
    models = [str(bert / name) for name in ("mood", "news")]
    line = ["merge", "ties", "--models", *models, "--base", str(bert / "base"), "--head", "mood", "--dry-run"]
    assert cli.main([*line, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "bert.encoder.layer.1" in shown and "nothing was written" in shown and not list(tmp_path.iterdir())


def test_kinship_is_what_plain_algebra_says():
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(40, 30, generator=generator, dtype=torch.float64)

    base, one, two = draw(), draw(), draw()
    models = [{"h.0.w.weight": base + 0.1 * one}, {"h.0.w.weight": base + 0.3 * two}]
    (row,) = kinship.measure(["a", "b"], models, {"h.0.w.weight": base}).rows()
    assert row["layer"] == "h.0"
    assert row["distance"] == pytest.approx(
        [0.1 * float(one.norm() / base.norm()), 0.3 * float(two.norm() / base.norm())]
    )
    assert row["cosine"] == pytest.approx(float((one * two).sum() / one.norm() / two.norm()))


def test_samples_of_a_large_matrix_estimate_its_norm():
    generator = torch.Generator().manual_seed(2)
    large, other = (torch.randn(700, 400, generator=generator) for _ in range(2))
    (row,) = kinship.measure(["a", "b"], [{"x.weight": large}, {"x.weight": large + 0.2 * other}], None).rows()
    assert row["distance"][0] == pytest.approx(0.1, rel=0.05) and row["cosine"] == pytest.approx(0.98, abs=0.01)


def test_a_result_whose_outputs_are_not_finite_gets_no_name(bert, tmp_path):
    """Weights that are finite, and too large for a product of them to be."""
    huge = {n: t.clone() for n, t in weights(bert / "mood").items()}
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        huge[name].fill_(3e38)
    (tmp_path / "huge").mkdir()
    save_file(huge, str(tmp_path / "huge" / "model.safetensors"), {"format": "pt"})
    (tmp_path / "huge" / "config.json").write_bytes((bert / "mood" / "config.json").read_bytes())
    with pytest.raises(IntegrityError, match="logits are not finite"):
        merge_command.merge("uniform_soup", [str(tmp_path / "huge")] * 2, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["huge"]
    merge_command.merge("uniform_soup", [str(tmp_path / "huge")] * 2, tmp_path / "out", check=False)


def test_a_result_that_lacks_a_part_is_refused(bert, tmp_path):
    part = weights(bert / "mood")
    del part["classifier.weight"]
    save_file(part, str(tmp_path / "model.safetensors"), {"format": "pt"})
    (tmp_path / "config.json").write_bytes((bert / "mood" / "config.json").read_bytes())
    with pytest.raises(IntegrityError, match=r"lacks classifier\.weight of BertForSequenceClassification"):
        trial.try_out(tmp_path)


# --- in a recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """A good and a bad parent of one start; their mean, and what a fallback makes of it."""
    root = tmp_path_factory.mktemp("beside")
    flipped = Data(shapes(root / "flipped", {"train": True}))
    stages = [
        Train("base", model=Model(config="vit", config_overrides=VIT), training={**FAST, "max_steps": 2}),
        Train("good", model=Model("@base"), training={**FAST, "max_steps": 30, "eval_steps": 30}),
        Train("bad", data=flipped, model=Model("@base"), training={**FAST, "max_steps": 30}),
        Merge("mean", "uniform_soup", models=["@bad", "@good"]),
        Merge("kept", "uniform_soup", models=["@bad", "@good"], fallback="best_parent"),
        Merge("half", "uniform_soup", models=["@good", "@good"], dtype="bfloat16", max_shard_size="4KB"),
    ]
    asked, value = Counter(), beside._value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "_value", lambda c, stage, *a: (asked.update([stage.name]), value(c, stage, *a))[1])
        report = run(Recipe(stages, data=Data(shapes(root / "data", {}))), root / "out")
    # the merge itself, and who was not validated on these data; of the other it is known from its training
    assert asked == {"mean": 2, "kept": 2, "half": 1}
    return root / "out", {stage["name"]: stage for stage in report["stages"]}


def test_a_merge_stands_beside_its_parents_and_their_ensemble(merged):
    _, report = merged
    beside = report["mean"]["summary"]["accuracy of the parents"]
    assert beside["@good"] == report["good"]["metrics"]["accuracy"]["value"] > 0.9
    assert set(beside) == {"@bad", "@good", "their output ensemble"}
    gains = {g["baseline"]: g for g in report["mean"]["gains"] if g["metric"] == "accuracy"}
    value = report["mean"]["metrics"]["accuracy"]["value"]
    assert gains["best_parent"]["value"] == pytest.approx(value - beside["@good"]) and value < beside["@good"]
    assert gains["parents_ensemble"]["value"] == pytest.approx(value - beside["their output ensemble"])
    assert report["mean"]["summary"]["best parent on validation data"] == "@good"
    assert "'@good'" in report["mean"]["summary"]["loses to the best parent"]


def test_the_fallback_is_the_best_parent_itself(merged):
    out, report = merged
    good, kept = (load_file(str(out / name / "model" / "model.safetensors")) for name in ("good", "kept"))
    assert all(torch.equal(good[name], kept[name]) for name in good) and good.keys() == kept.keys()
    assert "'@good' takes the merge's place" in report["kept"]["summary"]["fallback"]
    assert report["kept"]["metrics"]["accuracy"]["value"] == report["good"]["metrics"]["accuracy"]["value"]
    facts = finished(out / "mean")
    assert [row["layer"] for row in facts["kinship"]][:2] and "from their mean" in facts["summary"][
        "kinship of the parents"
    ]


def test_precision_and_shards_of_a_stage(merged):
    out, report = merged
    folder = out / "half" / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert all(t.dtype == torch.bfloat16 for name in shards for t in load_file(str(folder / name)).values())
    assert report["half"]["metrics"]["accuracy"]["value"] > 0.85


def test_a_stage_keeps_the_head_of_one(tmp_path):
    """Parents of other labels have nothing to answer here; the base has no head that fits."""
    other = Data(shapes(tmp_path / "other", {}), labels=["dark", "bright"])
    renamed = Data(shapes(tmp_path / "renamed", {}))
    for path in (tmp_path / "renamed").glob("*.parquet"):
        rows = datasets.Dataset.from_parquet(str(path))
        features = rows.features | {"label": datasets.ClassLabel(names=["night", "day"])}
        rows.cast(datasets.Features(features)).to_parquet(str(path))
    stages = [
        Train("base", data=other, model=Model(config="vit", config_overrides=VIT)),
        Train("dark", data=other, model=Model("@base")),
        Train("night", data=renamed, model=Model("@base", replace_head=True)),
        Merge("m", "task_arithmetic", models=["@dark", "@night"], base="@base", head="@night", data=renamed),
        Merge("k", "uniform_soup", models=["@dark", "@night"], head="night", data=renamed, fallback="best_parent"),
    ]
    recipe = Recipe(stages, training={**FAST, "max_steps": 20})
    report = {s["name"]: s for s in run(recipe, tmp_path / "out")["stages"]}
    head, kept = (load_file(str(tmp_path / "out" / n / "model" / "model.safetensors")) for n in ("night", "m"))
    assert torch.equal(head["classifier.weight"], kept["classifier.weight"])
    assert not torch.equal(head["vit.layernorm.weight"], kept["vit.layernorm.weight"])
    assert set(report["m"]["summary"]["accuracy of the parents"]) == {"@night"}
    assert report["m"]["metrics"]["accuracy"]["value"] >= 0.5


def test_a_head_that_is_no_parents_is_refused_before_anything_is_read(tmp_path):
    stages = [Merge("m", "uniform_soup", models=["a", "b"], head="c")]
    with pytest.raises(RecipeError, match=r"stages\.m: head: got 'c', which names none of the parents"):
        run(Recipe(stages, data=Data("none")), tmp_path / "out")


def test_a_fallback_needs_validation_data(tmp_path):
    shapes(tmp_path / "data", {})
    (tmp_path / "test").mkdir()
    (tmp_path / "data" / "test.parquet").rename(tmp_path / "test" / "test.parquet")
    stages = [
        Train("a", model=Model(config="vit", config_overrides=VIT), training=FAST),
        Merge("m", "uniform_soup", models=["@a", "@a"], fallback="best_parent", data=Data(str(tmp_path / "test"))),
    ]
    with pytest.raises(RecipeError, match="fallback=best_parent chooses on validation data"):
        run(Recipe(stages, data=Data(str(tmp_path / "data"))), tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()
