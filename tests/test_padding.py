"""Padding changes no logits, on whichever side a tokenizer would put it."""

from __future__ import annotations

import logging

import helpers
import pytest
import torch
from kt_hf_plugins.text_classification import TextClassification

from kt_hf.recipe import Model

TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
KINDS = {
    "bert": {**helpers.BERT},
    "roberta": {**helpers.BERT, "max_position_embeddings": 40},
    "llama": {**TINY, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_logits(kind, side, tmp_path):
    task, info = TextClassification(), helpers.text_info()
    torch.manual_seed(0)
    made = task.load(Model(config=kind, config_overrides=KINDS[kind]), info)
    made.processor.padding_side = side
    task.save(made, tmp_path)
    loaded = task.load(Model(path=str(tmp_path)), info)
    loaded.model.eval()
    texts = {"text": ["word1", "word2 word3 word4 word5 word6 word7", "word8 word9 word1"], "label": [0, 1, 2]}
    columns = {**task.preprocess(texts, loaded, False), "index": [0, 1, 2]}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    with torch.no_grad():
        together = task.forward(loaded.model, task.collate(rows, loaded)).logits
        alone = torch.cat([task.forward(loaded.model, task.collate([row], loaded)).logits for row in rows])
    assert torch.allclose(together, alone, atol=1e-5), (together - alone).abs().max()


def test_a_missing_padding_token_is_made_up_said_and_saved(tmp_path, caplog):
    """Decoders come without one: the end token serves, and the exported model knows it."""
    from transformers import AutoConfig, AutoTokenizer

    task, info = TextClassification(), helpers.text_info()
    first = task.load(Model(config="gpt2", config_overrides=KINDS["gpt2"]), info)
    first.processor.pad_token, first.processor.eos_token = None, "[SEP]"
    first.model.config.pad_token_id = None
    task.save(first, tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        loaded = task.load(Model(path=str(tmp_path / "a")), info)
    assert "no padding token" in caplog.text
    task.save(loaded, tmp_path / "b")
    saved, config = AutoTokenizer.from_pretrained(tmp_path / "b"), AutoConfig.from_pretrained(tmp_path / "b")
    assert saved.pad_token == "[SEP]" and config.pad_token_id == saved.pad_token_id
