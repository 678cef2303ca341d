"""Settings on a command line become the declared types; one error names all that is wrong."""

import inspect
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nanovlm import UserError, cli


def example(
    *,
    stage: str = "a # b",  # which part; a hash in a default is no remark
    lr: float = 1e-3,  # peak learning rate
    image: list[str] = [],  # may be repeated
    vision_lr: float | None = None,  # of the vision encoder
    steps: int = 10,  # how long
    compile: bool = True,  # make it fast
    resume: bool = False,  # go on
    out: str | None = None,  # where to
    freeze: str = "",  # what stays
    # --- optimization
    warmup_ratio: float = 0.0,  # share of the steps
):
    """Do something.

    At length."""


def parse(line):
    return cli.parse_arguments(example, line.split())


def test_settings_are_the_parameters_with_their_remarks():
    assert [name for name, _, _, _ in cli.settings(example)] == list(
        inspect.signature(example).parameters
    )
    assert cli.settings(example)[:4] == [
        ("stage", str, "a # b", "which part; a hash in a default is no remark"),
        ("lr", float, 1e-3, "peak learning rate"),
        ("image", list[str], [], "may be repeated"),
        ("vision_lr", float | None, None, "of the vision encoder"),
    ]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", {}),
        ("--lr=1", {"lr": 1.0}),
        ("--lr 1e-3", {"lr": 1e-3}),
        ("--lr -1", {"lr": -1.0}),
        ("--steps -1", {"steps": -1}),
        ("--steps=1_000", {"steps": 1000}),
        ("--steps 1e3", {"steps": 1000}),
        (
            "--steps=99999999999999999999",
            {"steps": 99999999999999999999},
        ),  # more digits than a float holds
        ("--out=a=b", {"out": "a=b"}),
        ("--freeze=", {"freeze": ""}),
        ("--out none", {"out": None}),
        (
            "--stage none",
            {"stage": "none"},
        ),  # a setting that may not be None takes the word as it is
        ("--vision_lr=None", {"vision_lr": None}),
        ("--vision-lr=2", {"vision_lr": 2.0}),
        ("--image a --image=b", {"image": ["a", "b"]}),
        ("--resume", {"resume": True}),
        ("--resume --lr=1", {"resume": True, "lr": 1.0}),
        ("--stage=--help", {"stage": "--help"}),
        *[
            (f"--compile{space}{word}", {"compile": False})
            for word in ("0", "false", "no", "off", "False", "OFF")
            for space in " ="
        ],
        *[
            (f"--resume{space}{word}", {"resume": True})
            for word in ("1", "true", "yes", "on", "True", "ON")
            for space in " ="
        ],
    ],
)
def test_a_setting_becomes_its_type(line, expected):
    found = parse(line)
    assert found == expected
    assert [type(v) for v in found.values()] == [
        type(v) for v in expected.values()
    ]  # for True == 1 == 1.0


def test_a_group_is_a_comment_line_above_its_first_setting():
    assert cli.setting_groups(example) == {"warmup_ratio": "optimization"}


def test_help_prints_groups_and_wraps_remarks(capsys, monkeypatch):
    def wordy(
        *,
        steps: int = 1,  # how many
        # --- parallelism
        device: str = "auto",  # a remark that the help wraps
    ):
        """Do something."""

    monkeypatch.setattr(cli, "WIDTH", 40)
    cli.print_help(wordy)
    assert capsys.readouterr().out.splitlines() == [
        "Do something.",
        "",
        "  --steps   1     how many",
        "",
        "parallelism",
        "  --device  auto  a remark that the help",
        "                  wraps",
    ]


def test_a_default_list_is_never_grown():
    parse("--image=a")
    assert inspect.signature(example).parameters["image"].default == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("--lr=x", "--lr=x is not a number"),
        ("--lr=nan", "--lr=nan is not a number"),
        ("--lr=inf", "--lr=inf is not a number"),
        ("--lr=1e999", "--lr=1e999 is not a number"),
        ("--lr=none", "--lr=none is not a number"),
        ("--lr=", "--lr needs a value, a number"),
        ("--vision_lr=x", "--vision_lr=x is not a number or none"),
        ("--out=", "--out needs a value, a text or none"),
        ("--stage=", "--stage needs a value, a text"),
        ("--image=", "--image needs a value, a text"),
        ("--steps=1.5", "--steps=1.5 is not a whole number"),
        ("--steps=1e-3", "--steps=1e-3 is not a whole number"),
        ("--steps=inf", "--steps=inf is not a whole number"),
        ("--steps=true", "--steps=true is not a whole number"),
        ("--compile=maybe", "--compile=maybe is not true or false"),
        ("--resume out/sft", "--resume=out/sft is not true or false"),
        ("--lr", "--lr needs a value, a number"),
        ("--lr --resume", "--lr needs a value, a number"),
        ("--lr=1 --lr=2", "--lr=2 comes after another --lr"),
        ("--vision-lr=1 --vision_lr 2", "--vision_lr=2 comes after another"),
        ("--vison_lr=1", "--vison_lr is not a setting, did you mean --vision_lr?"),
        ("--xyzzy=1", "--xyzzy is not a setting"),
        ("fast", "'fast' belongs to no setting"),
        ("lr=3", "'lr=3' belongs to no setting, did you mean --lr?"),
        ("-steps 3", "'-steps' belongs to no setting, did you mean --steps?"),
        ("--keep=1", "--keep is not a setting"),
        ("--warmup=1", "--warmup is not a setting, did you mean --warmup_ratio?"),
        ("--dry_run=1", "--dry_run is not a setting, did you mean `python prepare.py estimate`?"),
    ],
)
def test_an_error_names_the_setting_and_the_text(line, message):
    with pytest.raises(UserError) as caught:
        parse(line)
    assert message in str(caught.value)


def plot(
    *,
    log: list[str] = [],  # of runs
    steps: int = 1,  # shown
):
    """A function whose first setting is a list."""


def test_words_that_stand_alone_belong_to_the_first_setting_if_that_is_a_list():
    assert cli.parse_arguments(plot, ["a", "--steps=3", "b", "--log=c"]) == {
        "log": ["a", "b", "c"],
        "steps": 3,
    }
    with pytest.raises(UserError, match="'-a' belongs to no setting"):
        cli.parse_arguments(plot, ["-a"])


def test_a_share_may_be_typed_in_percent():
    assert parse("--lr=1%")["lr"] == 0.01
    with pytest.raises(UserError, match="--lr=%1 is not a number"):
        parse("--lr=%1")


def test_one_error_names_all_that_is_wrong():
    with pytest.raises(UserError) as caught:
        parse("--lr=x --steps=1.5 word --compile=2 --out=fine --resum")
    assert [part.split()[0] for part in str(caught.value).split("; ")] == [
        "--lr=x",
        "--steps=1.5",
        "'word'",
        "--compile=2",
        "--resum",
    ]


@given(st.lists(st.text(alphabet="-=lrsteponimag 019e._", max_size=12), max_size=5))
def test_any_words_give_settings_or_an_error(argv):
    kinds = {name: kind for name, kind, _, _ in cli.settings(example)}
    try:
        found = cli.parse_arguments(example, argv)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            isinstance(value, list if kinds[name] == list[str] else kinds[name])
            for name, value in found.items()
        )


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.SIG_DFL)
from nanovlm import UserError, cli

def first(*,
    lr: float = 1.0,      # a number
    on: bool = False,     # a switch
    path: str | None = None,  # a place
):
    '''The first thing.'''
    if path == "error":
        raise UserError("wrong")
    if path == "bug":
        raise KeyError("bug")
    if path == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if path == "pipe":
        print("x" * 1_000_000)
    print(lr, on, open(path).read() if path else "")

def second(*,
    n: int = 3,   # how many
):
    '''The second thing.'''
    print("second", n)

cli.run_script({what})
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, what in [("one", "first"), ("two", "{'first': first, 'second': second}")]:
        (folder / f"{name}.py").write_text(
            textwrap.dedent(SCRIPT).format(root=str(ROOT), what=what)
        )
    return folder


def run(scripts, line):
    """(exit code, stdout, stderr) of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=scripts, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "line, expected",
    [
        ("one.py --lr=2 --on", (0, "2.0 True \n", "")),
        ("one.py --lr=x", (1, "", "error: --lr=x is not a number\n")),
        ("one.py --path=error", (1, "", "error: wrong\n")),
        ("one.py --path=missing.txt", (1, "", "error: missing.txt: No such file or directory\n")),
        ("one.py --path=interrupt", (130, "", "")),
        ("two.py second --n 4", (0, "second 4\n", "")),
        ("two.py", (1, "", "error: the first word is a command (first, second): there is none\n")),
        (
            "two.py secnd",
            (
                1,
                "",
                "error: the first word is a command (first, second): 'secnd' is not one of them, "
                "did you mean second?\n",
            ),
        ),
        ("two.py --help", (0, "first: The first thing.\nsecond: The second thing.\n", "")),
        ("two.py second -h", (0, "The second thing.\n\n  --n  3  how many\n", "")),
        (
            "one.py --lr=x --help",
            (
                0,
                "The first thing.\n\n  --lr    1.0    a number\n  --on    false  a switch\n"
                "  --path  none   a place\n",
                "",
            ),
        ),
    ],
)
def test_results_errors_and_help_are_printed_where_they_belong(scripts, line, expected):
    assert run(scripts, line) == expected


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare.py"])
def test_ctrl_c_while_torch_is_imported_prints_nothing(script, tmp_path):
    """A shell prints 130 as the exit code of a process that SIGINT has ended."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_a_bug_keeps_its_traceback(scripts):
    code, _, errors = run(scripts, "one.py --path=bug")
    assert code == 1 and errors.startswith("Traceback") and "KeyError: 'bug'" in errors


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
@pytest.mark.parametrize("path", ["pipe", os.devnull])
def test_a_reader_who_leaves_early_is_no_error(scripts, path):
    """`one.py | true`: nothing on stderr, if the pipe breaks in a print or at the last flush."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "one.py", f"--path={path}"],
        cwd=scripts,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
