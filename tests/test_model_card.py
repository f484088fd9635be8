"""The model card names where a model comes from, with its commit."""

import pytest

from kt_hf.model_card import model_card


@pytest.mark.parametrize("revision", [None, "0123456789abcdef"])
def test_the_base_model_is_named_with_its_commit(revision):
    text = model_card(
        "m", task="text-classification", base_model="some/model", base_revision=revision, base_model_relation="finetune"
    )
    line = next(line for line in text.splitlines() if line.startswith("- base model:"))
    assert "some/model" in line and ("0123456789abcdef" in line) == (revision is not None)
