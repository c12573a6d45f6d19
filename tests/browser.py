"""A real headless Chromium, driven over a pipe by its DevTools protocol; no driver and no port are needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 600  # seconds; a browser that takes longer to end hangs


class Page:
    """One page of a browser of its own. `events` is all that the browser said: console, network, problems.

    Use as a context; `call` sends a command of https://chromedevtools.github.io/devtools-protocol and gives its result.
    """

    def __init__(self, path, *, width=1000, height=800, dark=False):
        assert PROGRAM, "no Chromium on this machine: apt-get install chromium"
        self.events, self._next = [], 0
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        script = f'exec {PROGRAM} "$@" 3<&{to_browser} 4>&{from_browser}'
        words = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={self._folder.name}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", *words],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._reader = os.fdopen(self._in, "rb")
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility", "Audits"):
            self.call(f"{domain}.enable")
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **phone)
        self.set_dark(dark)
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def call(self, method, **params):
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        data = bytearray()
        while not data.endswith(b"\0"):
            byte = self._reader.read(1)
            assert byte, "the browser has gone"
            data += byte
        message = json.loads(data[:-1])
        if "method" in message:
            self.events.append(message)
        return message

    def set_dark(self, dark):
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def run(self, script):
        """The value of a JavaScript expression; DevTools may evaluate where the page itself may not."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key, code=None):
        text = {"Enter": "\r", " ": " "}.get(key)
        event = {"key": key, "code": code or key, "windowsVirtualKeyCode": KEYS[key]} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path, *, whole=True):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def requests(self):
        """Addresses that were fetched, the page's own and those in it as data left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def problems(self):
        """What the console shows: messages, exceptions, refusals of the content policy."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded")
        return [event["params"] for event in self.events if event["method"] in kinds]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self._session
        self.call("Browser.close")
        self._process.wait(WAIT)
        os.close(self._out)
        self._reader.close()
        self._folder.cleanup()


KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowDown": 40}
