"Every notebook runs from top to bottom in a fresh kernel, and is committed with its outputs."
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient

nbs = Path(__file__).parent.parent/'nbs'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

@pytest.mark.parametrize('path', notebooks, ids=lambda p: str(p.relative_to(nbs)))
def test_runs(path):
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()

@pytest.mark.parametrize('path', notebooks, ids=lambda p: str(p.relative_to(nbs)))
def test_committed_outputs(path):
    "The committed notebook was executed, without a warning or an error"
    outputs = [o for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code' for o in c.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == 'error' or o.get('name') == 'stderr']
