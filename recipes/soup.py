"""Fine-tune three times, then average: in weight space (uniform and greedy soup) and in output space (ensemble).

    accelerate launch recipes/soup.py data.path=FOLDER model=DIR_OR_HUB_ID

The soups take the three seeds of the fine-tuning as parents; the greedy one selects on validation data and reports on
test data. Without arguments: digits.
"""

from kt_hf import Data, Ensemble, Merge, Model, Recipe, Train, main
from kt_hf.digits import VIT

recipe = Recipe(
    name="soup",
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
        Train("finetune", seeds=3, compare=["majority"]),
        Merge("uniform_soup", "uniform_soup", models=["@finetune"], compare=["@finetune"]),
        Merge("greedy_soup", "greedy_soup", models=["@finetune"], compare=["@finetune"]),
        Ensemble("ensemble", "mean", models=["@finetune"], compare=["@finetune"]),
    ],
)

if __name__ == "__main__":
    main(recipe)
