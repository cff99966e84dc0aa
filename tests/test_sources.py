"""What is made from the notebooks is made from these: the modules, the README; and they
are clean."""
import shutil, subprocess, sys
from pathlib import Path
import pytest
from docs.execute import notebooks
from docs.readme import PICTURE, readme

root = Path(__file__).parent.parent

def files(folder):
    "{path: bytes} of the notebooks and modules in `folder`"
    paths = [*folder.glob('rnnlm/*.py'), *notebooks(folder/'nbs')]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}

@pytest.fixture
def copy(tmp_path):
    "The notebooks and modules in a folder of their own: other tests read the checkout"
    for path,content in files(root).items():
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/path).write_bytes(content)
    for name in 'pyproject.toml', 'settings.ini', 'setup.py':
        shutil.copy(root/name, tmp_path)
    return tmp_path

@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_leaves_every_file_as_it_is(command, copy):
    before = files(copy)
    script = Path(sys.executable).with_name(command)
    subprocess.run([script], cwd=copy, check=True)
    after = files(copy)
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    assert not changed, f'run `{command}`, and commit what it writes'

def test_readme_is_that_of_the_notebook():
    text,picture = readme()
    is_fresh = (root/'README.md').read_text(encoding='utf-8') == text
    assert is_fresh and (root/PICTURE).read_bytes() == picture, \
        'run `python -m docs.readme`, and commit what it writes'
