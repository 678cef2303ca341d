"""The chat page in a real browser: Chromium, headless. Skipped where there is none."""

import contextlib
import json
import time

import pytest
from browser import CHROMIUM, Browser
from test_server import CONFIG, DEFAULTS, make_checkpoint, png, serving, wait_for

import sample
from nanovlm.data import image_processing

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="there is no chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
def checkpoint():
    return make_checkpoint()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"), 1280, 800)
    yield browser
    browser.close()


@pytest.fixture
def page(chromium):
    """The browser; at the end of a test the page must have had no error."""
    chromium.events.clear()
    chromium.resize(1280, 800)
    yield chromium
    chromium.run("1")
    bad = [event for event in chromium.events if event["method"] == "Runtime.exceptionThrown"]
    entries = [event for event in chromium.events if event["method"] == "Log.entryAdded"]
    bad += [entry for entry in entries if entry["params"]["entry"]["level"] == "error"]
    assert not bad


def open_page(page, chat_server):
    page.open(f"http://127.0.0.1:{chat_server.server_port}/")
    page.wait("document.getElementById('model').textContent")


def ask(page, text):
    page.click("#text")
    page.type(text, "Enter")


ANSWERS = "[...document.querySelectorAll('.answer')].map(node => node.textContent)"


def last_answer(page, count):
    """The text of answer number `count`, once it is complete."""
    done = "document.getElementById('send').textContent === 'Send'"
    return page.wait(f"{done} && {ANSWERS}.length === {count} && {ANSWERS}")[-1]


def test_drop_an_image_ask_click_a_word_and_ask_again(checkpoint, page, tmp_path):
    (tmp_path / "a.png").write_bytes(png(3))
    (tmp_path / "notes.txt").write_text("no image")
    images = [image_processing.load_image(png(3), CONFIG)]

    def expected(*turns):
        return "".join(sample.stream_answer(checkpoint, list(turns), images, **DEFAULTS))

    with serving(checkpoint) as chat_server:
        open_page(page, chat_server)
        page.drop("#chat", tmp_path / "a.png", tmp_path / "notes.txt")
        page.wait("document.querySelectorAll('#images img').length === 1")
        ask(page, "what is it?")
        first = ("user", "<image>\nwhat is it?")
        answer = last_answer(page, 1)
        assert answer == expected(first)
        page.click(".answer button")
        # the map is a canvas: some squares are dark, the most attended one has a frame
        frame = "document.getElementById('frame').contentDocument"
        page.wait(f"!!{frame}?.querySelector('canvas')")
        word = page.run("document.querySelector('.answer button').textContent")
        text = page.run(f"{frame}.querySelector('#answer').textContent")
        assert text.replace("\\x", "").strip() and (word in text or not word.isprintable())
        colors = (
            "(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height)"
            f".data.buffer)).size)({frame}.querySelector('canvas'))"
        )
        assert page.run(colors) > 10
        page.click("dialog button")
        page.wait("!document.getElementById('map').open")
        ask(page, "and now")
        assert last_answer(page, 2) == expected(
            first, ("assistant", answer.strip()), ("user", "and now")
        )


def test_a_pasted_image_can_be_removed_by_a_click(checkpoint, page):
    pasted = "new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})"
    content = f"Uint8Array.of({','.join(map(str, png(3)))})"
    file = f"new File([{content}], 'a.png', {{type: 'image/png'}})"
    with serving(checkpoint) as chat_server:
        open_page(page, chat_server)
        page.run(
            f"{{ const data = new DataTransfer(); data.items.add({file}); document.dispatchEvent({pasted}) }}"
        )
        page.wait("document.querySelectorAll('#images img').length === 1")
        page.wait("document.querySelector('#images img').naturalWidth === 17")
        page.click("#images img")
        page.wait("document.querySelectorAll('#images img').length === 0")


def slowly(checkpoint, turns, images, **options):
    for part in sample.stream_answer(checkpoint, turns, images, **options):
        time.sleep(0.02)
        yield part


def test_an_answer_is_shown_while_it_is_generated_and_can_be_stopped(page):
    with serving(make_checkpoint(end_weight=0), slowly, max_tokens=3000) as chat_server:
        open_page(page, chat_server)
        ask(page, "hm")
        page.wait(f"{ANSWERS}[0]?.length > 5")
        assert len(chat_server.queue) == 1
        page.click("#send")
        answer = last_answer(page, 1)
        assert page.run("document.querySelector('#chat').lastChild.textContent") == "stopped"
        wait_for(lambda: not chat_server.queue)
        ask(page, "hm")
        page.wait(f"{ANSWERS}[1]?.length > 5")
        page.click("#send")
        assert answer and last_answer(page, 2)


MARKUP = "<img src=x onerror=document.title='gone'><script>document.title='gone'</script>&amp;"


def echo(checkpoint, turns, images, logprobs, **options):
    for letter in turns[-1][1]:
        logprobs.append([(ord(letter), 0.0)])
        yield letter
    logprobs.append([(checkpoint.tokenizer.special["</s>"], 0.0)])
    yield ""


def test_markup_is_shown_as_text(checkpoint, page):
    """In a model's name, a question, an answer, an error and an attention map."""
    with serving(checkpoint, echo, name=MARKUP) as chat_server:
        open_page(page, chat_server)
        assert page.run("document.getElementById('model').textContent") == MARKUP
        ask(page, MARKUP)
        assert last_answer(page, 1) == MARKUP
        assert page.run("document.querySelector('.user').textContent") == MARKUP
        page.click(".answer button")
        page.wait(
            "!!document.getElementById('frame').contentDocument?.querySelector('#answer button')"
        )
        assert page.run("document.getElementById('frame').contentDocument.images.length") == 0
        page.click("dialog button")
        ask(page, f"<image> {MARKUP}")
        page.wait("document.querySelector('#chat').lastChild.textContent.includes('0 images')")
        assert page.run("document.images.length") == 0 and page.run("document.title") == "nanovlm"
    page.events.clear()  # the refused request is an entry of the log


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(width, checkpoint, page, tmp_path):
    (tmp_path / "a.png").write_bytes(png(3))
    page.resize(width, 700)
    with serving(checkpoint, echo, name="a-long-name/" * 20) as chat_server:
        open_page(page, chat_server)
        page.drop("#chat", tmp_path / "a.png")
        page.wait("document.querySelectorAll('#images img').length === 1")
        ask(page, "word " * 60 + "w" * 200)
        assert last_answer(page, 1)
        assert page.run("document.documentElement.scrollWidth") <= width
        send = page.run("(r => r.bottom)(document.getElementById('send').getBoundingClientRect())")
        assert send <= 700, "the button is always on the screen"


def test_the_page_asks_for_the_key(checkpoint, page):
    with serving(checkpoint, api_key="se-cret") as chat_server:
        page.call("Page.navigate", url=f"http://127.0.0.1:{chat_server.server_port}/")

        def answer_prompt():
            with contextlib.suppress(AssertionError):  # there is no prompt yet
                page.call("Page.handleJavaScriptDialog", accept=True, promptText="se-cret")
                return True

        wait_for(answer_prompt)
        page.wait("document.getElementById('model').textContent === 'tiny'")
        ask(page, "hm")
        assert last_answer(page, 1)
    page.run("sessionStorage.clear()")
    page.events.clear()


def test_a_page_of_another_site_cannot_ask(checkpoint, page):
    """Neither as a form could, nor with JSON, for which the browser asks the server first."""
    calls = []

    def count(*arguments, **options):
        calls.append(arguments)
        return echo(*arguments, **options)

    with serving(checkpoint, count) as chat_server:
        page.open("data:text/html,<p>another site")
        url = f"http://127.0.0.1:{chat_server.server_port}/v1/chat/completions"
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hm"}]}
        for kind, mode in (("text/plain", "no-cors"), ("application/json", "cors")):
            options = {"method": "POST", "mode": mode, "body": json.dumps(body)}
            options["headers"] = {"Content-Type": kind}
            code = f"fetch({json.dumps(url)}, {json.dumps(options)}).then(r => r.text(), () => '')"
            assert page.run(code) == ""
        assert not calls
        open_page(page, chat_server)
        ask(page, "hm")
        assert last_answer(page, 1) == "hm" and len(calls) == 1
    page.events.clear()
