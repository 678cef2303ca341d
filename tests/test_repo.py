"""The sentences that nothing else would hold: README's paths, commands and counts are true, imports go down, every setting is told and read."""

import ast
import importlib.metadata
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import prepare
import sample
import train
from nanovlm import UserError, cli, files
from nanovlm.demo import run
from nanovlm.training import recipes

DOORS = {
    "train.py": train.train,
    "sample.py": sample.sample,
    "prepare.py": {
        "fridge": prepare.fridge,
        "new": prepare.new,
        "data": prepare.data,
        "show": prepare.show,
        "check": prepare.check,
        "plot": prepare.plot,
        "stitch": prepare.stitch,
        "export": prepare.export,
    },
}
FUNCTIONS = [
    f for door in DOORS.values() for f in (door.values() if isinstance(door, dict) else [door])
]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanovlm/*.py")])
README = ROOT / "README.md"
READERS = {
    "photos.json",
    "exam.json",
    "captions.json",
    "chats.json",
    "photo.jpg",
}  # what README.md asks the reader to bring

# From the street down to the cellar: a file imports only from lines below its own (../shared/design.md, Rooms).
ROOMS = [
    "train",
    "sample prepare demonstration",
    "evaluate samples curves",
    "papers report saves validation logger memory",
    "layouts cost recipe scores cider profiler signals",
    "gather",
    "random_init stitch",
    "weights",
    "sharded llava",
    "huggingface",
    "parallel",
    "model packing",
    "generate",
    "vision decoder",
    "attention rmsnorm loss",
    "decode",
    "kernels",
    "sources",
    "records refs",
    "data",
    "chat",
    "tokenizer jinja",
    "images",
    "disk opening",
    "fridge",
    "cli",
    "__init__",
]
# The model knows of no file, tokenizer or second process, a kernel of nothing of ours.
KNOWS_ONLY = {
    "model": "vision decoder attention rmsnorm loss generate __init__",
    "generate": "decoder kernels rmsnorm",
    "vision": "attention",
    "decoder": "attention rmsnorm",
    "attention": "decode kernels",
    "decode": "kernels",
    "rmsnorm": "kernels",
    "loss": "kernels",
    "kernels": "",
    "fridge": "cli __init__",
}

PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "pillow": "PIL",
    "tiktoken": "tiktoken",
    "safetensors": "safetensors",
    "triton": "triton",
}
GUESTS = {"regex": "tiktoken", "jinja2": "torch"}  # come with a package of ours
OPTIONAL = {
    "huggingface_hub",
    "tensorboard",
    "pyarrow",
    "matplotlib",
}  # used where the user has them, so imported where they are used


def rows(problems):
    return "\n" + "\n".join(problems)


# ---- README ----


def commands(text):
    """The shell commands in a text: indented lines and `inline` ones, what stands two spaces behind them left off."""
    text = text.replace("\\\n", " ")
    lines = re.findall(
        r"^ {4}((?:python|torchrun|pip|hf|echo|[A-Z_]+=\w+ python)\b.*)", text, re.MULTILINE
    )
    lines += re.findall(r"`((?:python|torchrun|pip) [^`]+)`", text)
    return [re.split(r"\s{2,}", line.strip())[0] for line in lines]


def check_command(line):
    """Raise unless every part of a command line would be understood; nothing is run. Returns its paths that it makes."""
    made = []
    for part in re.split(r"\s(?:&&|\|)\s", line):
        words = [
            word
            for word in shlex.split(part, comments=True)
            if not re.fullmatch(r"[A-Z_]+=\S*", word)
        ]
        match words:
            case ["pip", "install", "-r", file]:
                assert (ROOT / file).is_file(), f"{line}: no file {file}"
            case ["hf", "download", name]:
                assert files.is_repo_id(name), f"{line}: {name} is no owner/name"
            case ["python", "-m", "pytest", *_] | ["pip", "install", *_] | ["echo", *_]:
                pass
            case ["python", script] if script not in DOORS:
                assert (ROOT / script).is_file() and script.endswith(".py"), (
                    f"{line}: no script {script}"
                )
            case ["python" | "torchrun", *_]:
                door = next((word for word in words if word.endswith(".py")), None)
                assert door in DOORS, f"{line}: {door} is no door"
                assert all(word.startswith("--") for word in words[1 : words.index(door)]), line
                made += check_settings(line, door, words[words.index(door) + 1 :])
            case _:
                raise AssertionError(f"{line}: what is {words[0]}?")
    return made


def check_settings(line, door, argv):
    function = DOORS[door]
    if isinstance(function, dict):
        function, argv = cli.choose_command(function, argv)
    asks_for_help = "--help" in argv
    try:
        chosen = cli.parse_arguments(function, [word for word in argv if word != "--help"])
    except UserError as mistake:
        raise AssertionError(f"{line}: {mistake}") from None
    typed = {name: default for name, _, default, _ in cli.settings(function)} | chosen
    if asks_for_help:
        return []
    if function is train.train and not chosen:
        return demonstration_makes()
    if function is train.train:
        return [train.resolve(typed, 1).out]
    if function is sample.sample:
        sample.check_ranges(
            {name: typed[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")}
        )
    return [typed["out"]] if typed.get("out") else []


def demonstration_makes():
    named = re.findall(r'"([\w./-]+)"', inspect.getsource(run))
    return [
        *named,
        prepare.fridge.__kwdefaults__["out"],
        *(path for preset in train.STAGES.values() for path in (preset["data"], preset["model"])),
        *(f"out/{stage}" for stage in train.STAGES),
    ]


def paths_in(text):
    """What a text names as a path: link targets, and words that begin as our folders do or end as our files do."""
    text = text.replace("\\_", "_")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    ends = "py|md|txt|toml|jpg|jpeg|png|json|jsonl|safetensors"
    words = re.findall(
        rf"(?<![\w/.:-])(?:(?:nanovlm|tests|data|out|\.ci|shared)/[\w./-]*\w|[\w/-]+\.(?:{ends}))\b",
        text,
    )
    return sorted({*links, *words})


def is_placeholder(path):
    """FILE.json, data/NAME: for the reader to fill in."""
    return any(
        re.fullmatch(r"[A-Z]+", Path(part).stem) and part not in ("README.md", "LICENSE")
        for part in Path(path).parts
    )


def untrue_paths(text, made):
    source = "".join(path.read_text() for path in FILES)
    for path in paths_in(text):
        exists = (ROOT / path).exists() or (ROOT / "nanovlm" / path).exists()
        comes = any(Path(path).is_relative_to(m) or Path(m).is_relative_to(path) for m in made)
        in_a_folder_of_ours = "/" not in path and f'"{path}"' in source  # nanovlm.json
        if not (exists or comes or in_a_folder_of_ours or path in READERS or is_placeholder(path)):
            yield path


def test_every_path_in_the_readme_is_there_or_made_by_one_of_its_commands():
    text = README.read_text()
    made = [path for line in commands(text) for path in check_command(line)]
    assert not (wrong := list(untrue_paths(text, made))), (
        f"README.md names what neither is there nor is made by a command of it: {wrong}"
    )


def test_every_command_in_the_readme_and_the_doors_would_be_understood():
    for text in [README.read_text(), *(sys.modules[Path(door).stem].__doc__ for door in DOORS)]:
        assert len(found := commands(text)) >= 3
        for line in found:
            check_command(line)


def settings_of(line):
    """(door's function, its settings as typed, else as they are by default), a stage's presets filled in."""
    words = shlex.split(line)
    door = next(word for word in words if word in DOORS)
    function, argv = DOORS[door], words[words.index(door) + 1 :]
    if isinstance(function, dict):
        function, argv = cli.choose_command(function, argv)
    typed = {name: default for name, _, default, _ in cli.settings(function)} | cli.parse_arguments(
        function, argv
    )
    return function, vars(train.resolve(typed, 1)) if function is train.train else typed


def astray(road):
    """The lines of a road that read what no line before them has made or fetched."""
    there = set()
    for line in road:
        if line.startswith("hf download "):
            there.add(line.split()[2])
            continue
        function, typed = settings_of(line)
        public = [
            typed.get(name) for name in ("vision", "decoder") if typed.get(name)
        ]  # stitch fetches them itself
        wanted = [
            typed[name]
            for name in ("model", "data")
            if typed.get(name) and function is not prepare.stitch
        ]
        if not all(map(files.is_repo_id, public)) or not set(wanted) <= there:
            yield line
        there.add(typed["out"])


def roads():
    """The blocks of commands under "A real eye and a real brain" that begin with a fetched or stitched model."""
    section = (
        README.read_text().partition("## A real eye and a real brain\n")[2].partition("\n## ")[0]
    )
    blocks = [
        commands(block + "\n") for block in re.findall(r"(?:^ {4}.+\n)+", section, re.MULTILINE)
    ]
    return [
        block
        for block in blocks
        if block and re.match(r"hf download|python prepare.py stitch", block[0])
    ]


def test_each_of_the_three_roads_reads_only_what_it_has_made():
    """From public parts to an answer, in order, every folder under the name by which the next line asks for it."""
    found = roads()
    parts = [
        ("llava-hf/llava-v1.6-mistral-7b-hf",),
        ("openai/clip-vit-large-patch14-336", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("google/siglip-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ]
    assert len(found) == 3 and all(
        name in road[0] for road, names in zip(found, parts, strict=True) for name in names
    )
    assert not (wrong := [line for road in found for line in astray(road)]), rows(wrong)
    for road in found[1:]:
        doors = [
            (function.__name__, typed.get("stage")) for function, typed in map(settings_of, road)
        ]
        assert doors == [
            ("stitch", None),
            ("data", None),
            ("train", "pretrain"),
            ("data", None),
            ("train", "sft"),
            ("sample", None),
        ]


def test_a_road_that_goes_astray_is_seen():
    road = next(road for road in roads() if "--out=out/small" in road[0])
    for n in range(5):
        assert list(astray(road[:n] + road[n + 1 :])), "a line is left out"
    assert list(astray([*road[:2], road[2].replace("small-pretrain", "small-pre"), *road[3:]])) == [
        road[3],
        road[4],
    ]
    assert list(astray(["hf download a/b", "python sample.py --model=a/c"])) and not list(
        astray(["hf download a/b", "python sample.py --model=a/b"])
    )


def test_the_readme_has_no_gaps():
    lines = README.read_text().splitlines()
    assert not (
        gaps := [
            f"line {n}: {line}"
            for n, line in enumerate(lines, 1)
            if re.fullmatch(r"[A-Z]{3,}", line)
        ]
    ), gaps


def table_rows(text):
    return re.findall(
        r"^\| \[?`([\w/.]+\.py)`(?:\]\([^)]*\))? \| ([\d,]+) \| (.*\S.*) \|$", text, re.MULTILINE
    )


def test_the_readmes_line_counts_are_the_files():
    found = {name: (count, question) for name, count, question in table_rows(README.read_text())}
    wrong = []
    for path in FILES:
        name, count = path.relative_to(ROOT).as_posix(), len(path.read_text().splitlines())
        told, question = found.pop(name, (None, "…"))
        if told is None or int(told.replace(",", "")) != count:
            wrong.append(f"| `{name}` | {count} | {question} |")
    assert not wrong and not found, (
        f"these rows of README.md should be:{rows(wrong)}\nand these should not be there: {list(found)}"
    )


@pytest.mark.parametrize(
    "line, said",
    [
        ("python train.py --stage=stf", "--stage=stf is not known"),
        ("python train.py --stage=sft --step=3", "--step is no setting, did you mean --steps"),
        ("torchrun --nproc_per_node=8 trian.py --stage=sft", "trian.py is no door"),
        ("python tests/photos.py", "no script tests/photos.py"),
        ("pip install -r requirement.txt && python train.py", "no file requirement.txt"),
        ("python prepare.py stich", "did you mean stitch"),
        ("python sample.py --top_p=7", "--top_p=7.0 must be"),
        ("hf download out/sft", "out/sft is no owner/name"),
        ("bash do.sh", "what is bash"),
        ("echo hm | python sample.py --chat=perhaps", "--chat=perhaps is not true or false"),
    ],
)
def test_a_command_that_would_fail_is_seen(line, said):
    with pytest.raises((AssertionError, UserError), match=re.escape(said)):
        check_command(line)


def test_a_path_that_nothing_makes_is_seen():
    text = "[a](nanovlm/modle.py), `out/sft`, data/cats/a.jpg, `images.py`, `nanovlm.json`, --out=data/NAME, b.jpg, .ci/run, tests"
    assert list(untrue_paths(text, ["out/sft", "data/dogs"])) == [
        "b.jpg",
        "data/cats/a.jpg",
        "nanovlm/modle.py",
    ]
    assert list(untrue_paths(text, [*demonstration_makes(), "data/cats", "b.jpg"])) == [
        "nanovlm/modle.py"
    ]


# ---- imports ----


def imports(source):
    """(module, names of what is taken from it, whether at the top) of every import; ours by the name of the file, as ".", "model"."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (
                "." * node.level + (node.module or ""),
                [alias.name for alias in node.names],
                node in tree.body,
            )


def ours(source):
    """The files of ours that a file imports."""
    stems = {path.stem for path in FILES}
    for module, names, _ in imports(source):
        if module in (".", "nanovlm"):
            yield from (name if name in stems else "__init__" for name in names)
        elif module.startswith((".", "nanovlm.")):
            yield module.removeprefix("nanovlm").lstrip(".").split(".")[0]
        elif module in stems:
            yield module


def test_imports_only_go_down_the_rooms():
    floor = {name: number for number, line in enumerate(ROOMS) for name in line.split()}
    assert floor.keys() == {path.stem for path in FILES}, (
        "a file without a room, or a room without a file"
    )
    up = [
        f"{path.name} imports {name}"
        for path in FILES
        for name in ours(path.read_text())
        if floor[name] <= floor[path.stem]
    ]
    up += [
        f"{path.name} imports {name}"
        for path in FILES
        if path.stem in KNOWS_ONLY
        for name in ours(path.read_text())
        if name not in KNOWS_ONLY[path.stem].split()
    ]
    assert not up, rows(up)


def test_nothing_is_imported_but_the_six_packages():
    for guest, host in GUESTS.items():
        assert any(
            re.match(rf"{guest}\b", line, re.IGNORECASE)
            for line in importlib.metadata.requires(host)
        ), f"{guest} does not come with {host}"
    wrong, known = (
        [],
        {
            *PACKAGES.values(),
            *GUESTS,
            *sys.stdlib_module_names,
            *(path.stem for path in FILES),
            "nanovlm",
            "",
        },
    )
    for path in FILES:
        for module, _, top in imports(path.read_text()):
            name = module.split(".")[0]
            if name not in known and not (name in OPTIONAL and not top):
                wrong.append(f"{path.name} imports {module}")
    assert not wrong, rows(wrong)


def test_requirements_are_the_six_packages_and_pinned():
    lines = [
        line
        for name in ("requirements.txt", "requirements-test.txt")
        for line in (ROOT / name).read_text().splitlines()
        if line
    ]
    loose = [
        line
        for line in lines
        if not re.fullmatch(r"[\w-]+==[\w.]+(; [\w ]+ == \"\w+\")?", line)
        and line != "-r requirements.txt"
    ]
    assert not loose, rows(loose)
    named = [
        re.match(r"[\w-]+", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    assert sorted(named) == sorted(PACKAGES)


# ---- settings ----


def unread(source, settings):
    """The settings that the function at the head of a source never reads: as a variable, or, where it hands on its locals(), as an attribute."""
    head = ast.parse(source).body[0]
    nodes = [node for statement in head.body for node in ast.walk(statement)]
    read = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    if "locals" not in read:
        return [name for name in settings if name not in read]
    everywhere = list(ast.walk(ast.parse(source)))
    read |= {
        node.attr
        for node in everywhere
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    patterns = [
        "".join(
            re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+"
            for part in node.args[1].values
        )
        for node in everywhere
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "getattr"
        and isinstance(node.args[1], ast.JoinedStr)
    ]
    return [
        name
        for name in settings
        if name not in read and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_setting_has_a_remark_and_is_read(function):
    settings, source = cli.settings(function), inspect.getsource(function)
    assert not (
        mute := [name for name, _, _, remark in settings if not re.match(r"\S.*\w", remark)]
    ), f"{function.__name__}: no remark on {mute}"
    kinds = (bool, int, float, str, list[str], int | None, float | None, str | None)
    assert not (strange := [name for name, kind, _, _ in settings if kind not in kinds]), (
        f"{function.__name__}: what is {strange}?"
    )
    if "locals()" in source:
        source += (
            "\n\n"
            + inspect.getsource(sys.modules[function.__module__])
            + inspect.getsource(recipes)
        )
    assert not (idle := unread(source, [name for name, *_ in settings])), (
        f"{function.__name__} never reads {idle}"
    )
    assert inspect.getdoc(function)


def test_a_setting_that_is_parsed_and_ignored_is_seen():
    own = "def f(*, a=1, b=2, c=3):\n    b = 3\n    return a\n"
    assert unread(own, ["a", "b", "c"]) == ["b", "c"]
    handed = "def f(*, a=1, b=2, c_lr=3, d=4):\n    go(locals())\n\ndef go(run):\n    d = run.a + getattr(run, f'{x}_lr')\n"
    assert unread(handed, ["a", "b", "c_lr", "d"]) == ["b", "d"]


# ---- the shape of the code ----


def size(function):
    """Lines of a function's body, its docstring aside."""
    body = (
        function.body[1:]
        if ast.get_docstring(function) and len(function.body) > 1
        else function.body
    )
    return function.end_lineno - body[0].lineno + 1


def depth(node, chained=False):
    """How many blocks stand in one another; an elif is no deeper than its if, a function within starts anew."""
    opens = (
        isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)) and not chained
    )
    tail = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
    inside = [
        depth(child, child in tail and isinstance(child, ast.If))
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, (ast.FunctionDef, ast.Lambda))
    ]
    return opens + max(inside, default=0)


def faults(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (size(node) > 70 or depth(node) > 4):
            yield f"line {node.lineno}: {node.name} has {size(node)} lines of body (at most 70), {depth(node)} blocks in one another (at most 4)"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") != "zip":
            yield from (
                f"line {node.lineno}: strict=False"
                for k in node.keywords
                if k.arg == "strict" and getattr(k.value, "value", None) is False
            )
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            yield f"line {number}: {line.strip()}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_code_can_be_held_in_a_head_and_swallows_nothing(path):
    assert not (found := list(faults(path.read_text()))), rows(found)


def test_each_fault_is_seen():
    long = "def f():\n" + "    x = 1\n" * 71
    deep = "def f():\n    if a:\n        pass\n    elif b:\n        for x in y:\n            with z:\n                while c:\n"
    deep += "                    try:\n                        go()\n                    except:\n                        pass\n"
    assert len(list(faults(long))) == 1 and list(faults(long.replace("    x = 1\n", "", 1))) == []
    assert list(faults(deep)) == [
        "line 1: f has 10 lines of body (at most 70), 5 blocks in one another (at most 4)",
        "line 10: a bare except",
    ]
    assert (
        list(
            faults(
                deep.replace("if a:", "x:")
                .replace("    x:\n        pass\n    elif b:", "    if a:")
                .replace("except:", "except E:")
            )
        )
        != []
    )
    assert list(
        faults("m.load_state_dict(s, strict=False)\nzip(a, b, strict=False)\nx = 1  # TODO later\n")
    ) == ["line 1: strict=False", "line 3: x = 1  # TODO later"]
