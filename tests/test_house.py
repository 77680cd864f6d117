"""The law of the house: where things live, who may include or import what, how long files are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ROOMS = sorted(p.name for p in CSRC.iterdir() if p.is_dir() and p.name != "core")
CODE = {".py", ".h", ".cuh", ".cpp", ".cu"}
PROSE = {".md", ".toml", ".cfg", ".yaml", ".yml", ".txt"}
FOLDERS = ("csrc", "distaya_ext", "tests", "bench", "tools")
MOST_LINES = 400  # the aim is 300
MOST_COLUMNS = 100


def files(suffixes: set[str], *folders: str) -> list[Path]:
    """Files we wrote, by suffix; assets are texts in many languages and live by other laws."""
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*"))]
    return [p for p in found if p.suffix in suffixes and "assets" not in p.parts]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def offenders(paths: list[Path], guilty) -> list[str]:
    """Names of the files for which guilty(text) holds; none to look at is a failure of its own."""
    assert paths
    return [short(p) for p in paths if guilty(p.read_text(encoding="utf-8"))]


# ---- rooms ----


def test_there_are_rooms():
    assert ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_complete(room):
    wanted = [f"csrc/{room}/{room}{end}" for end in (".h", ".cpp", "_cpu.cpp", "_cuda.cu")]
    wanted += [f"distaya_ext/ops/{room}.py", f"tests/test_{room}.py", f"bench/bench_{room}.py"]
    assert [w for w in wanted if not (ROOT / w).is_file()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_section_in_the_table_of_contents(room):
    text = (CSRC / "module.cpp").read_text()
    assert f'#include "{room}/{room}.h"' in text
    section = re.search(rf"^  // --- {room} -+\n(.*?)(?=^  // --- |^}})", text, re.M | re.S)
    assert section, f"module.cpp has no section '// --- {room} ---'"
    assert "m.def(" in section[1]


# The layout of packed weights has two readers: the room that writes it and the one that multiplies.
SHARED = {"sqgemm": {"pack/layout.h", "pack/pack.h"}}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_includes_only_itself_and_the_core(room):
    others = {f"{other}/" for other in ROOMS if other != room}
    allowed = SHARED.get(room, set())
    for path in files(CODE, f"csrc/{room}"):
        found = {i for i in includes(path) if i.startswith(tuple(others))}
        assert found <= allowed, short(path)


def test_core_knows_no_room():
    for path in files(CODE, "csrc/core"):
        assert [i for i in includes(path) if i.split("/")[0] in ROOMS] == [], short(path)


# ---- borders ----


def test_pybind11_stays_at_the_border():
    users = [short(p) for p in files(CODE, "csrc") if any("pybind11" in i for i in includes(p))]
    assert "csrc/core/bind.h" in users
    assert set(users) <= {"csrc/core/bind.h", "csrc/module.cpp"}


def test_kernels_see_no_framework_header():
    for path in files(CODE, "csrc"):
        framework = [i for i in includes(path) if re.match(r"(torch|ATen|c10|Python)\b", i)]
        assert framework == [], short(path)


def imports_compiled_module(tree: ast.AST) -> bool:
    """Whether the code imports distaya_ext._C, in any spelling."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(a.name.endswith("._C") for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[-1] == "_C" and not module.startswith("torch"):
                return True
            ours = node.level > 0 or module.startswith("distaya_ext")
            if ours and any(a.name == "_C" for a in node.names):
                return True
    return False


@pytest.mark.parametrize(
    "code", ["from distaya_ext import _C", "import distaya_ext._C", "from .._C import isa"]
)
def test_the_import_scan_sees(code):
    assert imports_compiled_module(ast.parse(code))
    assert not imports_compiled_module(ast.parse("from distaya_ext import ops"))


def test_only_ops_import_the_compiled_module():
    users = [
        short(p)
        for p in files({".py"}, "distaya_ext", "bench", "tools")
        if imports_compiled_module(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert users, "the scan found not even the rooms"
    assert [u for u in users if not u.startswith("distaya_ext/ops/")] == []


# ---- habits ----


def public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions, classes and methods, nested ones left out."""
    found = []
    for node in body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public(node.body)
    return found


@pytest.mark.parametrize("path", files({".py"}, "distaya_ext/ops"), ids=short)
def test_public_names_in_ops_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{short(path)} does not say what it is"
    assert [node.name for node in public(tree.body) if not ast.get_docstring(node)] == []


def test_files_stay_readable():
    assert offenders(files(CODE, *FOLDERS), lambda text: text.count("\n") > MOST_LINES) == []


def test_lines_stay_readable():
    def too_long(text: str) -> bool:
        return any(len(line) > MOST_COLUMNS for line in text.splitlines())

    assert offenders(files(CODE, *FOLDERS), too_long) == []


def test_no_machine_paths():
    folders = ("root", "home", "work", "tmp")  # no slash here: this file must not find itself
    machine = re.compile(rf"(?<![\w.}}])/({'|'.join(folders)})/\w")
    assert all(machine.search(f"see /{folder}/someone") for folder in folders)
    top = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in CODE | PROSE]
    assert offenders(top + files(CODE | PROSE, *FOLDERS), machine.search) == []


def test_shipped_architectures_have_a_resource_check():
    text = (ROOT / "CMakeLists.txt").read_text()
    shipped = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES\s+(\d[^)]*)\)", text)
    assert shipped, "tools/ptx_report.py reads its default list from this line"
    assert "80-virtual" in shipped[1], "PTX lets newer GPUs compile the kernels themselves"
