"""The page in headless Chromium, on a laptop and a phone: from upload to answer, what is clicked, what is fetched."""

import json
import shutil
import time

import pytest


pytest.importorskip("gradio")
pytest.importorskip("selenium")
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if BROWSER is None or DRIVER is None:
    pytest.skip("chromium and chromedriver are not here", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from vamba.chat import load_chat  # noqa: E402
from vamba.serving.page import build_page, page_options  # noqa: E402
from vamba.serving.sessions import Limits  # noqa: E402


SIZES = {"laptop": (1366, 768), "phone": (390, 844)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(checkpoint, clip):
    page = build_page(load_chat(str(checkpoint)), reading={"fps": 4}, limits=Limits(new_tokens=16))
    yield page.launch(prevent_thread_lock=True, quiet=True, **page_options(page))[1]
    page.close()


class Screen:
    """A browser of one size at the page."""

    def __init__(self, address: str, size: str, downloads):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(address)

    def one(self, selector: str):
        """The element, once it is there."""
        return WebDriverWait(self.driver, 20).until(lambda d: d.find_elements("css selector", selector))[0]

    def says(self, selector: str, text: str) -> str:
        """What an element says, once `text` is in it."""
        return WebDriverWait(self.driver, 20, ignored_exceptions=[Exception]).until(
            lambda d: text in (said := d.find_element("css selector", selector).text) and said
        )

    def click(self, selector: str) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(selector))
        self.one(selector).click()

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        return self.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

    def fetched(self) -> list[str]:
        """The addresses of all that was asked for."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def answers(self) -> list[str]:
        said = [bubble.text for bubble in self.driver.find_elements("css selector", "#chat .message.bot")]
        return [text for text in said if text not in ("", "…")]

    def is_answering(self) -> bool:
        return any(button.is_displayed() for button in self.driver.find_elements("css selector", "#halt"))

    def second(self) -> float:
        return self.driver.execute_script("return document.querySelector('#player video').currentTime")


@pytest.fixture(params=SIZES)
def screen(request, address, tmp_path):
    screen = Screen(address, request.param, tmp_path)
    yield screen
    screen.driver.quit()


def test_from_upload_to_answer(screen, address, clip, tmp_path):
    screen.one("#player input[type=file]").send_keys(str(clip))
    screen.one("#player video")
    screen.click("#watch")
    assert "8 frames" in screen.says("#status", "In memory")
    assert screen.fits()
    for count in (1, 2):
        screen.one("#question textarea").send_keys("What happens in the video?\n")
        WebDriverWait(screen.driver, 20).until(
            lambda d, count=count: len(screen.answers()) == count and not screen.is_answering()
        )
    assert "No answer" not in screen.one("#chat").text and screen.fits()

    screen.says("#timeline", "Where it looked")
    for _ in range(2):  # also after someone has looked elsewhere
        screen.driver.execute_script("document.querySelector('#player video').currentTime = 0.1")
        button = screen.driver.find_elements("css selector", "#timeline button[data-seconds]")[-1]
        screen.driver.execute_script("arguments[0].click()", button)
        sought = float(button.get_attribute("data-seconds"))
        WebDriverWait(screen.driver, 5).until(lambda d, sought=sought: abs(screen.second() - sought) < 0.3)
    assert screen.fits()

    screen.click("#save")
    screen.says("#status", "Saved the memory as clip.safetensors")
    WebDriverWait(screen.driver, 10).until(lambda d: (tmp_path / "clip.safetensors").is_file())
    screen.one("input[data-testid^='Open a memory']").send_keys(str(tmp_path / "clip.safetensors"))
    screen.says("#status", "Opened clip.safetensors")

    elsewhere = [url for url in screen.fetched() if not url.startswith((address, "data:", "blob:", "chrome"))]
    assert not elsewhere
    assert not [entry for entry in screen.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_broken_video_is_one_sentence_on_the_page(screen, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    screen.one("#player input[type=file]").send_keys(str(tmp_path / "broken.mp4"))
    time.sleep(0.5)
    screen.click("#watch")
    said = screen.says("#status .error", "broken.mp4")
    assert "\n" not in said and len(said) < 300 and screen.fits()
