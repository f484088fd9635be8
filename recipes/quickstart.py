"""placeholder"""

from kt_hf import Data, Ensemble, Evaluate, Merge, Model, Recipe, Train, main

VIT = {"hidden_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 160, "image_size": 8, "patch_size": 2}
recipe = Recipe(
    name="quickstart",
    data={"source": Data("digits", "source"), "target": Data("digits", "target")},
    model=Model(config="vit", config_overrides=VIT),
    training={"max_steps": 100, "per_device_train_batch_size": 32, "learning_rate": 1e-3},
    seeds=1,
    stages=[
        Train("source", data="source"),
        Train("scratch", data="target"),
        Train("finetune", data="target", model="@source"),
        Train("lora", ["lora"], data="target", model="@source"),
        Train("student", [{"distill": {"teacher": "@finetune"}}, "ema"], data="target", model=Model(config="vit", config_overrides={**VIT, "num_hidden_layers": 2})),
        Merge("soup", "greedy_soup", data="target", models=["@finetune", "@lora"]),
        Ensemble("mean", {"mean": {"weights": "fit"}}, data="target", models=["@finetune", "@lora"]),
    ],
)
if __name__ == "__main__":
    main(recipe)
