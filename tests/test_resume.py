"""A training that is stopped goes on as if it had not been: by an exception, a signal,
a kill, a full disk, whatever callbacks it has."""
import os, signal, subprocess, sys, warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
import pytest, torch
from fastai.basics import Adam, Callback, Transform, accuracy, set_seed
from fastai.callback.all import (EarlyStoppingCallback, GradientAccumulation,
    GradientClip, ReduceLROnPlateau, RNNRegularizer, SaveModelCallback)
from safetensors.torch import load_file
from rnnlm.all import *
from rnnlm.checkpoints import checkpoint_steps, read_newest
from rnnlm.packing import dumps
from rnnlm.snapshot import snapshot

torch.set_num_threads(1)
stream = human_numbers_stream()[:12_000]
VOCAB = len(stream.vocab)

class Stopped(Exception): "What a test stops a fit with"

class StopAt(Callback):
    "Raises an exception in the middle of a batch, when so many were done"
    run_valid = False
    def __init__(self, *places): self.places = [*places]
    def after_backward(self):
        if self.places and self.train_iter == self.places[0]:
            raise Stopped(self.places.pop(0))
    # what has stopped the fit once must not be there again
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

class AtEnd(Callback):
    "Keeps all that the last batch of training has left"
    order,run_valid = 200,False
    def after_batch(self):
        tree,tensors = dumps(snapshot(self.learn, but=self.learn.checkpoint))
        here = str(self.learn.path).encode()  # of a file that was saved
        self.learn.left = tree.replace(here, b''),tensors

def lm_learner(path, model=None, sl=16, bs=32, dl=None, train_metrics=False, **kw):
    set_seed(42)
    dls = stream.dataloaders(bs, sl, verbose=False, **(dl or {}))
    model = RNNLM(VOCAB, 24, hidden_p=.2) if model is None else model()
    learn = rnn_learner(dls, model, metrics=accuracy, path=path, **kw)
    learn.recorder.train_metrics = train_metrics
    return learn

def watched(path):
    "fastai's callbacks that watch a fit"
    return [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=2),
            ReduceLROnPlateau(patience=1, min_delta=.5)]

KINDS = {
    'LMModel3': dict(model=lambda: LMModel3(VOCAB, 16), sl=3, dl=dict(target='last')),
    'LSTM': dict(model=lambda: RNNLM(VOCAB, 24, n_layers=2, hidden_p=.3, weight_p=.2)),
    'minGRU': dict(model=lambda: RNNLM(VOCAB, 24, cell='mingru')),
    'drawn lengths': dict(dl=dict(sl_std=2, shift=7)),
    'TBPTT': dict(sl=12, dl=dict(stride=4, drop_last=True)),
    'BPT3C': dict(bs=256, sl=9, dl=dict(stride=1, drop_last=True, target='last'),
                  model=lambda: LMModel3(VOCAB, 8), cbs=BPT3C),
    'accumulation': dict(cbs=lambda: [GradientAccumulation(80), GradientClip(.5)]),
    'train metrics': dict(train_metrics=True),
    'fused': dict(opt_func=fused_adam),
    'plain Adam': dict(opt_func=Adam),
    'SGD': dict(opt_func=partial(torch.optim.SGD, momentum=.9)),
    'Muon': dict(opt_func=MuonAdamW, splitter=layer_matrices),
    'bfloat16': dict(cbs=BFloat16),
    'RNNRegularizer': dict(cbs=lambda: RNNRegularizer(2., 1.)),
}
FITS = {'one cycle': ('fit_one_cycle', 3, 1e-2), 'flat': ('fit', 3, 1e-2),
        'flat, then down': ('fit_flat_cos', 3, 1e-2)}

def fitted(path, kind='LSTM', fit='one cycle', every=7, stops=(), cbs=(), **changes):
    "A learner after a fit that stops at some batches, and each time goes on as another"
    given = {**KINDS[kind], **changes}
    make = given.pop('cbs', list)
    name,*args = FITS[fit]
    stop = StopAt(*stops)
    while True:
        learn = lm_learner(path, **given)
        own = make()
        checkpoint = Checkpoint(path/'run', every, resume=True)
        all_cbs = [checkpoint, stop, AtEnd()]
        all_cbs += own if isinstance(own, list) else [own]
        all_cbs += [cb for f in cbs for cb in f(path)]
        try:
            with learn.no_bar(), learn.no_logging(), redirect_stdout(StringIO()):
                getattr(learn, name)(*args, cbs=all_cbs)
            return learn
        except Stopped: pass

def same(a, b, made_alike=True):
    "Are the weights, all that the last batch left, and the record equal, bit for bit?"
    assert a.left[0] == b.left[0] or not made_alike
    assert a.left[1] == b.left[1]
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    for k in 'losses', 'lrs', 'iters', 'values':
        assert getattr(a.recorder, k) == getattr(b.recorder, k), k
    assert getattr(a.recorder, 'hps', None) == getattr(b.recorder, 'hps', None)
    return True

@pytest.mark.parametrize('kind', KINDS)
def test_a_fit_that_was_stopped_ends_as_one_that_was_not(kind, tmp_path):
    n = len(lm_learner(tmp_path, **{k: v for k,v in KINDS[kind].items()
                                    if k in ('sl', 'bs', 'dl')}).dls.train)
    # before the first checkpoint; twice in one epoch; at the end of one; in the last
    stops = (3, n//2, n//2+8, 2*n-1, 3*n-2)
    whole,stopped = fitted(tmp_path/'a', kind),fitted(tmp_path/'b', kind, stops=stops)
    assert same(whole, stopped)

@pytest.mark.parametrize('fit', FITS)
def test_with_callbacks_that_watch(fit, tmp_path):
    whole = fitted(tmp_path/'a', fit=fit, cbs=[watched])
    stopped = fitted(tmp_path/'b', fit=fit, cbs=[watched], stops=(20, 30, 55))
    assert same(whole, stopped)
    best = [torch.load(tmp_path/o/'models'/'best.pth') for o in 'ab']
    for k in best[0]: assert torch.equal(best[0][k], best[1][k])

@pytest.mark.parametrize('every', [1, 23, 24])
def test_at_every_batch_and_at_the_end_of_an_epoch(every, tmp_path):
    n = len(lm_learner(tmp_path).dls.train)
    stops = (n, n+1, 2*n, 3*n-1)
    assert same(fitted(tmp_path/'a', every=every),
                fitted(tmp_path/'b', every=every, stops=stops))

def test_stopped_in_validation(tmp_path):
    class InValidation(Callback):
        order = 50
        stop = True
        def after_pred(self):
            if self.training or self.epoch != 1 or not InValidation.stop: return
            InValidation.stop = False
            raise Stopped('in validation')
    whole = fitted(tmp_path/'a', cbs=[lambda _: [InValidation()]])
    InValidation.stop = False
    assert same(whole, fitted(tmp_path/'b', cbs=[lambda _: [InValidation()]]))

def test_what_the_learner_was_before_does_not_matter(tmp_path):
    "All that decides is in the checkpoint"
    with pytest.raises(Stopped): stop_once(tmp_path/'b', 30)
    learn = lm_learner(tmp_path/'b', **KINDS['LSTM'])
    cbs = [Checkpoint(tmp_path/'b'/'run', 7, resume=True), StopAt(), AtEnd()]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-1)
        torch.manual_seed(7)
        learn.fit_one_cycle(3, 1e-2, cbs=cbs, reset_opt=True)
    assert same(fitted(tmp_path/'a'), learn, made_alike=False)

def stop_once(path, batch, cbs=(), every=7):
    "A learner whose fit stops at `batch`"
    learn = lm_learner(path, **KINDS['LSTM'])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1e-2, cbs=[Checkpoint(path/'run', every), StopAt(batch),
                                          AtEnd(), *cbs])

# faults

def test_a_loader_that_raises(tmp_path):
    "The error comes out, the checkpoint is whole, and the fit goes on"
    class Breaks(Transform):
        n = 0
        def encodes(self, x):
            self.n += 1
            if self.n == 33: raise OSError('the network drive is gone')
            return x
    learn = lm_learner(tmp_path, **KINDS['LSTM'])
    learn.dls.train.after_batch.add(Breaks())
    cbs = [StopAt(), AtEnd()]
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(OSError, match='is gone'):
            learn.fit_one_cycle(3, 1e-2, cbs=[Checkpoint(tmp_path/'run', 7), *cbs])
        assert read_newest(tmp_path/'run')['fit']['train_iter'] < 33
        again = Checkpoint(tmp_path/'run', 7, resume=True)
        learn.fit_one_cycle(3, 1e-2, cbs=[again, *cbs])  # in the same learner
    assert same(fitted(tmp_path/'a'), learn)

def test_a_loss_of_nan_leaves_the_checkpoint(tmp_path):
    class Explode(Callback):
        order,run_valid = 70,False
        def before_batch(self):
            if self.train_iter == 30: self.model.h_o.bias.data.fill_(float('nan'))
    with pytest.raises(Diverged): stop_once(tmp_path, -1, cbs=[Explode()])
    fit = read_newest(tmp_path/'run')['fit']
    assert fit['train_iter'] == 28
    assert all(o.isfinite().all() for o in fit['weights'].values())

@contextmanager
def small_disk(path, size):
    "A file system of so many bytes"
    path.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip('a file system of its own needs the rights of root')
    try: yield path
    finally: subprocess.run(['umount', str(path)], check=True)

def test_a_full_disk(tmp_path):
    "A warning, the fit goes on, and the checkpoints from before it are whole"
    def fit(path, cbs):
        learn = lm_learner(tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-2, cbs=[Checkpoint(path, 7), *cbs])
        return learn
    class Fill(Callback):
        "Leaves no room on the disk, when the first checkpoint was written"
        order,run_valid = 150,False
        def after_batch(self):
            if self.train_iter != 8: return
            with (disk/'full').open('wb', 0) as f:
                try:
                    while True: f.write(bytes(1000))
                except OSError: pass
    with small_disk(tmp_path/'disk', 2_000_000) as disk:
        with pytest.warns(UserWarning, match='after 14 batches was not written'):
            learn = fit(disk/'run', [Fill()])
        assert checkpoint_steps(disk/'run') == [7]
        assert read_newest(disk/'run')['fit']['train_iter'] == 7
        assert sorted(o.name for o in (disk/'run').iterdir()) == ['step-000000007']
    other = fit(tmp_path/'run', [])
    for p,q in zip(learn.model.parameters(), other.model.parameters()):
        assert torch.equal(p, q)

# the command

SCRIPT = """import sys
from rnnlm.cli import train_command
sys.exit(train_command())"""  # as pip writes it

def train(folder, *args):
    "The command line of a training into `folder`"
    script = folder.parent.parent/'rnnlm-train'
    script.write_text(SCRIPT)
    quick = '--preset numbers --epochs 3 --bs 32 --sl 16'.split()
    return [sys.executable, '-u', str(script), 'human_numbers', '--save', str(folder),
            *quick, *args]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The weights of a training that was left alone"
    folder = tmp_path_factory.mktemp('whole')/'model'
    res = subprocess.run(train(folder, '--resume'), capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return load_file(folder/'model.safetensors')

@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_goes_on_after_a_signal(signum, whole, tmp_path):
    folder = tmp_path/'model'
    proc = subprocess.Popen(train(folder), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)
    for line in proc.stdout:
        if line.startswith('epoch 2'): break  # a checkpoint was written before
    proc.send_signal(signum)
    out = proc.stdout.read()
    code = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    assert proc.wait() == code
    assert 'Traceback' not in out
    if signum != signal.SIGKILL: assert 'Stopped after' in out
    again = subprocess.run(train(folder), capture_output=True, text=True)
    assert again.returncode == 1 and '--resume' in again.stderr
    res = subprocess.run(train(folder, '--resume'), capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    assert 'Going on after' in res.stdout
    weights = load_file(folder/'model.safetensors')
    assert all(torch.equal(whole[k], weights[k]) for k in whole)
    assert [o.name for o in tmp_path.iterdir()] == ['model']
