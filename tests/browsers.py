"""A headless Chromium, and a server of static files, for tests of pages."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files with some headers, and without a log."""

    def __init__(self, *args: Any, headers: Mapping[str, str], **kwargs: Any) -> None:
        self.headers_to_send = headers
        super().__init__(*args, **kwargs)

    def end_headers(self) -> None:
        for name, value in self.headers_to_send.items():
            self.send_header(name, value)
        super().end_headers()

    def copyfile(self, *args: Any) -> None:
        with suppress(ConnectionError):  # the page was left
            super().copyfile(*args)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serve a folder on a free port of this machine. Yields its address, which ends with a slash."""
    handler = functools.partial(QuietHandler, directory=str(folder), headers=headers or {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def open_chromium(*arguments: str, downloads: Path | None = None, **capabilities: Any) -> Any:
    """Start a headless Chromium. The test is skipped if there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason='needs Selenium: pip install -e ".[browser]"')
    chromium, chromedriver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *arguments):
        options.add_argument(argument)
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    for name, value in capabilities.items():
        options.set_capability(name, value)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))


def run_script(driver: Any, body: str, *values: Any) -> Any:
    """Run the body of an async function with `values` as `args`, and return what it returns."""
    script = f"""
        const done = arguments[arguments.length - 1];
        const args = Array.from(arguments).slice(0, -1);
        (async () => {{ {body} }})().then((value) => done({{value}}), (error) => done({{error: String(error.stack)}}));
    """
    answer = driver.execute_async_script(script, *values)
    assert "error" not in answer, answer["error"]
    return answer.get("value")
