"""The built package: its files, its metadata, and that it works without the tools that
made it."""
import email, os, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
full_name = f'rnnlm-{version("rnnlm")}'

def run(code, **env):
    "The lines that `code` prints in a new Python outside the repository"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                         cwd='/', env=os.environ | env)
    assert res.returncode == 0, res.stderr
    return res.stdout.splitlines()

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    dist = tmp_path_factory.mktemp('dist')
    build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, root]
    subprocess.run(build, check=True, capture_output=True)
    built = sorted(p.name for p in dist.iterdir())
    assert built == [f'{full_name}-py3-none-any.whl', f'{full_name}.tar.gz']
    return dist/built[0]

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "A folder into which the wheel is installed"
    folder = tmp_path_factory.mktemp('installed')
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps']
    subprocess.run([*pip, '--target', folder, wheel], check=True)
    return folder

def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = z.read(next(o for o in names if o.endswith('METADATA')))
    assert {o.split('/')[0] for o in names} == {'rnnlm', f'{full_name}.dist-info'}
    requirements = email.message_from_bytes(metadata).get_all('Requires-Dist')
    needs = [o for o in requirements if 'extra ==' not in o]
    assert any(o.startswith('fastai') for o in needs)
    assert not [o for o in needs if 'nbdev' in o or 'jupyter' in o]
    assert any(o.startswith('nbdev') and 'dev' in o for o in requirements)

def test_wheel_works_without_nbdev_and_jupyter(installed):
    lines = run("""import sys
for name in 'nbdev execnb IPython ipykernel jupyter_client nbformat'.split():
    sys.modules[name] = None
import rnnlm
from rnnlm.all import *
print(rnnlm.__file__, rnnlm.__version__)
demo(epochs=1)""", PYTHONPATH=str(installed))
    assert lines[0] == f'{installed/"rnnlm"/"__init__.py"} {version("rnnlm")}'
    assert lines[-1].startswith('one . two . three . | ')  # the counter

def test_every_command_is_there_and_tells_its_options(wheel, installed, tmp_path):
    with zipfile.ZipFile(wheel) as z:
        entries = ConfigParser(delimiters=['='])
        entries.read_string(z.read(f'{full_name}.dist-info/entry_points.txt').decode())
    commands = dict(entries['console_scripts'])
    assert {*commands} == {'rnnlm-demo', 'rnnlm-train', 'rnnlm-generate', 'rnnlm-eval'}
    env = os.environ | {'PYTHONPATH': str(installed)}
    for name,entry in commands.items():
        module,function = entry.split(':')
        script = tmp_path/name
        script.write_text(f'import sys; from {module} import {function}\n'
                          f'sys.exit({function}())')
        res = subprocess.run([sys.executable, script, '--help'], capture_output=True,
                             text=True, cwd='/', env=env)
        assert (res.returncode, res.stderr) == (0, ''), res.stderr
        assert res.stdout.startswith(f'usage: {name} ')

def test_type_checkers_read_the_annotations(installed):
    "PEP 561: without this file they take everything that is installed to be untyped"
    assert (installed/'rnnlm'/'py.typed').is_file()

def test_version_has_one_source():
    lines = (root/'settings.ini').read_text().splitlines()
    settings = dict(o.split(' = ', 1) for o in lines if ' = ' in o)
    assert run('import rnnlm; print(rnnlm.__version__)') == [settings['version']]

def test_models_import_is_light():
    heavy = 'fastai.vision', 'fastai.text', 'spacy'
    show = f'print(*[m for m in sys.modules if m.startswith({heavy})])'
    assert run(f'import sys, rnnlm.models; {show}') == ['']
    shown = run(f'import sys, fastai.text.all; {show}')[0].split()
    assert 'fastai.text.core' in shown

PUBLIC = {
    'data': 'human_numbers StreamDL group_chunks lm_seqs',
    'models': 'LMModel2 LMModel3 RNNLM',
    'callback': 'StateResetter',
    'bptt': 'TBPTT BPT3C grad_horizon truncation_bias',
    'train': 'rnn_learner numbers_learner',
    'generate': 'generate generate_iter',
    'learner': 'rnn_learner lm_loss',
    'guard': 'Diverged FitGuard guarded',
    'folder': 'load_figures load_pretrained',
    'plot': 'plot_loop plot_unrolled plot_windows plot_chunks animate_chunks '
            'plot_state color_text sort_units plot_loss_text plot_horizon plot_run',
    'all': 'TokenStream StatefulLM demo'}

def test_public_names_stay_where_they_are():
    "`from rnnlm.data import StreamDL` and its like, and all of them from rnnlm.all"
    for module,names in PUBLIC.items():
        names = names.replace(' ', ', ')
        run(f'from rnnlm.{module} import {names}; from rnnlm.all import {names}')
