"""Every notebook runs from top to bottom in a fresh kernel, and is committed as it was
executed."""
import re
from pathlib import Path
import nbformat, pytest
from docs.execute import fingerprint, notebooks as all_notebooks, run

nbs = Path(__file__).parent.parent/'nbs'
# the longest first, so that no process has to wait for it alone
notebooks = sorted(all_notebooks(nbs), key=lambda p: (p.stem != '03_bptt', p))

def read(path): return nbformat.read(path, as_version=4)
def each(paths=notebooks):
    "Run a test for each of the notebooks"
    names = [str(p.relative_to(nbs)) for p in paths]
    return pytest.mark.parametrize('path', paths, ids=names)

@each()
def test_runs(path): run(read(path), path.parent)

@each()
def test_committed_outputs(path):
    "The committed notebook was executed, without a warning or an error"
    outputs = [o for c in read(path).cells for o in c.get('outputs', [])]
    assert outputs
    assert 'error' not in [o.output_type for o in outputs]
    assert 'stderr' not in [o.get('name') for o in outputs]

@each()
def test_executed_as_it_is(path):
    "No code cell was edited since the notebook was executed"
    nb = read(path)
    command = f'python -m docs.execute {path.relative_to(nbs.parent)}'
    as_it_is = nb.metadata.get('executed') == fingerprint(nb)
    assert as_it_is, f'code was edited since it was executed: run `{command}`'

@each()
def test_figures_described(path):
    "Each figure has its alternative text, in a line of its cell that the site reads"
    for c in read(path).cells:
        kinds = [kind for o in c.get('outputs', []) for kind in o.get('data', {})]
        if not any(kind.startswith('image/') for kind in kinds): continue
        described = re.search(r'^#\| fig-alt: \S.{20,}$', c.source, re.M)
        assert described, f'no fig-alt in cell {c.id}:\n{c.source[:200]}'

pages = [p for p in notebooks if p.parent == nbs and p.stem != 'index']

@each(pages)
def test_questions(path):
    "Each page ends with questions, as many folded answers, and what to try next"
    prose = [c.source for c in read(path).cells if c.cell_type == 'markdown']
    sections = re.split(r'^## ', '\n\n'.join(prose), flags=re.M)[1:]
    parts = dict(o.partition('\n')[::2] for o in sections)
    assert [*parts][-2:] == ['Questions', 'Try next']
    questions = parts['Questions']
    asked = re.findall(r'^\*\*(\d+)\.\*\* \S', questions, re.M)
    assert asked == [str(i+1) for i in range(len(asked))] and len(asked) >= 2
    folded = r'\n\n<details><summary>Answer</summary>\n\n\S.*?\n\n</details>'
    answered = re.findall(folded, questions, re.S)
    assert len(answered) == len(asked)
    assert questions.count('<details>') == questions.count('</details>') == len(asked)
    assert re.search(r'\]\([\w/.]+\.ipynb', parts['Try next'])
