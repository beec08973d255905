"""Show both maps, lambda and their difference, while a model reads and writes.

python -m viewer                                                  # the furthest model in out/
python -m viewer out/sft/best.pt                                  # another
python -m viewer out/smollm2/best.pt out/smollm2-v2/best.pt       # two that share a tokenizer, side by side

It prints the address of a page, which only this computer can open. Ctrl-C ends it.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from engine.settings import Parser, UserError, explain, run_script  # before torch, for Ctrl-C; isort: skip
import torch

from data.chat import render_prompt
from data.tokenizer import END_OF_TEXT
from engine import parallel
from engine.device import choose_device
from engine.generate import Decoder
from engine.terminal import printable
from sample import ENDS, furthest_checkpoint, load_model
from viewer.maps import PICTURE, layer_maps, read, summarize, to_bytes

MAX_TOKENS = 512  # of a text, beside the one that begins it: maps are quadratic
MAX_BODY = 65536  # bytes of a request
KEPT = 4  # texts that can be looked at, for several windows
ROLES = ("system", "user", "assistant")


class Refusal(Exception):
    """A request that is not answered: an HTTP status, and a line for the page."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------
# Answers


class Viewer:
    """The models, the texts that they have read, and a method for each path, which page.html describes.

    A method takes a request's JSON. It returns a dict, or a length, None if it is unknown, and an iterator of bytes.
    Raises UserError if the models do not share a tokenizer.
    """

    def __init__(self, paths):
        device = choose_device("auto")
        self.models, self.about, encodings = [], [], []
        for path in paths:
            print(f"loading {path}", file=sys.stderr)
            model, encoding, checkpoint = load_model(path, device)
            config, attn = model.config, model.layers[0].attn
            shape = dict(layers=config.n_layer, heads=config.n_head // attn.value_width, maps=1 + hasattr(attn, "lam"))
            stage, step = checkpoint["stage"], checkpoint["step"]
            self.about.append(dict(name=str(path), attn=config.attn, stage=stage, step=step, **shape))
            self.models.append(model)
            encodings.append(encoding)
        if len({encoding.name for encoding in encodings}) > 1:
            names = " and ".join(encoding.name for encoding in encodings)
            raise UserError(f"these models cannot be compared, since their tokenizers differ: {names}")
        self.encoding = encodings[0]
        self.ends = {self.encoding.encode_single_token(name) for name in ENDS}
        self.limit = min(MAX_TOKENS + 1, *(model.config.block_size for model in self.models))
        self.readings, self.count = {}, 0
        # One thread for all that models do. Requests wait for their turn; between two tokens of a text, others pass.
        self.turns = ThreadPoolExecutor(1)
        self.writing, self.stopped = threading.Lock(), threading.Event()

    def in_turn(self, function, *arguments):
        """Call a function in the models' thread. Raises ConnectionAbortedError if Ctrl-C has ended that."""
        try:
            turn = self.turns.submit(function, *arguments)
        except RuntimeError as error:
            raise ConnectionAbortedError from error
        return turn.result()

    def describe(self, body):
        return dict(models=self.about, tokens=self.limit)

    def read(self, body):
        ids = self.prompt(body)
        return self.in_turn(self.keep, ids, len(ids))

    def overview(self, body):
        model, inputs = self.reading(body)
        heads, side = self.about[body["model"]]["heads"], min(PICTURE, inputs[0].size(1))

        def summary(layer):
            return to_bytes(*summarize(*layer_maps(model, inputs, layer)))

        return len(inputs) * heads * (3 * 4 + side**2), (self.in_turn(summary, i) for i in range(len(inputs)))

    def maps(self, body):
        model, inputs = self.reading(body)
        layer = number(body, "layer", int, 0, len(inputs) - 1)
        return whole(to_bytes(*self.in_turn(layer_maps, model, inputs, layer)))

    def write(self, body):
        index, seed = number(body, "model", int, 0, len(self.models) - 1), number(body, "seed", int, 0, 2**53)
        temperature, top_k = number(body, "temperature", (int, float), 0, 100), number(body, "top_k", int, 0, 2**31)
        length, ids = number(body, "length", int, 1, MAX_TOKENS), self.prompt(body)
        if "messages" in body and self.about[index]["stage"] == "pretrain":
            raise Refusal(400, "this model has not learned to chat; it can continue a text")
        if len(ids) == self.limit:
            raise Refusal(400, f"the text is full: it has {len(ids)} tokens, which is the most")
        options = dict(temperature=temperature, top_k=top_k or None)
        return None, self.continuation(self.models[index], ids, min(length, self.limit - len(ids)), seed, options)

    def stop(self, body):
        self.stopped.set()
        return {}

    def continuation(self, model, ids, length, seed, options):
        """Continue ids by up to `length` tokens, and let all models read the whole. Yields JSON lines."""
        if not self.writing.acquire(blocking=False):
            raise Refusal(409, "another text is being written; wait for it, or stop it")
        try:
            self.stopped.clear()
            yield line(tokens=self.labels(ids))
            text, stream = list(ids), self.in_turn(self.begin, model, ids, length, seed, options)
            while (token := self.in_turn(next, stream, None)) is not None and token.item() not in self.ends:
                text.append(token.item())
                yield line(token=self.labels(text[-1:])[0])
                if self.stopped.is_set():
                    break
            yield line(written=self.encoding.decode(text[len(ids) :]), reading=self.in_turn(self.keep, text, len(ids)))
        finally:
            self.writing.release()

    def begin(self, model, ids, length, seed, options):
        """Return a stream of up to `length` tokens after ids."""
        torch.manual_seed(seed)
        decoder = Decoder(model, 1, len(ids) + length, n_vocab=self.encoding.n_vocab, **options)
        return decoder.stream(torch.tensor([ids], device=model.rope_cos.device), length)

    def keep(self, ids, start):
        """Let all models read ids, of which those from `start` were written -> a reading for the page."""
        self.count += 1
        self.readings[self.count] = [read(model, ids) for model in self.models]
        self.readings.pop(self.count - KEPT, None)
        return dict(reading=self.count, tokens=self.labels(ids), start=start, side=min(PICTURE, len(ids)))

    def prompt(self, body):
        """Encode the text or the messages of a request -> ids, which begin as in sample.py."""
        if isinstance(body.get("text"), str):
            ids = [self.encoding.encode_single_token(END_OF_TEXT), *self.encoding.encode_ordinary(body["text"])]
        elif are_messages(body.get("messages")):
            ids = render_prompt(body["messages"], self.encoding)
        else:
            raise Refusal(400, "a request needs a text, or messages: [[role, text], ...]")
        if len(ids) > self.limit:
            raise Refusal(400, f"the text is too long: it has {len(ids)} tokens, and there is room for {self.limit}")
        return ids

    def reading(self, body):
        """Return the model that a request is about, and what its layers read."""
        index = number(body, "model", int, 0, len(self.models) - 1)
        inputs = self.readings.get(number(body, "reading", int, 1, sys.maxsize))
        if inputs is None:
            raise Refusal(410, "this text is no longer kept; read it again")
        return self.models[index], inputs[index]

    def labels(self, ids):
        """Return what each token stands for. Bytes that are only a part of a character are escaped."""
        return [self.encoding.decode_single_token_bytes(token).decode(errors="backslashreplace") for token in ids]


def number(body, name, kinds, low, high):
    """Return a number of a request. Raises Refusal if it is missing, of another type or out of range."""
    value = body.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        raise Refusal(400, f"{name} must be a number from {low} to {high}")
    return value


def are_messages(messages):
    """Return True for a list of [role, text]."""
    pairs = isinstance(messages, list) and all(isinstance(m, list) and [*map(type, m)] == [str, str] for m in messages)
    return pairs and all(role in ROLES for role, _ in messages)


def line(**contents):
    return json.dumps(contents).encode() + b"\n"


def whole(contents):
    """Return the length of bytes, and an iterator over them."""
    return len(contents), (part for part in [contents])


def report(error):
    """Print an error as one line on stderr. Returns it."""
    message = explain(error) or (str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}")
    message = printable(" ".join(message.split()))
    print("error:", message, file=sys.stderr)
    return message


# ---------------------------------------------------------------------------------------------------
# HTTP

ANSWERS = {
    "/models": Viewer.describe,
    "/read": Viewer.read,
    "/overview": Viewer.overview,
    "/maps": Viewer.maps,
    "/write": Viewer.write,
    "/stop": Viewer.stop,
}
PAGE = (Path(__file__).parent / "page.html").read_bytes()
GONE = (ConnectionError, TimeoutError)  # the client has left, or is too slow


def digest(tag):
    """Return the hash by which a Content-Security-Policy allows what is within a tag of the page."""
    contents = re.search(f"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)[1]
    return base64.b64encode(hashlib.sha256(contents).digest()).decode()


HEADERS = {
    # Only the page's own script and style run, whatever a model writes, and they talk to this server alone.
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src "
    f"'sha256-{digest('style')}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page, and POST with what the page asks for. No path becomes a file's name."""

    timeout = 30  # seconds that a client may let the server wait

    def do_GET(self):
        self.respond(self.page)

    def do_POST(self):
        self.respond(self.answer)

    def respond(self, make):
        """Send what make() returns: a content type, a length or None, and an iterator of bytes; or an error."""
        status = 200
        try:
            kind, length, chunks = make()
        except GONE:
            raise
        except Exception as error:
            status, kind = getattr(error, "status", 500), "application/json"
            length, chunks = whole(line(error=report(error)))
        with contextlib.closing(chunks):
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": length}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            try:
                for chunk in chunks:
                    self.wfile.write(chunk)
            except GONE:
                raise
            except Exception as error:
                message = report(error)
                if length is None:  # else it comes short, which the page notices
                    self.wfile.write(line(error=message))

    def check_host(self):
        """Refuse other names of this computer. A foreign page could give it one of its own, and read the answers."""
        hosts = [f"{name}:{self.server.server_port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")]
        if self.headers.get_all("Host") not in [[host] for host in hosts]:
            raise Refusal(403, f"this page is at http://{hosts[0]}/")

    def page(self):
        self.check_host()
        if self.path != "/":
            raise Refusal(404, "there is nothing here")
        return "text/html; charset=utf-8", *whole(PAGE)

    def answer(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,8}", length):
            raise Refusal(411, "a request says how long it is, in less than 100 MB")
        body, rest = self.rfile.read(min(int(length), MAX_BODY)), int(length) - MAX_BODY
        while rest > 0 and (more := len(self.rfile.read(min(rest, MAX_BODY)))):
            rest -= more  # it is taken before it is refused, since a client that is still sending may not see why
        self.check_host()
        if self.path not in ANSWERS:
            raise Refusal(404, "there is nothing here")
        # Foreign pages cannot send this type without asking first, which is not answered.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "a request has the type application/json")
        if int(length) > MAX_BODY:
            raise Refusal(413, f"the text is too long: a request has at most {MAX_BODY} bytes")
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "the request is not JSON") from error
        if not isinstance(body, dict):
            raise Refusal(400, "the request is not a JSON object")
        found = ANSWERS[self.path](self.server.viewer, body)
        if isinstance(found, dict):
            return "application/json", *whole(line(**found))
        return "application/x-ndjson" if found[0] is None else "application/octet-stream", *found

    def log_request(self, *arguments):
        """Print nothing: on stderr are errors alone."""


class Server(ThreadingHTTPServer):
    """A server for this computer alone, to which main() gives a `viewer`."""

    daemon_threads = True  # Ctrl-C waits for no client

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), GONE):
            report(sys.exception())


def port_number(text):
    if not 0 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def main():
    parallel.refuse_torchrun()
    parser = Parser(__doc__, prog="python -m viewer")
    parser.add_argument("checkpoint", nargs="*", help="one, or two to compare (default: the furthest in out/)")
    parser.add_argument("--port", type=port_number, default=8000, help="0: one that is free (default: %(default)s)")
    arguments = parser.parse_args()
    if len(arguments.checkpoint) > 2:
        parser.error("two checkpoints can be compared, not more")
    try:
        server = Server(("127.0.0.1", arguments.port), Handler)
    except OSError as error:
        raise UserError(f"port {arguments.port}: {error.strerror}; --port names another") from error
    with server:
        server.viewer = Viewer(arguments.checkpoint or [furthest_checkpoint()])
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)
