"""Chromium without a window, asked over a pipe what it sees of a page."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from benchmarks.network import PATIENCE

# Chromium reads from descriptor 3 and writes to 4.
_EXEC = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A browser with one page, whose errors are kept.

    Attributes
    ----------
    errors
        What was logged as an error, and exceptions that nothing caught.
    requests
        The addresses of all that was loaded.
    """

    def __init__(self, profile: Path) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # Not 3 or 4 themselves, of which one would be overwritten by the other.
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _EXEC, *map(str, given)),
                *("chromium", *options, "--remote-debugging-pipe"),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=given,
            env={**os.environ, "HOME": str(profile)},
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *given):
            os.close(end)
        self._stream = os.fdopen(self._answers, "rb")
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session: str | None = self._ask("Target.attachToTarget", targetId=page, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)
        os.close(self._commands)
        self._stream.close()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol to the page and return its answer."""
        return self._ask(method, session=self._session, **parameters)

    def open(self, file: Path, width: int = 1280) -> None:
        """Open a file and wait until its scripts have run; errors and requests are its own."""
        self.errors.clear()
        self.requests.clear()
        self.resize(width)
        self.ask("Page.navigate", url=file.as_uri())
        self.run("new Promise(r => document.readyState === 'complete' ? r() : onload = r)")

    def resize(self, width: int) -> None:
        """Give the window a width."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=1000,
            deviceScaleFactor=1,
            mobile=width < 640,
        )

    def run(self, expression: str) -> Any:
        """Return the value of JavaScript, or that of the promise that it is."""
        answer = self.ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key, such as ``ArrowLeft``."""
        code = {"ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self._stream.read(1)) != b"\0":
            assert byte, "the browser ended"
            found += byte
        return json.loads(found)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event["method"]:
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert", "warning"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"][:100])
