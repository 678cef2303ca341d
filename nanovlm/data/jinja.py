"""What does a stranger's chat template write? A program of its own, so that one which never ends, or wants all memory, takes nobody along:

    python -P nanovlm/jinja.py SECONDS BYTES < {"jinja", "tokens", "asked": [[turns, parts], …]}

It prints a JSON list: of each conversation what is written, null where the template refuses it. chat.recognise asks, and knows the answer's meaning.
"""

import contextlib
import json
import resource
import sys

import jinja2.ext  # comes with torch
import jinja2.sandbox

MAX_CHARS = 100_000  # letters; published templates write a few hundred


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which tells transformers what the assistant says: written as it stands."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def render_jinja_template(jinja, tokens, turns, parts):
    """What a template writes of a conversation that waits for an answer, in the sandbox that transformers uses; None if it refuses it.
    parts: what is said comes as a list of parts, of which each is a text or a picture."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    messages = [
        {"role": role, "content": [{"type": "text", "text": said}] if parts else said}
        for role, said in turns
    ]
    try:
        text = environment.from_string(jinja).render(
            messages=messages, add_generation_prompt=True, raise_exception=raise_exception, **tokens
        )
    except MemoryError:  # told by the exit code
        raise
    except Exception:  # a template may raise all that Python does: it divides by nothing, asks for what is not there, nests too deep
        return None
    return text if len(text) <= MAX_CHARS else None


def limit_resources(seconds, size):
    """From here on this process has so many seconds of a core and bytes of memory, and can write no file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    limit_resources(*map(int, sys.argv[1:]))
    given = json.load(sys.stdin)
    print(
        json.dumps(
            [
                render_jinja_template(given["jinja"], given["tokens"], turns, parts)
                for turns, parts in given["asked"]
            ]
        )
    )
