"""A headless Chromium, driven over its DevTools protocol: https://chromedevtools.github.io/devtools-protocol/"""

import base64
import json
import os
import shutil
import socket
import tempfile

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Its sandbox does not start as root; the page that it opens is ours.
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-startup-window"]
FLAGS += ["--remote-debugging-pipe"]
CONSOLE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One window. `console` holds what the page has written there, or thrown."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        # It reads messages from file 3, and writes them to file 4. Each ends with a zero byte.
        files = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), number) for number in (3, 4)]
        files += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        arguments = [PROGRAM, *FLAGS, f"--user-data-dir={self.profile.name}"]
        self.pid = os.posix_spawn(PROGRAM, arguments, os.environ, file_actions=files)
        theirs.close()
        self.buffer, self.count, self.session, self.console = b"", 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = dict(sessionId=self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self.session = {}
        self.call("Browser.close")
        os.waitpid(self.pid, 0)
        self.socket.close()
        self.profile.cleanup()

    def call(self, method, **params):
        """Send a command -> its result."""
        self.count += 1
        message = dict(id=self.count, method=method, params=params, **self.session)
        self.socket.sendall(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                received = self.socket.recv(1 << 20)
                assert received, "the browser has ended"
                self.buffer += received
            line, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") in CONSOLE:
                self.console.append(json.dumps(answer["params"]))
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        """Evaluate a JavaScript expression in the page -> its value, or what its promise comes to."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition, seconds=15):
        """Wait until a JavaScript expression is true."""
        poll = f"() => ({condition}) ? done(true) : performance.now() < end ? setTimeout(poll, 5) : done(false)"
        constants = f"const end = performance.now() + {1000 * seconds}, poll = {poll};"
        found = self.run(f"new Promise(done => {{ {constants} poll(); }})")
        assert found, (condition, self.run("document.body.innerText"), self.console)

    def open(self, address, width=1280, height=900, scheme="light"):
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.resize(width, height)
        self.call("Page.navigate", url=address)

    def resize(self, width, height):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def move(self, selector, x=None, y=None):
        """Move the mouse to the middle of an element, or to a pixel of it -> where that is in the window."""
        script = f"(() => {{ const element = document.querySelector({json.dumps(selector)}); "
        script += "element.scrollIntoView({block: 'center'}); const box = element.getBoundingClientRect(); "
        script += "return [box.left, box.top, box.width, box.height]; })()"
        left, top, width, height = self.run(script)
        place = dict(x=left + (width / 2 if x is None else x), y=top + (height / 2 if y is None else y))
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def click(self, selector, x=None, y=None):
        place = self.move(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key):
        more = dict(text="\r") if key == "Enter" else {}
        code = dict(key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def focus(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def type(self, selector, text):
        """Put a text into a field, instead of what it holds."""
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """Write a picture of the window, as PNG."""
        picture = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(picture))
