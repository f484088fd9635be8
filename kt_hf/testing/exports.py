"""Whether a saved model is an ordinary one: loaded without kt_hf, it gives the same outputs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from kt_hf import loading
from kt_hf.loader import Collate, Rows
from kt_hf.task import Loaded
from kt_hf.testing.bench import Bench
from kt_hf.testing.rules import demand

OUTPUTS = ("logits", "start_logits", "end_logits", "image_embeds", "text_embeds", "last_hidden_state")


def check(bench: Bench, loaded: Loaded, folder: Path) -> None:
    """Save, load by the libraries alone, and compare what both say to the same rows."""
    loaded.model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    bench.task.save(loaded, folder)
    batch = rows(bench, loaded)
    with torch.no_grad():
        ours = bench.task.forward(loaded.model, batch)
        theirs = bench.task.forward(plain_model(folder).eval(), batch)
    compared = [name for name in OUTPUTS if isinstance(getattr(ours, name, None), torch.Tensor)]
    demand(compared, f"its outputs have none of {', '.join(OUTPUTS)}")
    for name in compared:
        a, b = getattr(ours, name).float(), getattr(theirs, name).float()
        demand(
            a.shape == b.shape, f"{name} is {tuple(b.shape)} in the loaded model, {tuple(a.shape)} in the trained one"
        )
        demand(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5),
            f"{name} of the loaded model differ by up to {(a - b).abs().max():.2g}",
        )


def rows(bench: Bench, loaded: Loaded) -> dict[str, Any]:
    split = Rows(bench.info, "test", bench.task, loaded)
    return Collate(bench.task, loaded)(split.__getitems__([(0, i) for i in range(4)]))


def plain_model(folder: Path) -> Any:
    """The model in a folder, as somebody without kt_hf would load it."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return PeftModel.from_pretrained(plain_model(Path(base)), str(folder))
    if (folder / "open_clip_config.json").exists():
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}")
    config = json.loads((folder / "config.json").read_text())
    library = importlib.import_module(loading.OWN.get(config["model_type"], "transformers"))
    return getattr(library, config["architectures"][0]).from_pretrained(folder)
