"""The four roots are one namespace: an __init__.py in a root, or in engrid itself, would hide the other three."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = ["proto", "model", "services", "cluster"]


@pytest.mark.parametrize("root", ROOTS)
def test_roots_and_namespace_hold_no_init(root):
    assert (ROOT / root / "engrid").is_dir()
    assert not (ROOT / root / "__init__.py").exists()
    assert not (ROOT / root / "engrid" / "__init__.py").exists()


def test_every_portion_is_importable_from_one_namespace():
    import engrid

    found = {Path(path).parent.name for path in engrid.__path__}
    assert set(ROOTS) <= found


def test_every_room_stands_in_the_layers():
    """A room that no contract names could import anything."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    rooms = {f"engrid.{path.parent.name}" for root in ROOTS for path in (ROOT / root / "engrid").glob("*/__init__.py")}
    assert rooms == set(linter["root_packages"])
    named = [layer for contract in linter["contracts"] if contract["type"] == "layers" for layer in contract["layers"]]
    assert rooms <= {name.strip() for layer in named for name in layer.split("|")}
