"""OpenAI's chat completions: a request becomes turns, images and options of generate, an answer
OpenAI's objects (platform.openai.com/docs/api-reference/chat). `top_k` and `token_ids` are vLLM's.
"""

from .. import UserError
from ..data import image_processing, image_refs
from ..data.turns import check_turns, read_turns
from ..preprocess.records import image_values, join_parts

MAX_IMAGES, MAX_CHARACTERS = 64, 200_000  # of all messages of a request
TYPES = {  # of the fields that a request may have
    bool: "stream logprobs return_token_ids",
    dict: "stream_options",
    float: "temperature top_p",
    int: "top_k seed max_tokens max_completion_tokens first",
    list: "messages stop token_ids",
    str: "model user",
}
ONLY = {"n": 1, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0}  # values taken


class RequestError(UserError):
    """A request that is refused; its reason is the HTTP status."""


def read_request(fields, server):
    """Returns (fields, turns, images, options of generate) of a request to a ChatServer.

    Raises RequestError, or UserError for an image or a text that the model cannot take.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    for key, value in fields.items():
        check_field(key, value, server.rules, server.generation["max_tokens"])
    if fields.get("model") != server.name:
        raise RequestError(f"model={fields.get('model')!r:.200}: only {server.name!r} is here", 404)
    options = {key: fields.get(key, default) for key, default in server.generation.items()}
    options["max_tokens"] = fields.get("max_completion_tokens", options["max_tokens"])
    return fields, *read_messages(fields.get("messages", []), server.checkpoint), options


def check_field(key, value, rules, max_tokens):
    kind = next((kind for kind, names in TYPES.items() if key in names.split()), None)
    shown = key if kind is list else f"{key:.80}={value!r:.80}"
    if not kind and value != ONLY.get(key):
        raise RequestError(f"{shown} is not supported here", 400)
    if kind and type(value) not in (kind, int if kind is float else kind):
        raise RequestError(f"{shown} is not of type {kind.__name__}", 400)
    count = len(value) if kind is list else value
    if key in ("max_tokens", "max_completion_tokens", "token_ids") and not 1 <= count <= max_tokens:
        raise RequestError(f"{shown} is not from 1 to the server's --max_tokens={max_tokens}", 400)
    if key == "stop" and not (len(value) <= 4 and all(isinstance(x, str) and x for x in value)):
        raise RequestError("stop is neither a text nor a list of up to 4 texts", 400)
    for names, is_allowed, text in rules:
        if key in names.split() and not is_allowed(value, None):
            raise RequestError(f"{shown} {text}", 400)


def read_messages(messages, checkpoint):
    """Returns (turns, images) of OpenAI's messages, read as `prepare.py data` reads them.

    Images stand where their parts do, or before the text if a message has one text.
    """
    for number, message in enumerate(messages, 1):
        found = message.items() if isinstance(message, dict) else [(message, True)]
        odd = [key for key, value in found if value and key not in ("role", "content")]
        if odd:
            raise RequestError(f"message {number}: {odd[0]!r:.80} is not supported here", 400)
        parts = message["content"] if isinstance(message.get("content"), list) else []
        texts = [part for part in parts if isinstance(part, dict) and "text" in part]
        if len(texts) == 1:
            parts.append(parts.pop(parts.index(texts[0])))
    uris = image_values({"messages": messages})
    refs = [image_refs.embedded_image(uri, f"image {n}") for n, uri in enumerate(uris, 1)]
    if None in refs:
        raise RequestError("an image_url must be a data: URL: nothing is fetched", 400)
    turns = read_turns({"messages": [join_parts(message) for message in messages]}, "the request")
    if len(refs) > MAX_IMAGES or sum(len(text) for _, text in turns) > MAX_CHARACTERS:
        raise RequestError(f"at most {MAX_IMAGES} images and {MAX_CHARACTERS:,} characters", 413)
    check_turns([*turns, ("assistant", "…")], len(refs), "messages and their answer")
    files, config = [image_refs.load_image_bytes(ref) for ref in refs], checkpoint.image_config
    return turns, [image_processing.load_image(x, config, name=name) for x, name in files]


def answer_events(parts, steps, end, stop):
    """Yields (text, tokens, finish_reason or None) for each token of an answer, and for the rest.

    tokens: [(id, log-probability)], or []. parts: the texts of sample.py's stream_answer; steps:
    the logprobs that generate fills; end: the id that ends an answer. The answer ends before the
    first text of `stop`; so many characters as the longest has are held back.
    """
    held, number, most = "", 0, max(map(len, stop), default=1) - 1
    for number, part in enumerate(parts):
        held += part
        tokens = [step for step in steps[number] if step[0] != end] if number < len(steps) else []
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)], tokens, "stop"
            return
        if tokens:
            ready = max(len(held) - most, 0)
            yield held[:ready], tokens, None
            held = held[ready:]
    yield held, [], "stop" if number < len(steps) else "length"


def answer_objects(fields, prompt_tokens, events, bytes_of):
    """Yields OpenAI's objects of an answer, without their id: one, or those of a stream."""
    is_stream, count, usage = fields.get("stream"), 0, {"prompt_tokens": prompt_tokens}
    kind, name = ("delta", "completion.chunk") if is_stream else ("message", "completion")
    if not is_stream:
        texts, tokens, reasons = zip(*events, strict=True)
        events = [("".join(texts), sum(tokens, []), reasons[-1])]
    for number, (text, tokens, reason) in enumerate(events):
        count += len(tokens)
        usage |= {"completion_tokens": count, "total_tokens": prompt_tokens + count}
        content = {"content": text} if number else {"role": "assistant", "content": text}
        choice = {"index": 0, kind: content, "finish_reason": reason, "logprobs": None}
        if fields.get("logprobs"):
            choice["logprobs"] = {"content": [logprob_entry(*token, bytes_of) for token in tokens]}
        if fields.get("return_token_ids"):
            choice["token_ids"] = [token_id for token_id, _ in tokens]
        answer = {"object": f"chat.{name}", "choices": [choice]}
        yield answer if is_stream else answer | {"usage": usage}
    if is_stream and fields.get("stream_options", {}).get("include_usage"):
        yield {"object": f"chat.{name}", "choices": [], "usage": usage}


def logprob_entry(token_id, logprob, bytes_of):
    raw = bytes_of.get(token_id, b"")
    return dict(token=raw.decode(errors="replace"), bytes=[*raw], logprob=logprob, top_logprobs=[])
