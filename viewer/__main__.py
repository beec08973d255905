"""Show both maps, lambda and their difference, while a model reads and writes.

python -m viewer                                    # the furthest model in out/
python -m viewer out/sft                            # another: a checkpoint, or a folder with best.pt
python -m viewer out/smollm2 out/smollm2-v2         # two that share a tokenizer, side by side

It prints the address of a page, which only this computer can open. Ctrl-C ends it.
"""

import contextlib
import json
import os
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
from engine.checkpoint import find_furthest
from engine.device import choose_device
from engine.generate import Decoder
from engine.terminal import printable
from sample import ENDS, load_model
from viewer.maps import layer_maps, read

MAX_TOKENS = 512  # of a text, beside the one that begins it: maps are quadratic
KEPT = 4  # texts that can be looked at, for several windows
PATHS = ("/describe", "/read", "/overview", "/maps", "/write", "/stop")  # a method of Viewer for each


class Viewer:
    """The models, and the texts that they have read. page.html says what its methods take (JSON), and yield (bytes)."""

    def __init__(self, paths):
        self.models, self.about, encodings = [], [], []
        # One thread computes. PyTorch has helpers, one a core, for each thread that calls it; where those are
        # more than the cores, they sleep after each operation, and a text takes a fifth longer.
        self.worker = ThreadPoolExecutor(1)
        for path in paths:
            print(f"loading {path}", file=sys.stderr)
            model, encoding, checkpoint = self.worker.submit(load_model, path, choose_device("auto")).result()
            config, attn = model.config, model.layers[0].attn
            maps = 1 + hasattr(attn, "lam")
            shape = dict(layers=config.n_layer, heads=attn.q_per_head * config.n_head // maps, maps=maps)
            stage, step = checkpoint["stage"], checkpoint["step"]
            self.about.append(dict(name=str(checkpoint["path"]), attn=config.attn, stage=stage, step=step, **shape))
            self.models.append(model)
            encodings.append(encoding)
        if len({encoding.name for encoding in encodings}) > 1:
            raise UserError("these models cannot be compared, since their tokenizers differ")
        self.encoding = encodings[0]
        self.ends = {self.encoding.encode_single_token(name) for name in ENDS}
        self.limit = min(MAX_TOKENS + 1, *(model.config.block_size for model in self.models))
        self.readings, self.count = {}, 0
        self.turn = threading.Lock()  # held by the request that uses the models
        self.writing = None  # the key of the text that is being written

    def describe(self, body):
        yield line(models=self.about, tokens=self.limit)

    def read(self, body):
        ids = self.prompt(body, self.limit)
        yield line(**self.keep(ids, len(ids)))

    def overview(self, body):
        _, summaries = self.kept(body)
        yield torch.stack(summaries).cpu().numpy().tobytes()

    def maps(self, body):
        calls, _ = self.kept(body)
        maps = layer_maps(*calls[number(body, "layer", 0, len(calls) - 1)])
        head = number(body, "head", 0, len(maps[0]) - 1)
        for kind in maps:
            yield kind[head].cpu().numpy().tobytes()

    def write(self, body):
        index, seed = number(body, "model", 0, len(self.models) - 1), number(body, "seed", 0, 2**53)
        temperature, top_k = number(body, "temperature", 0, 100, (int, float)), number(body, "top_k", 0, 2**31)
        length, ids = number(body, "length", 1, MAX_TOKENS), self.prompt(body, self.limit - 1)
        if "messages" in body and self.about[index]["stage"] == "pretrain":
            raise UserError("this model has not learned to chat; it can continue a text")
        torch.manual_seed(seed)
        model, text, room = self.models[index], list(ids), min(len(ids) + length, self.limit)
        options = dict(n_vocab=self.encoding.n_vocab, temperature=temperature, top_k=top_k or None)
        decoder = Decoder(model, 1, room, **options)
        key = self.writing = os.urandom(16).hex()  # only who asked for the text gets it, and can stop the text
        yield line(tokens=self.labels(ids), key=key)
        for token in decoder.stream(torch.tensor([ids], device=model.rope_cos.device), room - len(ids)):
            if token.item() in self.ends:
                break
            text.append(token.item())
            yield line(token=self.labels(text[-1:])[0])
            if self.writing != key:
                break
        yield line(written=self.encoding.decode(text[len(ids) :]), reading=self.keep(text, len(ids)))

    def stop(self, body):
        if body.get("key") == self.writing:
            self.writing = None
        yield line()

    def prompt(self, body, room):
        """Encode the text or the messages of a request -> ids, which begin as in sample.py."""
        text, messages = body.get("text"), body.get("messages")
        if isinstance(text, str):
            ids = [self.encoding.encode_single_token(END_OF_TEXT), *self.encoding.encode_ordinary(text)]
        elif isinstance(messages, list) and all(map(is_message, messages)):
            ids = render_prompt(messages, self.encoding)
        else:
            raise UserError("a request needs a text, or messages: [[role, text], ...]")
        if len(ids) > room:
            what = "text" if messages is None else "chat"
            raise UserError(f"the {what} is too long: it has {len(ids)} tokens, and there is room for {room}")
        return ids

    def keep(self, ids, start):
        """Let all models read ids, of which those from `start` were written -> a reading for the page."""
        self.count += 1
        self.readings[self.count] = [read(model, ids) for model in self.models]
        self.readings.pop(self.count - KEPT, None)
        return dict(reading=self.count, tokens=self.labels(ids), start=start)

    def kept(self, body):
        """Return what read() returned for the text and the model of a request."""
        readings = self.readings.get(number(body, "reading", 1, sys.maxsize))
        if readings is None:
            raise UserError("this text is no longer kept; read it again")
        return readings[number(body, "model", 0, len(self.models) - 1)]

    def labels(self, ids):
        """Return what each token stands for. Bytes that are only a part of a character are escaped."""
        return [self.encoding.decode_single_token_bytes(token).decode(errors="backslashreplace") for token in ids]


def is_message(message):
    """Return True for [role, text]."""
    is_pair = isinstance(message, list) and [*map(type, message)] == [str, str]
    return is_pair and message[0] in ("system", "user", "assistant")


def number(body, name, low, high, kinds=(int,)):
    """Return a number of a request. Raises UserError if it is missing, of another type or out of range."""
    value = body.get(name)
    if type(value) not in kinds or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low} to {high}")
    return value


def line(**contents):
    return json.dumps(contents).encode() + b"\n"


def report(error):
    """Print an error as one line on stderr. Returns it."""
    message = printable(" ".join((explain(error) or f"{type(error).__name__}: {error}").split()))
    print("error:", message, file=sys.stderr)
    return message


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page, and POST with what the page asks for. No path becomes a file's name."""

    timeout = 30  # seconds that a client may let the server wait

    def do_GET(self):
        """Send what answer() yields. An error before that is sent instead, and one amid it cuts the answer short."""
        with contextlib.closing(self.answer()) as chunks:  # if the client leaves, its text ends, and others have turns
            status, kind = 200, "text/html; charset=utf-8" if self.command == "GET" else "application/octet-stream"
            try:
                chunk = next(chunks)
            except Exception as error:
                status, kind = 400 if isinstance(error, UserError) else 500, "application/json"
                chunk = line(error=report(error))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(chunk)
            for chunk in chunks:
                self.wfile.write(chunk)

    do_POST = do_GET

    def answer(self):
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,5}", length):
            raise UserError("a request has less than 100 kB")
        body = self.rfile.read(int(length))
        # A foreign page could give this computer another name, of its own, and read the answers.
        hosts = [f"{name}:{self.server.server_port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")]
        if self.headers.get("Host") not in hosts:
            raise UserError(f"this page is at http://{hosts[0]}/")
        if self.command == "GET" and self.path == "/":
            yield Path(__file__).with_name("page.html").read_bytes()
            return
        if self.path not in PATHS:
            raise UserError("there is nothing here")
        # Foreign pages cannot send this type without asking first, which is not answered.
        if self.headers.get_content_type() != "application/json":
            raise UserError("a request has the type application/json")
        try:
            body = json.loads(body)
            if not isinstance(body, dict):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise UserError("the request is not a JSON object") from error
        viewer = self.server.viewer
        chunks = getattr(viewer, self.path[1:])(body)
        if self.path == "/stop":
            yield from chunks
        elif self.path == "/write":  # token by token
            with viewer.turn:
                while chunk := viewer.worker.submit(next, chunks, None).result():
                    yield chunk
        else:  # as a whole, so that a slow client keeps nobody waiting, and an error comes instead of a part
            with viewer.turn:
                whole = viewer.worker.submit(b"".join, chunks).result()
            yield whole

    def log_message(self, format, *arguments):
        """Print nothing: on stderr are errors alone, from report()."""


class Server(ThreadingHTTPServer):
    """A server for this computer alone, to which main() gives a `viewer`."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client has left
            report(sys.exception())


def main():
    parallel.refuse_torchrun()
    parser = Parser(__doc__, prog="python -m viewer")
    parser.add_argument("checkpoint", nargs="*", help="one, or several to compare (default: the furthest in out/)")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        server = Server(("127.0.0.1", arguments.port), Handler)
    except (OSError, OverflowError) as error:  # it is taken, or no port
        reason = str(error).removesuffix(".")
        raise UserError(f"port {arguments.port}: {reason}; --port names another") from error
    try:
        server.viewer = Viewer(arguments.checkpoint or [find_furthest()])
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        os._exit(130)  # as run_script(), but at once: torch would abort in a thread that outlives Python


if __name__ == "__main__":
    run_script(main)
