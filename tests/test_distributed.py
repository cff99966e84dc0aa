"""Several processes: one set of weights, and to each its own hidden state; as one
process that reads all lines, in what they learn and in how they end."""
import os, re, signal, socket, subprocess, sys, threading
from functools import partial
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import SGD
from fastai.torch_core import rank_distrib
from fastcore.test import test_close as close, test_eq as equal
from torch.nn.parallel import DistributedDataParallel
import fastai.callback.progress
from rnnlm.callback import StateResetter
from rnnlm.clock import TimeBudget
from rnnlm.core import find_stateful
from rnnlm.data import group_chunks, human_numbers_stream, lm_seqs
from rnnlm.distributed import LinesInTurn
from rnnlm.folder import load_pretrained
from rnnlm.guard import Diverged, Terminated
from rnnlm.learner import rnn_learner
from rnnlm.lm import RNNLM
from rnnlm.machine import n_parameters
from rnnlm.models import LMModel3
from rnnlm.resume import Checkpoint
from rnnlm.snapshot import regroup
from rnnlm.state import state_tensors
from rnnlm.text import TokenStream

torch.set_num_threads(1)

BS,LR = 8,.1

def part(rank):
    "The samples that process `rank` reads: its own half of a text"
    seqs = lm_seqs(human_numbers_stream()[:1201], sl=3)
    return group_chunks(seqs[200*rank:200*(rank+1)], BS)

class LastState(LMModel3):
    "Keeps the state that it had before it was last told to forget"
    def reset(self):
        if self.state is not None: self.last = self.state
        super().reset()

def model():
    torch.manual_seed(0)
    return LastState(30, 8)

def fit(rank, store, results):
    dist.init_process_group('gloo', f'file://{store}', rank=rank, world_size=2)
    net = model()
    dls = DataLoaders.from_dsets(part(rank), part(rank)[:0], bs=BS, shuffle=False,
                                 drop_last=True, num_workers=0, device='cpu')
    learn = Learner(dls, DistributedDataParallel(net), loss_func=F.cross_entropy,
                    opt_func=partial(SGD, mom=0.), cbs=StateResetter)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, lr=LR)
    torch.save((net.state_dict(), net.last, net.state), f'{results}/{rank}.pt')
    dist.destroy_process_group()

def by_hand():
    "The same training in one process: two states, and the mean of the two gradients"
    net = model()
    params = [*net.parameters()]
    for epoch in range(2):
        states = [None, None]
        for i in range(200//BS):
            grads = []
            for rank in 0,1:
                x,y = (torch.stack(o) for o in zip(*part(rank)[i*BS:(i+1)*BS]))
                net.state = states[rank]
                grads.append(torch.autograd.grad(F.cross_entropy(net(x), y), params))
                states[rank] = net.state
            with torch.no_grad():
                for p,a,b in zip(params, *grads): p -= LR*(a+b)/2
    return net.state_dict(), states

def test_each_process_has_its_own_state(tmp_path):
    mp.spawn(fit, args=(tmp_path/'store', tmp_path), nprocs=2)
    results = [torch.load(tmp_path/f'{rank}.pt') for rank in (0, 1)]
    weights,states = by_hand()
    for k in weights: equal(results[0][0][k], results[1][0][k])  # one set of weights
    for (w,last,end),state in zip(results, states):
        for k in weights: close(w[k], weights[k], eps=1e-5)
        close(last, state, eps=1e-4)
        assert end is None
    assert (states[0]-states[1]).abs().max() > .01  # they are not shared

# `learn.distrib_ctx()`: n processes as one

def text(n, docs=None):
    stream = human_numbers_stream()[:n]
    return TokenStream(stream.ids, stream.vocab, docs=docs)

def last_step():
    dls = text(1300).dataloaders(8, 3, target='last', drop_last=True, verbose=False)
    return dls, LMModel3(30, 16), []

def lstm():
    dls = text(1300).dataloaders(8, 4, sl_std=1., shift=5, verbose=False)
    return dls, RNNLM(30, 16, n_layers=2, cell='lstm'), [GradientClip(1.)]

def tbptt():
    dls = text(1000).dataloaders(8, 6, stride=3, verbose=False)
    return dls, RNNLM(30, 16, cell='gru'), []

def uneven():
    "Neither lines nor targets are the same in number, and validation has a tail"
    dls = text(1300, docs=[*range(0, 1300, 37)]).dataloaders(
        6, 5, val_bs=7, begins=True, verbose=False)
    return dls, RNNLM(30, 16, cell='gru'), []

RECIPES = last_step, lstm, tbptt, uneven
TYPES = {torch.float32: 1e-5, torch.float64: 1e-12}  # and what rounding may do

class LastStates(Callback):
    "The state after the last batch of each training"
    run_valid = False
    def before_fit(self): self.states = []
    def after_train(self): self.states.append(find_stateful(self.model).state)

def result(recipe, dtype, *cbs):
    "What a fit leaves behind, as plain data"
    torch.manual_seed(0)
    dls,net,needs = recipe()
    states = LastStates()
    metrics = [accuracy, F1Score(average='macro')]
    learn = rnn_learner(dls, net.to(dtype), metrics=metrics)
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        learn.fit(2, 1e-2, cbs=[states, *needs, *cbs])
        validated = [*learn.validate()]
    assert learn.model is net
    equal([dl.world_size for dl in learn.dls], [1, 1])
    recorder = learn.recorder
    return dict(weights=net.state_dict(), states=states.states, validated=validated,
                losses=[*recorder.losses], rows=[[*o] for o in recorder.values])

def every_result(): return {(o.__name__, dtype): result(o, dtype)
                            for o in RECIPES for dtype in TYPES}

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def as_process(rank, n, port, job, folder):
    "Process `rank` of `n`, as `torchrun` starts it; what `job` gives is kept"
    os.environ.update(RANK=f'{rank}', LOCAL_RANK=f'{rank}', WORLD_SIZE=f'{n}',
                      MASTER_ADDR='localhost', MASTER_PORT=f'{port}')
    torch.set_num_threads(1)
    torch.save(job(), f'{folder}/{rank}.pt')

def run(job, n, folder):
    "What `job` gives in each of `n` processes"
    mp.spawn(as_process, (n, free_port(), job, folder), nprocs=n)
    return [torch.load(f'{folder}/{rank}.pt') for rank in range(n)]

def difference(a, b):
    "The largest difference of two weights, relative to the largest of its matrix"
    pairs = zip(a['weights'].values(), b['weights'].values())
    return max(((x-y).abs().max()/y.abs().max()).item() for x,y in pairs)

@pytest.fixture(scope='session')
def one(): return every_result()

@pytest.fixture(scope='session', params=[2, 4])
def many(request, tmp_path_factory):
    return run(every_result, request.param, tmp_path_factory.mktemp('many'))

@pytest.mark.parametrize('dtype', TYPES, ids=str)
@pytest.mark.parametrize('recipe', RECIPES, ids=lambda o: o.__name__)
def test_processes_train_as_one(recipe, dtype, one, many):
    want,eps = one[recipe.__name__,dtype],TYPES[dtype]
    got = [o[recipe.__name__,dtype] for o in many]
    for o in got:
        assert difference(o, want) < eps
        for k in 'losses', 'rows', 'validated': equal(o[k], got[0][k])
        close(o['losses'], want['losses'], eps=1e-5)
        close(o['rows'], want['rows'], eps=1e-5)
        close(o['validated'], want['rows'][-1][1:], eps=1e-5)
        for k,weight in o['weights'].items(): assert weight.equal(got[0]['weights'][k])
    if recipe is last_step: batch_dim = 0
    else: batch_dim = 1
    for i,state in enumerate(want['states']):  # each process has that of its lines
        state, = regroup([o['states'][i] for o in got], 1, batch_dim)
        pairs = zip(state_tensors(state), state_tensors(want['states'][i]), strict=True)
        for a,b in pairs: close(a, b, eps=1e-4)
        again = regroup([state], len(got), batch_dim)
        for a,o in zip(again, got):
            for x,y in zip(state_tensors(a), state_tensors(o['states'][i])):
                assert x.equal(y)

@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('recipe', RECIPES[:3], ids=lambda o: o.__name__)
def test_accumulation_instead_of_processes(recipe, n, one):
    for dtype,eps in TYPES.items():
        got = result(recipe, dtype, LinesInTurn(n), GradientAccumulation(8))
        want = one[recipe.__name__,dtype]
        assert difference(got, want) < eps
        close(got['rows'][-1][1:], want['rows'][-1][1:], eps=1e-5)

# ends

class At(Callback):
    "Does something in one process, at step 5"
    run_valid = False
    def __init__(self, rank, act): self.rank,self.act = rank,act
    def after_pred(self):
        if rank_distrib() == self.rank and self.train_iter == 5: self.act(self.learn)

def ends(cbs, **kwargs):
    "How a fit with `cbs` ends, after how many steps, and with which weights"
    torch.manual_seed(0)
    dls,net,_ = last_step()
    learn = rnn_learner(dls, net, cbs=cbs)
    error = None
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(**kwargs):
        try: learn.fit_one_cycle(2, 1e-2)
        except (Diverged, RuntimeError, Terminated) as e: error = e
    return dict(error=f'{type(error).__name__}: {error}', weights=net.state_dict(),
                step=learn.train_iter, lrs=[float(o) for o in learn.recorder.lrs])

def nan(learn): learn.pred = learn.pred*float('nan')
def sigterm(learn): os.kill(os.getpid(), signal.SIGTERM)
def ends_with_nan(): return ends([At(1, nan)])
def ends_with_sigterm(): return ends([At(1, sigterm)])

class Ticks(Callback):
    "A clock of its own in each process"
    now = 0.
    def after_batch(self): self.now += 1 + rank_distrib()
    def clock(self): return self.now
def ends_by_the_clock():
    ticks = Ticks()
    return ends([ticks, TimeBudget(30/60, ticks.clock)])

@pytest.mark.parametrize('job,error,step', [
    (ends_with_nan, 'Diverged: the loss is nan after 5 steps', 5),
    (ends_with_sigterm, 'Terminated: Stopped after 6 steps', 6),
    (ends_by_the_clock, 'NoneType', 30)], ids=['nan', 'sigterm', 'clock'])
def test_all_end_after_the_same_step(job, error, step, tmp_path):
    first,second = run(job, 2, tmp_path)
    assert first['error'].startswith(error), first['error']
    for k in 'error', 'step', 'lrs': equal(first[k], second[k])
    equal(first['step'], step)
    for k,v in first['weights'].items(): assert v.equal(second['weights'][k])

def die(learn): os._exit(9)
def stand_still(learn): threading.Event().wait()
def with_one_dead(): return ends([At(1, die)])
def with_one_stuck(): return ends([At(1, stand_still)], timeout=5)

@pytest.mark.parametrize('job', [with_one_dead, with_one_stuck])
def test_a_process_that_dies_or_stands_still_is_an_error_of_the_others(job, tmp_path):
    port,context = free_port(),mp.get_context('spawn')
    both = [context.Process(target=as_process, args=(rank, 2, port, job, tmp_path))
            for rank in (0, 1)]
    for o in both: o.start()
    try:
        both[0].join(120)
        equal(both[0].exitcode, 0)
    finally:
        for o in both: o.kill()
    first = torch.load(tmp_path/'0.pt')
    assert first['error'].startswith('RuntimeError'), first['error']
    equal(first['step'], 5)

# mistakes

def plain_ddp():
    dls,net,_ = last_step()
    learn = rnn_learner(dls, net)
    learn.model = DistributedDataParallel(net)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def without_a_hook_of_ours():
    dls,net,_ = last_step()
    learn = Learner(dls, net, loss_func=F.cross_entropy, cbs=StateResetter())
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(cpu=True): learn.fit(1)

def mistakes():
    dist.init_process_group('gloo')
    said = []
    for f in plain_ddp, without_a_hook_of_ours:
        try: f()
        except ValueError as e: said.append(str(e).split('\n\t')[-1])
    return said

def test_the_same_text_in_each_process_is_an_error(tmp_path):
    for said in run(mistakes, 2, tmp_path):
        equal(len(said), 2)
        for o in said:
            assert o.startswith('the training loader must deal its lines out to the 2')
            assert 'learn.distrib_ctx()' in o

# the command

def test_rnnlm_train_within_torchrun(tmp_path):
    script = tmp_path/'train.py'
    script.write_text('import sys\nfrom rnnlm.cli import train_command\n'
                      'sys.exit(train_command())')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               '--nproc-per-node', '2', script, 'human_numbers', '--save', 'model']
    command += '--preset numbers --epochs 1 --bs 64 --sl 16'.split()
    res = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert res.returncode == 0, res.stderr
    lines = res.stdout.splitlines()
    lines = [o for o in lines if not re.match(r'  |[ \d]+%', o)]  # samples, progress
    equal([o.split(':')[0] for o in lines],
          ['human_numbers', 'epoch 1', '400,158 parameters, saved'])
    model,_ = load_pretrained(tmp_path/'model')
    equal(n_parameters(model), 400_158)

# stopped and gone on with

class StopAt(Callback):
    run_valid = False
    def after_backward(self):
        if self.train_iter == 45: raise Terminated('for a test')

def stopped(folder):
    torch.manual_seed(0)
    dls,net,needs = lstm()
    learn = rnn_learner(dls, net.double(), metrics=accuracy)
    cbs = [LastStates(), StopAt(), Checkpoint(folder, every=10), *needs]
    with learn.no_bar(), learn.no_logging(), pytest.raises(Terminated):
        with learn.distrib_ctx(): learn.fit(2, 1e-2, cbs=cbs)

class Goes(StopAt):
    "Takes the place of `StopAt`"
    name = 'stop_at'
    def after_backward(self): pass

def gone_on(folder):
    checkpoint = Checkpoint(folder, every=1000, resume=True)
    return result(lstm, torch.float64, checkpoint, Goes())

@pytest.mark.parametrize('n', [1, 2, 4])
def test_a_training_goes_on_with_as_many_processes_or_others(n, one, tmp_path):
    run(partial(stopped, tmp_path/'run'), 2, tmp_path)
    got = run(partial(gone_on, tmp_path/'run'), n, tmp_path)
    want = one['lstm',torch.float64]
    for o in got:
        assert difference(o, want) < 1e-12
        close(o['losses'], want['losses'], eps=1e-5)
        close(o['rows'], want['rows'], eps=1e-5)
        for k,weight in o['weights'].items(): assert weight.equal(got[0]['weights'][k])
