"""Execute notebooks, clean them, and record what was executed:
`python -m docs.execute nbs/x.ipynb ...`"""
import hashlib, json, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

def notebooks(folder):
    "The paths of the notebooks below `folder`, without Jupyter's checkpoints"
    found = sorted(folder.rglob('*.ipynb'))
    return [p for p in found if '.ipynb_checkpoints' not in p.parts]

def run(nb, folder):
    "Execute the notebook `nb` from top to bottom in a fresh kernel, in `folder`"
    NotebookClient(nb, timeout=None, kernel_name='python3', coalesce_streams=True,
                   resources={'metadata': {'path': str(folder)}}).execute()

def fingerprint(nb):
    "A hash of the code cells of `nb`; the notebook keeps the one it was executed with"
    sources = [c.source for c in nb.cells if c.cell_type == 'code']
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()

def execute(path):
    "Execute the notebook at `path`; it stays as it was if a cell fails"
    nb = nbformat.read(path, as_version=4)
    run(nb, Path(path).parent)
    nb.metadata.executed = fingerprint(nb)
    nbformat.write(nb, path)
    nbdev_clean(str(path))

if __name__ == '__main__':
    for path in sys.argv[1:]:
        print(path)
        execute(path)
