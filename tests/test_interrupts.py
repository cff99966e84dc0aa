"""What ends a fit in its middle leaves nothing behind that the next one notices."""
import random
from copy import deepcopy
import pytest, torch
from fastai.basics import Callback, CancelFitException, set_seed
from rnnlm.all import *

torch.set_num_threads(1)
stream = human_numbers_stream()[:8_000]
VOCAB = len(stream.vocab)

def lm_learner(model=None, bs=32, sl=16, **kw):
    set_seed(42)
    dls = stream.dataloaders(bs, sl, verbose=False, **kw)
    return rnn_learner(dls, RNNLM(VOCAB, 16) if model is None else model)

def quiet(learn, name, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, name)(*args, **kw)

EVENTS = '''before_fit before_epoch before_train before_batch after_pred after_loss
before_backward after_backward before_step after_step after_batch after_train
before_validate after_validate after_epoch'''.split()

class Interrupt(Callback):
    "Raises at an event, when so many batches were begun"
    def __init__(self, event, error, after=0, order=0):
        self.event,self.error,self.after,self.order = event,error,after,order
        setattr(self, event, self.strike)
        self.n = 0
    def strike(self):
        self.n += 1
        if self.n > self.after: raise self.error('at a bad time')

class Batches(Callback):
    "Keeps a copy of what each batch of training was, and of its loss"
    order,run_valid = 200,False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append((self.xb[0].clone(), self.loss.item()))

def copy_into(learn, twin):
    "The weights and the optimizer of `learn`, in a learner to which nothing happened"
    twin.model.load_state_dict(learn.model.state_dict())
    if twin.opt is None: twin.create_opt()
    twin.opt.load_state_dict(deepcopy(learn.opt.state_dict()))

def next_fit_is_that_of_a_twin(learn, make):
    "Does `learn` validate and fit as one that has its weights, and no past?"
    twin = make()
    copy_into(learn, twin)
    assert quiet(learn, 'validate') == quiet(twin, 'validate')
    kept = []
    for o in learn,twin:
        torch.manual_seed(1)
        batches = Batches()
        quiet(o, 'fit_one_cycle', 1, 1e-2, cbs=batches)
        kept.append(batches.seen)
    assert len(kept[0]) == len(kept[1])
    for (x,loss),(x2,loss2) in zip(*kept): assert torch.equal(x, x2) and loss == loss2
    for p,q in zip(learn.model.parameters(), twin.model.parameters()):
        assert torch.equal(p, q)
    return True

TIMES = [(event, order) for event in EVENTS for order in (-50, 0, 150)]

@pytest.mark.parametrize('event,order', TIMES)
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, CancelFitException])
def test_an_error_at_any_event(event, order, error):
    learn = lm_learner(sl_std=2, shift=9)
    after = random.Random(f'{event}{order}').randrange(1 if 'fit' in event else 2)
    if 'batch' in event or 'step' in event or 'loss' in event: after = 11
    interrupt = Interrupt(event, error, after, order)
    try: quiet(learn, 'fit_one_cycle', 2, 1e-2, cbs=interrupt)
    except (KeyboardInterrupt, ValueError): pass
    assert interrupt.n == after+1
    assert next_fit_is_that_of_a_twin(learn, lambda: lm_learner(sl_std=2, shift=9))

def test_gradients_of_a_broken_off_batch_are_not_added():
    "Ctrl-C between `backward` and the step"
    learn = lm_learner()
    quiet(learn, 'fit', 1, 1e-2)
    with pytest.raises(KeyboardInterrupt):
        strike = Interrupt('after_backward', KeyboardInterrupt)
        quiet(learn, 'fit', 1, 1e-2, cbs=strike)
    assert any(p.grad.any() for p in learn.model.parameters())
    assert next_fit_is_that_of_a_twin(learn, lm_learner)

def test_an_exception_between_the_window_and_the_model():
    "`TBPTT` has set the stride of a window that is then not read"
    def make():
        return lm_learner(RNNLM(VOCAB, 16), sl=12, stride=4, drop_last=True)
    learn = make()
    quiet(learn, 'fit', 1, 1e-2)
    want = quiet(learn, 'validate')
    with pytest.raises(ValueError):
        strike = Interrupt('before_batch', ValueError, order=150)
        quiet(learn, 'fit', 1, 1e-2, cbs=strike)
    assert quiet(learn, 'validate') == want
    assert next_fit_is_that_of_a_twin(learn, make)

def in_between(learn, what):
    "Something between two fits"
    if what == 'lr_find': quiet(learn, 'lr_find', show_plot=False)
    if what == 'validate(0)': quiet(learn, 'validate', 0)
    if what == 'a pass': list(learn.dls.train)
    if what == 'half a pass': next(iter(learn.dls.train))
    if what == 'get_preds': quiet(learn, 'get_preds', 0)
    if what == 'an error in validation':
        with pytest.raises(ValueError):
            strike = Interrupt('before_validate', ValueError, 1)
            quiet(learn, 'fit', 2, 1e-3, cbs=strike)

@pytest.mark.parametrize('what', ['lr_find', 'validate(0)', 'a pass', 'half a pass',
                                  'get_preds', 'an error in validation'])
@pytest.mark.parametrize('layout', [dict(shift=9), dict(sl_std=2)], ids=str)
def test_the_next_fit_has_the_same_layout(what, layout):
    "That of its own epochs, whatever was read before"
    learn,other = lm_learner(**layout),lm_learner(**layout)
    seen = []
    for o in learn,other:
        quiet(o, 'fit', 2, 1e-3)
        if o is learn: in_between(o, what)
        batches = Batches()
        quiet(o, 'fit', 2, 1e-3, cbs=batches)
        seen.append([x for x,_ in batches.seen])
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(x, y) for x,y in zip(*seen))

def test_the_weights_survive_a_loss_of_nan():
    "In a plain `rnn_learner`, without a word about a guard"
    class Explode(Callback):
        order,run_valid = 70,False
        def before_batch(self):
            if self.train_iter == 20: self.opt.set_hyper('lr', 1e4)
    learn = lm_learner()
    with pytest.raises(Diverged, match=r'after \d+ steps, in epoch [23]'):
        quiet(learn, 'fit', 3, 1e-2, cbs=Explode())
    assert all(p.isfinite().all() for p in learn.model.parameters())
    loss, = quiet(learn, 'validate')
    assert loss < 4
