"""`RNNLM` and what it is made of: what can't be built or read is named, and what can be
is what the equations say."""
import json, pickle
from copy import deepcopy
from dataclasses import replace
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.callback.rnn import RNNCallback, RNNRegularizer, rnn_cbs
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastcore.test import test_close as close, test_eq as equal
from torch import nn
from rnnlm.bptt import TBPTT
from rnnlm.callback import StateResetter
from rnnlm.config import RNNLMConfig
from rnnlm.data import StreamDL, human_numbers_stream
from rnnlm.learner import rnn_learner
from rnnlm.metrics import lm_loss
from rnnlm.mingru import MinGRU, log_scan
from rnnlm.models import RNNLM, LMModel3
from rnnlm.outputs import RNNOutputs
from rnnlm.state import state_tensors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:LSTM with projections')
V = 30
stream = human_numbers_stream()[:2001]
x,y = StreamDL(stream, 4, 6, verbose=False).one_batch()
cells = 'rnn', 'gru', 'lstm', 'mingru'
drops = dict(embed_p=.2, input_p=.2, weight_p=.2, hidden_p=.2, output_p=.2)
rest = dict(tie_weights=True, emb_sz=10, residual=True, norm='layer')
each_cell = pytest.mark.parametrize('cell', cells)

def full(cell, n_layers=3, **kwargs):
    "A model with everything on"
    torch.manual_seed(0)
    ps = drops | (dict(weight_p=0.) if cell == 'mingru' else {})
    return RNNLM(V, 8, n_layers, cell, **ps, **rest | kwargs)

# the config

@each_cell
def test_a_config_builds_the_model_again(cell):
    model = full(cell)
    config = RNNLMConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    equal(config, model.config)
    for given in config,config.to_dict():
        other = RNNLM.from_config(given)
        equal(other.config, model.config)
        other.load_state_dict(model.state_dict())
        equal(other.eval()(x), model.eval()(x))
        model.reset()

@pytest.mark.parametrize('kwargs, message', [
    (dict(cell='GRU'), "cell must be 'rnn', 'gru', 'lstm' or 'mingru', got 'GRU'"),
    (dict(cell=None), 'or the class of a recurrent layer, as nn.LSTM, got None'),
    (dict(emb_sz=0), 'emb_sz must be at least 1, got 0'),
    (dict(emb_sz=1.5), 'emb_sz must be a whole number, got 1.5'),
    (dict(n_layers='2'), "n_layers must be a whole number, got '2'"),
    *[({name: p}, f'{name} must be .*, got {p}')
      for name in drops for p in (-.1, 1, 1.5, float('nan'))],
    *[({name: 'much'}, f"{name} must be a number, got 'much'") for name in drops],
    (dict(hidden_p=True), 'hidden_p must be a number, got True'),
    (dict(tie_weights='yes'), "tie_weights must be True or False, got 'yes'"),
    (dict(residual=None), 'residual must be True or False, got None'),
    (dict(norm='batch'), "norm must be 'layer', 'rms' or None, got 'batch'"),
    (dict(cell='mingru', weight_p=.5), "weight_p must be 0 for cell='mingru'"),
    (dict(n_heads=4), r'n_heads is no argument of RNNLM')])
def test_values_that_build_no_model_are_named(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message): RNNLM(V, 8, **kwargs)

def test_a_config_of_a_newer_version_is_refused():
    values = full('lstm').config.to_dict() | dict(rope=True)
    for build in RNNLMConfig.from_dict,RNNLM.from_config:
        with pytest.raises(ValueError, match='config has rope, which .*: update rnnlm'):
            build(values)
    del values['rope'], values['vocab_sz'], values['n_hidden']
    with pytest.raises(ValueError, match='config must have vocab_sz and n_hidden'):
        RNNLMConfig.from_dict(values)

def test_a_config_that_was_changed_by_hand_is_checked_again():
    config = full('gru').config
    config.hidden_p = 2
    with pytest.raises(ValueError, match='hidden_p must be .*, got 2'):
        RNNLM.from_config(config)

def test_a_class_as_cell_builds_a_model_and_no_config_to_store():
    small = partial(nn.LSTM, proj_size=3)
    for cell in nn.GRU,small,MinGRU:
        model = RNNLM(V, 8, 2, cell)
        equal(model(x).shape, (4, 6, V))
        with pytest.raises(TypeError, match="a file can't hold a class"):
            model.config.to_dict()
        equal(RNNLM.from_config(model.config).config, model.config)

@pytest.mark.parametrize('emb_sz', [None, 5, 8, 11])
@pytest.mark.parametrize('cell', ['gru', partial(nn.LSTM, proj_size=3)])
def test_tied_weights_fit_any_sizes(emb_sz, cell):
    model = RNNLM(V, 8, 2, cell, emb_sz=emb_sz, tie_weights=True)
    assert model.i_h.weight is model.h_o.weight
    lm_loss(model(x), y).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    for other in deepcopy(model),pickle.loads(pickle.dumps(model)),model.double():
        assert other.i_h.weight is other.h_o.weight

# the model

@each_cell
def test_masks_are_drawn_once_a_window(cell):
    model = full(cell)
    model.new_window()
    whole,_ = model.read(x, None)
    first,state = model.read(x[:,:2], None)
    close(torch.cat([first, model.read(x[:,2:], state)[0]], 1), whole, eps=1e-5)
    torch.manual_seed(1)
    once = model(x)
    model.reset()
    assert (model(x)-once).abs().max() > .01  # other masks
    model.reset()
    torch.manual_seed(1)
    close(model(x, stride=2), once, eps=1e-5)  # the same, in two parts

@each_cell
def test_dropped_weights_leave_the_parameters_alone(cell):
    model = full(cell)
    names = [*model.state_dict()]
    before = deepcopy(model.state_dict())
    model(x)
    equal([*model.state_dict()], names)
    for name,p in model.state_dict().items(): equal(p, before[name])
    copy = deepcopy(model).eval()
    equal(copy(x), model.eval()(x))
    assert not any('mask' in o for o in names)

@each_cell
@pytest.mark.parametrize('training', [True, False])
def test_a_document_that_begins_forgets_what_was_before(cell, training):
    model = full(cell).double().train(training)
    begins = torch.zeros_like(x, dtype=torch.bool)
    begins[1,3] = begins[2,0] = begins[3,5] = True
    model(x)
    held = model.state
    model.new_window()
    out,_ = model.read(x, held, begins)
    plain,_ = model.read(x, held)
    fresh,_ = model.read(x, None)
    equal(out[0], plain[0])
    close(out[2], fresh[2], eps=1e-12)
    close(out[1,:3], plain[1,:3], eps=1e-12)
    close(out[1,3:], model.read(x[:,3:], None)[0][1], eps=1e-12)
    close(out[3,5:], model.read(x[:,5:], None)[0][3], eps=1e-12)

@each_cell
def test_a_state_of_another_number_of_layers_is_named(cell):
    for n in 1,2,4:
        model = full(cell)
        model.state = RNNLM(V, 8, n, cell).read(x, None)[1]
        with pytest.raises(ValueError, match=rf'n_layers=3, got \({n}, 4, 8\)'):
            model(x)

@pytest.mark.parametrize('cell', ['lstm', 'mingru'])
def test_a_compiled_model_with_everything_on_learns_the_same(cell):
    def learned(wrap):
        model = full(cell)
        dls = stream.dataloaders(8, 6, verbose=False)
        learn = rnn_learner(dls, wrap(model))
        set_seed(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    compiled = learned(partial(torch.compile, backend='eager'))
    equal(compiled, learned(lambda o: o))

# minGRU

def by_steps(log_a, b, h):
    hs = []
    for keep,add in zip(log_a.exp().unbind(1), b.unbind(1)):
        h = keep*h + add
        hs.append(h)
    return torch.stack(hs, 1)

@pytest.mark.parametrize('scale', [.1, 3., 100.])
@pytest.mark.parametrize('shape', [(2, 4096, 6), (1, 4096, 2100)])
def test_the_scan_is_exact_in_float32_at_4096_steps(shape, scale):
    torch.manual_seed(0)
    gate = scale*torch.randn(shape)
    args = F.logsigmoid(-gate),torch.rand(shape),torch.rand(shape[0], shape[2])
    args = [o.requires_grad_() for o in args]
    exact = [o.detach().double().requires_grad_() for o in args]
    out,want = log_scan(*args),by_steps(*exact)
    assert ((out-want)/want).abs().max() < 1e-6
    weights = torch.randn(shape)
    got = torch.autograd.grad((out*weights).sum(), args)
    for g,w in zip(got, torch.autograd.grad((want*weights.double()).sum(), exact)):
        assert g.isfinite().all() and (g-w).abs().max() < 1e-5*w.abs().max()

def test_a_mingru_with_a_gate_wide_open_or_shut_stays_finite():
    layer = MinGRU(4, 8)
    out,h = layer(1e4*torch.randn(2, 4096, 4))
    out.mean().backward()
    assert out.isfinite().all() and h.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())

def test_a_state_of_mingru_that_would_be_broadcast_is_refused():
    layer = MinGRU(4, 8)
    for h in torch.zeros(1, 1, 8),torch.zeros(2, 8),torch.zeros(1, 2, 1):
        with pytest.raises(ValueError, match=r'the state must be \(1, 2, 8\), got'):
            layer(torch.zeros(2, 3, 4), h)

# fastai's RNNRegularizer

class Triple(nn.Module):
    "Returns what fastai's `RNNCallback` expects"
    def __init__(self, lm):
        super().__init__()
        self.lm,self.reset = lm,lm.reset
    def forward(self, x):
        self.lm.new_window()
        raw,self.lm.state = self.lm.encode(x, self.lm.state)
        out = self.lm.output_drop(raw)
        return self.lm.h_o(out),raw,out

@each_cell
@pytest.mark.parametrize('alpha, beta', [(2, 0), (0, 1), (2, 1)])
def test_the_regularized_loss_is_fastais_to_the_last_bit(cell, alpha, beta):
    def fit(make, wrap, cbs):
        model = full(cell, emb_sz=None)
        dls = stream.dataloaders(8, 6, drop_last=True, verbose=False)
        learn = make(dls, wrap(model), opt_func=Adam, cbs=[StateResetter(), *cbs])
        set_seed(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    plain = partial(Learner, loss_func=lm_loss)
    reg = RNNRegularizer(alpha, beta)
    want = fit(plain, Triple, [RNNCallback(), reg])
    def same(model): return model
    equal(fit(plain, same, [RNNOutputs(), reg]), want)
    equal(fit(rnn_learner, same, [reg]), want)
    equal(fit(rnn_learner, same, rnn_cbs(alpha, beta)), want)
    assert want.isfinite().all()
    assert (fit(plain, same, [])-want).abs().max() > 1e-3

def test_a_window_of_one_step_has_no_temporal_difference():
    "fastai's mean over none is NaN, and so were all weights after that batch"
    dls = stream[:8*25+1].dataloaders(8, 6, valid=stream[:99], verbose=False)
    equal([x.shape[1] for x,_ in dls.train], [6, 6, 6, 6, 1])
    learn = rnn_learner(dls, full('gru'), cbs=RNNRegularizer(2, 1))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_a_regularizer_given_to_one_fit_is_brought_what_it_needs():
    dls = stream.dataloaders(8, 6, stride=3, drop_last=True, verbose=False)
    learn = rnn_learner(dls, full('gru'), cbs=TBPTT(3, 6))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=RNNRegularizer(2, 1))
    assert not hasattr(learn, 'rnn')
    equal(len(learn.model.output_drop._forward_hooks), 0)

def test_a_model_without_an_output_dropout_is_named():
    dls = stream.dataloaders(8, 6, 'last', verbose=False)
    learn = rnn_learner(dls, LMModel3(V, 8), cbs=RNNRegularizer(2, 1))
    with pytest.raises(TypeError, match='output_drop.* LMModel3 has none'):
        with learn.no_bar(): learn.fit(1)
