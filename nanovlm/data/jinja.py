"""Renders an unknown chat template in a process of its own, with limits on time and memory:

    python -P nanovlm/data/jinja.py SECONDS BYTES < {"jinja", "tokens", "conversations"}

"conversations" is a list of [turns, parts]. It prints a JSON list: the text of each conversation,
or null if the template refuses it. `chat_template.render_jinja` starts it.
"""

import contextlib
import json
import resource
import sys

import jinja2.ext  # comes with torch
import jinja2.sandbox

MAX_CHARS = 100_000  # published templates write a few hundred


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, transformers' loss mask: its content is kept."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def render_jinja_template(jinja, tokens, turns, parts):
    """Returns a template's text of a conversation with a generation prompt; None if it refuses.

    It runs in the sandbox that transformers uses. parts: the content of a message is a list of
    parts, each a text or an image, instead of one text.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
        for role, text in turns
    ]
    try:
        text = environment.from_string(jinja).render(
            messages=messages, add_generation_prompt=True, raise_exception=raise_exception, **tokens
        )
    except MemoryError:  # the exit code reports it
        raise
    except Exception:  # a template can raise any error of Python
        return None
    return text if len(text) <= MAX_CHARS else None


def limit_resources(seconds, size):
    """Limit this process to `seconds` of CPU time and `size` bytes of memory, and to no files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    limit_resources(*map(int, sys.argv[1:]))
    request = json.load(sys.stdin)
    texts = [
        render_jinja_template(request["jinja"], request["tokens"], turns, parts)
        for turns, parts in request["conversations"]
    ]
    print(json.dumps(texts))
