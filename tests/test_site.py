"""The site, in Chromium, with no other host within reach: it loads, its links lead somewhere, search and themes work, it fits a phone, all can read it.

Needs Debian's chromium and npm's axe-core: `apt-get install chromium npm && npm install --prefix . --no-save axe-core@4.14.1` in the repository."""
import functools, os, re, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import nbformat, pytest
from bs4 import BeautifulSoup
from filelock import FileLock
from playwright.sync_api import sync_playwright
from docs.build import sections
from docs.readme import readme

root = Path(__file__).parent.parent
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()

def needed(found, what, how):
    if not found: pytest.fail(f'the tests of the site need {what}: {how}', pytrace=False)
    return str(found)

class Handler(SimpleHTTPRequestHandler):
    "Serves the site as GitHub Pages does: under the repository's name, with 404.html for what is not there"
    def translate_path(self, path): return super().translate_path(path.removeprefix('/rnnlm'))
    def send_error(self, code, *args, **kwargs):
        body = Path(self.directory, '404.html').read_bytes()
        self.send_response(code); self.send_header('Content-Type', 'text/html'); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the site, built as the workflow does, once for all processes of a test run"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent  # the run's, above each process's own
    with FileLock(shared/'site.lock'):
        if not (shared/'site-is-built').exists():
            res = subprocess.run([sys.executable, '-m', 'docs.build'], cwd=root, capture_output=True, text=True,
                                 env=os.environ | {'GITHUB_REPOSITORY': 'owner/rnnlm'})
            assert res.returncode == 0, res.stdout + res.stderr
            (shared/'site-is-built').touch()
    return root/'_docs'

@pytest.fixture(scope='session')
def url(site):
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/rnnlm/'
    server.shutdown()

@pytest.fixture(scope='session')
def browser():
    chromium = needed(shutil.which('chromium'), 'chromium', 'apt-get install chromium')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()

@pytest.fixture(scope='session')
def axe():
    path = root/'node_modules'/'axe-core'/'axe.min.js'
    return needed(path if path.exists() else None, 'axe-core', f'npm install --prefix . --no-save axe-core@4.14.1, in {root}')

@pytest.fixture(scope='session')
def pages(site):
    "{page: its HTML, parsed}, of all pages"
    return {str(p.relative_to(site)): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(site.rglob('*.html'))
            if '_static' not in p.parts}

@pytest.fixture
def tab(browser, url):
    "A browser's page that reaches the site alone, and records in `.faults` what goes wrong"
    page = browser.new_page(viewport={'width': 1280, 'height': 800}, reduced_motion='reduce')
    page.set_default_timeout(10_000)
    page.faults = []
    def request(route):
        if route.request.url.startswith((url, 'data:')): return route.continue_()
        page.faults.append(f'asks for {route.request.url}')
        route.abort()
    page.route('**/*', request)
    page.on('console', lambda m: m.type == 'error' and page.faults.append(m.text))
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    page.on('requestfailed', lambda r: page.faults.append(f'{r.url}: {r.failure}'))
    page.on('response', lambda r: r.status >= 400 and page.faults.append(f'{r.url}: {r.status}'))
    yield page
    page.close()

def set_theme(tab, theme):
    tab.locator('.theme-switch-button:visible').click()
    tab.locator(f'.theme-change-button[data-mode={theme}]:visible').click()

def test_pages_load_fit_a_phone_and_are_accessible(pages, tab, url, axe):
    "In both themes, of which all but the colours is the same"
    faults = []
    for page in pages:
        tab.faults.clear()
        tab.set_viewport_size({'width': 1280, 'height': 800})
        tab.goto(url+page)
        tab.add_script_tag(path=axe)
        tab.add_style_tag(content='* { transition: none !important } .tooltip { display: none !important }')  # no colour half way
        code = [] if page in ('01_models.html', 'source/rnnlm.data.html') else ['.highlight pre']  # coloured alike everywhere; it takes the most time
        for theme,rules in ('light', ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']), ('dark', ['color-contrast']):
            set_theme(tab, theme)
            res = tab.evaluate('([exclude, runOnly]) => axe.run({exclude}, {resultTypes: ["violations"], runOnly})', [code, rules])
            tab.faults += [f'{theme}: {v["id"]}: {n["html"][:200]} {n["failureSummary"][:300]}' for v in res['violations']
                           if v['impact'] in ('serious', 'critical') for n in v['nodes']]
        tab.set_viewport_size({'width': 390, 'height': 844})
        width = tab.evaluate('document.documentElement.scrollWidth')
        if width > 390: tab.faults.append(f'{width} px wide on a phone')
        faults += [f'{page}: {o}' for o in tab.faults]
    assert not faults, '\n'.join(faults[:20])

def test_links_lead_somewhere(pages, site):
    "To a file of the site, and to an anchor in it; and nothing that a page loads lies elsewhere"
    ids = {name: {o[k] for k in ('id', 'name') for o in page.find_all(attrs={k: True})} for name,page in pages.items()}
    faults = []
    for name,page in pages.items():
        for tag in page.find_all(['a', 'area', 'img', 'script', 'link', 'source', 'iframe']):
            target = tag.get('href') or tag.get('src')
            if not target or target.startswith(('data:', 'mailto:')) or tag.get('rel') == ['canonical']: continue
            full,anchor = urldefrag(urljoin(f'https://owner.github.io/rnnlm/{name}', target))
            if not full.startswith('https://owner.github.io/'):
                if tag.name != 'a': faults.append(f'{name} loads {target}')
                continue
            path = unquote(urlsplit(full).path).removeprefix('/rnnlm/') or 'index.html'
            if not (site/path).is_file(): faults.append(f'{name}: no file for {target}')
            elif anchor and path in ids and unquote(anchor) not in ids[path]: faults.append(f'{name}: no anchor for {target}')
    assert not faults, '\n'.join(faults[:20])

def test_titles_descriptions_and_alt_texts(pages):
    titles = [page.title.text for page in pages.values()]
    assert len({*titles}) == len(titles)
    for name,page in pages.items():
        assert page.html['lang'] == 'en'
        assert len(page.find_all('h1')) - len(page.select('.onlyprint h1')) == 1, name
        if not name.startswith(('search', '404', 'source')): assert page.find('meta', attrs={'name': 'description'})['content'].strip(), name
        assert not [o for o in page.find_all('img') if o.get('alt') is None], name
        assert not [o for o in page.select('main img') if not o['alt'].strip() or o['alt'].startswith(('../', '_images'))], name

def test_notebooks_can_be_had(pages, site):
    "Each page has the links to its notebook: to take away, and to run in Colab; and the copy installs rnnlm first"
    notebooks = [p.relative_to(root/'nbs').with_suffix('') for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert len(notebooks) > 9
    for nb in notebooks:
        colab,copy = pages[f'{nb}.html'].select('.notebook-links a')
        assert colab['href'] == f'https://colab.research.google.com/github/owner/rnnlm/blob/gh-pages/notebooks/{nb}.ipynb'
        first,*rest = nbformat.read(site/f'{nb}.html'.replace(nb.name+'.html', copy['href']), as_version=4).cells
        assert 'pip install -q git+https://github.com/owner/rnnlm' in first.source
        assert not [c for c in rest if re.search(r'\]\((?!https?:)[^)]*\.ipynb', c.source)]  # its links lead to the site
        assert [c.source for c in rest if c.cell_type == 'code'] == [
            c.source for c in nbformat.read(root/'nbs'/f'{nb}.ipynb', as_version=4).cells if c.cell_type == 'code']

def test_api_lists_every_public_name(pages):
    "With its summary; and each entry has its signature and its source"
    import rnnlm.all
    rows = {o.code.text: o.find_next('dd').text for o in pages['api.html'].select('main dt')}
    public = {n for n,o in vars(rnnlm.all).items() if getattr(o, '__module__', '').startswith('rnnlm.') and n[0] != '_'}
    assert public and not public - {*rows}
    assert not [k for k,v in rows.items() if not v.strip()]
    entry = pages['00_data.html'].find(id='streamdl')
    assert entry.select_one('a.source-link')['href'].startswith('source/rnnlm.data.html#L-')
    assert [o.text for o in entry.select('table th')][-1] == 'Details' and 'bs' in entry.select_one('table tbody').text

def test_files_beside_the_pages(site, pages):
    assert (site/'.nojekyll').exists()
    sitemap = (site/'sitemap.xml').read_text()
    llms = (site/'llms.txt').read_text(encoding='utf-8')
    for name in pages:
        if not name.startswith(('search', '404', 'source', 'index')):
            assert f'https://owner.github.io/rnnlm/{name}' in sitemap and f'https://owner.github.io/rnnlm/{name}' in llms

def test_every_page_has_a_section():
    assert sections(['06_train', '00_data', 'api', '00b_text'])['Library'] == ['00b_text', '06_train']
    with pytest.raises(ValueError, match='99_new must be in one section'): sections(['00_data', '99_new'])

def test_readme_leaves_out_what_it_cannot_show(tmp_path):
    code = nbformat.v4.new_code_cell
    text,picture = nbformat.v4.new_output('stream', text='counted'),nbformat.v4.new_output('display_data', {'image/png': '', 'text/plain': '<Figure>'})
    cells = [code('#| fig-alt: a curve\nplot(x)', outputs=[text, picture]), code('#| echo: false\nhidden_plot(x)', outputs=[picture]),
             nbformat.v4.new_markdown_cell('See [data](00_data.ipynb).')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'index.ipynb')
    assert readme(tmp_path/'index.ipynb') == '```python\nplot(x)\n```\n\n    counted\n\nSee [data](nbs/00_data.ipynb).\n'

def test_search(tab, url):
    tab.goto(url)
    tab.locator('.search-button-field:visible').first.click()
    tab.keyboard.type('group_chunks'); tab.keyboard.press('Enter')
    tab.locator('#search-results li').first.wait_for()
    assert [o for o in tab.locator('#search-results a').all() if '00_data.html' in o.get_attribute('href')]
    tab.set_viewport_size({'width': 390, 'height': 844})
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    assert not tab.faults

def test_theme_switch(tab, url):
    tab.goto(url)
    background = {}
    for theme in 'light','dark':
        set_theme(tab, theme)
        background[theme] = tab.evaluate('getComputedStyle(document.body).backgroundColor')
        tab.reload()
        assert tab.evaluate('document.documentElement.dataset.theme') == theme  # and it is kept
    assert background['light'] != background['dark']

def test_missing_page(tab, url):
    assert tab.goto(url+'no/such/page.html').status == 404
    assert 'Page not found' in tab.locator('h1:visible').inner_text()
    tab.locator('nav a:visible', has_text='Data').first.click()
    assert tab.url == url+'00_data.html'

def test_home_says_what_this_is(tab, url):
    "On the first screen: the name, what it is, the picture, how to install it"
    tab.goto(url)
    for what in 'h1', '.lead', 'main .cell_output img', 'main pre:has-text("pip install")':
        box = tab.locator(f'{what}:visible').first.bounding_box()
        assert box and box['y'] + box['height'] <= 800, what

@pytest.mark.parametrize('clicks, seen', [
    (['main a[href^="01_models.html"]'], 'table.fastprogress'),                       # the first demo
    (['main a[href="00_data.html#group-chunks"]'], '#group-chunks h3'),
    (['nav a[href="api.html"]', 'main a[href="00_data.html#streamdl"]'], '#streamdl h3'),
], ids=['demo', 'group_chunks', 'StreamDL'])
def test_three_clicks_from_home(tab, url, clicks, seen):
    tab.goto(url)
    for o in clicks:
        tab.wait_for_load_state('networkidle')  # a click would break off what is still on its way
        tab.locator(f'{o}:visible').first.click()
    tab.locator(seen).first.wait_for()
    assert len(clicks) <= 3 and not tab.faults
