"""A whole run from local files makes no attempt to connect, and leaves a token that it was given nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import helpers

TOKEN = "hf_" + "Q" * 34
RECIPE = """
    import json, sys
    attempts = []

    def watch(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            attempts.append(f"{event} {arguments[1:]}")

    sys.addaudithook(watch)
    from kt_hf import Data, Recipe, Train, main

    model, output = sys.argv[1:3]
    sys.argv[1:] = ["--output-dir", output, *sys.argv[3:]]
    training = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "eval_steps": 2}
    stage = Train("a", model=model, strategies=["lora"], compare=["majority"])
    try:
        main(Recipe(task="image-classification", data=Data("digits", "target"), training=training, stages=[stage]))
    finally:
        print(json.dumps(attempts))
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    info = helpers.image_info(labels=["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    folder = helpers.teacher(tmp_path / "model", "image", info)
    (tmp_path / "r.py").write_text(textwrap.dedent(RECIPE))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "r.py", folder, str(tmp_path / "out"), "--debug", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)


def assert_no_token(done: subprocess.CompletedProcess, tmp_path: Path) -> None:
    assert TOKEN not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_whole_run_connects_to_nobody_and_keeps_no_token(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "a" / "model" / "README.md").is_file()
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert_no_token(done, tmp_path)


def test_a_failure_with_its_traceback_says_no_token(tmp_path):
    done = run(tmp_path, "data.path=nobody/nothing")
    assert done.returncode == 5, done.stderr[-2000:]
    assert "Traceback" in done.stderr
    assert_no_token(done, tmp_path)


def test_a_token_in_a_setting_is_refused_before_it_is_written(tmp_path):
    done = run(tmp_path, f"data.path=nobody/{TOKEN}")
    assert done.returncode == 2 and "a setting holds an access token" in done.stderr, done.stderr[-2000:]
    assert_no_token(done, tmp_path)


def test_a_model_that_is_not_here_is_an_error_at_once(tmp_path):
    done = run(tmp_path, "stages.a.model.path=nobody/no-model")
    assert done.returncode == 5, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "error.json").read_text())["code"] == 5
    assert json.loads(done.stdout.splitlines()[-1]) == []
