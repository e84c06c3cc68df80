"""The report page in a real browser, opened from disk: sorted, pointed at, on paper and phone."""

import os
import re
import shutil

import pandas as pd
import pytest
from test_report import CLASSES, HOSTILE, write_comparison, write_reproduction, write_sweep

from skcifar.report import write_report

pytest.importorskip("jinja2")
pytest.importorskip("PIL")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("SKCIFAR_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH; SKCIFAR_CHROMIUM names one"
)
# The sandbox does not run as root; the others keep the browser from talking of its own accord.
ARGUMENTS = [
    *["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
    *["--disable-background-networking", "--disable-component-update", "--disable-sync"],
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_comparison(folder / "comparison")
    write_sweep(folder / "sweep")
    write_reproduction(folder / "reproduction")
    return write_report(folder).as_uri()


@pytest.fixture
def opened(browser, address):
    """Open the page, and be sure afterwards that it met no error and asked for nothing else."""
    pages, wrong, asked = [], [], []

    def open_page(viewport=DESKTOP, color_scheme="light"):
        page = browser.new_page(viewport=viewport, color_scheme=color_scheme)
        pages.append(page)
        page.set_default_timeout(5000)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        # Drawn at the size that the first layout gives, so after it.
        page.locator(".curves-chart .series").first.wait_for(state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == [address] * len(pages)


def test__column_header__sorts_rows_both_ways_with_nothing_last(opened):
    page = opened()
    table = page.locator("table.sortable").first
    names = table.locator("tbody th")
    assert names.all_inner_texts() == ["mlp", HOSTILE, "failing"]
    header = table.get_by_role("columnheader", name="fit, s")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert table.locator("[aria-sort]").count() == 1
    assert names.all_inner_texts() == ["mlp", HOSTILE, "failing"]
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert names.all_inner_texts() == [HOSTILE, "mlp", "failing"]
    table.get_by_role("columnheader", name="model").get_by_role("button").click()
    assert names.all_inner_texts() == [HOSTILE, "failing", "mlp"]


def test__pointing_at_an_epoch__shows_the_values_there(opened):
    page = opened()
    chart = page.locator(".curves-chart").first
    plot, values = chart.locator("svg"), chart.locator(".values")
    assert "Last epoch" in values.inner_text()
    width = plot.bounding_box()["width"]
    plot.hover(position={"x": 54, "y": 100})
    assert cells(values) == [["Epoch 1"], ["0.1500"], ["1.150"]]
    plot.hover(position={"x": width - 14, "y": 100})
    assert cells(values) == [["Epoch 3"], ["0.1500"], ["–"]]
    plot.focus()
    plot.press("ArrowLeft")  # to the epoch whose loss was not finite
    assert cells(values) == [["Epoch 2"], ["0.1500"], ["–"]]
    assert chart.locator(".dot").count() == 1
    page.set_viewport_size(PHONE)  # drawn anew, and where it was
    page.wait_for_function("document.querySelector('.curves-chart svg').clientWidth < 360")
    page.keyboard.press("ArrowLeft")
    assert cells(values) == [["Epoch 1"], ["0.1500"], ["1.150"]]


def test__values__are_told_to_those_who_hear_the_page(opened):
    chart = opened().locator(".curves-chart").first
    told = chart.get_by_role("status")
    assert told.text_content() == ""
    chart.get_by_role("button", name="mlp").focus()
    chart.locator("svg").press("ArrowLeft")
    assert told.text_content() == "Epoch 3: mlp validation 0.1500; " + HOSTILE + " validation –"
    assert told.bounding_box()["width"] <= 1


def test__curve_of_one_epoch__is_a_dot(opened):
    chart = opened().locator(".curves-chart").first  # the second model's next loss is not finite
    assert chart.locator(".lone").count() == 1
    end = chart.locator(".series").nth(1).evaluate("line => line.getPointAtLength(0).x")
    assert float(chart.locator(".lone").get_attribute("cx")) == pytest.approx(end, abs=0.1)


def test__training_is_solid_and_validation_dashed(opened):
    chart = opened().locator(".curves-chart").first
    assert style(chart.locator(".series.valid").first, "strokeDasharray") != "none"
    chart.get_by_label("Quantity").select_option("accuracy")
    assert style(chart.locator(".series.train").first, "strokeDasharray") == "none"


def test__quantity_and_scale__are_chosen(opened):
    chart = opened().locator(".curves-chart").first
    chart.get_by_label("Quantity").select_option("accuracy")
    chart.locator("svg").press("ArrowLeft")
    assert cells(chart.locator(".values"))[1:] == [["0.1833"], ["–"]]
    linear = chart.locator(".series").first.get_attribute("d")
    chart.get_by_label("logarithmic").check()
    assert chart.locator(".series").first.get_attribute("d") != linear


def test__legend_button__hides_and_shows_a_curve(opened):
    chart = opened().locator(".curves-chart").first
    button = chart.get_by_role("button", name="mlp")
    assert chart.locator(".series").count() == 2
    button.click()
    assert chart.locator(".series").count() == 1
    assert button.get_attribute("aria-pressed") == "false"
    button.press("Enter")
    assert chart.locator(".series").count() == 2


def test__model_of_the_confusion_matrix__is_chosen(opened):
    chart = opened().locator(".confusion-chart").first
    before = chart.locator(".matrix td").all_inner_texts()
    assert sum(int(count) for count in before if count.isdigit()) == 40
    chart.get_by_label("Model").select_option(HOSTILE)
    assert chart.locator(".matrix td").all_inner_texts() != before
    assert chart.locator(".bars caption").inner_text().startswith(HOSTILE)


def test__gallery__shows_one_model_at_a_time(opened):
    gallery = opened().locator(".gallery")
    assert gallery.locator("img:visible").count() == 16
    gallery.get_by_label("Model").select_option(HOSTILE)
    assert gallery.locator("h4:visible").all_inner_texts() == [HOSTILE]
    assert all(gallery.locator("img:visible").evaluate_all("all => all.map(i => i.naturalWidth)"))


def test__heat_map__swaps_its_axes(opened):
    chart = opened().locator(".heatMap-chart")
    rows = chart.locator(".matrix tbody th")
    assert rows.all_inner_texts() == ["0.1", "10"]
    grid = [["0.7000", "0.9000"], ["–", "0.8000"]]
    assert [row.locator("td").all_inner_texts() for row in chart.locator("tbody tr").all()] == grid
    chart.get_by_label("Rows").select_option("layers")
    assert rows.all_inner_texts() == ["(5,)", "<b>"]
    assert chart.get_by_label("Columns").input_value() == "alpha"


def test__candidate__lights_up_when_pointed_at_or_stepped_to(opened):
    chart = opened().locator(".parallel-chart")
    plot, readout = chart.locator("svg"), chart.locator(".readout")
    chart.locator(".reach").nth(0).dispatch_event("pointerenter")  # drawn first: the worst
    assert readout.inner_text() == "Rank 3: score 0.7; alpha 0.1, layers (5,)"
    assert chart.locator(".lit").count() == 1
    plot.press("ArrowLeft")
    assert readout.inner_text() == "Rank 2: score 0.8; alpha 10, layers <b>"
    # the line of rank 2 where it meets the axis of the score, found by its own end
    end = chart.locator(".line.lit").evaluate(
        "line => { const p = line.getPointAtLength(line.getTotalLength()); return [p.x, p.y]; }"
    )
    plot.press("ArrowLeft")
    assert readout.inner_text().startswith("Rank 1")
    plot.hover(position={"x": end[0] - 2, "y": end[1]})
    assert readout.inner_text().startswith("Rank 2")


def test__closed_system__draws_its_curves_when_it_opens(opened):
    page = opened()
    system = page.locator("details.system")
    assert system.locator(".series").count() == 0
    system.locator("summary").first.click()
    system.locator(".series").first.wait_for(state="attached")
    assert system.locator(".series").count() == 2


def test__markup_in_names__is_shown_as_text(opened):
    page = opened()
    assert page.locator("table.sortable").first.locator("tbody th").nth(1).inner_text() == HOSTILE
    headers = page.locator(".confusion-chart").first.locator(".matrix thead th")
    assert headers.all_inner_texts() == CLASSES
    assert page.locator("img[src=x], [onerror]").count() == 0
    assert page.locator("script:not([type])").count() == 1


def test__script_that_is_not_the_pages__is_refused(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); }"
    )
    assert page.evaluate("window.ran") is None
    page.close()


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test__page__never_scrolls_sideways(opened, viewport):
    page = opened(viewport)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.locator("details .series").first.wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    assert page.locator("table.sortable").first.bounding_box()["x"] >= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test__text__has_contrast_in_light_and_dark(opened, scheme):
    page = opened(color_scheme=scheme)
    background = style(page.locator("body"), "backgroundColor")
    assert (luminance(background) < 0.1) == (scheme == "dark")
    for selector in ["body", "caption", "figcaption", ".kind", "nav a", "thead button", "dt"]:
        assert contrast(style(page.locator(selector).first, "color"), background) >= 4.5, selector
    for cell in page.locator(".heatMap-chart td[style]").all():
        assert contrast(style(cell, "color"), style(cell, "backgroundColor")) >= 4.5
    curves = page.locator(".curves-chart").first.locator(".series")
    for curve in curves.all():
        assert contrast(style(curve, "stroke"), background) >= 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("n_curves", [7, 9])
def test__every_curve_and_candidate__has_contrast(browser, tmp_path, scheme, n_curves):
    models = [f"model {i}" for i in range(n_curves)]
    write_comparison(tmp_path, models=models)
    epochs = [(model, epoch, 1 + i + epoch) for i, model in enumerate(models) for epoch in (1, 2)]
    frame = pd.DataFrame(epochs, columns=["model", "epoch", "train_loss"])
    frame.to_csv(tmp_path / "histories.csv", index=False)
    write_sweep(tmp_path / "sweep")
    page = browser.new_page(color_scheme=scheme)
    page.goto(write_report(tmp_path).as_uri())
    page.locator(".parallel-chart .line").first.wait_for(state="attached")
    background = style(page.locator("body"), "backgroundColor")
    lines = [*page.locator(".curves-chart").first.locator(".series").all()]
    lines += page.locator(".parallel-chart .line").all()  # the best is drawn last
    strokes = [style(line, "stroke") for line in lines]
    assert len(strokes) == n_curves + 3
    for stroke in strokes:
        assert contrast(stroke, background) >= 3, stroke
    assert [*map(luminance, strokes[-3:])] == sorted(map(luminance, strokes[-3:]))
    page.close()


def test__figures_of_a_system__are_seen_on_a_phone(opened):
    page = opened(PHONE)
    table = page.get_by_role("region", name="Systems, table")
    for title in ["figure", "report", "ours"]:
        box = table.get_by_role("columnheader", name=title, exact=True).bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"], title


def test__printed_page__shows_what_was_folded(opened):
    page = opened()
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0


def cells(values):
    caption = values.locator("caption").inner_text()
    rows = values.locator("tbody tr").all()
    return [[caption], *(row.locator("td").all_inner_texts() for row in rows)]


def style(locator, name):
    return locator.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def luminance(colour):
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
