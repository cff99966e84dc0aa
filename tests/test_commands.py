"""rnnlm-train, rnnlm-generate and rnnlm-eval: what they print and keep, and how they
end when something is wrong or they are stopped."""
import json, os, pty, re, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from fastcore.script import CliError
from fastcore.test import test_close as close, test_eq as equal
from rnnlm.commands import evaluate, train, write
from rnnlm.folder import load_figures, load_pretrained
from rnnlm.score import score
from rnnlm.text import TokenStream

torch.set_num_threads(1)
env = os.environ | {'PYTHONUNBUFFERED': '1', 'MPLBACKEND': 'agg'}
env.pop('COLUMNS', None)
SCRIPT = '''import sys
from rnnlm.cli import {0}
sys.exit({0}())'''  # as pip writes it
QUICK = '--preset numbers --epochs 1 --bs 64 --sl 16'.split()

@pytest.fixture(scope='session')
def bin(tmp_path_factory):
    "A folder with the commands"
    folder = tmp_path_factory.mktemp('bin')
    for name in 'train', 'generate', 'eval':
        (folder/f'rnnlm-{name}').write_text(SCRIPT.format(f'{name}_command'))
    return folder

def command(bin, name, *args): return [sys.executable, str(bin/name), *map(str, args)]

def run(bin, name, *args, **kwargs):
    return subprocess.run(command(bin, name, *args), capture_output=True, text=True,
                          env=env, **kwargs)

@pytest.fixture(scope='session')
def trained(bin, tmp_path_factory):
    "The folder of a model, and what its training printed"
    folder = tmp_path_factory.mktemp('trained')/'model'
    res = run(bin, 'rnnlm-train', 'human_numbers', '--save', folder, *QUICK)
    assert res.returncode == 0, res.stderr
    return folder,res

# what comes of it

def test_train_keeps_the_model_its_curves_and_its_samples(trained):
    folder,res = trained
    equal(sorted(os.listdir(folder)), ['config.json', 'model.safetensors', 'run.png',
                                       'samples.txt', 'training.json', 'vocab.json'])
    assert (folder/'run.png').read_bytes().startswith(b'\x89PNG')
    samples = (folder/'samples.txt').read_text()
    assert samples.startswith('after epoch 1:\none . two . three . | ')
    epoch, = load_figures(folder)['epochs']
    assert f"valid loss {epoch['valid_loss']:.3f}" in res.stdout

def test_output_that_is_no_terminal_has_lines_and_nothing_else(trained):
    _,res = trained
    equal(res.stderr, '')
    assert not re.search(r'[\r\x1b█]', res.stdout)
    line = next(o for o in res.stdout.splitlines() if o.startswith('epoch 1'))
    assert re.search(r'perplexity \d+\.\d{3}, [\d,]+ tokens/s, \d:\d\d$', line)

def on_terminal(args, columns):
    "What a command writes on a terminal of so many columns"
    main,side = pty.openpty()
    sized = env | dict(COLUMNS=str(columns), TERM='xterm')
    ends = dict(stdout=side, stderr=side, stdin=side)
    with subprocess.Popen(args, env=sized, **ends) as proc:
        os.close(side)
        out = b''
        try:
            while new := os.read(main, 4096): out += new
        except OSError: pass  # its end, on Linux
        finally:
            proc.kill() if proc.poll() is None and not out else proc.wait()
    os.close(main)
    return proc.returncode,out.decode()

def test_on_a_terminal_of_60_columns_one_line_renews_itself(bin, tmp_path):
    args = command(bin, 'rnnlm-train', 'human_numbers', '--save', tmp_path/'m', *QUICK)
    code,out = on_terminal(args, 60)
    equal(code, 0)
    renewed = [o.rstrip() for o in out.split('\r') if re.match(r' *\d+%', o)]
    assert len(renewed) > 1 and max(map(len, renewed)) < 60
    assert 'left: loss' in renewed[-1]

def test_the_demo_fits_60_columns(tmp_path):
    (tmp_path/'demo').write_text(SCRIPT.format('demo'))
    code,out = on_terminal([sys.executable, str(tmp_path/'demo'), '--epochs', '1'], 60)
    equal(code, 0)
    table = out[out.index('model  epochs'):].split('\n\r\n')[0]
    assert max(len(o.rstrip()) for o in table.splitlines()) < 60

def test_generate_writes_what_the_model_says(bin, trained):
    folder,_ = trained
    args = folder, '--prompt', 'two thousand', '--n', 12, '--seed', 3
    a,b = (run(bin, 'rnnlm-generate', *args) for _ in range(2))
    assert a.returncode == 0, a.stderr
    equal(a.stdout, b.stdout)
    equal(a.stdout, f"two thousand{write(folder, 'two thousand', n=12, seed=3)}\n")

def test_eval_says_what_score_says(bin, trained, tmp_path):
    folder,_ = trained
    (tmp_path/'new.txt').write_text('seven hundred one . seven hundred two . ' * 20)
    res = run(bin, 'rnnlm-eval', folder, tmp_path/'new.txt')
    assert res.returncode == 0, res.stderr
    model,stream = load_pretrained(folder)
    scores = score(model, (tmp_path/'new.txt').read_text(), stream)
    told = dict(re.split(r'  +', o, maxsplit=1) for o in res.stdout.splitlines())
    equal(told['perplexity'], f'{scores.perplexity:.3f}')
    equal(told['bits a byte'], f'{scores.bits_per_byte:.4f}')

def test_dynamic_evaluation_learns_on_the_way(trained, tmp_path):
    folder,_ = trained
    (tmp_path/'new.txt').write_text('nine nine nine one . ' * 200)
    still = evaluate(folder, tmp_path/'new.txt')
    moving = evaluate(folder, tmp_path/'new.txt', dynamic=.1)
    assert moving.nats < still.nats-.1

def test_a_text_of_characters_in_a_folder_of_files(tmp_path):
    (tmp_path/'texts').mkdir()
    for name in 'ab': (tmp_path/'texts'/f'{name}.txt').write_text('hello there.\n'*200)
    train(tmp_path/'texts', tmp_path/'m', epochs=1, bs=8, sl=16)
    _,stream = load_pretrained(tmp_path/'m')
    equal(stream.tokenizer, 'chars')
    equal(sorted(stream.vocab), sorted({*'hello there.\n'}))

def test_help_needs_no_torch(bin):
    for name in 'rnnlm-train', 'rnnlm-generate', 'rnnlm-eval':
        broken = env | {'PYTHONPATH': str(bin/'none') + os.pathsep +
                        env.get('PYTHONPATH', '')}
        (bin/'none').mkdir(exist_ok=True)
        (bin/'none'/'torch.py').write_text('raise ImportError("torch was imported")')
        res = subprocess.run(command(bin, name, '--help'), capture_output=True,
                             text=True, env=broken)
        equal((res.returncode, res.stderr), (0, ''))
        assert name in res.stdout

# what is wrong

WRONG = [
    (dict(path='no/such'), 'no/such'),
    (dict(seed=10**20), 'seed must be from 0'),
    (dict(save=''), "save must be a folder to write to, got ''"),
    (dict(save='/proc/x'), 'save must be a folder to write to'),
    (dict(save='.'), "which holds 'text.txt'"),
    (dict(tokenizer='letters'), "tokenizer must be 'words', 'chars'"),
    (dict(preset='none'), 'preset must be'),
    (dict(minutes=-1.), 'minutes must be above 0'),
    (dict(epochs=0), 'must be at least 1, got 0'),
    (dict(bs=0), 'bs must be at least 1'),
    (dict(prompt='%'), "'%'")]

@pytest.mark.parametrize('options,message', WRONG, ids=[str(o) for o,_ in WRONG])
def test_a_wrong_option_of_train_is_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('text.txt').write_text('abc '*500)
    before = [*tmp_path.iterdir()]
    with pytest.raises(CliError, match=re.escape(message)) as e:
        train(**dict(path='text.txt', save='m') | options)
    assert 'nothing was trained' in str(e.value) and '\n' not in str(e.value)
    equal([*tmp_path.iterdir()], before)

def test_a_mistake_is_one_line_and_exit_code_1(bin, tmp_path):
    res = run(bin, 'rnnlm-train', tmp_path/'none.txt')
    equal((res.returncode, res.stderr.count('\n')), (1, 1))
    assert 'none.txt' in res.stderr

def test_the_default_folder_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('model').mkdir()
    with pytest.raises(CliError, match='a folder named model already'):
        train('human_numbers')

def test_minutes_shorter_than_a_batch_are_named(tmp_path):
    message = 'minutes must be at least .*nothing was trained'
    with pytest.raises(CliError, match=message):
        train('human_numbers', tmp_path/'m', minutes=1e-7)
    assert not (tmp_path/'m').exists()

def test_a_corpus_shorter_than_one_batch_is_told_the_sizes_that_work(tmp_path):
    (tmp_path/'short.txt').write_text('to be or not to be, that is the question')
    def try_sizes(bs, sl):
        train(tmp_path/'short.txt', tmp_path/'m', epochs=1, bs=bs, sl=sl)
    with pytest.raises(CliError, match='nothing was trained') as e: try_sizes(64, 8)
    bs = int(re.search(r'write bs=(\d+)', str(e.value))[1])
    try_sizes(bs, 8)

@pytest.mark.parametrize('options,message', [
    (dict(temperature=-1.), 'temperature'), (dict(top_p=0.), 'top_p'),
    (dict(top_p=1.5), 'top_p'), (dict(top_k=0), 'top_k'), (dict(n=0), 'max_new_tokens'),
    (dict(prompt='twelfth'), 'twelfth'), (dict(seed=-1), 'seed must be')])
def test_a_wrong_option_of_generate_is_named(options, message, trained, capsys):
    with pytest.raises(CliError, match=message): write(trained[0], **options)
    equal(capsys.readouterr().out, '')

def test_a_folder_without_a_model_is_named(tmp_path):
    for command in write, lambda folder: evaluate(folder, 'human_numbers'):
        with pytest.raises(CliError, match='no rnnlm.Model was'): command(tmp_path)

def test_characters_that_the_model_never_met_are_named(trained, tmp_path):
    (tmp_path/'new.txt').write_text('one . twelfth')
    with pytest.raises(CliError, match="'twelfth'"):
        evaluate(trained[0], tmp_path/'new.txt')

# how it ends

LONG = '--preset numbers --epochs 500 --bs 64 --sl 16'.split()

def stopped_at(args, text, n=1):
    "Run, press Ctrl-C `n` times when it has printed `text`; its exit code and output"
    def heed():  # tests in the background inherit that it is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env,
                          stderr=subprocess.STDOUT, preexec_fn=heed) as proc:
        try:
            out = ''
            while text not in out and (new := proc.stdout.read(1)): out += new
            for _ in range(n): proc.send_signal(signal.SIGINT)
            out += proc.communicate()[0]
        finally: proc.kill()
    return proc.returncode,out

def test_ctrl_c_saves_what_was_trained_and_says_so(bin, tmp_path):
    args = command(bin, 'rnnlm-train', 'human_numbers', '--save', tmp_path/'m', *LONG)
    code,out = stopped_at(args, 'epoch 1: ')
    assert code == 130 and 'Traceback' not in out
    steps = int(re.search(r'Stopped after ([\d,]+) steps, in epoch \d', out)[1]
                .replace(',', ''))
    assert steps > 0 and f"saved: {tmp_path/'m'}" in out
    model,_ = load_pretrained(tmp_path/'m')
    assert all(o.isfinite().all() for o in model.parameters())
    assert len(load_figures(tmp_path/'m')['epochs']) >= 1

def test_ctrl_c_while_it_starts_ends_without_a_traceback(bin, tmp_path):
    slow = tmp_path/'slow'
    slow.mkdir()
    (slow/'torch.py').write_text('print("importing", flush=True)\nwhile True: pass')
    path = f"{slow}{os.pathsep}{env.get('PYTHONPATH', '')}"
    args = ['env', f'PYTHONPATH={path}', *command(bin, 'rnnlm-train', 'human_numbers')]
    code,out = stopped_at(args, 'importing')
    equal(code, 130)
    assert 'Traceback' not in out

DIVERGES = '''import sys, torch
from fastai.callback.core import Callback
import rnnlm.commands as commands
class Explode(Callback):
    order, run_valid = 70, False
    def before_batch(self):
        if (self.epoch, self.iter) == (1, 5):
            with torch.no_grad(): self.model.h_o.bias.fill_(float('nan'))
own = commands.train_lm
def train_lm(*args, cbs, **kwargs): return own(*args, cbs=[*cbs, Explode()], **kwargs)
commands.train_lm = train_lm
from rnnlm.cli import train_command
sys.exit(train_command())'''

def test_a_loss_of_nan_stops_with_the_step_and_keeps_the_last_good_weights(tmp_path):
    (tmp_path/'rnnlm-train').write_text(DIVERGES)
    args = command(tmp_path, 'rnnlm-train', 'human_numbers', '--save', tmp_path/'m',
                   *QUICK[:2], '--epochs', 3, *QUICK[4:])
    args[1:1] = '-W', 'ignore::FutureWarning'  # of what DIVERGES imports by itself
    res = subprocess.run(args, capture_output=True, text=True, env=env)
    equal((res.returncode, res.stderr), (1, ''))
    where = r'the loss is nan after \d+ steps, in epoch 2, batch 6'
    assert re.search(where, res.stdout)
    model,_ = load_pretrained(tmp_path/'m')
    assert all(o.isfinite().all() for o in model.parameters())
    equal(len(load_figures(tmp_path/'m')['epochs']), 1)
