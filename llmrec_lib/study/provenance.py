"""Where a number comes from: source, versions, data, machine – and nothing that names a person, a host or a folder."""

import functools
import os
import platform
import re
import sys
from pathlib import Path, PurePath
from typing import Any

import psutil
import torch

import llmrec_lib
from llmrec_lib.cache import code_of, content_key, versions  # noqa: F401 - a name of this module, too

PACKAGE = Path(llmrec_lib.__file__).parent
IMPORT = re.compile(r"^[ \t]*(?:from|import) (llmrec_lib[\w.]*)(?: import (?:\(([^)]*)\)|(.*)))?", re.MULTILINE)
# They decide how results are run, compared, drawn and stored, not what a method's numbers are.
PRESENTATION = ("cli.py", "plotting.", "study/", "evaluation/statistics.")


@functools.cache
def library_hash(results_only: bool = False, used_by: str = "") -> str:
    """Hash of the library's source, the files beside its modules included.

    With `results_only`, of those files alone that can change a method's numbers; with `used_by`, the source text of a notebook,
    of what it imports and what that imports in turn, anywhere in a file: a change elsewhere then changes nothing, nor do
    comments and docstrings.
    """
    paths = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml", ".mplstyle")]
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    kept = {name: text for name, text in files.items() if not (results_only and name.startswith(PRESENTATION))}
    waiting, needed = _imported(used_by), set()
    while waiting:
        place = waiting.pop().removeprefix(PACKAGE.name).strip(".").replace(".", "/")
        new = {n for n in kept if n.rpartition(".")[0] in (place, f"{place}/__init__".lstrip("/"))} - needed
        waiting |= {name for n in new for name in _imported(kept[n])}
        needed |= new
    return content_key({name: code_of(text) for name, text in kept.items() if name in needed or not needed})


def _imported(source: str) -> set[str]:
    """The library's modules, and perhaps names in them, that a source text imports, with the packages above them."""
    names = set()
    for module, inside, rest in IMPORT.findall(source):
        names |= {module, *(f"{module}.{name}" for name in re.findall(r"\w+", inside or rest))}
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}


def machine() -> dict[str, Any]:
    """Processor model, cores, memory in GB, operating system and, where one is in use, the GPU model."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text(errors="replace")) if cpuinfo.exists() else None
    facts = {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    if sys.platform == "win32":
        return round(psutil.Process().memory_info().peak_wset / 1e6, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin") / 1e6, 1)


def public_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with absolute paths cut to their last component, so that no machine's folders are published."""
    private = {n for n, v in parameters.items() if isinstance(v, str) and (os.path.isabs(v) or v.startswith("~"))}
    return {name: PurePath(value).name if name in private else value for name, value in parameters.items()}


def model_hash(name: str) -> str | None:
    """SHA-256 of a catalog model's published weights, hash of a local folder; a hub name holds its revision itself."""
    from llmrec_lib.language_models import catalog

    pinned = catalog.list_models().set_index("name")["sha256"]
    return pinned.get(name) if name in pinned or catalog.HUB_NAME.fullmatch(name) else catalog.name_hash(name)
