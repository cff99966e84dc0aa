"""The LSTM and the GRU that are written out, and the pictures of them."""
from functools import partial
import pytest, torch
from matplotlib import pyplot as plt
from torch import nn
from rnnlm.cells import CellLayer, GRUByChunks, GRUByGates, LSTMByChunks, LSTMByGates
from rnnlm.gates import plot_gru, plot_lstm
from rnnlm.lm import RNNLM
from rnnlm.state import state_tensors

CELLS = [(LSTMByGates, nn.LSTM), (LSTMByChunks, nn.LSTM), (GRUByGates, nn.GRU),
         (GRUByChunks, nn.GRU)]
each_cell = pytest.mark.parametrize('cell, layer', CELLS, ids=lambda o: o.__name__)

@each_cell
def test_written_cell_is_pytorchs_layer_over_many_steps(cell, layer):
    torch.manual_seed(0)
    theirs = layer(3, 5, batch_first=True).double()
    ours = CellLayer(3, 5, cell.from_layer(theirs))
    x = torch.randn(2, 100, 3, dtype=torch.double)
    (a,end_a),(b,end_b) = theirs(x),ours(x)
    torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    for s,t in zip(state_tensors(end_a), state_tensors(end_b), strict=True):
        torch.testing.assert_close(t, s, rtol=0, atol=1e-12)
    again = theirs(x, end_a)[0],ours(x, end_b)[0]
    torch.testing.assert_close(*again, rtol=0, atol=1e-12)

@each_cell
def test_gradients_of_the_weights_are_those_of_pytorchs_layer(cell, layer):
    torch.manual_seed(0)
    theirs = layer(3, 5, batch_first=True).double()
    ours = CellLayer(3, 5, cell.from_layer(theirs))
    x = torch.randn(2, 20, 3, dtype=torch.double)
    for o in theirs,ours: o(x)[0].square().sum().backward()
    found = sum(p.grad.square().sum() for n,p in ours.named_parameters()
                if n.endswith('weight'))
    want = sum(p.grad.square().sum() for n,p in theirs.named_parameters()
               if n.startswith('weight'))
    torch.testing.assert_close(found, want)

@each_cell
def test_written_cell_makes_a_language_model(cell, layer):
    model = RNNLM(30, 8, 2, cell=partial(CellLayer, cell=cell))
    x = torch.randint(30, (4, 7))
    whole = model(x)
    assert whole.shape == (4, 7, 30)
    assert {tuple(o.shape) for o in state_tensors(model.state)} == {(2, 4, 8)}
    model.reset()
    parts = torch.cat([model(x[:,:3]), model(x[:,3:])], 1)
    torch.testing.assert_close(parts, whole)

def test_state_of_another_batch_size_is_refused_by_its_shapes():
    layer = CellLayer(3, 5, LSTMByChunks)
    one = torch.zeros(1, 1, 5)
    with pytest.raises(ValueError, match=r'\(1, 4, 5\).*got \[\(1, 1, 5\)'):
        layer(torch.zeros(4, 2, 3), (one, one))

def test_weights_of_a_layer_of_another_kind_are_refused():
    with pytest.raises(TypeError, match='layer must be an nn.GRU, got LSTM'):
        GRUByGates.from_layer(nn.LSTM(3, 5))
    with pytest.raises(ValueError, match='num_layers=2'):
        LSTMByGates.from_layer(nn.LSTM(3, 5, 2))

@pytest.mark.parametrize('plot', [plot_lstm, plot_gru])
def test_pictures_of_the_gates_draw_on_given_axes(plot):
    _,ax = plt.subplots()
    assert plot(grad=True, ax=ax) is ax
    labels = [o.get_text() for o in ax.get_legend().get_texts()]
    assert any(o.startswith('gradient') for o in labels)
    plt.close('all')
