"Render nbs/index.ipynb to README.md: `python -m docs.readme`"
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent

def shown(output):
    "Whether README can show `output`: no picture, not the progress bar's style sheet"
    data = output.get('data', {})
    is_picture = any(o.startswith('image/') for o in data)
    return not is_picture and '<style>' not in data.get('text/html', '')

def readme(index=root/'nbs'/'index.ipynb'):
    "The notebook `index` as Markdown for the repository's root"
    nb = nbformat.read(index, as_version=4)
    nb.metadata.language_info = {'name': 'python'}
    hidden = re.compile(r'^#\| *(hide$|echo: *false)', re.M)
    nb.cells = [c for c in nb.cells if not hidden.search(c.source)]
    for c in nb.cells:
        if c.cell_type == 'code':
            c.outputs = [o for o in c.outputs if shown(o)]
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?=[\w/]+\.ipynb)', '](nbs/', text)  # links from here
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
