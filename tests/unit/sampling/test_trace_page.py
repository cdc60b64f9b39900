"""The page of `sample --trace`, in a real browser that is driven by its own protocol."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llada_train.sampling.trace import Recorder

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Words:
    """A tokenizer of these words."""

    words = ("the", " sky\n", " is", "</script><img src=x onerror='document.title=1'>", " blue", "<mask>")
    mask_id = 5

    def decode(self, ids: list[int], keep_special: bool = False) -> str:
        return "".join(self.words[id] for id in ids)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    recorder = Recorder([0, 5, 5, 5, 5], Words())  # type: ignore[arg-type]
    recorder([(0, 4, 4, 0.95)])
    recorder([(0, 1, 1, 0.25), (0, 3, 3, 0.5)])
    recorder([(0, 2, 2, 1.0)])
    path = tmp_path / "trace.html"
    path.write_text(recorder.page())
    return path


class Browser:
    """One page of a headless Chromium, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._sent = socket, 0
        self.requests: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return message["result"]

    async def ask(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def key(self, name: str, text: str = "") -> None:
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=name)

    async def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@pytest.fixture
def browser_port(tmp_path: Path) -> Iterator[int]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    profile = tmp_path / "profile"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    log = (tmp_path / "chromium.log").open("wb")
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:  # it says where it listens
            if b"DevTools listening on" in line:
                break
        else:
            pytest.fail("Chromium did not start")
        yield int(line.split(b":")[2].split(b"/")[0])
    finally:
        process.kill()
        process.wait()
        log.close()


async def play(port: int, page: Path, pictures: Path) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (tab,) = [tab for tab in await answer.json() if tab["type"] == "page"]
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            browser = Browser(socket)
            await browser.call("Network.enable")
            await browser.call("Page.enable")
            await browser.call("Page.navigate", url=page.as_uri())
            while not await browser.ask(
                "document.readyState === 'complete' && document.getElementById('text') !== null"
            ):
                await asyncio.sleep(0.05)
            await look(browser, pictures)
            assert {url for url in browser.requests if not url.startswith("about:")} == {page.as_uri()}


async def look(browser: Browser, pictures: Path) -> None:
    def count(selector: str) -> str:
        return f"document.querySelectorAll('#text {selector}').length"

    words = "[...document.querySelectorAll('#text span')].map(span => span.textContent)"
    # It opens at the end; what the model wrote is text, whatever it looks like.
    assert await browser.ask(words) == ["the", " sky↵\n", " is", Words.words[3], " blue"]
    assert await browser.ask("document.title") == "How the text came about" and await browser.ask(count("img")) == 0
    assert (await browser.ask(count(".settled")), await browser.ask(count(".new"))) == (4, 1)
    assert await browser.ask("[...document.querySelectorAll('.settled')].map(s => s.dataset.step)") == [
        "2",
        "3",
        "2",
        "1",
    ]
    await browser.key("Home")
    assert (await browser.ask(count(".mask")), await browser.ask(count(".settled"))) == (4, 0)
    await browser.key("ArrowRight")
    await browser.key("ArrowRight")
    assert (await browser.ask(count(".mask")), await browser.ask(count(".new"))) == (1, 2)
    assert "step 2 of 3, 1 of 4 masked" in await browser.ask("document.getElementById('where').textContent")
    await browser.key("ArrowLeft")
    assert await browser.ask(count(".mask")) == 3
    await browser.ask("slider.value = 2; slider.dispatchEvent(new Event('input'))")
    assert await browser.ask(count(".mask")) == 1
    # The surer, the greener: confidence as colour.
    colour = "getComputedStyle(document.querySelectorAll('#text span')[{}]).backgroundColor"
    await browser.key("End")
    assert len({await browser.ask(colour.format(at)) for at in (1, 2, 3, 4)}) == 4
    await browser.key("n", "n")
    assert await browser.ask("text.classList.contains('numbers')") is False
    await browser.key("n", "n")
    pages = []
    for scheme in ("light", "dark"):
        await browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        pages.append(await browser.ask("getComputedStyle(document.body).backgroundColor"))
        await browser.screenshot(pictures / f"{scheme}.png")
    assert pages == ["rgb(251, 250, 247)", "rgb(22, 24, 28)"]
    await browser.key("Home")
    await browser.key(" ", " ")  # plays by itself, to the end
    while await browser.ask(count(".mask")):
        await asyncio.sleep(0.05)
    assert await browser.ask("play.textContent") == "Play"


def test_the_page_plays_how_tokens_settled(page: Path, browser_port: int, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("LLADA_TRAIN_PICTURES", tmp_path))
    asyncio.run(play(browser_port, page, pictures))
    assert all((pictures / f"{scheme}.png").read_bytes().startswith(b"\x89PNG") for scheme in ("light", "dark"))


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert not any(word in text for word in ("http:", "https:", "url(", "import ")) and text.count("</script>") == 2
