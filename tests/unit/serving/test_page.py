"""The page: what it loads, the edits that it asks for, and a browser that uses it."""

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from muse_maskgit_pytorch import Muse, editing
from muse_maskgit_pytorch.serving.asked import Limits
from muse_maskgit_pytorch.serving.engine import Engine
from muse_maskgit_pytorch.serving.http import make_app
from muse_maskgit_pytorch.serving.painter import EnginePainter
from tests.unit.serving.test_http import FAST, muse, opened, png, serve  # noqa: F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PICTURE = Image.new("RGB", (32, 32), (90, 40, 200))


def edit(http: httpx.AsyncClient, **fields: Any) -> Any:
    given = {"prompt": "red apple", "seed": "3", **FAST, **fields}
    data = {name: str(value) for name, value in given.items()}
    return http.post("/v1/images/edits", data=data, files={"image": ("a.png", png(PICTURE))})


def test_the_page_needs_nothing_from_elsewhere(muse: Muse):  # noqa: F811
    async def talk(http: httpx.AsyncClient) -> None:
        page = await http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for name, kind in {"page.css": "text/css", "page.js": "text/javascript"}.items():
            assert f"page/{name}" in page.text
            file = await http.get(f"/page/{name}")
            assert file.headers["content-type"].startswith(kind)
            assert "http://" not in file.text
            assert "https://" not in file.text
        assert (await http.get("/page/nothing.js")).status_code == 404
        assert (await http.get("/page/..%2Fhttp.py")).status_code == 404
        [model] = (await http.get("/v1/models")).json()["data"]
        assert model["image_size"] == 32
        assert model["presets"] == ["default", "fast"]

    serve(muse, talk)


def test_outpainting_and_mask_free_edits_are_those_of_python(muse: Muse):  # noqa: F811
    async def talk(http: httpx.AsyncClient) -> None:
        wide = await edit(http, edit="outpaint", right=16)
        [expected] = editing.outpaint(muse, PICTURE, "red apple", right=16, seeds=3, **FAST)
        assert wide.json()["size"] == "48x32"
        assert opened(wide.json()["data"][0]["b64_json"]).tobytes() == expected.tobytes()
        changed = await edit(http, edit="free", at=[1, 3])
        stages = editing.free(muse, PICTURE, "red apple", at=[1, 3], seeds=3, **FAST)
        drawn = [opened(each["b64_json"]) for each in changed.json()["data"]]
        assert [p.tobytes() for p in drawn] == [p.tobytes() for [p] in stages]

    serve(muse, talk)


def test_others_are_drawn_during_a_mask_free_edit(muse: Muse):  # noqa: F811
    ended = []

    async def timed(name: str, asked: Any) -> Any:
        answer = await asked
        ended.append(name)
        return answer

    async def talk(http: httpx.AsyncClient) -> None:
        changed, drawn = await asyncio.gather(
            timed("edit", edit(http, edit="free", at=[40])),
            timed(
                "picture",
                http.post("/v1/images/generations", json=dict(prompt="red apple", seed=1, **FAST)),
            ),
        )
        [[expected]] = editing.free(muse, PICTURE, "red apple", at=[40], seeds=3, **FAST)
        assert opened(changed.json()["data"][0]["b64_json"]).tobytes() == expected.tobytes()
        [picture] = muse("red apple", seeds=1, **FAST)
        assert opened(drawn.json()["data"][0]["b64_json"]).tobytes() == picture.tobytes()

    serve(muse, talk)
    assert ended == ["picture", "edit"]


def test_a_mask_free_edit_that_takes_too_long(muse: Muse):  # noqa: F811
    async def talk(http: httpx.AsyncClient) -> None:
        answer = await edit(http, edit="free", at=[200])
        assert answer.status_code == 503
        assert "not drawn within" in answer.json()["error"]["message"]

    serve(muse, talk, limits=Limits(timeout=0.02))


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"edit": "paint"}, "edit", "edit must be inpaint, outpaint or free"),
        ({"edit": "free", "left": 3}, "left", "left is of another edit than free"),
        ({"edit": "free", "at": [900]}, "at", "rising iterations, at most 200"),
        ({"edit": "free", "at": [900.0]}, "at", "rising iterations, at most 200"),
        ({"edit": "free", "at": 7}, "at", "rising iterations, at most 200"),
        ({"edit": "free", "n": 2}, "n", "leave n out"),
        ({"edit": "outpaint"}, None, "nothing to add"),
        ({"edit": "outpaint", "left": -1}, "left", "left"),
        ({"edit": "outpaint", "left": 10**6}, None, "larger than 16 of 32 x 32 pixels"),
        ({"edit": "outpaint", "aspect": 1000}, None, "larger than 16 of 32 x 32 pixels"),
        ({"edit": "outpaint", "left": 8, "size": "64x32"}, "size", "follows from left"),
    ],
)
def test_edits_that_are_refused(muse: Muse, fields: dict, param: str, words: str):  # noqa: F811
    async def talk(http: httpx.AsyncClient) -> None:
        answer = await edit(http, **fields)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert words in error["message"]
        assert error["param"] == param

    serve(muse, talk, limits=Limits())


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(muse: Muse) -> Iterator[str]:  # noqa: F811
    uvicorn = pytest.importorskip("uvicorn")
    with Engine(muse, rows=4, queue=8) as engine:
        config = uvicorn.Config(make_app(EnginePainter(engine), "tiny"), port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
        server.should_exit = True
        thread.join()


LAPTOP = {"viewport": {"width": 1200, "height": 850}, "color_scheme": "light"}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def page(request: pytest.FixtureRequest, address: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**getattr(request, "param", LAPTOP))
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#preset option:nth-child(2)", state="attached")
        yield page
        assert not errors
        browser.close()


def shown(page: Any) -> np.ndarray:
    """The picture on the page."""
    data = page.evaluate("document.getElementById('picture').toDataURL()")
    return np.asarray(opened(data.partition(",")[2]).convert("RGB"))


def until(page: Any, condition: str) -> None:
    """Wait; the page's policy lets nobody evaluate texts, so Playwright's own way is refused."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{condition}; the page says {page.inner_text('#said')!r}")


def done(page: Any) -> None:
    until(page, "document.getElementById('said').textContent.startsWith('Done')")


def draw(page: Any, prompt: str = "red apple", seed: str = "5") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", seed)
    page.click("#go")
    done(page)


@pytest.mark.slow
def test_draw_repaint_and_download(page: Any, muse: Muse, tmp_path: Path):  # noqa: F811
    page.evaluate(
        """() => { window.seen = new Set(); const c = document.getElementById('picture');
        const draw = CanvasRenderingContext2D.prototype.drawImage;
        CanvasRenderingContext2D.prototype.drawImage = function (...a) {
          draw.apply(this, a); if (this.canvas === c) window.seen.add(c.toDataURL()); }; }"""
    )
    draw(page)
    [expected] = muse("red apple", seeds=5)
    assert np.array_equal(shown(page), np.asarray(expected))
    assert page.evaluate("window.seen.size") > 2  # previews on the way
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "a.png")
    assert muse.like(tmp_path / "a.png") == [expected]

    page.click("[data-tool=repaint]")
    page.click("#go")
    until(page, "document.getElementById('said').textContent.startsWith('Paint over')")
    box = page.locator("#mask").bounding_box()
    page.fill("#brush", "100")
    page.mouse.move(box["x"] + 30, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 30, box["y"] + box["height"] / 4, steps=5)
    page.mouse.up()
    before = shown(page)
    page.fill("#prompt", "green pear")
    page.keyboard.press("Control+Enter")
    done(page)
    after = shown(page)
    assert not np.array_equal(before[:8], after[:8])
    assert np.array_equal(before[-4:], after[-4:])  # what was not painted over stays
    assert page.locator("#history button").count() == 2

    page.locator("#history button").nth(1).click()
    until(page, "document.getElementById('prompt').value === 'red apple'")
    assert np.array_equal(shown(page), before)
    page.click("#again")
    done(page)
    until(page, "document.querySelectorAll('#history button').length === 3")
    assert np.array_equal(shown(page), before)


@pytest.mark.slow
def test_extend_change_and_vary(page: Any):
    draw(page)
    page.click("[data-tool=extend]")
    edge = page.locator("i[data-edge=right]").bounding_box()
    x, y = edge["x"] + edge["width"] / 2, edge["y"] + edge["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + page.locator("#picture").bounding_box()["width"] / 2, y, steps=4)
    page.mouse.up()
    assert page.input_value("[data-side=right]") == "16"
    before = shown(page)
    page.click("#go")
    until(page, "document.getElementById('picture').width === 48")
    assert np.array_equal(shown(page)[:, :24], before[:, :24])

    page.locator("#history button").nth(1).click()
    page.click("[data-tool=change]")
    page.fill("#prompt", "green pear")
    page.click("#go")
    until(page, "!document.getElementById('stage').disabled")
    last = shown(page)
    page.fill("#stage", "0")
    until(page, "document.querySelector('output[for=stage]').textContent === 'the picture'")
    page.wait_for_timeout(200)
    assert np.array_equal(shown(page), before)
    assert not np.array_equal(last, before)

    page.locator("#history button").nth(2).click()
    page.click("[data-tool=vary]")
    page.click("#go")
    until(page, "document.querySelectorAll('#history button').length === 4")


@pytest.mark.slow
def test_errors_the_keyboard_and_the_dark(page: Any):
    page.click("#go")
    assert "Write what the picture is to show" in page.inner_text("#said")
    page.fill("#prompt", "blue fish")  # the model knows two names
    page.click("#go")
    page.wait_for_selector("#said.error")
    assert "blue fish" in page.inner_text("#said")
    page.locator("body").click(position={"x": 600, "y": 10})
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("3")
    assert page.get_attribute("body", "data-tool") == "extend"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def swipe(page: Any, *places: tuple[float, float], second: float = 0) -> None:
    """A finger from the first place over the others, as the screen itself would say it.

    With ``second``, another one beside it, so many pixels lower.
    """
    screen = page.context.new_cdp_session(page)
    fingers = [0, second] if second else [0]
    for step, (x, y) in enumerate(places):
        points = [{"x": x, "y": y + by, "id": number} for number, by in enumerate(fingers)]
        kind = "touchMove" if step else "touchStart"
        screen.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(200)  # at rest: after a fling Chromium takes the next tap to stop it
    screen.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def painted(page: Any) -> np.ndarray:
    """Where the mask is."""
    mask = page.evaluate("document.getElementById('mask').toDataURL()")
    return np.asarray(opened(mask.partition(",")[2]))[..., 3] > 127


@pytest.mark.slow
@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_finger_paints_and_drags_and_scrolls(page: Any):
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#picture").bounding_box()
    middle, bottom = box["x"] + box["width"] / 2, box["y"] + box["height"] - 4
    swipe(page, *[(middle, bottom - 40 * step) for step in range(6)])
    until(page, "scrollY > 50")  # the picture is no trap while there is nothing to paint

    page.tap("[data-tool=repaint]")
    page.locator("#mask").scroll_into_view_if_needed()
    page.wait_for_timeout(300)  # the scrolling has ended
    scrolled = page.evaluate("scrollY")
    box = page.locator("#mask").bounding_box()
    left, y = box["x"] + 20, box["y"] + box["height"] / 4
    swipe(page, *[(left + 40 * step, y) for step in range(6)])
    assert page.evaluate("scrollY") == scrolled
    assert 0.05 < painted(page).mean() < 0.5
    page.fill("#prompt", "green pear")
    before = shown(page)
    page.tap("#go")
    until(page, "document.querySelectorAll('#history button').length === 2")
    assert not np.array_equal(shown(page), before)

    page.tap("[data-tool=extend]")
    page.locator("i[data-edge=right]").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    edge = page.locator("i[data-edge=right]").bounding_box()
    x, y = edge["x"] + edge["width"] + 6, edge["y"] + edge["height"] / 2  # beside the handle
    width = page.locator("#picture").bounding_box()["width"]
    swipe(page, *[(x + width / 2 * step / 4, y) for step in range(5)])
    assert page.input_value("[data-side=right]") == "16"

    page.locator("#history button").nth(1).click()
    page.tap("[data-tool=repaint]")
    page.tap("#clear")
    page.locator("#mask").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    box = page.locator("#mask").bounding_box()
    left, y = box["x"] + 20, box["y"] + box["height"] / 4
    swipe(page, *[(left + 40 * step, y) for step in range(6)], second=box["height"] / 2)
    above, below = np.split(painted(page), 2)
    assert above.any()
    assert not below.any()  # the second finger paints nothing
