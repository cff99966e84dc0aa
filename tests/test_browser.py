"The step that finds a browser for the tests of the site, or installs one."
import os, subprocess, sys
import pytest

CHROMIUM = '#!/bin/sh\nexec true\n'
APT_GET = '''#!/bin/sh
echo apt-get "$@"
case "$*" in *"install -y"*" chromium")
    printf '#!/bin/sh\\n' > {0}/chromium && /bin/chmod +x {0}/chromium;;
esac
'''
SUDO = '#!/bin/sh\nexec "$@"\n'

@pytest.fixture
def machine(tmp_path):
    "Runs `python -m docs.browser` where no other commands are there than those given"
    def run(**commands):
        for name,script in commands.items():
            path = tmp_path/name.replace('_', '-')
            path.write_text(script.format(tmp_path))
            path.chmod(0o755)
        here = dict.fromkeys(['PATH', 'PLAYWRIGHT_BROWSERS_PATH'], str(tmp_path))
        res = subprocess.run([sys.executable, '-m', 'docs.browser'], text=True,
                             env=os.environ | here, capture_output=True)
        assert res.returncode == 0, res.stdout + res.stderr
        assert res.stdout.endswith(f'The browser of the tests: {tmp_path}/chromium\n')
        return res.stdout
    return run

def test_an_installed_one_is_taken(machine):
    assert 'apt-get' not in machine(chromium=CHROMIUM, apt_get=APT_GET, sudo=SUDO)

def test_else_it_is_installed_by_apt_get(machine):
    assert 'apt-get update\n' in machine(apt_get=APT_GET, sudo=SUDO)
