"""Where things are in this checkout."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
SOURCE = REPO / "python"
DISTRIBUTION = "sglang-embedding-relay"
SUFFIXES = (".py", ".html", ".css", ".js")


def our_modules(source: Path = SOURCE) -> dict[str, Path]:
    """Our modules and pages, as they are named inside the wheel, and where they are."""
    found = [path for path in source.rglob("*.*") if path.suffix in SUFFIXES]
    return {str(path.relative_to(source)): path for path in found}


def doors(source: Path = SOURCE) -> dict[str, Path]:
    """Those of them that have SGLang's name."""
    return {name: path for name, path in our_modules(source).items() if name.startswith("sglang/")}
