"""report.html in a real browser: from disk, offline, in both colour schemes, on a phone."""

import io
import os
import pathlib
import re
import sys

import numpy as np
import PIL.Image
import pytest

from csba_jax.data import audit
from csba_jax.report.audit import page as audit_page
from csba_jax.report.run import page as run_page
from csba_jax.report.study import page

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
COMMITTED = sorted(ROOT.glob('results/*/report.html'))
BROWSER = os.environ.get('CSBA_CHROMIUM', '/usr/bin/chromium')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run']
FLAGS += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
PHONE, DESK = {'width': 360, 'height': 740}, {'width': 1280, 'height': 900}
SCHEMES = ('light', 'dark')
# boxes that are not empty, inside what is visible; elements of closed details are opened first
SIZES = """() => [...document.querySelectorAll('svg')].map(e => {
  const box = e.getBoundingClientRect();
  return [box.width, box.height];
})"""
COLORS = """() => [...document.querySelectorAll('body, p, figcaption, td, a, summary, .badge')].map(
  e => {
    let paper = e, color = 'rgba(0, 0, 0, 0)';
    while (paper && color === 'rgba(0, 0, 0, 0)') {
      color = getComputedStyle(paper).backgroundColor;
      paper = paper.parentElement;
    }
    return [getComputedStyle(e).color, color];
  })"""
MARKS = """() => [...document.querySelectorAll('svg text, svg [class^=s]:not(.l)')].map(
  e => [getComputedStyle(e).fill, getComputedStyle(document.body).backgroundColor])"""
# text of figures that sticks out of its drawing: left, top, right or bottom
CLIPPED = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 ||
      own.top < box.top - 1 || own.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})"""

# pairs of texts in one drawing that lie on each other
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(
    text => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
    Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4).map(([b, q]) => a + ' / ' + b));
})"""


def lacking(reason):
  """Skips the test; fails it where CI is true, which has to open every page."""
  (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)


@pytest.fixture(scope='module')
def browser():
  if not pathlib.Path(BROWSER).exists():
    lacking(f'no {BROWSER}: apt-get install chromium fonts-dejavu-core')
  try:
    from playwright import sync_api as api
  except ImportError:
    lacking('no playwright: pip install playwright')
  with api.sync_playwright() as playwright:
    started = playwright.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
    yield started
    started.close()


@pytest.fixture
def open_file(browser):
  """Opens a page; at the end nothing may have gone wrong in it."""
  wrong, contexts = [], []

  def open_path(path, size, scheme='light'):
    context = browser.new_context(offline=True, viewport=size, color_scheme=scheme)
    contexts.append(context)
    tab = context.new_page()
    tab.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda error: wrong.append(str(error)))
    tab.on('requestfailed', lambda request: wrong.append(request.url))
    tab.on('dialog', lambda dialog: wrong.append(dialog.message))
    asked = []
    tab.on('request', lambda request: asked.append(request.url))
    tab.goto(path.resolve().as_uri(), wait_until='load')
    assert asked == [path.resolve().as_uri()]  # no other file
    return tab

  yield open_path
  for context in contexts:
    context.close()
  assert wrong == []


@pytest.fixture
def opened(open_file, tmp_path):
  """Opens findings as a page."""

  def open_page(findings, size, scheme='light'):
    path = tmp_path / 'report.html'
    path.write_text(page.render(findings), encoding='utf-8')
    return open_file(path, size, scheme)

  return open_page


def open_details(tab):
  tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
def test_figures_are_seen_and_nothing_sticks_out(opened, made_up, size):
  tab = opened(made_up.findings(), size)
  for scheme in SCHEMES:
    tab.emulate_media(color_scheme=scheme)
    for act in (lambda: None, lambda: open_details(tab)):
      act()
      width = tab.evaluate('document.documentElement.scrollWidth')
      assert width <= size['width']
    sizes = tab.evaluate(SIZES)
    assert len(sizes) > 40
    assert min(min(box) for box in sizes) > 0
    assert tab.evaluate(CLIPPED) == []
    assert tab.evaluate(OVERLAPS) == []


def test_colors_can_be_told_apart(opened, made_up):
  tab = opened(made_up.findings(), DESK)
  open_details(tab)
  papers = set()
  for scheme in SCHEMES:
    tab.emulate_media(color_scheme=scheme)
    pairs = {tuple(pair) for pair in tab.evaluate(COLORS)}
    assert min(contrast(*pair) for pair in pairs) >= 4.5, scheme
    marks = {tuple(pair) for pair in tab.evaluate(MARKS)}
    assert min(contrast(*pair) for pair in marks) >= 3, scheme
    papers.add(tab.evaluate('getComputedStyle(document.body).backgroundColor'))
  assert len(papers) == 2


def test_hostile_names_run_nothing(opened, made_up):
  for size in (PHONE, DESK):
    tab = opened(made_up.hostile(), size)
    open_details(tab)
    assert tab.evaluate('document.scripts.length') == 0
    assert tab.evaluate('document.images.length') == 0
    assert tab.evaluate('document.documentElement.scrollWidth') <= size['width']
    assert tab.evaluate(CLIPPED) == []


def test_long_names_and_one_seed(opened, made_up):
  classes = ['a-very-long-name-of-a-class-' * 8, '雪' * 60, 'W' * 40, 'x']
  for size in (PHONE, DESK):
    tab = opened(made_up.findings(classes=classes, seeds=1), size)
    open_details(tab)
    assert tab.evaluate('document.documentElement.scrollWidth') <= size['width']
    assert tab.evaluate(CLIPPED) == []
    assert tab.evaluate(OVERLAPS) == []


def test_prints_all_of_it(opened, made_up):
  tab = opened(made_up.findings(methods=('cross_entropy',)), DESK, 'dark')
  tab.emulate_media(media='print', color_scheme='dark')
  assert tab.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
  assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == 'none'
  assert tab.pdf().startswith(b'%PDF')


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
@pytest.mark.parametrize('path', COMMITTED, ids=[path.parent.name for path in COMMITTED])
def test_committed_reports_are_seen(open_file, path, size):
  tab = open_file(path, size)
  assert colors(tab.screenshot()) > 10
  open_details(tab)
  sizes = tab.evaluate(SIZES)
  # a study that measures no conflict has fewer figures
  assert len(sizes) == path.read_text().count('<svg') > 10
  assert min(min(box) for box in sizes) > 0
  assert tab.evaluate('document.documentElement.scrollWidth') <= size['width']
  assert tab.evaluate(CLIPPED) == []
  assert tab.evaluate(OVERLAPS) == []
  for figure in tab.locator('svg:not(.key)').all()[:3]:
    assert colors(figure.screenshot()) > 10


def colors(png):
  """How many colours a picture has; a blank one has one."""
  image = PIL.Image.open(io.BytesIO(png)).convert('RGB')
  return len(image.getcolors(image.width * image.height))


@pytest.mark.parametrize('lacks', ['the browser', 'playwright'])
@pytest.mark.parametrize('ci', ['true', ''])
def test_what_is_lacking_fails_where_ci_is_true(monkeypatch, lacks, ci):
  monkeypatch.setenv('CI', ci)
  if lacks == 'the browser':
    monkeypatch.setitem(globals(), 'BROWSER', '/nowhere/chromium')
  else:
    monkeypatch.setitem(globals(), 'BROWSER', __file__)
    monkeypatch.setitem(sys.modules, 'playwright', None)
  wanted = pytest.fail.Exception if ci else pytest.skip.Exception
  with pytest.raises(wanted, match='install'):
    next(browser.__wrapped__())


def contrast(ink, paper):
  """Ratio of WCAG 2: 1 to 21."""
  bright, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
  return (bright + 0.05) / (dark + 0.05)


def _luminance(color):
  values = [int(x) / 255 for x in re.findall(r'\d+', color)[:3]]
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
def test_an_audit_shows_its_photos_and_runs_nothing(open_file, tmp_path, size):
  rng = np.random.default_rng(0)
  for name in ('<script>alert(1)</script>', 'a-very-long-name-of-a-class-' * 5, 'cat'):
    (tmp_path / 'photos' / name.replace('/', '_')).mkdir(parents=True)
  for folder in (tmp_path / 'photos').iterdir():
    for i in range(3):
      seed = i if i < 2 else int(rng.integers(100, 10**6))  # two copies across all classes
      pixels = np.random.default_rng(seed).integers(0, 256, (70, 70, 3), np.uint8)
      PIL.Image.fromarray(pixels).save(folder / f'{i}.png')
  [*_, path] = audit_page.write(audit.audit_folder(tmp_path / 'photos'), tmp_path / 'run')
  tab = open_file(path, size)
  loaded = tab.evaluate('[...document.images].map(e => e.complete && e.naturalWidth)')
  assert loaded == [128] * 6
  assert tab.evaluate('document.scripts.length') == 0
  for scheme in SCHEMES:
    tab.emulate_media(color_scheme=scheme)
    assert tab.evaluate('document.documentElement.scrollWidth') <= size['width']
    assert tab.evaluate(CLIPPED) == []
    assert tab.evaluate(OVERLAPS) == []


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
def test_the_page_of_a_run_shows_its_pictures_and_runs_nothing(
  open_file, made_up_run, tmp_path, size
):
  names = ('<script>alert(1)</script>', 'a-very-long-name-of-a-class-' * 5, 'cat')
  path = tmp_path / 'report.html'
  path.write_text(run_page.render(made_up_run.facts(names)))
  tab = open_file(path, size)
  assert tab.evaluate('[...document.images].map(e => e.complete && e.naturalWidth)') == [128]
  assert tab.evaluate('document.scripts.length') == 0
  assert all(width > 100 and height > 50 for width, height in tab.evaluate(SIZES))
  for scheme in SCHEMES:
    tab.emulate_media(color_scheme=scheme)
    assert tab.evaluate('document.documentElement.scrollWidth') <= size['width']
    assert tab.evaluate(CLIPPED) == []
    assert tab.evaluate(OVERLAPS) == []
