"""Where a number comes from: source, versions, data, machine – and nothing that names a person, a host or a folder."""

from __future__ import annotations

import functools
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import llmrec_lib
from llmrec_lib.cache import content_key

PACKAGE = Path(llmrec_lib.__file__).parent
KEY_PACKAGES = ("numpy", "scipy", "pandas", "torch", "transformers", "recbole", "scikit-learn", "optuna")
# They decide how results are run, drawn and stored, not what a method's numbers are.
PRESENTATION = ("cli.py", "plotting.py", "study/")


@functools.cache
def library_hash(results_only: bool = False) -> str:
    """Hash of the library's source; with `results_only` of those files alone that can change a method's numbers."""
    files = {
        path.relative_to(PACKAGE).as_posix(): path
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".json", ".yaml")
    }
    return content_key({n: p for n, p in files.items() if not (results_only and n.startswith(PRESENTATION))})


@functools.cache
def versions() -> dict[str, str]:
    """Version of Python and of each installed package that can change a number."""
    found = {"python": platform.python_version()}
    for package in KEY_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor model, cores, memory in GB, operating system and, where one is in use, the GPU model."""
    import psutil

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    facts = {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")  # not imported for this: a chapter without torch stays light
    if torch and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def git_commit() -> str | None:
    """Commit of the library's own repository, with ``+changes`` if the library differs from it; None outside of git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed inside somebody else's repository
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--", ".") else commit


def public_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with absolute paths cut to their last component, so that no machine's folders are published."""
    return {
        name: PurePath(value).name
        if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~"))
        else value
        for name, value in parameters.items()
    }
