"""Tiny fresh models, on which the conformance kit tries tasks: what their `conformance["model"]` are made of."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
"""Wide in its initialisation, so that two steps change what such a model says."""
ENCODER: dict[str, Any] = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT: dict[str, Any] = {"config": "bert", "config_overrides": {**ENCODER, "max_position_embeddings": 32}}
VIT: dict[str, Any] = {"config": "vit", "config_overrides": {**ENCODER, "image_size": 8, "patch_size": 4}}
WAV2VEC: dict[str, Any] = {
    "config": "wav2vec2",
    "config_overrides": {
        **SIZES,
        "conv_dim": [8, 8],
        "conv_kernel": [10, 8],
        "conv_stride": [8, 5],
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
    },
    "processor_overrides": {"sampling_rate": 8000},
}
