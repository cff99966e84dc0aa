"""The model folder: what comes back from it, in another process, and what is said of
one that is damaged or in the way."""
import json, os, pickle, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from fastai.torch_core import set_seed
from fastcore.test import test_close as close, test_eq as equal
from safetensors.torch import load_file, save_file
from rnnlm.data import human_numbers_stream
from rnnlm.folder import ARCHITECTURES, load_figures, load_pretrained
from rnnlm.learner import rnn_learner
from rnnlm.lm import RNNLM
from rnnlm.manifest import write_folder
from rnnlm.models import LMModel2, LMModel3
from rnnlm.text import TokenStream
from rnnlm.sealed import sealed

torch.set_num_threads(1)
TEXT = 'one two three. one two four. five two one!'
stream = TokenStream.from_text(TEXT, tokenizer='words')
V = len(stream.vocab)

@pytest.fixture
def folder(tmp_path):
    "A folder of a small tied model"
    set_seed(0)
    model = RNNLM(V, 8, cell='gru', tie_weights=True)
    return model.save_pretrained(tmp_path/'model', stream, dict(loss=1.5))

def rewrite(folder, name, change):
    "Change a file of a folder, and its entry in the config, as somebody sly would"
    import hashlib
    data = change((folder/name).read_bytes())
    (folder/name).write_bytes(data)
    config = json.loads((folder/'config.json').read_text())
    entry = dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    config['files'][name] = entry
    config.pop('check')
    (folder/'config.json').write_text(json.dumps(sealed(config)))

def edit(file, old, new):
    "Change a text in a JSON file, and its checksum, as somebody sly would"
    text = file.read_text()
    assert old in text
    config = json.loads(text.replace(old, new))
    config.pop('check')
    file.write_text(json.dumps(sealed(config)))

# what comes back

@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_class_comes_back_with_the_same_answers(name, tmp_path):
    set_seed(0)
    model = ARCHITECTURES[name](V, 8).eval()
    model.save_pretrained(tmp_path/'m', stream)
    again,empty = load_pretrained(tmp_path/'m')
    x = stream.ids[None,:getattr(model, 'n_tokens', 6)]
    equal(type(again), type(model))
    equal(again(x), model(x))
    equal(empty.encode(TEXT), stream.ids)
    equal(empty.decode(stream.ids), stream.decode())

@pytest.mark.parametrize('kwargs', [
    dict(cell='lstm', n_layers=2, emb_sz=5), dict(cell='mingru', residual=True),
    dict(cell='gru', tie_weights=True, emb_sz=4, norm='layer', output_p=.5),
    dict(cell='rnn', n_layers=3, weight_p=.3, embed_p=.1, hidden_p=.2, input_p=.1)])
def test_all_of_the_config_comes_back(kwargs, tmp_path):
    model = RNNLM(V, 8, **kwargs)
    model.save_pretrained(tmp_path/'m')
    again = RNNLM.from_pretrained(tmp_path/'m')
    equal(again.config, model.config)
    assert not again.training
    equal(again.read(stream.ids[None], None)[0],
          model.eval().read(stream.ids[None], None)[0])

def test_another_process_needs_nothing_but_the_folder(folder):
    code = ("import sys, torch; from rnnlm.folder import load_pretrained\n"
            "model,stream = load_pretrained(sys.argv[1])\n"
            "x = stream.encode('five two one')[None]\n"
            "print(model.read(x, None)[0].sum().item())")
    res = subprocess.run([sys.executable, '-c', code, folder], capture_output=True,
                         text=True, check=True)
    model,_ = load_pretrained(folder)
    want = model.read(stream.encode('five two one')[None], None)[0].sum().item()
    close(float(res.stdout), want, eps=1e-5)

def test_tied_weights_are_saved_once_and_tied_again(folder):
    names = [*load_file(folder/'model.safetensors')]
    equal('i_h.weight' in names, 'h_o.weight' not in names)
    model = RNNLM.from_pretrained(folder)
    assert model.i_h.weight is model.h_o.weight

def test_a_compiled_model_is_saved_as_the_one_inside(tmp_path):
    model = LMModel3(V, 8)
    torch.compile(model).save_pretrained(tmp_path/'m')
    equal(LMModel3.from_pretrained(tmp_path/'m').h_o.bias, model.h_o.bias)

def test_the_precision_of_the_weights_is_kept(tmp_path):
    RNNLM(V, 8).to(torch.bfloat16).save_pretrained(tmp_path/'m')
    equal(RNNLM.from_pretrained(tmp_path/'m').h_o.bias.dtype, torch.bfloat16)

def test_the_device_can_be_said(folder):
    model,_ = load_pretrained(folder, device='meta')
    equal({p.device.type for p in model.parameters()}, {'meta'})

def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load_pretrained(folder)
    equal(torch.get_rng_state(), before)

def test_a_learner_saves_its_vocab_and_figures(tmp_path):
    numbers = human_numbers_stream()[:2001]
    dls = numbers.dataloaders(bs=8, sl=6, verbose=False)
    learn = rnn_learner(dls, RNNLM(len(numbers.vocab), 8))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    learn.save_pretrained(tmp_path/'m', figures=dict(note='first', bad=float('nan')))
    figures = load_figures(tmp_path/'m')
    close(figures['epochs'][1]['valid_loss'], learn.recorder.values[1][1])
    equal((len(figures['epochs']), figures['note'], figures['bad']), (2, 'first', None))
    equal(load_pretrained(tmp_path/'m')[1].vocab, numbers.vocab)

def test_no_file_of_a_folder_is_a_pickle(folder):
    equal(sorted(os.listdir(folder)), ['config.json', 'model.safetensors',
                                       'training.json', 'vocab.json'])
    for file in folder.iterdir():
        with pytest.raises(Exception): pickle.loads(file.read_bytes())
        if file.suffix == '.json': json.loads(file.read_text())

def test_the_tokens_of_begin_and_end_come_back(tmp_path):
    text = TokenStream.from_docs(['a b', 'b'], bos='<s>', eos='</s>', min_freq=2,
                                 progress=False)
    RNNLM(len(text.vocab), 4).save_pretrained(tmp_path/'m', text)
    again = load_pretrained(tmp_path/'m')[1]
    equal((again.unk, again.bos, again.eos), ('<unk>', '<s>', '</s>'))

def test_any_token_is_kept_as_it_is(tmp_path):
    odd = TokenStream([0, 1, 2], ['\n', 'é€😀', '\ud800'], '')
    RNNLM(3, 4).save_pretrained(tmp_path/'m', odd)
    equal(load_pretrained(tmp_path/'m')[1].vocab, odd.vocab)

# what is damaged

def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no rnnlm.Model was saved'):
        load_pretrained(tmp_path/'none')

@pytest.mark.parametrize('name', ['model.safetensors', 'vocab.json'])
def test_a_missing_file_is_named(folder, name):
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name} is missing'):
        load_pretrained(folder)

@pytest.mark.parametrize('name', ['model.safetensors', 'vocab.json'])
def test_a_cut_off_file_is_named(folder, name):
    data = (folder/name).read_bytes()
    (folder/name).write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match=f'{name} has .* was cut off or changed'):
        load_pretrained(folder)

@pytest.mark.parametrize('name', ['model.safetensors', 'vocab.json'])
def test_a_tampered_file_is_named(folder, name):
    data = bytearray((folder/name).read_bytes())
    data[-5] ^= 1
    (folder/name).write_bytes(data)
    with pytest.raises(ValueError, match=f'{name} has another checksum'):
        load_pretrained(folder)

@pytest.mark.parametrize('length', [0, 1, 50])
def test_a_cut_off_config_is_named(folder, length):
    data = (folder/'config.json').read_bytes()
    (folder/'config.json').write_bytes(data[:length])
    with pytest.raises(ValueError, match='config.json is damaged'):
        load_pretrained(folder)

def test_a_foreign_folder_is_named(tmp_path):
    "As one of Hugging Face, whose files have the same names"
    (tmp_path/'config.json').write_text('{"model_type": "gpt2", "n_embd": 768}')
    save_file({'wte': torch.ones(2, 2)}, tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match='not the config of a rnnlm.Model'):
        load_pretrained(tmp_path)

def test_sizes_that_disagree_with_the_weights_are_named(folder):
    edit(folder/'config.json', '"n_hidden": 8', '"n_hidden": 16')
    with pytest.raises(ValueError, match=rf'i_h.weight is \({V}, 8\)'):
        load_pretrained(folder)

def test_a_size_beyond_memory_is_named_before_it_is_taken(folder):
    edit(folder/'config.json', '"n_hidden": 8', '"n_hidden": 100000000')
    with pytest.raises(ValueError, match='do not belong together'):
        load_pretrained(folder)

def test_weights_of_another_model_are_named(folder, tmp_path):
    other = RNNLM(V, 8, cell='lstm').save_pretrained(tmp_path/'other')
    rewrite(folder, 'model.safetensors',
            lambda data: (other/'model.safetensors').read_bytes())
    with pytest.raises(ValueError, match='do not belong together'):
        load_pretrained(folder)

def test_weights_that_are_no_safetensors_are_named(folder):
    rewrite(folder, 'model.safetensors', lambda data: pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match='is damaged'): load_pretrained(folder)

def test_a_vocab_larger_than_the_model_is_named(folder):
    rewrite(folder, 'vocab.json', lambda data: json.dumps(dict(
        vocab=[*'abcdefghijklmnop'], sep='', tokenizer='chars', unk=None, bos=None,
        eos=None)).encode())
    with pytest.raises(ValueError, match='16 tokens in vocab.json'):
        load_pretrained(folder)

@pytest.mark.parametrize('version', ['3', '"1.5"', 'null'])
def test_a_newer_format_is_named(folder, version):
    edit(folder/'config.json', '"version": 2', f'"version": {version}')
    with pytest.raises(ValueError, match='written by a newer rnnlm'):
        load_pretrained(folder)

def test_the_name_of_a_class_is_never_imported(folder):
    edit(folder/'config.json', '"RNNLM"', '"subprocess.Popen"')
    with pytest.raises(ValueError, match="holds a 'subprocess.Popen'"):
        load_pretrained(folder)

def test_unknown_arguments_are_named(folder):
    edit(folder/'config.json', '"n_layers"', '"n_heads"')
    with pytest.raises(ValueError, match='n_heads'): load_pretrained(folder)

def test_another_class_than_that_of_the_folder_is_refused(folder):
    with pytest.raises(TypeError, match='holds a RNNLM, not a LMModel2'):
        LMModel2.from_pretrained(folder)

# what can't be saved

def test_a_class_of_ones_own_is_refused(tmp_path):
    class Mine(RNNLM): pass
    with pytest.raises(TypeError, match='got Mine'):
        Mine(V, 8).save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_a_cell_without_a_name_is_refused(tmp_path):
    with pytest.raises(TypeError, match='cell must be'):
        RNNLM(V, 8, cell=torch.nn.GRU).save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()

def test_a_vocab_that_is_not_the_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match='give the stream that it was'):
        RNNLM(V-1, 8).save_pretrained(tmp_path/'m', stream)

# all or nothing

def test_a_folder_with_files_of_others_is_not_touched(tmp_path):
    (tmp_path/'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match="which holds 'thesis.txt'"):
        RNNLM(V, 8).save_pretrained(tmp_path)
    equal(os.listdir(tmp_path), ['thesis.txt'])

def test_an_empty_folder_is_taken(tmp_path):
    RNNLM(V, 8).save_pretrained(tmp_path)
    RNNLM.from_pretrained(tmp_path)

def test_a_model_that_was_saved_before_is_replaced(folder):
    LMModel3(V, 4).save_pretrained(folder)
    equal(sorted(os.listdir(folder)), ['config.json', 'model.safetensors'])
    LMModel3.from_pretrained(folder)

def test_a_link_to_a_folder_stays_a_link(folder, tmp_path):
    (tmp_path/'link').symlink_to(folder)
    LMModel3(V, 4).save_pretrained(tmp_path/'link')
    assert (tmp_path/'link').is_symlink()
    LMModel3.from_pretrained(folder)

def test_a_full_disk_leaves_the_old_folder(folder, monkeypatch):
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'): LMModel3(V, 4).save_pretrained(
        folder)
    monkeypatch.undo()
    RNNLM.from_pretrained(folder)
    equal(os.listdir(folder.parent), ['model'])

SAVING = '''import sys
from rnnlm.models import LMModel3
import rnnlm.folder
models = [LMModel3(4, n) for n in (8, 64)]
while True:
    for model in models: model.save_pretrained(sys.argv[1])
    print('saved', flush=True)'''

def test_a_killed_process_leaves_a_whole_folder(tmp_path):
    "And whoever reads while another process writes finds a whole one each time"
    path = tmp_path/'m'
    for _ in range(2):
        with subprocess.Popen([sys.executable, '-c', SAVING, path],
                              stdout=subprocess.PIPE, text=True) as proc:
            try:
                assert proc.stdout.readline() == 'saved\n'
                for _ in range(30):
                    assert LMModel3.from_pretrained(path).h_h.in_features in (8, 64)
            finally: proc.send_signal(signal.SIGKILL)
        assert LMModel3.from_pretrained(path).h_h.in_features in (8, 64)
