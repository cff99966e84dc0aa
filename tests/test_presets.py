"""Recipes by name, fits by the clock, and what they are made of."""
from pathlib import Path
import nbformat, numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos
from rnnlm.clock import TimeBudget
from rnnlm.data import human_numbers_stream
from rnnlm.learner import rnn_learner
from rnnlm.lm import RNNLM, RNNLMConfig
from rnnlm.machine import BFloat16
from rnnlm.muon import MuonAdamW, layer_matrices
from rnnlm.presets import (
    PRESETS, Preset, fit_preset, preset_callbacks, preset_learner, train_lm)
from rnnlm.text import TokenStream

nbs = Path(__file__).parent.parent/'nbs'
small = dict(n_hidden=8, bs=4, sl=16)  # changes that make any preset quick
text = TokenStream.from_text('to be, or not to be: that is the question. '*40,
                             tokenizer='chars', progress=False)

class Ticks(Callback):
    "A clock on which a batch of training takes a second, one of validation a hundred"
    now = 0.
    order = -8
    def after_batch(self): self.now += 1 if self.training else 100
    def clock(self): return self.now

class Slow(Ticks):
    "A clock on which half a batch takes 3 seconds"
    def after_pred(self): self.now += 3

def quietly(learn):
    learn.remove_cbs([o for o in learn.cbs if o.name == 'progress'])
    return learn

def timed(preset, seconds, ticks=None):
    "A learner of `preset` after a fit of so many seconds by a clock of its own"
    ticks = ticks or Ticks()
    preset = preset.change(minutes=1., **small)
    learn = quietly(preset_learner(preset, text))
    cbs = [o for o in preset_callbacks(preset) if not isinstance(o, TimeBudget)]
    budget = TimeBudget(seconds/60, ticks.clock)
    with learn.no_logging(): learn.fit(1000, list(np.ravel(preset.lr)),
                                       cbs=[*cbs, budget, ticks])
    return learn,budget

@pytest.mark.parametrize('name', PRESETS)
def test_schedule_of_a_timed_fit_ends_at_its_end(name):
    preset = PRESETS[name]
    learn,budget = timed(preset, 50)
    assert budget.n_batches == 50
    lrs = learn.recorder.hps['lr']
    peak = np.ravel(preset.lr)[-1]
    assert lrs[-1] == pytest.approx(peak/1000, rel=1e-5)
    assert max(lrs) == pytest.approx(peak, rel=.1)

def test_validation_does_not_count_as_training_time():
    learn,budget = timed(PRESETS['chars-fast'], 60)
    assert len(learn.recorder.values) > 1  # validated, 100 seconds a batch
    assert budget.seconds == 60

def test_the_last_epoch_of_a_timed_fit_has_a_whole_row():
    learn,_ = timed(PRESETS['chars-fast'], 50)
    assert len({len(o) for o in learn.recorder.values}) == 1

def test_minutes_shorter_than_a_batch_name_the_least_that_works():
    with pytest.raises(ValueError, match=r'minutes must be at least 0\.1\b'):
        timed(PRESETS['chars-fast'], 2, Slow())
    _,budget = timed(PRESETS['chars-fast'], 6, Slow())  # what the error names
    assert budget.n_batches == 2

def test_minutes_shorter_than_a_batch_leave_the_weights():
    learn = quietly(preset_learner(PRESETS['chars-fast'].change(**small), text))
    before = learn.model.h_o.weight.clone()
    slow = Slow()
    with pytest.raises(ValueError), learn.no_logging():
        learn.fit(9, [1e-3]*2, cbs=[slow, TimeBudget(1/60, slow.clock)])
    assert torch.equal(learn.model.h_o.weight, before)

@pytest.mark.parametrize('minutes', [0, -1, float('nan'), float('inf'), 'one', True])
def test_minutes_must_be_a_number_above_0(minutes):
    with pytest.raises((TypeError, ValueError), match='minutes must be'):
        train_lm(text, minutes=minutes)

def test_a_text_shorter_than_a_batch_is_told_the_sizes_that_work():
    with pytest.raises(ValueError, match='write bs=23 or sl=47') as e:
        train_lm(text, 'chars-fast', n_epoch=1)
    assert 'which has 1,547: ' in str(e.value)

@pytest.mark.parametrize('sizes', [dict(bs=23), dict(sl=47)])
def test_the_sizes_that_the_error_names_do_work(sizes):
    preset = PRESETS['chars-fast'].change(**sizes)
    assert len(preset_learner(preset, text).dls.train) > 0

def test_a_text_too_short_for_any_batch():
    short = TokenStream.from_text('to be', tokenizer='chars', progress=False)
    with pytest.raises(ValueError, match='give a longer text'): train_lm(short)

def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="preset must be one of 'chars-fast', 'chars'"):
        train_lm(text, 'charz')
    with pytest.raises(TypeError, match='preset must be one of'): train_lm(text, 7)

def test_an_unknown_change_is_named():
    with pytest.raises(TypeError, match='n_hiden is no part of a preset'):
        train_lm(text, n_hiden=7)

def weights(seed=3):
    preset = PRESETS['chars-fast'].change(n_epoch=1, **small)
    learn = quietly(preset_learner(preset, text, seed))
    with learn.no_logging(): fit_preset(learn, preset)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_same_seed_same_weights_by_epochs():
    first = weights()
    assert torch.equal(first, weights())
    assert not torch.equal(first, weights(seed=4))

def test_train_lm_is_the_preset_in_one_call(capsys):
    learn = train_lm(text, n_epoch=1, seed=3, **small)
    out = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(out, weights())
    assert learn.recorder.metric_names[1:5] == ['train_loss', 'valid_loss', 'accuracy',
                                                'perplexity']

def test_train_lm_takes_dataloaders(capsys):
    dls = text.dataloaders(bs=3, sl=11, verbose=False)
    learn = train_lm(dls, n_epoch=1, n_hidden=8)
    assert learn.dls is dls

def test_a_preset_has_minutes_or_epochs():
    rest = dict(about='', model=dict(n_hidden=8), data={}, lr=1e-3)
    for both in dict(minutes=1., n_epoch=2), {}:
        with pytest.raises(ValueError, match='either minutes or n_epoch'):
            Preset(**rest, **both)
    by_epochs = Preset(**rest, minutes=1.).change(n_epoch=2)
    assert (by_epochs.minutes, by_epochs.n_epoch) == (None, 2)

def test_a_change_goes_where_it_belongs_and_drops_the_figures():
    preset = Preset('', dict(n_hidden=8), dict(bs=4), 1e-3, n_epoch=1,
                    measured={'a text': '1.0'})
    new = preset.change(n_hidden=16, bs=8, lr=2e-3, anneal=SchedCos)
    assert (new.model, new.data, new.lr) == (dict(n_hidden=16), dict(bs=8), 2e-3)
    assert new.anneal is SchedCos and new.measured == {}
    assert preset.model == dict(n_hidden=8)  # as it was

def test_autocast_is_off_after_a_fit_broken_off_within_a_batch():
    class Break(Callback):
        order = 9999
        def before_batch(self): raise KeyboardInterrupt
    preset = PRESETS['chars-fast'].change(n_epoch=1, **small)
    assert any(isinstance(o, BFloat16) for o in preset_callbacks(preset))
    learn = quietly(preset_learner(preset, text))
    with pytest.raises(KeyboardInterrupt): fit_preset(learn, preset, Break())
    assert not torch.is_autocast_enabled('cpu')

ngram_models = [dict(cell=o) for o in ('rnn', 'gru', 'lstm', 'mingru')]
ngram_models += [dict(n_layers=2, norm='layer', tie_weights=True, emb_sz=4, ngram_sz=3)]

def ngram_model(**kw):
    torch.manual_seed(0)
    model = RNNLM(30, 8, ngrams=4, ngram_rows=50, **kw)
    torch.nn.init.normal_(model.ngrams.tables.weight)
    return model.eval()

@pytest.mark.parametrize('kw', ngram_models)
def test_ngrams_read_windows_of_any_length_alike(kw):
    model = ngram_model(**kw)
    x = torch.randint(0, 30, (3, 10), generator=torch.Generator().manual_seed(0))
    whole = model(x)
    model.reset()
    parts = torch.cat([model(o) for o in x.split([1, 1, 5, 3], 1)], 1)
    torch.testing.assert_close(parts, whole)

@pytest.mark.parametrize('kw', ngram_models)
def test_ngrams_keep_documents_apart(kw):
    model = ngram_model(**kw)
    x = torch.randint(0, 30, (3, 10), generator=torch.Generator().manual_seed(0))
    begins = torch.zeros(3, 10, dtype=torch.bool)
    begins[1,4] = True
    both = model(x, begins)
    model.reset()
    torch.testing.assert_close(model(x[1:2,4:]), both[1:2,4:])

def test_the_last_tokens_in_a_state_stay_whole_numbers():
    model = ngram_model().half()
    model(torch.full((2, 5), 29))
    recent = model.state[1]
    assert recent.dtype == torch.int64 and (recent == 30).all()
    assert model.state_for(torch.zeros(2, 1)) [1].dtype == torch.int64

def test_ngrams_of_a_config_are_checked_and_stored():
    config = RNNLMConfig(30, 8, ngrams=3, ngram_p=.5)
    assert RNNLMConfig.from_dict(config.to_dict()) == config
    for bad in 1, -1:
        with pytest.raises(ValueError, match='ngrams must be'):
            RNNLMConfig(30, 8, ngrams=bad)
    with pytest.raises(ValueError, match='ngram_p must be'):
        RNNLMConfig(30, 8, ngrams=2, ngram_p=1.)

def test_a_state_of_another_model_is_refused_by_ngrams():
    model,plain = ngram_model(cell='gru'),RNNLM(30, 8, cell='gru')
    x = torch.zeros(2, 3, dtype=torch.long)
    _,state = plain.read(x, None)
    with pytest.raises(TypeError, match='state of RNNLM with ngrams must be a pair'):
        model.read(x, state)

def test_muon_trains_the_matrices_of_the_layers_alone():
    model = RNNLM(30, 8, n_layers=2, ngrams=3, ngram_rows=20)
    rest,matrices = layer_matrices(model)
    names = {id(p): name for name,p in model.named_parameters()}
    assert {names[id(p)] for p in matrices} == {
        f'rnns.{i}.weight_{kind}_l0' for i in (0, 1) for kind in ('ih', 'hh')}
    assert len(rest) + len(matrices) == len(names)

def test_muon_goes_on_from_a_saved_state():
    def steps(opt, model, n):
        for _ in range(n):
            model.reset()
            model(torch.arange(12).view(2, 6)).square().mean().backward()
            opt.step()
            opt.zero_grad()
    def make():
        torch.manual_seed(0)
        model = RNNLM(30, 8)
        rest,matrices = layer_matrices(model)
        return model,MuonAdamW([dict(params=rest), dict(params=matrices)])
    model,opt = make()
    steps(opt, model, 4)
    half,half_opt = make()
    steps(half_opt, half, 2)
    resumed,resumed_opt = make()
    resumed.load_state_dict(half.state_dict())
    resumed_opt.load_state_dict(half_opt.state_dict())
    steps(resumed_opt, resumed, 2)
    assert torch.equal(resumed.rnns[0].weight_hh_l0, model.rnns[0].weight_hh_l0)

def test_human_numbers_train_by_their_preset(capsys):
    learn = train_lm(human_numbers_stream(), 'numbers', n_epoch=1, n_hidden=16)
    assert learn.dls.train.bs == 64 and learn.dls.train.sl == 16

def outputs(page):
    "All that the stored outputs of a page say"
    cells = nbformat.read(nbs/f'{page}.ipynb', as_version=4).cells
    found = [o for c in cells for o in c.get('outputs', [])]
    return '\n'.join(o.get('text') or o.get('data', {}).get('text/plain', '')
                     for o in found)

@pytest.mark.parametrize('name', PRESETS)
def test_measured_figures_stand_in_the_page_that_measured_them(name):
    page = '04_ladder' if name == 'numbers' else 'benchmarks/shakespeare'
    said,measured = outputs(page),PRESETS[name].measured
    assert measured
    for value in measured.values():
        digits = 3 if name == 'numbers' else 4
        assert f'{value:.{digits}f}' in said
