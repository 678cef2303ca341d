"""The command line: a script's settings are the keyword-only parameters of one function.

The comment behind a parameter is its help. A comment line above, such as `# --- optimization`,
starts a group of the help. What the values must meet is one table for each script (check_rules).
"""

import ast
import difflib
import inspect
import math
import os
import signal
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
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    types.NoneType: "none",
}
# What older versions called settings, commands and stages. Names that are similar to today's are
# left out: did_you_mean finds them.
OLD_SETTINGS = {
    "batch": "global_batch_size",
    "brain": "decoder",
    "decay": "weight_decay",
    "dry_run": "python prepare.py estimate",
    "exam": "eval_questions",
    "eye": "vision",
    "ffn": "intermediate_size",
    "floor": "min_lr",
    "keep": "keep_checkpoints",
    "mfu": "python prepare.py estimate",
    "micro": "micro_batch_size",
    "new": "random_init",
    "peak": "peak_tflops",
    "rate": "tokens_per_s",
    "read": "vision_feature_layer",
    "recompute": "activation_checkpointing",
    "row": "seq_len",
    "shard": "hsdp_shard_size",
    "vision_ffn": "vision_intermediate_size",
    "vocabulary": "vocab_size",
}
WIDTH = 100  # of the help, in columns


# ---- settings of a function ----


def parameter_lines(function):
    """Yields (name, line above it, its last line) of each keyword-only parameter in the source."""
    source = textwrap.dedent(inspect.getsource(function))
    lines = source.splitlines()
    for argument in ast.parse(source).body[0].args.kwonlyargs:
        yield argument.arg, lines[argument.lineno - 2].strip(), lines[argument.end_lineno - 1]


def settings(function):
    """Returns [(name, type, default, remark)] of a function's keyword-only parameters."""
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    found = []
    for name, _, line in parameter_lines(function):
        remark = line.partition("  # ")[2].strip()
        found.append((name, hints[name], parameters[name].default, remark))
    return found


def setting_groups(function):
    """Returns {first setting of a group: the group's title}, from the `# --- title` lines."""
    groups = {}
    for name, line_above, _ in parameter_lines(function):
        if line_above.startswith("# --- "):
            groups[name] = line_above.removeprefix("# --- ")
    return groups


def changed_settings(function, values):
    """Returns {setting: value} of those that are not at their defaults."""
    changed = {}
    for name, _, default, _ in settings(function):
        if values[name] != default:
            changed[name] = values[name]
    return changed


# ---- from text to values ----


def convert_value(text, kind):
    """Returns the value of a setting's text. Raises ValueError or KeyError if it has another type.

    `float | None` also takes "none".
    """
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = kind.__args__[0]
    if kind is bool:
        return BOOLEANS[text.lower()]
    if kind is int:
        if not float(text).is_integer():  # neither 1.5 nor inf, but 1e3
            raise ValueError
        return int(float(text)) if "e" in text.lower() or "." in text else int(text)
    if kind is float:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if not math.isfinite(number):
            raise ValueError
        return number
    return text


def type_name(kind):
    """Returns what a setting of this type takes, in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(type_name, kind.__args__))
    return TYPE_NAMES.get(kind, "a text")


def split_arguments(argv, kinds):
    """Yields (name, text or None) for each setting; (None, word) for a word without a setting.

    If the first setting is a list, words without a setting belong to it: plot out/*/log.jsonl.
    """
    first = next(iter(kinds), None)
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            takes_words = kinds.get(first) == list[str] and not word.startswith("-")
            yield first if takes_words else None, word
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
    """Returns the settings in argv, as keyword arguments. One UserError names all that is wrong."""
    kinds, defaults = {}, {}
    for name, kind, default, _ in settings(function):
        kinds[name], defaults[name] = kind, default
    values, wrong = {}, []
    for name, text in split_arguments(argv, kinds):
        if name is None:
            hint = did_you_mean(text.lstrip("-").split("=")[0], kinds, "--")
            wrong.append(f"{text!r} belongs to no setting{hint}")
        elif name not in kinds:
            wrong.append(f"--{name} is not a setting{did_you_mean(name, kinds, '--')}")
        elif not text and (text is None or defaults[name] != ""):
            # An empty text is mostly an unset variable of the shell.
            wrong.append(f"--{name} needs a value, {type_name(kinds[name])}")
        elif kinds[name] == list[str]:
            values.setdefault(name, []).append(text)
        elif name in values:
            wrong.append(f"--{name}={text} comes after another --{name}")
        else:
            try:
                values[name] = convert_value(text, kinds[name])
            except (KeyError, ValueError):
                wrong.append(f"--{name}={text} is not {type_name(kinds[name])}")
    if wrong:
        raise UserError("; ".join(wrong))
    return values


def did_you_mean(word, known, dashes=""):
    """Returns ", did you mean --NAME?" if an old or similar name fits, else ""."""
    new = OLD_SETTINGS.get(word, "")
    if " " in new:  # a command
        return f", did you mean `{new}`?"
    similar = [new] if new in known else difflib.get_close_matches(word, known, 1)
    return f", did you mean {dashes}{similar[0]}?" if similar else ""


def format_value(value):
    """Returns a value as a user types it."""
    if isinstance(value, list):
        return ",".join(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


# ---- rules that settings must meet ----


def one_of(name, *choices):
    """Returns the rule that a setting has one of these values."""
    return name, lambda x, s: x in choices, f"is not one of {', '.join(choices)}"


def check_rules(values, rules, settings):
    """Raises one UserError that names each value that breaks a rule, and the first such rule.

    values: {setting: value}. rules: [(settings, is_allowed, text)], the table of a script:
    is_allowed(x, settings) tells whether a value x is allowed beside the other settings. text says
    what is wrong if not; it may name others as "{steps}".
    """
    wrong = []
    for name, value in values.items():
        for names, is_allowed, text in rules:
            if name in names.split() and not is_allowed(value, settings):
                text = text.format(**vars(settings))
                wrong.append(f"--{name}={format_value(value)} {text}")
                break
    if wrong:
        raise UserError("; ".join(wrong))


# ---- running a script ----


# Control characters as text: no id, answer or name of a file may move the cursor of a terminal.
CONTROL_CHARACTERS = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}


def print_status(*words):
    """Print to standard error, at once."""
    print(" ".join(words).translate(CONTROL_CHARACTERS), file=sys.stderr, flush=True)


def print_help(function):
    """Print the docstring of a function, and its settings with defaults and remarks."""
    known, groups = settings(function), setting_groups(function)
    name_width = max(len(name) for name, *_ in known)
    default_width = max(len(format_value(default)) for _, _, default, _ in known)
    print(inspect.getdoc(function) + "\n")
    for number, (name, _, default, remark) in enumerate(known):
        if name in groups:
            print("\n" * (number > 0) + groups[name])
        start = f"  --{name:{name_width}}  {format_value(default):{default_width}}  "
        indent = " " * len(start)
        print(textwrap.fill(remark, WIDTH, initial_indent=start, subsequent_indent=indent))


def choose_command(functions, argv):
    """Returns the function that the first word names, and the rest of argv."""
    expected = f"the first word is a command ({', '.join(functions)})"
    if not argv:
        raise UserError(f"{expected}: there is none")
    if argv[0] not in functions:
        hint = did_you_mean(argv[0], functions)
        raise UserError(f"{expected}: {argv[0]!r} is not one of them{hint}")
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if stream:
            stream.reconfigure(errors=errors)
    try:
        call_with_arguments(functions, sys.argv[1:])
        print(end="", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}".translate(CONTROL_CHARACTERS))
    except BrokenPipeError:
        # `python sample.py … | head -1` is not an error; the rest of the buffer goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {file}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
