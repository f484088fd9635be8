"""Align an image encoder with a text encoder by contrast, as CLIP does.

    accelerate launch recipes/align.py data.path=FOLDER model.image=DIR_OR_HUB_ID model.text=DIR_OR_HUB_ID

Or continue from a dual encoder: `model=DIR_OR_HUB_ID` (CLIP, SigLIP, a pair of towers, open_clip). Locked-image tuning:
`stages.align.strategies.contrastive.lock_image=true`; sigmoid loss: `.loss=siglip`. Without arguments: digits with
captions.
"""

from kt_hf import Data, Model, Recipe, Train, main
from kt_hf.digits import BERT, VIT

recipe = Recipe(
    name="align",
    task="zero-shot-image-classification",
    data=Data("digits", "captions"),
    model=Model(
        image={"config": "vit", "config_overrides": VIT},
        text={"config": "bert", "config_overrides": BERT},
        projection_dim=64,
    ),
    training={"num_train_epochs": 4, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "warmup_ratio": 0.1},
    stages=[Train("align", strategies=["finetune", "contrastive"])],
)

if __name__ == "__main__":
    main(recipe)
