"""demo.py: the page in a real browser, and what its server refuses."""

import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid

import numpy as np
import pytest
from PIL import Image, ImageOps

from retrieval.encoders import open_picture, open_run
from retrieval.page import BOX, KEPT, Page, as_the_model_sees, serve, small_copy, stamp_at
from retrieval.relevance import heat, word_maps
from tests.conftest import PATIENCE, ROOT
from tests.tiny_run import make_run, missing
from utils.errors import InputError
from utils.tool_options import export_args

pytestmark = [
    missing("faiss", "faiss-cpu", "requirements-demo.txt"),
    missing("gradio", "gradio", "requirements-demo.txt"),
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment says
SENTENCE = "a woman in a red coat with a black handbag"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def imgs(home):
    return home / "data" / "CUHK-PEDES" / "imgs"


@pytest.fixture(scope="module")
def encoders(home):
    return open_run(export_args([str(home / "run"), "--format", "onnx"]))


@contextlib.contextmanager
def served(home, gallery, *more, **environment):
    """demo.py as a user starts it, on a free port; gives the page's address."""
    words = ["--config_file", home / "run", "--gallery", gallery, "--device", "cpu", "--port", 0]
    words += ["--top_k", 5, "--max_upload", 1, "--max_pictures", 4, *more]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "demo.py", *(os.fsencode(str(word)) for word in words)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "no_proxy": "127.0.0.1,localhost", **environment},
        )
        watchdog = threading.Timer(PATIENCE, server.kill)
        watchdog.start()
        line = server.stdout.readline()
        watchdog.cancel()
        assert "the page is at http://127.0.0.1:" in line, (home / "log").read_text()
        yield line.split()[4].rstrip("/")
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0, (home / "log").read_text()  # Ctrl-C is how it ends


@pytest.fixture(scope="module")
def address(home, imgs):
    with served(home, imgs) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="python -m pip install selenium, which drives the browser"
    )
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("no Chromium with its driver is installed, e.g. apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1400,1300"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The page in the browser, afresh."""
    browser.get(address)
    until(lambda: browser.find_element("css selector", "#sentence textarea").is_displayed())
    return browser


def until(condition, seconds=PATIENCE):
    """The first truthy value of condition(); what is not there yet is asked for again."""
    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except Exception:  # the page is being redrawn
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.1)


def type_and_search(page, sentence):
    box = page.find_element("css selector", "#sentence textarea")
    if len(sentence) > 1000:  # not key by key
        page.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            box,
            sentence,
        )
    else:
        box.clear()
        box.send_keys(sentence)
    page.find_element("css selector", "#search").click()


def tiles(page):
    return page.find_elements("css selector", "#gallery button img")


def text_of(page, selector):
    return page.find_element("css selector", selector).text


def file_of(page):
    """The name of the picture that is looked at."""
    return page.find_element("css selector", "#file input, #file textarea").get_attribute("value")


@contextlib.contextmanager
def window(page, width, mobile=False):
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": mobile}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        yield
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def asked(page):
    """Addresses that the browser has asked for since this was last called, but for what is in itself."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith(("data:", "blob:", "chrome:", "about:"))}


def look(page):
    return page.find_element("css selector", "#look img").get_attribute("src")


def test_a_sentence_gives_pictures_and_a_word_its_heat_map(page, tmp_path):
    type_and_search(page, SENTENCE)
    until(lambda: len(tiles(page)) == 5)
    captions = [e.text for e in page.find_elements("css selector", "#gallery .caption-label")]
    scores = [float(caption.split("·")[1]) for caption in captions]
    assert scores == sorted(scores, reverse=True)
    first, name = until(lambda: look(page)), file_of(page)

    tiles(page)[2].click()
    second = until(lambda: look(page) != first and look(page))
    assert file_of(page) not in ("", name)
    labels = page.find_elements("css selector", "#words label")
    assert [label.text for label in labels] == SENTENCE.split()
    labels[4].click()
    until(lambda: look(page) != second)
    page.save_screenshot(str(tmp_path / "page.png"))
    with Image.open(tmp_path / "page.png") as shot:
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 1000  # it shows pictures


def test_nothing_is_asked_of_another_machine(page, address):
    type_and_search(page, SENTENCE)
    until(lambda: len(tiles(page)) == 5)
    urls = asked(page)
    assert urls and all(url.startswith(address) for url in urls)


def test_by_the_keyboard_alone_a_sentence_is_asked_in_a_narrow_window_of_several_columns(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    with window(page, 520):
        until(lambda: page.switch_to.active_element.tag_name == "textarea")  # the sentence has the focus
        ActionChains(page).send_keys("a man").send_keys(Keys.ENTER).perform()
        until(lambda: len(tiles(page)) == 5)
        assert page.find_element("css selector", "#sentence textarea").get_attribute("value") == "a man"
        assert len({tile.location["x"] for tile in tiles(page)}) >= 3


def test_what_came_of_a_search_or_an_upload_is_told_to_who_does_not_see_it(page, imgs, tmp_path):
    """A status message: WCAG 2.1, 4.1.3."""
    type_and_search(page, SENTENCE)
    until(lambda: "best of" in text_of(page, "#remark[role=status]"))
    choose_folder(page, imgs, tmp_path / "own", ["a.jpg"])
    until(lambda: "your 1 picture is searched" in text_of(page, "#state[role=status]"))


def test_an_example_fills_the_sentence(page):
    page.find_elements("css selector", ".gallery-item, button.gallery-item, .gallery button")[0].click()
    box = page.find_element("css selector", "#sentence textarea")
    until(lambda: box.get_attribute("value") == SENTENCE)


def test_an_empty_sentence_is_a_message_and_a_long_one_a_remark(page):
    type_and_search(page, " ")
    until(lambda: "the sentence is empty" in text_of(page, "body"))
    type_and_search(page, "a woman in a red coat " * 500)
    until(lambda: "cut off" in text_of(page, "#remark"))
    assert len(tiles(page)) == 5


def choose_folder(page, imgs, folder, names, broken=False):
    """Upload a new folder of pictures with these names."""
    folder.mkdir()
    for name, path in zip(names, sorted(imgs.rglob("*.jpg")), strict=False):
        shutil.copy(path, folder / name)
    if broken:
        (folder / "broken.jpg").write_bytes(b"not a picture")
    until(lambda: page.find_element("xpath", "//button[contains(., 'Search your own pictures')]")).click()
    until(lambda: page.find_element("css selector", "#folder input[type=file]")).send_keys(str(folder))


REMOVE = "#folder button[aria-label^='Remove' i]"


def take_one_out(page):
    """The first file of the folder that was uploaded."""
    page.find_element("css selector", REMOVE).click()


def test_a_folder_of_ones_own_is_searched_and_then_the_gallery_again(page, imgs, tmp_path):
    gallery, number = text_of(page, "#heading"), len(list(imgs.rglob("*.jpg")))
    assert f"{number} pictures in imgs" in gallery
    choose_folder(page, imgs, tmp_path / "own", ["own0.jpg", "own1.jpg", "own2.jpg"], broken=True)
    until(lambda: "your 3 pictures are searched, 1 file left out" in text_of(page, "#state"))
    assert "3 pictures of your own" in text_of(page, "#heading") and "imgs" not in text_of(page, "#heading")
    type_and_search(page, SENTENCE)
    until(lambda: len(tiles(page)) == 3)
    assert file_of(page) in ("own0.jpg", "own1.jpg", "own2.jpg")
    page.find_element("css selector", "#folder button[aria-label='Clear' i]").click()
    until(lambda: text_of(page, "#heading") == gallery and len(tiles(page)) == 5)
    assert text_of(page, "#state") == "the gallery is searched"
    assert f"best of {number} pictures" in text_of(page, "#remark")


def test_what_is_taken_out_of_an_upload_is_no_longer_searched(page, imgs, tmp_path):
    choose_folder(page, imgs, tmp_path / "own", [f"own{n}.jpg" for n in range(4)])
    until(lambda: "your 4 pictures are searched" in text_of(page, "#state"))
    type_and_search(page, SENTENCE)
    until(lambda: len(tiles(page)) == 4)
    take_one_out(page)
    until(lambda: "3 pictures of your own" in text_of(page, "#heading") and len(tiles(page)) == 3)
    assert "best of your 3 pictures" in text_of(page, "#remark")
    at_once = "for (const n of [1, 0]) document.querySelectorAll(arguments[0])[n].click()"
    page.execute_script(at_once, REMOVE)  # the second while the first is still at work
    until(lambda: text_of(page, "#state") == "your 1 picture is searched" and len(tiles(page)) == 1)
    assert "1 picture of your own" in text_of(page, "#heading")
    left = page.find_element("css selector", "#folder .file-preview").text.split()[0]
    assert file_of(page) == f"{left}.jpg"


def test_an_upload_that_is_refused_leaves_the_gallery_and_says_so(page, imgs, tmp_path):
    choose_folder(page, imgs, tmp_path / "own", [f"own{n}.jpg" for n in range(5)])
    until(lambda: "holds 5 files; at most 4" in text_of(page, "#state"))
    assert text_of(page, "#state").endswith("the gallery is searched")
    assert "pictures in imgs" in text_of(page, "#heading")
    take_one_out(page)
    until(lambda: "your 4 pictures are searched" in text_of(page, "#state"))


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_every_result_can_be_seen_at_any_width(page, width):
    with window(page, width, mobile=width < 1000):
        type_and_search(page, SENTENCE)
        until(lambda: len(tiles(page)) == 5)
        inside = """
            return [...document.querySelectorAll("#gallery button img")].map(tile => {
                let {left, right} = tile.getBoundingClientRect(), inside = right - left > 50;
                for (let e = tile; e = e.parentElement; )
                    if (e === document.body || getComputedStyle(e).overflowX !== "visible") {
                        const edge = e.getBoundingClientRect();
                        inside &&= left >= edge.left - 1 && right <= edge.right + 1;
                    }
                return inside && right <= window.innerWidth;
            })"""
        assert until(lambda: all(page.execute_script(inside))) and len(page.execute_script(inside)) == 5


ACTS = "<img src=x onerror=document.title=1>**b** _e_ `c` [l](d) $$x$$ {{1+1}} ${1+1} www.a.org &lt; # h"
UNSEEN = "\x1b[31m\u202e\n\t"  # of a terminal, of direction, of lines
ESCAPED = "\\x1b[31m\\u202e\\n\\t"


def test_a_name_or_a_sentence_is_shown_and_never_acts(browser, home, imgs, tmp_path):
    gallery = tmp_path / os.fsdecode(f"{ACTS}{UNSEEN}".encode() + b"\xff")
    gallery.mkdir()
    shutil.copy(next(imgs.rglob("*.jpg")), gallery / f"{ACTS}{UNSEEN}.jpg")
    example = f"</script><script>document.title=1</script>{ACTS}"
    with served(home, gallery, "--example", example) as address:
        browser.get(address)
        until(lambda: f"1 picture in {ACTS}{ESCAPED}\ufffd" in text_of(browser, "#heading"))
        until(lambda: example[:40] in text_of(browser, "body"))
        sentence = f"{ACTS} <script>document.title=1</script> {'red ' * 80}"
        type_and_search(browser, sentence)
        until(lambda: len(tiles(browser)) == 1)
        assert sentence[:40] in text_of(browser, "#remark")
        labels = [label.text for label in browser.find_elements("css selector", "#words label")]
        assert labels[:9] == sentence.replace("&lt;", "<").lower().split()[:9]
        assert file_of(browser) == f"{ACTS}{ESCAPED}.jpg"
        (gallery / f"{ACTS}{UNSEEN}.jpg").unlink()
        tiles(browser)[0].click()
        until(lambda: f"{ACTS}{ESCAPED}.jpg can no longer be read" in text_of(browser, "body"))
        type_and_search(browser, "a man")
        until(lambda: "none of the pictures is there as it was" in text_of(browser, "#remark"))
        choose_folder(browser, imgs, tmp_path / "own", ["<img src=x onerror=document.title=1>.jpg"])
        until(lambda: "your 1 picture is searched" in text_of(browser, "#state"))
        assert "<img src=x onerror=document.title=1>" in text_of(browser, "#folder")
        assert browser.title == "IRRA" and not browser.find_elements("css selector", "img[src=x]")
        for part in ("#heading", "#remark"):
            assert not browser.find_elements("css selector", f"{part} :is(strong, em, code, a, .katex)")


class StripsPrefix(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that serves the page of server.page below /irra, and tells it nothing."""

    def do_GET(self):
        if not self.path.startswith("/irra/"):
            return self.send_error(404)
        length = int(self.headers.get("Content-Length", 0))
        dropped = ("host", "connection", "accept-encoding")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        url = self.server.page + self.path.removeprefix("/irra")
        asked = urllib.request.Request(url, self.rfile.read(length) if length else None, headers)
        try:
            answer = DIRECT.open(asked, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            answer = error
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
        self.end_headers()
        with contextlib.suppress(ConnectionError, http.client.HTTPException):  # one side has gone away
            while data := answer.read1(1 << 16):
                self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *words):
        pass


def test_behind_a_proxy_that_strips_a_prefix_all_of_it_works(browser, home, imgs, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StripsPrefix) as proxy:
        outside = f"http://127.0.0.1:{proxy.server_port}/irra"
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        with served(home, imgs, GRADIO_ROOT_PATH=outside) as proxy.page:
            asked(browser)  # by earlier tests
            browser.get(f"{outside}/")
            until(lambda: browser.find_element("css selector", "#sentence textarea").is_displayed())
            choose_folder(browser, imgs, tmp_path / "own", ["own0.jpg", "own1.jpg"])
            until(lambda: "your 2 pictures are searched" in text_of(browser, "#state"))
            type_and_search(browser, SENTENCE)
            until(lambda: len(tiles(browser)) == 2)
            loaded = "return [...document.querySelectorAll('#gallery img')].every(i => i.naturalWidth > 0)"
            until(lambda: browser.execute_script(loaded) and look(browser).startswith(outside))
            urls, beside = asked(browser), ("/favicon.ico", "/manifest.json")  # the page can do without these
            assert urls and all(url.startswith(f"{outside}/") or url.endswith(beside) for url in urls)
            browser.get("about:blank")
        proxy.shutdown()


# ---- what the server refuses ----


def status_of(url, data=None, headers=None):
    try:
        with DIRECT.open(urllib.request.Request(url, data, headers or {}), timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_is_served_neither_of_the_gallery_nor_outside(address, home, imgs):
    picture = next(imgs.rglob("*.jpg"))
    for path in (picture, ROOT / "search.py", home / "run" / "best.pth", "/etc/passwd", "search.py"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/"):
            for form in (str(path), str(path).replace("/", "%2F"), f"../../../../{path}"):
                assert status_of(f"{address}/{route}{form}")[0] in (403, 404, 405), (route, form)


def call(address, function, data):
    """Ask the page's queue as its own script does; returns the events as text."""
    session = uuid.uuid4().hex
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    code, _ = status_of(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    if code != 200:
        return ""
    return status_of(f"{address}/gradio_api/queue/data?session_hash={session}")[1].decode()


def function_of(address, event, kind):
    config = json.loads(status_of(f"{address}/config")[1])
    types = {component["id"]: component["type"] for component in config["components"]}
    for dependency in config["dependencies"]:
        for target, name in dependency["targets"]:
            if name == event and types[target] == kind:
                return dependency["id"]
    raise AssertionError(f"the page has no {event} of a {kind}")


def test_a_forged_upload_cannot_name_a_file_of_the_server(address, imgs):
    upload = function_of(address, "upload", "file")
    for path in (next(imgs.rglob("*.jpg")), "/etc/passwd"):
        data = [[{"path": str(path), "meta": {"_type": "gradio.FileData"}}]]
        events = call(address, upload, data)
        assert "are searched" not in events and '"success": true' not in events.replace('":true', '": true')


def test_an_upload_beyond_the_limit_is_refused(address):
    for size, expected in ((2 << 20, 413), (1000, 200)):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        body += b"0" * size + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert status_of(f"{address}/gradio_api/upload", body, headers)[0] == expected


def test_it_listens_on_this_machine_only(address):
    port = int(address.rsplit(":", 1)[1])
    for family, kind, _, _, target in socket.getaddrinfo(socket.gethostname(), port, type=socket.SOCK_STREAM):
        if target[0].startswith("127.") or target[0] == "::1":
            continue
        with socket.socket(family, kind) as probe:
            probe.settimeout(3)
            assert probe.connect_ex(target) != 0, target


# ---- without a browser ----


def test_it_listens_on_the_ipv6_address_of_this_machine():
    import gradio

    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 address ::1")
    with gradio.Blocks() as blocks:
        gradio.Markdown("here")
    try:
        address = serve(blocks, "::1", 0, 1)
        assert address.startswith("http://[::1]:") and status_of(address)[0] == 200
    finally:
        blocks.close(verbose=False)


def test_a_folder_with_too_many_files_or_without_a_picture_is_refused(encoders, tmp_path):
    page = Page(encoders, None, 5, max_pictures=2)
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(InputError, match="none of these"):
        page.upload([str(tmp_path / "a.jpg")])
    with pytest.raises(InputError, match="at most 2"):
        page.upload([str(tmp_path / "a.jpg")] * 3)
    with pytest.raises(InputError, match="search first"):
        page.look(None, 0, 0)
    with pytest.raises(InputError, match="at most 20000"):
        page.search("x" * 20_001, None)


def test_an_upload_of_a_phones_format_is_told_what_to_do(encoders, imgs, tmp_path):
    from retrieval.page import Page
    from utils.errors import InputError

    page = Page(encoders, None, 5, max_pictures=9)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (tmp_path / "a.avif").write_bytes(b"damaged")  # of a format that is read
    files = [str(tmp_path / "IMG_1.HEIC"), str(tmp_path / "a.avif")]
    told = "; .heic are not read here: export them as JPEG first"
    with pytest.raises(InputError, match="none of these files is a picture that can be read" + told):
        page.upload(files)
    _, now = page.upload([*files, str(next(imgs.rglob("*.jpg")))])
    assert now == "your 1 picture is searched, 2 files left out" + told


@pytest.mark.parametrize(
    "host, why", [("127.0.0.1", "Address already in use"), ("nowhere.invalid", ""), ("192.0.2.1", "assign")]
)
def test_where_a_page_cannot_be_served_is_told_before_anything_is_encoded(host, why, address, home, imgs):
    port = address.rsplit(":", 1)[1]
    words = ["--config_file", home / "run", "--gallery", imgs, "--device", "cpu", "--host", host]
    done = subprocess.run(
        [sys.executable, "demo.py", *map(str, words), "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: cannot listen on {host}:{port} (")
    assert why in line and "give another --port or --host" in line


def test_a_proxy_or_what_other_gradio_programs_are_told_changes_nothing(home, imgs):
    proxy = "http://127.0.0.1:9"  # where nobody answers
    told = {"http_proxy": proxy, "ALL_PROXY": proxy, "no_proxy": "", "GRADIO_ALLOWED_PATHS": str(imgs)}
    with served(home, imgs, **told, GRADIO_SHARE="True", GRADIO_MCP_SERVER="True") as address:
        assert status_of(address)[0] == 200
        (picture, *_) = sorted(imgs.rglob("*.jpg"))
        assert status_of(f"{address}/gradio_api/file={picture}")[0] == 403


# ---- small copies ----


def photo(path, size=(2400, 1600), seed=0, **save):
    """A picture of smooth shapes, as large as a camera's."""
    noise = np.random.default_rng(seed).integers(0, 255, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    return str(path)


@pytest.mark.parametrize("turn", [1, 6, 8])
@pytest.mark.parametrize("size", [(2400, 1600), (1600, 2400), (6000, 300), (150, 300)])
def test_a_small_copy_is_the_large_picture_made_small(tmp_path, size, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = photo(tmp_path / "a.jpg", size, exif=exif, quality=95)
    full = ImageOps.contain(open_picture(path), BOX)
    small = small_copy(path, stamp_at(path))
    assert abs(small.width - full.width) <= 1 and abs(small.height - full.height) <= 1
    difference = np.abs(np.asarray(small.resize(full.size), float) - np.asarray(full, float))
    assert difference.mean() < 2
    decoded = open_picture(path, BOX)
    assert min(decoded.width / full.width, decoded.height / full.height) > 1.9 or min(size) < 400
    if size == (2400, 1600):
        assert decoded.width * decoded.height <= 2400 * 1600 / 4


def test_a_picture_of_one_line_does_not_end_a_search(encoders, tmp_path):
    paths = [photo(tmp_path / "line.jpg", (9000, 1)), photo(tmp_path / "a.jpg", (90, 240))]
    page = Page(encoders, None, 5, 10)
    result, tiles, _ = page.search("a red coat", page.upload(paths)[0])
    assert len(tiles) == 2
    assert page.look(result, result.names.index("line.jpg"), 0)[0].height == 48


def test_a_search_keeps_small_copies_until_their_files_change(encoders, tmp_path):
    paths = [photo(tmp_path / f"{n}.jpg", seed=n) for n in range(3)]
    page = Page(encoders, None, 5, 10)
    own, _ = page.upload(paths)
    result, before, _ = page.search("a woman", own)
    assert len(before) == 3
    for path in paths:  # the same size and time, but nothing that could be decoded
        state = os.stat(path)
        with open(path, "r+b") as file:
            file.write(bytes(state.st_size))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    _, after, _ = page.search("a woman", own)
    assert [caption for _, caption in after] == [caption for _, caption in before]
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(after, before, strict=True))
    photo(result.pictures[0], (300, 900), seed=9)
    assert small_copy(result.pictures[0], stamp_at(result.pictures[0])).size == (128, 384)
    _, left, remark = page.search("a woman", own)
    assert len(left) == 2 and "1 picture gone or changed since" in remark  # its features are another one's
    assert small_copy.cache_info().maxsize == KEPT and 3 * KEPT * BOX[0] * BOX[1] < 500e6


def test_the_model_sees_a_large_photo_as_it_was_indexed(encoders, tmp_path):
    path = photo(tmp_path / "a.jpg")
    stamp = stamp_at(path)
    page = Page(encoders, None, 5, 10)
    own, _ = page.upload([path])
    seen = as_the_model_sees(path, stamp, encoders.img_size)
    assert (np.asarray(seen).transpose(2, 0, 1) == encoders.pixels(path).numpy()).all()
    result, *_ = page.search("a red coat", own)
    drawn, name = page.look(result, 0, 1)
    ((_, expected),) = word_maps(encoders, "a red coat", open_picture(path), numbers=[1])
    assert name == "a.jpg"
    assert drawn.tobytes() == heat(small_copy(path, stamp), expected, 384).tobytes()


def test_what_is_left_of_an_upload_is_not_encoded_again(encoders, tmp_path):
    paths = [photo(tmp_path / f"{n}.jpg", (90, 240), seed=n) for n in range(4)]
    page = Page(encoders, None, 5, 10)
    three, _ = page.upload(paths[:3])
    os.truncate(paths[0], 0)
    os.unlink(paths[1])
    two, state = page.upload([paths[1], paths[2], paths[3]], three)
    assert state == "your 2 pictures are searched, 1 file left out"
    assert sorted(two.paths) == paths[2:] and len(three) == 3
    fresh, _ = page.upload(paths[2:])
    sentence = encoders.text_features(["a red coat"])
    assert [p for _, p in two.search(sentence, 5)[0]] == [p for _, p in fresh.search(sentence, 5)[0]]
