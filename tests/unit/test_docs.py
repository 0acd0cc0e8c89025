"""README and docs against the code: links, commands, options, stack files, tables and the file tree."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

import build_engines.cli
import build_engines.errors
import client.cli
import client.errors
import triton_repo.cli
from build_engines.stack import Model, load_stack
from client.codec import SIGNATURES
from triton_repo import generators
from triton_repo.encoders import encoder_spec

ROOT = Path(__file__).parents[2]
PACKAGES = ("build_engines", "calibration", "client", "triton_repo")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command keeps the help option of the first context that asks for it: as the command lines set it.
HELP = ["-h", "--help"]
COMMANDS: dict[str, click.Command] = {
    "build-engines": build_engines.cli.main,
    "triton-repo": triton_repo.cli.main,
    "client": client.cli.main,
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .+\n)+", re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

page_cases = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(page: Path, language: str) -> list[str]:
    return [body for name, body in _FENCE.findall(page.read_text("utf-8")) if name == language]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _INDENTED.sub("", _FENCE.sub("", page.read_text("utf-8")))


def code_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks, and inline code."""
    text = page.read_text("utf-8")
    for language, body in _FENCE.findall(text):
        if language in {"sh", ""}:
            yield from body.splitlines()
    text = _FENCE.sub("", text)
    for block in _INDENTED.findall(text):
        yield from (line.strip() for line in block.splitlines())
    yield from _INLINE.findall(text)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of `text`, a page's, that lead nowhere; anchors must be headings."""
    broken = []
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(link)
    return broken


def command_problem(words: list[str]) -> str | None:
    """What is wrong with a command line of ours; None for one that fits, or that is not ours."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    name = words[0].removeprefix(".venv/bin/") if words else ""
    if name not in COMMANDS:
        return None
    if "--" in words:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
        if problem := command_problem(behind):
            return problem
    command, context = COMMANDS[name], click.Context(COMMANDS[name], help_option_names=HELP)
    for word in words[1:]:
        if isinstance(command, click.Group) and not word.startswith("-"):
            found = command.get_command(context, word)
            if found is None:
                return f"{name} has no command {word!r}"
            command = found
        elif word.startswith("-") and word.partition("=")[0] not in options_of(command):
            return f"{' '.join(words)}: no option {word!r}"
    return None


def options_of(command: click.Command) -> set[str]:
    parameters = command.get_params(click.Context(command, help_option_names=HELP))
    return {name for parameter in parameters for name in parameter.opts}


def every_option(command: click.Command) -> set[str]:
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return options_of(command).union(*map(every_option, below))


def split_command(line: str) -> list[str]:
    """Words of a shell line up to its comment or redirection; `...` and placeholders stay words."""
    try:
        words = shlex.split(re.split(r"\s(?:[#<>|])\s?", line)[0])
    except ValueError:
        return []
    return [word for word in words if word != "..."]


@page_cases
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, prose(page))


def test_a_broken_link_would_be_seen() -> None:
    page = ROOT / "README.md"
    assert broken_links(page, "[a](docs/nothing.md) [b](docs/plan.md#nothing) [c](docs/plan.md)") == [
        "docs/nothing.md",
        "docs/plan.md#nothing",
    ]


@page_cases
def test_commands_and_their_options_exist(page: Path) -> None:
    problems = [command_problem(split_command(line)) for line in code_lines(page)]
    assert not [problem for problem in problems if problem]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("build-engines compile STACK", "no command 'compile'"),
        ("TOKEN=1 .venv/bin/client query classify a --fast", "no option '--fast'"),
        ("triton-repo serve STACK --free-ports -- client bench --slow", "no option '--slow'"),
        ("triton-repo serve STACK --free-ports -- client bench --quick --output build", None),
    ],
)
def test_a_wrong_command_would_be_seen(line: str, problem: str | None) -> None:
    found = command_problem(split_command(line))
    assert found is None if problem is None else found is not None and problem in found


@page_cases
def test_options_named_alone_exist(page: Path) -> None:
    known = set().union(*map(every_option, COMMANDS.values()))
    named = {word.split()[0] for word in _INLINE.findall(prose(page)) if word.startswith("--")}
    assert not {word for word in named if len(word) > 2} - known - {"--help"}


def make_targets(page: Path) -> set[str]:
    """X of every `make X` in the page's code, without variables."""
    lines = [split_command(line) for line in code_lines(page)]
    return {word for words in lines if words[:1] == ["make"] for word in words[1:] if "=" not in word}


@page_cases
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert make_targets(page) <= targets


def test_the_readme_names_every_make_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert targets <= make_targets(ROOT / "README.md")


@page_cases
def test_stack_files_load(page: Path, tmp_path: Path) -> None:
    for body in fenced(page, "toml"):
        path = tmp_path / "my-stack.toml"
        path.write_text(body, "utf-8")
        assert load_stack(path).models


@page_cases
def test_python_examples_import_and_call_what_exists(page: Path) -> None:
    for body in fenced(page, "python"):
        tree = ast.parse(body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            of_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if of_name and node.value.id == "client":
                assert hasattr(client.Client, node.attr), node.attr


@page_cases
def test_curl_examples_send_what_the_models_take(page: Path) -> None:
    for body in fenced(page, "sh"):
        for document in re.findall(r"-d '(\{.*?\})'", body, re.DOTALL):
            sent = json.loads(document)
            if "inputs" not in sent:  # Triton's generate extension: every key is an input
                assert set(sent) <= {tensor.name for tensor in generators.INPUTS}
                continue
            names = tuple(tensor["name"] for tensor in sent["inputs"])
            assert names in {signature.inputs for signature in SIGNATURES.values()}


def table_rows(page: Path, columns: int) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in page.read_text("utf-8").splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def error_codes(module: ModuleType, base: type[Exception]) -> dict[str, int]:
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)]
    return {kind.__name__: kind.exit_code for kind in kinds}  # type: ignore[attr-defined]


def test_the_exit_code_table_is_the_error_trees() -> None:
    rows = [row for row in table_rows(ROOT / "docs" / "pipeline.md", 3) if row[0].isdigit()]
    documented = {name: int(code) for code, names, _ in rows for name in _INLINE.findall(names)}
    expected = error_codes(build_engines.errors, build_engines.errors.OnecardError)
    assert documented == expected | error_codes(client.errors, client.errors.ClientError)


def test_the_tensor_table_is_what_models_are_served_with() -> None:
    rows = table_rows(ROOT / "docs" / "serving.md", 4)
    documented = {
        tuple(cell.strip("`") for cell in row) for row in rows if row[0].endswith((", in", ", out"))
    }
    expected = set()
    per_request = {"query": "N, 1", "passages": "N, P", "labels": "N, L", "embedding": "N, D", "text": "N, 1"}
    shapes = {
        "classify": {**per_request, "scores": "N, L", "truncated": "N, 1"},
        "embed": {**per_request, "truncated": "N, 1"},
        "rerank": {**per_request, "scores": "N, P", "truncated": "N, P"},
    }
    sizes = {"N, 1": (1,), "N, L": (2,), "N, D": (3,), "N, P": (-1,)}
    for task, shape in shapes.items():
        manifest = {
            "task": task,
            "precision": "int8",
            "target": "onnxruntime",
            "serving": {"labels": ["a", "b"], "dimension": 3},
        }
        spec = encoder_spec(Model(name="m", task=task, source="./m"), "m", manifest, "")  # type: ignore[arg-type]
        for way, tensors in (("in", spec.inputs), ("out", spec.outputs)):
            for tensor in tensors:
                assert tensor.dims == sizes[shape[tensor.name]]
                kind = "BYTES" if tensor.data_type == "STRING" else tensor.data_type
                expected.add((f"{task}, {way}", tensor.name, kind, shape[tensor.name]))
    assert documented == expected


def test_the_tables_of_generating_models_name_every_tensor_and_its_type() -> None:
    tensors = (*generators.INPUTS, *generators.OUTPUTS)
    expected = {
        (tensor.name, "BYTES" if tensor.data_type == "STRING" else tensor.data_type) for tensor in tensors
    }
    documented = set()
    for name, kinds, _, _ in table_rows(ROOT / "docs" / "serving.md", 4):
        named = _INLINE.findall(name)
        if named and name[:1] == "`":
            documented |= set(zip(named, kinds.split(", "), strict=True))
    assert documented == expected


def tree_paths() -> list[str]:
    """The paths of README's file tree: indentation is depth, a name that ends in / is a folder."""
    body = next(body for body in fenced(ROOT / "README.md", "text") if "build_engines/" in body)
    parents: list[str] = []
    paths = []
    for line in body.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 1, f"{name} has no description"
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def test_the_file_tree_names_what_exists_and_every_module() -> None:
    named = tree_paths()
    assert len(named) == len(set(named))
    assert not [path for path in named if not (ROOT / path).exists()]
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    stacks = {str(path.relative_to(ROOT)) for path in (ROOT / "stacks").glob("*.toml")}
    folders = {f"{Path(module).parent}/" for module in modules}
    folders |= {f"tests/{path.parent.name}/" for path in (ROOT / "tests").glob("*/*") if path.suffix == ".py"}
    folders |= {f"tests/{path.parents[1].name}/" for path in (ROOT / "tests").glob("*/*/test_*.py")}
    assert modules | folders | stacks <= set(named)


def test_the_readme_lists_every_page() -> None:
    links = _LINK.findall((ROOT / "README.md").read_text("utf-8").partition("\n## More\n")[2])
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(links)


def test_the_environment_is_activated_before_a_command_is_called_by_its_name() -> None:
    lines = [line.strip() for line in code_lines(ROOT / "README.md")]
    activated = next(i for i, line in enumerate(lines) if line.startswith(". .venv/bin/activate"))
    assert not [line for line in lines[:activated] if line.split()[:1] and line.split()[0] in COMMANDS]
