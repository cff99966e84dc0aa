"Build the site from the notebooks into _docs: `python -m docs.build`"
import re, shutil, sys
from pathlib import Path
import nbformat
from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx

root = Path(__file__).parent.parent
proc,site = root/'_proc',root/'_docs'
TOCTREE = '```{toctree}\n:hidden:\n\n%s\n```'

def front_matter(cell):
    "The raw cell that nbdev makes of a notebook's first lines, as a heading and a description"
    field = dict(re.findall(r'^(\w+): (.*(?:\n  .*)*)', cell.source, re.M))
    cell.source = '# {title}\n\n> {description}'.format(**{k: ' '.join(v.split()).strip("'") for k,v in field.items()})
    cell.cell_type = 'markdown'

def api_entry(cell):
    "The output of nbdev's `show_doc` as a page's own text, with a label to link to; Sphinx has no use for its source link"
    text = ''.join(o.data['text/markdown'] for o in cell.outputs)
    text = re.sub(r'^---\n\n\[source\].*\n', '', text)
    cell.source = re.sub(r'^(###+ )([\w.]+)$', lambda m: f'({m[2].lower()})=\n{m[0]}', text, count=1, flags=re.M)
    cell.cell_type = 'markdown'
    del cell['outputs'], cell['execution_count']

def prepare(path, pages):
    "Make the notebook that nbdev has processed at `path` one that Sphinx can read"
    nb = nbformat.read(path, as_version=4)
    nb.metadata.language_info = {'name': 'python', 'pygments_lexer': 'python'}
    for c in nb.cells:
        if c.cell_type == 'raw': front_matter(c)
        elif 'show_doc(' in c.source: api_entry(c)
        elif c.source.startswith('#| echo: false'): c.metadata.tags = ['remove-input']
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
        else: c.source = re.sub(r'\]\(/\w+\.html#([\w.]+)\)', r'](#\1)', c.source)  # nbdev's links, to our labels
    if path.stem == 'index': nb.cells.append(nbformat.v4.new_markdown_cell(TOCTREE % '\n'.join(pages)))
    nbformat.write(nb, path)

def main():
    "Process, prepare, render; returns Sphinx's exit code, not 0 on any warning"
    for d in proc,site: shutil.rmtree(d, ignore_errors=True)
    proc_nbs(str(root/'nbs'), n_workers=0)
    notebooks = sorted(proc.rglob('*.ipynb'))
    pages = [str(p.relative_to(proc).with_suffix('')) for p in notebooks if p.stem != 'index']
    for path in notebooks: prepare(path, pages)
    failed = sphinx(['-q', '-W', '--keep-going', '-c', str(root/'docs'), '-d', str(proc/'.doctrees'), str(proc), str(site)])
    shutil.rmtree(root/'jupyter_execute', ignore_errors=True)  # MyST-NB's, of no use without execution
    return failed

if __name__ == '__main__': sys.exit(main())
