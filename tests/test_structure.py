"""How the code is laid out and worded: imports go down the folders, the core stands alone, names
and sentences use the field's words, and functions stay short."""

import ast
import collections
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

from nanovlm.evals.benchmarks import BENCHMARKS

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanovlm/**/*.py")])

# A file imports only from its own folder and from lines below it.
ORDER = [
    ["train", "sample", "prepare"],
    ["demo"],
    ["server"],
    ["visualize"],
    ["evals"],
    ["training"],
    ["preprocess"],
    ["checkpoints"],
    ["inference"],
    ["data"],
    ["distributed", "files", "cli"],
    ["models"],
    ["kernels"],
    ["__init__"],
]
# These know even less: the model knows no file, no tokenizer and no second process.
KNOWS_ONLY = {
    "models": ["models", "kernels/dispatch", "__init__"],
    "kernels": ["kernels"],
    "inference": ["inference", "models", "kernels/dispatch"],
}
MAX_STATEMENTS, MAX_NESTING = 45, 4  # of a function; a settings signature counts as none
# Python tokens outside tests, docstrings and comments; more only for an issue that asks for more.
MAX_TOKENS = 104_800
MAX_FOREIGN, MAX_FOREIGN_IN_FOLDER = 0.045, 0.08  # share of words in names

# Top-level names that stand in two files, where both mean the same.
SHARED_NAMES = {
    "Block": "a transformer block, of the vision encoder and of the decoder",
    "TABLE": "numbers of a kernel by compute capability",
    "attention": "the formula in models/, the call of the kernel in kernels/",
    "rmsnorm": "the formula in models/, the call of the kernel in kernels/",
    "unsupported": "why a kernel does not take a call",
    "setup_context": "what torch.library.register_autograd calls so",
    "backward": "what torch.library.register_autograd calls so",
}


def place(path):
    """A file's name here: its path without nanovlm/ and .py; an __init__ has its folder's."""
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    return name.removeprefix("nanovlm/").removesuffix("/__init__")


PLACES = {place(path) for path in FILES}


def imported(path):
    """The files of ours that a file imports, wherever in it."""
    folder = path.relative_to(ROOT / "nanovlm").parts[:-1] if "nanovlm" in path.parts else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").split(".") if node.module else []
        if node.level:
            base = [*folder[: len(folder) + 1 - node.level], *module]
        elif module[:1] == ["nanovlm"]:
            base = module[1:]
        else:
            continue
        for alias in node.names:
            inside = "/".join([*base, alias.name])
            yield inside if inside in PLACES else "/".join(base) or "__init__"


def top(name):
    return name.split("/")[0]


def test_imports_only_go_down_the_folders():
    floor = {name: number for number, names in enumerate(ORDER) for name in names}
    assert {top(name) for name in PLACES} == floor.keys(), (
        "a folder without a line, or a line too many"
    )
    wrong = []
    for path in FILES:
        here = place(path)
        for name in imported(path):
            same = top(name) == top(here)
            if not same and floor[top(name)] <= floor[top(here)]:
                wrong.append(f"{here} imports {name}")
            allowed = KNOWS_ONLY.get(top(here))
            if allowed and not any(name == one or name.startswith(f"{one}/") for one in allowed):
                wrong.append(f"{here} imports {name}")
    assert not wrong, wrong


def test_an_import_is_seen_as_the_file_that_it_names():
    assert {"models/decoder", "models/projector", "__init__"} <= set(
        imported(ROOT / "nanovlm/models/vlm.py")
    )
    assert {"inference/generate", "kernels/dispatch"} <= set(imported(ROOT / "sample.py"))


def test_the_core_stands_alone():
    """models/: at most 850 lines, no file over 250; of ours it loads only kernels/dispatch.py."""
    files = sorted((ROOT / "nanovlm/models").glob("*.py"))
    lines = {path.name: len(path.read_text().splitlines()) for path in files}
    assert sum(lines.values()) <= 850 and max(lines.values()) <= 250, lines
    code = "import sys, nanovlm.models.vlm; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name for name in done.stdout.split() if name.split(".")[0] in ("nanovlm", "triton")}
    core = {"nanovlm", "nanovlm.kernels", "nanovlm.kernels.dispatch", "nanovlm.models"}
    assert loaded == core | {
        f"nanovlm.models.{path.stem}" for path in files if path.stem != "__init__"
    }


FOLDERS = sorted({path.parent for path in FILES if path.parent not in (ROOT, ROOT / "nanovlm")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_in_ten_lines_what_it_is_for(folder):
    tree = ast.parse((folder / "__init__.py").read_text())
    assert len(tree.body) == 1 and len(ast.get_docstring(tree).splitlines()) <= 10


# ---- size ----


def code_tokens(source):
    """Python tokens without comments, docstrings, line ends and indentation."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings.add(node.body[0].lineno)
    skipped = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    )
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(
        token.type not in skipped
        and not (token.type == tokenize.STRING and token.start[0] in docstrings)
        for token in tokens
    )


def test_the_code_does_not_grow():
    total = sum(code_tokens(path.read_text()) for path in FILES)
    print(f"{total:,} Python tokens outside tests")
    assert total <= MAX_TOKENS


def statements(function):
    """Statements in a function, its docstring and the functions inside it aside."""
    inside = [
        node
        for child in ast.walk(function)
        if isinstance(child, ast.FunctionDef) and child is not function
        for node in ast.walk(child)
        if isinstance(node, ast.stmt)
    ]
    total = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
    return total - len(inside) - bool(ast.get_docstring(function))


def nesting(node, chained=False):
    """How many blocks stand in one another. An elif is no deeper than its if."""
    opens = isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match)
    tail = node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 else []
    inside = [
        nesting(child, child in tail and isinstance(child, ast.If))
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, ast.FunctionDef | ast.Lambda)
    ]
    return (opens and not chained) + max(inside, default=0)


COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def faults(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, COMPREHENSIONS) and any(
            isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node
        ):
            yield f"line {node.lineno}: a comprehension in a comprehension"
        if isinstance(node, ast.FunctionDef) and statements(node) > MAX_STATEMENTS:
            yield f"line {node.lineno}: {node.name} has {statements(node)} statements"
        if isinstance(node, ast.FunctionDef) and nesting(node) > MAX_NESTING:
            yield f"line {node.lineno}: {node.name} has {nesting(node)} blocks in one another"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") != "zip":
            for keyword in node.keywords:
                if keyword.arg == "strict" and getattr(keyword.value, "value", None) is False:
                    yield f"line {node.lineno}: strict=False"
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            yield f"line {number}: {line.strip()}"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_functions_are_short_and_swallow_nothing(path):
    assert not list(faults(path.read_text()))


def test_each_fault_is_seen():
    long = "def f():\n" + "    x = 1\n" * (MAX_STATEMENTS + 1)
    deep = (
        "def f():\n    if a:\n        pass\n    elif b:\n        for x in y:\n            with z:\n"
        "                while c:\n                    try:\n                        go()\n"
        "                    except:\n                        pass\n"
    )
    assert list(faults(long)) == [f"line 1: f has {MAX_STATEMENTS + 1} statements"]
    assert list(faults(long.replace("    x = 1\n", "", 1))) == []
    assert list(faults(deep)) == ["line 1: f has 5 blocks in one another", "line 10: a bare except"]
    assert list(faults("x = [y for y in z]\n[[y for y in x] for x in z]\n")) == [
        "line 2: a comprehension in a comprehension"
    ]
    plain = deep.replace("        pass\n    elif b:\n", "").replace("except:", "except E:")
    assert list(faults(plain)) == ["line 1: f has 5 blocks in one another"]
    assert list(
        faults("m.load(s, strict=False)\nzip(a, b, strict=False)\nx = 1  # TODO later\n")
    ) == ["line 1: strict=False", "line 3: x = 1  # TODO later"]


# ---- words ----

FIELD_WORDS = set((ROOT / "tests/words/field_words.txt").read_text().split())
ALLOWED = {
    line.split()[0]: " ".join(line.split()[1:])
    for line in (ROOT / "tests/allowed_words.txt").read_text().splitlines()
    if line.strip()
}
SHAPE = re.compile(r"_(?=[A-Za-z0-9]*[A-Z])[BTSNPDHGKFVCYXa-z0-9]{1,8}$")  # q_BTHK's letters


def defined_names(tree):
    """Names that code defines: functions, classes, parameters, variables, attributes it assigns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words(name):
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", SHAPE.sub("", name))
    return [word.lower() for word in found if len(word) > 2]


def is_known(word):
    return {word, word.removesuffix("s")} & (FIELD_WORDS | ALLOWED.keys())


def counted_words():
    """{folder: (its words, those that the field does not have)}, without the demonstration."""
    counts = collections.defaultdict(lambda: ([], []))
    for path in FILES:
        if top(place(path)) == "demo":
            continue
        for name in defined_names(ast.parse(path.read_text())):
            for word in words(name):
                counts[top(place(path))][0].append(word)
                if not is_known(word):
                    counts[top(place(path))][1].append(word)
    return counts


def test_names_use_the_words_of_the_field():
    """field_words.txt: words in the names of at least two of eleven codebases of this field."""
    counts = counted_words()
    every, foreign = (sum(len(pair[n]) for pair in counts.values()) for n in (0, 1))
    shares = {name: len(odd) / len(all_of_it) for name, (all_of_it, odd) in counts.items()}
    print(f"{foreign / every:.1%} of {every:,} words in names are foreign to the field")
    worst = collections.Counter(word for _, odd in counts.values() for word in odd).most_common(20)
    assert foreign / every <= MAX_FOREIGN, worst
    folders = {name: share for name, share in shares.items() if name not in ("__init__", "cli")}
    assert max(folders.values()) <= MAX_FOREIGN_IN_FOLDER, folders


def test_an_allowed_word_has_its_reason():
    assert len(ALLOWED) <= 60 and all(len(reason) > 5 for reason in ALLOWED.values())
    assert not ALLOWED.keys() & FIELD_WORDS


def top_level_names(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_a_name_means_the_same_in_two_files():
    where = collections.defaultdict(list)
    for path in FILES:
        for name in top_level_names(path):
            where[name].append(place(path))
    twice = {name: places for name, places in where.items() if len(places) > 1}
    odd = {name: places for name, places in twice.items() if name not in SHARED_NAMES}
    assert not odd and len(twice) <= 15, odd


# The left column of the glossary in design.md: words that the field does not use for these things.
GLOSSARY = {
    r"\beyes?\b": "vision encoder",
    r"\bbrains?\b": "language model, decoder",
    r"\bnewborn\b": "random init",
    r"\bexams?\b": "benchmark",
    r"\bgolds?\b": "references",
    r"\buntrained\b": "labels, IGNORE_INDEX",
    r"\bMistake\b": "UserError",
    r"\bpicture policy\b": "image config",
    r"\bspeaks?\b": "generate",
    r"\bdoors?\b": "script",
}
# Names that nobody would search for; each has a word of the field instead.
GLOSSARY_NAMES = set(
    """told said asked spoken golds marks papers sit conclude picture pictures policy card
    hold_still spread lay_out foretell make_room resolve together mine whole settle stretch rotate
    by_document
    visible see newborn eye brain exam rates warmup places head_size ffn micro recompute offload Mistake
    UNTRAINED IMAGE Speaker""".split()  # noqa: SIM905 (a list of forty strings is no easier to read)
)
# The demonstration's world has doors and answers questions; the README's first lines may say eyes.
GLOSSARY_ASIDE = {"demo/fridge"}


def is_table_of_old_names(node):
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(getattr(target, "id", "").startswith("OLD_") for target in targets)


def texts(path):
    """Names, and every string: docstrings, messages, help. Remarks on settings, too. Tables of old
    names, OLD_…, say what they translate."""
    source = path.read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_table_of_old_names(node)]
    yield from (name.replace("_", " ") for name in defined_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_word_of_the_glossarys_left_column_is_used(path):
    if place(path) in GLOSSARY_ASIDE:
        return
    found = [
        f"{pattern} ({better}): {text[:80]!r}"
        for text in texts(path)
        for pattern, better in GLOSSARY.items()
        if re.search(pattern, text, re.IGNORECASE if pattern.islower() else 0)
    ]
    assert not found, found


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_name_of_the_glossarys_left_column_is_defined(path):
    if place(path) not in GLOSSARY_ASIDE:
        names = set(defined_names(ast.parse(path.read_text())))
        assert not names & GLOSSARY_NAMES


# ---- where a change goes ----

# The files that know a family or a benchmark by its name. Comments and docstrings may name it, too.
KNOWN_BY_NAME = {
    "decoder family": (
        r"mistral|vicuna|zephyr|smollm|qwen|gemma|llama(?!3)",
        # data/tokenizer: LlamaTokenizer, whose setting `legacy` places a space
        # checkpoints/peft, idefics3: the table LLAMA, of all decoders' names of tensors
        {
            "checkpoints/huggingface",
            "checkpoints/idefics3",
            "checkpoints/llava",
            "checkpoints/peft",
            "data/chat_template",
            "data/tokenizer",
        },
    ),
    "vision encoder": (
        r"clip_vision|siglip|dinov2",
        # checkpoints/idefics3: the vision encoder of its layout is a SigLIP
        {"checkpoints/huggingface", "checkpoints/idefics3", "checkpoints/llava"},
    ),
    "benchmark": (
        "|".join(name for name in BENCHMARKS if not BENCHMARKS[name].from_user),
        # evals/cider: "mme" is an abbreviation, too
        {"evals/benchmarks", "evals/formats", "evals/metrics", "evals/cider"},
    ),
}
# The default chat template of `prepare.py random_init` and of the demonstration.
DEFAULT_TEMPLATE = {"prepare": "mistral", "demo/run": "mistral"}


def code_strings(tree):
    """Names that code uses, and its strings without the docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.value
        elif isinstance(node, ast.Name | ast.Attribute | ast.arg | ast.FunctionDef):
            yield next(
                getattr(node, key) for key in ("id", "attr", "arg", "name") if hasattr(node, key)
            )


@pytest.mark.parametrize("kind", KNOWN_BY_NAME)
def test_a_family_or_benchmark_is_named_only_where_its_change_goes(kind):
    pattern, files = KNOWN_BY_NAME[kind]
    found = collections.defaultdict(set)
    for path in FILES:
        for text in code_strings(ast.parse(path.read_text())):
            if re.search(pattern, text, re.IGNORECASE) and text != DEFAULT_TEMPLATE.get(
                place(path)
            ):
                found[place(path)].add(text[:60])
    assert found.keys() & files and not found.keys() - files, {
        name: texts for name, texts in found.items() if name not in files
    }
