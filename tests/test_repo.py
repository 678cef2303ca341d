"""What nothing else would hold: the READMEs' paths, commands and counts are true, only the six
packages are imported, and every setting has a remark and is read."""

import ast
import importlib.metadata
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import prepare
import sample
import train
from nanovlm import UserError, cli, files
from nanovlm.demo import run
from nanovlm.training import memory, recipes

PREPARE = prepare.COMMANDS
SCRIPTS = {"train.py": train.train, "sample.py": sample.sample, "prepare.py": PREPARE}
FUNCTIONS = [train.train, sample.sample, *PREPARE.values()]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanovlm/**/*.py")])
README = ROOT / "README.md"
READMES = [README, *sorted(ROOT.glob("nanovlm/*/README.md"))]
FIRST_PAGE_WORDS = 1600
# What the READMEs ask the reader to bring.
BROUGHT = {
    "photos.json",
    "questions.json",
    "captions.json",
    "chats.json",
    "hard.json",
    "photo.jpg",
    "mmstar.parquet",
}

PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "pillow": "PIL",
    "tiktoken": "tiktoken",
    "safetensors": "safetensors",
    "triton": "triton",
}
BROUGHT_ALONG = {"regex": "tiktoken", "jinja2": "torch"}  # a package of ours requires them
# Used if the user has them, so imported where they are used.
OPTIONAL = {"huggingface_hub", "tensorboard", "pyarrow", "matplotlib"}


def lines_of(problems):
    return "\n" + "\n".join(problems)


# ---- READMEs ----


def commands(text):
    """The shell commands in a text: indented lines and `inline` ones, without what stands two
    spaces behind them."""
    text = text.replace("\\\n", " ")
    start = r"python|torchrun|pip|hf|echo|[A-Z_]+=\w+ python"
    found = re.findall(rf"^ {{4}}((?:{start})\b.*)", text, re.MULTILINE)
    found += re.findall(r"`((?:python|torchrun|pip) [^`]+)`", text)
    return [re.split(r"\s{2,}", line.strip())[0] for line in found]


def check_command(line):
    """Raises unless every part of a command line is understood; runs nothing. Returns the paths
    that it makes."""
    made = []
    for part in re.split(r"\s(?:&&|\|)\s", line):
        words = shlex.split(part, comments=True)
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        match words:
            case ["pip", "install", "-r", file]:
                assert (ROOT / file).is_file(), f"{line}: no file {file}"
            case ["hf", "download", name, *_]:
                assert files.is_repo_id(name), f"{line}: {name} is not owner/name"
            case ["python", "-m", "pytest", *_] | ["pip", "install", *_] | ["echo", *_]:
                pass
            case ["python", script, *_] if script not in SCRIPTS and script.startswith("tests/"):
                assert (ROOT / script).is_file(), f"{line}: no script {script}"
            case ["python" | "torchrun", *_]:
                script = next((word for word in words if word.endswith(".py")), None)
                assert script in SCRIPTS, f"{line}: {script} is not a script of ours"
                assert all(word.startswith("--") for word in words[1 : words.index(script)]), line
                made += check_settings(line, script, words[words.index(script) + 1 :])
            case _:
                raise AssertionError(f"{line}: what is {words[0]}?")
    return made


def parse_command(script, argv):
    """(the script's function, its settings as given or by default, those that were given)."""
    function = SCRIPTS[script]
    if isinstance(function, dict):
        function, argv = cli.choose_command(function, argv)
    given = cli.parse_arguments(function, [word for word in argv if word != "--help"])
    return (
        function,
        {name: default for name, _, default, _ in cli.settings(function)} | given,
        given,
    )


def check_settings(line, script, argv):
    try:
        function, values, given = parse_command(script, argv)
    except UserError as error:
        raise AssertionError(f"{line}: {error}") from None
    if "--help" in argv:
        return []
    if function is train.train and not given:
        return demonstration_paths()
    if function is train.train:
        return [recipes.load_settings(values, 1).out]
    if function is sample.sample:
        changed = cli.changed_settings(function, values)
        cli.check_rules(changed, sample.RULES, SimpleNamespace(**values))
    return [values["out"]] if values.get("out") else []


def demonstration_paths():
    return ["out/demo", "data/demo", *re.findall(r'"([\w./-]+)"', inspect.getsource(run))]


def paths_in(text):
    """What a text names as a path: link targets, and words that begin like our folders or end like
    our files."""
    text = text.replace("\\_", "_")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
    ends = "py|md|txt|toml|jpg|jpeg|png|json|jsonl|safetensors"
    folders = r"(?:nanovlm|tests|data|out|\.ci|shared)/[\w./-]*\w"
    words = re.findall(rf"(?<![\w/.:<-])(?:{folders}|[\w/-]+\.(?:{ends}))\b", text)
    return sorted({*links, *words})


def is_placeholder(path):
    """FILE.json, data/NAME, step-000200: for the reader to fill in."""
    parts = [Path(part).stem for part in Path(path).parts]
    return any(
        re.fullmatch(r"[A-Z]+|step-\d+|rank-\d+", part) and part not in ("README", "LICENSE")
        for part in parts
    )


def untrue_paths(text, made, folder=ROOT):
    source = "".join(path.read_text() for path in FILES)
    names = {path.name for path in FILES}
    for path in paths_in(text):
        exists = any((base / path).exists() for base in (ROOT, ROOT / "nanovlm", folder))
        is_made = any(Path(path).is_relative_to(m) or Path(m).is_relative_to(path) for m in made)
        ours = "/" not in path and (f'"{path}"' in source or path in names)  # nanovlm.json
        if not (exists or is_made or ours or path in BROUGHT or is_placeholder(path)):
            yield path


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_path_in_a_readme_is_there_or_made_by_one_of_its_commands(readme):
    text = readme.read_text()
    made = [path for line in commands(text) for path in check_command(line)]
    made += [path for line in commands(README.read_text()) for path in check_command(line)]
    assert not list(untrue_paths(text, made, readme.parent))


SCRIPT_TEXTS = {name: sys.modules[Path(name).stem].__doc__ for name in SCRIPTS}


@pytest.mark.parametrize("name", ["README", *SCRIPTS])
def test_every_command_in_the_readme_and_in_the_scripts_is_understood(name):
    text = SCRIPT_TEXTS.get(name) or README.read_text()
    found = commands(text)
    assert len(found) >= 3
    for line in found:
        check_command(line)


def test_the_first_page_is_short():
    assert len(README.read_text().split()) <= FIRST_PAGE_WORDS


def command_settings(line):
    """(the function, its settings); of train.py with the stage's values filled in."""
    words = shlex.split(line)
    script = next(word for word in words if word in SCRIPTS)
    function, values, _ = parse_command(script, words[words.index(script) + 1 :])
    if function is train.train:
        values = vars(recipes.load_settings(values, 1))
    return function, values


def lines_without_input(road):
    """The lines of a road that read what no line before them has made or fetched."""
    there = set()
    for line in road:
        if line.startswith("hf download "):
            there.add(line.split()[2])
            continue
        function, values = command_settings(line)
        # stitch fetches published models itself
        published = [values.get(name) for name in ("vision", "decoder") if values.get(name)]
        wanted = [values[name] for name in ("model", "data") if values.get(name)]
        if function is prepare.stitch:
            wanted = []
        if function is sample.sample and values["model"] in ("", None):
            wanted = ["out/sft"]
        if not all(map(files.is_repo_id, published)) or not set(wanted) <= there:
            yield line
        there.add(values["out"])


ROADS = {  # a README's section: the published models that its first command names
    "README.md: Fine-tune a published model on your own images": ["HuggingFaceTB/SmolVLM"],
    "README.md: A real vision encoder and language model": [
        "openai/clip-vit-large-patch14-336",
        "mistralai/Mistral-7B-Instruct-v0.3",
    ],
    "nanovlm/checkpoints/README.md: SigLIP and SmolLM2, on one GPU": [
        "google/siglip-base-patch16-224",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ],
}


def read_road(section):
    """The commands of a README's section."""
    path, _, title = section.partition(": ")
    text = (ROOT / path).read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    return commands(text)


@pytest.mark.parametrize("section", ROADS)
def test_a_road_reads_only_what_it_has_made(section):
    """From published parts to an answer; every folder has the name by which the next line asks."""
    road = read_road(section)
    assert all(name in road[0] for name in ROADS[section])
    assert not list(lines_without_input(road))
    steps = [(f.__name__, values.get("stage")) for f, values in map(command_settings, road[1:])]
    tuned = [("data", None), ("train", "sft")]
    if road[0].startswith("hf download"):
        assert steps == [*tuned, ("export", None)]
    else:
        assert steps == [("data", None), ("train", "pretrain"), *tuned, ("sample", None)]


def test_a_line_without_its_input_is_seen():
    road = read_road("nanovlm/checkpoints/README.md: SigLIP and SmolLM2, on one GPU")
    for n in range(5):
        assert list(lines_without_input(road[:n] + road[n + 1 :])), "a line is left out"
    other = [*road[:2], road[2].replace("small-pretrain", "small-pre"), *road[3:]]
    assert list(lines_without_input(other)) == [road[3], road[4]]
    assert list(lines_without_input(["hf download a/b", "python sample.py --model=a/c"]))
    assert not list(lines_without_input(["hf download a/b", "python sample.py --model=a/b"]))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_a_readme_has_no_gaps(readme):
    lines = readme.read_text().splitlines()
    assert not [line for line in lines if re.fullmatch(r"[A-Z]{3,}", line)]


def test_the_readmes_line_counts_are_the_files():
    row = r"^\| \[?`([\w/.]+\.py)`(?:\]\([^)]*\))? \| ([\d,]+) \| (.*\S.*) \|$"
    found = re.findall(row, README.read_text(), re.MULTILINE)
    counts = {name: len((ROOT / name).read_text().splitlines()) for name, *_ in found}
    wrong = [
        f"| `{name}` | {counts[name]} | {question} |"
        for name, count, question in found
        if int(count.replace(",", "")) != counts[name]
    ]
    assert not wrong, f"these rows of README.md should be:{lines_of(wrong)}"
    core = [path for path in FILES if path.parent.name == "models" and path.stem != "__init__"]
    assert {path.relative_to(ROOT).as_posix() for path in core} <= counts.keys()


# Each stands in a heading of a README, or in the docstring of a file.
TERMS = """vision encoder, language model, projector, image token, tile, patch, KV cache, prefill,
loss mask, learning rate, sequence length, packing, global batch, micro batch,
gradient accumulation, activation checkpointing, mixed precision, evaluation, benchmark"""


@pytest.mark.parametrize("term", [term.strip() for term in TERMS.replace("\n", " ").split(",")])
def test_a_term_of_the_field_is_found_where_it_is_explained(term):
    places = [line for path in READMES for line in path.read_text().splitlines() if line[:1] == "#"]
    for path in FILES:
        places.append(" ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split()))
    assert any(term.lower() in text.lower() for text in places)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python train.py --stage=stf", "--stage=stf is not known"),
        ("python train.py --stage=sft --step=3", "--step is not a setting"),
        ("torchrun --nproc_per_node=8 trian.py --stage=sft", "trian.py is not a script of ours"),
        ("python tests/photos.py", "no script tests/photos.py"),
        ("pip install -r requirement.txt && python train.py", "no file requirement.txt"),
        ("python prepare.py stich", "did you mean stitch"),
        ("python sample.py --top_p=7", "--top_p=7.0"),
        ("hf download out/sft", "out/sft is not owner/name"),
        ("bash do.sh", "what is bash"),
        ("echo hm | python sample.py --chat=perhaps", "--chat=perhaps is not true or false"),
    ],
)
def test_a_command_that_would_fail_is_seen(line, message):
    with pytest.raises((AssertionError, UserError), match=re.escape(message)):
        check_command(line)


def test_a_path_that_nothing_makes_is_seen():
    text = "[a](nanovlm/modle.py), `out/sft`, data/cats/a.jpg, `nanovlm.json`, --out=data/NAME, "
    text += "b.jpg, .ci/run, tests"
    wrong = ["b.jpg", "data/cats/a.jpg", "nanovlm/modle.py"]
    assert list(untrue_paths(text, ["out/sft", "data/dogs"])) == wrong
    assert list(untrue_paths(text, ["out/sft", "data/cats", "b.jpg"])) == ["nanovlm/modle.py"]


# ---- packages ----


def imports(source):
    """(module, whether at the top) of every import."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node in tree.body


def test_nothing_is_imported_but_the_six_packages():
    for name, host in BROUGHT_ALONG.items():
        required = importlib.metadata.requires(host)
        assert any(re.match(rf"{name}\b", line, re.IGNORECASE) for line in required)
    known = {*PACKAGES.values(), *BROUGHT_ALONG, *sys.stdlib_module_names, "nanovlm", ""}
    wrong = []
    for path in FILES:
        for module, at_top in imports(path.read_text()):
            name = module.split(".")[0]
            if (path.name, name) == ("prepare.py", "train"):  # for its experiments
                continue
            if name not in known and not (name in OPTIONAL and not at_top):
                wrong.append(f"{path.name} imports {module}")
    assert not wrong, lines_of(wrong)


def test_requirements_are_the_six_packages_and_pinned():
    needed = (ROOT / "requirements.txt").read_text().splitlines()
    lines = needed + (ROOT / "requirements-test.txt").read_text().splitlines()
    pinned = r"[\w-]+==[\w.]+(; [\w ]+ == \"\w+\")?|-r requirements.txt|"
    assert not [line for line in lines if not re.fullmatch(pinned, line)]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in needed) == sorted(PACKAGES)


# ---- settings ----


def unread_settings(source, settings):
    """The settings that the first function of a source never reads: as a variable or, if it passes
    on its locals(), as an attribute."""
    nodes = [node for statement in ast.parse(source).body[0].body for node in ast.walk(statement)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and is_read(node)}
    if "locals" not in read:
        return [name for name in settings if name not in read]
    everywhere = list(ast.walk(ast.parse(source)))
    read |= {node.attr for node in everywhere if isinstance(node, ast.Attribute) and is_read(node)}
    patterns = [pattern for node in everywhere for pattern in getattr_patterns(node)]
    return [
        name
        for name in settings
        if name not in read and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]


def is_read(node):
    return isinstance(node.ctx, ast.Load)


def getattr_patterns(node):
    """getattr(run, f"{part}_lr") reads every name that fits."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"):
        return
    if isinstance(node.args[1], ast.JoinedStr):
        parts = node.args[1].values
        yield "".join(
            re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in parts
        )


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_setting_has_a_remark_and_is_read(function):
    settings, source = cli.settings(function), inspect.getsource(function)
    assert not [name for name, _, _, remark in settings if not re.match(r"\S.*\w", remark)]
    kinds = (bool, int, float, str, list[str], int | None, float | None, str | None)
    assert not [name for name, kind, _, _ in settings if kind not in kinds]
    if "locals()" in source:
        for module in (sys.modules[function.__module__], recipes, memory):
            source += "\n\n" + inspect.getsource(module)
    assert not unread_settings(source, [name for name, *_ in settings])
    assert inspect.getdoc(function)


def test_train_has_at_most_45_settings():
    assert len(cli.settings(train.train)) <= 45


def test_a_setting_that_is_parsed_and_ignored_is_seen():
    own = "def f(*, a=1, b=2, c=3):\n    b = 3\n    return a\n"
    assert unread_settings(own, ["a", "b", "c"]) == ["b", "c"]
    passed_on = (
        "def f(*, a=1, b=2, c_lr=3, d=4):\n    go(locals())\n\n"
        "def go(run):\n    d = run.a + getattr(run, f'{x}_lr')\n"
    )
    assert unread_settings(passed_on, ["a", "b", "c_lr", "d"]) == ["b", "d"]
