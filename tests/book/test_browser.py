"""Every page of the published book as a browser shows it: wide and narrow, light and dark."""

import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import websocket
import yaml
from build_book import build_book

ROOT = Path(__file__).parents[2]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
FLAGS += ["--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
LOOKS = [(width, theme) for width in (1280, 390) for theme in ("light", "dark")]
ATTACKS = ["<script>window.attacked = 1</script>", '<img src="x.png" onerror="window.attacked = 1">']
LOOK = """(() => ({
    attacked: window.attacked ?? null,
    text: document.body.innerText,
    dark: document.documentElement.dataset.theme,
    too_wide: [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest("#pst-secondary-sidebar, #pst-primary-sidebar, .cell_output, .pst-scrollable-table-container")
        && !e.closest("pre, mjx-container, .output, div.math, .highlight, a.full-size"))
        .map(e => e.outerHTML.slice(0, 120)).slice(0, 3),
    page_width: document.documentElement.scrollWidth - innerWidth,
    images: [...document.images].map(i => [i.getAttribute("src"), i.alt, i.naturalWidth]),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
}))()"""


class Browser:
    """One tab, driven by the developer tools' protocol."""

    def __init__(self, program, folder):
        self.process = subprocess.Popen(
            [program, f"--user-data-dir={folder}", *FLAGS], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        address = next(found[1] for line in self.process.stderr if (found := re.search(r"ws://([\d.:]+)/", line)))
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        with urllib.request.urlopen(f"http://{address}/json/list") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        self.sent, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def show(self, url, width, theme):
        """What the page looks like after it has loaded, and what went wrong on the way."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))
        found = self.call("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        return found | {"faults": [fault for event in self.events if (fault := self.fault(event))]}

    @staticmethod
    def fault(event):
        parameters, method = event.get("params", {}), event.get("method")
        if method == "Runtime.exceptionThrown":
            return json.dumps(parameters["exceptionDetails"])[:600]
        if method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            return str(parameters["args"])
        if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            return f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"
        if method == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            return f"{parameters['response']['status']} {parameters['response']['url']}"
        return None

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path != "/favicon.ico":
            return super().do_GET()
        self.send_response(204)  # no page names it: a browser asks by itself, at whatever page is open then
        self.end_headers()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address of the published book, built from what is committed; chapter 01 shows hostile titles at its end, as notebooks show titles."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT / "book/executed", folder / "executed")
    chapter = nbformat.read(folder / "executed/01_data.ipynb", 4)
    table = pd.DataFrame({"title": ATTACKS})
    shown = [
        nbformat.v4.new_output("stream", name="stdout", text="\n".join(ATTACKS)),
        nbformat.v4.new_output("display_data", data={"text/html": table.to_html(), "text/plain": repr(table)}),
    ]
    chapter.cells.append(nbformat.v4.new_code_cell("titles", outputs=shown))
    nbformat.write(chapter, folder / "executed/01_data.ipynb")
    html = build_book(folder / "executed", folder / "html", ROOT).parent
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Silent, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here: install it to have the pages looked at")
    with contextlib.closing(Browser(program, tmp_path_factory.mktemp("profile"))) as opened:
        yield opened


@pytest.mark.slow
def test_every_page_looks_right(site, browser):
    faults, links, ids = [], {}, {}
    for page in PAGES:
        for width, theme in LOOKS:
            where, seen = f"{page} at {width}, {theme}", browser.show(f"{site}/{page}.html", width, theme)
            faults += [f"{where}: {fault}" for fault in seen["faults"]]
            faults += [f"{where}: wider than the window: {part}" for part in seen["too_wide"]]
            if seen["page_width"] > 1:
                faults.append(f"{where}: the page scrolls sideways by {seen['page_width']} px")
            if len(seen["text"]) < 300 or "Traceback" in seen["text"] or seen["dark"] != theme:
                faults.append(f"{where}: {seen['dark']}, {seen['text'][:200]!r}")
            faults += [
                f"{where}: image {src[:80]} has alt {alt!r}, width {n}" for src, alt, n in seen["images"] if not n
            ]
            faults += [f"{where}: image {src[:80]} has no alt" for src, alt, _ in seen["images"] if not alt]
        ids[f"{site}/{page}.html"] = set(seen["ids"])
        links |= {link: page for link in seen["links"] if link.startswith(site)}
    for link, page in links.items():
        target, _, anchor = link.partition("#")
        if target in ids and anchor and anchor not in ids[target]:
            faults.append(f"{page}: no place {anchor!r} in {target}")
        elif target not in ids:
            with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(target):
                continue
            faults.append(f"{page}: broken link {link}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_script_in_a_title_does_not_run(site, browser):
    assert (
        browser.show(f"data:text/html,{ATTACKS[0]}", 1280, "light")["attacked"] == 1
    )  # where nothing is escaped, it does
    seen = browser.show(f"{site}/book/executed/01_data.html", 1280, "light")
    assert seen["attacked"] is None
    assert all(seen["text"].count(attack) == 2 for attack in ATTACKS)
