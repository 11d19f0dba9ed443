"""The page in a real browser, against the real service on four workers."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openpyxl
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from support.batch_service import BatchService, batch_service, sheet_of
from support.repo import REPO
from support.stub_endpoint import StubEndpoint, answer_to
from support.workbooks import picture, save_book

PICTURES = REPO / "test-output" / "page"
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HOSTILE = "<img src=x onerror=document.title='broken'>"
SECONDS = 20_000  # for one thing to be seen, in milliseconds


# After every change of the page: which of the buttons could be pressed, and whether something was said to be not ready.
NOTE_WHAT_IS_OPEN = """() => {
    window.noted = [];
    const known = new Set();
    const shown = (id) => document.getElementById(id).checkVisibility();
    const enabled = (id) => !document.getElementById(id).disabled && shown(id);
    const text = (id) => document.getElementById(id).textContent;
    const note = () => {
        const waits = [text("split-text"), text("run-text")].some((one) => one.includes("not ready yet"));
        const one = {download: enabled("download") || shown("download-link"), text: waits ? "not ready yet" : "ready"};
        if (!known.has(JSON.stringify(one))) { known.add(JSON.stringify(one)); noted.push(one); }
    };
    new MutationObserver(note).observe(document.querySelector(".steps"),
        {subtree: true, childList: true, characterData: true, attributes: true});
}"""


@pytest.fixture(scope="module")
def service(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    """Its saving can take a while, so that everything which happens while it is saved can be seen."""
    where = tmp_path_factory.mktemp("page")
    with batch_service(where, stub.url, saving_seconds=0) as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium on this machine: scripts/setup installs it"
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


class Watch:
    """What no page may do, gathered over all pages of a test."""

    def __init__(self, service: BatchService) -> None:
        self._host = urlsplit(service.url).netloc
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []

    def on_request(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.netloc != self._host:
            self.elsewhere.append(request.url)

    def on_console(self, message: ConsoleMessage) -> None:
        # The browser itself notes each answer that is an error; those that a test brings about are no complaint.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def on_error(self, error: object) -> None:
        self.complaints.append(str(error))


@contextmanager
def watched(browser: Browser, service: BatchService, **options: Any) -> Iterator[BrowserContext]:
    context = browser.new_context(base_url=service.url, **options)
    context.set_default_timeout(SECONDS)
    watch = Watch(service)

    def follow(page: Page) -> None:
        page.on("request", watch.on_request)
        page.on("console", watch.on_console)
        page.on("pageerror", watch.on_error)

    context.on("page", follow)
    yield context
    context.close()
    assert watch.elsewhere == []
    assert watch.complaints == []


@pytest.fixture
def context(browser: Browser, service: BatchService) -> Iterator[BrowserContext]:
    with watched(browser, service, viewport={"width": 900, "height": 1000}) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Page:
    page = context.new_page()
    page.goto("/")
    return page


expect.set_options(timeout=SECONDS)


def workbook(prompts: list[str], column: str = "prompt") -> bytes:
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.title = "Products"
    book.active.append(["id", column])
    for number, prompt in enumerate(prompts, 1):
        book.active.append([number, prompt])
    languages = book.create_sheet("Languages")
    languages.append(["word", "language"])
    languages.append(["house", "German"])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def pick(page: Page, content: bytes, name: str = "products.xlsx") -> None:
    page.get_by_label("Workbook to upload").set_input_files({"name": name, "mimeType": "", "buffer": content})
    expect(page.locator("#session-name")).to_have_text(name)


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def start(page: Page) -> None:
    button(page, "Start").click()


def open_choices(page: Page) -> None:
    page.get_by_text("Change the columns or the prompt").click()


def catch(page: Page, element_id: str, text: str) -> None:
    """For what passes by: looks at every frame, where `expect` looks once in a while."""
    page.wait_for_function(
        "([id, text]) => document.getElementById(id).textContent.includes(text)", arg=[element_id, text]
    )


def answers_in(path: Path) -> list[Any]:
    sheet = openpyxl.load_workbook(path)["Products"]
    names = [cell.value for cell in sheet[1]]
    return [row[names.index("answer")] for row in sheet.iter_rows(min_row=2, values_only=True)]


# ---- the whole way


def test_from_a_file_to_its_answers(page: Page, service: BatchService, stub: StubEndpoint, tmp_path: Path) -> None:
    stub.delay(0.2)
    page.screenshot(path=PICTURES / "1-start.png", full_page=True)
    prompts = [f"Describe product {number}" for number in range(300)]
    pick(page, workbook(prompts))
    expect(page.locator("#found")).to_contain_text("300 rows in sheet Products")
    expect(page.get_by_label("Use of column prompt")).to_have_value("prompt")
    expect(page.locator("#endpoint")).to_contain_text(f"{stub.url} · model stub")
    expect(page.locator("#why")).to_contain_text("B prompt · its name says so")
    expect(page.locator("#preview-rows tr")).to_have_count(5)
    expect(page.locator("#preview-rows")).to_contain_text("Describe product 4")
    expect(page.locator("#start-hint")).to_have_text(f"Start asks 300 rows of {stub.url}, model stub.")
    expect(button(page, "Download the answers")).to_be_disabled()
    assert stub.counts() == {}, "something was asked before anybody wanted it"
    page.screenshot(path=PICTURES / "2-analysed.png", full_page=True)

    page.evaluate(NOTE_WHAT_IS_OPEN)
    with service.saving(60):
        start(page)
        catch(page, "split-text", "not ready yet")
        page.screenshot(path=PICTURES / "3-saving.png", full_page=True)
    service.wait_split(page.url.rpartition("#")[2])
    with service.saving(60):
        catch(page, "numbers", "Time left")
        catch(page, "numbers", "Rows/s")
        assert re.fullmatch(r"\d+ % · products.xlsx", page.title())
        page.screenshot(path=PICTURES / "5-running.png", full_page=True)
        catch(page, "run-text", "not ready yet")

    link = page.get_by_role("link", name="Download the answers")
    with page.expect_download() as download:
        link.click()
    page.screenshot(path=PICTURES / "6-completed.png", full_page=True)
    noted = page.evaluate("window.noted")
    assert {"download": False, "text": "not ready yet"} in noted
    assert {"download": True, "text": "ready"} in noted
    assert {"download": True, "text": "not ready yet"} not in noted
    assert download.value.suggested_filename == "products-answers.xlsx"
    download.value.save_as(tmp_path / "answers.xlsx")
    assert answers_in(tmp_path / "answers.xlsx") == [answer_to(prompt) for prompt in prompts]


def test_by_the_keyboard_alone(page: Page) -> None:
    """Every control of the way is reached by Tab and pressed by Enter or Space."""

    def tab_to(element_id: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == element_id:
                return
        pytest.fail(f"Tab does not reach {element_id}")

    page.on("filechooser", lambda _: None)  # well before it opens: a chooser that nobody catches is lost
    tab_to("file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "keys.csv", "mimeType": "", "buffer": sheet_of(["one", "two"])})
    expect(page.locator("#session-name")).to_be_focused()
    expect(page.locator("#found")).to_contain_text("2 rows")
    tab_to("start")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Space")
    expect(page.locator("#download-link")).to_be_visible()
    tab_to("download-link")
    with page.expect_download():
        page.keyboard.press("Enter")


def test_a_file_dropped_on_the_page(page: Page) -> None:
    content = base64.b64encode(sheet_of(["a", "b", "c"])).decode()
    transfer = page.evaluate_handle(
        """content => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(content), (one) => one.charCodeAt(0))], "dropped.csv"));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class("dragging")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("#session-name")).to_have_text("dropped.csv")
    expect(page.locator("#found")).to_contain_text("3 rows")


def test_a_file_that_cannot_be_used(page: Page) -> None:
    page.get_by_label("Workbook to upload").set_input_files(
        {"name": "old.xls", "mimeType": "", "buffer": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(4096)}
    )
    expect(page.locator("#upload-error")).to_contain_text("old.xls: ")
    expect(page.get_by_label("Workbook to upload")).to_be_enabled()


# ---- what is asked


def test_another_sheet_another_column_and_a_template(page: Page, stub: StubEndpoint) -> None:
    pick(page, workbook(["x"]))
    open_choices(page)
    page.get_by_label("Sheet").select_option("Languages")
    expect(page.locator("#found")).to_contain_text("1 row in sheet Languages")
    page.get_by_label("Template").fill("Translate ")  # it is open where no column looks like a prompt
    page.get_by_role("button", name="{word}").click()
    page.keyboard.type(" into ")
    page.get_by_role("button", name="{language}").click()
    expect(page.locator("#preview-rows")).to_contain_text("Translate house into German")
    expect(page.locator("#why")).to_contain_text("your template")
    page.get_by_text("More: model, instructions, length").click()
    page.get_by_label("Model").fill("a model")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Most tokens per answer").fill("17")
    page.screenshot(path=PICTURES / "7-more.png", full_page=True)
    button(page, "Start").click()
    expect(page.locator("#download-link")).to_be_visible()
    body = stub.seen()["last_body"]
    assert stub.counts() == {"Translate house into German": 1}
    assert (body["model"], body["max_tokens"]) == ("a model", 17)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_one_column_is_the_prompt(page: Page, stub: StubEndpoint) -> None:
    pick(page, b"question,other\nfirst,second\n", "columns.csv")
    open_choices(page)
    page.get_by_label("Use of column other").select_option("prompt")
    expect(page.get_by_label("Use of column question")).to_have_value("")
    expect(page.locator("#preview-rows")).to_contain_text("second")
    start(page)
    expect(page.locator("#download-link")).to_be_visible()
    assert stub.counts() == {"second": 1}


def test_a_refused_choice_says_why_and_loses_nothing(page: Page) -> None:
    pick(page, b"question\nfirst\n", "refused.csv")
    open_choices(page)
    page.get_by_text("Write the prompt around the columns").click()
    page.get_by_label("Template").fill("Translate {nothing}")
    expect(page.locator("#preview-error")).to_contain_text("nothing")
    start(page)
    expect(page.locator("#run-error")).to_contain_text("nothing")
    expect(page.get_by_label("Template")).to_have_value("Translate {nothing}")
    page.get_by_label("Template").fill("Translate {question}")
    expect(page.locator("#preview-rows")).to_contain_text("Translate first")
    expect(page.locator("#preview-error")).to_be_empty()
    start(page)
    expect(page.locator("#download-link")).to_be_visible()
    expect(page.locator("#run-error")).to_be_empty()


# ---- before anything is spent


def test_the_first_rows_with_their_pictures(page: Page, tmp_path: Path) -> None:
    rows = [["prompt", "photo", "more"], ["What is it?", None, "https://8.8.8.8/a.png"], ["And this?"]]
    pictures = {"B2": picture("red", size=300), "B3": picture("blue", "JPEG", size=300)}
    pick(page, save_book(tmp_path / "p.xlsx", rows, pictures).read_bytes(), "pictures.xlsx")
    expect(page.locator("#preview-rows tr")).to_have_count(2)
    images = page.locator("#preview-rows img")
    expect(images).to_have_count(2)
    assert [images.nth(at).evaluate("image => image.naturalWidth") for at in (0, 1)] == [160, 160]
    expect(page.get_by_role("link", name="https://8.8.8.8/a.png")).to_be_visible()
    page.screenshot(path=PICTURES / "10-pictures.png", full_page=True)


def test_a_few_rows_are_tried_and_nothing_of_it_is_kept(page: Page, stub: StubEndpoint) -> None:
    stub.next(1, "number 2", status=400, message="I will not look at that")
    pick(page, sheet_of([f"number {number}" for number in range(40)]), "tried.csv")
    button(page, "Try the first 5 rows").click()
    rows = page.locator("#trial-rows tr")
    expect(rows).to_have_count(5)
    expect(rows.first).to_contain_text(answer_to("number 0"))
    expect(rows.nth(2)).to_contain_text("I will not look at that")
    expect(page.locator("#estimate")).to_contain_text("40 rows like these, answered by stub: about 80 tokens in")
    page.screenshot(path=PICTURES / "11-tried.png", full_page=True)
    assert sum(stub.counts().values()) == 5
    start(page)
    expect(page.locator("#run-text")).to_contain_text("40 answered, 0 failed")
    assert sum(stub.counts().values()) == 45


# ---- what goes wrong


def test_failed_rows_in_pages(page: Page, service: BatchService, stub: StubEndpoint) -> None:
    stub.next(None, "bad", status=400, message=HOSTILE)
    session_id = service.run(sheet_of([f"bad {number}" for number in range(60)] + ["good"]))
    page.goto(f"/#{session_id}")
    expect(page.locator("#failed-title")).to_have_text("60 rows failed")
    expect(page.locator("#reasons li")).to_have_count(1)
    expect(page.locator("#reasons .count")).to_have_text("60")
    expect(page.locator("#session-pill")).to_have_text("completed, 60 failed")
    page.screenshot(path=PICTURES / "8-failed.png", full_page=True)
    page.get_by_text("The failed rows, one by one").click()
    rows = page.locator("#failed-rows tr")
    expect(rows).to_have_count(50)
    expect(rows.first).to_contain_text(HOSTILE)
    button(page, "Next").click()
    expect(rows).to_have_count(10)
    expect(page.locator("#failures-where")).to_have_text("51 to 60 of 60")
    button(page, "Previous").click()
    expect(rows).to_have_count(50)
    assert page.locator("img").count() == 0


def test_failed_rows_are_asked_again(page: Page, stub: StubEndpoint, service: BatchService) -> None:
    stub.next(3, "bad", status=400, message="not today")
    stub.next(1, "worse", status=422, message="never")
    session_id = service.run(sheet_of(["bad 1", "bad 2", "bad 3", "worse", "good"]))
    page.goto(f"/#{session_id}")
    expect(page.locator("#reasons .count")).to_have_text(["3", "1"])
    button(page, "Ask the 4 failed rows again").click()
    expect(page.locator("#run-text")).to_contain_text("5 answered, 0 failed")
    expect(page.locator("#session-pill")).to_have_text("completed")
    expect(page.locator("#failed")).to_be_hidden()
    expect(page.locator("#retry")).to_be_hidden()
    assert stub.counts() == {"bad 1": 2, "bad 2": 2, "bad 3": 2, "worse": 2, "good": 1}
    assert [row["status"] for row in service.answers(session_id)] == ["done"] * 5


def test_answers_can_be_read_before_the_download(page: Page, service: BatchService) -> None:
    prompts = [f"row {number}" for number in range(45)]
    page.goto(f"/#{service.run(sheet_of(prompts))}")
    page.get_by_text("Look at the answers").click()
    rows = page.locator("#answer-rows tr")
    expect(rows).to_have_count(20)
    expect(rows.first).to_contain_text(answer_to("row 0"))
    page.screenshot(path=PICTURES / "12-answers.png", full_page=True)
    button(page, "Next answers").click()
    button(page, "Next answers").click()
    expect(rows).to_have_count(5)
    expect(rows.last).to_contain_text(answer_to("row 44"))
    expect(page.locator("#answers-where")).to_have_text("41 to 45 of 45")


def test_an_endpoint_that_is_away_looks_so(page: Page, stub: StubEndpoint) -> None:
    stub.delay(0.3)
    pick(page, sheet_of([f"row {number}" for number in range(200)]), "dead.csv")
    start(page)
    catch(page, "numbers", "Rows/")
    stub.kill()
    try:
        expect(page.locator("#waiting")).to_be_visible()
        expect(page.locator("#waiting")).to_contain_text(re.compile(r"It has been so since \d+:\d\d"))
        expect(page.locator("#waiting")).to_contain_text(stub.url)
        expect(page.locator("#session-pill")).to_have_attribute("data-tone", "bad")
        expect(page.locator("#endpoint-pill")).to_have_text("endpoint away")
        page.screenshot(path=PICTURES / "13-endpoint-away.png", full_page=True)
    finally:
        stub.start()
    expect(page.locator("#waiting")).to_be_hidden()
    expect(page.locator("#run-text")).to_contain_text("200 answered, 0 failed")


def test_an_unknown_session_shows_nothing_of_another(page: Page) -> None:
    pick(page, sheet_of(["a secret prompt"], "secretcolumn"), "secret.csv")
    expect(page.locator("#preview-rows")).to_contain_text("a secret prompt")
    page.get_by_text("More: model, instructions, length").click()
    page.get_by_label("System prompt").fill("a secret instruction")
    page.goto("/#0123456789abcdef")
    expect(page.locator("#session-error")).to_contain_text("Nothing is left of this session")
    expect(page.locator("#session")).not_to_contain_text("secret")
    assert "secret" not in page.locator("#session").evaluate(
        "session => [...session.querySelectorAll('input, textarea')].map((one) => one.value).join()"
    )
    expect(page.locator("#step-run")).to_be_hidden()
    page.screenshot(path=PICTURES / "16-unknown.png", full_page=True)


def test_a_session_that_has_failed_says_why(page: Page, service: BatchService) -> None:
    file = service.call("POST", "/v1/files", files={"file": ("bad.jsonl", b"{}")}, data={"purpose": "batch"})
    order = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file.json()["id"]}
    batch = service.post("/v1/batches", order)
    page.goto("/#" + batch["id"].removeprefix("batch_"))
    expect(page.locator("#failure")).to_contain_text("line 1: this line has no 'custom_id'")
    expect(page.locator("#found")).to_have_text("This file could not be used.")
    expect(page.locator("#sessions li").first).to_contain_text("failed")
    expect(button(page, "Start")).to_be_hidden()
    page.screenshot(path=PICTURES / "17-failed-session.png", full_page=True)


def test_hostile_names_are_only_text(page: Page) -> None:
    pick(page, f"question,{HOSTILE}\n{HOSTILE},{HOSTILE}\n".encode(), f"{HOSTILE}.csv")
    open_choices(page)
    expect(page.get_by_label(f"Use of column {HOSTILE}")).to_be_visible()
    expect(page.locator("#columns")).to_contain_text(HOSTILE)
    expect(page.locator("#preview-rows")).to_contain_text(HOSTILE)
    expect(page.locator("#sessions")).to_contain_text(HOSTILE)
    start(page)
    expect(page.locator("#download-link")).to_be_visible()
    page.get_by_text("Look at the answers").click()
    expect(page.locator("#answer-rows")).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    assert "broken" not in page.title().split("=")[0]


# ---- the same for everybody who looks


def test_a_reload_and_a_second_tab_show_the_same_run(context: BrowserContext, page: Page, stub: StubEndpoint) -> None:
    stub.delay(0.5)
    pick(page, sheet_of([f"row {number}" for number in range(1000)]), "tabs.csv")
    start(page)
    catch(page, "numbers", "Rows/")
    button(page, "Pause").click()
    expect(page.locator("#run-text")).to_contain_text("paused")
    page.screenshot(path=PICTURES / "14-paused.png", full_page=True)
    page.reload()
    expect(page.locator("#numbers")).to_contain_text("of 1,000")
    expect(page.locator("#run-text")).to_contain_text("paused")
    second = context.new_page()
    second.goto(page.url)
    expect(second.locator("#session-name")).to_have_text("tabs.csv")

    button(second, "Resume").click()
    expect(button(page, "Pause")).to_be_visible()
    button(second, "Cancel").click()
    button(second, "Cancel the run").click()
    for tab in (page, second):
        expect(tab.locator("#run-text")).to_contain_text("cancelled: ")
        expect(tab.locator("#download-link")).to_be_visible()
        expect(tab.locator("#retry")).to_have_text(re.compile(r"Ask the \d+ unasked rows"))
    page.screenshot(path=PICTURES / "15-cancelled.png", full_page=True)


def test_a_session_that_is_deleted_elsewhere(page: Page, service: BatchService) -> None:
    pick(page, sheet_of(["a"]), "gone.csv")
    service.call("DELETE", "/api/sessions/" + page.url.rpartition("#")[2])
    expect(page.locator("#session-error")).to_contain_text("Nothing is left of this session")
    expect(page.locator("#session-name")).to_have_text("gone.csv")
    page.get_by_role("link", name="New workbook").click()
    expect(page.get_by_label("Workbook to upload")).to_be_visible()


def test_delete_asks_first(page: Page, service: BatchService) -> None:
    pick(page, sheet_of(["a"]), "delete-me.csv")
    session_id = page.url.rpartition("#")[2]
    page.get_by_role("button", name="Delete delete-me.csv").click()
    button(page, "No, keep it").click()
    assert service.get(f"/api/sessions/{session_id}")["name"] == "delete-me.csv"
    button(page, "Delete").first.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_label("Workbook to upload")).to_be_visible()
    expect(page.get_by_role("link", name="delete-me.csv")).to_have_count(0)
    assert service.call("GET", f"/api/sessions/{session_id}").status_code == 404


def test_a_service_that_is_away_for_a_while(context: BrowserContext, page: Page, stub: StubEndpoint) -> None:
    stub.delay(0.5)
    pick(page, sheet_of([f"row {number}" for number in range(1000)]), "away.csv")
    start(page)
    catch(page, "numbers", "Rows/")
    context.set_offline(True)
    button(page, "Pause").click()
    expect(page.locator("#run-error")).to_contain_text("does not answer")
    expect(page.locator("#numbers")).to_contain_text("of 1,000")
    context.set_offline(False)
    button(page, "Pause").click()
    expect(page.locator("#run-text")).to_contain_text("paused")
    expect(page.locator("#run-error")).to_be_empty()
    button(page, "Cancel").click()
    button(page, "Cancel the run").click()
    expect(page.locator("#download-link")).to_be_visible()
    expect(page.locator("#trouble")).to_be_hidden()


def test_without_a_stream_it_asks_again_and_again(page: Page, stub: StubEndpoint) -> None:
    stub.delay(0.4)
    page.route("**/api/execute/stream/**", lambda route: route.abort())
    pick(page, sheet_of([f"row {number}" for number in range(200)]), "polled.csv")
    start(page)
    catch(page, "numbers", "Rows/")
    expect(page.locator("#download-link")).to_be_visible()
    expect(page.locator("#numbers")).to_contain_text("200 of 200")


def test_it_tells_that_the_service_is_away(context: BrowserContext, page: Page) -> None:
    pick(page, sheet_of(["a"]), "unreachable.csv")
    context.set_offline(True)
    expect(page.locator("#trouble")).to_contain_text("cannot be reached")
    expect(page.locator("#found")).to_contain_text("1 row")
    page.screenshot(path=PICTURES / "9-away.png", full_page=True)
    page.set_viewport_size({"width": 900, "height": 400})
    assert covered_buttons(page) == []
    context.set_offline(False)
    expect(page.locator("#trouble")).to_be_hidden()


def covered_buttons(page: Page) -> list[str]:
    """Those that something lies over, wherever on the page one has scrolled to."""
    found: list[str] = page.evaluate(
        """() => {
            const covered = new Set();
            const visible = (one) => one.checkVisibility() && !one.closest("dialog");
            for (let y = 0; y < document.documentElement.scrollHeight; y += 50) {
                scrollTo(0, y);
                for (const one of [...document.querySelectorAll("button, a, summary")].filter(visible)) {
                    const { left, top, width, height } = one.getBoundingClientRect();
                    const [x, middle] = [left + width / 2, top + height / 2];
                    if (middle < 0 || middle >= innerHeight) continue;
                    const there = document.elementFromPoint(x, middle);
                    if (there.closest("#trouble")) covered.add(one.textContent);
                }
            }
            return [...covered];
        }"""
    )
    return found


# ---- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_small_screen(browser: Browser, service: BatchService, stub: StubEndpoint, scheme: Any) -> None:
    stub.next(None, "bad", status=400, message="no " + "x" * 200)
    long_name = "a-name-that-is-" + "very-" * 20 + "long.csv"
    session_id = str(service.upload(sheet_of(["bad", "good"], "c" * 80), long_name)["session_id"])
    size: Any = {"width": 360, "height": 740}
    with watched(browser, service, viewport=size, color_scheme=scheme, reduced_motion="reduce") as context:
        page = context.new_page()
        shown = ["/", f"/#{session_id}", "/docs"]
        for number, path in enumerate(shown):
            page.goto(path)
            expect(page.locator("h1")).to_be_visible()
            if "#" in path:
                expect(page.locator("#found")).to_contain_text("2 rows")
            page.screenshot(path=PICTURES / f"small-{scheme}-{number}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        page.goto(shown[1])
        button(page, "Try the first 2 rows").click()
        expect(page.locator("#trial-rows tr")).to_have_count(2)
        assert contrasts(page) == []
        start(page)
        expect(page.locator("#download-link")).to_be_visible()
        page.get_by_text("The failed rows, one by one").click()
        expect(page.locator("#failed-rows tr")).to_have_count(1)
        page.get_by_text("Look at the answers").click()
        expect(page.locator("#answer-rows tr")).to_have_count(2)
        page.screenshot(path=PICTURES / f"small-{scheme}-3.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert (brightness(page, "backgroundColor") < 100) == (scheme == "dark")
        assert contrasts(page) == []


def brightness(page: Page, what: str) -> float:
    red, green, blue = re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{what}"))[:3]
    return (int(red) + int(green) + int(blue)) / 3


def contrasts(page: Page) -> list[str]:
    """Texts whose contrast with what is behind them is below what WCAG's level AA wants; disabled controls aside."""
    found: list[str] = page.evaluate(
        """() => {
            const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
            const light = (colour) => parts(colour).slice(0, 3)
                .map((one) => one / 255)
                .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
                .reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
            const ground = (element) => {
                for (let one = element; one; one = one.parentElement) {
                    const colour = getComputedStyle(one).backgroundColor;
                    if ((parts(colour)[3] ?? 1) > 0) return colour;
                }
                return "rgb(255, 255, 255)";
            };
            const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            const poor = [];
            while (texts.nextNode()) {
                const element = texts.currentNode.parentElement;
                const shown = element.checkVisibility() && !element.closest("script, :disabled");
                if (!shown || !texts.currentNode.data.trim()) continue;
                const [one, other] = [light(getComputedStyle(element).color), light(ground(element))];
                const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
                if (ratio < 4.5) poor.push(`${ratio.toFixed(1)}: ${texts.currentNode.data.trim().slice(0, 40)}`);
            }
            return poor;
        }"""
    )
    return found


def test_every_control_has_a_name(page: Page) -> None:
    pick(page, workbook(["x"]))
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, a, progress")]
            .filter((one) => one.checkVisibility() && !(one.labels?.length || one.textContent.trim() || one.ariaLabel))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []


# ---- with a key


def test_the_key_is_asked_for_and_sent_with_everything(browser: Browser, stub: StubEndpoint, tmp_path: Path) -> None:
    with (
        batch_service(tmp_path, stub.url, workers=1, environ={"SESSION_API_KEY": "secret"}) as locked,
        watched(browser, locked) as context,
    ):
        page = context.new_page()
        page.goto("/")
        page.get_by_role("textbox", name="Key").fill("wrong")
        button(page, "Continue").click()
        expect(page.locator("#key-error")).to_contain_text("did not accept")
        page.screenshot(path=PICTURES / "key.png")
        page.get_by_role("textbox", name="Key").fill("secret")
        button(page, "Continue").click()
        expect(page.get_by_role("dialog")).to_be_hidden()
        pick(page, workbook(["only one"]))
        start(page)
        expect(button(page, "Download the answers")).to_be_enabled()
        with page.expect_download() as download:
            button(page, "Download the answers").click()
        download.value.save_as(tmp_path / "answers.xlsx")
        assert answers_in(tmp_path / "answers.xlsx") == [answer_to("only one")]
        page.reload()
        expect(page.locator("#session-name")).to_have_text("products.xlsx")


# ---- the calls


def test_the_page_of_calls(page: Page, service: BatchService) -> None:
    page.goto("/docs")
    text = page.locator("main").inner_text()
    for method, path in called(service.get("/openapi.json")):
        assert f"{method} {path}" in text
    assert f"curl '{service.url}/api/sessions'" in text
    assert "script" not in page.content()
    page.screenshot(path=PICTURES / "docs.png")


def called(openapi: Any) -> list[tuple[str, str]]:
    return [(method.upper(), path) for path, methods in openapi["paths"].items() for method in methods]
