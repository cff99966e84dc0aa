"""Damaged folders: each is refused by name, or read right; and what is planted in one
harms nobody. The long version is in nbs/benchmarks/faults.ipynb."""
import hashlib, json, os, pickle, resource, signal, threading, tracemalloc
from pathlib import Path
import numpy as np, pytest, torch
import rnnlm.store
from fuzz import BAD, Kind, judge, kinds, small_stream, trials
from rnnlm.checkpoints import read_checkpoint, write_checkpoint
from rnnlm.data import lm_seqs
from rnnlm.folder import load_pretrained
from rnnlm.lm import RNNLM
from rnnlm.loader import StreamDL
from rnnlm.manifest import read_folder, write_folder
from rnnlm.score import score
from rnnlm.sealed import sealed
from rnnlm.text import TokenStream

KINDS = ('stream', 'stream, verify', 'with a tokenizer', 'several files',
         'several files, verify', 'model folder', 'checkpoint')

@pytest.fixture(scope='module')
def each_kind(tmp_path_factory):
    return {kind.name: kind for kind in kinds(tmp_path_factory.mktemp('kinds'))}

@pytest.mark.parametrize('name', KINDS)
def test_refused_or_right(name, each_kind):
    seen = set()
    for seed,(done,outcome,message) in enumerate(trials(each_kind[name], range(80))):
        assert outcome not in BAD, (seed, done, outcome, message)
        assert outcome != 'altered' or each_kind[name].is_altered
        seen.add(outcome)
    assert {'refused', 'as written'} <= seen

def first(file):
    "The start of a file, whatever it is"
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), 'rb') as f:
        return f.read(10**6)

def test_the_judge_can_tell(each_kind):
    "A reader that trusts all it finds is found out"
    def trusting(folder):
        header = json.loads(first(folder/'stream.json'))
        return dict(ids=first(folder/header['ids']['file']), header=header)
    kind = each_kind['stream']._replace(read=trusting, is_altered=None)
    found = {outcome for _,outcome,_ in trials(kind, range(150))}
    assert {'wrong', 'unclear', 'link followed'} <= found

@pytest.mark.parametrize('act,outcome', [
    (lambda folder: first(folder.parent/'secret.bin'), 'foreign file'),
    (lambda folder: os.system('true'), 'code'),
    (lambda folder: pickle.loads(pickle.dumps(Path)), 'code'),
    (lambda folder: signal.raise_signal(signal.SIGALRM), 'hang')],
    ids=['foreign file', 'command', 'pickle', 'hang'])
def test_the_judge_sees_what_a_reader_does(act, outcome, tmp_path):
    (tmp_path/'secret.bin').touch()
    folder = tmp_path/'folder'
    folder.mkdir()
    assert judge(Kind('bad', folder, folder, act), folder, None, [])[0] == outcome

# a stream that somebody wrote by hand

def rewrite(path, change):
    "Change a header, and its checksum"
    header = json.loads((path/'stream.json').read_text())
    change(header)
    header.pop('check', None)
    (path/'stream.json').write_text(json.dumps(sealed(header)))

@pytest.fixture
def saved(tmp_path): return small_stream(0).save(tmp_path/'s')

@pytest.mark.parametrize('name', ['../secret.bin', '/etc/hostname', 'stream.json',
                                  'x.bin'])
def test_other_files_are_not_opened(name, saved):
    (saved.parent/'secret.bin').write_bytes(next(saved.glob('ids-*')).read_bytes())
    rewrite(saved, lambda header: header['ids'].update(file=name))
    with pytest.raises(ValueError, match='none of ours'): TokenStream.open(saved)

@pytest.mark.parametrize('docs', [[5, 5], [5, 3], [-1, 3], [0, 10**6],
                                  [0, 2**62, -2**63, -1, 5]])
def test_documents_that_do_not_rise(docs, saved):
    file,data = next(saved.glob('docs-*')),np.array(docs, '<i8')
    file.write_bytes(data)
    def change(header): header['docs'].update(
        length=len(docs), max=max(docs), sha256=hashlib.sha256(data).hexdigest())
    rewrite(saved, change)
    with pytest.raises(ValueError, match='do not rise|holds -'): TokenStream.open(saved)

def test_a_document_moved_is_found_without_verify(saved):
    file = next(saved.glob('docs-*'))
    docs = np.fromfile(file, '<i8')
    docs[-2] += 1
    file.write_bytes(docs)
    with pytest.raises(ValueError, match='another checksum'): TokenStream.open(saved)

def outside(path):
    "A stream with an id outside its vocab, as it is opened"
    file = next(path.glob('ids-*'))
    ids = np.fromfile(file, 'u1')
    ids[-30] = 255
    file.write_bytes(ids)
    return TokenStream.open(path)

@pytest.mark.parametrize('read', [
    lambda s: [*StreamDL(s, 2, 10, verbose=False)],
    lambda s: [*StreamDL(s, 2, 10, target='last', begins=True, verbose=False)],
    lambda s: [*s.dataloaders(2, 10, verbose=False).valid],
    lambda s: lm_seqs(s, 3), lambda s: score(RNNLM(len(s.vocab), 4), s),
    lambda s: s.decode(), lambda s: s.check_range()])
def test_ids_outside_the_vocab_reach_no_model(read, saved):
    with pytest.raises(ValueError, match='token id 255, outside'): read(outside(saved))

def test_a_file_cut_off_while_it_is_read(saved):
    stream = TokenStream.open(saved)
    dl = StreamDL(stream, 2, 10, verbose=False)
    assert len([*dl]) == len(dl)
    os.truncate(next(saved.glob('ids-*')), 10)
    for read in dl.one_batch, lambda: next(iter(dl)):
        with pytest.raises(ValueError, match='another program cut it off'): read()

def test_more_files_than_a_process_may_open(tmp_path):
    n = 200
    ids = torch.arange(2**16*n) % 200
    stream = TokenStream(ids, [*map(str, range(200))])
    path = stream.save(tmp_path/'s', file_tokens=2**16)
    assert len([*path.glob('ids-*')]) == n
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try: stream = TokenStream.open(path, verify=True)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert torch.equal(stream.ids.long(), ids)

# tokenizers

RUN = '{"fastai": "run", "cmd": "touch pwned", "rules": [], "sep": " "}'
RULE = '{"fastai": "BaseTokenizer", "split_char": " ", "rules": ["run"], "sep": " "}'

BPE = '{"version": "1.0", "model": {"type": "BPE"}}'

@pytest.mark.parametrize('tokenizer', [RUN, RULE, '{"fastai": 1}', '{"model": 3}', '{',
                                       'x', BPE])
def test_a_broken_tokenizer_is_named_when_opened(
        tokenizer, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewrite(saved, lambda header: header.update(tokenizer=tokenizer))
    with pytest.raises(ValueError, match='stream.json has .*tokenizer'):
        TokenStream.open(saved)
    stream = TokenStream([0, 1], ['touch', 'pwned'])
    stream.tokenizer = tokenizer
    with pytest.raises(ValueError, match='tokenizer'):
        load_pretrained(RNNLM(2, 4).save_pretrained(tmp_path/'m', stream))
    if tokenizer in (RUN, RULE):
        with pytest.raises(ValueError, match='no tokenizer of fastai'):
            stream.encode('touch pwned')
    assert not Path('pwned').exists()

# what is planted for a writer

OURS = '.lock', 'ids.tmp', 'docs.tmp', 'stream.tmp', 'stream.json'

@pytest.mark.parametrize('name', OURS)
@pytest.mark.parametrize('target', ['mine', 'none/there'])
def test_a_planted_link_is_not_written_through(name, target, saved, tmp_path):
    (tmp_path/'mine').write_text('keep this')
    (saved/name).unlink(missing_ok=True)
    (saved/name).symlink_to(tmp_path/target)
    small_stream(1).save(saved)
    assert (tmp_path/'mine').read_text() == 'keep this'
    assert [p for p in saved.iterdir() if p.is_symlink()] == []
    opened = TokenStream.open(saved, verify=True)
    assert opened.fingerprint == small_stream(1).fingerprint

@pytest.mark.parametrize('name', OURS)
def test_a_planted_pipe_does_not_stop_a_writer(name, saved):
    (saved/name).unlink(missing_ok=True)
    os.mkfifo(saved/name)
    small_stream(1).save(saved)
    opened = TokenStream.open(saved, verify=True)
    assert opened.fingerprint == small_stream(1).fingerprint

# what would fill the memory

@pytest.mark.parametrize('text', [
    '[' + '[],'*22_000_000 + '[]]', '{"vocab": [' + '{},'*22_000_000 + '{}]}',
    '['*60_000_000, '{"vocab": [' + '"a",'*33_000_000 + '"a"]}'],
    ids='lists objects nested vocab'.split())
def test_a_header_that_would_fill_the_memory(text, saved):
    (saved/'stream.json').write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match='stream.json is none of ours'):
            TokenStream.open(saved)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally: tracemalloc.stop()

def test_a_model_larger_than_its_weights(tmp_path):
    path = RNNLM(5, 4).save_pretrained(tmp_path/'m')
    text = (path/'config.json').read_text()
    for key,old in ('n_layers', 1), ('n_hidden', 4), ('ngrams', 0), ('vocab_sz', 5):
        for new in 10**9, 2**63, 10**30:
            config = json.loads(text)
            assert config['config'][key] == old
            config['config'][key] = new
            config.pop('check')
            (path/'config.json').write_text(json.dumps(sealed(config)))
            with pytest.raises(ValueError, match='config'): load_pretrained(path)

def test_a_file_larger_than_memory(tmp_path):
    setting = Path('/proc/sys/vm/overcommit_memory')
    if setting.exists() and setting.read_text().strip() == '1':
        pytest.skip('this system promises any memory')
    path = RNNLM(5, 4).save_pretrained(tmp_path/'m')
    size = 2**43
    os.truncate(path/'model.safetensors', size)  # a hole, which takes no room on disk
    config = json.loads((path/'config.json').read_text())
    config['files']['model.safetensors']['bytes'] = size
    config.pop('check')
    (path/'config.json').write_text(json.dumps(sealed(config)))
    with pytest.raises(ValueError, match='more than there is memory for'):
        load_pretrained(path)

# older folders

def test_version_1_still_opens(tmp_path):
    path = small_stream(0).save(tmp_path/'s')
    header = json.loads((path/'stream.json').read_text())
    del header['check']
    header['version'] = 1
    (path/'stream.json').write_text(json.dumps(header))
    old = TokenStream.open(path, verify=True)
    assert old.fingerprint == small_stream(0).fingerprint
    path = RNNLM(5, 4).save_pretrained(tmp_path/'m')
    config = json.loads((path/'config.json').read_text())
    del config['check']
    config['version'] = 1
    (path/'config.json').write_text(json.dumps(config))
    assert load_pretrained(path)[0].config == RNNLM(5, 4).config

@pytest.mark.parametrize('name', ['stream.json', 'config.json'])
def test_a_checksum_is_not_left_out(name, tmp_path):
    path,read = small_stream(0).save(tmp_path/'stream.json'),TokenStream.open
    if name == 'config.json':
        path,read = RNNLM(5, 4).save_pretrained(tmp_path/name),load_pretrained
    config = json.loads((path/name).read_text())
    del config['check']
    (path/name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match='has no checksum of its own'): read(path)

# readers and writers at the same time

def alternate(write, read, n=150):
    "Call `read` while `write(0)` and `write(1)` take turns; gives what was read"
    write(0)
    is_over = threading.Event()
    def forever():
        while not is_over.is_set():
            for seed in 1,0: write(seed)
    writer = threading.Thread(target=forever)
    writer.start()
    try: return {read() for _ in range(n)}
    finally:
        is_over.set()
        writer.join()

def test_a_stream_replaced_back_and_forth(tmp_path):
    two = [small_stream(seed) for seed in (0, 1)]
    found = alternate(lambda seed: two[seed].save(tmp_path/'s'),
                      lambda: TokenStream.open(tmp_path/'s', verify=True).fingerprint)
    assert found <= {o.fingerprint for o in two}

def test_a_checkpoint_replaced_back_and_forth(tmp_path):
    def write(seed): write_folder(tmp_path/'m', dict(format='rnnlm.Test', version=1),
                                  dict(a=bytes([seed])*9, b=bytes([seed])*9))
    def read():
        files = read_folder(tmp_path/'m', 'rnnlm.Test', 'ab')[1]
        assert files['a'] == files['b']
        return files['a'][0]
    assert alternate(write, read) <= {0, 1}

def test_the_same_header_twice_is_no_proof(saved, monkeypatch):
    "A is replaced by B and B by A, and the files of A were missing in between"
    load = rnnlm.store._load
    def late(*args):
        monkeypatch.setattr(rnnlm.store, '_load', load)
        raise FileNotFoundError(2, 'No such file or directory', 'ids-00000000.bin')
    monkeypatch.setattr(rnnlm.store, '_load', late)
    assert TokenStream.open(saved).fingerprint == small_stream(0).fingerprint

# "Save it again" works

@pytest.mark.parametrize('harm', [
    lambda file: file.write_bytes(b'{'), lambda file: file.unlink(),
    lambda file: file.write_bytes(
        file.read_bytes().replace(b'"version"', b'"vrsion"'))],
    ids='cut missing changed'.split())
def test_what_is_broken_is_written_again(harm, tmp_path):
    stream = small_stream(0)
    harm(stream.save(tmp_path/'s')/'stream.json')
    same = TokenStream.open(stream.save(tmp_path/'s'), verify=True)
    assert same.fingerprint == stream.fingerprint
    harm(write_checkpoint(tmp_path/'run', 5, dict(a=1))/'config.json')
    assert read_checkpoint(write_checkpoint(tmp_path/'run', 5, dict(a=2))) == dict(a=2)
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['step-000000005']

def test_a_model_folder_with_another_checksum_is_written_again(tmp_path):
    path = RNNLM(5, 4).save_pretrained(tmp_path/'m')
    text = (path/'config.json').read_text()
    (path/'config.json').write_text(text.replace('"n_layers": 1', '"n_layers": 2'))
    with pytest.raises(ValueError, match='another checksum'): load_pretrained(path)
    load_pretrained(RNNLM(5, 4).save_pretrained(path))
