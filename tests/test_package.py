"The built package: its files, its metadata, and that it works without the tools that made it."
import email, os, subprocess, sys, zipfile
from importlib.metadata import version
from pathlib import Path
import pytest

root = Path(__file__).parent.parent

def run(code, **env):
    "The lines that `code` prints in a new Python outside the repository"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/', env=os.environ | env)
    assert res.returncode == 0, res.stderr
    return res.stdout.splitlines()

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    dist = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, root], check=True, capture_output=True)
    assert sorted(p.name for p in dist.iterdir()) == [f'rnnlm-{version("rnnlm")}-py3-none-any.whl', f'rnnlm-{version("rnnlm")}.tar.gz']
    return next(dist.glob('*.whl'))

def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        meta = email.message_from_bytes(z.read(next(o for o in names if o.endswith('METADATA'))))
    assert {o.split('/')[0] for o in names} == {'rnnlm', f'rnnlm-{version("rnnlm")}.dist-info'}
    needs = [o for o in meta.get_all('Requires-Dist') if 'extra ==' not in o]
    assert any(o.startswith('fastai') for o in needs)
    assert not [o for o in needs if 'nbdev' in o or 'jupyter' in o]
    assert any(o.startswith('nbdev') and 'dev' in o for o in meta.get_all('Requires-Dist'))

def test_wheel_works_without_nbdev_and_jupyter(wheel, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path, wheel], check=True)
    lines = run("import sys\n"
                "for name in 'nbdev', 'execnb', 'IPython', 'ipykernel', 'jupyter_client', 'nbformat': sys.modules[name] = None\n"
                "import rnnlm; from rnnlm.all import *; print(rnnlm.__file__, rnnlm.__version__); demo(epochs=1)",
                PYTHONPATH=str(tmp_path))
    assert lines[0] == f'{tmp_path/"rnnlm"/"__init__.py"} {version("rnnlm")}'
    assert lines[-1].startswith('one . two . three . | ')

def test_version_has_one_source():
    settings = dict(o.split(' = ', 1) for o in (root/'settings.ini').read_text().splitlines() if ' = ' in o)
    assert run('import rnnlm; print(rnnlm.__version__)') == [settings['version']]

def test_models_import_is_light():
    show = "print(*[m for m in sys.modules if m.startswith(('fastai.vision', 'fastai.text', 'spacy'))])"
    assert run(f'import sys, rnnlm.models; {show}') == ['']
    assert 'fastai.text.core' in run(f'import sys, fastai.text.all; {show}')[0].split()  # what it would show

def test_all_brings_the_public_names():
    names = ('human_numbers TokenStream lm_seqs group_chunks LMModel2 LMModel3 RNNLM StateResetter TBPTT BPT3C grad_horizon numbers_learner demo '
             'plot_loop plot_unrolled plot_windows plot_chunks animate_chunks plot_state color_text sort_units plot_loss_text plot_horizon plot_run')
    run(f'from rnnlm.all import *; {names.replace(" ", ", ")}')
