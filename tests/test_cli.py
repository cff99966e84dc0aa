"The command line: what it prints, what it saves, and how it ends when it is stopped."
import os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from rnnlm.models import LMModel2

script = str(Path(sys.executable).with_name('rnnlm-demo'))
env = os.environ | {'PYTHONUNBUFFERED': '1'}

def run(*args, command=(script,)): return subprocess.run([*command, *args], capture_output=True, text=True, env=env)

@pytest.mark.parametrize('command', [(script,), (sys.executable, '-m', 'rnnlm')], ids=['rnnlm-demo', 'python -m rnnlm'])
def test_demo(command, tmp_path):
    res = run('--epochs', '2', '--n_hidden', '16', '--bs', '32', '--lr', '0.01', '--seed', '1',
              '--save', str(tmp_path/'new'), command=command)
    assert res.returncode == 0, res.stderr
    lines = [o.split() for o in res.stdout.splitlines()]
    assert 'model epochs train loss valid loss perplexity accuracy seconds'.split() in lines
    assert [o[:2] for o in lines if len(o) == 7 and o[0].startswith('LMModel')] == [['LMModel2', '2'], ['LMModel3', '2']]
    assert "most common token, 'thousand': 0.15" in res.stdout
    assert 'one . two . three . | ' in res.stdout
    saved = torch.load(tmp_path/'new'/'LMModel2.pt')
    assert sorted(p.name for p in (tmp_path/'new').iterdir()) == ['LMModel2.pt', 'LMModel3.pt']
    LMModel2(len(saved['vocab']), 16).load_state_dict(saved['weights'])
    assert f"{saved['accuracy']:.3f}" in next(o for o in lines if o[:2] == ['LMModel2', '2'])

def test_same_seed_same_result():
    a,b,c = (run('--epochs', '1', '--n_hidden', '8', '--seed', s).stdout.split('goes on:')[1] for s in '112')
    assert a == b != c

@pytest.mark.parametrize('args,message', [
    (['--bs', '0'], 'bs must be from 1 to 4207'),
    (['--bs', '99999'], 'bs must be from 1 to 4207'),
    (['--epochs', '0'], 'epochs must be at least 1'),
    (['--n_hidden', '-1'], 'n_hidden must be at least 1'),
    (['--save', '/proc/models'], "save must be a folder to write to, got '/proc/models'")])
def test_bad_option(args, message):
    res = run(*args)
    assert res.returncode == 1 and message in res.stderr and 'Traceback' not in res.stderr
    assert 'epochs:' not in res.stdout  # before any training

def stopped_at(text, *args):
    "Run the demo, press Ctrl-C as soon as it has printed `text`, and give its exit code and all that it printed"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit that it is ignored
    with subprocess.Popen([script, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
                          preexec_fn=heed) as proc:
        try:
            out = ''
            while text not in out and proc.poll() is None: out += proc.stdout.read(1)
            proc.send_signal(signal.SIGINT)
            out += proc.communicate(timeout=120)[0]
        finally: proc.kill()
    return proc.returncode, out

def test_ctrl_c_reports_what_was_trained(tmp_path):
    code,out = stopped_at('LMModel3, epochs: 40', '--epochs', '40', '--n_hidden', '8', '--bs', '1000', '--save', str(tmp_path))
    assert code == 130 and 'Traceback' not in out
    assert 'Interrupted: LMModel3 finished' in out and 'LMModel2 goes on:' in out
    assert 'LMModel2.pt' in [p.name for p in tmp_path.iterdir()]

def test_ctrl_c_before_the_first_epoch_ends():
    code,out = stopped_at('LMModel2, epochs: 40', '--epochs', '40', '--bs', '1')
    assert code == 130 and 'Traceback' not in out
    assert 'finished 0 of 40 epochs' in out and 'No epoch was finished' in out
