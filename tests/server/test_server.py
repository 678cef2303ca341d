"""The server, asked by the `openai` package's own client: it answers as sample.py does, one request
after another, and refuses what it cannot answer or should not."""

import ast
import base64
import collections
import contextlib
import gc
import io
import json
import random
import resource
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from conftest import DECODER, VISION, make_vlm
from PIL import Image

import sample
from nanovlm import UserError
from nanovlm.checkpoints.checkpoint import Checkpoint, save_checkpoint
from nanovlm.data import image_processing, tokenizer
from nanovlm.data.chat_template import encode_prompt
from nanovlm.inference.generate import generate
from nanovlm.server import api, server
from nanovlm.visualize import attention_map

WORDS = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
END = WORDS.special["</s>"]
CONFIG = {"tile": 12, "patch": 3, "shuffle": 2, "resample": "bicubic", "fit": "squash"}
CONFIG |= {"mean": [0.5] * 3, "std": [0.5] * 3}
DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 40, "seed": 0}


def make_checkpoint(end_weight=2.5):
    """A model whose answers often end, or never (end_weight 0)."""
    decoder = DECODER | {"vocab_size": WORDS.vocab_size}
    model = make_vlm(decoder=decoder)
    with torch.no_grad():
        model.decoder.lm_head.weight[END] *= end_weight
        model.decoder.lm_head.weight[128:256] *= 0.5  # mostly letters
    shapes = {"vision": VISION, "decoder": decoder, "shuffle": 2}
    return Checkpoint(model, WORDS, shapes, CONFIG, "mistral", {"folder": "nowhere"})


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(14, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def message(text, *images, role="user"):
    parts = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": data_url(png(n))}} for n in images]
    return {"role": role, "content": parts}


@contextlib.contextmanager
def serving(checkpoint, stream_answer=sample.stream_answer, api_key="", name="tiny", **generation):
    chat_server = server.ChatServer(
        "127.0.0.1",
        0,
        checkpoint=checkpoint,
        name=name,
        stream_answer=stream_answer,
        rules=sample.GENERATION_RULES,
        api_key=api_key,
        generation=DEFAULTS | generation,
    )
    thread = threading.Thread(target=chat_server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield chat_server
    finally:
        chat_server.shutdown()
        thread.join()
        chat_server.server_close()


@pytest.fixture(scope="module")
def checkpoint():
    return make_checkpoint()


@pytest.fixture(scope="module")
def chat_server(checkpoint):
    with serving(checkpoint) as chat_server:
        yield chat_server


def client_of(chat_server, key="none"):
    url = f"http://127.0.0.1:{chat_server.server_port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(chat_server):
    with client_of(chat_server) as client:
        yield client


def ask(client, *messages, **fields):
    messages = [message(m) if isinstance(m, str) else m for m in messages]
    return client.chat.completions.create(model="tiny", messages=messages, **fields)


def request(chat_server, body=b"", path="/v1/chat/completions", method="POST", **headers):
    """(status, answer) of a request that is sent as it stands here."""
    port = chat_server.server_port
    usual = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
    headers = (
        usual | {"Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}
    )
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{k}: {v}" for k, v in headers.items() if v is not None),
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
            connection.sendall(body)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content.decode()


def body(*messages, **fields):
    return json.dumps({"model": "tiny", "messages": list(messages)} | fields).encode()


def refusal(answer):
    """The message of OpenAI's error object, which is all that a refused request gets."""
    status, content = answer
    error = json.loads(content)["error"]
    assert error["code"] == status and error["type"] and "Traceback" not in content
    return status, error["message"]


# ---- answers ----

ASKED = {  # the settings of sample.py, and the same request
    "text": ({"prompt": "hm"}, ["hm"], {}),
    "image": ({"prompt": "hm", "image": [3]}, [message("hm", 3)], {}),
    "two images": (
        {"prompt": "which?", "image": [4, 5]},
        [message("which?", 4, 5)],
        {"max_tokens": 31},
    ),
    "sampled": (
        {"prompt": "hm", "temperature": 0.9, "top_p": 0.8, "seed": 8},
        ["hm"],
        {"temperature": 0.9, "top_p": 0.8, "seed": 8},
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_is_that_of_sample_py(name, checkpoint, client, tmp_path, capsys):
    settings, messages, fields = ASKED[name]
    save_checkpoint(make_checkpoint(), tmp_path / "model")
    for seed in settings.get("image", []):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    images = [str(tmp_path / f"{seed}.png") for seed in settings.get("image", [])]
    settings = {"max_tokens": fields.get("max_tokens", 40)} | settings | {"image": images}
    sample.sample(model=str(tmp_path / "model"), device="cpu", **settings)
    expected = capsys.readouterr().out
    assert expected.strip()
    assert ask(client, *messages, **fields).choices[0].message.content + "\n" == expected
    streamed = [chunk.choices[0] for chunk in ask(client, *messages, stream=True, **fields)]
    assert "".join(choice.delta.content for choice in streamed) + "\n" == expected
    assert [choice.delta.role for choice in streamed] == ["assistant"] + [None] * (
        len(streamed) - 1
    )


def test_a_conversation_with_system_message_is_that_of_its_turns(checkpoint, client):
    turns = [
        ("system", "be kind"),
        ("user", "<image>\na"),
        ("assistant", "b"),
        ("user", "<image>\nc"),
    ]
    images = [image_processing.load_image(png(n), CONFIG) for n in (3, 4)]
    expected = "".join(sample.stream_answer(checkpoint, turns, images, **DEFAULTS))
    asked = [message("be kind", role="system"), message("a", 3)]
    asked += [{"role": "assistant", "content": " b\n"}, message("c", 4)]
    assert ask(client, *asked).choices[0].message.content == expected


def test_among_several_texts_an_image_stands_where_its_part_does(checkpoint):
    first, image, last = message("a", 3)["content"] + message("b")["content"]
    between = [{"role": "user", "content": [first, image, last]}]
    assert api.read_messages(between, checkpoint)[0] == [("user", "a\n<image>\nb")]
    assert api.read_messages([{"role": "user", "content": [first, image]}], checkpoint)[0] == [
        ("user", "<image>\na")
    ]


def test_counts_and_log_probabilities_are_those_of_the_answers_tokens(checkpoint, client):
    images = [image_processing.load_image(png(3), CONFIG)]
    ids = encode_prompt(checkpoint, [("user", "<image>\nhm")], images)
    steps, inputs = [], sample.packing.collate_images(images, CONFIG)
    list(generate(checkpoint.model, [ids], **inputs, stop={END}, logprobs=steps, max_tokens=40))
    tokens = [token for (token,) in steps if token[0] != END]
    options = {"include_usage": True}
    answer = ask(client, message("hm", 3), logprobs=True)
    *chunks, last = ask(
        client, message("hm", 3), logprobs=True, stream=True, stream_options=options
    )
    entries = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert entries == answer.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == [logprob for _, logprob in tokens]
    assert [bytes(entry.bytes) for entry in entries] == [WORDS.bytes_of[i] for i, _ in tokens]
    assert last.choices == [] and last.usage == answer.usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(ids), len(tokens))
    assert last.usage.total_tokens == len(ids) + len(tokens)


def test_an_answer_ends_by_itself_or_at_max_tokens(client):
    ends = {}
    for text in ("what", "is there", "how many of these", "?", "and now"):
        for max_tokens in (6, 40):
            answer = ask(client, text, max_completion_tokens=max_tokens)
            choice, count = answer.choices[0], answer.usage.completion_tokens
            assert (choice.finish_reason == "length") == (count == max_tokens)
            ends.setdefault(choice.finish_reason, text)
    assert ends.keys() == {"stop", "length"}


def test_an_answer_ends_before_the_first_stop_sequence(client):
    """Streamed or not; a text that is not found changes nothing."""
    whole = ask(client, "what").choices[0].message.content
    stops = [[whole[3]], [whole[5:8]], [whole[9:12], whole[4:7]], [whole[-1]], ["not in it", "\0"]]
    for stop in stops:
        expected = whole[: min((whole.index(text) for text in stop if text in whole), default=None)]
        choice = ask(client, "what", stop=stop if len(stop) > 1 else stop[0]).choices[0]
        assert choice.message.content == expected
        streamed = [chunk.choices[0] for chunk in ask(client, "what", stop=stop, stream=True)]
        assert "".join(part.delta.content for part in streamed) == expected
        assert choice.finish_reason == streamed[-1].finish_reason


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


# ---- requests that are refused ----

HELLO = {"role": "user", "content": "hm"}
REFUSED = [  # (status, part of the message, fields of the request)
    (400, "temperature=-1 must be 0 or", {"temperature": -1}),
    (400, "temperature='hot' is not of type float", {"temperature": "hot"}),
    (400, "temperature=nan must", {"temperature": float("nan")}),
    (400, "top_p=0 must be from", {"top_p": 0}),
    (400, "seed=-1 must be", {"seed": -1}),
    (400, "seed=True is not of type int", {"seed": True}),
    (400, "max_tokens=41 is not from 1 to the server's --max_tokens=40", {"max_tokens": 41}),
    (400, "max_completion_tokens=0", {"max_completion_tokens": 0}),
    (400, "stop is neither", {"stop": ["a", 3]}),
    (400, "stop is neither", {"stop": list("abcde")}),
    (400, "stop is neither", {"stop": ""}),
    (400, "n=2 is not supported", {"n": 2}),
    (400, "tools=[{}] is not supported", {"tools": [{}]}),
    (400, "response_format=", {"response_format": {"type": "json_object"}}),
    (400, "top_logprobs=3 is not", {"logprobs": True, "top_logprobs": 3}),
    (400, "messages is not of type list", {"messages": "hm"}),
    (400, "message 1: 'hm' is not supported", {"messages": ["hm"]}),
    (400, "message 1: 'tool_calls' is", {"messages": [HELLO | {"tool_calls": [{}]}]}),
    (400, "nothing is fetched", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]}]}),
    (400, "nothing is fetched", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
    (400, "nothing is fetched", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]}),
    (400, "token_ids belong to /attention", {"token_ids": [1]}),
    (404, "model='other': only 'tiny' is here", {"model": "other"}),
    (404, "model=None", {"model": None}),
    (413, "at most 64 images", {"messages": [message("hm", *[1] * 65)]}),
    (413, "200,000 characters", {"messages": [message("hm" * 100_001)]}),
    (422, "neither `conversations` nor `messages`", {"messages": []}),
    (422, "needs a text and a role", {"messages": [{"role": "tool", "content": "hm"}]}),
    (422, "needs a text and a role", {"messages": [{"role": "user", "content": [3]}]}),
    (422, "needs a text and a role", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
    (422, "half a character", {"messages": [{"role": "user", "content": "\ud800"}]}),
    (422, "turns must go", {"messages": [HELLO, HELLO]}),
    (422, "turns must go", {"messages": [HELLO, {"role": "assistant", "content": "hm"}]}),
    (422, "1 <image> in its text but 0 images", {"messages": [message("what is <image>?")]}),
    (422, "image 1 is not an image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(b"hm")}}]}]}),
    (422, "image 1 cannot be read", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,ä"}}]}]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "text", "fields"), REFUSED, ids=[case[1][:30] for case in REFUSED]
)
def test_a_wrong_request_gets_one_line(status, text, fields, chat_server):
    got, error = refusal(request(chat_server, body(HELLO, **fields)))
    assert got == status and text in error and "\n" not in error


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, "hm", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="only 'tiny' is here"):
        client.chat.completions.create(model="gpt", messages=[HELLO])
    with pytest.raises(openai.UnprocessableEntityError, match="image 1 is not an image"):
        bad = message("hm", 1)
        bad["content"][1]["image_url"]["url"] = data_url(b"no image")
        ask(client, bad, stream=True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'"hm"', b"[" * 100_000, b"\xff", b"1" * 9999]
)
def test_a_body_that_is_no_object_is_refused(content, chat_server):
    assert refusal(request(chat_server, content)) == (
        400,
        "the body is not an object of JSON, or came too slowly",
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/../../../../etc/passwd", 404),
        ("GET", "/page.html", 404),
        ("GET", "/v1/chat/completions", 404),
        ("POST", "/", 404),
        ("PUT", "/v1/models", 501),
        ("OPTIONS", "/v1/chat/completions", 501),
        ("GET", "/ HTTP/1.1 odd", 400),
        ("GET", "/" + "a" * 70_000, 414),
    ],
)
def test_no_path_reaches_the_disk(method, path, status, chat_server):
    assert refusal(request(chat_server, b"{}", path, method))[0] == status


def test_a_failure_of_the_server_shows_no_traceback(checkpoint, capsys):
    def fail(*arguments, **options):
        yield "a"
        raise RuntimeError("secret")

    with serving(checkpoint, fail) as chat_server:
        status, error = refusal(request(chat_server, body(HELLO)))
        assert status == 500 and "secret" not in error
        with (
            client_of(chat_server) as client,
            pytest.raises(openai.APIError, match="server failed"),
        ):
            list(ask(client, "hm", stream=True))
        assert not chat_server.queue
    assert "RuntimeError: secret" in capsys.readouterr().err


# ---- the attention of a word ----


def test_a_word_gets_the_page_of_its_attention(checkpoint, chat_server):
    images = [image_processing.load_image(png(3), CONFIG)]
    ids, turns = [72, 101, 108, 108], [("user", "<image>\nhm")]
    record = attention_map.record_answer(checkpoint, turns, images, answer=ids, first=2)
    asked = body(message("hm", 3), token_ids=ids, first=2)
    expected = (200, attention_map.page_html(record))
    assert request(chat_server, asked, "/attention") == expected


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (400, {}),
        (400, {"token_ids": []}),
        (400, {"token_ids": [1] * 41}),
        (400, {"token_ids": 3}),
        (400, {"token_ids": [1], "first": "0"}),
        (422, {"token_ids": [1], "first": 1}),
        (422, {"token_ids": [1], "first": -1}),
        (422, {"token_ids": [1] * 17}),
        (422, {"token_ids": [WORDS.vocab_size]}),
        (422, {"token_ids": [-1]}),
        (422, {"token_ids": [1.0]}),
        (422, {"token_ids": [[1]]}),
    ],
)
def test_a_word_that_cannot_be_is_refused(status, fields, chat_server):
    assert refusal(request(chat_server, body(HELLO, **fields), "/attention"))[0] == status


# ---- strangers ----


def test_a_key_is_needed(checkpoint):
    with serving(checkpoint, api_key="se cret") as chat_server:
        with client_of(chat_server, "se cret") as client:
            assert ask(client, "hm").choices
        with client_of(chat_server, "se cre") as client:
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                ask(client, "hm")
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        for header in ("Basic se cret", "Bearer ", "Bearer se cret ", "Bearer \xff"):
            assert refusal(request(chat_server, body(HELLO), Authorization=header))[0] == 401
        assert refusal(request(chat_server, body(HELLO)))[0] == 401
        # the page asks for the key; a key proves more than the name of the host
        assert request(chat_server, path="/", method="GET")[0] == 200
        named = {"Host": "my.server", "Authorization": "Bearer se cret"}
        assert request(chat_server, body(HELLO), **named)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", None, "localhost.evil"],
)
def test_a_name_that_was_bound_to_this_address_is_refused(host, chat_server):
    """DNS rebinding: a page of evil.example lets its name mean 127.0.0.1."""
    assert refusal(request(chat_server, body(HELLO), Host=host))[0] == 403


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.2:80"]
)
def test_an_address_is_no_name(host, chat_server):
    assert request(chat_server, body(HELLO, max_tokens=1), Host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_a_page_of_another_site_is_refused(headers, chat_server):
    assert refusal(request(chat_server, body(HELLO), **headers))[0] == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_what_a_form_of_another_site_can_send_is_refused(kind, chat_server):
    """Without asking the browser, which would ask this server first, and be refused (OPTIONS)."""
    assert refusal(request(chat_server, body(HELLO), Content_Type=kind))[0] == 400


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_large_body_is_refused_before_it_is_kept(chat_server):
    big = bytes(100_000_000)
    before = peak_bytes()
    assert refusal(request(chat_server, big))[0] == 413
    assert peak_bytes() - before < 50_000_000
    for length in ("", "-1", "1e3", "9" * 30, "0x10", None):
        assert refusal(request(chat_server, b"{}", Content_Length=length))[0] in (400, 413)


def bomb(width, height):
    """A PNG of a few kB that unpacks to width x height pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 20)) * 50
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_refused_by_its_size(chat_server):
    before = peak_bytes()
    for width, text in ((12_000, "12000 x 12000 pixels"), (60_000, "decompression bomb")):
        image = message("hm", 1)
        image["content"][1]["image_url"]["url"] = data_url(bomb(width, width))
        status, error = refusal(request(chat_server, body(image)))
        assert status == 422 and text in error
    assert peak_bytes() - before < 50_000_000


def test_slow_clients_are_cut_off(checkpoint, monkeypatch):
    """A request that trickles in does not hold a thread for longer than READ_SECONDS."""
    monkeypatch.setattr(server, "READ_SECONDS", 0.4)
    monkeypatch.setattr(server.ChatHandler, "timeout", 0.4)
    with serving(checkpoint) as chat_server:
        address = ("127.0.0.1", chat_server.server_port)
        for start in (
            b"",
            b"POST / HT",
            b"POST /attention HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        ):
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(start)
                begin = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() < begin + 5:
                        connection.sendall(b" ")
                        time.sleep(0.05)
                assert time.monotonic() - begin < 3
        assert request(chat_server, body(HELLO, max_tokens=2))[0] == 200


def test_there_are_no_more_connections_than_threads_for_them(checkpoint, monkeypatch):
    """A connection has a thread for its request and one for its deadline, which starts later."""
    with serving(checkpoint) as chat_server, contextlib.ExitStack() as idle:
        before = threading.active_count()
        monkeypatch.setattr(server, "MAX_THREADS", before + 8)
        address = ("127.0.0.1", chat_server.server_port)
        for _ in range(30):
            idle.enter_context(socket.create_connection(address, timeout=5))
        time.sleep(0.3)
        assert 8 <= threading.active_count() - before <= 16
        idle.close()

        def is_answered():
            with contextlib.suppress(ConnectionError, IndexError):
                return request(chat_server, body(HELLO, max_tokens=2))[0] == 200

        wait_for(is_answered)


# ---- the line ----


@contextlib.contextmanager
def slow_server():
    """A server whose model never ends by itself and takes 10 ms a token, and the tokens of each
    answer."""
    counts = []

    def stream_answer(*arguments, **options):
        counts.append(0)
        for part in sample.stream_answer(*arguments, **options):
            counts[-1] += 1
            time.sleep(0.01)
            yield part

    with serving(make_checkpoint(end_weight=0), stream_answer, max_tokens=3000) as chat_server:
        yield chat_server, counts


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_stops_its_generation():
    with slow_server() as (chat_server, counts), client_of(chat_server) as client:
        stream = ask(client, "hm", stream=True)
        next(stream)
        stream.close()
        wait_for(lambda: not chat_server.queue)
        assert 1 <= counts[0] < 300
        with socket.create_connection(("127.0.0.1", chat_server.server_port)) as connection:
            content = body(HELLO)  # not streamed
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            wait_for(lambda: len(counts) == 2 and counts[1] > 3)
        wait_for(lambda: not chat_server.queue)
        assert counts[1] < 300


def test_requests_are_answered_in_their_order_and_told_how_many_are_before_them(monkeypatch):
    monkeypatch.setattr(server, "MAX_QUEUE", 4)
    with slow_server() as (chat_server, counts), client_of(chat_server) as client:
        first = ask(client, "hm", stream=True)
        next(first)
        order, answers = [], {}

        def wait(name):
            answers[name] = request(chat_server, body(HELLO, max_tokens=3, stream=True))[1]
            order.append(name)

        threads = [threading.Thread(target=wait, args=[name]) for name in "bcd"]
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda: len(chat_server.queue) == number + 2)  # noqa: B023 (called at once)
        with pytest.raises(openai.InternalServerError, match="4 requests are before") as caught:
            ask(client, "hm")
        assert caught.value.status_code == 503
        first.close()
        for thread in threads:
            thread.join()
        assert order == list("bcd")
        for number, name in enumerate("bcd"):
            lines = answers[name].split("\n\n")
            assert lines[0] == f": {number + 1} requests are before this one"
            assert lines[-2] == "data: [DONE]"
        assert counts[1:] == [4, 4, 4]  # three tokens and what remains


def test_two_hundred_requests_of_four_clients_are_all_answered_or_refused(checkpoint, chat_server):
    """Some are broken, some clients leave. No request changes another one's answer."""
    texts, options = ("what", "is there", "?", "and now"), DEFAULTS | {"max_tokens": 9}
    expected = {}
    for text in texts:
        parts = sample.stream_answer(checkpoint, [("user", text)], [], **options)
        expected[text] = "".join(parts)
    counts, memory = collections.Counter(), []

    def send(client, kind, text):
        if kind == "broken":
            with pytest.raises(openai.BadRequestError):
                ask(client, text, temperature=-1)
            return counts.update(["refused"])
        answer = ask(client, text, max_tokens=9, stream=kind != "whole")
        if kind == "leave":
            next(answer)
            answer.close()
            return counts.update(["left"])
        chunks = answer if kind == "stream" else []
        parts = [chunk.choices[0].delta.content for chunk in chunks]
        content = "".join(parts) if chunks else answer.choices[0].message.content
        counts.update(["right" if content == expected[text] else "wrong"])

    def run(number):
        draw = random.Random(number)
        with client_of(chat_server) as client:
            for _ in range(50):
                kinds = ["whole", "whole", "stream", "broken", "leave"]
                send(client, draw.choice(kinds), draw.choice(texts))
                memory.append(resident_bytes())

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts.values()) == 200 and counts.keys() == {"right", "refused", "left"}, counts
    wait_for(lambda: not chat_server.queue)
    gc.collect()
    assert memory[-1] - memory[50] < 30_000_000


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "0.0.0.0"}, "--host=0.0.0.0 needs --api_key"),
        ({"serve": 0, "host": "0.0.0.0", "api_key": "x"}, "--host=0.0.0.0 needs --serve"),
        ({"image": ["a.png"]}, "excludes --image"),
        ({"attention_map": "a.html"}, "and --serve"),
        ({"serve": 70_000}, "must be from 1 to 65535"),
    ],
)
def test_settings_that_contradict(settings, text):
    with pytest.raises(UserError, match=text):
        sample.sample(**{"serve": 8000, "model": "m"} | settings)


def test_a_port_that_is_taken_is_named(checkpoint, chat_server):
    settings = {"checkpoint": checkpoint, "name": "m", "api_key": ""}
    with pytest.raises(
        UserError, match=f"--serve={chat_server.server_port}: Address already in use"
    ):
        server.serve_chat("127.0.0.1", chat_server.server_port, **settings)


def code_lines(source):
    """Lines of code: without blank lines, comments and docstrings."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    lines = {number for number, line in enumerate(source.splitlines(), 1) if line.strip(" #")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return sum(not source.splitlines()[number - 1].strip().startswith("#") for number in lines)


def test_the_server_stays_small():
    folder = Path(server.__file__).parent
    assert sum(code_lines(path.read_text()) for path in folder.glob("*.py")) <= 250
    assert len((folder / "page.html").read_text().splitlines()) <= 150
