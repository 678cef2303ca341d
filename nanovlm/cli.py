"""Settings from the command line: the keyword-only parameters of a function are its settings, the remark behind each its explanation."""

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

WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def settings(function):
    """[(name, type, default, remark)] of a function's keyword-only parameters; the remark is the comment on the parameter's line."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, hints = source.splitlines(), typing.get_type_hints(function)
    arguments = ast.parse(source).body[0].args.kwonlyargs
    remarks = {a.arg: lines[a.end_lineno - 1].partition("  # ")[2].strip() for a in arguments}
    found = inspect.signature(function).parameters.values()
    return [
        (p.name, hints[p.name], p.default, remarks[p.name])
        for p in found
        if p.kind is p.KEYWORD_ONLY
    ]


def convert(text, kind):
    """A setting's text as its type; ValueError if it is none. `float | None` also takes "none"."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in kind.__args__ if k is not type(None))
    if kind is bool:
        if text.lower() not in WORDS:
            raise ValueError("true or false")
        return WORDS[text.lower()]
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


WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def wanted(kind):
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if k is type(None) else WANTED[k] for k in kind.__args__)
    return WANTED.get(kind, "a text")


def pairs(argv, known):
    """(name, text or None) for each setting typed; a word that belongs to none comes as (None, word)."""
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
            yield name, "true" if known.get(name) is bool else None


def parse(function, argv):
    """The settings typed in argv as keyword arguments; one UserError names everything that is wrong.

    Words that stand alone belong to the first setting, if that is a list: plot out/*/log.jsonl.
    """
    rows = settings(function)
    known = {name: kind for name, kind, _, _ in rows}
    empty = {
        name for name, _, default, _ in rows if default == ""
    }  # elsewhere nothing is a shell's unset variable, not a wish
    first = next(iter(known), None)
    chosen, wrong = {}, []
    for name, text in pairs(argv, known):
        if name is None and known.get(first) == list[str] and not text.startswith("-"):
            chosen.setdefault(first, []).append(text)
        elif name is None:
            wrong.append(
                f"{text!r} belongs to no setting{suggestion(text.lstrip('-').split('=')[0], known, '--')}"
            )
        elif name not in known:
            wrong.append(f"--{name} is no setting{suggestion(name, known, '--')}")
        elif text is None or (not text and name not in empty):
            wrong.append(f"--{name} needs a value, {wanted(known[name])}")
        elif known[name] == list[str]:
            chosen.setdefault(name, []).append(text)
        elif name in chosen:
            wrong.append(f"--{name}={text} comes after another --{name}")
        else:
            try:
                chosen[name] = convert(text, known[name])
            except ValueError:
                wrong.append(f"--{name}={text} is not {wanted(known[name])}")
    if wrong:
        raise UserError("; ".join(wrong))
    return chosen


def suggestion(word, known, dashes=""):
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {dashes}{near[0]}?" if near else ""


def status(*words):
    """Print to standard error, at once."""
    print(*words, file=sys.stderr, flush=True)


def show(value):
    return (
        ",".join(value)
        if isinstance(value, list)
        else str(value).lower()
        if value is None or isinstance(value, bool)
        else str(value)
    )


def changed(function, typed):
    """{setting: value} of those that are not at their defaults."""
    return {
        name: typed[name] for name, _, default, _ in settings(function) if typed[name] != default
    }


def refuse_idle(function, typed, heeded, where):
    """Raise UserError for a setting that was changed but is not heeded; where: that is so."""
    for name, value in changed(function, typed).items():
        if name not in heeded:
            raise UserError(f"--{name}={show(value)} changes nothing {where}")


def show_help(function):
    rows = [(f"--{name}", show(default), remark) for name, _, default, remark in settings(function)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print(inspect.getdoc(function) + "\n")
    for name, default, remark in rows:
        print(f"  {name:{widths[0]}}  {default:{widths[1]}}  {remark}")


def choose(functions, argv):
    """The function that the first word names, and the rest of argv."""
    ask = f"the first word says what to do ({', '.join(functions)})"
    if not argv:
        raise UserError(f"{ask}: there is none")
    if argv[0] not in functions:
        raise UserError(f"{ask}: {argv[0]!r} is none of them{suggestion(argv[0], functions)}")
    return functions[argv[0]], argv[1:]


def call(functions, argv):
    """Call a function, or of several the one that the first word names, with the settings in argv; or print its help."""
    helps = {"--help", "-h"}
    if isinstance(functions, dict):
        if argv and argv[0] in helps:
            return print(
                "\n".join(
                    f"{name}: {inspect.getdoc(function).splitlines()[0]}"
                    for name, function in functions.items()
                )
            )
        functions, argv = choose(functions, argv)
    if helps & set(argv):
        return show_help(functions)
    functions(**parse(functions, argv))


def run(functions):
    """A door: settings in, and every end a user may meet told in one line. Exit codes: 1 a mistake, 130 Ctrl-C, 141 a reader who left.

    Bytes that are no text come in as argv's do, as surrogates; letters that the terminal does not have go out as escapes, and stop nothing.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if stream:
            stream.reconfigure(errors=errors)
    try:
        call(functions, sys.argv[1:])
        print(end="", flush=True)
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    except (
        BrokenPipeError
    ):  # `python sample.py … | head -1` is no error; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        sys.exit(
            f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
        )
    except KeyboardInterrupt:
        sys.exit(130)
