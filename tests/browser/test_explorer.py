"""The report in a real browser: what a person clicks and types, what hostile text cannot do."""

import re

import pytest
from playwright.sync_api import expect

from melbo_ray.report import page as report
from tests.studies import kl_of, write_part, write_study

HOSTILE = {
    "script": "<script>document.title = 'owned'</script>",
    "closing": "</script><h1 id=owned>owned</h1><!-- <script>",
    "handler": "<img src=x onerror=\"document.title='owned'\"><svg onload=alert(1)>",
    "separators": "before\u2028after\u2029end\u0000\u001b[31m",
    "bidi": "abc\u202edcba\u2066 \u200f end",
    "template": "{{ 7 * 7 }} ${alert(1)} &lt;b&gt; ]]> \\u003c",
    "surrogate": "\U0001f600 ok",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    def text(concept, n, prompt, sample):
        hostile = HOSTILE[list(HOSTILE)[n % len(HOSTILE)]]
        return f"{concept} vector{n} {prompt} sample{sample} {hostile}"

    run = write_study(tmp_path_factory.mktemp("runs"), concepts=("alien", "code"), num_vectors=40, text=text)
    return report.render(str(run))


@pytest.fixture
def page(open_report, path):
    return open_report(path)


def texts(page):
    return page.locator("#outputs .text pre").all_text_contents()


def number(page, name):
    return page.locator(f"#numbers div:has(dt:text-is('{name}')) dd").text_content()


def test_opens_on_the_base_with_every_figure_drawn(page):
    expect(page.locator("#n")).to_have_value("0")
    for name in ("kl", "norm", "dose", "composition", "presence", "generalization"):
        plot = page.locator(f"#alien-{name} .plot")
        plot.scroll_into_view_if_needed()
        expect(plot.locator(".main-svg").first).to_be_visible()
    assert page.locator("#alien-kl .scatterlayer .trace .points path").count() >= 41


def test_keys_buttons_and_slider_move_along_n(page):
    page.keyboard.press("ArrowRight")
    expect(page.locator("#n")).to_have_value("1")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#n")).to_have_value("11")
    page.click("#next")
    page.click("#previous")
    page.click("#previous")
    expect(page.locator("#n")).to_have_value("10")
    page.locator("#slider").fill("40")
    expect(page.locator("#n")).to_have_value("40")
    page.keyboard.press("End")
    page.click("#next")
    expect(page.locator("#n")).to_have_value("40")
    page.fill("#n", "14")
    page.press("#n", "Enter")
    assert number(page, "direction") == "n = 14"
    assert float(number(page, "KL from base, nats")) == pytest.approx(kl_of(14, 40), rel=5e-3)
    assert all("vector14 " in text for text in texts(page) if "vector0" not in text)


def test_a_click_on_a_dot_goes_to_its_vector(page):
    page.locator("#alien-kl").scroll_into_view_if_needed()
    page.wait_for_selector("#alien-kl .plot[data-drawn]")
    dot = page.locator("#alien-kl .scatterlayer .trace .points path").nth(6).bounding_box()
    page.mouse.move(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
    page.wait_for_selector("#alien-kl .hovertext")
    page.mouse.click(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
    expect(page.locator("#n")).to_have_value("7")


def test_outputs_stand_beside_those_of_another_direction(page):
    page.fill("#n", "3")
    page.press("#n", "Enter")
    assert page.locator("#outputs article").count() == 3
    assert len(texts(page)) == 3 * 2 * 2
    page.select_option("#beside", "random/1")
    expect(page.locator("#outputs h5").nth(1)).to_have_text("random 1")
    page.select_option("#beside", "")
    assert len(texts(page)) == 3 * 2
    page.select_option("#kind", "random")
    assert number(page, "direction") == "random 1"


def test_concepts_are_chosen_by_their_tabs_and_keep_their_own_texts(page):
    page.click("role=tab[name=code]")
    page.wait_for_selector("body[data-ready=code]")
    assert all(text.startswith("code ") for text in texts(page))
    expect(page.locator("#concept-alien")).to_be_hidden()
    expect(page.locator("#code-kl .main-svg").first).to_be_visible()


def test_the_address_names_the_vector(open_report, path):
    page = open_report(path, "#code/chain/9")
    assert number(page, "direction") == "n = 9"
    page.keyboard.press("ArrowRight")
    assert page.url.endswith("#code/chain/10")


@pytest.mark.parametrize("address", ["#nosuch/chain/9", "#code/<img src=x onerror=alert(1)>/%E0%A4%A"])
def test_an_address_of_nothing_opens_the_base(open_report, path, address):
    expect(open_report(path, address).locator("#n")).to_have_value("0")


def test_search_finds_shows_and_leads_to_the_text(page):
    page.fill("#query", "VECTOR17 ")
    expect(page.locator("#count")).to_contain_text(re.compile(r"^12 of 498 texts, under 2 directions"))
    assert page.locator("#hits mark").all_text_contents() == ["vector17 "] * 12
    page.locator("#hits button").first.click()
    expect(page.locator("#n")).to_have_value("17")
    page.fill("#query", "no such words")
    expect(page.locator("#count")).to_contain_text(re.compile(r"^0 of"))


def test_filters_by_score_and_detection(page):
    page.fill("#low", "1.5")
    expect(page.locator("#hits li").first).to_be_visible()
    scores = [
        float(re.search(r"score ([\d.-]+)", text)[1]) for text in page.locator("#hits .judged").all_text_contents()
    ]
    assert scores
    assert min(scores) >= 1.5
    page.select_option("#order", "score")
    page.fill("#high", "1.9")
    expect(page.locator("#hits .judged").first).to_contain_text("score 1.")
    scores = [
        float(re.search(r"score ([\d.-]+)", text)[1]) for text in page.locator("#hits .judged").all_text_contents()
    ]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) <= 1.9
    page.fill("#low", "")
    page.fill("#high", "")
    page.check("#detected")
    expect(page.locator("#count")).to_contain_text(re.compile(r"^\d+ of"))
    assert all("detected" in text for text in page.locator("#hits .judged").all_text_contents())


def test_more_hits_than_a_page_come_on_demand(page):
    page.fill("#query", "vector")
    expect(page.locator("#hits li")).to_have_count(100)
    page.click("#more")
    expect(page.locator("#hits li")).to_have_count(200)


def test_hostile_text_stays_text(page):
    for n, text in enumerate(HOSTILE.values(), len(HOSTILE)):
        page.fill("#n", str(n))
        page.press("#n", "Enter")
        page.fill("#query", f"vector{n} ")
        expect(page.locator("#hits mark").first).to_have_text(f"vector{n} ")
        shown = re.sub(r"⟨U\+([0-9A-F]{4})⟩", lambda match: chr(int(match[1], 16)), texts(page)[0])
        assert shown.endswith(text)
    assert "owned" not in page.title()
    assert page.locator("#owned, #outputs img, #outputs script, #outputs svg, #hits img, #hits script").count() == 0


def test_characters_that_turn_writing_around_are_shown_as_code_points(page):
    page.fill("#n", str(list(HOSTILE).index("bidi") + len(HOSTILE)))
    page.press("#n", "Enter")
    assert "abc⟨U+202E⟩dcba⟨U+2066⟩ ⟨U+200F⟩ end" in texts(page)[0]
    assert not any(ord(c) in range(0x202A, 0x202F) for c in page.locator("body").inner_text())


def test_a_script_that_reached_the_page_would_not_run(page):
    """The policy is the second lock: it is shown to hold by injecting what textContent never would."""
    page.allowed.append("Content Security Policy")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=2'}))"
    )
    page.wait_for_timeout(200)
    assert page.title() not in ("1", "2")
    assert not page.evaluate("fetch('http://127.0.0.1:9/').then(() => true, () => false)")


@pytest.mark.parametrize(("width", "scheme", "other"), [(1400, "light", "dark"), (400, "dark", "light")])
def test_fits_its_window_and_follows_the_colour_scheme(open_report, path, width, scheme, other):
    page = open_report(path, width=width, scheme=scheme)
    page.locator("#alien-norm").scroll_into_view_if_needed()
    for now in (scheme, other):
        page.emulate_media(color_scheme=now)
        page.wait_for_function(
            """dark => {
                const parts = (colour) => colour.match(/\\d+/g).slice(0, 3);
                const brightness = (colour) => parts(colour).reduce((sum, part) => sum + Number(part), 0);
                const tick = document.querySelector("#alien-norm .xtick text");
                const ground = brightness(getComputedStyle(document.body).backgroundColor);
                return tick && (ground < brightness(getComputedStyle(tick).fill)) === dark && (ground < 382) === dark;
            }""",
            arg=now == "dark",
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A report with a vector, the ninth, whose next tokens are as long as tokens of code get."""
    run = write_study(tmp_path_factory.mktemp("runs"), num_vectors=4)
    tokens = [" " * 80, "/" * 90, "\n\n\n"]
    row = {"kind": "chain", "index": 9, "scale": "own", "prompt_id": "training", "kl_from_base": 0.5, "norm": 3.0}
    write_part(run, "kl", "code", [row | {"top_tokens": tokens, "top_probs": [0.5, 0.3, 0.1]}], "part-1")
    return report.render(str(run))


@pytest.mark.parametrize("phone", [False, True])
def test_nothing_is_wider_than_a_narrow_window(open_report, wide, phone):
    page = open_report(wide, "#code/chain/9", width=420, is_mobile=phone, has_touch=phone)
    expect(page.locator("#tokens .token")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def covering(page):
    """Whether the buttons over a figure can be seen where its legend stands."""
    page.locator("#code-kl .plot").scroll_into_view_if_needed()
    expect(page.locator("#code-kl .legend")).to_be_visible()
    return page.evaluate(
        """() => {
            const [bar, legend] = ["modebar", "legend"].map((name) => document.querySelector(`#code-kl .${name}`));
            if (!bar || getComputedStyle(bar.querySelector(".modebar-group")).opacity === "0") return false;
            const [one, other] = [bar, legend].map((element) => element.getBoundingClientRect());
            return one.left < other.right && one.bottom > other.top;
        }"""
    )


def test_without_a_mouse_no_buttons_cover_a_legend(open_report, wide):
    assert not covering(open_report(wide, width=420, is_mobile=True, has_touch=True))


def test_with_a_mouse_the_buttons_come_when_it_is_over_the_figure(open_report, wide):
    page = open_report(wide, width=420)
    assert not covering(page)
    page.locator("#code-kl .plot").hover()
    page.wait_for_function("() => getComputedStyle(document.querySelector('#code-kl .modebar-group')).opacity === '1'")
