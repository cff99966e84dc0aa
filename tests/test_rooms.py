"""The rooms stay readable: sizes, lines, names that stay where they belong, and imports
that go one way."""
import ast, os, re, subprocess, sys
from pathlib import Path
import nbformat, pytest
from docs.execute import notebooks as all_notebooks

root = Path(__file__).parent.parent
modules = {p.stem: p for p in sorted((root/'rnnlm').glob('*.py')) if p.stem[0] != '_'}
exported = {name: path for name,path in modules.items() if name != 'all'}
notebooks = {str(p.relative_to(root)): nbformat.read(p, as_version=4).cells
             for p in all_notebooks(root/'nbs')}
MODULE,CELL,WIDTH = 250,60,88  # lines of a module, of a code cell; characters of a line

def lines(path): return path.read_text(encoding='utf-8').splitlines()

def cells(kind):
    "The name of the notebook and the cell, for each cell of `kind`"
    return [(f'{name}, cell {c.id}', c) for name,nb in notebooks.items()
            for c in nb if c.cell_type == kind]

def none(faults): assert not faults, '\n'.join([f'{len(faults)} faults:', *faults])

def test_modules_read_in_one_sitting():
    none([f'{path.name}: {n} lines' for path in modules.values()
          if (n := len(lines(path))) > MODULE])

def test_code_cells_are_short():
    none([f'{where}: {n} lines' for where,c in cells('code')
          if (n := len(c.source.splitlines())) > CELL])

def source(path):
    "The numbered lines of a file but those that nbdev writes by itself, at the start"
    numbered = [*enumerate(lines(path), 1)]
    starts = [i for i,line in numbered if line.startswith('# %% ../nbs')]
    return numbered[starts[0]:] if starts else numbered

def test_lines_of_files_fit_the_page():
    files = [*modules.values(), root/'setup.py']
    for folder in 'docs', 'tests': files += sorted((root/folder).glob('*.py'))
    none([f'{path.relative_to(root)}, line {i}: {len(line)} characters'
          for path in files for i,line in source(path) if len(line) > WIDTH])

def test_lines_of_code_cells_fit_the_page():
    none([f'{where}: {line}' for where,c in cells('code')
          for line in c.source.splitlines()
          if len(line) > WIDTH and not line.startswith('#| fig-alt:')])

def is_too_long(line):
    "Whether a line of prose is, and could be broken: no table, HTML or address"
    if len(line) <= WIDTH or line.startswith(('|', '<')): return False
    marker = re.match(r'\s*([-*>]\s+|\d+\.\s+)?', line).end()
    return ' ' in line[marker:WIDTH+1]

def test_lines_of_prose_fit_the_page():
    none([f'{where}: {line}' for where,c in cells('markdown')
          for line in c.source.splitlines() if is_too_long(line)])

def is_private(name): return name.startswith('_') and not name.endswith('__')

def private_names(code, own=None):
    "The private names of other modules than `own` that `code` takes from this library"
    tree = ast.parse(re.sub(r'^[%!].*', '', code, flags=re.M))
    found,aliases = [],set()
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            ours = [a for a in o.names if a.name.split('.')[0] == 'rnnlm']
            aliases |= {a.asname or a.name for a in ours}
        if isinstance(o, ast.ImportFrom):
            module = (o.module or '').removeprefix('rnnlm').lstrip('.')
            of_ours = o.level or (o.module or '').split('.')[0] == 'rnnlm'
            if not of_ours or module == own: continue
            aliases |= {a.asname or a.name for a in o.names}
            found += [a.name for a in o.names if is_private(a.name)]
    taken = [o for o in ast.walk(tree) if isinstance(o, ast.Attribute)]
    return found + [ast.unparse(o) for o in taken
                    if is_private(o.attr) and ast.unparse(o.value) in aliases]

def test_private_names_stay_in_their_module():
    code = {path.name: path.read_text(encoding='utf-8') for path in modules.values()}
    faults = [f'{name}: {o}' for name,text in code.items() for o in private_names(text)]
    for name,nb in notebooks.items():
        text = '\n'.join(c.source for c in nb if c.cell_type == 'code')
        own = re.search(r'^#\| default_exp (\w+)', text, re.M)
        faults += [f'{name}: {o}' for o in private_names(text, own and own[1])]
    none(faults)

def test_private_names_are_found():
    code = '''from .plot import _a, plot_run
from rnnlm.bptt import _b
import rnnlm.text, rnnlm.core as C
from rnnlm import models
from os import _exit
rnnlm.text._c, C._d, models._e, plot_run.f, C.__name__, os._exit'''
    found = ['_a', '_b', 'rnnlm.text._c', 'C._d', 'models._e']
    assert private_names(code) == found
    assert private_names(code, own='bptt') == [o for o in found if o != '_b']

def the_map():
    "{module: its notebook}, in the order of the map in CONTRIBUTING.md"
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    section = text.split('\n## Where things are\n')[1].split('\n## ')[0]
    return dict(re.findall(r'\[`(\w+)`\]\((nbs/\w+\.ipynb)\)', section))

def test_the_map_is_complete():
    def made_from(path):
        text = path.read_text(encoding='utf-8')
        return re.search(r'File to edit: \.\./(nbs/\w+\.ipynb)', text)[1]
    assert the_map() == {name: made_from(path) for name,path in exported.items()}

def test_imports_go_one_way():
    "Each module imports those above it in the map"
    order = [*the_map()]
    faults = []
    for name in order:
        if name not in exported: continue  # `test_the_map_is_complete` says so
        for o in ast.parse(exported[name].read_text(encoding='utf-8')).body:
            if not isinstance(o, ast.ImportFrom) or not o.level: continue
            if o.module not in order[:order.index(name)]:
                faults.append(f'{name} imports {o.module}, which is not above it')
    none(faults)

SHADOWED = '''
scope = {{}}
exec('from {} import *', scope)
before = dict(scope)
exec('from {} import *', scope)
print(*[k for k,v in before.items() if k[0] != '_' and scope[k] is not v])'''

@pytest.mark.parametrize('is_first', [True, False], ids=['rnnlm first', 'rnnlm last'])
@pytest.mark.parametrize('theirs', ['basics', 'text.all', 'callback.all'])
def test_no_name_of_fastai_is_shadowed(theirs, is_first):
    "Nor is one of ours, whichever is imported first"
    order = ['rnnlm.all', f'fastai.{theirs}'][::1 if is_first else -1]
    res = subprocess.run([sys.executable, '-c', SHADOWED.format(*order)],
                         capture_output=True, text=True, env=os.environ)
    assert res.returncode == 0, res.stderr
    assert not res.stdout.split(), f'{res.stdout} mean two things'
