"""Five ways of transferring knowledge, compared on real images, in minutes on a laptop, without a network.

    accelerate launch recipes/quickstart.py

Source domain: upright handwritten digits. Target domain: rotated, noisy digits with 5 labelled examples per class. The
report says for every way whether it helped, against which baseline, at what cost.
"""

from kt_hf import Data, Ensemble, Evaluate, Merge, Model, Recipe, Train, main
from kt_hf.digits import BERT, VIT


def vit(hidden_size: int, num_hidden_layers: int) -> Model:
    """The small vision transformer, wider or deeper."""
    return Model(
        config="vit",
        config_overrides={
            **VIT,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_hidden_layers,
        },
    )


# every method, baselines included, chooses among these on validation data
RATES = {"learning_rate": [3e-4, 1e-3, 3e-3]}
BASELINES = ["majority", "@zero_shot", "@probe", "@scratch"]
MEMBERS = ["@finetune", "@finetune_slow", "@finetune_decay"]

recipe = Recipe(
    name="quickstart",
    data={
        "source": Data("digits", "source"),
        "target": Data("digits", "target"),
        "captions": Data("digits", "captions"),
    },
    model=vit(80, 4),
    training={
        "max_steps": 100,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "eval_steps": 50,
        "report_to": "none",
        "num_threads": 1,  # models this small gain nothing from more
    },
    seeds=3,
    stages=[
        # the source model, and what it is worth before any transfer
        Train("source", data="source", training={"learning_rate": 3e-3}, compare=["majority"]),
        Evaluate("zero_shot", data="target", model="@source", compare=["majority"]),
        # baselines on the target
        Train("scratch", data="target", training=RATES, compare=["majority", "@zero_shot"]),
        Train(
            "probe",
            [{"finetune": {"linear_probe": True}}],
            data="target",
            model="@source",
            training=RATES,
            compare=["majority", "@zero_shot", "@scratch"],
        ),
        # transfer
        Train("finetune", data="target", model="@source", training=RATES, compare=BASELINES),
        Train(
            "freeze_lower",
            [{"finetune": {"freeze_layers": 3}}],
            data="target",
            model="@source",
            training=RATES,
            compare=[*BASELINES, "@finetune"],
        ),
        Train(
            "lora",
            [{"lora": {"r": 8}}],
            data="target",
            model="@source",
            training=RATES,
            compare=[*BASELINES, "@finetune"],
        ),
        # a larger model teaches a smaller one
        Train("large_source", data="source", model=vit(128, 6), compare=["majority", "@source"]),
        Train(
            "teacher",
            data="target",
            model="@large_source",
            training=RATES,
            compare=["majority", "@scratch", "@finetune"],
        ),
        Train("student", data="target", model=vit(48, 2), training=RATES, compare=["majority", "@zero_shot"]),
        Train(
            "distilled",
            [{"distill": {"teacher": "@teacher", "temperature": 2.0, "alpha": 0.7}}],
            data="target",
            model=vit(48, 2),
            training=RATES,
            compare=["majority", "@student", "@teacher"],
        ),
        # several fine-tunings, averaged in weight space and in output space
        Train("finetune_slow", data="target", model="@source", training={"learning_rate": 3e-4, "seed": 142}),
        Train(
            "finetune_decay",
            [{"finetune": {"layer_decay": 0.7}}],
            data="target",
            model="@source",
            training={"learning_rate": 1e-3, "seed": 242},
        ),
        Merge("uniform_soup", "uniform_soup", data="target", models=MEMBERS, compare=[*MEMBERS, "@scratch"]),
        Merge("greedy_soup", "greedy_soup", data="target", models=MEMBERS, compare=[*MEMBERS, "@scratch"]),
        Ensemble("ensemble", "mean", data="target", models=MEMBERS, compare=[*MEMBERS, "@greedy_soup", "@scratch"]),
        # the image encoder meets a small text encoder
        Train(
            "align",
            ["finetune", "contrastive"],
            task={"zero-shot-image-classification": {"templates": ["a handwritten {}", "the digit {}"]}},
            data="captions",
            model=Model(image="@source", text={"config": "bert", "config_overrides": BERT}, projection_dim=64),
            compare=["majority"],
        ),
    ],
)

if __name__ == "__main__":
    main(recipe)
