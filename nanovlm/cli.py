"""The command line: a script's settings are the keyword-only parameters of one function.

The comment behind a parameter is its help. A comment line above, such as `# --- optimization`,
starts a group of the help.
"""

import ast
import difflib
import inspect
import math
import os
import sys
import textwrap
import types
import typing

from . import UserError

BOOLEANS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
# Settings, commands and stages of older versions: "did you mean" suggests the first new name that
# the script has.
OLD_SETTINGS = {
    "batch": ("global_batch_size", "batch_size"),
    "benchmark": ("eval_benchmark",),
    "brain": ("decoder",),
    "clip": ("grad_clip",),
    "decay": ("weight_decay",),
    "dry_run": ("python prepare.py estimate",),
    "exam": ("eval_questions", "eval_scenes"),
    "exam_every": ("eval_every",),
    "exam_images": ("eval_images",),
    "eye": ("vision",),
    "ffn": ("intermediate_size",),
    "floor": ("min_lr",),
    "keep": ("keep_checkpoints",),
    "mfu": ("python prepare.py estimate",),
    "micro": ("micro_batch_size",),
    "new": ("random_init",),
    "offload": ("cpu_offload",),
    "peak": ("peak_tflops", "python prepare.py estimate"),
    "rate": ("tokens_per_s",),
    "read": ("vision_feature_layer",),
    "recompute": ("activation_checkpointing",),
    "row": ("seq_len",),
    "shard": ("hsdp_shard_size",),
    "vision_ffn": ("vision_intermediate_size",),
    "vocabulary": ("vocab_size",),
    "warmup": ("warmup_ratio",),
}
WIDTH = 100  # of the help, in columns


def settings(function):
    """[(name, type, default, remark)] of a function's keyword-only parameters."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, hints = source.splitlines(), typing.get_type_hints(function)
    arguments = ast.parse(source).body[0].args.kwonlyargs
    remarks = {a.arg: lines[a.end_lineno - 1].partition("  # ")[2].strip() for a in arguments}
    return [
        (p.name, hints[p.name], p.default, remarks[p.name])
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]


def setting_groups(function):
    """{first setting of a group: the group's title}, from the `# --- title` lines."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, groups = source.splitlines(), {}
    for a in ast.parse(source).body[0].args.kwonlyargs:
        line = lines[a.lineno - 2].strip()
        if line.startswith("# --- "):
            groups[a.arg] = line.removeprefix("# --- ")
    return groups


def convert_value(text, kind):
    """The value of a setting's text. Raises ValueError if it has another type.

    `float | None` also takes "none".
    """
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in kind.__args__ if k is not type(None))
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError("true or false")
        return BOOLEANS[text.lower()]
    if kind is int:
        number = float(text.replace("_", ""))
        if not math.isfinite(number) or number != int(number):
            raise ValueError("a whole number")
        return int(number) if "e" in text.lower() or "." in text else int(text)
    if kind is float:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    return kind(text)


TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def type_name(kind):
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if k is type(None) else TYPE_NAMES[k] for k in kind.__args__)
    return TYPE_NAMES.get(kind, "a text")


def split_arguments(argv, kinds):
    """Yield (name, text or None) for each setting; (None, word) for a word without a setting."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            yield None, word
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            yield name, text
        elif words and not words[0].startswith("--"):
            yield name, words.pop(0)
        else:
            yield name, "true" if kinds.get(name) is bool else None


def parse_arguments(function, argv):
    """The settings in argv, as keyword arguments. One UserError names everything that is wrong.

    If the first setting is a list, words without a setting belong to it: plot out/*/log.jsonl.
    """
    known = settings(function)
    kinds = {name: kind for name, kind, _, _ in known}
    # Only these settings may be empty: elsewhere an empty text is an unset variable of the shell.
    may_be_empty = {name for name, _, default, _ in known if default == ""}
    first = next(iter(kinds), None)
    values, wrong = {}, []
    for name, text in split_arguments(argv, kinds):
        if name is None and kinds.get(first) == list[str] and not text.startswith("-"):
            values.setdefault(first, []).append(text)
        elif name is None:
            hint = did_you_mean(text.lstrip("-").split("=")[0], kinds, "--")
            wrong.append(f"{text!r} belongs to no setting{hint}")
        elif name not in kinds:
            wrong.append(f"--{name} is not a setting{did_you_mean(name, kinds, '--')}")
        elif text is None or (not text and name not in may_be_empty):
            wrong.append(f"--{name} needs a value, {type_name(kinds[name])}")
        elif kinds[name] == list[str]:
            values.setdefault(name, []).append(text)
        elif name in values:
            wrong.append(f"--{name}={text} comes after another --{name}")
        else:
            try:
                values[name] = convert_value(text, kinds[name])
            except ValueError:
                wrong.append(f"--{name}={text} is not {type_name(kinds[name])}")
    if wrong:
        raise UserError("; ".join(wrong))
    return values


def did_you_mean(word, known, dashes=""):
    """Returns ", did you mean --NAME?" if an old or similar name fits, else ""."""
    for name in OLD_SETTINGS.get(word, ()):
        if name in known:
            return f", did you mean {dashes}{name}?"
        if " " in name:  # a command
            return f", did you mean `{name}`?"
    similar = difflib.get_close_matches(word, known, 1)
    return f", did you mean {dashes}{similar[0]}?" if similar else ""


def print_status(*words):
    """Print to standard error, at once."""
    print(*words, file=sys.stderr, flush=True)


def format_value(value):
    """A value as a user types it."""
    if isinstance(value, list):
        return ",".join(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def changed_settings(function, values):
    """{setting: value} of those that are not at their defaults."""
    return {
        name: values[name] for name, _, default, _ in settings(function) if values[name] != default
    }


def refuse_unused_settings(function, values, used, condition):
    """Raises UserError for a changed setting that has no effect under a condition."""
    for name, value in changed_settings(function, values).items():
        if name not in used:
            raise UserError(f"--{name}={format_value(value)} changes nothing {condition}")


def print_help(function):
    rows = []
    for name, _, default, remark in settings(function):
        rows.append((f"--{name}", format_value(default), remark))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    indent = 2 + widths[0] + 2 + widths[1] + 2
    groups = setting_groups(function)
    print(inspect.getdoc(function) + "\n")
    for number, (name, default, remark) in enumerate(rows):
        if name.removeprefix("--") in groups:
            print("\n" * (number > 0) + groups[name.removeprefix("--")])
        first, *more = textwrap.wrap(remark, WIDTH - indent, break_long_words=False) or [""]
        print(f"  {name:{widths[0]}}  {default:{widths[1]}}  {first}".rstrip())
        for line in more:
            print(" " * indent + line)


def choose_command(functions, argv):
    """Returns the function that the first word names, and the rest of argv."""
    expected = f"the first word is a command ({', '.join(functions)})"
    if not argv:
        raise UserError(f"{expected}: there is none")
    if argv[0] not in functions:
        hint = did_you_mean(argv[0], functions)
        raise UserError(f"{expected}: {argv[0]!r} is none of them{hint}")
    return functions[argv[0]], argv[1:]


def call_with_arguments(functions, argv):
    """Call a function with the settings in argv, or print its help.

    functions: one function, or {command: function}, of which the first word names one.
    """
    helps = {"--help", "-h"}
    if isinstance(functions, dict):
        if argv and argv[0] in helps:
            for name, function in functions.items():
                print(f"{name}: {inspect.getdoc(function).splitlines()[0]}")
            return
        functions, argv = choose_command(functions, argv)
    if helps & set(argv):
        return print_help(functions)
    functions(**parse_arguments(functions, argv))


def run_script(functions):
    """Run a script with the settings in sys.argv; a user's error ends it with one line.

    Exit codes: 1 user error, 130 Ctrl-C, 141 closed pipe. Standard input that is not text is read
    as surrogates, as Python does for argv. Characters that the terminal lacks are escaped.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if stream:
            stream.reconfigure(errors=errors)
    try:
        call_with_arguments(functions, sys.argv[1:])
        print(end="", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # `python sample.py … | head -1` is no error; the rest of the buffer goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {file}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
