"""The ladder's seven models: what each reads and keeps, how it is built again, and that
`RNNLM` gives the same."""
import re
from copy import deepcopy
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.rnn import RNNRegularizer
from fastcore.test import test_close as close, test_eq as equal
from torch import nn
from rnnlm.data import human_numbers_stream
from rnnlm.diagrams import plot_unrolled
from rnnlm.ladder import (
    LMModel1, LMModel2, LMModel3, LMModel4, LMModel5, LMModel6, LMModel7)
from rnnlm.learner import rnn_learner
from rnnlm.lm import RNNLM
from rnnlm.state import state_tensors

torch.set_num_threads(1)
V,H = 30,8
stream = human_numbers_stream()[:2001]
dls = stream.dataloaders(bs=8, sl=6, verbose=False)
x,y = dls.one_batch()
forgetful,looping = [LMModel1, LMModel2],[LMModel3, LMModel4]
stacked = [LMModel5, LMModel6, LMModel7]
each = pytest.mark.parametrize('arch', [*forgetful, *looping, *stacked])
each_stateful = pytest.mark.parametrize('arch', [*looping, *stacked])

def seeded(f, *args):
    torch.manual_seed(0)
    return f(*args)

def weights_of(model):
    "The weights of `model`, by the names that they have in `RNNLM`"
    w = model.state_dict()
    if not isinstance(model, LMModel4):
        return {re.sub(r'rnn\.(.*)_l(\d+)', r'rnns.\2.\1_l0', k): v
                for k,v in w.items()}
    h_h,bias = w.pop('h_h.weight'),w.pop('h_h.bias')
    return w | {'rnns.0.weight_ih_l0': h_h, 'rnns.0.weight_hh_l0': h_h,
                'rnns.0.bias_ih_l0': bias, 'rnns.0.bias_hh_l0': torch.zeros(H)}

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('arch, own, general', [
    (LMModel4, {}, dict(cell=partial(nn.RNN, nonlinearity='relu'))),
    (LMModel5, dict(n_layers=3), dict(n_layers=3, cell='rnn')),
    (LMModel6, {}, dict(n_layers=2, cell='lstm')),
    (LMModel7, dict(p=.3), dict(n_layers=2, tie_weights=True, output_p=.3))])
def test_rnnlm_gives_the_same_with_the_same_weights(arch, own, general, training):
    model,other = arch(V, H, **own).train(training),RNNLM(V, H, **general)
    other.load_state_dict(weights_of(model))
    other.train(training)
    for _ in range(2):  # the second time from the state of the first
        close(seeded(other, x), seeded(model, x), eps=1e-5)
        for a,b in zip(state_tensors(model.state), state_tensors(other.state)):
            close(a.view_as(b), b, eps=1e-5)
    begins = torch.zeros_like(x, dtype=torch.bool)
    begins[3,2] = True
    close(seeded(other, x, begins), seeded(model, x, begins), eps=1e-5)

def test_lmmodel1_gives_what_lmmodel2_gives_and_reads_three_tokens():
    one,two = LMModel1(V, H),LMModel2(V, H)
    two.load_state_dict(one.state_dict())
    equal(one(x[:,:3]), two(x[:,:3]))
    for n in 2,4:
        with pytest.raises(ValueError, match=f'must have 3 tokens a row, got {n}'):
            one(x[:,:n])

def test_lmmodel4_gives_the_last_prediction_of_lmmodel3():
    three,four = LMModel3(V, H),LMModel4(V, H)
    four.load_state_dict(three.state_dict())
    for _ in range(2): equal(four(x)[:,-1], three(x))
    equal(four.state, three.state)

@each
def test_each_is_built_again_from_its_config(arch):
    model = arch(V, H, **dict(p=.2) if arch is LMModel7 else {})
    again = arch(**model.config)
    again.load_state_dict(model.state_dict())
    equal(again.config, model.config)
    equal(again.vocab_sz, V)
    tokens = x[:,:3]
    close(again.eval()(tokens), model.eval()(tokens))

@each
def test_each_is_drawn(arch): plot_unrolled(arch(V, H), stream)

@pytest.mark.parametrize('arch, shapes', [
    (LMModel4, [(8, H)]), (LMModel5, [(2, 8, H)]), (LMModel6, [(2, 8, H)]*2),
    (LMModel7, [(2, 8, H)]*2)])
def test_the_state_is_detached_and_that_of_a_batch(arch, shapes):
    model = arch(V, H)
    equal(model(x).shape, (8, 6, V))
    equal([tuple(o.shape) for o in state_tensors(model.state)], shapes)
    assert not any(o.requires_grad for o in state_tensors(model.state))
    with pytest.raises(ValueError, match='x has a batch size of 5'): model(x[:5])
    model.reset()
    equal(model.state, None)

@each_stateful
def test_a_window_is_read_in_one_or_in_parts(arch):
    model = arch(V, H).eval()
    whole = model(x)
    model.reset()
    last = [model(o) for o in (x[:,:2], x[:,2:])][-1]
    close(last[...,-1,:] if last.ndim == 3 else last,
          whole[...,-1,:] if whole.ndim == 3 else whole, eps=1e-5)

def test_tied_weights_stay_one_matrix():
    model = LMModel7(V, H)
    for o in model,deepcopy(model),deepcopy(model).double():
        assert o.h_o.weight is o.i_h.weight
    equal(len([*model.parameters()]), len([*LMModel6(V, H).parameters()])-1)

@pytest.mark.parametrize('p', [-.1, 1, 1.5])
def test_a_dropout_out_of_range_is_named(p):
    with pytest.raises(ValueError, match=f'p must be from 0 to below 1, got {p}'):
        LMModel7(V, H, p=p)

def test_fastais_regularizer_sees_lmmodel7():
    class Added(Callback):
        "What was added to each loss, less what should be"
        errors = ()
        def before_backward(self):
            raw,out = self.learn.rnn.raw_out,self.learn.rnn.out
            change = (raw[:,1:]-raw[:,:-1]).square().mean()
            penalty = 2*out.square().mean()+change
            error = self.learn.loss_grad-self.learn.loss-penalty
            self.errors += error.item(),
    added = Added()
    whole = stream.dataloaders(bs=8, sl=6, drop_last=True, verbose=False)
    learn = rnn_learner(whole, LMModel7(V, H), cbs=[RNNRegularizer(2, 1), added])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    n = len(whole.train)
    equal(len(added.errors), n)
    close(torch.tensor(added.errors), torch.zeros(n), eps=1e-5)
