"""What PyTorch has to offer and a model with a memory goes along with: exports, the
compiler, copies, half precision, groups of weights, gradients computed twice."""
import copy, os, pickle, subprocess, sys, warnings
from contextlib import nullcontext
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastai.torch_core import set_seed
from fastcore.test import test_close as close, test_eq as equal
from torch import nn
from torch._dynamo.utils import counters
from rnnlm.adapters import AWDLM
from rnnlm.bptt import TBPTT
from rnnlm.cells import CellLayer, LSTMByGates
from rnnlm.data import StreamDL, human_numbers_stream
from rnnlm.export import export_onnx, export_read, zero_state
from rnnlm.layers import by_layers
from rnnlm.learner import rnn_learner
from rnnlm.machine import BFloat16
from rnnlm.metrics import lm_loss
from rnnlm.models import LMModel2, LMModel3, RNNLM
from rnnlm.recompute import Recompute
from rnnlm.state import StatefulLM, read_segments, state_tensors
from test_state import Layers as Pairs

torch.set_num_threads(1)
V,N = 30,8  # the vocab, and the units of a hidden state
stream = human_numbers_stream()[:2003]
cells = ['rnn', 'gru', 'lstm', 'mingru']
makers = {'LMModel3': partial(LMModel3, V, N)} | {
    o: partial(RNNLM, V, N, 2, o, hidden_p=.2, output_p=.2) for o in cells}
each_kind = pytest.mark.parametrize('kind', makers)

def make(kind):
    set_seed(0)
    return makers[kind]()

def loaders(model, bs=8, sl=6, **kw):
    target = 'last' if isinstance(model, LMModel3) else 'all'
    return stream.dataloaders(bs, sl, target=target, verbose=False, **kw)

def quiet(learn, method='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, method)(*args, **kw)

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

def batch(bs=4, sl=6): return StreamDL(stream, bs, sl, verbose=False).one_batch()[0]

# exports

ways = {
    'torch.export': lambda model, x: torch.export.export(model, (x,)),
    'strict': lambda model, x: torch.export.export(model, (x,), strict=True),
    'jit.trace': torch.jit.trace,
    'jit.script': lambda model, x: torch.jit.script(model),
    'ONNX': lambda model, x: torch.onnx.export(model, (x,), dynamo=True, verbose=False),
    'ONNX, traced': lambda model, x: torch.onnx.export(model, (x,), 'x', dynamo=False)}

@pytest.mark.parametrize('wrap', [lambda o: o, nn.Sequential], ids=['plain', 'wrapped'])
@pytest.mark.parametrize('way', ways)
def test_a_model_is_not_exported_without_its_state(way, wrap):
    if 'ONNX' in way: pytest.importorskip('onnxscript')
    with warnings.catch_warnings(action='ignore'), pytest.raises(Exception) as e:
        ways[way](wrap(make('lstm')), batch())
    assert 'export_read(model), or export_onnx(model, file)' in str(e.value)

def read_on(program, model, lengths=(1, 9, 4), bs=3):
    "The largest difference to `model` over windows of these lengths"
    state = zero_state(model, bs)
    ours,worst = state_tensors(state),0.
    for sl in lengths:
        x = torch.randint(V, (bs, sl))
        with torch.no_grad(): out,state = model.read(x, state)
        got,*ours = program(x, *ours)
        for a,b in zip((got, *ours), (out, *state_tensors(state))):
            equal(a.shape, b.shape)
            worst = max(worst, (a-b).abs().max().item())
    return worst

@pytest.mark.parametrize('model', [
    Pairs, lambda: RNNLM(V, N, cell=partial(CellLayer, cell=LSTMByGates)),
    lambda: RNNLM(V, N, 2, 'gru', tie_weights=True).double(),
    lambda: nn.Sequential(RNNLM(V, N)), lambda: torch.compile(RNNLM(V, N))],
    ids=['pairs', 'by gates', 'double', 'wrapped', 'compiled'])
def test_read_is_exported_with_any_state(model):
    model = model()
    program = export_read(model).module()
    inside = next(o for o in model.modules() if isinstance(o, StatefulLM))
    assert read_on(program, inside.eval()) < 1e-5

def test_an_export_leaves_the_model_as_it_was():
    model = make('lstm')
    model(batch())
    before,state = weights(model),state_tensors(model.state)
    random = torch.get_rng_state()
    program = export_read(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    equal(state_tensors(model.state), state)
    equal(torch.get_rng_state(), random)
    with torch.no_grad(): model.h_o.weight.zero_()
    model.load_state_dict(make('lstm').state_dict())
    equal(weights(model), before)
    assert read_on(program.module(), model.eval()) < 1e-5  # its weights are copies

def test_what_has_no_state_has_no_read_to_export():
    for f in export_read, zero_state, export_onnx:
        with pytest.raises(TypeError, match='LMModel2 has none'): f(LMModel2(V, N))
    with pytest.raises(ValueError, match='bs must be at least 1'):
        zero_state(make('lstm'), 0)

def test_onnx_takes_a_nested_state(tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = Pairs().eval()
    export_onnx(model, tmp_path/'model.onnx')
    session = ort.InferenceSession(tmp_path/'model.onnx')
    names = ['x', *(f'state_{i}' for i in range(4))]
    equal([o.name for o in session.get_inputs()], names)
    equal([o.name for o in session.get_outputs()],
          ['out', *(f'new_{o}' for o in names[1:])])
    def program(*args):
        res = session.run(None, dict(zip(names, (o.numpy() for o in args))))
        return [torch.as_tensor(o) for o in res]
    assert read_on(program, model, [1+i%4 for i in range(200)]) < 1e-4

# torch.compile

@pytest.fixture
def fresh():
    "No graphs yet, and none afterwards"
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()

def fitted(kind, wrap=lambda o: o, **kw):
    "The weights after three epochs, which end with a shorter window"
    model = make(kind)
    dls = loaders(model, **kw)
    learn = rnn_learner(dls, wrap(model))
    set_seed(0)
    quiet(learn, 'fit', 3, 1e-2)
    return weights(model)

@each_kind
def test_a_compiled_fit_has_few_graphs_and_no_breaks(kind, fresh):
    lengths = [{x.shape[1] for x,_ in dl} for dl in loaders(make(kind))]
    assert all(len(o) == 2 for o in lengths)  # both loaders have shorter windows
    compiled = fitted(kind, partial(torch.compile, backend='aot_eager'))
    equal(sum(counters['graph_break'].values()), 0)
    assert 2 <= counters['stats']['unique_graphs'] <= 3  # at most 2 recompilations
    close(compiled, fitted(kind), eps=1e-5)

def test_a_layer_of_a_long_window_keeps_its_kernel(fresh):
    fitted('lstm', partial(torch.compile, backend='eager'), sl=20)
    assert sum(counters['graph_break'].values()) > 0

class Fails(Callback):
    "Raises an error in a window that is shorter than others"
    def after_pred(self):
        if self.training and self.xb[0].shape[1] < 6: raise RuntimeError('here')

def test_an_error_leaves_the_compiler_on(fresh):
    model = make('LMModel3')
    compiled = torch.compile(model, backend='eager')
    learn = rnn_learner(loaders(model), compiled)
    with pytest.raises(RuntimeError, match='here'): quiet(learn, 'fit', 1, cbs=Fails())
    before = counters['stats']['unique_graphs']
    model.reset()
    compiled(torch.zeros(5, 4, dtype=torch.long))
    assert counters['stats']['unique_graphs'] > before

# copies in mid-stream

def cast(dtype): return lambda model: copy.deepcopy(model).to(dtype)
copies = {'deepcopy': copy.deepcopy, 'pickle': lambda o: pickle.loads(pickle.dumps(o)),
          'double': cast(torch.double), 'bfloat16': cast(torch.bfloat16)}

@each_kind
@pytest.mark.parametrize('how', copies)
def test_a_copy_reads_on_where_the_model_is(kind, how):
    model = make(kind).eval()
    first,second = batch(sl=12).chunk(2, 1)
    with torch.no_grad():
        model(first)
        other = copies[how](model)
        held = [o.clone() for o in state_tensors(other.state)]
        equal({o.dtype for o in held}, {next(other.parameters()).dtype})
        got = other(second)
        for a,b in zip(held, state_tensors(model.state)):
            close(a.float(), b, eps=1e-2)       # the copy has not moved the model
        close(got.float(), model(second), eps=.05 if how == 'bfloat16' else 1e-5)

@each_kind
def test_an_exported_learner_reads_on(kind, tmp_path):
    model = make(kind)
    learn = rnn_learner(loaders(model), model, path=tmp_path)
    quiet(learn, 'fit', 1)
    first,second = batch(sl=12).chunk(2, 1)
    model.eval()
    with torch.no_grad(): model(first)
    learn.export()
    with warnings.catch_warnings(action='ignore'):
        back = load_learner(tmp_path/'export.pkl')
    equal(state_tensors(back.model.state), state_tensors(model.state))
    with torch.no_grad(): equal(back.model.eval()(second), model(second))

# half precision

@each_kind
def test_bfloat16_learns_on_a_cpu(kind):
    model = make(kind)
    learn = rnn_learner(loaders(model), model, cbs=BFloat16())
    quiet(learn, 'fit_one_cycle', 3, 1e-2)
    first,last = learn.recorder.values[0][1],learn.recorder.values[-1][1]
    assert last < first < 4
    equal({p.dtype for p in model.parameters()}, {torch.float32})

@pytest.mark.parametrize('kind', ['LMModel3', 'rnn', 'gru', 'mingru'])
def test_float16_and_a_scaled_gradient_learn_on_a_cpu(kind):
    "But for LSTM layers, for which not every CPU has a kernel in float16"
    model = make(kind)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**40)  # too high: halved a while
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for epoch in range(3):
        model.reset()
        for x,y in loaders(model).train:
            with torch.autocast('cpu', torch.float16): out = model(x)
            loss = lm_loss(out.float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            losses.append(loss.item())
    assert scaler.get_scale() < 2.**40 and losses[-1] < losses[0]-1
    numbers = weights(model),*state_tensors(model.state)
    assert all(o.isfinite().all() for o in numbers)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
@each_kind
def test_half_precision_learns_on_a_gpu(kind, half):
    model = make(kind)
    learn = getattr(rnn_learner(loaders(model, device='cuda'), model.cuda()), half)()
    quiet(learn, 'fit_one_cycle', 3, 1e-2)
    first,last = learn.recorder.values[0][1],learn.recorder.values[-1][1]
    assert last < first < 4

# groups of weights

@each_kind
def test_each_weight_is_in_one_group(kind):
    for model in make(kind), Recompute(make(kind), 2), nn.Sequential(make(kind)):
        groups = by_layers(model)
        equal(len(groups), 3 if kind == 'LMModel3' else 4)
        together = [id(p) for group in groups for p in group]
        equal(sorted(together), sorted(id(p) for p in model.parameters()))

def test_a_tied_weight_learns_with_the_head():
    set_seed(0)
    model = RNNLM(V, N, 2, tie_weights=True, norm='layer')
    learn = rnn_learner(loaders(model), model, splitter=by_layers, train_bn=False)
    learn.freeze()
    before = [[p.detach().clone() for p in group] for group in by_layers(model)]
    quiet(learn, 'fit_one_cycle', 1, 1e-2)
    same = [all(map(torch.equal, *o)) for o in zip(before, by_layers(model))]
    equal(same, [True, True, False])
    learn.unfreeze()
    quiet(learn, 'fit', 1, slice(1e-4, 1e-2))
    close([h['lr'] for h in learn.opt.hypers], [1e-4, 1e-3, 1e-2])

# gradients in two readings

@each_kind
@pytest.mark.parametrize('segment', [1, 2, 5, 50])
def test_segments_and_tbptt_give_the_same_weights(kind, segment):
    def fitted(wrap):
        model = make(kind).double()
        dls = loaders(model, sl=12, stride=4, drop_last=True)
        learn = rnn_learner(dls, wrap(model), cbs=TBPTT(4, 12),
                            loss_func=lambda out, y: lm_loss(out, y).float())
        set_seed(0)
        quiet(learn, 'fit', 1, 1e-2)
        return weights(model)
    close(fitted(partial(Recompute, segment=segment)), fitted(lambda o: o), eps=1e-8)

@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bfloat16'])
def test_a_second_reading_is_the_first(half):
    "With a dropout that is drawn for each token, in training and in mixed precision"
    class Once(Recompute):
        def read(self, x, state, begins=None):
            outs = []
            for part in x.split(self.segment, 1):
                out,state = self.model.read(part, state)
                outs.append(out)
            return torch.cat(outs, 1),state
    def gradient(kind):
        set_seed(0)
        model = RNNLM(V, N, 2, 'gru', embed_p=.3, hidden_p=.3, ngrams=2, ngram_p=.5)
        nn.init.normal_(model.ngrams.tables.weight)
        model = kind(model, 4)
        autocast = torch.autocast('cpu', torch.bfloat16) if half else nullcontext()
        for x in batch(sl=22).chunk(2, 1):
            with autocast: out = model(x)
            lm_loss(out.float(), x).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    equal(gradient(Recompute), gradient(Once))

def test_what_draws_its_masks_in_forward_is_not_read_in_segments():
    config = dict(awd_lstm_lm_config, emb_sz=6, n_hid=N, n_layers=2)
    model = AWDLM(get_language_model(AWD_LSTM, V, config))
    with pytest.raises(TypeError, match='no forward of its own, got AWDLM'):
        Recompute(model, 4)

def test_segments_are_compiled_too(fresh):
    plain = fitted('gru', partial(Recompute, segment=4))
    def both(model): return torch.compile(Recompute(model, 4), backend='aot_eager')
    close(fitted('gru', both), plain, eps=1e-5)

def test_segments_read_as_the_model_does():
    model = make('lstm').eval()
    ours = Recompute(model, 4)
    x = batch(sl=10)
    begins = torch.zeros_like(x, dtype=torch.bool)
    begins[1,5] = True
    want,state = model.read(x, None, begins)
    close(ours(x, begins), want, eps=1e-6)
    close(state_tensors(ours.state), state_tensors(state), eps=1e-6)
    with torch.no_grad(): equal(ours(x), model.read(x, state)[0])  # in one call
    assert model.state is None
    ours.reset()
    assert ours.state is None

# one seed, one run

RUN = '''
import hashlib, sys, torch
from rnnlm.data import human_numbers_stream
from rnnlm.presets import train_lm

def run(seed, **kw):
    learn = train_lm(human_numbers_stream()[:3000], 'numbers', n_epoch=1, seed=seed,
                     n_hidden=16, n_layers=1, weight_p=.2, bs=8, **kw)
    found = [*learn.model.parameters(), torch.tensor(learn.recorder.losses)]
    return hashlib.sha256(b''.join(o.detach().numpy().tobytes() for o in found))
'''

def test_one_seed_is_one_run():
    names = {}
    exec(RUN, names)
    once,again,other = (names['run'](seed).hexdigest() for seed in (3, 3, 4))
    equal(once, again)
    assert once != other
    for threads in '1', '2':  # a small model gets one thread all the same
        res = subprocess.run([sys.executable, '-c', RUN+'print(run(3).hexdigest())'],
                             env=os.environ | {'OMP_NUM_THREADS': threads},
                             capture_output=True, text=True)
        assert res.returncode == 0, res.stderr
        equal(res.stdout.split()[-1], once)
