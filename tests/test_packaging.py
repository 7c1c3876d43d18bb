"""What is installed: packages, data files, the fast lazy import, and the direction of imports."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("vision", "genomics", "audio")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    return ROOT / SETUPTOOLS["package-dir"][package]


def test_packages_listed_are_the_folders_with_code():
    folders = {
        "mamba2_apps": ROOT / "mamba2_apps",
        **{f"mamba2_apps.{inner}": ROOT / "mamba2_apps" / inner for inner in ("mixed", "tasks")},
    }
    for top in ("kernels", *DOMAINS):
        folders[f"mamba2_apps.{top}"] = ROOT / top
        for init in (ROOT / top).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT)
            folders["mamba2_apps." + ".".join(inner.parts)] = init.parent
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    for package, folder in folders.items():
        assert folder_of(package) == folder


def test_symlinks_resolve_to_the_top_folders():
    for name in ("kernels", *DOMAINS):
        link = ROOT / "mamba2_apps" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_every_recipe_is_package_data():
    for package in SETUPTOOLS["packages"]:
        if any(folder_of(package).glob("recipes/*.yaml")):
            assert "recipes/*.yaml" in SETUPTOOLS["package-data"][package]
    assert "py.typed" in SETUPTOOLS["package-data"]["mamba2_apps"]


def test_the_import_is_lazy_and_exports_resolve():
    code = (
        "import sys, mamba2_apps\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
        "assert 'Backbone' in dir(mamba2_apps) and mamba2_apps.__version__\n"
        "for name in mamba2_apps.__all__: getattr(mamba2_apps, name)\n"
        "try: mamba2_apps.Bakbone\n"
        "except AttributeError as error: assert 'Bakbone' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def imported_modules(path: Path, package: str) -> set[str]:
    """Absolute names of the modules that a file imports; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, node.module] if node.module else parents)
            base = base if node.level else (node.module or "")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def files_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("layer", ["kernels", "core", *DOMAINS])
def test_imports_flow_one_way(layer):
    others = {
        "kernels": ["mamba2_apps"],
        "core": [f"mamba2_apps.{domain}" for domain in DOMAINS],
        **{d: [f"mamba2_apps.{other}" for other in DOMAINS if other != d] for d in DOMAINS},
    }[layer]
    if layer == "core":
        core = ROOT / "mamba2_apps"
        paths, package = (
            [*core.glob("*.py"), *core.glob("tasks/*.py"), *core.glob("mixed/*.py")],
            "mamba2_apps",
        )
    else:
        paths, package = files_in(ROOT / layer), f"mamba2_apps.{layer}"
    for path in paths:
        for module in imported_modules(path, package):
            if layer == "kernels" and module.startswith("mamba2_apps.kernels"):
                continue  # `from .x import y` within the folder
            for other in others:
                assert module != other, f"{path.relative_to(ROOT)} imports {module}"
                assert not module.startswith(f"{other}."), (
                    f"{path.relative_to(ROOT)} imports {module}"
                )


def test_kernels_import_torch_and_triton_only():
    standard = sys.stdlib_module_names | {"torch", "triton"}
    for path in files_in(ROOT / "kernels"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in standard, f"{path.name} imports {name}"
