"""The pages in a real browser: nothing in the console, nothing from the network, no sideways scrolling on a phone, all of
it reachable by keyboard, light and dark with enough contrast, and no script of a stranger's."""

import json
import shutil

import pytest
from browser import Page
from conftest import conversation, mixed_samples, write_llava
from html_page import HOSTILE

from genrecal.cache.job import run_cache_job
from genrecal.cache.options import CacheOptions
from genrecal.cli import main
from genrecal.samples import open_samples
from genrecal.train.config import load_config
from genrecal.train.loop import train
from genrecal.train.run import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
]
EVIL = HOSTILE.replace("\ud800", "").replace("\x00", "")
LUMINANCE = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => rgb(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const contrast = colour => (Math.max(page, light(colour)) + 0.05) / (Math.min(page, light(colour)) + 0.05);
  const result = {};
  for (const e of document.querySelectorAll('body, a, summary, p, th, figcaption, .note, .tick, [class^="c"]'))
    for (const name of e.matches('.tick') ? ['fill'] : ['color'])
      result[getComputedStyle(e)[name]] = contrast(getComputedStyle(e)[name]);
  return result;
})()
"""


@pytest.fixture(scope="module")
def pages(tiny, teacher, tmp_path_factory):
    """The pages of two runs and of their cache, whose texts are hostile. The runs have hostile names."""
    folder = tmp_path_factory.mktemp("browser")
    data = write_llava(folder / "d", [conversation((EVIL, EVIL), images={0: 1}), *mixed_samples(11)])
    records = json.loads(data.read_text())
    for number, record in enumerate(records):
        record["category"] = [EVIL, "Chart & Document", "Knowledge"][number % 3]
    data.write_text(json.dumps(records))
    run_cache_job(teacher, open_samples([data]), folder / "c", CacheOptions(samples_per_shard=8))
    small = "batch_size=6 accumulation=1 max_steps=4 epochs=9 lr=1e-3".split()
    asked = [f'evaluate.data=["{data}"]', "evaluate.max_new_tokens=2"]
    settings = ["data.workers=0", *asked, *(f"stage{n}.{setting}" for n in (1, 2, 3) for setting in small)]
    runs = []
    for name, more in (
        ("<b onclick=alert(1)>with", []),
        ("without regularisation, " + "x" * 80, ["loss.reg_weight=0"]),
    ):
        config = load_config(None, [*settings, *more])
        runs.append(
            Run(path=folder / name, config=config, student=str(tiny("internvl_llama")), caches=(str(folder / "c"),))
        )
        train(runs[-1], stages=[1] if more else [1, 2, 3])
    found = {"runs": folder / "runs.html", "cache": folder / "cache.html"}
    commands = [["report", *(str(run.path) for run in runs), "--out"], ["inspect", str(folder / "c"), "--html"]]
    for words, path in zip(commands, found.values(), strict=True):
        with pytest.raises(SystemExit) as stop:
            main([*words, str(path)])
        assert not stop.value.code
    return found


each = pytest.mark.parametrize("name", ["runs", "cache"])


@each
def test_alone_and_silent(pages, name, tmp_path):
    """Opened from a folder of its own: no address is fetched, the console is empty, every picture is there."""
    with Page(shutil.copy(pages[name], tmp_path)) as page:
        assert page.requests() == [] and page.problems() == []
        assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.run("document.scripts.length") == 0 and page.run("document.images.length > 0")
        shown = page.run("document.body.innerText")
        assert (
            "<script>alert(1)</script>" in shown and "{{ 7 * 7 }}" in shown and "49" not in page.run("document.title")
        )


@each
def test_what_a_stranger_puts_in_cannot_run(pages, name, tmp_path):
    """Were the escaping to fail, the page's own policy would still refuse: a script, a handler and an address put in."""
    harm = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title='run'\">"
    path = tmp_path / "broken.html"
    path.write_text(pages[name].read_text().replace("</main>", harm + "</main>"))
    with Page(path) as page:
        page.run("new Promise(done => setTimeout(done, 300))")
        assert page.run("document.title") != "run"
        refused = [p for p in page.problems() if "Content Security Policy" in json.dumps(p)]
        assert len(refused) >= 2
        failed = [e["params"]["blockedReason"] for e in page.events if e["method"] == "Network.loadingFailed"]
        assert failed == ["csp"] * len(failed) == ["csp"] * len(page.requests())


@each
@pytest.mark.parametrize("width", [320, 360, 768, 1400])
def test_no_sideways_scrolling(pages, name, width):
    """With everything unfolded; wide tables scroll in their own boxes."""
    with Page(pages[name], width=width) as page:
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.run("document.documentElement.scrollWidth") <= width
        wide = page.run(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
            "!e.closest('.scroll')).map(e => e.outerHTML.slice(0, 100))"
        )
        assert wide == []
        if name == "runs":  # letters of a chart do not shrink away
            scale = page.run("Math.min(...[...document.querySelectorAll('.chart')].map(s => s.getScreenCTM().a))")
            assert scale * 11 > 8


@each
def test_by_keyboard(pages, name):
    """Tab reaches every link, choice, folded part and scrolling box, in the order of the page; keys work them."""
    with Page(pages[name]) as page:
        page.press("Tab")
        assert page.run("document.activeElement.className") == "skip"
        assert page.run("document.activeElement.getBoundingClientRect().left") >= 0
        expected = page.run(
            "[...document.querySelectorAll('a, summary, [tabindex], #theme-auto')].filter(e => e.checkVisibility()).length"
        )
        page.run("document.activeElement.seen = true")
        places = [page.run("scrollY + document.activeElement.getBoundingClientRect().top")]
        for _ in range(expected - 1):
            page.press("Tab")
            assert page.run("document.activeElement !== document.body && !document.activeElement.seen")
            page.run("document.activeElement.seen = true")
            places.append(
                page.run("document.activeElement.closest('main') && document.activeElement.closest('section').id")
            )
            outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"
        order = [place for place in dict.fromkeys(places[1:]) if place]
        assert order == page.run(
            f"[...document.querySelectorAll('section')].map(s => s.id).filter(i => {order}.includes(i))"
        )
        folded = "document.querySelector('details:not([open]) > summary')"
        page.run(f"{folded}.focus()")
        page.press("Enter", "Enter")
        assert page.run("document.activeElement.parentElement.open")
        page.run("document.querySelector('#theme-auto').focus()")
        page.press("ArrowRight")
        page.press("ArrowRight")
        assert page.run("getComputedStyle(document.documentElement).colorScheme") == "dark"


@each
def test_light_and_dark(pages, name):
    """As the system is, or as it is told, with the contrast that WCAG asks of text."""
    with Page(pages[name]) as page:
        backgrounds = {}
        for dark in (False, True):
            page.set_dark(dark)
            page.run("document.querySelector('#theme-auto').click()")
            backgrounds[dark] = page.run("getComputedStyle(document.body).backgroundColor")
            contrasts = page.run(LUMINANCE)
            assert len(contrasts) >= 4 and min(contrasts.values()) >= 4.5, contrasts
            for choice, told in (("light", False), ("dark", True)):
                page.run(f"document.querySelector('#theme-{choice}').click()")
                now = page.run("getComputedStyle(document.body).backgroundColor")
                assert (now == backgrounds[dark]) == (told == dark)
        assert backgrounds == {False: "rgb(255, 255, 255)", True: "rgb(22, 25, 29)"}


@each
def test_what_a_screen_reader_finds(pages, name):
    """Every chart and picture has words, every table a label, headings go down one level at a time."""
    with Page(pages[name]) as page:
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        kinds = [
            (n.get("role", {}).get("value"), n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")
        ]
        images = [words for role, words in kinds if role == "image"]
        assert all(len(words) > 10 for words in images) and len(images) >= (50 if name == "runs" else 3)
        assert all(
            words for role, words in kinds if role in ("region", "navigation", "radio", "link", "DisclosureTriangle")
        )
        levels = page.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
