"""Which template of chat_template.TEMPLATES writes what a published Jinja template writes?

The folder of a model has its chat template in Jinja. `identify_template` renders a few
conversations with it, in a process of its own (jinja.py), and compares the texts with ours.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

from .. import UserError
from .chat_template import TEMPLATES, conversation_segments

# Limits for all probes of a template: seconds of CPU time, and bytes of memory. Published templates
# take hundredths of a second.
JINJA_SECONDS, JINJA_BYTES = 1, 1 << 28
# Conversations that any two templates write differently. A template must accept the first; it may
# refuse the others.
PROBES = [
    [("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
    [("user", "Hello")],
    [("system", "Be kind."), ("user", "Hello")],
    [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Bye")],
]


def identify_template(jinja, tokens, tokenizer, where):
    """Returns the name of the template that writes the same text as a published Jinja template.

    jinja: the template's text, or None. tokens: its bos_token and eos_token. The texts are compared
    on each probe that the Jinja template accepts. Raises UserError if none of TEMPLATES is equal.

    Templates of LLaVA folders take each message as a list of parts. They are compared on one
    question alone, without the start token: they leave it to the tokenizer, and llava-hf's omit or
    misspell ("<\\s>") the end token after an answer, with which LLaVA was trained.

    If the tokenizer puts a space before a text, spaces after special tokens are not compared, and
    the one before an answer is optional. Some published templates write all of these spaces, and
    some only a few.
    """
    choices = (
        "name it by --template of `prepare.py stitch` (a language model) or `prepare.py export` "
        "(a whole LLaVA): " + ", ".join(TEMPLATES)
    )
    if not isinstance(jinja, str):
        raise UserError(f"{where} has no chat template; {choices}")
    adds_space = tokenizer.bytes_of[tokenizer.encode("a")[0]].startswith(b" ")
    special = "|".join(map(re.escape, tokenizer.special))

    def normalize(text):
        return re.sub(f"({special}) +", r"\1", text) if text and adds_space else text

    conversations = [*((turns, False) for turns in PROBES), (PROBES[1], True)]
    *published, published_parts = map(normalize, render_jinja(jinja, tokens, conversations))
    for name, space in itertools.product(TEMPLATES, ["", " "] if adds_space else [""]):
        ours = [normalize(render_text(turns, name, space)) for turns in PROBES]
        pairs = zip(published, ours, strict=True)
        if published[0] is not None and all(text in (None, own) for text, own in pairs):
            return name
    for name, fields in TEMPLATES.items():
        own = normalize(render_text(PROBES[1], name)).removeprefix(fields["start"])
        if published_parts is not None and published_parts.removeprefix(fields["start"]) == own:
            return name
    result = f"writes {published[0]!r:.1000}, as none of ours does"
    if published[0] is None:
        result = f"fails, or takes more than {JINJA_SECONDS} s or {JINJA_BYTES >> 20} MiB"
    raise UserError(f"{where}: its chat template {result}; {choices}")


def render_text(turns, template, space=""):
    """Returns a conversation as one text, with `space` before each answer."""
    text = ""
    for segment, kind, _ in conversation_segments(turns, template):
        text += space + segment if kind == "answer" else segment
    return text


def render_jinja(jinja, tokens, conversations):
    """Returns what a Jinja template writes for each conversation, and None for what it refuses.

    conversations: a list of (turns, parts), as in jinja.py. A template that takes more time than is
    allowed refuses all of them.
    """
    request = {"jinja": jinja, "tokens": tokens, "conversations": conversations}
    request |= {"seconds": JINJA_SECONDS, "bytes": JINJA_BYTES}
    command = [sys.executable, "-P", str(Path(__file__).with_name("jinja.py"))]
    done = subprocess.run(
        command, input=json.dumps(request), stdout=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode:
        return [None] * len(conversations)
    return json.loads(done.stdout)
