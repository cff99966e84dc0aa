"""Two processes under DistributedDataParallel: one set of weights, and to each its own
hidden state."""
from functools import partial
import torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastcore.test import test_close as close, test_eq as equal
from torch.nn.parallel import DistributedDataParallel
import fastai.callback.progress
from rnnlm.callback import StateResetter
from rnnlm.data import group_chunks, human_numbers_stream, lm_seqs
from rnnlm.models import LMModel3

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
