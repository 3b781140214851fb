"""What all tests share: a cache of their own, a clean record of judged methods, the checkerboard and ml-100k."""

from __future__ import annotations

import os
import sys

import pytest

from tests.checkerboard import write_checkerboard


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Results go to a temporary cache, unless LLMREC_CACHE names one: then downloads are shared between runs."""
    if os.environ.get("LLMREC_CACHE"):
        yield os.environ["LLMREC_CACHE"]
        return
    os.environ["LLMREC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield os.environ["LLMREC_CACHE"]
    del os.environ["LLMREC_CACHE"]


@pytest.fixture(autouse=True)
def nothing_judged_yet(monkeypatch):
    """Each test may judge its methods on test data, whatever another test did under the same names."""
    if module := sys.modules.get("llmrec_lib.evaluation.evaluate"):
        monkeypatch.setattr(module, "_judged", {})


@pytest.fixture(scope="session")
def checkerboard(tmp_path_factory):
    """The data set in which even users like even items, 24 users × 16 items."""
    from llmrec_lib.datasets import load_folder

    return load_folder(write_checkerboard(tmp_path_factory.mktemp("checkerboard")))


@pytest.fixture(scope="session")
def checkerboard_split(checkerboard):
    """Its temporal ratio split: 4 training events, 1 validation and 1 test event for each user."""
    from llmrec_lib.splits import split

    return split(checkerboard)


@pytest.fixture(scope="session")
def ml100k_split():
    """ml-100k as it lies in the recbole package, temporal ratio."""
    from llmrec_lib.datasets import _recbole_folder, load_folder
    from llmrec_lib.splits import split

    return split(load_folder(_recbole_folder() / "dataset_example" / "ml-100k"))
