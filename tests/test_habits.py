"""What people do with a model and its batches: each mistake is told in one sentence,
and what can be made to agree does."""
import warnings
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.callback.rnn import rnn_cbs
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy, error_rate, perplexity
from fastai.text.data import LMDataLoader, SortedDL, pad_input_chunk
from fastai.text.models.core import (
    PoolingLinearClassifier, SentenceEncoder, SequentialRNN)
from fastai.torch_core import set_seed
from fastcore.foundation import L
from fastcore.test import test_close as close, test_eq as equal
from torch import nn
from rnnlm.adapters import AdaptedLM, AWDLM, Encoder
from rnnlm.bptt import TBPTT
from rnnlm.callback import LengthLR, StateResetter
from rnnlm.data import StreamDL, group_chunks, human_numbers_stream, lm_seqs
from rnnlm.learner import rnn_learner
from rnnlm.metrics import PADDING, agree, lm_loss
from rnnlm.models import LMModel2, LMModel3, RNNLM
from rnnlm.state import map_state, state_tensors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore:LSTM with projections')
V = 30
stream = human_numbers_stream()[:2001]
losses = [lm_loss, CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy]
named = [getattr(o, '__name__', type(o).__name__) for o in losses]
each_loss = pytest.mark.parametrize('loss_func', losses, ids=named)

class LastStep(RNNLM):
    "Answers once a window, by hand"
    def read(self, x, state, begins=None):
        out,state = super().read(x, state, begins)
        return out[:,-1],state

def loaders(target, **kwargs):
    return stream.dataloaders(bs=8, sl=6, target=target, verbose=False, **kwargs)

def fit(make, dls, arch, loss_func, n_fits=1, **kwargs):
    "A learner after a fit, and its losses and metrics"
    set_seed(0)
    learn = make(dls, arch(V, 8), loss_func=loss_func, **kwargs)
    with learn.no_bar(), learn.no_logging():
        for _ in range(n_fits): learn.fit(1, 1e-2)
    train = learn.recorder.losses
    return train + [*learn.recorder.values[-1][1:]],learn

plain = partial(Learner, cbs=StateResetter, metrics=accuracy)
lean = partial(rnn_learner, metrics=[accuracy, perplexity, error_rate])

# model and target

@each_loss
def test_a_model_of_all_steps_and_one_target_agree(loss_func):
    got,learn = fit(plain, loaders('last'), RNNLM, loss_func)
    want,_ = fit(plain, loaders('last'), LastStep, F.cross_entropy)
    equal(got, want)
    with learn.no_bar(): preds,targs = learn.get_preds()
    equal((preds.ndim, targs.ndim), (2, 1))

@each_loss
def test_a_model_of_one_step_and_all_targets_agree(loss_func):
    got,learn = fit(plain, loaders('all'), LMModel3, loss_func)
    want,_ = fit(plain, loaders('last'), LMModel3, F.cross_entropy)
    close(got, want, eps=1e-6)
    with learn.no_bar(): preds,targs = learn.get_preds()
    equal((preds.ndim, targs.ndim), (2, 1))

def test_rnn_learner_and_its_metrics_agree_with_the_target():
    got,_ = fit(lean, loaders('last'), RNNLM, lm_loss)
    want,_ = fit(lean, loaders('last'), LastStep, lm_loss)
    close(got, want, eps=1e-6)
    got,_ = fit(lean, loaders('all', drop_last=True), LMModel3, lm_loss)
    want,_ = fit(lean, loaders('last', drop_last=True), LMModel3, lm_loss)
    close(got, want, eps=1e-6)

@each_loss
def test_a_model_without_memory_agrees_too(loss_func):
    kwargs = dict(drop_last=True)
    got,learn = fit(lean, loaders('all', **kwargs), LMModel2, loss_func)
    want,other = fit(lean, loaders('last', **kwargs), LMModel2, lm_loss)
    close(got, want, eps=1e-6)
    with learn.no_bar(), other.no_bar():
        _,*got = learn.get_preds(with_loss=True)
        _,*want = other.get_preds(with_loss=True)
    for a,b in zip(got, want): close(a, b, eps=1e-6)

@pytest.mark.parametrize('graded', ['all', 'new'])
@pytest.mark.parametrize('arch', [RNNLM, LMModel3])
def test_overlapping_windows_agree_with_the_target(arch, graded):
    def with_tbptt(target): return fit(
        partial(Learner, cbs=[StateResetter(), TBPTT(3, 6, graded)]),
        loaders(target, stride=3), arch, CrossEntropyLossFlat())[0]
    got = with_tbptt('last' if arch is RNNLM else 'all')
    want = fit(partial(Learner, cbs=[StateResetter(), TBPTT(3, 6)]),
               loaders('last', stride=3), LastStep if arch is RNNLM else LMModel3,
               F.cross_entropy)[0]
    close(got, want, eps=1e-6)

@pytest.mark.parametrize('loss_func', losses[2:], ids=named[2:])
@pytest.mark.parametrize('sl', [6, V])  # with V steps no shape tells
def test_torchs_cross_entropy_of_all_steps_says_what_to_write(loss_func, sl):
    dls = stream.dataloaders(bs=8, sl=sl, verbose=False)
    with pytest.raises(ValueError, match='write loss_func=lm_loss, or Cross'):
        fit(plain, dls, RNNLM, loss_func)

def test_a_model_that_moves_its_vocab_may_use_torchs_cross_entropy():
    class Moved(RNNLM):
        def read(self, x, state, begins=None):
            out,state = super().read(x, state, begins)
            return out.transpose(1, 2),state
    train,_ = fit(partial(Learner, cbs=StateResetter), loaders('all'), Moved,
                  F.cross_entropy)
    want,_ = fit(partial(Learner, cbs=StateResetter), loaders('all'), RNNLM, lm_loss)
    close(train, want, eps=1e-5)

def test_numbers_that_are_no_tokens_are_left_as_they_are():
    pred,targ = torch.zeros(4, 3),torch.zeros(4, 3)
    for got,given in zip(agree(pred, targ), (pred, targ)): assert got is given
    class Series(nn.Module):
        "Two numbers of two series, one step ahead"
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(2, 2, batch_first=True)
        def forward(self, x): return self.rnn(x)[0]
        def reset(self): pass
    batch = torch.randn(4, 6, 2),torch.randn(4, 6, 2)
    dls = DataLoaders([batch]*3, [batch])
    learn = Learner(dls, Series(), loss_func=nn.MSELoss(), cbs=StateResetter)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with torch.no_grad(): want = F.mse_loss(learn.model(batch[0]), batch[1]).item()
    close(learn.recorder.values[-1][1], want, eps=1e-6)

def test_the_mean_over_no_target_is_no_nan():
    pred = torch.randn(2, 3, V, requires_grad=True)
    loss = lm_loss(pred, torch.full((2, 3), PADDING))
    loss.backward()
    equal(loss.item(), 0.)
    equal(pred.grad, torch.zeros_like(pred))
    x,_ = StreamDL(stream, 8, 6, verbose=False).one_batch()
    padded = x,torch.full_like(x, PADDING)
    learn = rnn_learner(DataLoaders([padded], loaders('all').valid), RNNLM(V, 8))
    start = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, wd=0.)
    assert torch.tensor(learn.recorder.losses).isfinite().all()
    equal([*learn.model.parameters()], start)

def test_a_loss_that_is_no_number_is_not_hidden():
    assert lm_loss(torch.full((2, V), torch.nan), torch.tensor([1, PADDING])).isnan()

def test_predictions_and_targets_of_other_shapes_are_named():
    with pytest.raises(ValueError, match=r'\(4, 5\) for those of \(4, 5, 30\), got'):
        lm_loss(torch.zeros(4, 5, V), torch.zeros(4, 3).long())
    with pytest.raises(TypeError, match='pred must be a tensor of logits, got tuple'):
        lm_loss((torch.zeros(4, V),), torch.zeros(4).long())
    with pytest.raises(TypeError, match='loss_func=MSELossFlat'):
        lm_loss(torch.zeros(4, V), torch.zeros(4))

# loaders whose rows do not read on

def grouped(bs):
    res = group_chunks(lm_seqs(stream, 3), bs, verbose=False)
    res.n_lines = bs
    return res

def warned(dls, arch=LMModel3, make=plain, n_fits=2):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(make, dls, arch, lm_loss, n_fits)
    return [str(o.message) for o in said if 'reads each row on' in str(o.message)]

@pytest.mark.parametrize('make', [plain, rnn_learner])
def test_a_loader_that_shuffles_is_warned_of_once(make):
    train = grouped(16)
    dls = DataLoaders.from_dsets(train, train, bs=16, drop_last=True)
    text, = warned(dls, make=make)
    assert 'the training loader has it jump: it shuffles; write shuffle=False' in text
    torchs = torch.utils.data.DataLoader([*train], batch_size=16, shuffle=True)
    assert warned(DataLoaders(torchs, torchs))

def test_a_loader_of_another_bs_is_warned_of():
    train = grouped(16)
    dls = DataLoaders.from_dsets(train, train, bs=8, shuffle=False, drop_last=True)
    texts = warned(dls)
    assert ['training' in o for o in texts] == [True, False]
    assert all(o.endswith('its bs=8 is not the 16 of group_chunks; write bs=16')
               for o in texts)

def test_what_is_right_is_not_warned_of():
    train = grouped(16)
    for kw in dict(bs=16, shuffle=False), dict(bs=16, shuffle=False, drop_last=True):
        equal(warned(DataLoaders.from_dsets(train, train, **kw)), [])
    equal(warned(loaders('last')), [])
    ungrouped = lm_seqs(stream, 3)[:64]
    equal(warned(DataLoaders.from_dsets(ungrouped, ungrouped, bs=8, shuffle=False)), [])
    docs = L(stream.ids[i*100:(i+1)*100] for i in range(12))
    theirs = LMDataLoader(docs, bs=4, seq_len=6, shuffle=True)  # of documents
    equal(warned(DataLoaders(theirs, theirs), RNNLM), [])
    class Forgets(nn.Module):
        def __init__(self, *args):
            super().__init__()
            self.lm = RNNLM(*args)
        def forward(self, x): return self.lm.read(x, None)[0]
    shuffled = DataLoaders.from_dsets(train, train, bs=16)
    equal(warned(shuffled, Forgets), [])
    equal(warned(shuffled, LMModel2, rnn_learner), [])

def test_a_text_of_a_larger_vocab_is_named_before_the_first_batch():
    for make in plain,rnn_learner:
        learn = make(loaders('all'), RNNLM(V-1, 8), loss_func=lm_loss)
        with pytest.raises(ValueError, match='vocab_sz of RNNLM must be at least 30'):
            with learn.no_bar(), learn.no_logging(): learn.fit(1)

# models that are built wrongly

@pytest.mark.parametrize('arch', [LMModel2, LMModel3, RNNLM])
def test_sizes_are_checked_when_a_model_is_built(arch):
    wrong = {'64': TypeError, 64.: TypeError, 0: ValueError, -1: ValueError}
    for n,error in wrong.items():
        with pytest.raises(error, match=f"n_hidden must be .*, got {n!r}"): arch(V, n)
        with pytest.raises(error, match=f"vocab_sz must be .*, got {n!r}"): arch(n, 8)
    with pytest.raises(TypeError, match=r'got L: write len\(vocab\), 30'):
        arch(stream.vocab, 8)
    with pytest.raises(TypeError, match=r'got TokenStream: write len\(stream.vocab\)'):
        arch(stream, 8)

def test_a_backward_layer_is_refused_when_built():
    for cell in 'lstm','gru','rnn','mingru':
        with pytest.raises(ValueError, match='bidirectional must be False, got True'):
            RNNLM(V, 8, cell=cell, bidirectional=True)
    for layer in nn.LSTM,nn.GRU,nn.RNN:
        with pytest.raises(ValueError, match='bidirectional must be False, got True'):
            RNNLM(V, 8, cell=partial(layer, bidirectional=True))

@pytest.mark.parametrize('kwargs, message', [
    (dict(n_layers=0), 'n_layers must be at least 1, got 0'),
    (dict(num_layers=2), 'num_layers is n_layers here: write n_layers=2'),
    (dict(hidden_size=9), 'hidden_size is n_hidden here: write n_hidden=9'),
    (dict(batch_first=False), 'batch_first must be True, got False'),
    (dict(rnn=nn.GRU), "rnn is cell here: write cell='gru'"),
    (dict(cell='LSTM'), "cell must be 'rnn', 'gru', 'lstm' or 'mingru', got 'LSTM'"),
    (dict(cell=nn.LSTM(8, 8)), r'or the class of a recurrent layer.* got LSTM\(...\)'),
    (dict(cell=nn.LSTMCell), 'or the class of a recurrent layer.*LSTMCell'),
    (dict(n_layers=2, dropout=.5), 'dropout is hidden_p here: write hidden_p=0.5'),
    (dict(proj_size=3), r'write cell=partial\(nn.LSTM, proj_size=3\)')])
def test_layers_are_checked_when_a_model_is_built(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message): RNNLM(V, 8, **kwargs)

@pytest.mark.parametrize('n_layers', [1, 2])
def test_proj_size_works(n_layers):
    torch.manual_seed(0)
    small = partial(nn.LSTM, proj_size=3)
    model = RNNLM(V, 8, n_layers, small).double()
    x,y = StreamDL(stream, 4, 6, verbose=False).one_batch()
    out = model(x)
    equal(out.shape, (4, 6, V))
    equal([o.shape for o in model.state], [(n_layers, 4, 3), (n_layers, 4, 8)])
    lm_loss(out, y).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    model.reset()
    close(model(x, stride=2), out, eps=1e-12)
    close(model.state, model.encode(x[:,:2])[1], eps=1e-12)
    begins = torch.zeros_like(x, dtype=torch.bool)
    begins[1,2] = True
    model.reset()
    close(model(x, begins)[1,2:], model.read(x[1:2,2:], None)[0][0], eps=1e-12)
    fit(partial(rnn_learner, cbs=TBPTT(3, 6)), loaders('all', stride=3),
        partial(RNNLM, n_layers=n_layers, cell=small), lm_loss)

# what is given to a model

x,y = StreamDL(stream, 4, 6, verbose=False).one_batch()
lstm,gru,looping = RNNLM(V, 8),RNNLM(V, 8, cell='gru'),LMModel3(V, 8)
zeros = torch.zeros(1, 4, 8)

@pytest.mark.parametrize('model', [LMModel2(V, 8), looping, lstm])
@pytest.mark.parametrize('given, message', [
    (x.tolist(), r'x must be a tensor \(bs, sl\), got list'),
    (x.numpy(), r'x must be a tensor \(bs, sl\), got ndarray'),
    (x.float(), 'does not read measured numbers'),
    (x.bool(), 'got torch.bool'),
    (x.short(), 'got torch.int16; convert with .long'),
    (x.byte(), 'got torch.uint8; convert with .long')])
def test_what_are_no_token_ids_is_named(model, given, message):
    with pytest.raises(TypeError, match=message): model(given)

def test_small_integers_are_read():
    for model in LMModel2(V, 8),LMModel3(V, 8).eval(),RNNLM(V, 8).eval():
        equal(model(x.int()).shape[-1], V)

@pytest.mark.parametrize('model', [lstm, gru, looping])
def test_a_state_in_the_place_of_begins_is_named(model):
    for given in zeros[0],zeros,(zeros, zeros),x,torch.zeros(4, dtype=torch.bool):
        with pytest.raises(TypeError, match='begins must be a mask of x, torch.bool'):
            model(x, given)
    assert model.state is None

@pytest.mark.parametrize('stride', [0, -1, 2.])
def test_a_stride_out_of_range_is_named(stride):
    with pytest.raises((TypeError, ValueError), match=f'stride must .*, got {stride}'):
        lstm(x, stride=stride)

@pytest.mark.parametrize('model, state, message', [
    (lstm, zeros, r'state of RNNLM with LSTM must be a pair of tensors \(h, c\), got'),
    (lstm, (zeros,), 'got tuple of 1'),
    (gru, (zeros, zeros), 'with GRU must be one tensor, got tuple of 2'),
    (lstm, (torch.zeros(4), torch.zeros(4)), 'its dimension 1 must count the rows'),
    (looping, torch.zeros(4, 1), r'must be \(4, 8\), got \(4, 1\)'),  # no broadcast
    (looping, (torch.zeros(4, 8),)*2, r'must be \(4, 8\), got a tuple of'),
    (looping, zeros, r'state is that of 1 rows')])
def test_a_state_set_by_hand_that_does_not_fit_is_named(model, state, message):
    model.state = state
    try:
        with pytest.raises((TypeError, ValueError), match=message): model(x)
    finally: model.reset()

def test_callbacks_and_adapters_name_what_they_miss():
    train = grouped(16)
    dls = DataLoaders.from_dsets(train, train, bs=16, shuffle=False)
    with pytest.raises(TypeError, match='LengthLR needs a training loader with an sl'):
        fit(partial(Learner, cbs=LengthLR), dls, LMModel3, lm_loss)
    with pytest.raises(TypeError, match='model must have a method reset'):
        AdaptedLM(LMModel2(V, 8), 'h')
    with pytest.raises(ValueError, match="in which its state is, got 'rnn.h'"):
        AdaptedLM(LMModel3(V, 8), 'rnn.h')
    with pytest.raises(TypeError, match='AWD_LSTM with its decoder, .* got RNNLM'):
        AWDLM(lstm)
    with pytest.raises(TypeError, match='lm must have a method encode.* LMModel3 has'):
        Encoder(looping)

# a classifier on a language model

@pytest.mark.parametrize('kwargs, n_out', [
    ({}, 8), (dict(cell=partial(nn.LSTM, proj_size=5)), 5),
    (dict(cell='gru', n_layers=2), 8), (dict(cell='mingru', n_layers=2), 8)])
def test_encode_gives_the_hidden_states(kwargs, n_out):
    model = RNNLM(V, 8, **kwargs)
    out,state = model.encode(x)
    equal(out.shape, (4, 6, n_out))
    equal(model.h_o(out), model(x))
    equal(state_tensors(model.state), state_tensors(state))

def test_an_encoder_takes_rows_on_and_shares_its_weights():
    lm = RNNLM(V, 8, n_layers=2)
    encoder = Encoder(lm, pad_idx=V)
    assert {*encoder.parameters()} == {*lm.parameters()}
    ids = torch.full((2, 9), V)  # 9 and 4 tokens in windows of 3, padded as fastai does
    ids[0],ids[1,3:7] = stream.ids[:9],stream.ids[20:24]
    encoded,mask = SentenceEncoder(3, encoder, pad_idx=V)(ids)
    equal(mask, ids == V)
    close(encoded[0], lm.encode(ids[:1])[0][0], eps=1e-5)
    close(encoded[1,3:7], lm.encode(ids[1:,3:7])[0][0], eps=1e-5)
    encoder(ids[:1,:3])
    held = encoder.state
    equal(encoder(ids[:1,3:6]), lm.encode(ids[:1,3:6], held)[0])
    equal(lm.state, None)

def test_fastais_classifier_learns_on_a_language_model():
    "Counted up or down: the same words in another order"
    set_seed(0)
    def text(i):
        ids = torch.arange(i%5, i%5+8+2*(i%3))
        return (ids if i%2 else ids.flip(0)),torch.tensor(i%2)
    samples = [text(i) for i in range(200)]
    pad = partial(pad_input_chunk, pad_idx=V, seq_len=4)
    dls = DataLoaders.from_dsets(samples, samples, bs=20, dl_type=SortedDL,
                                 before_batch=pad, num_workers=0)
    lm = RNNLM(V, 16)
    before = lm.i_h.weight.detach().clone()
    model = SequentialRNN(SentenceEncoder(4, Encoder(lm, pad_idx=V), pad_idx=V),
                          PoolingLinearClassifier([48, 20, 2], [0., 0.], bptt=4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs(),
                    metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    assert learn.recorder.values[-1][2] == 1.
    assert (lm.i_h.weight-before).abs().max() > 0  # the model itself has learned
