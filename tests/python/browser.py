"""A headless Chromium driven over its debugging protocol: what a page logs, requests and shows."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """One tab. `problems` collects errors of the console, `requests` every address that it asked for."""

    def __init__(self, address):
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.numbers = itertools.count(1)
        self.problems, self.requests = [], []
        for domain in "Page", "Runtime", "Log", "Network":
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.note(message)

    def note(self, event):
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"].get("exception", {}).get("description", str(parameters)))
        if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert", "warning"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        if method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, ready="document.documentElement?.dataset.ready === 'true'"):
        self.call("Page.navigate", url=path.as_uri())
        self.wait(ready)

    def wait(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition} did not come true; the page says {self.problems}"
            time.sleep(0.1)

    def key(self, key, code):
        for kind in "keyDown", "keyUp":
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def emulate(self, scheme="light", media="", width=1200, height=900):
        self.call("Emulation.setEmulatedMedia", media=media,
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path):
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.contextmanager
def open_browser(profile):
    """A page of a fresh Chromium whose profile lies in an empty folder."""
    found = [path for path in map(shutil.which, NAMES) if path]
    assert found, "the report's tests need Chromium: apt-get install chromium"
    process = subprocess.Popen([found[0], "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                                "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking",
                                "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 120
        while not file.exists() or "\n" not in file.read_text():
            assert process.poll() is None and time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.1)
        port, path = file.read_text().splitlines()[:2]
        browser = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60, suppress_origin=True)
        browser.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
        while (answer := json.loads(browser.recv())).get("id") != 1:
            pass
        yield Page(f"ws://127.0.0.1:{port}/devtools/page/{answer['result']['targetId']}")
    finally:
        process.terminate()
        process.wait(30)
