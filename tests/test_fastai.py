"""What people bring to a learner, and expect of it: fastai's methods and callbacks,
PyTorch's losses, optimizers and compiler. Each test is named for a habit."""
import warnings
from functools import partial
from importlib.util import find_spec
import pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.callback.all import (ActivationStats, CSVLogger, EarlyStoppingCallback,
                                 GradientAccumulation, ReduceLROnPlateau,
                                 SaveModelCallback)
from fastai.data.core import DataLoaders
from fastai.interpret import Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed
from fastcore.test import test_close as close, test_eq as equal
from torch import nn
from rnnlm.callback import StateResetter
from rnnlm.data import human_numbers_stream
from rnnlm.learner import lm_loss, rnn_learner
from rnnlm.models import LMModel2, LMModel3, RNNLM
from rnnlm.state import StatefulLM

torch.set_num_threads(1)
stream = human_numbers_stream()[:2001]

def loaders(target='all', **kw):
    return stream.dataloaders(bs=8, sl=10, target=target, verbose=False, **kw)

def plain(dls, model, **kw):
    "fastai's own learner with what a stateful model needs"
    kw['cbs'] = [StateResetter(), *kw.get('cbs', [])]
    return Learner(dls, model, **(dict(loss_func=lm_loss) | kw))

@pytest.fixture(params=[rnn_learner, plain], ids=['rnn_learner', 'Learner'])
def make(request, tmp_path):
    "Makes a learner of an LSTM"
    def learner(dls=None, model=None, **kw):
        set_seed(0)
        args = dict(metrics=accuracy, path=tmp_path) | kw
        return request.param(dls or loaders(), model or RNNLM(30, 16), **args)
    return learner

def ours(tmp_path, dls=None, model=None, **kw):
    set_seed(0)
    return rnn_learner(dls or loaders(), model or RNNLM(30, 16), path=tmp_path, **kw)

def quiet(learn, method='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, method)(*args, **kw)

def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).clone()

# methods

def test_predict_goes_on_with_a_text(tmp_path):
    text = ours(tmp_path).predict('one two', n_words=3)
    assert text.startswith('one two ') and len(text.split()) == 5

def test_summary_leaves_no_state(make):
    learn = make()
    assert 'Input shape: 8 x 10' in str(learn.summary())
    assert learn.model.state is None

def test_show_results_shows_texts_targets_and_predictions(make, monkeypatch):
    shown = []
    monkeypatch.setattr('rnnlm.loader.display_df', shown.append)
    quiet(make(), 'show_results', max_n=2)
    table, = shown
    equal([*table], ['text', 'target', 'prediction'])
    equal(len(table), 2)

def test_lr_find_gives_the_weights_back(make):
    learn = make()
    before = weights(learn)
    assert 1e-5 < quiet(learn, 'lr_find', show_plot=False).valley < 1
    equal(weights(learn), before)
    assert learn.model.state is None

def test_fine_tune_and_freeze_train_a_model_of_one_group(make):
    learn = make()
    learn.freeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    before = weights(learn)
    quiet(learn, 'fine_tune', 1)
    assert not torch.equal(weights(learn), before)

def test_a_splitter_lets_freeze_freeze(make):
    def halves(m): return [[*m.i_h.parameters()], [*m.rnns.parameters(),
                                                   *m.h_o.parameters()]]
    learn = make(splitter=halves)
    learn.freeze()
    before = learn.model.i_h.weight.clone()
    quiet(learn, 'fit', 1)
    equal(learn.model.i_h.weight, before)
    learn.unfreeze()
    quiet(learn, 'fit', 1)
    assert not torch.equal(learn.model.i_h.weight, before)

def test_save_and_load(make):
    learn = make()
    quiet(learn, 'fit', 1)
    found = quiet(learn, 'validate')
    learn.save('here')
    quiet(learn, 'fit', 1)
    assert quiet(learn, 'validate') != found
    learn.load('here')
    equal(quiet(learn, 'validate'), found)

def test_an_exported_learner_reads_another_text(make, tmp_path):
    learn = make()
    quiet(learn, 'fit', 1)
    learn.export()
    with warnings.catch_warnings(action='ignore'):
        back = load_learner(tmp_path/'export.pkl')
    other = stream[:500]
    equal(quiet(back, 'validate', dl=back.dls.test_dl(other)),
          quiet(learn, 'validate', dl=learn.dls.test_dl(other)))

def test_top_losses_are_those_of_single_targets(tmp_path):
    learn = ours(tmp_path)
    with learn.no_bar():
        losses,places = Interpretation.from_learner(learn).top_losses(3)
        scores,targs = learn.get_preds()
    text = learn.dls.valid_ds.ids
    equal(text[places+1], targs[places])
    close(F.cross_entropy(scores[places], targs[places], reduction='none'), losses)
    close(losses[0], F.cross_entropy(scores, targs, reduction='none').max())

def test_validate_reads_the_loader_that_it_is_given(make):
    learn = make()
    equal(quiet(learn, 'validate', dl=learn.dls.valid), quiet(learn, 'validate'))

def test_a_loop_can_be_shown_and_plotted(make, capsys):
    learn = make()
    quiet(learn, 'fit', 1)
    learn.show_training_loop()
    assert 'StateResetter' in capsys.readouterr().out
    learn.recorder.plot_loss()

# callbacks

def test_csv_logger_writes_a_row_an_epoch(make, tmp_path):
    learn = make()
    quiet(learn, 'fit', 2, cbs=CSVLogger())
    table = pd.read_csv(tmp_path/'history.csv')
    equal([*table], ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'])
    close(table.valid_loss, [o[1] for o in learn.recorder.values], eps=1e-5)

def test_save_model_saves_the_best_weights_and_no_state(make, tmp_path):
    learn = make()
    quiet(learn, 'fit', 4, .1, cbs=SaveModelCallback())
    losses = [o[1] for o in learn.recorder.values]
    assert min(losses) < losses[-1]
    close(quiet(learn, 'validate')[0], min(losses), eps=1e-6)
    saved = torch.load(tmp_path/'models'/'model.pth')
    equal([*saved], [name for name,_ in learn.model.named_parameters()])

def test_early_stopping_stops(make):
    learn = make()
    quiet(learn, 'fit', 9, cbs=EarlyStoppingCallback(min_delta=9., patience=2))
    equal(len(learn.recorder.values), 3)

def test_reduce_lr_on_plateau(make):
    learn = make()
    quiet(learn, 'fit', 3, 1e-2, cbs=ReduceLROnPlateau(min_delta=9., patience=1))
    close(learn.recorder.lrs[::len(learn.dls.train)], [1e-2, 1e-2, 1e-3])

def test_gradient_accumulation_steps_by_the_mean_of_its_batches(make):
    def sgd(params, lr): return SGD(params, lr, mom=0.)
    learn = make(loaders(drop_last=True), opt_func=sgd, wd=0.)
    by_hand = make().model
    by_hand.load_state_dict(learn.model.state_dict())
    quiet(learn, 'fit', 1, .1, cbs=GradientAccumulation(16))  # of two batches of 8 rows
    batches = [*learn.dls.train]
    for first,second in zip(batches[::2], batches[1::2]):
        by_hand.zero_grad()
        for x,y in first,second: (lm_loss(by_hand(x), y)/2).backward()
        with torch.no_grad():
            for p in by_hand.parameters(): p -= .1*p.grad
    want = torch.cat([p.detach().flatten() for p in by_hand.parameters()])
    close(weights(learn), want, eps=1e-5)

def test_gradient_accumulation_with_windows_that_overlap(tmp_path):
    learn = ours(tmp_path, loaders(stride=5))
    quiet(learn, 'fit', 1, cbs=GradientAccumulation(16))
    steps = learn.opt.state_dict()['state'][0]['step']
    equal(steps, len(learn.dls.train)//2)

def test_activation_stats_hooks_each_layer(make):
    stats = ActivationStats()
    learn = make()
    with warnings.catch_warnings(action='ignore'): quiet(learn, 'fit', 1, cbs=stats)
    equal(len(stats.stats), len(learn.dls.train))
    emb,lstm,logits = stats.stats[-1]
    equal([len(lstm), sorted(emb)], [3, ['mean', 'near_zero', 'std']])  # output, h, c
    assert logits['std'] > 0

def test_mixed_precision_on_a_cpu_trains_in_full(make):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    want = make()
    quiet(want, 'fit', 1)
    with pytest.warns(UserWarning, match='CUDA is not available'):
        learn = make().to_fp16()
        quiet(learn, 'fit', 1)
    equal(weights(learn), weights(want))

class TensorBoardCallback(StateResetter):
    "Has the name of fastai's"
    trace_model = log_preds = True

def test_tensorboard_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match='trace_model=False, log_preds=False'):
        quiet(ours(tmp_path), 'fit', 1, cbs=TensorBoardCallback())

@pytest.mark.skipif(not find_spec('tensorboard'), reason='tensorboard is not installed')
def test_tensorboard_logs_the_losses(make, tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make()
    quiet(learn, 'fit', 2, cbs=TensorBoardCallback(tmp_path, False, False))
    log = EventAccumulator(str(tmp_path)).Reload()
    close([o.value for o in log.Scalars('valid_loss')],
          [o[1] for o in learn.recorder.values], eps=1e-5)
    assert {'train_loss', 'accuracy', 'lr_0'} <= {*log.Tags()['scalars']}

# losses, optimizers

smooth = dict(weight=torch.linspace(.5, 2, 30), label_smoothing=.1)
losses = {
    'CrossEntropyLoss': (nn.CrossEntropyLoss(), lm_loss),
    'cross_entropy': (F.cross_entropy, lm_loss),
    'weighed': (nn.CrossEntropyLoss(**smooth), partial(lm_loss, **smooth)),
    'partial': (partial(F.cross_entropy, **smooth), partial(lm_loss, **smooth)),
    'CrossEntropyLossFlat': (CrossEntropyLossFlat(), lm_loss)}

@pytest.mark.parametrize('target', ['all', 'last'])
@pytest.mark.parametrize('name', losses)
def test_a_loss_of_pytorch_is_one_of_single_tokens(name, target, tmp_path):
    theirs,same = losses[name]
    def model(): return RNNLM(30, 16) if target == 'all' else LMModel3(30, 16)
    set_seed(0)
    a = ours(tmp_path, loaders(target), model(), loss_func=theirs)
    set_seed(0)
    b = ours(tmp_path, loaders(target), model(), loss_func=same)
    b.model.load_state_dict(a.model.state_dict())
    for o in a,b: quiet(o, 'fit', 1)
    close(weights(a), weights(b), eps=1e-6)
    of_each = [quiet(o, 'get_preds', with_loss=True)[2] for o in (a, b)]
    close(of_each[0], of_each[1], eps=1e-6)
    equal(len(of_each[0]), len(quiet(a, 'get_preds')[1]))

def test_the_class_of_a_loss_is_no_loss(tmp_path):
    with pytest.raises(TypeError, match=r'write CrossEntropyLoss\(\)'):
        ours(tmp_path, loss_func=nn.CrossEntropyLoss)

def test_a_loss_of_pytorch_can_be_exported(tmp_path):
    learn = ours(tmp_path, loss_func=nn.CrossEntropyLoss())
    learn.export()
    with warnings.catch_warnings(action='ignore'):
        back = load_learner(tmp_path/'export.pkl')
    dl = back.dls.test_dl(stream[:500])
    equal(quiet(back, 'validate', dl=dl), quiet(learn, 'validate', dl=dl))

def test_an_optimizer_of_pytorch_is_wrapped(tmp_path):
    wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)
    a,b = (ours(tmp_path, opt_func=o) for o in (torch.optim.AdamW, wrapped))
    for o in a,b: quiet(o, 'fit', 1)
    equal(weights(a), weights(b))
    assert 'parameters, AdamW' in repr(a)

def test_an_optimizer_that_is_made_says_what_to_write(tmp_path):
    model = RNNLM(30, 16)
    made = torch.optim.SGD(model.parameters(), lr=.1)
    with pytest.raises(TypeError, match='opt_func=torch.optim.SGD'):
        ours(tmp_path, model=model, opt_func=made)
    with pytest.raises(TypeError, match="got 'adam'"): ours(tmp_path, opt_func='adam')

# data and model

def test_no_loaders_and_no_model_say_what_to_write():
    dls = loaders()
    model = RNNLM(30, 16)
    mistakes = [(stream, model, r'TokenStream: write stream.dataloaders\(bs, sl\)'),
                (dls.train, model, r'StreamDL: write DataLoaders\(train, valid\)'),
                ((dls.train, dls.valid), model, r'tuple: write DataLoaders'),
                (model, dls, 'dls is the first argument, model the second'),
                (dls, RNNLM, r'the class RNNLM: write RNNLM\(len\(stream.vocab\), 64'),
                (dls, lambda x: x, 'model must be an nn.Module, got function')]
    for a,b,message in mistakes:
        with pytest.raises(TypeError, match=message): rnn_learner(a, b)

def test_a_model_without_a_memory_trains(tmp_path):
    learn = ours(tmp_path, loaders('last'), LMModel2(30, 16))
    quiet(learn, 'fit', 1)
    assert not hasattr(learn, 'state_resetter')

def test_no_validation_is_possible(tmp_path):
    learn = ours(tmp_path, DataLoaders(loaders().train), metrics=accuracy)
    quiet(learn, 'fit', 2, cbs=SaveModelCallback(monitor='train_loss'))
    equal([o[1:] for o in learn.recorder.values], [[None, None]]*2)
    assert 'valid: none' in repr(learn)
    with pytest.raises(ValueError, match=r'dl=dls.test_dl\(stream\)'):
        quiet(learn, 'get_preds')
    equal(len(quiet(learn, 'get_preds', 0)[1]), 8*200)

# torch.compile

class Another(StatefulLM):
    "A model of a user's own"
    def __init__(self, n):
        super().__init__()
        self.i_h = nn.Embedding(30, n)
        self.h_h = nn.Linear(n, n)
        self.h_o = nn.Linear(n, 30)
    def read(self, x, state, begins=None):
        h = self.i_h(x[:,0])*0 if state is None else state
        for i in range(x.shape[1]): h = torch.tanh(self.h_h(h) + self.i_h(x[:,i]))
        return self.h_o(h),h

@pytest.fixture
def graphs():
    "The graphs that were made, by a backend that runs them as they are"
    torch._dynamo.reset()
    made = []
    def backend(graph, inputs):
        made.append(graph)
        return graph
    yield made,backend
    torch._dynamo.reset()

def test_compiled_models_of_one_size_share_their_graphs(graphs, tmp_path):
    made,backend = graphs
    numbers = []
    for _ in range(3):
        learn = ours(tmp_path, loaders('last'), LMModel3(30, 8))
        learn.model = torch.compile(learn.model, backend=backend)
        quiet(learn, 'fit', 1)
        numbers.append(len(made))
    equal(numbers, [numbers[0]]*3)
    assert numbers[0] > 0

def test_each_compiled_model_of_a_session_gets_its_graphs(graphs, tmp_path):
    made,backend = graphs
    makers = [partial(LMModel3, 30, n) for n in (8, 12, 16)]
    makers += [partial(Another, n) for n in (8, 12, 16)]
    before = torch._dynamo.config.recompile_limit
    kept = []
    numbers = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for maker in makers:
            learn = ours(tmp_path, loaders('last'), maker())
            learn.model = torch.compile(learn.model, backend=backend)
            done = len(made)
            quiet(learn, 'fit', 1)
            numbers.append(len(made)-done)
            kept.append(learn)
    equal(numbers, [numbers[0]]*6)
    equal(torch._dynamo.config.recompile_limit, before)
