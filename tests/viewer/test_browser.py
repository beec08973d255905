"""viewer/page.html in Chromium, with the mouse and the keys. The models are tiny and random, the server is real.

No test may leave a message in the browser's console.
"""

import math
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


def text_of(page, selector):
    return page.run(f"document.querySelector('{selector}').textContent")


def read(page, text):
    page.type("#text", text)
    page.click("#read")
    page.wait(READY)


def shading(page):
    """The color behind each token."""
    return page.run("[...document.querySelectorAll('#tokens span')].map(span => span.style.backgroundColor)")


def wait_for_head(page, layer, head, pane=0):
    where = f"document.querySelector('#pane-{pane} .lambda').textContent"
    page.wait(f"{where}.startsWith('layer {layer}, head {head}, ')")


def mouse_at(layer, head):
    """Where a head's small picture is in the overview, as long as the heads are in order."""
    return 34 * (layer + 0.5), 34 * (head + 0.5)


# ------------------------------------------------------------------------------------- reading


def test_reading(page):
    page = page("v2")
    read(page, "fox\njumps")
    tokens = page.run("[...document.querySelectorAll('#tokens span')].map(span => span.textContent)")
    assert tokens == ["<|endoftext|>", *"fox", "⏎\n", *"jumps"]
    assert text_of(page, "#status").startswith("10 tokens, of at most 96, in ")


def test_looking_at_a_token(page):
    """The mouse shades what a token looks at, and a click keeps it; so do the arrow keys."""
    page = page("v2")
    last = shading(page)
    page.move("#tokens span:nth-child(6)")
    at_five = shading(page)
    assert at_five != last and not any(at_five[6:]) and all(at_five[:6])
    page.move("h1")
    assert shading(page) == last
    page.click("#tokens span:nth-child(6)")
    page.move("h1")
    assert shading(page) == at_five and ", token 5" in text_of(page, ".lambda")
    page.focus("#token")
    page.press("ArrowRight")
    assert ", token 6" in text_of(page, ".lambda")
    page.press("Home")
    assert ", token 0" in text_of(page, ".lambda")
    middle = page.run("document.querySelector('.map').clientHeight / 2")
    page.click(".map", 20, middle)
    length = page.run("document.querySelector('.map canvas').height")
    assert f", token {length // 2}: " in text_of(page, ".lambda")
    line = page.run("(({top, bottom}) => [top, bottom])(document.querySelector('.map i').getBoundingClientRect())")
    top = page.run("document.querySelector('.map').getBoundingClientRect().top")
    assert line[0] - 1 <= top + middle <= line[1] + 1
    page.move("h1")
    assert f", token {length // 2}: " in text_of(page, ".lambda")


def test_shading_of_each_map(page):
    """The copies of the text are shaded by the maps that they stand under, with the weights as titles."""
    page = page("v2")
    titles = "[...document.querySelectorAll('.shaded')].map(box => [...box.children].map(span => span.title))"
    tokens, *copies = [[float(title.split(": ")[1]) for title in box] for box in page.run(titles)]
    lam = float(text_of(page, ".lambda").split("λ = ")[1])
    assert len(copies) == 3 and tokens == copies[2]
    assert all(sum(copy) == pytest.approx(1, abs=0.01) for copy in copies[:2])
    assert copies[2] == pytest.approx([a - lam * b for a, b in zip(*copies[:2])], abs=1e-3)
    dotted = "[...document.querySelectorAll('#tokens span')].map(span => span.classList.contains('negative'))"
    assert page.run(dotted) == [weight < -0.005 for weight in tokens] and any(page.run(dotted))
    sizes = [abs(weight) for weight in tokens]
    numbers = text_of(page, "figure:nth-child(3) .numbers")
    share, norm, entropy = re.findall(r"(?:token|norm|entropy) (\d+\.\d+)", numbers)
    assert float(share) == pytest.approx(sizes[0] / sum(sizes), abs=2e-3)
    assert float(norm) == pytest.approx(sum(size**2 for size in sizes) ** 0.5, abs=2e-3)
    p = [size / sum(sizes) for size in sizes if size]
    assert float(entropy) == pytest.approx(-sum(x * math.log(x) for x in p), abs=0.01)
    assert f"(1/√{len(tokens)} = {len(tokens) ** -0.5:.3f})" in numbers


TITLE = "document.querySelector('.overview canvas').title"


def test_choosing_a_head(page):
    page = page("v2")
    page.click(".overview canvas", *mouse_at(2, 1))
    wait_for_head(page, 2, 1)
    page.move(".overview canvas", *mouse_at(1, 0))
    assert page.run(TITLE).startswith("layer 1, head 0: removes ")
    before = shading(page)
    page.focus(".pane select")
    page.press("ArrowUp")
    wait_for_head(page, 2, 0)
    assert shading(page) != before
    page.press("Home")
    wait_for_head(page, 0, 0)


# Keeps what the page asks for, until it is answered by hand.
HOLD = """
window.held = [];
const answer = fetch;
window.fetch = (...request) => new Promise(done => held.push(() => done(answer(...request))))"""


def test_maps_that_come_late(page):
    """Only those of the head that was chosen last are shown."""
    page = page("v2")
    page.run(f"{HOLD}, choose(panes[0].about, 1), choose(panes[0].about, 2), undefined")
    for _ in range(2):  # the last one first
        page.run("held.pop()()")
        wait_for_head(page, 0, 2)
        page.run("new Promise(done => setTimeout(done, 200))")
    wait_for_head(page, 0, 2)


def test_pointing_while_maps_load(page):
    """Nothing of the text before is shown."""
    page = page("v2")
    page.run(f"{HOLD}, undefined")
    page.type("#text", "fox")
    page.click("#read")
    page.run("held.pop()()")
    page.wait("held.length === 2")
    page.move(".overview canvas", *mouse_at(1, 0))
    assert page.run(TITLE) == ""
    page.wait("document.querySelectorAll('#tokens span').length === 4")
    page.move("#tokens span:nth-child(2)")
    assert not any(shading(page))
    page.run("held.forEach(answer => answer())")
    page.wait(READY)
    assert any(shading(page))


def test_small_map(page):
    """That of a text of 32 tokens is the large one; what a token cannot see is clear in both."""
    page = page("v2")
    read(page, "The fox jumps, and jumps again.")
    pixels = "[...document.querySelector('{}').getContext('2d').getImageData({}, {}, 30, 30).data]"
    small = page.run(pixels.format(".overview canvas", 2, 2))  # within the frame of the chosen one
    assert small == page.run(pixels.format("figure:nth-child(3) canvas", 1, 1))
    assert small[3] == 255 and small[4 * 29 + 3] == 0
    assert page.run("document.querySelector('.map canvas').style.imageRendering") == "pixelated"


def test_ordering_heads(page):
    """The head in which most is removed comes first, in the overview and in the list."""
    page = page("v2")
    page.focus("#order")
    page.press("ArrowDown")
    listed = page.run("[...document.querySelectorAll('.pane option')].map(option => option.textContent)")
    removed = [float(head.split("removes ")[1].split(",")[0]) for head in listed]
    assert removed == sorted(removed, reverse=True) and removed[0] > removed[-1] and len(removed) == 12
    for k, head in enumerate(listed):  # column by column
        page.move(".overview canvas", *mouse_at(*divmod(k, 4)))
        assert page.run(TITLE) == head
    page.click(".overview canvas", *mouse_at(1, 1))
    page.wait(f"document.querySelector('.lambda').textContent.startsWith('{listed[5].split(':')[0]}, ')")


# ------------------------------------------------------------------------------------- colors

PIXELS = """
(() => {
  const canvas = document.querySelector("figure:nth-child(3) canvas"), counts = [0, 0];
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
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
    assert red > 40 and blue > 40
    [background] = page.run("[getComputedStyle(document.body).backgroundColor]")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    numbers = page.run("[...document.querySelectorAll('#scale span')].map(span => span.textContent)")
    assert [float(number.replace("−", "-")) for number in numbers] == [-1, -0.25, 0, 0.25, 1]
    bar = page.run("getComputedStyle(document.querySelector('#scale i')).backgroundImage")
    negative, zero, positive = ([*map(int, color)] for color in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", bar))
    spans = page.run("[...document.querySelectorAll('#tokens span')].map(s => [s.title, s.style.backgroundColor])")
    for title, color in spans:
        weight = float(title.split(": ")[1])
        size, end = abs(weight) ** 0.5, positive if weight > 0 else negative  # 0.25 is half way from 0 to 1
        expected = [z + size * (e - z) for z, e in zip(zero, end)]
        assert [*map(int, re.findall(r"\d+", color))] == pytest.approx(expected, abs=2)


def test_scheme_that_changes(page):
    page = page("v2")
    images = "[...document.querySelectorAll('.pane canvas')].map(canvas => canvas.toDataURL())"
    before, images_before = shading(page), page.run(images)
    page.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark")])
    page.wait(f"document.querySelector('#tokens span').style.backgroundColor !== '{before[0]}'")
    assert len(images_before) == 4 and not set(images_before) & set(page.run(images))


# ------------------------------------------------------------------------------------- writing

# Keeps what a screen reader would read out.
SAID = """
window.said = [], new MutationObserver(() => said.push(document.getElementById("status").textContent))
  .observe(document.getElementById("status"), {childList: true, characterData: true, subtree: true})"""


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
    stopped, step = threading.Event(), viewer.Decoder.step
    monkeypatch.setattr(viewer.Decoder, "step", lambda decoder: (stopped.wait(0.1), step(decoder))[1])
    page = page("v2")
    page.run(f"{SAID}, undefined")
    page.type("#text", "fox")
    page.click("#write")
    page.wait("document.querySelectorAll('#tokens span.written').length > 1")
    assert page.run("document.getElementById('read').disabled && document.getElementById('text').readOnly")
    page.focus("#length")
    page.press("Enter")  # is not heard now
    page.run("draw(), choose(panes[0].about, 1)")  # nor is this
    page.click("#stop")
    page.wait(f"document.getElementById('stop').disabled && {READY}")
    assert 1 < page.run("document.querySelectorAll('#tokens span.written').length") < 60
    assert not page.run("document.getElementById('text').readOnly")
    said = page.run("said")
    assert len(said) == 2 and said[0] == "Writing…" and " tokens, of at most 96, in " in said[1]


def test_stop_is_for_the_text_of_this_window(page, servers):
    """While this one waits for its turn, it would end another's."""
    page, turn = page("v2"), servers["v2",].viewer.turn
    with turn:
        page.click("#write")
        page.wait("document.getElementById('read').disabled")
        assert page.run("document.getElementById('stop').disabled")
    page.wait(READY)


def test_nothing_to_stop(page, servers):
    """The button is off before anything is written, also while the first text waits for its turn."""
    page = page("v2")
    with servers["v2",].viewer.turn:
        page.open(page.run("location.href"))
        page.wait("document.getElementById('status')?.textContent === 'Loading…'")
        assert page.run("document.getElementById('stop').disabled")
    page.wait(READY)
    assert page.run("document.getElementById('stop').disabled")


def test_the_attention_of_a_fork_has_its_own_name(page, servers, monkeypatch):
    monkeypatch.setitem(servers["v2",].viewer.about[0], "attn", "half")
    assert ": half, " in text_of(page("v2"), "h2")


def test_a_place_in_the_text_before(page):
    """Under the mouse may still be a map with more rows."""
    page = page("v2")
    read(page, "fox")
    page.run("look(50)")
    assert ", token 3" in text_of(page, ".lambda")


@pytest.mark.parametrize("field, writes", [("#seed", True), ("#text", False)])
def test_enter_in_a_number_writes(page, field, writes):
    page = page("v2")
    page.focus(field)
    page.press("Enter")
    page.wait(READY)
    assert (page.run("document.querySelectorAll('#tokens span.written').length") > 0) == writes


def test_chat(page):
    page = page("v2")
    page.focus("#mode")
    page.press("ArrowDown")
    page.type("#length", "4")
    for count, message in enumerate(("Hi", "Yes"), 1):
        page.type("#text", message)
        page.press("Enter")
        page.wait(f"document.getElementById('stop').disabled && {READY}")
        text = text_of(page, "#tokens")
        assert text.count("<|im_start|>user⏎") == count and f"{message}<|im_end|>" in text
        assert text.count("<|im_start|>assistant⏎") == count
        assert page.run("document.getElementById('text').value") == ""
        assert page.run("document.querySelectorAll('#tokens span.written').length") == 4
    page.click("#forget")
    page.type("#text", "Oh")
    page.click("#write")
    page.wait(f"document.getElementById('stop').disabled && {READY}")
    assert text_of(page, "#tokens").count("<|im_start|>user⏎") == 1


def test_text_or_chat(page):
    """What was typed stays, and so does the chat."""
    page = page("v2")
    page.type("#text", "Oh")
    page.type("#length", "4")
    page.focus("#mode")
    page.press("ArrowDown")
    assert page.run("document.getElementById('text').value") == "Oh"
    page.click("#write")
    page.wait(READY)
    page.type("#text", "Ah")
    page.focus("#mode")
    page.press("ArrowUp")
    assert page.run("document.getElementById('text').value") == "Ah"
    page.press("ArrowDown")
    page.click("#write")
    page.wait(READY)
    assert text_of(page, "#tokens").count("<|im_start|>user⏎") == 2


def test_comparing(page):
    """A head of one model is chosen in the other, too, and their maps have the same size."""
    page = page("v1", "vanilla", width=1400)
    assert ": DIFF V1, pretrain, step 7" in text_of(page, "#pane-0 h2") and ": plain, " in text_of(page, "#pane-1 h2")
    assert page.run("document.getElementById('mode-label').hidden")
    page.click("#pane-1 .overview canvas", *mouse_at(2, 0))
    for pane in (0, 1):
        wait_for_head(page, 2, 0, pane)
    page.click("#pane-1 .overview canvas", *mouse_at(1, 3))
    wait_for_head(page, 1, 3, pane=1)
    wait_for_head(page, 1, 1, pane=0)  # it has no other
    assert "λ = " in text_of(page, "#pane-0 .lambda") and "λ" not in text_of(page, "#pane-1 .lambda")
    sizes = page.run("[...document.querySelectorAll('.map canvas')].map(canvas => canvas.clientWidth)")
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 1
    assert not any(shading(page))  # else nobody would know by which model
    assert page.run("document.querySelector('#tokens .negative')") is None
    copies = "document.querySelectorAll('figure .shaded span:first-child')"
    assert all(page.run(f"[...{copies}].map(span => span.style.backgroundColor)"))


# ------------------------------------------------------------------------------------- windows, and wrong input


@pytest.mark.parametrize("names", [("v2",), ("v1", "vanilla")], ids=["one", "two"])
def test_narrow_window(names, page):
    """Nothing is cut off."""
    page = page(*names, width=390, height=844)
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 390).map(e => e.id)"
    assert page.run(wide) == [] and page.run("document.documentElement.scrollWidth") <= 390
    assert page.run("document.querySelector('.map').clientWidth") > 300


def test_many_heads_in_a_narrow_window(page):
    """Those of a deep model are beside each other, so that the large maps stay near the text."""
    page = page("v2", width=390, height=844)
    page.run("Object.assign(panes[0].about, {layers: 30, heads: 9}), drawOverview(panes[0])")
    places = "['#tokens', '.map'].map(name => document.querySelector(name).getBoundingClientRect().top)"
    text, maps = page.run(places)
    assert maps - text < 844
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.run("document.querySelector('.overview').scrollWidth") > 600  # they are not too small for a finger


def test_too_long_text(page):
    """Of a huge text, the page sends the beginning, so that the answer is the same."""
    page = page("v2")
    page.type("#text", "x" * 120_000)
    page.click("#read")
    page.wait("document.getElementById('error').textContent.includes('the text is too long: it has 15001 tokens')")
    assert page.run("document.querySelectorAll('#tokens span').length") < 96  # what was read before
    [refused] = page.console  # the browser's own line about the status
    assert "status of 400" in refused
    page.console.clear()
    read(page, "short")
    assert text_of(page, "#error") == "" and text_of(page, "#tokens") == "<|endoftext|>short"


def test_impossible_number(page):
    """It is not sent."""
    page = page("v2")
    before = text_of(page, "#tokens")
    page.type("#length", "0")
    page.click("#write")
    assert page.run("document.activeElement.id") == "length" and text_of(page, "#tokens") == before


def test_tiny_window(page):
    """A window without room for anything does no harm."""
    page = page("v2")
    page.resize(20, 100)
    page.run("draw()")
    page.focus("#order")
    page.press("ArrowDown")
    page.resize(1280, 900)
    page.wait("document.getElementById('pane-0').clientWidth > 1000")
