"""A process that renders an unknown chat template, with limits on its time and memory:

    python -P nanovlm/data/jinja.py < {"jinja", "tokens", "conversations", "seconds", "bytes"}

"conversations" is a list of [turns, parts]. The process prints a JSON list: the text of each
conversation, or null if the template refuses it. `jinja_template.render_jinja` starts it.
"""

import contextlib
import datetime
import json
import math
import resource
import sys
import time

import jinja2.ext  # comes with torch
import jinja2.sandbox

MAX_CHARS = 100_000  # published templates write a few hundred
TODAY = datetime.date(2025, 7, 8)  # for a template that writes the date: SmolLM3's day of release


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, transformers' loss mask: its content is kept."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def render_jinja_template(jinja, tokens, turns, parts):
    """Returns a template's text of a conversation with a generation prompt; None if it refuses.

    It runs in the sandbox that transformers uses. parts: the content of a message is a list of
    parts, each a text or an image, instead of one text. A model that can think answers at once. A
    template refuses a conversation by a call of raise_exception; here the name is undefined, so the
    call is an error.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
        for role, text in turns
    ]
    try:
        template = environment.from_string(jinja)
        text = template.render(
            messages=messages,
            add_generation_prompt=True,
            enable_thinking=False,
            strftime_now=TODAY.strftime,
            **tokens,
        )
    except Exception:  # a template can raise any error of Python
        return None
    return text if len(text) <= MAX_CHARS else None


def limit_resources(seconds, size):
    """Limit this process to `seconds` more of CPU time, `size` bytes of memory, and no files."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds),
        (resource.RLIMIT_AS, size),  # macOS has no such limit
    ):
        with contextlib.suppress(ValueError):
            resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limit_resources(request["seconds"], request["bytes"])
    texts = [
        render_jinja_template(request["jinja"], request["tokens"], turns, parts)
        for turns, parts in request["conversations"]
    ]
    print(json.dumps(texts))
