"""A recipe that publishes its result, and one that starts from what was published: real client, loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import WRITER, HubServer, Storage
from test_hub import environment

ROOT = Path(__file__).parent.parent


MERGED = """
data: {path: digits, name: target}
stages:
- merge: soup
  method: uniform_soup
  models: [writer/digits, two/finetune/model]
- ensemble: both
  models: [writer/digits, two/finetune/model]
"""


def launch(folder: Path, hub: HubServer, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    env = environment(folder, hub.url, **more)
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_a_recipe_publishes_and_another_starts_from_it(tmp_path):
    small = ["training.max_steps=2", "training.report_to=none"]
    with Storage() as storage, HubServer(storage) as hub:
        recipe = str(ROOT / "recipes" / "finetune.py")
        done = launch(tmp_path, hub, recipe, *small, "push_to_hub=writer/digits", "--output-dir", "one")
        assert done.returncode == 0, done.stderr[-2000:]
        files = hub.head("writer/digits").tree
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
        ask = "from kt_hf.loading import recorded as r; print(r('writer/digits'), r('writer/none'), r('no/such/thing'))"
        told = launch(tmp_path, hub, "-c", ask)
        assert told.stdout.strip() == "{'task': 'image-classification'} {} {}", told.stderr[-2000:]
        again = launch(tmp_path, hub, recipe, *small, "model=writer/digits", "--output-dir", "two")
        assert again.returncode == 0, again.stderr[-2000:]
        assert hub.seen("/writer/digits/resolve/")
        distill = [str(ROOT / "recipes" / "distill.py"), "stages.distilled.strategies.distill.teacher=writer/digits"]
        taught = launch(tmp_path, hub, *distill, *small, "--output-dir", "taught")
        assert taught.returncode == 0, taught.stderr[-2000:]
        facts = json.loads((tmp_path / "taught" / "distilled" / "stage.json").read_text())
        assert facts["lineage"]["teacher"] == "writer/digits"
        assert facts["lineage"]["teacher_revision"] == hub.head("writer/digits").oid
        card = (tmp_path / "taught" / "distilled" / "model" / "README.md").read_text()
        assert hub.head("writer/digits").oid in card
        adapted = launch(
            tmp_path,
            hub,
            str(ROOT / "recipes" / "lora.py"),
            *small,
            "model=writer/digits",
            "stages.lora.strategies.lora.save=adapter",
            "push_to_hub=writer/adapter",
            *("--output-dir", "adapted"),
        )
        assert adapted.returncode == 0, adapted.stderr[-2000:]
        described = json.loads(hub.head("writer/adapter").tree["adapter_config.json"].data)
        assert described["base_model_name_or_path"] == "writer/digits"
        assert described["revision"] == hub.head("writer/digits").oid
        (tmp_path / "merged.yaml").write_text(MERGED)
        merged = launch(tmp_path, hub, "-m", "kt_hf.cli", "run", "merged.yaml", "--output-dir", "merged")
        assert merged.returncode == 0, merged.stderr[-2000:]
        card = (tmp_path / "merged" / "soup" / "model" / "README.md").read_text()
        assert f"parent: `writer/digits` at revision `{hub.head('writer/digits').oid}`" in card
        members = tmp_path / "merged" / "both" / "model" / "members"
        assert all((members / str(i) / "model.safetensors").stat().st_size > 1000 for i in range(2))
        assert not any(path.is_symlink() for path in members.rglob("*"))
        refused = launch(
            tmp_path,
            hub,
            recipe,
            *small,
            "push_to_hub=writer/other",
            "--output-dir",
            "three",
            HF_TOKEN="hf_wrongwrongwrong",
        )
        assert refused.returncode == 5, refused.stderr[-2000:]
        assert "error.json" in {p.name for p in (tmp_path / "three").iterdir()}
        assert "writer/other" not in hub.repos
    said = "".join(p.stdout + p.stderr for p in (done, again, taught, adapted, merged, refused))
    written = b"".join(
        p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".json", ".yaml", ".md", ".html")
    )
    for token in (WRITER, "hf_wrongwrongwrong"):
        assert token not in said and token.encode() not in written
