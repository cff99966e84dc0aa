"The main job: what it prints, what it saves, and how it ends when it is stopped."
import os, re, signal, subprocess, sys
from pathlib import Path
import pytest
from fastcore.script import CliError
from rnnlm.cli import demo
from rnnlm.folder import load_figures, load_pretrained
from rnnlm.lm import RNNLM
from rnnlm.models import LMModel2

script = [str(Path(sys.executable).with_name('rnnlm-demo'))]
module = [sys.executable, '-m', 'rnnlm']
env = os.environ | {'PYTHONUNBUFFERED': '1'}

def run(*args, command=script):
    return subprocess.run([*command, *args], capture_output=True, text=True, env=env)

@pytest.mark.parametrize('command', [script, module], ids=['rnnlm-demo', '-m rnnlm'])
def test_demo(command, tmp_path):
    folder = tmp_path/'new'
    options = '--epochs 2 --n-hidden 16 --bs 32 --lr 0.01 --seed 1'.split()
    res = run(*options, '--save', str(folder), command=command)
    assert res.returncode == 0, res.stderr
    lines = [o.split() for o in res.stdout.splitlines()]
    header = 'model epochs train loss valid loss perplexity accuracy seconds'.split()
    assert header in lines
    rows = [o for o in lines if len(o) == 7 and o[0].startswith('LMModel')]
    assert [o[:2] for o in rows] == [['LMModel2', '2'], ['LMModel3', '2']]
    assert "most common token, 'thousand': 0.15" in res.stdout
    assert 'one . two . three . | ' in res.stdout
    assert sorted(p.name for p in folder.iterdir()) == ['LMModel2', 'LMModel3', 'RNNLM']
    model,stream = load_pretrained(folder/'LMModel2')
    assert (type(model), model.vocab_sz, len(stream.vocab)) == (LMModel2, 30, 30)
    assert type(load_pretrained(folder/'RNNLM')[0]) is RNNLM
    assert f"{load_figures(folder/'LMModel2')['accuracy']:.3f}" in rows[0]

def test_same_seed_same_result():
    options = '--epochs', '1', '--n-hidden', '8', '--seed'
    a,b,c = (run(*options, seed).stdout.split('goes on:')[1] for seed in '112')
    assert a == b != c

@pytest.mark.parametrize('options,message', [
    (dict(bs=0), 'bs must be from 1 to 4207'),
    (dict(bs=99999), 'bs must be from 1 to 4207'),
    (dict(epochs=0), 'epochs must be at least 1'),
    (dict(n_hidden=-1), 'n_hidden must be at least 1'),
    (dict(n_hidden=10**9), 'n_hidden must be at most 10000'),
    (dict(seed=10**20), 'seed must be from 0'),
    (dict(lr=float('inf')), 'lr must be above 0 and finite, got inf'),
    (dict(save=''), "save must be a folder to write to, got ''"),
    (dict(save='/proc/x'), "save must be a folder to write to, got '/proc/x'")])
def test_bad_option(options, message, capsys):
    with pytest.raises(CliError, match=message): demo(**options)
    assert 'epochs:' not in capsys.readouterr().out  # before any training

def test_bad_option_ends_the_command():
    res = run('--n-hidden', '0')
    assert res.returncode == 1 and 'n_hidden must be at least 1, got 0' in res.stderr
    assert 'Traceback' not in res.stderr and 'epochs:' not in res.stdout

def stopped_at(text, *args):
    "Run the demo, press Ctrl-C when it has printed `text`; its exit code and output"
    def heed():  # tests in the background inherit that it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*script, *args], stdout=subprocess.PIPE, text=True, env=env,
                          stderr=subprocess.STDOUT, preexec_fn=heed) as proc:
        try:
            out = ''
            while text not in out and (new := proc.stdout.read(1)): out += new
            proc.send_signal(signal.SIGINT)
            out += proc.communicate()[0]
        finally: proc.kill()
    return proc.returncode, out

def test_ctrl_c_reports_what_was_trained(tmp_path):
    options = '--epochs 40 --n-hidden 8 --bs 500 --save'.split()
    code,out = stopped_at('LMModel3, epochs: 40', *options, str(tmp_path))
    assert code == 130 and 'Traceback' not in out
    assert 'Interrupted: LMModel3 finished' in out and 'LMModel2 goes on:' in out
    assert type(load_pretrained(tmp_path/'LMModel2')[0]) is LMModel2

def test_ctrl_c_before_the_first_epoch_ends():
    code,out = stopped_at('LMModel2, epochs: 40', '--epochs', '40', '--bs', '1')
    assert code == 130 and 'Traceback' not in out
    assert 'finished 0 of 40 epochs' in out and 'No epoch was finished' in out

def test_a_loss_of_nan_has_an_exit_code():
    res = run('--lr', '1e30', '--n-hidden', '8', '--epochs', '1')
    assert res.returncode == 1 and 'Traceback' not in res.stderr
    told = re.findall(r'^(\w+) diverged: .* after \d+ steps', res.stdout, re.M)
    assert {'LMModel2', 'LMModel3'} <= {*told}

def test_a_home_folder_is_expanded(tmp_path):
    home = env | {'HOME': str(tmp_path)}
    options = '--epochs 1 --n-hidden 8 --bs 500 --save=~/x'.split()
    res = subprocess.run([*script, *options], capture_output=True, env=home,
                         cwd=tmp_path)
    assert res.returncode == 0 and (tmp_path/'x'/'LMModel3').is_dir()
    assert not (tmp_path/'~').exists()

def test_the_ladder_stands_beside_the_book():
    table = demo(epochs=1, ladder=True)
    assert [*table.model] == [f'LMModel{i}' for i in range(1, 8)]
    assert [*table.book] == [.494, .470, .589, .640, .488, .758, .869]
    assert table.accuracy.between(0, 1).all()
