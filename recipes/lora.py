"""Train low-rank adapters on frozen weights.

    accelerate launch recipes/lora.py data.path=FOLDER model=DIR_OR_HUB_ID stages.lora.strategies.lora.r=16

Add `stages.lora.strategies.lora.save=adapter` to keep the adapter apart from the weights. Without arguments: digits.
"""

from kt_hf import Data, Model, Recipe, Train, main
from kt_hf.digits import VIT

recipe = Recipe(
    name="lora",
    data=Data("digits", "target"),
    model=Model("@source"),
    training={"num_train_epochs": 20, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_ratio": 0.1},
    stages=[
        Train(
            "source",
            data=Data("digits", "source"),
            model=Model(config="vit", config_overrides=VIT),
            training={"num_train_epochs": 2, "learning_rate": 3e-3},
            when_used=True,
        ),
        Train("lora", strategies=["lora"], compare=["majority"]),
    ],
)

if __name__ == "__main__":
    main(recipe)
