"""What a user gets from `pip install`: every package and recipe, and light imports."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lightning_dhellam

ROOT = Path(__file__).resolve().parents[1]
# Installed name of each source folder, stated here again so that a change of `package-dir` shows.
INSTALLED_AS = {
    "lightning_dhellam": "lightning_dhellam",
    "kernels": "lightning_dhellam/kernels",
    "search": "lightning_dhellam/search",
    "recipes": "lightning_dhellam/recipes",
}


def source_files(folder: str) -> set[Path]:
    kept = (".py", ".typed", ".yaml", ".json", ".cu", ".cuh", ".cpp", ".html", ".css", ".js")
    return {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.suffix in kept}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that nothing is written next to them."""
    copy = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in (*INSTALLED_AS, "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Standard output of `code`, run in `cwd` with `path` before everything installed."""
    head = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", head + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        Path(installed, *file.parts[1:]).as_posix()
        for folder, installed in INSTALLED_AS.items()
        for file in source_files(folder)
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.parametrize("folder", [*INSTALLED_AS, "benchmarks"])
def test_every_source_folder_is_a_regular_package(folder: str) -> None:
    holding_code = {file.parent for file in source_files(folder) if file.suffix == ".py"}
    missing = [str(path) for path in holding_code if not (ROOT / path / "__init__.py").exists()]
    assert not missing, f"add an __init__.py to {missing}"


def test_wheel_imports_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
from importlib.resources import files
import lightning_dhellam.kernels, lightning_dhellam.search, lightning_dhellam.recipes
print(lightning_dhellam.kernels.__file__)
names = [file.name for file in files("lightning_dhellam.recipes").iterdir()]
print(*sorted(name for name in names if name.endswith(".yaml")))
"""
    kernels, _, recipes = run_python(code, tmp_path, site).partition("\n")
    assert Path(kernels) == site / "lightning_dhellam/kernels/__init__.py"
    assert recipes.split() == sorted(p.name for p in (ROOT / "recipes").glob("*.yaml"))


def test_installed_package_imports_from_another_directory(tmp_path: Path) -> None:
    code = "import lightning_dhellam.search as s; print(s.__name__)"
    assert run_python(code, tmp_path) == "lightning_dhellam.search"


def test_version_is_the_same_everywhere(wheel: Path) -> None:
    assert metadata.version("lightning-dhellam") == lightning_dhellam.__version__
    assert wheel.name.split("-")[1] == lightning_dhellam.__version__


def pins_of(python: str) -> dict[str, str]:
    """The versions of constraints.txt for an interpreter, by package."""
    from packaging.requirements import Requirement

    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().lower().splitlines():
        if "==" not in line:
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins, f"constraints.txt: two lines pin {pin.name}"
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    return pins


@pytest.mark.parametrize(
    ("python", "megatron"), [("3.11", "0.16.1"), ("3.12", "0.19.2"), ("3.13", "0.19.2")]
)
def test_tested_versions_satisfy_the_declared_ranges(python: str, megatron: str) -> None:
    from packaging.requirements import Requirement

    pins = pins_of(python)
    assert pins["megatron-core"] == megatron
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["test"] + extras["docs"]
    for requirement in map(Requirement, declared):
        pin = pins.get(requirement.name)
        assert pin is not None, f"constraints.txt: no line pins {requirement.name}"
        assert pin in requirement.specifier, f"constraints.txt: {pin} is not in {requirement}"


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("megatron-core", ["0.16.1", "0.19.0", "0.19.2"], ["0.16.0", "0.17.1", "0.18.0", "0.20.0"]),
        ("torch", ["2.11.0", "2.13.0", "2.15.1"], ["2.10.0", "2.16.0"]),
    ],
)
def test_declared_ranges_are_what_is_supported(
    name: str, inside: list[str], outside: list[str]
) -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {Requirement(text).name: Requirement(text) for text in project["dependencies"]}
    specifier = requirements[name].specifier
    assert all(version in specifier for version in inside)
    assert not any(version in specifier for version in outside)


def test_plan_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, lightning_dhellam.plan; print('torch' in sys.modules)"
    assert run_python(code, tmp_path) == "False"


def test_a_run_that_searches_nothing_does_not_wait_for_numba(tmp_path: Path) -> None:
    code = "import sys; from lightning_dhellam import *; print('numba' in sys.modules)"
    assert run_python(code, tmp_path) == "False"


def test_public_names_are_lazy_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    code = "import sys, lightning_dhellam; print('torch' in sys.modules, *dir(lightning_dhellam))"
    heavy, *names = run_python(code, tmp_path).split()
    assert heavy == "False"
    assert {"DHellamStrategy", "DualStrandMixin"} <= set(names)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = lightning_dhellam.Nonsense
