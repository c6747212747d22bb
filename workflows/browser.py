"""ComfyUI's real frontend in a headless Chromium, driven as a user would; for tests and screenshots."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, FloatRect, Page, Route, sync_playwright

from .server import Graph, Server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
SIZE = {"width": 1600, "height": 1000}
PATIENCE = 120  # seconds for what a page does at once where nothing else keeps the machine busy
# What a user who knows ComfyUI has set or dismissed long ago; text is drawn at every zoom, for the screenshots.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.WorkflowTabsPosition": "Sidebar",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Notification.ShowVersionUpdates": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
BANNER = "for (const key of ['vueNodesBannerDismissed', 'comfy.vueNodesBannerDismissed']) localStorage[key] = 'true'"
# The frontend asks for files that a fresh user, a ComfyUI without its template package and one without the network do
# not have. All of it happens without this pack as well.
USUAL = (
    "/user.css",
    "/favicon.ico",
    "/api/userdata",
    "/templates/index.json",
    "Error loading core workflow templates",
    "Connecting to 'https://api.comfy.org/",
)
EVENTS = """() => {
    window.seen = []
    const note = (kind, detail) => window.seen.push([kind, detail])
    for (const kind of ['executing', 'executed', 'execution_success', 'execution_error', 'execution_interrupted'])
        window.app.api.addEventListener(kind, event => note(kind, event.detail?.node ?? event.detail ?? null))
    window.app.api.addEventListener('progress', event => note('progress', [event.detail.value, event.detail.max]))
    for (const kind of ['b_preview', 'b_preview_with_metadata'])
        window.app.api.addEventListener(kind, () => note('preview', null))
}"""
ENDS = ("execution_success", "execution_error", "execution_interrupted")


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Frontend:
    """An open ComfyUI page; `errors` are those of the console, `left` the requests that wanted to leave the machine."""

    page: Page
    server: Server
    errors: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    is_open: bool = False

    def watch(self) -> None:
        """Write down errors from now on, and let no request leave the machine."""
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.route("**/*", self._pass_on)

    def open(self) -> None:
        for key, value in SETTINGS.items():
            self.server.post(f"/settings/{key}", value)
        self.page.add_init_script(BANNER)
        self.page.goto(self.server.url, wait_until="domcontentloaded")
        self.page.wait_for_function("() => window.app?.graph && window.app.extensionManager")
        self.page.wait_for_selector("canvas#graph-canvas")
        self.page.wait_for_timeout(1000)
        self.page.evaluate(EVENTS)
        self.is_open = True

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow as dropping its file on the page does."""
        script = """text => {
            const data = new DataTransfer()
            data.items.add(new File([text], 'workflow.json', {type: 'application/json'}))
            return data
        }"""
        transfer = self.page.evaluate_handle(script, json.dumps(workflow))
        self.page.evaluate("() => window.app.graph.clear()")
        self.page.dispatch_event("canvas#graph-canvas", "drop", {"dataTransfer": transfer})
        self.page.wait_for_function("count => window.app.graph.nodes.length === count", arg=len(workflow["nodes"]))
        self.command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(700)

    def serialise(self) -> dict[str, Any]:
        """The graph on the canvas as saving would write it."""
        return json.loads(self.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))

    def export(self) -> Graph:
        """The graph on the canvas as the frontend would send it to the server."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))

    def command(self, name: str) -> None:
        """Run a command of the frontend, as its menu entry or shortcut does."""
        self.page.evaluate("name => window.app.extensionManager.command.execute(name)", name)

    def queue(self) -> None:
        """Press the run button."""
        self.page.evaluate("() => { window.seen.length = 0 }")
        self.page.get_by_test_id("queue-button").get_by_role("button").first.click()

    def wait(self, kind: str, seconds: float = PATIENCE) -> None:
        """Until an event of this kind has been seen since `queue`; raises playwright's TimeoutError."""
        script = "kind => window.seen.some(entry => entry[0] === kind)"
        self.page.wait_for_function(script, arg=kind, timeout=seconds * 1000)

    def finish(self, seconds: float = 1200) -> str:
        """Wait for the end of what was queued; the kind of its last event, `execution_success` where all is well."""
        script = "ends => window.seen.some(entry => ends.includes(entry[0]))"
        self.page.wait_for_function(script, arg=list(ENDS), timeout=seconds * 1000)
        self.page.wait_for_timeout(700)
        return next(kind for kind, _ in self.seen() if kind in ENDS)

    def seen(self) -> list[list]:
        """The server's events since `queue`, as (kind, detail)."""
        return self.page.evaluate("() => window.seen")

    def select(self, kind: str) -> None:
        """Select the first node of a type."""
        script = """kind => {
            const node = window.app.graph.nodes.find(node => node.type === kind)
            window.app.canvas.selectNode(node)
            window.app.canvas.centerOnNode(node)
        }"""
        self.page.evaluate(script, kind)

    def add(self, kind: str) -> None:
        """Put a node of a type on the canvas."""
        self.page.evaluate("kind => window.app.graph.add(window.LiteGraph.createNode(kind))", kind)

    def zoom(self, kind: str) -> None:
        """Show the first node of a type as large as the window allows."""
        self.select(kind)
        self.command("Comfy.Canvas.FitView")
        self.page.wait_for_timeout(1000)
        self.page.evaluate("() => window.app.canvas.deselectAll()")

    def open_help(self, kind: str) -> str:
        """Open the help page of a node through the button above it; the page's text."""
        self.select(kind)
        self.page.get_by_test_id("info-button").click()
        page = self.page.locator(".node-help-content")
        page.locator("h2").first.wait_for()
        return page.inner_text()

    def open_templates(self) -> None:
        self.command("Comfy.BrowseTemplates")
        self.page.get_by_test_id("template-workflows-content").wait_for()

    def shoot(self, path: Path, box: FloatRect | None = None) -> None:
        """Write a screenshot as JPEG, of the page or a part of it, once the results have been drawn."""
        self.page.wait_for_timeout(2000)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, type="jpeg", quality=80, clip=box)

    def _note(self, message: ConsoleMessage) -> None:
        text = f"{message.text} ({message.location.get('url', '')})"
        usual = any(part in text for part in USUAL)
        # Before it is ready, the frontend itself stumbles now and then.
        if message.type == "error" and not usual and (self.is_open or "/extensions/" in text):
            self.errors.append(text)

    def _pass_on(self, route: Route) -> None:
        if route.request.url.startswith((self.server.url, "data:", "blob:")):
            route.continue_()
        else:
            self.left.append(route.request.url)
            route.abort()


@contextlib.contextmanager
def browse(server: Server, executable: str) -> Iterator[Frontend]:
    """The frontend of a running server, ready for use."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=list(FLAGS))
        frontend = Frontend(browser.new_page(viewport=SIZE), server)
        frontend.page.set_default_timeout(PATIENCE * 1000)
        frontend.watch()
        frontend.open()
        try:
            yield frontend
        finally:
            browser.close()
