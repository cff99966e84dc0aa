"Render nbs/index.ipynb to README.md and its picture: `python -m docs.readme`"
import re
from base64 import b64decode
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
PICTURE = 'docs/readme.png'  # what the hidden cell of the home page draws

def shown(output):
    "Whether README can show `output`: no picture, not the progress bar's style sheet"
    data = output.get('data', {})
    is_picture = any(o.startswith('image/') for o in data)
    return not is_picture and '<style>' not in data.get('text/html', '')

def as_picture(c):
    "Make the code cell `c` the link to its picture; returns the bytes of that"
    alt = re.search(r'^#\| *fig-alt: *(.*)', c.source, re.M)[1]
    png, = [o.data['image/png'] for o in c.outputs if 'image/png' in o.get('data', {})]
    c.cell_type,c.source = 'markdown',f'![{alt}]({PICTURE})'
    del c['outputs'], c['execution_count']
    return b64decode(png)

def readme(index=root/'nbs'/'index.ipynb'):
    """The notebook `index` as Markdown for the repository's root, and the bytes of the
    one picture that a cell without its code (`echo: false`) draws"""
    nb = nbformat.read(index, as_version=4)
    nb.metadata.language_info = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not re.search(r'^#\| *hide$', c.source, re.M)]
    picture = None
    for c in nb.cells:
        if re.search(r'^#\| *echo: *false', c.source, re.M): picture = as_picture(c)
        if c.cell_type != 'code': continue
        c.outputs = [o for o in c.outputs if shown(o)]
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?=[\w/]+\.ipynb)', '](nbs/', text)  # links from here
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n',picture

def main():
    text,picture = readme()
    (root/'README.md').write_text(text, encoding='utf-8')
    (root/PICTURE).write_bytes(picture)

if __name__ == '__main__': main()
