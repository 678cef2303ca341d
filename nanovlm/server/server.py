"""HTTP for the chat page and OpenAI's API. Each connection has a thread and one request; the
threads call the model one after another."""

import contextlib
import hmac
import json
import re
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .. import UserError, cli, distributed
from ..data.chat_template import encode_prompt, end_token_id
from ..visualize.attention_map import page_html, record_answer
from .api import RequestError, answer_events, answer_objects, read_request

MAX_BODY = 32 << 20  # bytes of a request, with its images as base64
MAX_THREADS, MAX_QUEUE = 200, 33  # two a connection; requests that wait or are answered
READ_SECONDS, POLL_SECONDS = 20, 0.05
HTML, JSON, STREAM = "text/html; charset=utf-8", "application/json", "text/event-stream"
POLICY = "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'"
ADDRESS = re.compile(r"(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?")  # a Host that is not a name


class ChatServer(ThreadingHTTPServer):
    def __init__(self, host, port, **settings):
        """settings: checkpoint, name, stream_answer (of sample.py), generation (its options and
        their defaults), rules (of these options, as for cli.check_rules), api_key."""
        super().__init__((host, port), ChatHandler)
        vars(self).update(settings, reading=threading.Lock(), queue=[], has_ended=False)

    def verify_request(self, request, client_address):
        return threading.active_count() < MAX_THREADS  # else the connection is closed


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", READ_SECONDS, True

    def handle(self):
        """Answers one request. Each error becomes OpenAI's error object."""
        self.has_begun = False
        self.deadline = threading.Timer(READ_SECONDS, self.connection.shutdown, [socket.SHUT_RD])
        self.deadline.start()
        try:
            self.handle_one_request()
        except UserError as error:
            self.send_error(error.reason if isinstance(error, RequestError) else 422, str(error))
        except (ConnectionError, TimeoutError):
            pass  # the client left
        except Exception:
            self.send_error(500, "the server failed: its terminal shows how")
            raise
        finally:
            self.deadline.cancel()

    def do_GET(self):
        path = f"{self.command} {self.path}"
        if path == "GET /":
            return self.write(Path(__file__).with_name("page.html").read_text(), HTML)
        self.check_headers()
        if path == "GET /v1/models":
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "nanovlm"}
            return self.write(json.dumps({"object": "list", "data": [model]}), JSON)
        routes = {"POST /v1/chat/completions": self.answer, "POST /attention": self.show_attention}
        if path not in routes:
            raise RequestError(f"there is no {path:.200}", 404)
        fields, *request = self.read_body()
        if ("token_ids" in fields) != (path == "POST /attention"):
            raise RequestError("token_ids belong to /attention, and nowhere else", 400)
        with self.wait_for_model(fields.get("stream")):
            answer = routes[path](fields, *request)
        self.write(*answer)

    def do_POST(self):
        self.do_GET()

    def check_headers(self):
        host, key = self.headers.get("Host", ""), self.server.api_key
        origin = self.headers.get("Origin", f"http://{host}").partition("://")[2]
        if origin != host or self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            raise RequestError("a page of another site gets no answer", 403)
        # Another site can give this address a name of its own (DNS rebinding), but has no key.
        if not key and not ADDRESS.fullmatch(host):
            raise RequestError(f"Host: {host:.80} is neither an address nor localhost", 403)
        given = self.headers.get("Authorization", "").encode()
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError("the API key is missing or wrong", 401)

    def read_body(self):
        """Returns what read_request does."""
        length, fields = self.headers.get("Content-Length", ""), None
        # A browser asks first, before it sends this type for a page of another site.
        if self.headers.get_content_type() != JSON or not re.fullmatch("[0-9]{1,15}", length):
            raise RequestError(f"needs Content-Type: {JSON} and a Content-Length", 400)
        if int(length) > MAX_BODY:
            raise RequestError(f"{length} bytes are more than the {MAX_BODY:,} of a request", 413)
        body = self.rfile.read(int(length))
        self.deadline.cancel()
        with self.server.reading:  # one at a time: JSON and images take much memory
            with contextlib.suppress(ValueError, RecursionError):
                fields = json.loads(body)
            if not isinstance(fields, dict):
                raise RequestError("the body is not an object of JSON, or came too slowly", 400)
            return read_request(fields, self.server)

    @contextlib.contextmanager
    def wait_for_model(self, is_stream):
        """Waits in the queue until the model is free."""
        queue, last = self.server.queue, 0
        if len(queue) >= MAX_QUEUE:
            raise RequestError(f"{len(queue)} requests are before this one", 503)
        queue.append(self)
        try:
            while (before := queue.index(self)) and self.is_connected():
                if is_stream and before != last:
                    self.write(f": {before} requests are before this one\n\n", STREAM)
                last = before
                time.sleep(POLL_SECONDS)
            distributed.activate_device(self.server.checkpoint.model.mean_C11.device)
            yield
        finally:
            queue.remove(self)

    def is_connected(self):
        """Returns True. Raises ConnectionError if the client has left, or the server ends."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if self.server.has_ended or (readable and not self.connection.recv(1, socket.MSG_PEEK)):
            raise ConnectionAbortedError
        return True

    def answer(self, fields, turns, images, options):
        """Returns (text, type) of an answer, or of the end of a stream."""
        server, checkpoint, steps = self.server, self.server.checkpoint, []
        end = end_token_id(checkpoint.tokenizer, checkpoint.chat_template)
        prompt_tokens = len(encode_prompt(checkpoint, turns, images))
        head = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time())}
        parts = server.stream_answer(checkpoint, turns, images, logprobs=steps, **options)
        parts = (part for part in parts if self.is_connected())
        events = answer_events(parts, steps, end, fields.get("stop", []))
        for answer in answer_objects(fields, prompt_tokens, events, checkpoint.tokenizer.bytes_of):
            text = json.dumps(head | {"model": server.name} | answer)
            if fields.get("stream"):
                self.write(f"data: {text}\n\n", STREAM)
        return ("data: [DONE]\n\n", STREAM) if fields.get("stream") else (text, JSON)

    def show_attention(self, fields, turns, images, options):
        """Returns the page of attention_map.py for the last of `token_ids`, from `first` on."""
        word = {"answer": fields["token_ids"], "first": fields.get("first", 0)}
        return page_html(record_answer(self.server.checkpoint, turns, images, **word)), HTML

    def write(self, text, kind, status=200):
        """Sends a text, after the headers if it is the first."""
        if not self.has_begun:
            self.has_begun = True
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Connection", "close")
            self.end_headers()
        self.wfile.write(text.encode())

    def send_error(self, status, message=None, explain=None):
        """Sends OpenAI's error object, also for what http.server refuses by itself."""
        error = {"message": message, "type": self.responses[status][0], "param": None}
        text = json.dumps({"error": error | {"code": status}})
        with contextlib.suppress(OSError):
            self.write(f"data: {text}\n\n" if self.has_begun else text, JSON, status)
            self.connection.shutdown(socket.SHUT_WR)
            # A client that still sends reads the answer afterwards.
            while not self.deadline.finished.is_set() and self.rfile.read1(1 << 16):
                pass


def serve_chat(host, port, **settings):
    """Serves a model until Ctrl-C. settings: of ChatServer."""
    try:
        server = ChatServer(host, port, **settings)
    except OSError as error:
        raise UserError(f"--host={host} --serve={port}: {error.strerror}") from None
    who = "users of this machine" if host == "127.0.0.1" else "all who have the key"
    cli.print_status(f"http://{host}:{port} serves {server.name} to {who}; Ctrl-C ends it")
    try:
        server.serve_forever()
    finally:  # a thread that is in PyTorch at the end would abort the process
        server.has_ended = True
        while server.queue:
            time.sleep(POLL_SECONDS)
