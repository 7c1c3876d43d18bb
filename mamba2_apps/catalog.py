"""The recipes that ship with the package, found in the `recipes` folder of each domain."""

import difflib
from pathlib import Path

import mamba2_apps


def shipped() -> dict[str, Path]:
    """Paths of the shipped recipes by name, such as "vision/digits"."""
    # By path: importing a domain only to list its recipes would take seconds.
    folders = [Path(parent) for parent in mamba2_apps.__path__]
    paths = sorted(path for folder in folders for path in folder.glob("*/recipes/*.yaml"))
    return {f"{path.parents[1].name}/{path.stem}": path for path in paths}


def find(recipe: str) -> Path:
    """The path of a shipped recipe, or of a YAML file of the user.

    Raises ValueError with the nearest names where there is none.
    """
    recipes = shipped()
    if recipe in recipes:
        return recipes[recipe]
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ValueError(f"{recipe} does not exist; expected the YAML file of a recipe")
        return path
    names = difflib.get_close_matches(recipe, recipes, n=3, cutoff=0.3) or list(recipes)
    raise ValueError(
        f"unknown recipe {recipe!r}; nearest: {', '.join(names)}; "
        "a file of your own is given by its path, ending in .yaml"
    )
