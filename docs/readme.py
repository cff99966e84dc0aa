"Render nbs/index.ipynb to README.md: `python -m docs.readme`"
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent

def readme(index=root/'nbs'/'index.ipynb'):
    "The notebook `index` as Markdown for the repository's root"
    nb = nbformat.read(index, as_version=4)
    nb.metadata.language_info = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    for c in nb.cells:  # a page can't take the style sheet of fastai's progress bar
        if c.cell_type == 'code': c.outputs = [o for o in c.outputs if '<style>' not in o.get('data', {}).get('text/html', '')]
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?=[\w/]+\.ipynb)', '](nbs/', text)  # links from nbs/ become links from here
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
