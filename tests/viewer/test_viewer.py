"""viewer/: what it serves against the engine's maps, what a model writes, and wrong requests, all without a browser."""

import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import weakref
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bench.probes import layer_maps
from data.chat import render_prompt
from data.tokenizer import END_OF_TEXT, get_tokenizer
from engine.attention import attention_maps, causal_attention
from engine.settings import UserError
from model import ATTENTION, GPT, Attention
from tests.robustness.helpers import exit_code, fork, wait_until
from tests.small import base_model, save_model, write_tokenizer
from viewer import __main__ as viewer

BYTES = get_tokenizer("bytes")
TEXT = "The quick brown fox jumps over the lazy dog. "
WRITE = dict(model=0, temperature=0.8, top_k=0, seed=3, length=12)
SAY = [["system", "Be brief."], ["user", "1 + 1?"]]


def strong_model(attn, seed=0):
    """A model whose weights are large enough for attention to be far from uniform."""
    model = base_model(attn, seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


class Client:
    """A server of checkpoints in this process, and requests to it."""

    def __init__(self, paths):
        self.server = viewer.Server(("127.0.0.1", 0), viewer.Handler)
        self.server.viewer = viewer.Viewer(paths)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.port = self.server.server_port

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        contents = answer.read()
        connection.close()
        return answer, contents

    def post(self, path, **body):
        answer, contents = self.request("POST", path, json.dumps(body), **{"Content-Type": "application/json"})
        return answer.status, contents

    def read(self, text=TEXT, **more):
        status, contents = self.post("/read", text=text, **more)
        assert status == 200, contents
        return json.loads(contents)

    def maps(self, reading, model, layer, heads):
        """Map 1 of all heads and, if there are two, map 2 and lambda."""
        T, found = len(reading["tokens"]), []
        for head in range(heads):
            place = dict(reading=reading["reading"], model=model, layer=layer, head=head)
            status, contents = self.post("/maps", **place)
            assert status == 200, contents
            all_, size = torch.frombuffer(bytearray(contents), dtype=torch.float32), T * T
            assert len(all_) in (size, 2 * size + T)
            parts = all_.split([size, size, T] if len(all_) > size else [size])
            found.append([part.view(T, -1) for part in parts])
        return [torch.stack(kind) for kind in zip(*found)]

    def write(self, **body):
        status, contents = self.post("/write", **WRITE | body)
        assert status == 200, contents
        return [json.loads(line) for line in contents.splitlines()]

    def start_writing(self, **body):
        """Ask for a text, and leave it unread -> a socket, after the first bytes, and the key that stops the text."""
        body = json.dumps({"text": "a", **WRITE, "temperature": 100, "length": 512, **body}).encode()
        head = f"POST /write HTTP/1.0\r\nHost: localhost:{self.port}\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while b'"token"' not in received:
            received += connection.recv(4096)
        return connection, re.search(rb'"key": "(\w+)"', received)[1].decode()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for attn in ATTENTION:
        save_model(home / f"{attn}.pt", strong_model(attn))
    save_model(home / "tuned.pt", strong_model("v2", seed=1), stage="sft")
    return home


@pytest.fixture(scope="module")
def one(home):
    """The tuned model alone."""
    client = Client([home / "tuned.pt"])
    yield client
    client.close()


@pytest.fixture(scope="module")
def two(home):
    """A plain model and V2."""
    client = Client([home / "vanilla.pt", home / "v2.pt"])
    yield client
    client.close()


# ------------------------------------------------------------------------------------- reading


class Twice(Attention):
    """A fork's attention, with twice the heads and one map each."""

    q_per_head = 2

    def forward(self, x, rope, cache=None, shared=None):
        q, k, v = self.qkv(x, rope, shared)
        y = causal_attention(q, k, v, cache, self.impl).unflatten(2, (-1, 2)).mean(3)
        return self.o_proj(y.flatten(2)), (k, v)


def test_an_attention_of_a_fork(tmp_path, monkeypatch):
    """As many heads are described as have maps."""
    monkeypatch.setitem(ATTENTION, "twice", Twice)
    save_model(tmp_path / "twice.pt", strong_model("twice"))
    client = Client([tmp_path / "twice.pt"])
    (about,) = json.loads(client.post("/describe")[1])["models"]
    reading = client.read("fox")
    summaries = client.post("/overview", reading=reading["reading"], model=0)[1]
    assert (about["maps"], about["heads"]) == (1, 4)
    assert len(summaries) == 4 * about["layers"] * about["heads"] * (3 + 32 * 32)
    client.close()


def test_models(one, two, home):
    described = json.loads(two.post("/describe")[1])
    assert described["tokens"] == 96
    assert [(about["attn"], about["maps"], about["heads"], about["layers"]) for about in described["models"]] == [
        ("vanilla", 1, 2, 2),
        ("v2", 2, 2, 2),
    ]
    about = json.loads(one.post("/describe")[1])["models"][0]
    assert (about["name"], about["stage"], about["step"]) == (str(home / "tuned.pt"), "sft", 7)


def test_tokens(one):
    assert one.read("b\n")["tokens"] == [END_OF_TEXT, "b", "\n"]
    reading = one.read("é<|im_end|>\ud800")
    assert reading["tokens"][:4] == [END_OF_TEXT, "\\xc3", "\\xa9", "<"]  # a text has no control tokens
    assert reading["start"] == len(reading["tokens"])
    chat = one.read(None, messages=SAY)["tokens"]
    assert len(chat) == len(render_prompt(SAY, BYTES)) and chat[0] == "<|im_start|>"


def test_no_text(one):
    """What begins every text is there."""
    assert json.loads(one.post("/read", text="")[1])["tokens"] == [END_OF_TEXT]


@pytest.mark.parametrize("attn", ATTENTION)
def test_maps(attn, home):
    """Those of bench.probes, and of engine.attention by itself; each row sums to 1."""
    client, model = Client([home / f"{attn}.pt"]), strong_model(attn)
    reading, heads = client.read(), json.loads(client.post("/describe")[1])["models"][0]["heads"]
    idx = torch.tensor([[BYTES.encode_single_token(END_OF_TEXT), *BYTES.encode_ordinary(TEXT)]])
    inputs = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model.hidden(idx)  # puts the input of layer i at i
    for layer, (expected, _) in enumerate(layer_maps(model, idx, slice(None))):
        maps = client.maps(reading, 0, layer, heads)
        block, x, rope = model.layers[layer], inputs[layer], model.rope(idx.size(1))
        q, k = block.attn.qkv(block.attn_norm(x), rope)[:2]
        if attn == "v1":  # map m of a pair reads key head m
            naive = [attention_maps(q[:, :, m::2], k[:, :, m::2], q.size(-1) ** -0.5)[0] for m in (0, 1)]
        else:
            naive = attention_maps(q, k, q.size(-1) ** -0.5)[0]
            naive = [naive] if attn == "vanilla" else [naive[0::2], naive[1::2]]
        for ours, theirs in zip(maps, naive):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.sum(-1), torch.ones(heads, idx.size(1)))
        if attn != "vanilla":
            first, second, lam = maps
            torch.testing.assert_close(first, expected["first"][0], rtol=0, atol=1e-6)
            torch.testing.assert_close(second, expected["second"][0], rtol=0, atol=1e-6)
            torch.testing.assert_close(first - lam * second, expected["weights"][0], rtol=0, atol=1e-6)
            expected_lam = block.lam(x).expand(1, idx.size(1), heads)[0].T
            torch.testing.assert_close(lam[..., 0], expected_lam, rtol=0, atol=1e-6)
    client.close()


def test_maps_of_shared_keys(home):
    """A layer without keys of its own reads those of a layer below."""
    torch.manual_seed(0)
    model = GPT(replace(strong_model("v2").config, n_kv_layers=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(home / "shared.pt", model)
    client = Client([home / "shared.pt"])
    idx = torch.tensor([WithEnd.encode_ordinary(TEXT)])
    _, (expected, _) = layer_maps(model, idx, slice(None))
    first, second, _ = client.maps(client.read(), 0, 1, 2)
    torch.testing.assert_close(first, expected["first"][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(second, expected["second"][0], rtol=0, atol=1e-6)
    client.close()


def overview(client, reading, model):
    """Numbers (layers, 3, heads) and pictures (layers, heads, 32, 32)."""
    status, contents = client.post("/overview", reading=reading["reading"], model=model)
    assert status == 200
    layers = np.frombuffer(contents, np.float32).reshape(2, 2, 3 + 32 * 32)
    return layers[..., :3].transpose(0, 2, 1), layers[..., 3:].reshape(2, 2, 32, 32)


def test_overview(two):
    reading = two.read()
    numbers, pictures = overview(two, reading, 1)
    assert numbers.shape == (2, 3, 2) and pictures.shape == (2, 2, 32, 32)
    for layer in range(2):
        first, second, lam = two.maps(reading, 1, layer, 2)
        weights = first - lam * second
        removed = torch.minimum(first, lam * second)[..., 1:].sum(-1).mean(-1)
        p = weights.abs() / weights.abs().sum(-1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean(-1)
        for ours, theirs in zip(numbers[layer], (removed, p[..., 0].mean(-1), entropy)):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not overview(two, reading, 0)[0][:, 0].any()  # a plain model removes nothing


class WithEnd:
    """The tokenizer of bytes, with the token that begins a text."""

    def encode_ordinary(text):
        return [BYTES.encode_single_token(END_OF_TEXT), *BYTES.encode_ordinary(text)]


def test_pictures(two):
    """A pixel is the largest weight of its square, by size; those of a text of 32 tokens are its weights."""
    reading = two.read("x" * 15 + "y" * 16)
    first, second, lam = two.maps(reading, 1, 1, 2)
    weights = (first - lam * second).numpy()
    np.testing.assert_allclose(overview(two, reading, 1)[1][1], weights, atol=1e-6)
    assert len(reading["tokens"]) == 32 and (weights < 0).any()
    reading = two.read("x" * 30 + "y" * 33)
    first, second, lam = two.maps(reading, 1, 1, 2)
    squares = (first - lam * second).numpy().reshape(2, 32, 2, 32, 2).transpose(0, 1, 3, 2, 4).reshape(2, 32, 32, 4)
    largest = np.take_along_axis(squares, np.abs(squares).argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(overview(two, reading, 1)[1][1], largest, atol=1e-6)
    assert (largest < 0).any()


@pytest.mark.parametrize("attn", ATTENTION)
def test_queries_and_keys_are_computed_once(attn, monkeypatch):
    """A model that reads for the viewer computes no more of them than by itself, and is as before afterwards."""
    model, computed, queries, qkv = strong_model(attn), [], [], ATTENTION[attn].qkv

    def watched(self, *given):
        assert not any(kept() is not None for kept in queries)  # those of one layer at a time are in memory
        q, *more = qkv(self, *given)
        computed.append(self)
        queries.append(weakref.ref(q))
        return q, *more

    monkeypatch.setattr(ATTENTION[attn], "qkv", watched)
    before = model(torch.tensor([[1, 2, 3]]))[0]
    assert len(computed) == 2
    viewer.read(model, [1, 2, 3])
    assert computed[2:] == computed[:2] == [layer.attn for layer in model.layers]
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]]))[0], before, rtol=0, atol=0)
    assert len(computed) == 6 and not any("qkv" in vars(layer.attn) for layer in model.layers)


def test_one_thread_computes(home, monkeypatch):
    """PyTorch would start helpers for each thread."""
    threads = set()

    def watch(holder, name):
        function = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *given: (threads.add(threading.get_ident()), function(*given))[1])

    for holder, name in ((viewer, "load_model"), (viewer, "read"), (viewer, "layer_maps"), (viewer.Decoder, "step")):
        watch(holder, name)
    client = Client([home / "tuned.pt"])
    assert len(threads) == 1
    client.maps(client.write(text="a", temperature=100, length=5)[-1]["reading"], 0, 0, 2)
    client.maps(client.read("b"), 0, 1, 2)
    assert len(threads) == 1 and threading.get_ident() not in threads
    client.close()


def test_limits(one):
    assert len(one.read("x" * 95)["tokens"]) == 96
    status, contents = one.post("/read", text="x" * 96)
    assert status == 400 and "97 tokens" in json.loads(contents)["error"]


def test_old_readings_go(one):
    first = one.read("a")
    for _ in range(viewer.KEPT):
        last = one.read("b")
    assert one.post("/maps", reading=first["reading"], model=0, layer=0, head=0)[0] == 400
    assert one.post("/maps", reading=last["reading"], model=0, layer=0, head=0)[0] == 200


# ------------------------------------------------------------------------------------- writing


def test_writing(two):
    ids = WithEnd.encode_ordinary(TEXT)
    prompt, *tokens, end = two.write(text=TEXT, model=1, temperature=0)
    expected = strong_model("v2").generate(torch.tensor([ids]), 12, temperature=0, n_vocab=BYTES.n_vocab)[0].tolist()
    labels = [BYTES.decode_single_token_bytes(token).decode(errors="backslashreplace") for token in expected]
    ends = [i for i in range(len(ids), len(expected)) if expected[i] >= 256]  # an end token is not shown
    stop = ends[0] if ends else len(expected)
    assert prompt["tokens"] == labels[: len(ids)]
    assert [token["token"] for token in tokens] == labels[len(ids) : stop]
    assert end["written"] == BYTES.decode(expected[len(ids) : stop])
    assert end["reading"]["tokens"] == labels[:stop] and end["reading"]["start"] == len(ids)
    first, _, _ = two.maps(end["reading"], 1, 1, 2)  # the new tokens can be looked at
    torch.testing.assert_close(first.sum(-1), torch.ones(2, stop))


def test_sampling(one):
    written = [one.write(text="a", seed=seed, length=40)[-1]["written"] for seed in (1, 1, 2)]
    assert written[0] == written[1] != written[2]
    assert one.write(text="a", top_k=1)[-1]["written"] == one.write(text="a", temperature=0)[-1]["written"]


def test_chat(one, two):
    prompt = one.write(messages=SAY)[0]["tokens"]
    assert len(prompt) == len(render_prompt(SAY, BYTES)) and prompt[-1] == "\n"
    status, contents = two.post("/write", **WRITE, messages=SAY)
    assert status == 400 and "chat" in json.loads(contents)["error"]


def test_text_fills_the_context(one):
    *_, end = one.write(text="x" * 90, length=512, temperature=100)
    assert len(end["reading"]["tokens"]) <= 96
    assert one.post("/write", **WRITE, text="x" * 95)[0] == 400


@pytest.fixture
def slowly(monkeypatch):
    """A token every hundredth of a second."""
    step = viewer.Decoder.step
    monkeypatch.setattr(viewer.Decoder, "step", lambda decoder: (time.sleep(0.01), step(decoder))[1])


def test_stop(one, slowly, monkeypatch):
    monkeypatch.setattr(one.server.viewer, "ends", set())  # else it may end by itself
    connection, key = one.start_writing()
    assert one.post("/stop", key=key)[0] == 200
    rest = b"".join(iter(lambda: connection.recv(65536), b""))
    assert len(json.loads(rest.splitlines()[-1])["reading"]["tokens"]) < 96
    connection.close()


def test_stop_needs_the_key(one, slowly, monkeypatch):
    """Who did not ask for a text, or asked for another, cannot stop it."""
    monkeypatch.setattr(one.server.viewer, "ends", set())
    connection, earlier = one.start_writing(length=1)
    connection.close()
    connection, key = one.start_writing()
    for wrong in ({}, {"key": None}, {"key": ""}, {"key": earlier}):
        assert key != earlier and one.post("/stop", **wrong)[0] == 200
    rest = b"".join(iter(lambda: connection.recv(65536), b""))
    assert len(json.loads(rest.splitlines()[-1])["reading"]["tokens"]) == 96
    connection.close()


def test_two_at_once(one, slowly, monkeypatch):
    """A request waits until the text before it is written, or stopped."""
    monkeypatch.setattr(one.server.viewer, "ends", set())
    connection, key = one.start_writing()
    timer = threading.Timer(0.1, lambda: one.post("/stop", key=key))
    timer.start()
    assert one.read("b")["tokens"][-1] == "b" and timer.finished.is_set()
    assert b'"reading"' in b"".join(iter(lambda: connection.recv(65536), b""))
    connection.close()


def test_client_that_leaves(one, slowly, capfd):
    """The text ends with it, and that is no error."""
    connection, _ = one.start_writing()
    connection.close()
    wait_until(lambda: not one.server.viewer.turn.locked())
    assert one.write(text="b")[-1]["reading"]
    assert capfd.readouterr().err == ""


def test_error_while_writing(one, monkeypatch, capfd):
    """The answer ends, there is a line on stderr, and the next text can be written."""
    monkeypatch.setattr(viewer.Decoder, "step", lambda decoder: 1 / 0)
    assert "token" in one.write(text="a")[-1]
    monkeypatch.undo()
    assert one.write(text="a")[-1]["reading"]
    assert capfd.readouterr().err.splitlines() == ["error: ZeroDivisionError: division by zero"]


def test_error_while_reading(one, monkeypatch, capfd):
    """It is a message for the page."""
    monkeypatch.setattr(viewer, "read", lambda model, ids: 1 / 0)
    status, contents = one.post("/read", text="a")
    assert (status, json.loads(contents)["error"]) == (500, "ZeroDivisionError: division by zero")
    assert capfd.readouterr().err.splitlines() == ["error: ZeroDivisionError: division by zero"]


def test_error_amid_the_maps(one, monkeypatch):
    """No part of them is sent."""
    reading = one.read("a")["reading"]
    monkeypatch.setattr(viewer, "layer_maps", lambda *call: [torch.zeros(3), [None]])
    status, contents = one.post("/maps", reading=reading, model=0, layer=0, head=0)
    assert status == 500 and "NoneType" in json.loads(contents)["error"]


def test_a_slow_client_keeps_nobody_waiting(one, monkeypatch):
    """It does not read its maps, which are more than a connection holds."""
    monkeypatch.setattr(viewer.Viewer, "maps", lambda self, body: iter([bytes(50_000_000)]))
    head = f"POST /maps HTTP/1.0\r\nHost: localhost:{one.port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", one.port)) as connection:
        connection.sendall(head.encode() + b"Content-Length: 2\r\n\r\n{}")
        assert connection.recv(10)
        assert one.read("a")["tokens"][-1] == "a"  # else it would fail after 20 s


# ------------------------------------------------------------------------------------- wrong requests

JSON = {"Content-Type": "application/json"}
REQUESTS = {  # method, path, body, headers
    "other_host": ("GET", "/", None, {"Host": "example.org"}),
    "other_port": ("GET", "/", None, {"Host": "127.0.0.1:1"}),
    "other_host_post": ("POST", "/describe", "{}", {**JSON, "Host": "evil.test"}),
    "file": ("GET", "/page.html", None, {}),
    "path": ("GET", "/../../etc/passwd", None, {}),
    "unknown": ("POST", "/nothing", "{}", JSON),
    "attribute": ("POST", "/__init__", "{}", JSON),
    "method": ("PUT", "/describe", "{}", JSON),
    "type": ("POST", "/describe", "{}", {"Content-Type": "text/plain"}),
    "no_json": ("POST", "/read", "{", JSON),
    "no_utf8": ("POST", "/read", b'{"text": "\xff"}', JSON),
    "deep_json": ("POST", "/read", "[" * 60000, JSON),
    "no_object": ("POST", "/read", "[]", JSON),
    "long_number": ("POST", "/maps", '{"model": 0, "reading": %s}' % ("9" * 5000), JSON),
    "no_text": ("POST", "/read", "{}", JSON),
    "text_of_another_type": ("POST", "/read", '{"text": 1}', JSON),
    "huge_text": ("POST", "/read", json.dumps({"text": "x" * 99000}), JSON),
    "huge_request": ("POST", "/read", "{}", {**JSON, "Content-Length": "100000"}),
    "no_length": ("POST", "/read", None, {**JSON, "Transfer-Encoding": "chunked"}),
    "negative_length": ("POST", "/read", "{}", {**JSON, "Content-Length": "-1"}),
    "messages": ("POST", "/read", '{"messages": [["user"]]}', JSON),
    "message_of_another_type": ("POST", "/read", '{"messages": [["user", 1]]}', JSON),
    "no_role": ("POST", "/read", '{"messages": [["robot", "a"]]}', JSON),
    "message_in_letters": ("POST", "/read", '{"messages": ["ab"]}', JSON),
    "pairs": ("POST", "/describe", '[["text", "a"]]', JSON),
    "no_messages": ("POST", "/read", '{"messages": {"a": 1}}', JSON),
    "no_reading": ("POST", "/maps", '{"model": 0, "layer": 0, "head": 0}', JSON),
    "unknown_reading": ("POST", "/maps", '{"reading": 999, "model": 0, "layer": 0, "head": 0}', JSON),
    "unknown_layer": ("POST", "/maps", '{"reading": READING, "model": 0, "layer": 2, "head": 0}', JSON),
    "negative_layer": ("POST", "/maps", '{"reading": READING, "model": 0, "layer": -1, "head": 0}', JSON),
    "layer_true": ("POST", "/maps", '{"reading": READING, "model": 0, "layer": true, "head": 0}', JSON),
    "layer_fraction": ("POST", "/maps", '{"reading": READING, "model": 0, "layer": 0.5, "head": 0}', JSON),
    "unknown_head": ("POST", "/maps", '{"reading": READING, "model": 0, "layer": 0, "head": 2}', JSON),
    "no_head": ("POST", "/maps", '{"reading": READING, "model": 0, "layer": 0}', JSON),
    "unknown_model": ("POST", "/overview", '{"reading": READING, "model": 1}', JSON),
    "reading_of_another_type": ("POST", "/overview", '{"reading": [1], "model": 0}', JSON),
    "no_sampling": ("POST", "/write", '{"text": "a", "model": 0}', JSON),
    "temperature_nan": ("POST", "/write", json.dumps({**WRITE, "text": "a", "temperature": float("nan")}), JSON),
    "seed": ("POST", "/write", json.dumps({**WRITE, "text": "a", "seed": -1}), JSON),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_wrong_request(name, one, capfd):
    """It gets a message for the page, which is on stderr, too, and the server goes on."""
    method, path, body, headers = REQUESTS[name]
    if isinstance(body, str):
        body = body.replace("READING", str(one.read("a")["reading"]))
    answer, contents = one.request(method, path, body, **headers)
    if method == "PUT":  # Python's library answers
        assert answer.status == 501
    else:
        assert answer.status == 400, contents
        assert capfd.readouterr().err == f"error: {json.loads(contents)['error']}\n"
    assert one.read("a")["tokens"][-1] == "a"


def test_broken_requests(one, capfd):
    """Clients that send nothing, half a request or no HTTP, or leave before the answer, do no harm."""
    whole = f"POST /read HTTP/1.0\r\nHost: localhost:{one.port}\r\nContent-Type: application/json\r\n"
    whole += 'Content-Length: 13\r\n\r\n{"text": "a"}'
    for sent in ("", "\r\n", "GARBAGE\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", whole[:-3], whole):
        with socket.create_connection(("127.0.0.1", one.port)) as connection:
            connection.sendall(sent.encode())
    assert one.read("a")["tokens"][-1] == "a"
    assert "Traceback" not in capfd.readouterr().err


def test_many_at_once(one):
    """Each gets the maps of its own text."""
    lengths, found = [3, 9, 30, 60], {}

    def ask(length):
        reading = one.read("x" * length)
        found[length] = one.maps(reading, 0, 1, 2)[0].shape[1]

    threads = [threading.Thread(target=ask, args=(length,)) for length in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {length: length + 1 for length in lengths}


# ------------------------------------------------------------------------------------- page and program


def test_page(one):
    """It names nothing outside, and makes no HTML of texts."""
    answer, page = one.request("GET", "/")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(rb"//www|https?:|<link rel=.stylesheet|<script src|@import|url\(", page)
    assert not re.search(rb"eval\(|Function\(|inner_?HTML|outerHTML|insertAdjacent|document.write|setHTML", page)
    assert one.server.server_address[0] == "127.0.0.1"


def test_different_tokenizers(home, tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = get_tokenizer("tokenizer.json", tmp_path)
    tokenizer.save(tmp_path)
    save_model(tmp_path / "other.pt", base_model(), data={"tokenizer": tokenizer.name})
    with pytest.raises(UserError, match="tokenizers differ"):
        viewer.Viewer([home / "v2.pt", tmp_path / "other.pt"])


def start(*arguments):
    """Call main() as from the command line."""
    with patch.object(sys, "argv", ["viewer", *map(str, arguments)]):
        viewer.run_script(viewer.main)


@pytest.mark.parametrize(
    "arguments",
    [["missing.pt"], ["notes.txt"], ["folder"], [], ["--port", "65536"], ["--port", "x"]],
    ids=["missing", "damaged", "empty_folder", "none", "port", "no_port"],
)
def test_wrong_arguments(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stopped:
        start(*arguments, *([] if "--port" in arguments else ["--port", 0]))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ")


def test_folder(home, tmp_path, monkeypatch):
    """It stands for its best.pt."""
    save_model(tmp_path / "best.pt", strong_model("v2"))
    monkeypatch.setattr(viewer.Server, "serve_forever", lambda server: servers.append(server))
    servers = []
    start(tmp_path, home / "v2.pt", "--port", 0)
    names = [about["name"] for about in servers[0].viewer.about]
    servers[0].server_close()
    assert names == [str(tmp_path / "best.pt"), str(home / "v2.pt")]


def test_taken_port(one, home, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(home / "v2.pt", "--port", one.port)
    assert stopped.value.code == 2 and "--port names another" in capsys.readouterr().err


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "writing"])
def test_ctrl_c(busy, home, tmp_path, slowly):
    output = tmp_path / "output"
    child = fork(lambda: start(home / "v2.pt", "--port", 0), output)
    wait_until(lambda: output.exists() and "http://127.0.0.1:" in output.read_text())
    client = Client.__new__(Client)
    client.port = int(re.search(r":(\d+)/", output.read_text())[1])
    connection, _ = client.start_writing() if busy else (socket.socket(), None)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    assert "rror" not in output.read_text() and "Traceback" not in output.read_text()
    connection.close()
