"""The site, in a browser with no other host within reach: it loads, its links lead
somewhere, search and themes work, it fits a phone, all can read it.

`python -m docs.browser` installs the browser; axe-core comes with a Python package."""
import functools, os, re, subprocess, sys, threading
from base64 import b64encode
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import nbformat, pytest
from bs4 import BeautifulSoup
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import sync_playwright
from docs.browser import find
from docs.build import sections
from docs.execute import notebooks
from docs.readme import readme

root = Path(__file__).parent.parent
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update',
         '--disable-sync']
MINUTE = 60_000  # in milliseconds; a browser beside heavy processes takes its time

class Handler(SimpleHTTPRequestHandler):
    """Serves the site as GitHub Pages does: under the repository's name, with 404.html
    for what is not there"""
    def translate_path(self, path):
        return super().translate_path(path.removeprefix('/rnnlm'))
    def send_error(self, code, *args, **kwargs):
        body = Path(self.directory, '404.html').read_bytes()
        self.send_response(code)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the site, built as the workflow does, once for all processes"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent  # of all processes
    with FileLock(shared/'site.lock'):
        if not (shared/'site-is-built').exists():
            res = subprocess.run([sys.executable, '-m', 'docs.build'], cwd=root,
                                 env=os.environ | {'GITHUB_REPOSITORY': 'owner/rnnlm'},
                                 capture_output=True, text=True)
            assert res.returncode == 0, res.stdout + res.stderr
            (shared/'site-is-built').touch()
    return root/'_docs'

@pytest.fixture(scope='session')
def url(site):
    handler = functools.partial(Handler, directory=str(site))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/rnnlm/'
    server.shutdown()

@pytest.fixture(scope='session')
def browser():
    path = find()
    if not path:
        pytest.fail('no browser found: run python -m docs.browser', pytrace=False)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS, timeout=10*MINUTE)
        yield browser
        browser.close()

@pytest.fixture(scope='session')
def pages(site):
    "{page: its HTML, parsed}, of all pages"
    return {str(p.relative_to(site)): BeautifulSoup(p.read_text('utf-8'), 'html.parser')
            for p in sorted(site.rglob('*.html')) if '_static' not in p.parts}

@pytest.fixture
def tab(browser, url):
    "A page that reaches the site alone, and records in `.faults` what goes wrong"
    page = browser.new_page(viewport={'width': 1280, 'height': 800},
                            reduced_motion='reduce')
    page.set_default_timeout(2*MINUTE)
    page.faults = []
    def request(route):
        if route.request.url.startswith((url, 'data:')): return route.continue_()
        page.faults.append(f'asks for {route.request.url}')
        route.abort()
    def failed(r): page.faults.append(f'{r.url}: {r.failure}')
    def answered(r):
        if r.status >= 400: page.faults.append(f'{r.url}: {r.status}')
    def printed(m):
        if m.type == 'error': page.faults.append(m.text)
    page.route('**/*', request)
    page.on('console', printed)
    page.on('pageerror', lambda e: page.faults.append(str(e)))
    page.on('requestfailed', failed)
    page.on('response', answered)
    yield page
    page.close()

def set_theme(tab, theme):
    tab.locator('.theme-switch-button:visible').click()
    tab.locator(f'.theme-change-button[data-mode={theme}]:visible').click()

RULES = {'light': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'],
         'dark': ['color-contrast']}  # all but the colours is the same
NO_MOTION = '* { transition: none !important } .tooltip { display: none !important }'
CUT_OFF = """[...document.querySelectorAll(".cell_input pre")]
    .filter(o => o.scrollWidth > o.clientWidth).map(o => o.innerText.slice(0, 60))"""
AXE = """([exclude, runOnly]) =>
    axe.run({exclude}, {resultTypes: ["violations"], runOnly, preload: false})"""

def violations(tab, page):
    "What axe-core finds on the open page, in both themes, that is serious"
    tab.add_script_tag(path=files('axe_playwright_python')/'axe.min.js')
    tab.add_style_tag(content=NO_MOTION)  # no colour half way
    # code is coloured alike everywhere, and it takes the most time: on two pages
    look_at_code = page in ('01_models.html', 'source/rnnlm.data.html')
    res = []
    for theme,rules in RULES.items():
        set_theme(tab, theme)
        found = tab.evaluate(AXE, [[] if look_at_code else ['.highlight pre'], rules])
        res += [f'{theme}: {v["id"]}: {n["html"][:200]} {n["failureSummary"][:300]}'
                for v in found['violations'] if v['impact'] in ('serious', 'critical')
                for n in v['nodes']]
    return res

def test_pages_load_fit_a_phone_and_are_accessible(pages, tab, url):
    faults = []
    for page in pages:
        tab.faults.clear()
        tab.set_viewport_size({'width': 1280, 'height': 800})
        tab.goto(url+page)
        tab.faults += violations(tab, page)
        cut = tab.evaluate(CUT_OFF)
        tab.faults += [f'code is cut off: {line}' for line in cut]
        tab.set_viewport_size({'width': 390, 'height': 844})
        width = tab.evaluate('document.documentElement.scrollWidth')
        if width > 390: tab.faults.append(f'{width} px wide on a phone')
        faults += [f'{page}: {o}' for o in tab.faults]
    assert not faults, '\n'.join(faults[:20])

def fault_of_link(tag, name, anchors, site):
    "What is wrong with where the tag of the page `name` leads, None if all is well"
    target = tag.get('href') or tag.get('src')
    if not target or target.startswith(('data:', 'mailto:')): return
    if tag.get('rel') == ['canonical']: return
    full,anchor = urldefrag(urljoin(f'https://owner.github.io/rnnlm/{name}', target))
    if not full.startswith('https://owner.github.io/'):
        return None if tag.name == 'a' else f'{name} loads {target}'
    path = unquote(urlsplit(full).path).removeprefix('/rnnlm/') or 'index.html'
    if not (site/path).is_file(): return f'{name}: no file for {target}'
    if anchor and path in anchors and unquote(anchor) not in anchors[path]:
        return f'{name}: no anchor for {target}'

def test_links_lead_somewhere(pages, site):
    """To a file of the site, and to an anchor in it; and nothing that a page loads lies
    elsewhere"""
    def named(page, key): return {o[key] for o in page.find_all(attrs={key: True})}
    anchors = {name: named(page, 'id') | named(page, 'name')
               for name,page in pages.items()}
    tags = ['a', 'area', 'img', 'script', 'link', 'source', 'iframe']
    faults = [fault_of_link(tag, name, anchors, site)
              for name,page in pages.items() for tag in page.find_all(tags)]
    faults = [o for o in faults if o]
    assert not faults, '\n'.join(faults[:20])

def test_titles_descriptions_and_alt_texts(pages):
    titles = [page.title.text for page in pages.values()]
    assert len({*titles}) == len(titles)
    for name,page in pages.items():
        assert page.html['lang'] == 'en'
        headings = len(page.find_all('h1')) - len(page.select('.onlyprint h1'))
        assert headings == 1, name
        if not name.startswith(('search', '404', 'source')):
            description = page.find('meta', attrs={'name': 'description'})
            assert description['content'].strip(), name
        alts = [o.get('alt') for o in page.find_all('img')]
        assert None not in alts, name
        for alt in [o['alt'] for o in page.select('main img')]:
            assert alt.strip() and not alt.startswith(('../', '_images')), name

def test_notebooks_can_be_had(pages, site):
    """Each page has the links to its notebook: to take away, and to run in Colab; and
    the copy installs rnnlm first"""
    on_colab = 'https://colab.research.google.com/github/owner/rnnlm/blob/gh-pages'
    paths = notebooks(root/'nbs')
    assert len(paths) > 9
    for path in paths:
        nb = path.relative_to(root/'nbs').with_suffix('')
        colab,copy = pages[f'{nb}.html'].select('.notebook-links a')
        assert colab['href'] == f'{on_colab}/notebooks/{nb}.ipynb'
        cells = nbformat.read(site/nb.parent/copy['href'], as_version=4).cells
        assert 'pip install -q git+https://github.com/owner/rnnlm' in cells[0].source
        for c in cells:  # its links lead to the site
            assert not re.search(r'\]\((?!https?:)[^)]*\.ipynb', c.source)
        code = [c.source for c in cells[1:] if c.cell_type == 'code']
        original = nbformat.read(path, as_version=4).cells
        assert code == [c.source for c in original if c.cell_type == 'code']

def test_api_lists_every_public_name(pages):
    "With its summary; and each entry has its signature and its source"
    import rnnlm.all
    entries = {o.code.text: o for o in pages['api.html'].select('main dt')}
    public = {n for n,o in vars(rnnlm.all).items()
              if getattr(o, '__module__', '').startswith('rnnlm.') and n[0] != '_'}
    assert public and not public - {*entries}
    assert not [n for n,o in entries.items() if not o.find_next('dd').text.strip()]
    page,_,anchor = entries['StreamDL'].a['href'].partition('#')
    entry = pages[page].find(id=anchor)
    source = entry.select_one('a.source-link')['href']
    assert re.match(r'source/rnnlm\.\w+\.html#L-\d+$', source)
    assert [o.text for o in entry.select('table th')][-1] == 'Details'
    assert 'bs' in entry.select_one('table tbody').text

def test_files_beside_the_pages(site, pages):
    assert (site/'.nojekyll').exists()
    sitemap = (site/'sitemap.xml').read_text()
    llms = (site/'llms.txt').read_text(encoding='utf-8')
    for name in pages:
        if name.startswith(('search', '404', 'source', 'index')): continue
        address = f'https://owner.github.io/rnnlm/{name}'
        assert address in sitemap and address in llms

def test_every_page_has_a_section():
    library = sections(['06_train', '00_data', 'api', '00b_text', '06a_cli'])['Library']
    assert library == ['00b_text', '06_train', '06a_cli']
    with pytest.raises(ValueError, match='99_new must be in a section'):
        sections(['00_data', '99_new'])

def test_readme_shows_what_it_can(tmp_path):
    text = new_output('stream', text='counted')
    data = {'image/png': b64encode(b'drawn').decode(), 'text/plain': '<Figure>'}
    picture = new_output('display_data', data)
    cells = [new_code_cell('#| fig-alt: a curve\nplot(x)', outputs=[text, picture]),
             new_code_cell('#| echo: false\n#| fig-alt: lines\nhidden_plot(x)',
                           outputs=[picture]),
             new_code_cell('#| hide\ntest(x)', outputs=[text]),
             new_markdown_cell('See [data](00_data.ipynb).')]
    nbformat.write(new_notebook(cells=cells), tmp_path/'index.ipynb')
    shown = ('```python\nplot(x)\n```\n\n    counted\n\n![lines](docs/readme.png)\n\n'
             'See [data](nbs/00_data.ipynb).\n')
    assert readme(tmp_path/'index.ipynb') == (shown, b'drawn')

def test_search(tab, url):
    tab.goto(url)
    tab.locator('.search-button-field:visible').first.click()
    tab.keyboard.type('group_chunks')
    tab.keyboard.press('Enter')
    tab.locator('#search-results a[href*="00_data.html"]').first.wait_for()
    tab.set_viewport_size({'width': 390, 'height': 844})
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    assert not tab.faults

def test_theme_switch(tab, url):
    tab.goto(url)
    background = {}
    for theme in 'light','dark':
        set_theme(tab, theme)
        color = tab.evaluate('getComputedStyle(document.body).backgroundColor')
        background[theme] = color
        tab.reload()
        kept = tab.evaluate('document.documentElement.dataset.theme')
        assert kept == theme
    assert background['light'] != background['dark']

def test_missing_page(tab, url):
    assert tab.goto(url+'no/such/page.html').status == 404
    assert 'Page not found' in tab.locator('h1:visible').inner_text()
    tab.locator('nav a:visible', has_text='Data').first.click()
    tab.wait_for_url(url+'00_data.html')

def test_home_says_what_this_is(tab, url):
    "On the first screen: the name, what it is, the picture, how to install it"
    tab.goto(url)
    tab.wait_for_load_state('networkidle')
    install = 'main pre:has-text("pip install")'
    for what in 'h1', '.lead', 'main .cell_output img', install:
        box = tab.locator(f'{what}:visible').first.bounding_box()
        assert box and box['y'] + box['height'] <= 800, what

CLICKS = {  # from home, and what is seen then
    'demo': (['main a[href^="01_models.html"]'], 'table.fastprogress'),
    'group_chunks': (['main a[href="00_data.html#group-chunks"]'], '#group-chunks h3'),
    'StreamDL': (['nav a[href="api.html"]', 'main dt a[href$="#streamdl"]'],
                 '#streamdl h3')}

@pytest.mark.parametrize('clicks, seen', CLICKS.values(), ids=CLICKS.keys())
def test_three_clicks_from_home(tab, url, clicks, seen):
    tab.goto(url)
    for o in clicks:
        tab.wait_for_load_state('networkidle')  # a click breaks off what is on its way
        tab.locator(f'{o}:visible').first.click()
    tab.locator(seen).first.wait_for()
    assert len(clicks) <= 3 and not tab.faults
