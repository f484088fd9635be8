"""Fine-tune a teacher, then distil it into a smaller student, beside the same student without a teacher.

    accelerate launch recipes/distill.py data.path=FOLDER stages.teacher.model=DIR_OR_HUB_ID model=SMALLER_DIR_OR_HUB_ID

`model` is the student: a checkpoint, or a fresh one by `model.config=TYPE model.config_overrides.num_hidden_layers=2`
and, for text, `model.processor` of the teacher. To use a teacher that is already trained:
`stages.distilled.strategies.distill.teacher=DIR`. Without arguments: digits.
"""

from kt_hf import Data, Model, Recipe, Train, main
from kt_hf.digits import VIT

recipe = Recipe(
    name="distill",
    data=Data("digits", "source"),
    model=Model(
        config="vit", config_overrides={**VIT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ),
    training={"num_train_epochs": 4, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "warmup_ratio": 0.1},
    stages=[
        Train("teacher", model=Model(config="vit", config_overrides=VIT), compare=["majority"], when_used=True),
        Train("student", compare=["majority"]),
        Train(
            "distilled",
            strategies=[{"distill": {"teacher": "@teacher", "temperature": 2.0, "alpha": 0.5}}],
            compare=["majority", "@student"],
        ),
    ],
)

if __name__ == "__main__":
    main(recipe)
