"""Settings from the command line: the keyword-only parameters of a function are its settings, the remark behind each its explanation."""
import ast
import difflib
import inspect
import math
import sys
import textwrap
import types
import typing

from . import Mistake

WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def settings(function):
    """[(name, type, default, remark)] of a function's keyword-only parameters; the remark is the comment on the parameter's line."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, hints = source.splitlines(), typing.get_type_hints(function)
    arguments = ast.parse(source).body[0].args.kwonlyargs
    remarks = {a.arg: lines[a.end_lineno - 1].partition("  # ")[2].strip() for a in arguments}
    found = inspect.signature(function).parameters.values()
    return [(p.name, hints[p.name], p.default, remarks[p.name]) for p in found if p.kind is p.KEYWORD_ONLY]


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
    if kind is float and not math.isfinite(float(text)):
        raise ValueError("a finite number")
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
    """The settings typed in argv as keyword arguments; one Mistake names everything that is wrong."""
    known = {name: kind for name, kind, _, _ in settings(function)}
    chosen, wrong = {}, []
    for name, text in pairs(argv, known):
        if name is None:
            wrong.append(f"{text!r} belongs to no setting (--name=value)")
        elif name not in known:
            near = difflib.get_close_matches(name, known, 1)
            wrong.append(f"--{name} is no setting{f', did you mean --{near[0]}?' if near else ''}")
        elif text is None:
            wrong.append(f"--{name} needs a value, {wanted(known[name])}")
        elif known[name] == list[str]:
            chosen.setdefault(name, []).append(text)
        elif name in chosen:
            wrong.append(f"--{name} is given twice: {chosen[name]} and {text}")
        else:
            try:
                chosen[name] = convert(text, known[name])
            except ValueError:
                wrong.append(f"--{name}={text} is not {wanted(known[name])}")
    if wrong:
        raise Mistake("; ".join(wrong))
    return chosen


def show_help(function):
    print(inspect.getdoc(function), "\n")
    for name, _, default, remark in settings(function):
        print(f"  --{name + '=' + (','.join(default) if isinstance(default, list) else str(default)):34} {remark}")


def pick(functions, argv):
    """The function that the first word names, and the rest of argv."""
    names = ", ".join(functions)
    if not argv or argv[0] in ("--help", "-h"):
        raise Mistake(f"say which: {names}")
    if argv[0] not in functions:
        near = difflib.get_close_matches(argv[0], functions, 1)
        raise Mistake(f"{argv[0]!r} is none of {names}{f'; did you mean {near[0]}?' if near else ''}")
    return functions[argv[0]], argv[1:]


def run(functions):
    """Call a function (or, of a dict, the one that the first word names) with the settings on the command line."""
    try:
        function, argv = pick(functions, sys.argv[1:]) if isinstance(functions, dict) else (functions, sys.argv[1:])
        if "--help" in argv or "-h" in argv:
            return show_help(function)
        function(**parse(function, argv))
    except Mistake as mistake:
        sys.exit(f"error: {mistake}")
    except OSError as error:
        sys.exit(f"error: {error.filename + ': ' if error.filename else ''}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
