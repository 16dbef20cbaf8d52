"""The laws of the house as functions over a tree: each gives the violations, a sentence apiece.

They take the root as an argument, so that test_laws.py can also show that every one of them catches something.
"""

import ast
import dataclasses
import graphlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "adapterx"
DOOR = "door"

# What lies at the bottom knows nothing of files, graphs or runtimes; who is above whom there, the law of cycles says.
BOTTOM = frozenset(
    {
        "errors",
        "atomic",
        "progress",
        "limits",
        "json_text",
        "faults",
        "external_data",
        "adapter",
        "site",
        "manifest",
        "ops",
        "fingerprint",
        "fused",
        "renaming",
        "base_weight",
        "grid",
        "packed_codes",
        "flattened",
        "pipeline",
        "port_dtype",
        "merge_table",
        "weight_rows",
        "ahead",
        "quantization_table",
    }
)
# The algebra of adapters lies beside their kinds: it knows no file, graph or runtime.
ALGEBRA = frozenset({"combination", "truncation"})
# What may be imported by whom. A server that is given a ready model has no use for graph, hence runtime -> graph is
# missing. The door (the package itself, cli, convert, report, verify) imports everything, and nothing imports the door.
LAYERS: Mapping[str, frozenset[str]] = {
    "bottom": frozenset({"bottom"}),
    "kinds": frozenset({"bottom", "kinds"}),
    "formats": frozenset({"bottom", "kinds", "formats"}),
    "graph": frozenset({"bottom", "formats", "kinds", "graph"}),
    "runtime": frozenset({"bottom", "kinds", "formats", "runtime"}),
    "serve": frozenset({"bottom", "formats", "runtime", "serve"}),
    "quant": frozenset({"bottom", "quant"}),
    "train": frozenset({"bottom", "formats", "kinds", "graph", "quant", "train"}),
    DOOR: frozenset({"bottom", "formats", "kinds", "graph", "runtime", "serve", "quant", "train", DOOR}),
}
# A session that is given a model without ports puts them in itself. The import runs only then.
EXCEPTIONS = frozenset({("runtime.injection", "graph.inject")})
DOOR_FILES = frozenset(
    {
        "__init__",
        "__main__",
        "cli",
        "convert",
        "merged_checkpoint",
        "report",
        "verification",
        "verify",
        "verify_merged",
        "verify_batch",
        "verify_rows",
    }
)

MAX_LINES = 400
SIZED = {
    PACKAGE: {".py"},
    "kernels": {".py", ".cc", ".h", ".cu"},
    "tests": {".py"},
    "samples": {".py"},
    "bench": {".py"},
}
NOUNLESS = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|$)|^(base|core)$")
# Folders that exist on one machine only. A path that a user would have (/usr, /etc, ~/.cache) is none of them.
MACHINE_PATH = re.compile(r"(?<![\w.~$}*])/(?:home|root|Users|mnt|srv|tmp|opt|scratch|work\w*)/\w")
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".cc", ".h", ".cu", ".cmake", ""}


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """One module of the package that imports another; names are dotted and without the package's own."""

    importer: str
    imported: str
    line: int


def source_files(root: Path, folder: str, suffixes: set[str]) -> Iterator[Path]:
    """Files of ours under ``folder``: nothing hidden, nothing built."""
    for path in sorted((root / folder).rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
        if path.is_file() and path.suffix in suffixes and not hidden:
            yield path


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name without ``adapterx.``; the package itself is ``__init__``."""
    table = {}
    for path in source_files(root, PACKAGE, {".py"}):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        table[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return table


def imports(root: Path) -> list[Import]:
    """Imports inside the package, also those inside functions; what only a type checker sees does not count."""
    known = modules(root)
    found = []
    for importer, path in known.items():
        tree = ast.parse(path.read_text())
        unseen = {id(n) for n in ast.walk(tree) if is_type_checking(n) for n in ast.walk(n)}
        for node in ast.walk(tree):
            if id(node) not in unseen:
                here = path.relative_to(root).parent.parts
                found += [Import(importer, name, node.lineno) for name in imported_modules(node, here, known)]
    return [each for each in found if each.importer != each.imported]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported_modules(node: ast.AST, here: tuple[str, ...], known: Mapping[str, Path]) -> set[str]:
    """Names of our own modules that one import statement, in a module of the package ``here``, imports."""
    match node:
        case ast.Import():
            targets = [alias.name for alias in node.names]
        case ast.ImportFrom():
            outer = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join((*outer, *filter(None, [node.module])))
            targets = [f"{source}.{alias.name}" for alias in node.names]
        case _:
            return set()
    return {ours for target in targets if (ours := module_of(target, known))}


def module_of(target: str, known: Mapping[str, Path]) -> str | None:
    """The module that holds ``adapterx.x.y``, whether y is a module or a name in one; None for other packages."""
    package, *parts = target.split(".")
    if package != PACKAGE:
        return None
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts) or "__init__"


def layer_of(module: str) -> str | None:
    top, *rest = module.split(".")
    # These two are folders of the door; a `verify/` or `convert/` would be a package without a layer.
    if top in DOOR_FILES and (not rest or top in {"cli", "report"}):
        return DOOR
    return "bottom" if top in BOTTOM else "kinds" if top in ALGEBRA else top if top in LAYERS else None


def imports_that_point_up(root: Path) -> list[str]:
    """Imports that the table of layers does not allow, and modules that are in no layer."""
    strangers = [f"{m}: in no layer; give it one in architecture.py" for m in modules(root) if layer_of(m) is None]
    return strangers + [
        f"{each.importer}:{each.line} imports {each.imported} ({layer_of(each.importer)} -> {layer_of(each.imported)})"
        for each in imports(root)
        if (layer := layer_of(each.importer))
        and layer_of(each.imported) not in LAYERS[layer]
        and (each.importer, each.imported) not in EXCEPTIONS
    ]


def import_cycles(root: Path) -> list[str]:
    """One cycle of imports, if there is any; imports inside functions count."""
    # A package that gathers its own modules is imported before each of them, by Python's rules and without harm.
    edges = [e for e in imports(root) if not e.imported.startswith(f"{e.importer}.") and e.importer != "__init__"]
    below: dict[str, set[str]] = {}
    for edge in edges:
        below.setdefault(edge.importer, set()).add(edge.imported)
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def long_files(root: Path) -> list[str]:
    """Source files of more lines than one subject needs."""
    paths = [path for folder, suffixes in SIZED.items() for path in source_files(root, folder, suffixes)]
    counts = {path.relative_to(root): len(path.read_text().splitlines()) for path in paths}
    return [f"{path}: {count} lines, {MAX_LINES} are allowed" for path, count in counts.items() if count > MAX_LINES]


def nounless_names(root: Path) -> list[str]:
    """Files and folders named for having no subject."""
    found = set()
    for folder, suffixes in SIZED.items():
        for path in source_files(root, folder, suffixes):
            parts = path.relative_to(root).with_suffix("").parts
            found |= {f"{path.relative_to(root)}: name it after what it defines" for p in parts if NOUNLESS.search(p)}
    return sorted(found)


def prints(root: Path) -> list[str]:
    """Calls of ``print`` in the package; only the command line talks."""
    return [
        f"{module}:{node.lineno} prints"
        for module, path in modules(root).items()
        if module.partition(".")[0] not in {"cli", "__main__"}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def machine_paths(root: Path) -> list[str]:
    """Lines that name a folder of the machine they were written on."""
    found = []
    for path in (*source_files(root, ".", TEXT), *sorted((root / ".ci").glob("*"))):
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        hits = ((number, MACHINE_PATH.search(line)) for number, line in enumerate(lines, 1))
        found += [f"{path.relative_to(root)}:{number} names {hit[0]}..." for number, hit in hits if hit]
    return found
