"""pyproject.toml, requirements.lock, environment.yml and the Makefile agree, on every platform that is promised."""

import ast
import importlib.metadata
import re
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
LOCK = [Requirement(line) for line in LOCK_LINES]
TORCH = re.search(r"^TORCH \?= (\S+)$", MAKEFILE, re.MULTILINE).group(1)
PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}
# Asked for by recbole's metadata, imported by nothing used here; the lock is installed with --no-deps because of them.
LEFT_OUT = {"ray", "thop", "plotly"}
IMPORT_NAMES = {"yaml": "pyyaml", "sklearn": "scikit-learn", "dask": "dask", "distributed": "dask"}


NO_CODE = {
    getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
}


def environment(python, system):
    versions = {"python_version": python, "python_full_version": f"{python}.9", "implementation_version": f"{python}.9"}
    return default_environment() | SYSTEMS[system] | versions


def pins(env):
    """Name -> exact version in `env`, torch included."""
    chosen = [pin for pin in LOCK if pin.marker is None or pin.marker.evaluate(env)]
    names = [canonicalize_name(pin.name) for pin in chosen]
    assert len(names) == len(set(names)), "two versions of one package"
    return {name: next(iter(pin.specifier)).version for name, pin in zip(names, chosen, strict=True)} | {"torch": TORCH}


def declared(*extras):
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def test_lock_is_exact_and_names_no_place():
    for line, pin in zip(LOCK_LINES, LOCK, strict=True):
        assert [specifier.operator for specifier in pin.specifier] == ["=="], line
        assert pin.url is None and "+" not in line and "://" not in line and "--" not in line, line
    names = {canonicalize_name(pin.name) for pin in LOCK}
    assert not names & (LEFT_OUT | {"torch"})  # torch: a step of its own, with its dependencies
    assert not [name for name in names if name.startswith("nvidia")]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_satisfies_pyproject_and_is_complete(python, system):
    """Walk from pyproject.toml through the installed packages' own metadata, with another platform's markers."""
    env = environment(python, system)
    locked = pins(env)
    build = [Requirement("setuptools>=77")]
    todo = [Requirement(f"recbole=={locked['recbole']}"), *build, *declared("test", "dev")]
    faults, reached, done = [], {"torch"}, set()
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if name in LEFT_OUT or name == "llmrec-lib":
            continue
        if name not in locked:
            faults.append(f"{need} is not in requirements.lock")
            continue
        knowingly_newer = name == "colorama" and system == "windows"  # Sphinx needs it, RecBole works with it
        if not knowingly_newer and not need.specifier.contains(locked[name], prereleases=True):
            faults.append(f"requirements.lock has {name} {locked[name]}, asked for is {need}")
        reached.add(name)
        if (name, *need.extras) in done or name == "torch":
            continue
        done.add((name, *need.extras))
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # another platform's
        extras = [env | {"extra": extra} for extra in need.extras or {""}]
        todo += [more for more in map(Requirement, asked) if not more.marker or any(map(more.marker.evaluate, extras))]
    assert not faults
    foreign = {canonicalize_name(pin.name) for pin in LOCK if pin.marker}  # their dependants may not be installed here
    of_torch = {"sympy", "mpmath", "networkx"}
    assert set(locked) - reached - foreign - of_torch == set(), "in requirements.lock, but nothing needs it"


@pytest.mark.skipif(not Path(sys.prefix, ".stamp").exists(), reason="this environment was not made by make setup")
def test_what_is_installed_is_what_the_lock_says():
    locked = pins(default_environment())
    del locked["torch"]  # make TORCH=... may choose another
    assert {name: importlib.metadata.version(name) for name in locked} == locked


def test_bounds():
    bounds = {canonicalize_name(need.name): need.specifier for need in declared()}
    for name, untested in {"pandas": "3.0.0", "click": "9.0.0", "jupyter-book": "2.0.0", "torch": "2.14.0"}.items():
        assert not bounds[name].contains(untested), name
    recbole = next(need for need in declared() if need.name == "recbole")
    assert recbole.marker.evaluate(environment("3.11", "linux"))
    assert not recbole.marker.evaluate(environment("3.12", "linux"))  # ray has no wheel there
    assert not recbole.marker.evaluate(environment("3.11", "windows"))  # Sphinx asks for another colorama
    promised = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(9, 16) if promised.contains(f"3.{minor}.1")] == list(PYTHONS)


def test_conda_users_get_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(line.split("=")[1] for line in conda if isinstance(line, str) and line.startswith("python="))
    assert python == PYTHONS[0]
    locked = pins(environment(python, "linux"))
    for line in (line for entry in conda if isinstance(entry, dict) for line in entry["pip"]):
        need = Requirement(line)
        assert str(need.specifier) == f"=={locked[canonicalize_name(need.name)]}", line
    assert "pip" in conda and "make" in conda  # the rest comes from the lock


def test_torch_has_one_version_everywhere():
    assert f"torch=={TORCH} " in (ROOT / "requirements.lock").read_text()
    for path in [ROOT / "environment.yml", ROOT / "CONTRIBUTING.md", *(ROOT / ".github").rglob("*.yml")]:
        assert set(re.findall(r"torch==([\d.]*\d)", path.read_text())) <= {TORCH}, path.name


def test_imports_are_declared():
    names = {canonicalize_name(need.name) for need in declared()}
    undeclared = set()
    for path in sorted((ROOT / "llmrec_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"llmrec_lib"}:
                if canonicalize_name(IMPORT_NAMES.get(top, top)) not in names:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared


def test_the_library_needs_no_module_of_unix():
    for path in (ROOT / "llmrec_lib").rglob("*.py"):
        first = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
        assert not {name.name for node in first for name in node.names} & {"resource", "fcntl", "pwd", "grp"}, path


def test_workflows_are_yaml_and_run_make():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
        targets = {word for step in steps for word in re.findall(r"\bmake (\w+)", step.get("run", ""))}
        assert targets and all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets), path.name


def test_the_library_can_be_read_in_an_evening():
    """Fewer than 4,000 lines that hold code; docstrings, comments and blank lines are not counted."""
    counted = {}
    for path in (ROOT / "llmrec_lib").rglob("*.py"):
        lines = set()
        with open(path, "rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type not in NO_CODE:
                    lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                lines.difference_update(range(node.lineno, node.end_lineno + 1))
        counted[path.relative_to(ROOT).as_posix()] = len(lines)
    assert sum(counted.values()) < 4_000, sorted(counted.items(), key=lambda entry: -entry[1])[:10]
