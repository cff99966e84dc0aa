"""Whatever has the state protocol works with all that asks for it: models of this
library, of fastai, of a user's own; a state that is a tensor, a pair, a nest."""
import matplotlib
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastcore.test import test_close as close, test_eq as equal
from torch import nn
from rnnlm.adapters import AdaptedLM, AWDLM
from rnnlm.bptt import TBPTT
from rnnlm.callback import StateResetter
from rnnlm.data import StreamDL, human_numbers_stream
from rnnlm.horizon import evaluating, grad_horizon, read_tokens, truncation_bias
from rnnlm.learner import lm_loss, rnn_learner
from rnnlm.models import LMModel3, RNNLM
from rnnlm.plot import plot_state
from rnnlm.state import StatefulLM, map_state, read_segments, state_tensors

matplotlib.use('agg')
torch.set_num_threads(1)
V,N = 30,8  # the vocab, and the units of a hidden state
stream = human_numbers_stream()[:2001]

class Layers(StatefulLM):
    "Two LSTM cells in a loop: the state is a pair for each layer"
    def __init__(self):
        super().__init__()
        self.i_h = nn.Embedding(V, N)
        self.cells = nn.ModuleList([nn.LSTMCell(N, N), nn.LSTMCell(N, N)])
        self.h_o = nn.Linear(N, V)

    def steps(self, emb, state):
        outs,state = [],list(state or [None, None])
        for e in emb.unbind(1):
            for i,cell in enumerate(self.cells):
                state[i] = cell(e, state[i])
                e = state[i][0]
            outs.append(e)
        return torch.stack(outs, 1),tuple(state)

    def read(self, x, state, begins=None):
        out,state = read_segments(self.steps, self.i_h(x), state, begins)
        return self.h_o(out),state

class Cell(StatefulLM):
    "A loop over `nn.GRUCell`"
    def __init__(self):
        super().__init__()
        self.i_h = nn.Embedding(V, N)
        self.cell = nn.GRUCell(N, N)
        self.h_o = nn.Linear(N, V)

    def steps(self, emb, h):
        hs = []
        for e in emb.unbind(1):
            h = self.cell(e, h)
            hs.append(h)
        return torch.stack(hs, 1),h

    def read(self, x, state, begins=None):
        out,state = read_segments(self.steps, self.i_h(x), state, begins)
        return self.h_o(out),state

class Scan(StatefulLM):
    """h[t] = a[t]*h[t-1] + (1-a[t])*b[t], all steps at once.

    Source: Feng et al. 2024 (minGRU)."""
    def __init__(self):
        super().__init__()
        self.i_h = nn.Embedding(V, N)
        self.gate,self.value = nn.Linear(N, N),nn.Linear(N, N)
        self.h_o = nn.Linear(N, V)

    def steps(self, emb, h):
        if h is None: h = emb.new_zeros(emb.shape[0], N)
        keep = self.gate(emb).sigmoid()
        kept = keep.cumprod(1)
        hs = kept*(h[:,None] + ((1-keep)*self.value(emb)/kept).cumsum(1))
        return hs,hs[:,-1]

    def read(self, x, state, begins=None):
        out,state = read_segments(self.steps, self.i_h(x), state, begins)
        return self.h_o(out),state

class Foreign(nn.Module):
    "A model of another library: its state is in `memory.h`, with its graph"
    def __init__(self):
        super().__init__()
        self.i_h = nn.Embedding(V, N)
        self.memory = nn.GRU(N, N, batch_first=True)
        self.h_o = nn.Linear(N, V)
        self.reset()
    def reset(self): self.memory.h = None
    def forward(self, x):
        out,self.memory.h = self.memory(self.i_h(x), self.memory.h)
        return self.h_o(out)

def awd():
    config = dict(awd_lstm_lm_config, emb_sz=6, n_hid=N, n_layers=2)
    return AWDLM(get_language_model(AWD_LSTM, V, config, drop_mult=.1))

def everywhere(p):
    "Dropout in all places of an `RNNLM`, tied weights, and what else there is"
    places = {f'{o}_p': p for o in ('embed', 'input', 'weight', 'hidden', 'output')}
    return places | dict(tie_weights=True, emb_sz=N+2, residual=True, norm='layer')

makers = {
    'LMModel3': lambda: LMModel3(V, N),
    'RNN': lambda: RNNLM(V, N, cell='rnn'),
    'GRU': lambda: RNNLM(V, N, cell='gru'),
    'minGRU': lambda: RNNLM(V, N, cell='mingru'),
    'LSTM': lambda: RNNLM(V, N),
    'LSTM, 2 layers, dropout': lambda: RNNLM(V, N, 2, **everywhere(.5)),
    'minGRU, 2 layers, dropout':
        lambda: RNNLM(V, N, 2, 'mingru', **everywhere(.5) | dict(weight_p=0.)),
    'AWD_LSTM': awd,
    'a pair for each layer': Layers,
    'a cell': Cell,
    'a scan': Scan,
    'adapted': lambda: AdaptedLM(Foreign(), 'memory.h', batch_dim=1)}

def make(kind):
    torch.manual_seed(0)
    return makers[kind]().double().eval()

@pytest.fixture(params=makers)
def kind(request): return request.param

@pytest.fixture
def model(kind):
    "Each kind of model, in double precision, in evaluation mode"
    return make(kind)

def target(model): return 'last' if isinstance(model, LMModel3) else 'all'
def loaders(model, sl, stride=None, bs=4):
    def loader(stride):
        return StreamDL(stream, bs, sl, target(model), stride, verbose=False)
    return DataLoaders(loader(stride), loader(None), device='cpu')
def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

class InEvaluation(Callback):
    "Dropout would draw other masks for the same training by hand"
    order = 100
    def before_train(self): self.model.eval()

def quiet(learn, *args):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args)
    return learn

def test_tbptt_is_the_loop_by_hand(model, kind):
    dls = loaders(model, sl=6, stride=2)
    by_hand = make(kind)  # with the same weights
    params = [*by_hand.parameters()]
    state = None
    for x,y in dls.train:
        _,middle = by_hand.read(x[:,:2], state)
        out,_ = by_hand.read(x, state)
        grads = torch.autograd.grad(lm_loss(out, y), params, allow_unused=True)
        with torch.no_grad():
            for p,g in zip(params, grads):
                if g is not None: p -= .1*g
        state = map_state(torch.Tensor.detach, middle)
    start = weights(model)
    def sgd(params, lr): return SGD(params, lr, mom=0.)
    def loss(pred, y): return lm_loss(pred, y).float()  # fastai's recorder needs it
    learn = Learner(dls, model, loss_func=loss, opt_func=sgd, lr=.1,
                    cbs=[StateResetter(), TBPTT(2, 6), InEvaluation()])
    quiet(learn, 1)
    close(weights(model), weights(by_hand), eps=1e-10)
    assert (weights(model)-start).abs().max() > .01
    assert model.state is None

def test_the_learner_trains_it(model):
    learn = rnn_learner(loaders(model, sl=6, stride=3), model.float())
    assert any(isinstance(o, TBPTT) for o in learn.cbs)
    quiet(learn, 2, 1e-2)
    assert learn.recorder.losses[-1] < learn.recorder.losses[0]

def test_validation_gives_the_state_back(model):
    dls = loaders(model, sl=6)
    learn = Learner(dls, model, loss_func=lm_loss, cbs=StateResetter)
    x,_ = dls.one_batch()
    with torch.no_grad(): model(x)
    held = state_tensors(model.state)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    equal(state_tensors(model.state), held)

def test_a_document_begins(model):
    x,_ = StreamDL(stream, 4, 6, verbose=False).one_batch()
    with torch.no_grad():
        _,state = model.read(x, None)
        begins = torch.zeros_like(x, dtype=torch.bool)
        begins[1,2] = begins[2,0] = begins[3,5] = True
        out,new = model.read(x, state, begins)
        for row,start in enumerate((None, 2, 0, 5)):
            one = map_state(lambda o: o.narrow(model.batch_dim, row, 1), state)
            text = x[row:row+1] if start is None else x[row:row+1,start:]
            want,want_state = model.read(text, one if start is None else None)
            got = out[row:row+1] if out.ndim == 2 else out[row:row+1,-text.shape[1]:]
            close(got, want, eps=1e-10)
            end = map_state(lambda o: o.narrow(model.batch_dim, row, 1), new)
            close(state_tensors(end), state_tensors(want_state), eps=1e-10)

def test_grad_horizon(model):
    found = grad_horizon(model, stream, max_lag=5, bs=3, n=2, show_plot=False)
    equal(found.norms.shape, (5,))
    x,y = StreamDL(stream, 3, 11, verbose=False).one_batch()
    want = torch.zeros(5)
    with torch.no_grad(): _,state = model.read(x[:,:5], None)
    state = map_state(lambda o: o.requires_grad_(), state)
    states = [state]
    for t in range(5, 11):  # the losses of the last two of these six steps
        out,state = model.read(x[:,t:t+1], state)
        states.append(state)
        if t < 9: continue
        loss = F.cross_entropy(out.flatten(0, -2), y[:,t], reduction='sum')
        for lag in range(1, 6):
            grads = torch.autograd.grad(loss, state_tensors(states[-1-lag]),
                                        retain_graph=True)
            rows = [g.movedim(model.batch_dim, 0).flatten(1) for g in grads]
            want[lag-1] += torch.cat(rows, 1).norm(dim=1).mean()/2
    close(torch.tensor(found.norms), want, eps=1e-5)
    assert (want > 0).all()

def test_truncation_bias(model):
    whole = truncation_bias(model, stream, 12, 12, bs=4, sl=12)
    close(whole.angle, 0, eps=1e-4)
    close(whole.length, 1, eps=1e-8)
    cut = truncation_bias(model, stream, 2, 2, bs=4, sl=12)
    assert cut.angle > 1e-4

def test_plot_state(model):
    text = stream[:7]
    ax = plot_state(model, text)
    drawn = torch.tensor(ax.images[0].get_array().data).T  # (tokens, units)
    with evaluating(model, 'test') as m, torch.no_grad():
        x = text.ids[None]
        _,states = read_tokens(m, x, x, None)
    last_layer = [state_tensors(o)[0].flatten(0, -2)[-1] for o in states[1:]]
    close(drawn, torch.stack(last_layer)[:,:drawn.shape[1]], eps=1e-6)
    matplotlib.pyplot.close(ax.figure)
