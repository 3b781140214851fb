"""Content-addressed results on disk: a key made of everything that decides a result, a file written whole or not at all."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import os
import platform
import shutil
import tempfile
import textwrap
import types
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from platformdirs import user_cache_dir

if TYPE_CHECKING:
    from torch import Tensor

KEY_PACKAGES = ("numpy", "scipy", "pandas", "torch", "transformers", "recbole", "scikit-learn", "optuna")


def cache_dir() -> Path:
    """Folder of everything that can be made again: ``$LLMREC_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("LLMREC_CACHE") or user_cache_dir("llmrec"))


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path`, on an error `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors writes private files; results are for all the folder is for
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_of(source: str) -> str:
    """What Python source says to a computer: not its layout, comments and docstrings. What cannot be parsed by itself stays."""
    with contextlib.suppress(SyntaxError):  # of a lambda's line, say
        tree = ast.parse(textwrap.dedent(source))
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        return ast.dump(tree)
    return source


@functools.cache
def versions() -> dict[str, str]:
    """Version of Python and of each package that can change a number."""
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in KEY_PACKAGES}}


def content_key(*parts: Any) -> str:
    """Hash whatever decides a result into one key of 64 hexadecimal digits.

    Parameters
    ----------
    *parts
        Plain values, lists, dicts (order does not matter), numpy arrays and torch tensors (values, dtype and shape),
        paths (the file's bytes), functions, classes and modules (see `code_of`), and what has a ``fingerprint``.

    Raises
    ------
    TypeError
        For a part whose content cannot be read, since its key would be the same for different contents.
    """
    digest = hashlib.sha256()
    _update(digest, *parts)
    return digest.hexdigest()


def _update(digest: Any, *parts: Any) -> None:
    for part in parts:
        kind = type(part).__name__
        if part is None or isinstance(part, str | bytes | bool | int | float):
            content = part if isinstance(part, bytes) else repr(part).encode()
            digest.update(f"{kind}:{len(content)}:".encode() + content)
        elif isinstance(part, list | tuple):
            digest.update(f"list:{len(part)}:".encode())
            _update(digest, *part)
        elif isinstance(part, dict):
            digest.update(f"dict:{len(part)}:".encode())
            for name in sorted(part, key=repr):
                _update(digest, name, part[name])
        elif isinstance(part, Path):
            digest.update(f"file:{file_sha256(part)}".encode())
        elif isinstance(part, types.ModuleType | types.FunctionType | type):
            digest.update(f"source:{code_of(inspect.getsource(part))}".encode())
        elif isinstance(fingerprint := getattr(part, "fingerprint", None), str):
            _update(digest, kind, fingerprint)
        elif hasattr(part, "detach"):  # a torch tensor: torch is imported already
            import torch

            digest.update(f"tensor:{part.dtype}:{tuple(part.shape)}:".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # no second copy
        elif hasattr(part, "dtype") and hasattr(part, "tobytes"):
            digest.update(f"array:{part.dtype.str}:{part.shape}:".encode())
            digest.update(repr(part.tolist()).encode() if part.dtype.hasobject else part.ravel().view("u1"))
        else:
            raise TypeError(f"content_key cannot read the content of a {kind}; pass plain values or arrays")


def cached_folder(folder: Path, make: Callable[[Path], Path]) -> Path:
    """The folder, which appears whole or not at all, made once for all processes: `make` gets an empty folder to work in."""
    if not folder.is_dir():
        with FileLock(f"{folder}.lock"):  # makes the folder above, where there is none
            temporary = {"dir": folder.parent, "prefix": ".", "ignore_cleanup_errors": True}
            with tempfile.TemporaryDirectory(**temporary) as work:
                if not folder.is_dir():
                    made = make(Path(work))
                    for path in made.rglob("*"):  # safetensors writes files that only their owner can read
                        path.chmod(path.stat().st_mode | 0o044)
                    os.replace(made, folder)
    _used_now(folder)
    return folder


def _used_now(path: Path) -> None:
    """So that `shrink_cache` takes it last."""
    with contextlib.suppress(PermissionError):  # of a cache that somebody else has filled
        os.utime(path)


def cached_tensors(kind: str, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read the tensors stored under `key`, or compute and store them. Safe for several processes at once.

    Parameters
    ----------
    kind : str
        Folder below `cache_dir()`, such as ``"embeddings"``.
    key : str
        From `content_key`.
    compute : callable
        Called at most once, while this process holds the key's lock; returns name -> tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache_dir() / kind / f"{key}.safetensors"
    with FileLock(f"{path}.lock"):
        # Damaged from outside (a full disk, a copy cut short), a file is made again.
        with contextlib.suppress(FileNotFoundError, SafetensorError):
            tensors = load_file(path)
            _used_now(path)
            return tensors
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)
        return tensors


def cache_entries() -> list[tuple[str, Path, int, float]]:
    """What is kept, that which was not used for longest first: kind, file or folder, bytes, time of the last use."""
    entries = []
    for path in cache_dir().glob("*/*"):
        if path.suffix != ".lock":
            found = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path])]
            size, used = sum(one.st_size for one in found), max(one.st_mtime for one in (path.stat(), *found))
            entries.append((path.parent.name, path, size, used))
    return sorted(entries, key=lambda entry: entry[3])


def shrink_cache(max_gb: float) -> int:
    """Delete what was not used for longest, until at most `max_gb` · 10⁹ bytes are left; how many bytes went.

    Everything is made or fetched again when it is needed. A file that another process is making is waited for; the checkpoint
    of a training elsewhere may go, so shrink while nothing else runs.
    """
    entries, gone = cache_entries(), 0
    excess = sum(size for _, _, size, _ in entries) - max_gb * 1e9
    for _, path, size, _ in entries:
        if gone < excess:
            with FileLock(f"{path}.lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            gone += size
    return gone
