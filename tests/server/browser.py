"""A headless Chromium, driven by the DevTools protocol over its pipe.

https://chromedevtools.github.io/devtools-protocol/ has the commands.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """One page. Commands and answers are objects of JSON, each ended by a zero byte."""

    def __init__(self, profile, width, height):
        (low_read, self.commands), (self.answers, low_write) = os.pipe(), os.pipe()
        # above 4, so that neither is lost when files 3 and 4 are opened
        to_read, to_write = (fcntl.fcntl(low, fcntl.F_DUPFD, 10) for low in (low_read, low_write))
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # Chromium reads commands from file 3 and writes answers to file 4.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "-", CHROMIUM, *options],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (low_read, low_write, to_read, to_write):
            os.close(end)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.resize(width, height)

    def call(self, method, **parameters):
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.answers, 1 << 20)
                assert part, "the browser has ended"
                self.buffer += part
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def run(self, code):
        """The value of a JavaScript expression."""
        result = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, (code, result)
        return result["result"].get("value")

    def wait(self, code, seconds=20):
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):
                if value := self.run(code):
                    return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {code}; the page: {self.run('document.body.innerText')}")

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def middle(self, selector):
        """The middle of an element on the screen."""
        return self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return {x: r.x + r.width / 2, y: r.y + r.height / 2} })()"
        )

    def click(self, selector):
        point = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **point)

    def type(self, text, key=None):
        self.call("Input.insertText", text=text)
        if key:
            for kind in ("rawKeyDown", "keyUp"):
                code = {"windowsVirtualKeyCode": 13, "code": key}
                self.call("Input.dispatchKeyEvent", type=kind, key=key, **code)

    def drop(self, selector, *paths):
        """Drops files on an element, as from a file manager."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **self.middle(selector))

    def screenshot(self, path):
        image = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self):
        self.session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self.process.wait(10)
        os.close(self.commands)
        os.close(self.answers)
