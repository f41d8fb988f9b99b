"""The rules of the house, read from the source files: who may import whom, and what may be committed.

Every rule is a function from sources to violations. Each is run on this repository, and on a small made-up one that
breaks it.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports point down this list only.
ROOMS = ("dashboard", "calibration", "planner", "engine", "kernels")
GPU_LIBRARIES = {"torch", "triton", "transformers"}
GPU_PATH_LIBRARIES = GPU_LIBRARIES | {"safetensors", "numpy", "scipy"}
SERVER_LIBRARIES = {
    "fastapi",
    "httptools",
    "jinja2",
    "prometheus_client",
    "pydantic",
    "starlette",
    "uvicorn",
    "uvloop",
}
# What runs without these libraries: the first three on a laptop, the last wherever PyTorch does.
WITHOUT = {
    "planner": GPU_LIBRARIES,
    "dashboard": GPU_LIBRARIES,
    "engine.scheduling": GPU_LIBRARIES,
    "kernels.reference": {"triton"},
}
MAX_FILE_BYTES = 1024 * 1024

Sources = dict[str, str]  # path within the repository -> text


class Import(NamedTuple):
    """One imported name: `from a import b` is a.b, as b may be a module."""

    path: str
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import in a file, inside functions too, and `import_module("…")` and `__import__("…")` likewise."""
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            for alias in node.names:
                yield Import(path, node.lineno, ".".join([*base, alias.name]))
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield Import(path, node.lineno, str(argument.value))


def imports_within(sources: Sources, package: str) -> Iterator[Import]:
    for path, source in sources.items():
        if is_within(module_name(path), package):
            yield from imports(path, source)


# ---- the rules -----------------------------------------------------------------------------------------------------


def upward_imports(sources: Sources) -> list[str]:
    """Imports of a room that stands higher in the list, or of the tests."""
    return [
        str(found)
        for level, room in enumerate(ROOMS)
        for found in imports_within(sources, room)
        if found.top in (*ROOMS[:level], "tests")
    ]


def gpu_library_imports(sources: Sources) -> list[str]:
    """Imports of a GPU library in what runs without it, directly or through another module of the house."""
    by_module: dict[str, list[Import]] = {}
    for path, source in sources.items():
        by_module[module_name(path)] = list(imports(path, source))
    violations = []
    for start in by_module:
        unwanted = {library for package in WITHOUT if is_within(start, package) for library in WITHOUT[package]}
        if not unwanted:
            continue
        seen, queue = {start}, [(start, start)]
        while queue:
            module, chain = queue.pop()
            for found in by_module[module]:
                if found.top in unwanted:
                    violations.append(f"{chain}: {found}")
                # Importing a.b.c runs a, a.b and a.b.c, as far as these are modules.
                parts = found.module.split(".")
                for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                    if name in by_module and name not in seen:
                        seen.add(name)
                        queue.append((name, f"{chain} -> {name}"))
    return violations


def scheduling_imports(sources: Sources) -> list[str]:
    """Imports in engine/scheduling of anything but the standard library and itself."""
    return [
        str(found)
        for found in imports_within(sources, "engine.scheduling")
        if found.top not in sys.stdlib_module_names and not is_within(found.module, "engine.scheduling")
    ]


def foreign_imports(sources: Sources) -> list[str]:
    """Imports on the GPU path of a library that is not on its short list."""
    violations = []
    for room in ("kernels", "engine", "calibration"):
        for found in imports_within(sources, room):
            allowed = {*GPU_PATH_LIBRARIES, *ROOMS, *sys.stdlib_module_names}
            if is_within(module_name(found.path), "engine.server"):
                allowed |= SERVER_LIBRARIES
            if is_within(module_name(found.path), "engine.bench.http_serve"):
                allowed |= {"uvloop"}
            if is_within(module_name(found.path), "kernels.bench.plots"):
                allowed |= {"plotly"}
            if found.top not in allowed:
                violations.append(str(found))
    return violations


def wrong_distribution(pyproject: str) -> list[str]:
    """What is wrong with the distribution's name and version; transformers takes `kernels` >= 0.18.2 for its own."""
    project = tomllib.loads(pyproject)["project"]
    violations = []
    if project["name"] != "memwall":
        violations.append(f"the distribution is called {project['name']}")
    if not re.fullmatch(r"0\.1\.\d+", project["version"]):
        violations.append(f"the version is {project['version']}")
    return violations


def large_files(root: Path, paths: list[str]) -> list[str]:
    sizes = {path: (root / path).stat().st_size for path in paths if (root / path).is_file()}
    return [f"{path} has {size} bytes" for path, size in sizes.items() if size > MAX_FILE_BYTES]


# A path below somebody's working or home directory. A container's Hugging Face cache is nobody's machine.
_MACHINE_PATH = re.compile(
    r"(?<![\w.~}/-])/(?:work|tmp|mnt|home|Users)/[\w.-]+"
    r"|(?<![\w.~}/-])/root/(?!\.cache/huggingface\b)[\w.-]+"
    r"|\b[A-Z]:\\+Users\\"
)


def machine_paths(sources: Sources) -> list[str]:
    """Lines that name a directory of the machine on which they were written."""
    return [
        f"{path}:{number} names {match[0]}"
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        for match in _MACHINE_PATH.finditer(line)
    ]


# ---- this repository -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house() -> Sources:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > len(ROOMS), "where is the house?"
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.fixture(scope="module")
def committed() -> list[str]:
    git = ["git", "-C", str(ROOT)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
        listed = subprocess.run([*git, "ls-files", "-z"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    if Path(top.stdout.strip()).resolve() != ROOT:
        pytest.skip("not a git checkout of its own")
    return [path for path in listed.stdout.split("\0") if path]


@pytest.mark.parametrize(
    "rule", [upward_imports, gpu_library_imports, scheduling_imports, foreign_imports], ids=lambda rule: rule.__name__
)
def test_house_has_no(rule, house):
    assert rule(house) == []


def test_distribution():
    assert wrong_distribution((ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_no_large_files(committed):
    assert large_files(ROOT, committed) == []


def test_no_machine_paths(committed):
    texts: Sources = {}
    for path in committed:
        if (ROOT / path).is_file():
            data = (ROOT / path).read_bytes()
            if b"\0" not in data[:8192]:
                texts[path] = data.decode("utf-8", errors="replace")
    assert machine_paths(texts) == []


def test_scheduling_runs_where_gpu_libraries_are_missing():
    """The rule above again, by the interpreter's word: None in sys.modules makes an import fail."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in sorted(GPU_LIBRARIES | {"numpy", "scipy"}))
    code = f"import sys; {blocked}import engine.scheduling; import planner, dashboard"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_transformers_does_not_take_our_kernels_for_its_own():
    """Hugging Face publishes a package `kernels` too, and transformers calls into what it takes for it."""
    assert Path(importlib.util.find_spec("kernels").origin).parent == ROOT / "kernels"
    from transformers.utils import is_kernels_available

    assert is_kernels_available() is False


# ---- houses that break a rule --------------------------------------------------------------------------------------


def test_imports_are_found_wherever_they_stand():
    source = """
import a, b.c as d
from e.f import g, h as i
from . import j
from .k import l
from ..m import n
def late():
    import o
    if late:
        from p import q
    importlib.import_module("r.s")
    __import__("t")
    importlib.import_module(name)  # not known before it runs
"""
    expected = ["a", "b.c", "e.f.g", "e.f.h", "x.y.j", "x.y.k.l", "x.m.n", "o", "p.q", "r.s", "t"]
    assert sorted(found.module for found in imports("x/y/z.py", source)) == sorted(expected)
    # The same dots in a package's __init__.py mean the package itself.
    assert [found.module for found in imports("x/y/__init__.py", "from . import j")] == ["x.y.j"]


@pytest.mark.parametrize(
    ("path", "source", "is_wrong"),
    [
        ("kernels/a.py", "import engine", True),
        ("kernels/a.py", "import kernels.b", False),
        ("engine/a.py", "def f():\n    from planner import memory", True),
        ("engine/a.py", "from kernels import attention", False),
        ("planner/a.py", "import calibration.profile", True),
        ("planner/a.py", "from engine.scheduling import Scheduler", False),
        ("planner/a.py", "import dashboards", False),  # a longer name is another package
        ("calibration/a.py", "import dashboard", True),
        ("dashboard/a.py", "import calibration, planner, engine, kernels", False),
        ("dashboard/a.py", "import tests.conftest", True),
    ],
)
def test_upward_imports(path, source, is_wrong):
    assert bool(upward_imports({path: source})) is is_wrong


@pytest.mark.parametrize(
    ("sources", "is_wrong"),
    [
        ({"planner/a.py": "def f():\n    import torch.nn"}, True),
        ({"dashboard/a.py": "from transformers import AutoConfig"}, True),
        ({"engine/scheduling/a.py": "import triton"}, True),
        ({"engine/runner.py": "import torch"}, False),
        ({"planner/a.py": "import torchless"}, False),
        ({"kernels/a.py": "import triton"}, False),
        ({"kernels/reference/a.py": "import torch"}, False),
        ({"kernels/reference/a.py": "import triton.language"}, True),
        # Through another module, and through a package's __init__.py.
        ({"planner/a.py": "from engine.runner import Runner", "engine/runner.py": "import torch"}, True),
        ({"planner/a.py": "import engine.scheduling", "engine/__init__.py": "import torch"}, True),
        ({"planner/a.py": "import engine.scheduling", "engine/runner.py": "import torch"}, False),
        ({"kernels/reference/a.py": "from kernels import decode", "kernels/decode.py": "import triton"}, True),
    ],
)
def test_gpu_library_imports(sources, is_wrong):
    assert bool(gpu_library_imports(sources)) is is_wrong


def test_gpu_library_imports_shows_the_way():
    sources = {"planner/a.py": "import engine.b", "engine/b.py": "from . import c", "engine/c.py": "\nimport torch"}
    assert gpu_library_imports(sources) == [
        "planner.a -> engine.b -> engine.c: engine/c.py:2 imports torch",
    ]


@pytest.mark.parametrize(
    ("source", "is_wrong"),
    [
        ("from collections import deque\nfrom engine.scheduling.step import Step\nfrom .request import Request", False),
        ("import numpy", True),
        ("from engine import sampling", True),
        ("from engine import scheduling", False),
        ("from .. import sampling", True),
        ("import planner", True),
    ],
)
def test_scheduling_imports(source, is_wrong):
    assert bool(scheduling_imports({"engine/scheduling/a.py": source})) is is_wrong


@pytest.mark.parametrize(
    ("path", "source", "is_wrong"),
    [
        ("kernels/a.py", "import torch, triton.language, numpy, math", False),
        ("kernels/a.py", "import flash_attn", True),
        ("kernels/bench/plots.py", "import plotly", False),
        ("kernels/bench/cases.py", "import plotly", True),
        ("engine/a.py", "import pydantic", True),
        ("engine/a.py", "import fastapi", True),
        ("engine/server/app.py", "import fastapi, uvicorn", False),
        ("engine/server.py", "import fastapi", False),
        ("engine/server/app.py", "import vllm", True),
        ("engine/bench/http_serve.py", "import uvloop", False),
        ("engine/bench/http_client.py", "import uvloop", True),
        ("engine/servers.py", "import fastapi", True),
        ("calibration/a.py", "import planner.profile, safetensors, scipy", False),
        ("calibration/a.py", "import pandas", True),
        ("planner/a.py", "import pandas", False),
    ],
)
def test_foreign_imports(path, source, is_wrong):
    assert bool(foreign_imports({path: source})) is is_wrong


@pytest.mark.parametrize(
    ("name", "version", "violations"),
    [
        ("memwall", "0.1.0", 0),
        ("memwall", "0.1.17", 0),
        ("memwall", "0.18.2", 1),
        ("memwall", "0.1.0.dev1", 1),
        ("memwall", "1.0.1", 1),
        ("kernels", "0.2.0", 2),
    ],
)
def test_wrong_distribution(name, version, violations):
    assert len(wrong_distribution(f'[project]\nname = "{name}"\nversion = "{version}"')) == violations


def test_large_files(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * MAX_FILE_BYTES)
    (tmp_path / "large").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    assert large_files(tmp_path, ["small", "large", "deleted"]) == ["large has 1048577 bytes"]


@pytest.mark.parametrize(
    ("parts", "is_wrong"),
    [
        # In parts, so that this file does not break the rule.
        (("open('", "/work", "/main')"), True),
        (("cd ", "/tmp", "/x7"), True),
        (("", "/home", "/ada/memwall"), True),
        (("path=", "/Users", "/ada"), True),
        (("", "/root", "/memwall"), True),
        (("C:", "\\Users", "\\ada"), True),
        (("mountPath: ", "/root", "/.cache/huggingface"), False),
        (("https://example.org", "/work", "/main"), False),
        (("docs", "/home", "/index.md"), False),
        (("tokens", "/tmp", " is no path"), False),
    ],
)
def test_machine_paths(parts, is_wrong):
    assert bool(machine_paths({"a.txt": "first line\n" + "".join(parts)})) is is_wrong
