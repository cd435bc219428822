"""What the tree promises of itself and no linter looks at. Every exception stands here, with its reason."""

import ast
import importlib
import re
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path

import pytest

from shoal.protocol.errors import Failure, Refusal

ROOT = Path(__file__).parents[2]
PRODUCTION = ("protocol", "crdt", "dht", "node")
FOLDERS = {*PRODUCTION, "tests", "benchmarks", "configs", "docker", "docs", ".ci"}
FILES_MAX_LINES = 600
FUNCTION_MAX_LINES = 70
LINE_MAX = 120
NO_SLEEP = ("tests/unit", "tests/properties", "tests/sim")

LONG_MODULES: dict[str, str] = {}
BROAD_EXCEPTS = {
    "node/task_set.py": "the top of the daemon",
    "node/libp2p_thread.py": "the top of the libp2p thread: what ends it is told to the loop",
    "node/training/task_faults.py": "the code of a task may raise anything: it is told as that task's fault",
}
UNUSED_REASONS: dict[Enum, str] = {
    Refusal.MISSING_DEPENDENCY: "entries wait for their ancestors instead; frames name refusals by number, so it stays",
}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def list_modules(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


ALL = list_modules(*(folder for folder in sorted(FOLDERS) if (ROOT / folder).is_dir()))


def find_calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call, and the last word of what is called."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = node.func
            word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            yield node, word


def find_enums() -> list[type[Enum]]:
    found: list[type[Enum]] = []
    for path in list_modules(*PRODUCTION):
        if path.parent.name == "training":
            continue  # only the trainer's own process loads torch
        names = [node.name for node in parse(path).body if isinstance(node, ast.ClassDef) and _is_enum(node)]
        if names:
            module = importlib.import_module("shoal." + name_of(path).removesuffix(".py").replace("/", "."))
            found += [getattr(module, name) for name in names]
    return found


def _is_enum(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases)


# -- where things are ------------------------------------------------------------------------------------------------


def test_code_lies_in_the_folders_of_the_project() -> None:
    ignored = {"build", "dist", "shoal.egg-info", "demo-run"}  # what the set-up and the demo leave behind
    own = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in ignored]
    strangers = {
        folder.name
        for folder in own
        if folder.name not in FOLDERS and not folder.name.startswith(".") and any(folder.rglob("*.py"))
    }
    assert strangers == set()
    assert [file.name for file in ROOT.glob("*.py")] == []
    assert {folder for folder in FOLDERS if not (ROOT / folder).is_dir()} == set()


def test_there_is_something_to_look_at() -> None:
    assert len(ALL) > 150
    assert len(list_modules(*PRODUCTION)) > 80


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_modules_can_be_read_in_one_go(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > LINE_MAX] == []
    if name_of(path) in LONG_MODULES:
        assert len(lines) > FILES_MAX_LINES, "it is short enough by now: strike it off the list"
    else:
        assert len(lines) <= FILES_MAX_LINES


@pytest.mark.parametrize("path", list_modules(*PRODUCTION), ids=name_of)
def test_functions_fit_on_a_screen(path: Path) -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_MAX_LINES
    }
    assert long == {}


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list_modules(*NO_SLEEP), ids=name_of)
def test_no_test_sleeps(path: Path) -> None:
    sleeps = [
        call.lineno
        for call, word in find_calls(path)
        if word == "sleep" and not (call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0)
    ]
    assert sleeps == []


# -- what bytes from outside must never reach --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in (
            [*node.names, ast.alias(name=node.module or "")] if isinstance(node, ast.ImportFrom) else node.names
        )
    }
    assert not imported & banned
    for call, word in find_calls(path):
        whole = ast.unparse(call.func)
        assert whole not in ("torch.load", "eval", "exec", "__import__"), call.lineno
        assert not any(one.arg == "allow_pickle" for one in call.keywords), call.lineno
        assert word != "loads" or whole in ("json.loads", "tomllib.loads"), call.lineno


@pytest.mark.parametrize("path", list_modules(*PRODUCTION, "benchmarks"), ids=name_of)
def test_only_the_top_catches_everything(path: Path) -> None:
    broad = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))
    ]
    if name_of(path) in BROAD_EXCEPTS:
        assert len(broad) == 1
    else:
        assert broad == []


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enum", find_enums(), ids=lambda enum: enum.__name__)
def test_no_two_names_mean_the_same(enum: type[Enum]) -> None:
    assert [name for name, member in enum.__members__.items() if member.name != name] == []


def test_reasons_read_like_their_names() -> None:
    for one in (*Failure, *Refusal):
        assert one.value == one.name.lower()


@cache
def find_uses(enum: str) -> set[str]:
    """The members that production code gives as a reason; lists that have to name all of them count for nothing."""
    lists = {"protocol/errors.py", "node/happenings.py", "node/conduct.py"}
    return {
        node.attr
        for path in list_modules(*PRODUCTION)
        if name_of(path) not in lists
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == enum
    }


@pytest.mark.parametrize("reason", [*Failure, *Refusal], ids=lambda reason: f"{type(reason).__name__}.{reason.name}")
def test_every_reason_is_given_somewhere_and_documented(reason: Failure | Refusal) -> None:
    used = reason.name in find_uses(type(reason).__name__)
    assert used != (reason in UNUSED_REASONS), "unused, or used and still on the list"
    assert f"\n| `{reason.value}` |" in (ROOT / "docs/operations.md").read_text()


# -- the checks bite ---------------------------------------------------------------------------------------------------


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nimport asyncio\n\n\nasync def wait() -> None:\n    await asyncio.sleep(1)\n")
    with pytest.raises(AssertionError):
        test_nothing_unpickles_or_evaluates(bad)
    assert [word for _, word in find_calls(bad)] == ["sleep"]
    for source in ("eval('1')", "torch.load('x')", "numpy.load('x', allow_pickle=True)", "msgpack.loads(b'')"):
        worse = tmp_path / f"{abs(hash(source))}.py"
        worse.write_text(source)
        with pytest.raises(AssertionError):
            test_nothing_unpickles_or_evaluates(worse)


@pytest.mark.parametrize("listed", [LONG_MODULES, BROAD_EXCEPTS], ids=["long", "excepts"])
def test_exceptions_are_of_files_that_exist(listed: dict[str, str]) -> None:
    assert {name for name in listed if not (ROOT / name).is_file()} == set()
    assert all(listed.values())
