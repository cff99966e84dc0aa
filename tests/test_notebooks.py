"Every notebook runs from top to bottom in a fresh kernel, and is committed with its outputs."
import re
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient

nbs = Path(__file__).parent.parent/'nbs'
notebooks = sorted((p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts),
                   key=lambda p: (p.stem != '03_bptt', p))  # the longest first, so that no process has to wait for it alone

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

@pytest.mark.parametrize('path', notebooks, ids=lambda p: str(p.relative_to(nbs)))
def test_figures_described(path):
    "Each figure has its alternative text, in a line of its cell that the site's build reads"
    for c in nbformat.read(path, as_version=4).cells:
        if any(kind.startswith('image/') for o in c.get('outputs', []) for kind in o.get('data', {})):
            assert re.search(r'^#\| fig-alt: \S.{20,}$', c.source, re.M), f'no fig-alt in cell {c.id}:\n{c.source[:200]}'

pages = [p for p in notebooks if p.parent == nbs and p.stem != 'index']  # the ladder of ideas and the library

@pytest.mark.parametrize('path', pages, ids=lambda p: p.stem)
def test_questions(path):
    "Each page ends with questions, as many folded answers, and what to try next"
    text = '\n\n'.join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'markdown')
    parts = dict(o.partition('\n')[::2] for o in re.split(r'^## ', text, flags=re.M)[1:])
    assert [*parts][-2:] == ['Questions', 'Try next']
    asked = re.findall(r'^\*\*(\d+)\.\*\* \S', parts['Questions'], re.M)
    answered = re.findall(r'\n\n<details><summary>Answer</summary>\n\n\S.*?\n\n</details>', parts['Questions'], re.S)
    assert asked == [str(i+1) for i in range(len(asked))] and len(asked) >= 2
    assert len(answered) == len(asked) == parts['Questions'].count('<details>') == parts['Questions'].count('</details>')
    assert re.search(r'\]\([\w/.]+\.ipynb', parts['Try next'])
