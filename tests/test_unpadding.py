"""Rows that stay rows while the layers of a model leave padding out: `training.packing` of encoders (fault 21)."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import BERT, DROPOUT, accelerator, distance, identical, make_trainer, text_info, train, weights
from test_resume import Stop, Stopped

from kt_hf import Model, registry, unpadding
from kt_hf.data import DataInfo
from kt_hf.errors import RecipeError
from kt_hf.feed import training_rows
from kt_hf.loader import Collate
from kt_hf.recipe import Training
from kt_hf.trainer import check_stack

TextClassification = registry.load("task", "text-classification")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
MODELS = {
    "bert": {**SMALL, "max_position_embeddings": 64},
    "roberta": {**SMALL, "max_position_embeddings": 80},
    "modernbert": {**SMALL, "local_attention": 8, "pad_token_id": 0},
    "llama": SMALL,
}
CONVBERT = {**SMALL, "embedding_size": 16, "initializer_range": 0.3}
FNET = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "tpu_short_seq_length": 64}


def pairs(count: int = 44) -> DataInfo:
    """Pairs of texts, so that there are token types of both kinds; every seventh row is long."""
    info = text_info(count)

    def second(texts: list[str]) -> list[str]:
        return ["word1 " * 20 if i % 7 == 0 else text.split()[0] for i, text in enumerate(texts)]

    splits = {name: rows.add_column("text_pair", second(rows["text"])) for name, rows in info.splits.items()}
    return DataInfo("pairs", splits, {**info.roles, "text_pair": "text_pair"}, info.labels, f"pairs-{count}")


def ready(kind: str, attention: str = "sdpa", lora: bool = False):
    """(model far from its start, in which rows look alike; task; a batch of rows of many lengths)."""
    info, task = pairs(), TextClassification(max_length=48)
    torch.manual_seed(0)
    loaded = task.load(Model(config=kind, config_overrides=MODELS[kind], attn_implementation=attention), info)
    model = loaded.model
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    rows = training_rows(accelerator(), task, loaded, info, Training(packing=True), None, 0)
    return model.eval(), task, Collate(task, loaded)(rows.__getitems__([(0, i) for i in range(16)]))


def results(model, task, batch, **kwargs):
    """Scores, features and gradients of something that depends on both."""
    model.zero_grad()
    outputs = task.forward(model, batch, output_hidden_states=True, **kwargs)
    scores, features = task.scores(outputs, batch)[0], task.features(outputs, batch)
    (scores.sin().sum() + features.cos().sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), features.detach(), gradients


@pytest.mark.parametrize(
    ("kind", "attention", "lora", "side"),
    [
        ("bert", "sdpa", False, "right"),
        ("bert", "eager", False, "right"),
        ("bert", "sdpa", True, "right"),
        ("roberta", "sdpa", False, "right"),
        ("modernbert", "sdpa", False, "right"),
        ("modernbert", "eager", True, "right"),
        ("llama", "sdpa", False, "right"),
        ("llama", "eager", False, "left"),
    ],
)
def test_rows_have_the_scores_features_and_gradients_of_padded_ones(kind, attention, lora, side):
    model, task, batch = ready(kind, attention, lora)
    if side == "left":
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        moved = ("input_ids", "attention_mask", "token_type_ids")
        batch = {
            k: torch.stack([row.roll(n) for row, n in zip(v, shifts, strict=True)]) if k in moved else v
            for k, v in batch.items()
        }
    scores, features, gradients = results(model, task, batch)
    unpadding.check(model, task, batch)
    assert unpadding.arguments(model, batch)["packed_rows"].num_bins < len(scores) / 2
    packed_scores, packed_features, packed_gradients = results(model, task, batch)
    assert scores.std() > 0.05 and not torch.equal(scores[0], scores[1])
    assert torch.allclose(packed_scores, scores, atol=1e-5), (packed_scores - scores).abs().max()
    assert torch.allclose(packed_features, features, atol=1e-5)
    assert packed_gradients.keys() == gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert torch.allclose(packed_gradients[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max())), name
    unpadding.release(model)
    assert "packed_rows" not in unpadding.arguments(model, batch)


def test_hidden_states_are_rows_and_layers_see_few_tokens():
    model, task, batch = ready("bert")
    unpadding.check(model, task, batch)
    seen = []
    for layer in model.bert.encoder.layer:
        layer.output.register_forward_hook(lambda _, __, output: seen.append(output.shape[0] * output.shape[1]))
    outputs = task.forward(model, batch, output_hidden_states=True)
    real, whole = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    assert len(seen) == 3 and all(real <= count < 0.6 * whole for count in seen)
    assert all(h.shape[:2] == batch["input_ids"].shape for h in outputs.hidden_states)
    assert not outputs.hidden_states[-1][batch["attention_mask"] == 0].any()


def test_holes_in_a_mask_and_rows_without_tokens():
    """What the mask leaves out within a row is seen by nobody, as without packing; what a row holds without any token
    is none of the others' business."""
    model, task, batch = ready("bert")
    unpadding.check(model, task, batch)
    batch["attention_mask"][1, 2:4] = 0
    batch["attention_mask"][3] = 0
    packed = task.forward(model, batch).logits
    unpadding.release(model)
    assert torch.allclose(packed, task.forward(model, batch).logits, atol=1e-5)


def test_a_copy_runs_alone():
    model, task, batch = ready("bert")
    unpadding.check(model, task, batch)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not unpadding.arguments(other, batch) and not task.forward(other, batch).logits.any()
    assert task.forward(model, batch).logits.any()


def test_bins_are_full():
    """The share of real tokens among those that layers see, in batches of 32 rows of log-normal length."""
    random = torch.Generator().manual_seed(0)
    lengths = (torch.randn(40, 32, generator=random) * 0.8 + 4).exp().long().clamp(2, 512)
    masks = [(torch.arange(int(row.max()))[None] < row[:, None]).long() for row in lengths]
    found = [unpadding.bins_of(mask) for mask in masks]
    assert all(bins.num_bins * bins.capacity < 0.9 * mask.numel() for bins, mask in zip(found, masks, strict=True))
    assert lengths.sum() / sum(bins.num_bins * bins.capacity for bins in found) >= 0.97
    assert unpadding.bins_of(torch.ones(4, 9)) is None, "nothing to leave out"
    assert unpadding.bins_of(masks[0][:1]) is None and unpadding.bins_of(None) is None


def case(folder, strategies=None, **settings):
    """A training on rows of which most are short."""
    task = TextClassification(max_length=32)
    settings = {"packing": True, "max_steps": 9, "per_device_train_batch_size": 8, **settings}
    return make_trainer(folder, "text", strategies, info=pairs(), task=task, **settings)


STACKS = {
    "finetune": {},
    "lora": {"r": 4, "lora_dropout": 0.0},
    "ema": {"decay": 0.5},
    "distill": {"alpha": 0.4, "temperature": 3.0},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from helpers import teacher

    return teacher(tmp_path_factory.mktemp("teacher"), "text", pairs())


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("finetune", {}),
        ("finetune", {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 6}),
        ("lora+distill+ema", {"gradient_accumulation_steps": 2}),
        ("finetune", {"gradient_checkpointing": True}),
        ("distill+ema", {"forward_chunk_size": 3}),
        ("lora", {"gradient_checkpointing": True, "forward_chunk_size": 2}),
    ],
)
def test_a_packed_training_is_the_padded_one(names, settings, teacher, tmp_path):
    """Same steps, rows and evaluations; weights but for rounding."""
    stack = {name: {**STACKS[name], **({"teacher": teacher} if name == "distill" else {})} for name in names.split("+")}
    same = {"optim": "sgd", "learning_rate": 0.1, "eval_steps": 3, **settings}
    a, b = case(tmp_path / "a", stack, **same), case(tmp_path / "b", stack, packing=False, **same)
    packed, padded = a.run(), b.run()
    assert distance(weights(packed), weights(padded)) < 2e-6
    start = weights(case(tmp_path / "c", stack, **{**same, "learning_rate": 0.0}).run())
    assert distance(weights(packed), start) > 1e-3
    assert a.feed.sources["train"].plan.steps_per_epoch == b.feed.sources["train"].plan.steps_per_epoch
    assert all(list(a.feed.index(i)) == list(b.feed.index(i)) for i in range(9))
    for ours, theirs in zip(packed.curve, padded.curve, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert [e["accuracy"] for e in packed.evaluations] == [e["accuracy"] for e in padded.evaluations]


def test_layers_of_student_and_teacher_run_on_bins_and_as_they_were_afterwards(teacher, tmp_path, monkeypatch):
    made = case(tmp_path, {"distill": {"teacher": teacher}})
    runs: dict[int, int] = {}
    around = unpadding.Bins.around

    def counted(self, forward, args, kwargs):
        layer = forward.args[0]
        runs[layer.attention.self.query.out_features] = runs.get(layer.attention.self.query.out_features, 0) + 1
        return around(self, forward, args, kwargs)

    monkeypatch.setattr(unpadding.Bins, "around", counted)
    model = made.run().loaded.model
    assert set(runs) == {16, 24} and min(runs.values()) >= 2 * 9, runs
    models = [model, *(frozen for _, frozen in made.run_facts.all_frozen())]
    assert len(models) == 2 and not any("forward" in m.__dict__ for one in models for m in one.modules())


def test_a_teacher_that_cannot_runs_with_padding(tmp_path, monkeypatch, caplog):
    info, task = pairs(), TextClassification()
    torch.manual_seed(1)
    processor = case(tmp_path / "student").loaded.processor
    loaded = task.load(Model(config="convbert", config_overrides=CONVBERT), info)
    loaded.processor = processor
    task.save(loaded, tmp_path / "teacher")
    stack = {"distill": {"teacher": str(tmp_path / "teacher"), "alpha": 0.9}}
    with caplog.at_level(logging.WARNING):
        packed = weights(case(tmp_path / "a", stack, optim="sgd").run())
    assert any("teacher runs with padding" in m and "ConvBert" in m for m in caplog.messages), caplog.messages
    assert distance(packed, weights(case(tmp_path / "b", stack, optim="sgd", packing=False).run())) < 2e-6


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("convbert", CONVBERT, "ConvBertForSequenceClassification gives packed rows scores that are off"),
        ("fnet", FNET, "FNetForSequenceClassification hands nothing on to its layers"),
    ],
)
def test_models_that_cannot_are_refused(kind, sizes, reason, tmp_path):
    made = case(tmp_path, model=Model(config=kind, config_overrides=sizes))
    with pytest.raises(RecipeError, match=reason):
        made.run()
    assert not any("forward" in m.__dict__ for m in made.loaded.model.modules())


def test_a_mask_that_is_dropped_is_found_out(tmp_path, monkeypatch):
    """The planted fault: tokens see all of their bin."""
    blocks = unpadding.Bins._mask

    def open_(self, mask):
        return torch.ones_like(blocks(self, mask)) if mask.dtype == torch.bool else torch.zeros_like(blocks(self, mask))

    monkeypatch.setattr(unpadding.Bins, "_mask", open_)
    for attention in ("sdpa", "eager"):
        model = Model(config="bert", config_overrides=BERT, attn_implementation=attention)
        with pytest.raises(RecipeError, match="gives packed rows scores that are off"):
            case(tmp_path / attention, model=model).run()


def test_attention_without_a_mask_is_refused():
    model, _, batch = ready("bert")
    unpadding.install(model)
    given = unpadding.arguments(model, batch)["packed_rows"]
    with pytest.raises(RecipeError, match="the attention gets no mask that could keep packed rows apart"):
        model.bert.encoder.layer[0](torch.zeros(*batch["input_ids"].shape, 16), None, packed_rows=given)


def test_a_packed_training_resumes_bit_for_bit(teacher, tmp_path):
    def build(folder, extra=None):
        stack = {"lora": {"lora_dropout": 0.1}, "distill": {"teacher": teacher}, "ema": {}, **(extra or {})}
        model = Model(config="bert", config_overrides={**BERT, **DROPOUT})
        settings = {"save_steps": 3, "max_steps": 11, "gradient_accumulation_steps": 2, "eval_steps": 4}
        return case(tmp_path / folder, stack, model=model, **settings)

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(8)}).run()
    a, b = build("a").run(), build("b").run()
    assert identical(weights(a), weights(b)) and a.curve == b.curve and a.evaluations == b.evaluations


def test_half_precision(tmp_path):
    a, b = (train(tmp_path / str(p), "text", packing=p, bf16=True, optim="sgd", learning_rate=0.1) for p in (0, 1))
    assert 0 < distance(weights(a), weights(b)) < 2e-3


def test_what_sees_into_layers_is_refused():
    from kt_hf import Strategy

    class Looks(Strategy):
        forward_kwargs = {"output_attentions": True}

    def refused(reason, stack=None, **settings):
        with pytest.raises(RecipeError, match=reason):
            check_stack(stack or {}, Training(packing=True, **settings), TextClassification(), "stages.a")

    refused("'looks' asks for attentions", {"looks": Looks()})
    refused("cache_frozen stands in the place", cache_frozen=True)
    refused("torch_compile would compile the model anew", torch_compile=True)
    whole = Strategy()
    whole.scope = "batch"
    check_stack(
        {"whole": whole},
        Training(packing=True, train_sampling_strategy="group_by_length"),
        TextClassification(),
        "stages.a",
    )


def test_streamed_rows_leave_padding_out_too(tmp_path):
    """A recipe, whole: the check looks at a stream's first rows, and the exported model is as that of a padded run."""
    from safetensors.torch import load_file

    from kt_hf import Data, Recipe, Train, run

    for split, rows in pairs().splits.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.remove_columns("index").to_parquet(tmp_path / "data" / f"{split}.parquet")
    found = []
    for packing in (True, False):
        training = {"packing": packing, "max_steps": 7, "optim": "sgd", "learning_rate": 0.1}
        recipe = Recipe(
            task={"text-classification": {"max_length": 32}},
            data=Data(path=str(tmp_path / "data"), streaming=True, shuffle_buffer=16),
            model={"config": "bert", "config_overrides": BERT},
            training=training,
            stages=[Train("one")],
        )
        run(recipe, tmp_path / str(packing))
        found.append(load_file(tmp_path / str(packing) / "one" / "model" / "model.safetensors"))
    assert distance(*found) < 2e-6
