"""The order of reading, for the texts that people bring.

Small ones, those of many documents, with a validation text or without any, and loaders
given to fastai's own learners."""
import warnings
from functools import partial
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.schedule import Learner  # with fit_one_cycle
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Perplexity, accuracy
from fastai.text.learner import language_model_learner
from fastai.text.models.awdlstm import AWD_LSTM
from rnnlm.callback import StateResetter
from rnnlm.data import group_chunks, human_numbers_stream, lm_seqs, most_common
from rnnlm.learner import rnn_learner
from rnnlm.loader import StreamDL
from rnnlm.metrics import lm_loss
from rnnlm.models import LMModel3, RNNLM
from rnnlm.text import TokenStream

stream = human_numbers_stream()
stream.docs = np.arange(0, len(stream), 7)

def says(kind, message, f, *args, **kwargs):
    "`f` raises an error of this kind, with `message` in what it says"
    with pytest.raises(kind) as e: f(*args, **kwargs)
    assert message in str(e.value), e.value

def targets(dl): return sum((batch[-1] != -100).sum().item() for batch in dl)

def quiet(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, method)(*args, **kwargs)

def of_fastai(dls, n_hidden=8, model=None, **kwargs):
    return Learner(dls, model or RNNLM(30, n_hidden), CrossEntropyLossFlat(),
                   cbs=StateResetter(), **kwargs)

def ours(dls, n_hidden=8, model=None, **kwargs):
    return rnn_learner(dls, model or RNNLM(30, n_hidden), **kwargs)

each_learner = pytest.mark.parametrize('make', [of_fastai, ours])

# Small texts

@pytest.mark.parametrize('n', [2000, 2500, 5368, 12_000])
def test_small_text_with_the_defaults(n):
    text = stream[:n]
    dls = text.dataloaders(verbose=False)
    assert (dls.train.sl, dls.valid.sl) == (72, 72)
    assert len(dls.train_ds)-1 == int((n-1)//72*.8)*72
    assert dls.train.bs == min(64, (len(dls.train_ds)-1)//72)
    assert dls.valid.bs == min(dls.train.bs, (len(dls.valid_ds)-1)//72)
    assert targets(dls.valid) == len(dls.valid_ds)-1
    learn = ours(dls)
    quiet(learn, 'fit', 1)
    assert learn.recorder.values[-1][1] < 3.6

def test_usual_text_has_the_lines_and_the_loss_it_had():
    dls = stream.dataloaders(verbose=False)
    assert [(o.bs, o.line, len(o)) for o in dls] == [(64, 787, 11), (64, 198, 4)]
    lines = stream.ids[:64*787].view(64, 787)
    assert dls.train.one_batch()[0].equal(lines[:,:72])
    torch.manual_seed(0)
    learn = ours(dls, n_hidden=16)
    quiet(learn, 'fit', 2, 1e-2)
    assert learn.recorder.values[-1][1] == pytest.approx(2.366, abs=.02)

def test_too_many_lines_name_the_part():
    small = stream[:2000]
    more = '; a smaller sl gives more lines), got 64'
    says(ValueError, 'bs must be from 1 to 21 (the training part: 1,512 targets in '
         'lines of sl=72 at least' + more, small.dataloaders, bs=64)
    says(ValueError, 'val_bs must be from 1 to 6 (the validation part: 487 targets in '
         'lines of sl=72 at least' + more, small.dataloaders, bs=8, val_bs=64)
    for bs, val_bs, sl in (21, 6, 72), (64, 64, 6):  # what they say works
        dls = small.dataloaders(bs=bs, val_bs=val_bs, sl=sl, verbose=False)
        assert (dls.train.bs, dls.valid.bs) == (bs, val_bs)

def test_too_long_samples_name_the_part():
    says(ValueError, 'sl must be from 1 to 49 (half of the 99 tokens that have a '
         'target, so that training and validation hold a sample each), got 72',
         stream[:100].dataloaders)
    assert [o.bs for o in stream[:100].dataloaders(sl=49, verbose=False)] == [1, 1]
    says(ValueError, 'sl must be from 1 to 9 (the validation part: 9 targets), got 72',
         stream.dataloaders, valid=stream[:10])

def test_shards_of_a_small_text():
    dls = stream[:2000].dataloaders(world_size=4, rank=1, verbose=False)
    assert [o.global_bs for o in dls] == [20, 4]
    assert [o.bs for o in dls] == [5, 1]

# Where validation comes from

def test_validation_text_of_its_own():
    valid = TokenStream(stream.ids[:900], stream.vocab)
    dls = stream.dataloaders(valid=valid, verbose=False)
    assert dls.train_ds is stream and dls.valid_ds is valid
    assert targets(dls.valid) == 899

def test_two_orders_of_one_vocab_are_refused():
    vocab = [*stream.vocab]
    vocab[3], vocab[7] = vocab[7], vocab[3]
    valid = TokenStream(stream.ids[:900], vocab)
    message = f"token 3 is {stream.vocab[3]!r} there, and {vocab[3]!r} in valid"
    says(ValueError, message, stream.dataloaders, valid=valid)
    longer = TokenStream(stream.ids[:900], [*stream.vocab, 'new'])
    message = "token 30 is None there, and 'new' in valid (of 30 and 31 tokens)"
    says(ValueError, message, stream.dataloaders, valid=longer)
    says(TypeError, 'must be a TokenStream, got list', stream.dataloaders, valid=[1])

@pytest.mark.parametrize('pct', [.05, .2, .5, .9])
def test_cut_at_a_document(pct):
    dls = stream.dataloaders(begins=True, valid_pct=pct, verbose=False)
    cut = len(dls.train_ds)-1
    wanted = (1-pct)*(len(stream)-1)
    assert cut == min(stream.docs, key=lambda place: abs(place-wanted))
    assert dls.valid_ds.ids.equal(stream.ids[cut:]) and dls.valid_ds.docs[0] == 0
    plain = stream.dataloaders(valid_pct=pct, verbose=False)  # as it always was
    assert (len(plain.train_ds)-1)%72 == 0

def test_one_document_is_cut_within():
    one = TokenStream(stream.ids[:5000], stream.vocab, docs=[0])
    dls = one.dataloaders(begins=True, verbose=False)
    assert len(dls.train_ds)-1 == 55*72
    edges = TokenStream(one.ids, one.vocab, docs=[0, 3, 4990])  # too near to an end
    assert len(edges.dataloaders(begins=True, verbose=False).train_ds)-1 == 55*72

@each_learner
def test_no_validation_at_all(make, tmp_path):
    dls = stream[:5000].dataloaders(8, 20, valid_pct=0, verbose=False)
    assert targets(dls.train) == 8*dls.train.line and len(dls.valid) == 0
    learn = make(dls, path=tmp_path, metrics=[accuracy, Perplexity()])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.dls = stream[:5000].dataloaders(8, 20, valid_pct=0, verbose=False)
        learn.fit(1)  # with a progress bar, which warns of an empty loader
    quiet(learn, 'fit_one_cycle', 2, 1e-2, cbs=SaveModelCallback(monitor='train_loss'))
    loss, *others = learn.recorder.values[-1]
    assert 0 < loss < 3.4 and others == [None, None, None]
    assert quiet(learn, 'validate') == [None, None, None]
    assert 0 < quiet(learn, 'validate', dl=dls.train)[0] < 3.4
    quiet(learn, 'lr_find', num_it=5, show_plot=False)
    learn.export()
    says(ValueError, 'its stream is empty, as that of a validation with valid_pct=0',
         learn.show_results)

# Documents

def same_places(text, **kwargs):
    "The batches with documents kept apart, and those of one text"
    dl = partial(StreamDL, text, verbose=False, **kwargs)
    return zip(dl(begins=True), dl(), strict=True)

shard = dict(rank=1, world_size=2)
options = [dict(), dict(whole=True), dict(stride=3), dict(shift=20), dict(sl_std=2.),
           dict(drop_last=True), shard, shard | dict(whole=True)]

@pytest.mark.parametrize('target', ['all', 'last'])
@pytest.mark.parametrize('kw', options, ids=str)
def test_the_first_token_of_a_document_is_no_target(kw, target):
    n = 407
    docs = [0, 1, 50, 180, 181, 182, 300, 406]
    text = TokenStream(torch.arange(n), range(n), docs=docs)
    left_out = 0
    for (x, begins, y), (plain_x, plain_y) in same_places(text, bs=4, sl=9,
                                                          target=target, **kw):
        is_first = torch.isin(plain_y, torch.tensor(text.docs))
        assert x.equal(plain_x)
        assert y.equal(plain_y.masked_fill(is_first, -100))
        real = plain_y.view(len(y), -1)[:,-1] >= 0
        assert begins[real].equal(torch.isin(x, torch.tensor(text.docs))[real])
        left_out += is_first.sum().item()
    if target == 'all': assert left_out > 0

def test_batch_without_a_document_is_not_copied():
    text = TokenStream(torch.arange(400), range(400), docs=[0])
    for x, begins, y in StreamDL(text, 4, 9, begins=True, verbose=False):
        place = text.ids.data_ptr() + 8*int(x[0,0])
        assert (x.data_ptr(), y.data_ptr()) == (place, place+8)

@each_learner
def test_batch_without_a_target_teaches_nothing(make):
    text = TokenStream(stream.ids[:201], stream.vocab, docs=range(0, 201, 4))
    train = StreamDL(text, 1, 4, 'last', begins=True, verbose=False)
    assert len(train) == 50 and targets(train) == 0
    valid = StreamDL(text, 4, 5, 'last', begins=True, verbose=False)
    learn = make(DataLoaders(train, valid), model=LMModel3(30, 8))
    before = [p.clone() for p in learn.model.parameters()]
    quiet(learn, 'fit', 1, .1, wd=0)
    for was, is_now in zip(before, learn.model.parameters()): assert is_now.equal(was)
    for loss in lm_loss, CrossEntropyLossFlat():
        logits = torch.randn(3, 30, requires_grad=True)
        loss(logits, torch.full((3,), -100)).backward()
        assert (logits.grad == 0).all()

def test_tokens_are_counted_without_those_that_begin_a_document():
    text = TokenStream(stream.ids[:2000], stream.vocab, docs=range(0, 2000, 7))
    dls = DataLoaders(*[StreamDL(text, 4, 9, begins=True, whole=True, verbose=False)]*2)
    learn = ours(dls, metrics=accuracy)
    loss, share = quiet(learn, 'validate')
    assert learn.recorder.loss.count == targets(dls.valid) == 1999-len(text.docs)+1
    preds, targs = quiet(learn, 'get_preds')
    assert len(targs) == 1999-len(text.docs)+1 and targs.min() >= 0
    assert loss == pytest.approx(F.cross_entropy(preds, targs).item(), rel=1e-4)
    assert share == pytest.approx((preds.argmax(-1) == targs).float().mean().item())

# fastai's own learners

@pytest.mark.parametrize('begins', [False, True])
def test_batches_and_results_are_shown(begins, monkeypatch):
    shown = []
    monkeypatch.setattr('rnnlm.loader.display_df', shown.append)
    dl = StreamDL(stream, 8, 50, begins=begins, verbose=False)
    dl.show_batch(max_n=3, trunc_at=20)
    x, *_, y = batch = dl.one_batch()
    out = F.one_hot(y.clamp(min=0), 30).float()
    dl.show_results(batch, out, max_n=2)
    dl.show_results(batch, (out.argmax(-1),), max_n=2)
    assert [o.shape for o in shown] == [(3, 2), (2, 3), (2, 3)]
    assert shown[0].text[0] == stream.decode(x[0])[:20]
    assert shown[1].target[0] == stream.decode(y[0][y[0] >= 0])[:150]
    assert shown[1].equals(shown[2])

def test_language_model_learner_gets_the_vocab(monkeypatch):
    shown = []
    monkeypatch.setattr('rnnlm.loader.display_df', shown.append)
    dls = stream[:2000].dataloaders(bs=4, sl=20, verbose=False)
    assert type(dls.vocab) is list and dls.vocab == [*stream.vocab]
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, metrics=accuracy)
    encoder = learn.model[0].encoder
    assert (encoder.num_embeddings, encoder.embedding_dim) == (30, 400)
    before = encoder.weight.clone()
    quiet(learn, 'fit', 1, 1e-3)
    assert not encoder.weight.equal(before)
    assert 0 < learn.recorder.values[-1][1] < 4
    dls.show_batch(max_n=2)
    quiet(learn, 'show_results', max_n=2)
    assert [o.shape for o in shown] == [(2, 2), (2, 3)]
    whole_words = shown[1].prediction[0].split()[:-1]  # the last one may be cut
    assert {*whole_words} <= {*stream.vocab}

# Samples

def test_group_chunks_keeps_its_number_of_lines():
    seqs = lm_seqs(stream[:1000], 3)
    for ds in seqs, torch.rand(100, 5), torch.utils.data.TensorDataset(torch.rand(100)):
        assert group_chunks(ds, 8, verbose=False).n_lines == 8
    train, valid = (group_chunks(seqs, bs, verbose=False) for bs in (8, 4))
    dls = DataLoaders.from_dsets(train, valid, bs=8, shuffle=False, drop_last=True)
    assert [dl.dataset.n_lines for dl in dls] == [8, 4]

@pytest.mark.parametrize('ids', [[.5, 1.5, 2.5], torch.rand(9), np.linspace(0, 1, 9)])
def test_floats_are_no_tokens(ids):
    says(TypeError, 'ids must be ', lm_seqs, ids, 2)
    says(TypeError, 'ids must be ', most_common, ids, ['a'])

def test_windows_of_a_series_of_floats_are_read_on():
    series = torch.linspace(0, 1, 41)
    windows = series[:40].view(-1, 4)
    grouped = group_chunks(windows, 2, verbose=False)
    assert grouped.dtype == series.dtype
    assert grouped[0::2].flatten().equal(series[:20])  # row 0 of all batches
    assert grouped[1::2].flatten().equal(series[20:40])
