"""Settings of the environment that must stand before any library is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and threads that wait for one another on a busy machine take seconds for a
# step.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is expected of tiny models is expected on the CPU; `ACCELERATE_USE_CPU=false` lets recipes take a GPU.
if os.environ.setdefault("ACCELERATE_USE_CPU", "true") == "true":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """The libraries' progress bars and advice, off."""
    from kt_hf.runner import quiet_libraries

    quiet_libraries()
