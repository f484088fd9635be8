"""Settings of the environment that must stand before any library is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """The libraries' progress bars and advice, off."""
    from kt_hf.runner import quiet_libraries

    quiet_libraries()
