"""A tiny recipe with a tracker; then its stages are made to be resumed from their checkpoints, and it runs again.

python tracking_child.py TRACKER FOLDER
"""

import json
import sys
from pathlib import Path

from kt_hf import Data, Model, Recipe, Train, run

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}


def main(name: str, folder: Path) -> None:
    model = Model(config="vit", config_overrides={**VIT, "patch_size": 4})
    training = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": name}
    stage = Train("a", model=model, seeds=2, training=training, strategies=[{"finetune": {"freeze_layers": 0}}])
    recipe = Recipe(name="tiny", data=Data("digits", "target"), stages=[stage])
    ids = []
    for _ in range(2):
        run(recipe, folder)
        ids.append([json.loads(path.read_text()) for path in sorted(folder.rglob("trackers.json"))])
        for path in folder.rglob("stage.json"):
            path.unlink()
    print(json.dumps(ids))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
