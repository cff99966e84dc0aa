"""Scores: the same for every kind of model and of reading, and clear errors."""
import math, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.metrics import Perplexity
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from torch import nn
from rnnlm.all import *
from rnnlm.logprobs import LOGITS, STEPS
from rnnlm.score import perplexity

@pytest.fixture(scope='module')
def stream(): return human_numbers_stream()

def make_rnn(vocab_sz=30, n_hidden=8, **kwargs):
    torch.manual_seed(0)
    return RNNLM(vocab_sz, n_hidden, **kwargs)

def make_awd():
    torch.manual_seed(0)
    config = awd_lstm_lm_config | dict(emb_sz=8, n_hid=12, n_layers=2)
    return get_language_model(AWD_LSTM, 30, config=config)

@torch.no_grad()
def whole_pass(model, ids):
    "The log-probability of each token but the first, from one call"
    out,_ = model.eval().read(ids[None,:-1].long(), None)
    return -F.cross_entropy(out[0], ids[1:].long(), reduction='none').numpy()

close = dict(atol=1e-4)

@pytest.mark.parametrize('make', [
    make_rnn, lambda: make_rnn(cell='gru', n_layers=2), lambda: make_rnn(cell='mingru'),
    lambda: torch.compile(make_rnn()), lambda: nn.Sequential(make_rnn())],
    ids=['lstm', 'gru', 'mingru', 'compiled', 'wrapped'])
def test_score_is_that_of_one_pass(stream, make):
    model,text = make(),stream[20_000:22_500]
    inner = next(o for o in model.modules() if isinstance(o, RNNLM))
    found = score(model, text).logprobs
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], whole_pass(inner, text.ids), **close)

def test_awd_lstm_of_fastai_is_read_as_it_is(stream):
    awd,text = make_awd(),stream[:1500]
    awd.train()
    found = score(awd, text)
    assert all(o.training for o in awd.modules())
    awd.eval()
    awd.reset()
    with torch.no_grad(): out = awd(text.ids[None,:-1])[0]
    nats = F.cross_entropy(out[0], text.ids[1:]).item()
    assert found.nats == pytest.approx(nats, abs=1e-4)

def test_model_without_memory_sees_the_last_tokens_again(stream):
    model,text = LMModel2(30, 8),stream[:200]
    found = score(model, text, sl=4)
    with torch.no_grad(): out = model(text.ids[None,100:104])
    assert found.logprobs[104] == pytest.approx(out.log_softmax(-1)[0,text[104]].item())
    assert found.n == 199
    assert score(model, text, sl=4, bs=7).nats == found.nats

def test_model_that_reads_exactly_n_tokens(stream):
    class Three(LMModel2):
        n_tokens = 3
        def forward(self, x):
            assert x.shape[1] == 3
            return super().forward(x)
    found = score(Three(30, 8), stream[:50])
    assert list(np.flatnonzero(~found.counts)) == [0, 1, 2]

@pytest.mark.parametrize('bs', [1, 2, 7, 499])
def test_score_does_not_depend_on_bs_once_warmed_up(stream, bs):
    text,model = stream[3000:3500],make_rnn()
    one = score(model, text)
    lines = score(model, text, bs=bs, warm_up=499)
    np.testing.assert_allclose(lines.logprobs[1:], one.logprobs[1:], **close)
    assert score(model, text, bs=bs).n == 499  # each token once

def test_skip_leaves_out_the_start_of_each_line(stream):
    text,model = stream[:501],make_rnn()
    cold,skipped = score(model, text, bs=5),score(model, text, bs=5, skip=30)
    is_late = np.tile(np.arange(100) >= 30, 5)
    assert (skipped.counts[1:] == is_late).all()
    np.testing.assert_allclose(skipped.logprobs[1:][is_late],
                               cold.logprobs[1:][is_late], **close)

def test_metrics_say_the_same_as_score(stream):
    dls = stream[:64*101+1].dataloaders(64, 20, valid=stream[:16*75+1], val_bs=16,
                                        verbose=False)
    learn = rnn_learner(dls, make_rnn(), metrics=Perplexity())
    with learn.no_bar(): loss,metric = learn.validate()
    found = score(learn, dls.valid.dataset, bs=16)
    assert found.nats == pytest.approx(loss, abs=1e-5)
    assert found.perplexity == pytest.approx(metric, rel=1e-5)
    assert perplexity(learn, dls.valid.dataset, bs=16) == found.perplexity
    targ = dls.valid.dataset.ids[1:]
    logits = torch.randn(len(targ), 30)
    nats = Scores(np.r_[np.nan, -F.cross_entropy(logits, targ, reduction='none')],
                  dls.valid.dataset).nats
    assert nats == pytest.approx(lm_loss(logits, targ).item(), abs=1e-5)

def test_documents_are_kept_apart_as_in_training(stream):
    docs = TokenStream(stream.ids[:800], stream.vocab, docs=[0, 150, 400, 650])
    dls = docs.dataloaders(2, 20, begins=True, valid=docs, val_bs=1, verbose=False)
    learn = rnn_learner(dls, make_rnn())
    with learn.no_bar(): loss, = learn.validate()
    found = score(learn, docs)
    assert list(np.flatnonzero(~found.counts)) == [0, 150, 400, 650]
    assert found.nats == pytest.approx(loss, abs=1e-5)
    assert score(learn.model, docs).n == 799  # a model alone: as one text

def test_model_stays_as_it_was(stream):
    model = make_rnn(n_layers=2, hidden_p=.5)
    model.rnns[0].eval() if hasattr(model, 'rnns') else None
    modes = [o.training for o in model.modules()]
    model(stream.ids[None,:9]).sum().backward()
    state,rng = model.state,torch.get_rng_state()
    before = [o.clone() for p in model.parameters() for o in (p, p.grad)]
    score(model, stream[:300], bs=3)
    score(model, stream[:300], dynamic=DynamicEval(.1))
    grad_rms(model, stream[:3000], n=3)
    after = [o for p in model.parameters() for o in (p, p.grad)]
    assert all(torch.equal(a, b) for a,b in zip(before, after, strict=True))
    assert model.state is state and modes == [o.training for o in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())

class Counts(RNNLM):
    "Remembers the windows that it read"
    def read(self, x, state, begins=None):
        self.windows = getattr(self, 'windows', []) + [x.numel()]
        return super().read(x, state, begins)

def test_windows_are_large_and_bounded(stream):
    model = Counts(30, 8)
    score(model, stream[:4000])
    assert len(model.windows) <= 4000//STEPS+4
    wide = Counts(5000, 8)
    score(wide, TokenStream(torch.randint(5000, (4000,)), range(5000)), bs=8)
    assert max(wide.windows)*5000 <= LOGITS
    model.windows = []
    token_losses(model, stream[:4000])  # one call a token once
    assert len(model.windows) <= 4000//STEPS+4

def test_stream_from_disk_is_scored_as_in_memory(stream, tmp_path):
    in_memory = stream[:2000]
    in_memory.save(tmp_path/'numbers')
    on_disk = TokenStream.open(tmp_path/'numbers')
    assert on_disk.ids.dtype != torch.int64
    model = make_rnn()
    assert score(model, on_disk, bs=3).nats == score(model, in_memory, bs=3).nats

def test_bits_per_char_and_byte_by_hand():
    text = TokenStream.from_docs(['né né'], 'words', progress=False)
    found = Scores(np.array([np.nan, -math.log(8)]), text)
    assert found.bits_per_char == pytest.approx(3/3)  # a space and two characters
    assert found.bits_per_byte == pytest.approx(3/4)  # é is two bytes

def test_marks_and_unknown_words_are_no_characters():
    docs = ['a b', 'a c']
    text = TokenStream.from_docs(docs, min_freq=2, eos='<eos>', progress=False)
    assert [*text.vocab][0] == '<unk>'
    found = Scores(np.r_[np.nan, -np.ones(len(text)-1)], text)
    assert found.bits_per_char == pytest.approx(5/math.log(2)/2)  # ' a' is all there is
    assert '2 of them unknown words' in repr(found)

def test_half_precision_is_scored_in_single(stream):
    model = make_rnn().to(torch.bfloat16)
    assert score(model, stream[:300]).nats == pytest.approx(math.log(30), abs=.2)

# what goes wrong

def test_text_of_one_token(stream):
    with pytest.raises(ValueError, match='2 tokens at least.*got 1'):
        score(make_rnn(), stream[:1])

def test_empty_text(stream):
    for text in '', stream.new_empty():
        with pytest.raises(ValueError, match='2 tokens at least.*got 0'):
            score(make_rnn(), text, stream)

def test_word_outside_the_vocab_is_an_error_without_unk(stream):
    with pytest.raises(ValueError, match="token 'million', which is not in the stream"):
        score(make_rnn(), 'one million .', stream)

def test_word_outside_the_vocab_is_a_warning_with_unk():
    text = TokenStream.from_docs(['a a b b c'], min_freq=2, progress=False)
    with pytest.warns(UserWarning, match="holds what the vocab lacks.*: 'zebra'"):
        score(make_rnn(len(text.vocab)), 'a zebra b', text)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        score(make_rnn(len(text.vocab)), 'a b', text)

def test_stream_of_another_vocab(stream):
    dls = stream.dataloaders(8, 20, verbose=False)
    other = TokenStream(stream.ids[:50], [*stream.vocab[:29], 'other'])
    with pytest.raises(ValueError, match="token 29 is 'other'"):
        score(rnn_learner(dls, make_rnn()), other)
    for model in make_rnn(31), LMModel2(31, 8):
        with pytest.raises(ValueError, match='vocab of 30 tokens.*predicts one of 31'):
            score(model, stream[:50])

@pytest.mark.parametrize('how,error,says', [
    (dict(bs=50), ValueError, 'bs must be from 1 to 49'),
    (dict(bs=0), ValueError, 'bs must be from 1 to 49'),
    (dict(bs=2.), TypeError, 'bs must be a whole number'),
    (dict(skip=49), ValueError, 'skip must be from 0 to 48'),
    (dict(bs=7, skip=7), ValueError, 'skip must be from 0 to 6'),
    (dict(skip=-1), ValueError, 'skip must be from 0'),
    (dict(warm_up=-1), ValueError, 'warm_up must be from 0'),
    (dict(warm_up=1.5), TypeError, 'warm_up must be a whole number'),
    (dict(begins=True), ValueError, 'begins needs a text that knows'),
    (dict(bs=2, dynamic=DynamicEval(.1)), ValueError, 'bs must be 1 with dynamic')])
def test_argument_out_of_range(stream, how, error, says):
    with pytest.raises(error, match=says): score(make_rnn(), stream[:50], **how)

def test_weights_that_are_nan(stream):
    model = make_rnn()
    model.h_o.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match='nan for token 1 .*weights'):
        score(model, stream[:50])
    with pytest.raises(FloatingPointError, match='from token 1 on: lower lr=0.1'):
        score(model, stream[:50], dynamic=DynamicEval(.1))
    for other in LMModel2(30, 8), LMModel3(30, 8):
        other.h_o.bias.data[:] = math.nan
        with pytest.raises(FloatingPointError): score(other, stream[:50])

def test_string_without_a_vocab():
    with pytest.raises(ValueError, match='stream must be given with a string'):
        score(make_rnn(), 'one two')

def test_model_that_keeps_its_state_in_its_own_way(stream):
    class Keeps(nn.Module):
        def reset(self): pass
    with pytest.raises(TypeError, match='AdaptedLM'): score(Keeps(), stream[:50])
    with pytest.raises(TypeError, match='model must be a model of PyTorch'):
        score('model', stream[:50])

# dynamic evaluation and comparison

def test_dynamic_evaluation_learns_a_text_that_repeats(stream):
    model,text = make_rnn(),stream[:1500]
    static = score(model, text)
    for rms in None, grad_rms(model, stream[:5000]):
        lr = 1. if rms is None else .003
        found = score(model, text, dynamic=DynamicEval(lr, rms=rms, keep=True))
        assert found.nats < static.nats-.3
        assert found.adapted is not model
        np.testing.assert_allclose(found.logprobs[1:21], static.logprobs[1:21], **close)
    assert score(model, text, dynamic=DynamicEval(1.)).adapted is None

def test_dynamic_evaluation_of_other_kinds(stream):
    tied = make_rnn(n_layers=2, tie_weights=True)
    for model in make_awd(), LMModel3(30, 8), tied:
        static = score(model, stream[:400])
        assert score(model, stream[:400], dynamic=DynamicEval(.3)).nats < static.nats
    with pytest.raises(TypeError, match='no memory'):
        score(LMModel2(30, 8), stream[:400], dynamic=DynamicEval(.3))

def test_rate_that_is_too_large_is_told(stream):
    with pytest.raises(FloatingPointError, match='lower lr=3e'):
        score(make_rnn(), stream[:2000], dynamic=DynamicEval(3e38))
    with pytest.raises(FloatingPointError, match='no rate in lrs'):
        choose_dynamic(make_rnn(), stream[:2000], lrs=[3e38], decays=[0.])

def test_comparison_of_the_same_tokens(stream):
    text = stream[20_000:24_000]
    a,b = score(make_rnn(), text),score(make_rnn(n_hidden=16), text, skip=100)
    found = compare(a, b)
    both = a.counts & b.counts
    assert found.diff == pytest.approx((b.logprobs-a.logprobs)[both].mean())
    assert found.stderr > 0 and found.n_blocks == 20
    assert compare(b, a).diff == pytest.approx(-found.diff)

def test_comparison_of_models_with_different_tokenizers():
    text = 'The cat, the dog.\n\n  The cat is not the café. '*20
    words = TokenStream.from_docs([text], 'words', min_freq=25, progress=False)
    chars = TokenStream.from_docs([text], 'chars', progress=False)
    by_chars = score(make_rnn(len(chars.vocab)), text, chars)
    with pytest.warns(UserWarning, match='café'):
        by_words = score(make_rnn(len(words.vocab)), text, words)
    found = compare(by_chars, by_words)
    assert found.unit == 'bits a character'
    assert compare(by_words, by_chars).diff == pytest.approx(-found.diff)
    # all but the first word counts in both
    nats = -by_chars.logprobs[3:].sum()+np.nansum(by_words.logprobs)
    assert found.diff == pytest.approx(nats/math.log(2)/(len(text)-3))

def test_scores_of_different_texts_are_not_compared(stream):
    a,b = score(make_rnn(), stream[:500]),score(make_rnn(), stream[1:501])
    with pytest.raises(ValueError, match='same text'): compare(a, b)

def test_string_with_a_tokenizer_of_hugging_face():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = 'The cat is in the café.'
    tokenizer.train_from_iterator([text]*3, trainers.BpeTrainer(
        vocab_size=270, show_progress=False, initial_alphabet=alphabet))
    model = make_rnn(tokenizer.get_vocab_size())
    found = score(model, text, tokenizer)
    assert found.n == len(tokenizer.encode(text).ids)-1
    first = len(found.pieces[0])
    assert found.sizes[1][1:].sum() == len(text.encode())-first
    by_chars = TokenStream.from_docs([text], 'chars', progress=False)
    other = score(make_rnn(len(by_chars.vocab)), by_chars)
    assert compare(found, other).unit == 'bits a character'
