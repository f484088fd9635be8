"""Fine-tune a model.

    accelerate launch recipes/finetune.py data.path=FOLDER model=DIR_OR_HUB_ID training.num_train_epochs=3

Without arguments: a small vision transformer learns upright digits, then rotated ones. Freezing and layer-wise rates:
`stages.finetune.strategies.finetune.freeze_layers=2`, `.linear_probe=true`, `.layer_decay=0.8`.
"""

from kt_hf import Data, Model, Recipe, Train, main
from kt_hf.digits import VIT

recipe = Recipe(
    name="finetune",
    data=Data("digits", "target"),
    model=Model("@source"),
    training={"num_train_epochs": 20, "per_device_train_batch_size": 16, "learning_rate": 5e-4, "warmup_ratio": 0.1},
    stages=[
        Train(
            "source",
            data=Data("digits", "source"),
            model=Model(config="vit", config_overrides=VIT),
            training={"num_train_epochs": 2, "learning_rate": 3e-3},
            when_used=True,
        ),
        Train("finetune", strategies=["finetune"], compare=["majority"]),
    ],
)

if __name__ == "__main__":
    main(recipe)
