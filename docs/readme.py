"Render nbs/index.ipynb to README.md: `python -m docs.readme`"
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent

def shown(output):
    "Whether README can show `output`: not a picture, and not the style sheet of fastai's progress bar"
    data = output.get('data', {})
    return not any(o.startswith('image/') for o in data) and '<style>' not in data.get('text/html', '')

def readme(index=root/'nbs'/'index.ipynb'):
    "The notebook `index` as Markdown for the repository's root"
    nb = nbformat.read(index, as_version=4)
    nb.metadata.language_info = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not re.search(r'^#\| *(hide$|echo: *false)', c.source, re.M)]
    for c in nb.cells:
        if c.cell_type == 'code':
            c.outputs = [o for o in c.outputs if shown(o)]
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?=[\w/]+\.ipynb)', '](nbs/', text)  # links from nbs/ become links from here
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
