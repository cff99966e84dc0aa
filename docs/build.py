"Build the site from the notebooks into _docs: `python -m docs.build`"
import ast, re, shutil, sys
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urljoin
import nbformat, yaml
from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx
from docs import base_url, repo
from docs.api import api_page, entry, link_names, source_pages

root = Path(__file__).parent.parent
nbs,proc,site = root/'nbs',root/'_proc',root/'_docs'
# The sidebar: each caption with the pages under it, in the order of the patterns, then
# of their names
SECTIONS = {
    'The ladder of ideas': '0[0-4]_* 01e_* 01f_* 05_*',
    'Library': '0[0-5][a-z]_* 06_* 06[a-z]_* 07[a-z]_* 08*',
    'API': 'api',
    'Tutorials': 'tutorials/your_text tutorials/hugging_face tutorials/truncation* '
                 'tutorials/reading* tutorials/float_series tutorials/*',
    'Benchmarks': 'benchmarks/*',
}
TOCTREE = '```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```'

def sections(pages):
    "{caption: its pages in reading order}; a page stands where it is found first"
    left,res = sorted(pages),{}
    for caption,globs in SECTIONS.items():
        found = [p for pattern in globs.split() for p in left if fnmatch(p, pattern)]
        res[caption] = [*dict.fromkeys(found)]
        left = [p for p in left if p not in found]
    if not left: return res
    raise ValueError(f"{left[0]} must be in a section of the site, see SECTIONS in "
                     "docs/build.py")

def links(page):
    "Where to get the notebook of `page` and where to run it, as buttons"
    file = f'{"../"*page.count("/")}notebooks/{page}.ipynb'
    res = f'<a href="{file}" download>Download notebook</a>'
    if repo:
        colab = 'https://colab.research.google.com/github'
        file = f'{colab}/{repo}/blob/gh-pages/notebooks/{page}.ipynb'
        res = f'<a href="{file}">Open in Colab</a> {res}'
    return f'<p class="notebook-links">{res}</p>'

def top(title, description, page=None):
    "The first lines of a page"
    return f'# {title}\n\n{{.lead}}\n{description}\n\n' + (links(page) if page else '')

def is_style(output):
    "Whether `output` is the style sheet of fastai's progress bar"
    html = output.get('data', {}).get('text/html', '')
    return html.lstrip().startswith('<style>\n    progress')

def prepare_code(c):
    """What the `#|` lines of a code cell say becomes what MyST-NB understands; of the
    outputs, what a page can show"""
    says = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*)', c.source, re.M))
    c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    is_hidden = says.get('echo') == 'false' or not c.source.strip()
    if is_hidden: c.metadata.tags = ['remove-input']
    alt = says.get('fig-alt', '').strip('"')
    if alt: c.metadata.mystnb = {'image': {'alt': alt}}
    c.outputs = [o for o in c.outputs if not is_style(o)]

def only_imports(source):
    "Is `source` nothing but imports, and the number of threads?"
    try: statements = ast.parse(source).body
    except SyntaxError: return False  # a magic
    def is_setup(o):
        is_import = isinstance(o, (ast.Import, ast.ImportFrom))
        return is_import or ast.unparse(o).startswith('torch.set_num_threads(')
    return bool(statements) and all(map(is_setup, statements))

def to_markdown(c, source):
    "Make the code cell `c` one of prose"
    c.cell_type,c.source = 'markdown',source
    del c['outputs'], c['execution_count']

def fold_imports(c):
    "A cell of nothing but imports, to unfold"
    code = f'```python\n{c.source}\n```'
    to_markdown(c, f'<details><summary>Imports</summary>\n\n{code}\n\n</details>')

def show_names(nb):
    """The `show_doc(name)` that nbdev puts after each exported definition, as the entry
    of the name; special methods, as `__repr__`, have none"""
    special = re.compile(r'^show_doc\(\w+\.__', re.M)
    nb.cells = [c for c in nb.cells if not special.search(c.source)]
    for c in nb.cells:
        m = re.search(r'^show_doc\(([\w.]+)\)', c.source, re.M)
        if m and c.cell_type == 'code': to_markdown(c, entry(m[1]))

def prepare(nb, page):
    """Make a notebook that nbdev has processed one that Sphinx can read; returns its
    title and description"""
    for c in nb.cells:
        if c.cell_type == 'raw':  # nbdev's, of the notebook's first lines
            front = next(yaml.safe_load_all(c.source))
            c.cell_type = 'markdown'
            c.source = top(front['title'], front['description'], page)
        if c.cell_type == 'code':
            prepare_code(c)
            is_folded = page != 'index' and not c.outputs and only_imports(c.source)
            if is_folded: fold_imports(c)
        else: c.source = link_names(c.source)
    description = re.sub(r'[`*]', '', front['description'])
    nb.metadata = nbformat.from_dict({
        'language_info': {'name': 'python', 'pygments_lexer': 'python'},
        'myst': {'html_meta': {'description': description}}})
    return front['title'],description

def toctree(contents):
    "The sidebar, a hidden cell at the end of the home page"
    parts = {'Start': ['Home <self>']} | contents
    toc = [TOCTREE % (k, '\n'.join(pages)) for k,pages in parts.items() if pages]
    return nbformat.v4.new_markdown_cell('\n\n'.join(toc))

def install_line(nb):
    "What the copy of a notebook installs: rnnlm, and what else its cells import"
    if not repo: return '# in a clone of the repository: pip install .'
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root/'settings.ini')
    known = re.findall(r'[\w-]+', config['DEFAULT']['dev_requirements'])
    code = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code')
    imports = '\n'.join(re.findall(r'^(?:from|import) .*', code, re.M))
    extra = [o for o in known if re.search(rf'\b{o}\b', imports)]
    return ' '.join(['%pip install -q', f'git+https://github.com/{repo}', *extra])

def download(page):
    "Copy the notebook of `page` to the site, its first cell installing what it needs"
    nb = nbformat.read(nbs/f'{page}.ipynb', as_version=4)
    nb.cells.insert(0, nbformat.v4.new_code_cell(install_line(nb)))
    if base_url:  # a copy stands alone: its links lead to the site
        def to_site(m): return f']({urljoin(base_url+page, m[1])}.html{m[2] or ""})'
        to_notebook = r'\]\((?!\w+:)([\w./-]+)\.ipynb(#[^)]*)?\)'
        for c in nb.cells: c.source = re.sub(to_notebook, to_site, c.source)
    dst = site/'notebooks'/f'{page}.ipynb'
    dst.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, dst)

def llms_txt(contents, about):
    "The pages with their descriptions, for a reader without a screen"
    title,description = about['index']
    res = [f'# {title}\n\n> {description}']
    for caption,pages in contents.items():
        if not pages: continue
        lines = [f'## {caption}\n']
        for p in pages:
            title,description = about[p]
            lines.append(f'- [{title}]({base_url}{p}.html): {description}')
        res.append('\n'.join(lines))
    (site/'llms.txt').write_text('\n\n'.join(res) + '\n', encoding='utf-8')

def processed():
    "{page: the notebook as nbdev has processed it}"
    proc_nbs(str(nbs), n_workers=0)
    return {str(p.relative_to(proc).with_suffix('')): nbformat.read(p, as_version=4)
            for p in sorted(proc.rglob('*.ipynb'))}

def main():
    "Process, prepare, render; returns Sphinx's exit code, not 0 on any warning"
    for d in proc,site: shutil.rmtree(d, ignore_errors=True)
    if not repo:
        print('GITHUB_REPOSITORY=owner/name is not set: no links to Colab, no sitemap')
    notebooks = processed()
    for nb in notebooks.values(): show_names(nb)
    about = {page: prepare(nb, page) for page,nb in notebooks.items()}
    about['api'] = 'Names by module',api_page(proc, root/'rnnlm', top)
    source_pages(root/'rnnlm', proc/'source')
    contents = sections([p for p in about if p != 'index'])
    notebooks['index'].cells.append(toctree(contents))
    for page,nb in notebooks.items(): nbformat.write(nb, proc/f'{page}.ipynb')
    options = ['-q', '-W', '--keep-going', '-c', root/'docs', '-d', proc/'.doctrees']
    failed = sphinx([str(o) for o in (*options, proc, site)])
    for page in notebooks: download(page)
    llms_txt(contents, about)
    shutil.rmtree(root/'jupyter_execute', ignore_errors=True)  # MyST-NB's, not used
    return failed

if __name__ == '__main__': sys.exit(main())
