"""The house rules that no linter knows: import directions, loading never executes, imports stay light."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "invrecon"
MODULES = sorted(PACKAGE.rglob("*.py"))
OTHERS = [path for folder in ("scripts", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = [*MODULES, *OTHERS]
MAX_LINES = 450
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"}

# What may not be imported, by the first part below invrecon (a folder, or a module of the top level).
ABOVE = {
    "errors": {"operators", "priors", "methods", "adapt", "data", "metrics", "report", "tasks", "cli"},
    "shared": {"operators", "priors", "methods", "adapt", "data", "metrics", "report", "tasks", "cli"},
    "rng": {"operators", "priors", "methods", "adapt", "data", "metrics", "report", "tasks", "cli"},
    "operators": {"neighbours", "priors", "methods", "adapt", "data", "metrics", "report", "tasks", "cli"},
    "priors": {"neighbours", "methods", "adapt", "data", "metrics", "report", "tasks", "cli"},
    "methods": {"neighbours", "adapt", "data", "metrics", "report", "tasks", "cli"},
    "adapt": {"neighbours", "data", "metrics", "report", "tasks", "cli"},
    "metrics": {"methods", "adapt", "data", "report", "tasks", "cli"},
    "data": {"methods", "adapt", "report", "tasks", "cli"},
    "report": {"methods", "adapt", "tasks", "cli"},
    "tasks": {"cli"},
    "neighbours": {"adapt", "data", "metrics", "report", "tasks", "cli"},
    "search": {"operators", "priors", "methods", "adapt", "data", "metrics", "report", "tasks", "cli"},
}
# Leaves that any room may use, because they themselves use nothing but errors.
LEAVES = {"invrecon.data.intensity", "invrecon.files"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
# A module below data/ or report/ may know lightning if it defines one of these.
LIGHTNING_BASES = {"data": "DataModule", "report": "Callback|Writer|Logger|Progress"}
HEAVY = {
    *LIGHTNING,
    *("deepinv", "fastmri", "h5py", "jsonargparse", "matplotlib", "requests", "rich", "scipy", "skimage"),
    *("tensorboard", "torchmetrics"),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression `torch.load`; empty for anything that is no chain of names."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a module except those under `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and dotted(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from runtime_nodes(child)


def imported(path: Path) -> set[str]:
    """Absolute names of all modules (and of the names taken from them) that `path` imports, lazily or not."""
    package = list(path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in runtime_nodes(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_leaf(name: str) -> bool:
    return any(name == leaf or name.startswith(leaf + ".") for leaf in LEAVES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    forbidden = ABOVE.get(room_of(path), set())
    names = {name for name in imported(path) if name.startswith("invrecon.") and not is_leaf(name)}
    wrong = sorted(name for name in names if name.split(".")[1] in forbidden)
    assert not wrong, f"{name_of(path)} imports from above: {wrong}"


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_use_nothing_but_errors(leaf: str) -> None:
    path = ROOT / (leaf.replace(".", "/") + ".py")
    if path.is_file():
        own = {name for name in imported(path) if name.startswith("invrecon.")}
        assert own <= {"invrecon.errors", "invrecon.errors.InputError"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_tasks_data_modules_report_writers_and_cli_know_lightning(path: Path) -> None:
    if not {n.partition(".")[0] for n in imported(path)} & LIGHTNING:
        return
    room = room_of(path)
    if room in ("tasks", "cli", "demo"):
        return
    classes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    bases = [dotted(base) for node in classes for base in node.bases]
    pattern = LIGHTNING_BASES.get(room)
    assert pattern and any(re.search(pattern, base) for base in bases), f"{name_of(path)} imports lightning"


def dangers(path: Path) -> Iterator[str]:
    """Calls that can execute what they load, or pass a command through a shell."""
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        module, _, function = name.rpartition(".")
        if (
            name in ("eval", "exec", "os.system")
            or (module in PICKLES and function in ("load", "loads", "Unpickler"))
            or (module == "yaml" and function in ("load", "load_all", "unsafe_load", "full_load"))
            or (name == "torch.load" and keywords.get("weights_only") is not True)
            or (function == "load_from_checkpoint" and keywords.get("weights_only") is not True)
            or (keywords.get("allow_pickle") is True and function != "save")  # hostile files are made in tests
            or keywords.get("shell") is True
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_executes_what_it_loads(path: Path) -> None:
    assert not list(dangers(path))


def test_the_search_for_dangers_finds_them(tmp_path: Path) -> None:
    calls = [f"{module}.load(f)" for module in ("pickle", "yaml", "torch")]
    calls += ["torch.load(f, weights_only=x)", "np.load(f, allow_pickle=True)", "exec('x = 1')"]
    harmless = ["net.eval()", "torch.load(f, weights_only=True)", "yaml.safe_load(f)", "json.load(f)"]
    source = tmp_path / "source.py"
    source.write_text("\n".join(calls + harmless))
    assert len(list(dangers(source))) == len(calls)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines: does it hold one thing?"


def text_files() -> Iterator[Path]:
    """The project's own texts: what stands at the top level and in the folders that are committed."""
    folders = (".ci", "benchmarks", "checkpoints", "configs", "data", "docs", "invrecon", "scripts", "tests")
    for folder in folders:
        suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".sh", ".html", ""}
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in suffixes)
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.suffix != ".lock")


def test_no_package_registry_is_named() -> None:
    """pip's settings belong to the machine: no registry address, index option or lock file in the project."""
    pattern = re.compile(r"index[-_]url|pythonhosted\.org|pypi\.org|download\.pytorch\.org|:/{2}\S*/simple")
    named = {
        f"{name_of(path)}: {match.group()}"
        for path in text_files()
        if "__pycache__" not in path.parts
        for match in [pattern.search(path.read_text(encoding="utf-8", errors="replace"))]
        if match
    }
    assert not named


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_costs_little_over_torch() -> None:
    """At most 0.3 s over `import torch`, in processor time (the same on a busy machine), one run of three."""
    code = "import time, torch; t = time.process_time(); import invrecon; print(time.process_time() - t)"
    assert any(float(run_python(code)) < 0.3 for _ in range(3))


def test_plain_parts_load_nothing_heavy() -> None:
    """A notebook that reconstructs pays for torch alone."""
    parts = [m for m in ("operators", "priors", "methods", "rng") if list(PACKAGE.glob(f"{m}*"))]
    code = "import sys, torch; old = set(sys.modules); import invrecon; "
    code += f"[getattr(invrecon, m) for m in {parts}]; "
    code += "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - old}))"
    assert not set(run_python(code).split()) & HEAVY


def test_lazy_names_resolve() -> None:
    package = importlib.import_module("invrecon")
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_version_is_said_once_and_the_same() -> None:
    package = importlib.import_module("invrecon")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and package.__version__ == version.group(1)


def test_ci_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert "\nmake test\n" in script.read_text()
    assert script.stat().st_mode & 0o111
