"""The cache: a key for everything that decides a result, and files that are whole or not there."""

from __future__ import annotations

import inspect
import json
import os
import threading

import numpy as np
import pytest
import torch

from llmrec_lib import cache
from llmrec_lib.cache import atomic_write, cache_dir, cache_entries, cached_tensors, code_of, content_key, shrink_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folder(own_cache, monkeypatch):
    assert cache_dir() == own_cache
    monkeypatch.setenv("LLMREC_CACHE", "")
    assert cache_dir().name == "llmrec"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "result.json"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the sec")
        assert path.read_text() == "first"
        raise RuntimeError
    assert path.read_text() == "first"
    with atomic_write(str(path)) as temporary:
        temporary.write_text("second")
        assert temporary.suffix == ".json"  # writers that look at the suffix see the right one
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_files_get_the_permissions_of_the_umask(tmp_path):
    import os

    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "shared") as temporary:
            temporary.write_text("x")
        assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


DIFFERENT = [
    None,
    True,
    1,
    1.0,
    "1",
    b"1",
    "None",
    "",
    [],
    {},
    [1],
    [[1]],
    [1, 2],
    [2, 1],
    ["1", "2"],
    ["12"],
    {"a": 1},
    {"a": 2},
    {"b": 1},
    {"a": {"b": 1}},
    np.array([1, 2]),
    np.array([2, 1]),
    np.array([1, 2], dtype=np.int32),
    np.array([1.0, 2.0]),
    np.array([[1, 2]]),
    np.array([[1], [2]]),
    np.array(["a", "b"], dtype=object),
    np.array(["ab"], dtype=object),
    np.array(["a", "b"]),
    torch.tensor([1, 2]),
    torch.tensor([2, 1]),
    torch.tensor([1.0, 2.0]),
    torch.tensor([[1.0, 2.0]]),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.tensor([1.0, 2.0], dtype=torch.float64),
    torch.tensor([1.0, 2.0 + 1e-12], dtype=torch.float64),
    torch.tensor([2**60, 1]),
    torch.tensor([2**60 + 1, 1]),
    torch.tensor([True, False]),
    torch.tensor(1.0),
    torch.tensor([]),
    double,
    triple,
    json,
    cache,
]


def test_different_contents_have_different_keys():
    keys = [content_key(part) for part in DIFFERENT]
    assert len(set(keys)) == len(DIFFERENT)
    assert all(len(key) == 64 for key in keys)
    assert content_key("ab", "c") != content_key("a", "bc") != content_key("abc")
    assert content_key(1, 2) != content_key(2, 1)


def test_equal_contents_have_equal_keys(tmp_path):
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": (2,), "a": 1})
    array = np.arange(12).reshape(3, 4)
    assert content_key(array.T) == content_key(array.T.copy())
    assert content_key(torch.arange(12).view(3, 4).T) == content_key(torch.arange(12).view(3, 4).T.contiguous())
    assert content_key(torch.ones(2, requires_grad=True)) == content_key(torch.ones(2))
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert content_key(tmp_path / "a") == content_key(tmp_path / "b")
    (tmp_path / "b").write_text("other")
    assert content_key(tmp_path / "a") != content_key(tmp_path / "b")


def test_the_source_of_a_module_decides(tmp_path, monkeypatch):
    import importlib
    import linecache
    import sys

    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    explained = '"""What it is."""\n\n# Once more.\nvalue = (1)\n\n"""One."""\n'
    for text in ("value = 1\n", "value = 22\n", "value = 1\n", explained):
        (tmp_path / "changing_module.py").write_text(text)
        sys.modules.pop("changing_module", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        keys.append(content_key(importlib.import_module("changing_module")))
    sys.modules.pop("changing_module")
    assert keys[0] == keys[2] == keys[3] != keys[1]


def test_what_a_function_says_about_itself_decides_nothing():
    def plain(x):
        return x + 1

    here = code_of(inspect.getsource(plain))
    assert here == code_of('def plain(x):\n    """Adds one."""\n    return (x + 1)  # one\n')
    assert here != code_of('def plain(x):\n    """Adds one."""\n    return x + 2\n')
    assert code_of("lambda x: x) + 1") == "lambda x: x) + 1"  # what cannot be parsed stays as it is
    assert code_of('def f():\n    return """text"""') != code_of("def f():\n    return None")


def test_unreadable_contents_are_refused():
    for part in (object(), {1, 2}, [object()]):
        with pytest.raises(TypeError, match="cannot read the content of a"):
            content_key(part)


def test_computed_once_and_read_back():
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(3)}

    for _ in range(3):
        tensors = cached_tensors("things", "k" * 8, compute)
        assert tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and tensors["b"] == 3
    assert calls == [1]
    cached_tensors("things", "other key", compute)
    cached_tensors("other things", "k" * 8, compute)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("damage", [b"", b"\x08", b"nonsense" * 100, "cut"])
def test_a_damaged_file_is_made_again(own_cache, damage):
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(100.0)}

    cached_tensors("things", "key", compute)
    path = own_cache / "things" / "key.safetensors"
    path.write_bytes(path.read_bytes()[:-50] if damage == "cut" else damage)
    for _ in range(2):
        assert torch.equal(cached_tensors("things", "key", compute)["a"], torch.arange(100.0))
    assert calls == [1, 1]


def test_a_failed_computation_leaves_nothing(own_cache):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_tensors("things", "key", fail)
    assert not list((own_cache / "things").glob("*.safetensors"))
    assert cached_tensors("things", "key", lambda: {"a": torch.ones(1)})["a"] == 1


def test_several_at_once_compute_once():
    calls, results = [], []
    barrier = threading.Barrier(4)

    def compute():
        calls.append(1)
        return {"a": torch.ones(1000)}

    def work():
        barrier.wait()
        results.append(cached_tensors("things", "key", compute))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(results) == 4


def test_the_cache_shrinks_to_what_was_used_last(own_cache):
    def kept(key):
        return cached_tensors("numbers", key, lambda: {"value": torch.zeros(250)})  # 1,000 bytes and a header

    for place, key in enumerate("abcd"):
        kept(key)
        os.utime(own_cache / "numbers" / f"{key}.safetensors", (place, place))
    (own_cache / "models" / "tiny").mkdir(parents=True)
    (own_cache / "models" / "tiny" / "weights").write_bytes(b"0" * 1000)
    for path in (own_cache / "models" / "tiny" / "weights", own_cache / "models" / "tiny"):
        os.utime(path, (9, 9))
    kept("a")  # read, and so used
    order = [path.name.split(".")[0] for _, path, _, _ in cache_entries()]
    assert order == ["b", "c", "d", "tiny", "a"]
    sizes = [size for _, _, size, _ in cache_entries()]
    assert shrink_cache((sum(sizes) - 1) / 1e9) == sizes[0]
    assert [path.name.split(".")[0] for _, path, _, _ in cache_entries()] == ["c", "d", "tiny", "a"]
    assert shrink_cache((sizes[-1] + 10) / 1e9) == sum(sizes[1:4])
    assert not (own_cache / "models" / "tiny").exists()
    assert shrink_cache(1) == 0
    assert shrink_cache(0) == sizes[-1]
    assert cache_entries() == []
    assert kept("b")["value"].shape == (250,)


def test_a_folder_that_is_used_is_not_the_first_to_go(own_cache):
    """A model is downloaded once and read for months."""
    make = lambda work: (work / "made").mkdir() or work / "made"  # noqa: E731
    for place, name in enumerate(("model", "other")):
        cache.cached_folder(own_cache / "models" / name, make)
        os.utime(own_cache / "models" / name, (place, place))
    assert [path.name for _, path, _, _ in cache_entries()] == ["model", "other"]
    cache.cached_folder(own_cache / "models" / "model", lambda work: pytest.fail("it is there"))
    assert [path.name for _, path, _, _ in cache_entries()] == ["other", "model"]


def test_shrinking_waits_for_what_is_being_made(own_cache):
    making, go_on, done = threading.Event(), threading.Event(), []

    def compute():
        making.set()
        assert go_on.wait(20)
        return {"value": torch.ones(3)}

    cached_tensors("numbers", "x", lambda: {"value": torch.zeros(3)})
    (own_cache / "numbers" / "x.safetensors").write_bytes(b"damaged")
    maker = threading.Thread(target=lambda: done.append(cached_tensors("numbers", "x", compute)))
    maker.start()
    assert making.wait(20)
    cleaner = threading.Thread(target=lambda: done.append(shrink_cache(0)))
    cleaner.start()
    cleaner.join(0.3)
    assert cleaner.is_alive()
    go_on.set()
    maker.join(20)
    cleaner.join(20)
    assert len(done) == 2
    assert done[0]["value"].tolist() == [1, 1, 1]
    assert not (own_cache / "numbers" / "x.safetensors").exists()
