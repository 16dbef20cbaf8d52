"""Text that any machine with Python has, for make_demo_model.py: four kinds of it, without what is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = Path(__file__).resolve().parent / "models" / "held_out"
KINDS = ("python", "licence", "header")


def shingles(text: str, *, words: int = 12) -> set[int]:
    """Hashes of every run of ``words`` words: two texts that share many of them share text."""
    found = text.split()
    return {hash(tuple(found[i : i + words])) for i in range(len(found) - words + 1)}


def documents(texts: Iterable[bytes], *, exclude: set[int]) -> Iterator[bytes]:
    """Every distinct text once, except those that share more than one shingle in fifty with ``exclude``."""
    seen: set[bytes] = set()
    for raw in texts:
        digest = hashlib.sha256(raw).digest()
        if digest in seen or b"\0" in raw:
            continue
        seen.add(digest)
        own = shingles(raw.decode(errors="replace"))
        if len(own & exclude) * 50 <= len(own):
            yield raw


def python_texts() -> Iterator[bytes]:
    """The modules of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if not skip & set(path.relative_to(root).parts):
            yield path.read_bytes()


def header_texts() -> Iterator[bytes]:
    """The C headers of CPython."""
    for path in sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h")):
        yield path.read_bytes()


def licence_texts() -> Iterator[bytes]:
    """Those that Debian keeps in one place, and those of installed packages."""
    for path in sorted(Path("/usr/share/common-licenses").glob("*")):
        if path.is_file():
            yield path.read_bytes()
    yield from package_texts("LICEN", "COPYING")


def prose_texts() -> Iterator[bytes]:
    """The manual pages inside Python, and readmes of installed packages, cut off before long changelogs."""
    yield "\n".join(topics.values()).encode()
    for text in package_texts("METADATA"):
        yield text[:20_000]


def package_texts(*beginnings: str) -> Iterator[bytes]:
    """Files about the packages that this Python sees, by how their names begin."""
    for package in sorted(metadata.distributions(), key=lambda found: found.name.lower()):
        for file in package.files or ():
            path = Path(str(file.locate()))
            if "dist-info" in file.parts[0] and file.name.upper().startswith(beginnings) and path.is_file():
                yield path.read_bytes()


def gather() -> dict[str, bytes]:
    """All text of each kind, and of ``prose``, that this machine has and that is not held out."""
    exclude = set().union(*(shingles((HELD_OUT / f"{kind}.txt").read_text()) for kind in KINDS))
    texts = {"prose": prose_texts(), "python": python_texts(), "licence": licence_texts(), "header": header_texts()}
    found = {}
    for kind, each in texts.items():
        found[kind] = b"\n".join(documents(each, exclude=exclude))
        if len(found[kind]) < 100_000:
            raise SystemExit(f"only {len(found[kind]):,} bytes of {kind} text on this machine; 100,000 are needed")
        print(f"  {kind:8} {len(found[kind]) / 1e6:5.1f} MB")
    return found
