"""viewer/page.html in Chromium, with the mouse and the keys. The models are tiny and random, the server is real.

No test may leave a message in the browser's console.
"""

import re
import threading

import pytest

from tests.small import save_model, tiny_model
from tests.viewer.browser import PROGRAM, Browser
from viewer import __main__ as viewer

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")

READY = "/^[0-9]+ tokens, of at most/.test(document.getElementById('status').textContent)"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A server of a tuned V2, and one that compares V1 with a plain model."""
    home = tmp_path_factory.mktemp("models")
    for attn in ("vanilla", "v1", "v2"):
        model = tiny_model(attn, vocab_size=320, block_size=96)
        for parameter in model.parameters():
            parameter.data.mul_(2)  # else hardly a weight is negative
        save_model(home / f"{attn}.pt", model, stage="sft" if attn == "v2" else "pretrain")
    servers = {}
    for names in (("v2",), ("v1", "vanilla")):
        server = servers[names] = viewer.Server(("127.0.0.1", 0), viewer.Handler)
        server.viewer = viewer.Viewer([home / f"{name}.pt" for name in names])
        server.viewer.ends = set()  # a text always has the length that was asked for
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield servers
    for server in servers.values():
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(browser, servers):
    """A function that opens the page, of these models, and waits until its first text has been read."""

    def open_page(*names, **options):
        browser.console.clear()
        browser.open(f"http://127.0.0.1:{servers[names].server_port}/", **options)
        browser.wait(f"document.readyState === 'complete' && {READY}")
        return browser

    yield open_page
    assert browser.console == []


def text_of(page, name):
    return page.run(f"document.getElementById('{name}').textContent")


def read(page, text):
    page.type("#text", text)
    page.click("#read")
    page.wait(READY)


def shading(page):
    """The color behind each token."""
    return page.run("[...document.querySelectorAll('#tokens span')].map(span => span.style.backgroundColor)")


def wait_for_head(page, layer, head):
    page.wait(f"document.getElementById('lambda-0').textContent.startsWith('layer {layer}, head {head}, ')")


def mouse_at(layer, head):
    """Where a head's small picture is in an overview that has room."""
    return 22 + 44 * (layer + 0.5), 22 + 44 * (head + 0.5)


# ------------------------------------------------------------------------------------- reading


def test_reading(page):
    page = page("v2")
    read(page, "fox\njumps")
    tokens = page.run("[...document.querySelectorAll('#tokens span')].map(span => span.textContent)")
    assert tokens == ["<|endoftext|>", *"fox", "⏎\n", *"jumps"]
    assert text_of(page, "status").startswith("10 tokens, of at most 96, in ")


def test_looking_at_a_token(page):
    """The mouse shades what a token looks at, and a click keeps it; so do the arrow keys."""
    page = page("v2")
    last = shading(page)
    page.move("#token-5")
    at_five = shading(page)
    assert at_five != last and not any(at_five[6:]) and all(at_five[:6])
    page.move("h1")
    assert shading(page) == last
    page.click("#token-5")
    page.move("h1")
    assert shading(page) == at_five and ", token 5" in text_of(page, "lambda-0")
    page.focus("#tokens")
    page.press("ArrowRight")
    assert ", token 6" in text_of(page, "lambda-0")
    page.press("Home")
    assert ", token 0" in text_of(page, "lambda-0")
    page.move("#map1-0", 20, 1 + page.run("document.getElementById('map1-0').clientHeight / 2"))
    assert ", token 0" not in text_of(page, "lambda-0")


def test_choosing_a_head(page):
    page = page("v2")
    page.click("#overview-0", *mouse_at(2, 1))
    wait_for_head(page, 2, 1)
    assert text_of(page, "hint-0").startswith("layer 2, head 1: removes ")
    before = shading(page)
    page.press("ArrowLeft")
    wait_for_head(page, 1, 1)
    page.press("ArrowUp")
    wait_for_head(page, 1, 0)
    assert shading(page) != before
    page.type("#layer", "0")
    page.press("Enter")
    wait_for_head(page, 0, 0)


def test_ordering_heads(page):
    """The head in which most is removed comes first."""
    page = page("v2")
    page.focus("#order")
    page.press("ArrowDown")
    page.wait("document.getElementById('hint-0').textContent === 'most first'")
    removed = []
    for x in (10, 50, 90):
        page.move("#overview-0", x, 10)
        removed.append(float(text_of(page, "hint-0").split("removes ")[1].split(",")[0]))
    assert removed == sorted(removed, reverse=True) and removed[0] > removed[-1]
    page.click("#overview-0", 10, 10)
    chosen = text_of(page, "hint-0").split(":")[0]
    page.wait(f"document.getElementById('lambda-0').textContent.startsWith('{chosen}, ')")


# ------------------------------------------------------------------------------------- colors

PIXELS = """
(() => {
  const {width, height} = document.getElementById("difference-0"), counts = [0, 0];
  const {data} = document.getElementById("difference-0").getContext("2d").getImageData(0, 0, width - 16, height);
  for (let i = 0; i < data.length; i += 4) {
    counts[0] += data[i] > data[i + 2] + 40;
    counts[1] += data[i + 2] > data[i] + 40;
  }
  return counts;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors(scheme, page):
    """Weights of both signs are seen, in the colors that the bar gives to their numbers."""
    page = page("v2", scheme=scheme)
    red, blue = page.run(PIXELS)
    assert red > 100 and blue > 100
    [background] = page.run("[getComputedStyle(document.body).backgroundColor]")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    numbers = page.run("[...document.querySelectorAll('#scale-difference span')].map(span => span.textContent)")
    assert [float(number.replace("−", "-")) for number in numbers] == [-1, -0.25, 0, 0.25, 1]
    bar = page.run("getComputedStyle(document.querySelector('#scale-difference i')).backgroundImage")
    negative, zero, positive = ([*map(int, color)] for color in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", bar))
    spans = page.run("[...document.querySelectorAll('#tokens span')].map(s => [s.title, s.style.backgroundColor])")
    for title, color in spans:
        weight = float(title.split(": ")[1])
        size, end = abs(weight) ** 0.5, positive if weight > 0 else negative  # 0.25 is half way from 0 to 1
        expected = [z + size * (e - z) for z, e in zip(zero, end)]
        assert [*map(int, re.findall(r"\d+", color))] == pytest.approx(expected, abs=2)


def test_subtracting_nothing(page):
    """It leaves map 1."""
    page = page("v2")
    page.focus("#subtract")
    page.press("Home")
    page.wait("document.getElementById('subtracted').textContent === '0%'")
    assert page.run(PIXELS)[1] == 0  # no weight is negative
    rows = page.run("[...document.getElementById('numbers-0').rows].slice(1).map(r => r.textContent.slice(-15))")
    assert all(row[:5] == row[10:] for row in rows)


def test_scheme_that_changes(page):
    page = page("v2")
    before = shading(page)
    page.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark")])
    page.wait(f"document.querySelector('#tokens span').style.backgroundColor !== '{before[0]}'")


# ------------------------------------------------------------------------------------- writing


def test_writing(page):
    page = page("v2")
    page.type("#text", "fox")
    page.type("#length", "9")
    page.click("#write")
    page.wait(f"document.getElementById('stop').disabled && {READY}")
    assert page.run("document.querySelectorAll('#tokens span').length") == 13
    assert page.run("document.querySelectorAll('#tokens span.written').length") == 9
    assert page.run("document.getElementById('text').value").startswith("fox")
    assert all(shading(page))  # the last token looks at all


def test_stopping(page, servers, monkeypatch):
    stopped, step = servers["v2",].viewer.stopped, viewer.Decoder.step
    monkeypatch.setattr(viewer.Decoder, "step", lambda decoder: (stopped.wait(0.1), step(decoder))[1])
    page = page("v2")
    page.type("#text", "fox")
    page.click("#write")
    page.wait("document.querySelectorAll('#tokens span.written').length > 1")
    assert page.run("document.getElementById('read').disabled")
    page.click("#stop")
    page.wait(f"document.getElementById('stop').disabled && {READY}")
    assert 1 < page.run("document.querySelectorAll('#tokens span.written').length") < 60


def test_chat(page):
    page = page("v2")
    page.focus("#mode")
    page.press("ArrowDown")
    page.type("#length", "4")
    for count, message in enumerate(("Hi", "Yes"), 1):
        page.type("#text", message)
        page.press("Enter")
        page.wait(f"document.getElementById('stop').disabled && {READY}")
        text = text_of(page, "tokens")
        assert text.count("<|im_start|>user⏎") == count and f"{message}<|im_end|>" in text
        assert page.run("document.getElementById('text').value") == ""
        assert page.run("document.querySelectorAll('#tokens span.written').length") == 4
    page.click("#forget")
    page.type("#text", "Oh")
    page.click("#write")
    page.wait(f"document.getElementById('stop').disabled && {READY}")
    assert text_of(page, "tokens").count("<|im_start|>user⏎") == 1


def test_comparing(page):
    """A head of one model is chosen in the other, too, as far as it has so many."""
    page = page("v1", "vanilla")
    assert ": DIFF V1, pretrain, step 7" in text_of(page, "about-0") and ": plain, " in text_of(page, "about-1")
    assert page.run("document.getElementById('mode-label').hidden")
    page.click("#overview-1", *mouse_at(2, 0))
    for pane in (0, 1):
        page.wait(f"document.getElementById('lambda-{pane}').textContent.startsWith('layer 2, head 0, ')")
    assert "λ = " in text_of(page, "lambda-0") and "λ" not in text_of(page, "lambda-1")
    assert page.run("document.querySelectorAll('canvas').length") == 6  # two overviews, three maps and one


# ------------------------------------------------------------------------------------- windows, and wrong input


@pytest.mark.parametrize("names", [("v2",), ("v1", "vanilla")], ids=["one", "two"])
def test_narrow_window(names, page):
    """Nothing is cut off."""
    page = page(*names, width=390, height=844)
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 390).map(e => e.id)"
    assert page.run(wide) == [] and page.run("document.documentElement.scrollWidth") <= 390


def test_too_long_text(page):
    page = page("v2")
    page.type("#text", "x" * 200)
    page.click("#read")
    page.wait("document.getElementById('error').textContent.includes('the text is too long: it has 201 tokens')")
    assert page.run("document.querySelectorAll('#tokens span').length") < 96  # what was read before
    [refused] = page.console  # the browser's own line about the status
    assert "status of 400" in refused
    page.console.clear()
    read(page, "short")
    assert text_of(page, "error") == "" and text_of(page, "tokens") == "<|endoftext|>short"


def test_impossible_number(page):
    """It is not sent."""
    page = page("v2")
    before = text_of(page, "tokens")
    page.type("#length", "0")
    page.click("#write")
    assert page.run("document.activeElement.id") == "length" and text_of(page, "tokens") == before


def test_tiny_window(page):
    """A window without room for anything does no harm."""
    page = page("v2")
    page.resize(20, 100)
    page.run("draw()")
    page.focus("#order")
    page.press("ArrowDown")
    page.resize(1280, 900)
    page.wait("document.getElementById('overview-0').clientWidth > 1000")
