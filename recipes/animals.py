"""From cats and dogs to other animals: does what was learned there help here, and how is it best carried over?

    accelerate launch recipes/animals.py data.path=FOLDER

with CIFAR-10 in FOLDER (train, validation and test files with an image and a label; classes go by name, and those of
`data.source.labels`, `data.target.labels`, `data.both.labels` are taken). ResNet-50: `model=microsoft/resnet-50`, or a
fresh one by `model.config=resnet`; images are 224 pixels wide then, or as `model.processor_overrides.size` says.
Without arguments, six of scikit-learn's digits play the six animals, and a small ResNet looks at them.

What `training.max_steps=400` gave on 27,000 pictures of CIFAR-10 (three seeds, 2,000 test rows of the target): from
scratch 74.6 %; against that, lower layers fixed 73.1 (hurt), all layers 75.9 (helped), weights shared by both domains
72.4 (hurt). Over all six classes: shared weights 58.7, fusion by logits 55.1, by probabilities 52.0. Two models that
never saw each other's classes do not reach, together, one that saw all.
"""

from kt_hf import Data, Ensemble, Evaluate, Model, Recipe, Train, main

SOURCE, TARGET = ["cat", "dog"], ["bird", "deer", "frog", "horse"]
RATES = {"training.learning_rate": [1e-3, 3e-3]}
START = Model("@source", replace_head=True)  # its head knows cats and dogs
WAYS = ["@scratch", "@lower_fixed", "@all_layers"]
PAIR = ["@source", "@all_layers"]

recipe = Recipe(
    name="animals",
    # 1. data: two domains of one set, and both together
    data={
        "source": Data("digits", "animals", labels=SOURCE),
        "target": Data("digits", "animals", labels=TARGET),
        "both": Data("digits", "animals", labels=[*SOURCE, *TARGET]),
    },
    # 2. initialisation: a small fresh network, or, for the ways of transfer, the source model
    model=Model(
        config="resnet",
        config_overrides={
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128],
            "depths": [1, 1, 1],
            "layer_type": "basic",
        },
        processor_overrides={"size": {"height": 32, "width": 32}},
    ),
    training={
        "max_steps": 200,
        "per_device_train_batch_size": 64,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "eval_steps": 0.5,
        "report_to": "none",
    },
    seeds=3,
    stages=[
        Train("source", data="source", seeds=1, search=RATES, compare=["majority"]),
        # 3. transfer; every way has four settings to choose from on validation data
        Train("scratch", data="target", search={**RATES, "training.weight_decay": [0.01, 0.1]}, compare=["majority"]),
        Train(
            "lower_fixed",
            [{"finetune": {"freeze_layers": 1}}],
            data="target",
            model=START,
            search={**RATES, "strategies.finetune.freeze_layers": [1, 2]},
            compare=["majority", "@scratch"],
        ),
        Train(
            "all_layers",
            ["finetune"],
            data="target",
            model=START,
            search={**RATES, "strategies.finetune.layer_decay": [1.0, 0.5]},
            compare=["majority", "@scratch", "@lower_fixed"],
        ),
        # weights shared by both domains (Caruana 1997): one network learns all classes at once
        Train("shared", data="both", search={**RATES, "training.weight_decay": [0.01, 0.1]}, compare=["majority"]),
        Evaluate(
            "shared_on_target",
            data="target",
            model=Model("@shared", cut_head=True),  # asked for the target's classes alone, as the others are
            compare=["majority", *WAYS],
        ),
        # 4. fusion over all classes, weights from validation data: of probabilities, and of logits
        Ensemble("mixture", {"mean": {"weights": "fit"}}, data="both", models=PAIR, compare=["majority", "@shared"]),
        Ensemble("fusion", "weighted", data="both", models=PAIR, compare=["majority", "@shared", "@mixture"]),
    ],  # 5. evaluation and optimisation: the report, with what each search tried
)

if __name__ == "__main__":
    main(recipe)
