"""Streams where a notebook cannot go.

Killed writers, full disks, several processes, memory, and archives of real corpora."""
import itertools, json, multiprocessing as mp, os, random, re, shutil, signal
import subprocess, sys, tarfile, time
from functools import partial
from pathlib import Path
import numpy as np, psutil, pytest, torch
import rnnlm.pieces, rnnlm.store, rnnlm.stream
from rnnlm.encode import NewIds, encode_all, prepare_tokenizer
from rnnlm.text import TokenStream
from rnnlm.sealed import sealed

root = Path(__file__).parent.parent
fork = mp.get_context('fork')  # a killed process is to be ready at once

def same(a, b):
    assert a.ids.long().equal(b.ids.long())
    assert (a.vocab, a.sep, a.tokenizer) == (b.vocab, b.sep, b.tokenizer)
    assert np.array_equal(a.docs, b.docs)

def files(path): return sorted(p.name.split('-')[0] for p in path.iterdir())
whole = ['docs', 'ids', 'stream.json']  # with these, nothing is left over in a folder

def run(code, *args, **env):
    "What `code` prints in a new Python"
    res = subprocess.run([sys.executable, '-c', code, *map(str, args)],
                         capture_output=True, text=True, env=os.environ | env)
    assert res.returncode == 0, res.stderr
    return res.stdout

def made(f, *args):
    "A new process that runs `f(*args)`"
    proc = fork.Process(target=f, args=args)
    proc.start()
    return proc

def until(ok, seconds=20):
    end = time.time()+seconds
    while not ok():
        assert time.time() < end, 'waited too long'
        time.sleep(.01)

def texts(n=300, seed=0):
    "`n` documents of words, some rare, some empty"
    rng = random.Random(seed)
    def word(): return f'w{int(rng.paretovariate(.5)) % 5000}'
    return [' '.join(word() for _ in range(rng.randint(0, 60))) for _ in range(n)]

# Old or new, whatever happens

def some(seed):
    return TokenStream.from_docs(texts(seed=seed), str.split, progress=False)

def save(path): some(1).save(path)

def write_docs(path):
    TokenStream.from_docs(texts(seed=1), str.split, path=path, progress=False)

file_operations = {'open', 'write', 'flush', 'fsync', 'close', 'replace', 'unlink',
                   'mkdir', 'rmdir', 'flock'}

def killed_before(n, write, path):
    "`write(path)`, but that the process is killed before its `n`-th operation on files"
    operations = itertools.count(1)
    def watch(frame, event, called):
        if event == 'c_call' and called.__name__ in file_operations:
            if next(operations) == n: os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(watch)
    write(path)
    sys.setprofile(None)

def kills(write, path):
    "Kill a writer of `path` before its first operation, its second, until it is done"
    for n in itertools.count(1):
        proc = made(killed_before, n, write, path)
        proc.join()
        yield n
        if proc.exitcode == 0: return
        assert proc.exitcode == -signal.SIGKILL

writers = pytest.mark.parametrize('write', [save, write_docs])

@writers
def test_killed_while_writing(write, tmp_path, monkeypatch):
    monkeypatch.setattr(rnnlm.store, 'CHUNK', 2000)  # the ids are written in parts
    old,new = some(0),some(1)
    path = old.save(tmp_path/'s')
    found,left_over = [],0
    for n in kills(write, path):
        is_new = TokenStream.open(path).fingerprint == new.fingerprint
        same(TokenStream.open(path, verify=True), new if is_new else old)
        found.append(is_new)
        left_over += files(path) != whole
        old.save(path)  # the dead hold no lock, and what they left over goes
        assert files(path) == whole
    assert found == sorted(found)  # once it is the new one, it stays so
    assert found.count(False) > 10 and found.count(True) > 3 and left_over > 10

@writers
def test_killed_while_writing_a_new_path(write, tmp_path, monkeypatch):
    monkeypatch.setattr(rnnlm.store, 'CHUNK', 2000)
    found = []
    for n in kills(write, tmp_path/'new'/'s'):
        path = tmp_path/'new'/'s'
        found.append((path/'stream.json').exists())
        if found[-1]: same(TokenStream.open(path, verify=True), some(1))
        else:
            with pytest.raises(FileNotFoundError, match='no stream was saved'):
                TokenStream.open(path)
        shutil.rmtree(tmp_path/'new', ignore_errors=True)
    assert found == sorted(found) and found.count(False) > 10 and found.count(True) > 3

@writers
def test_synced_before_it_counts(write, tmp_path, monkeypatch):
    "A power cut leaves what was synced: so first a file's bytes, then its name"
    path,synced,renamed = some(0).save(tmp_path/'s'),{},[]
    fsync,replace = os.fsync,os.replace
    def note_sync(fd):
        fsync(fd)
        stat = os.fstat(fd)
        synced[stat.st_ino] = stat.st_size
    def note_rename(old, new):
        stat = os.stat(old)
        assert synced[stat.st_ino] == stat.st_size > 0
        new_names = synced.pop(path.stat().st_ino, None)
        if Path(new).name == 'stream.json': assert new_names is not None
        replace(old, new)
        renamed.append(Path(new).name.split('-')[0])
    monkeypatch.setattr(os, 'fsync', note_sync)
    monkeypatch.setattr(os, 'replace', note_rename)
    write(path)
    assert renamed == ['ids', 'docs', 'stream.json']
    assert path.stat().st_ino in synced

def write_forever(path):
    for seed in itertools.cycle((0,1)):
        some(seed).save(path)
        docs = texts(seed=1-seed)
        TokenStream.from_docs(docs, str.split, path=path, progress=False)

def test_reading_while_writing(tmp_path):
    path = some(0).save(tmp_path/'s')
    prints = {some(0).fingerprint, some(1).fingerprint}
    old,seen = TokenStream.open(path),set()
    def look(): seen.add(TokenStream.open(path, verify=True).fingerprint)
    proc = made(write_forever, path)
    try:
        until(lambda: look() or len(seen) == 2)
        for _ in range(200): look()
    finally:
        proc.kill()
        proc.join()
    assert seen == prints
    same(old, some(0))  # its file is long gone

def test_replaced_while_opening(tmp_path, monkeypatch):
    path,load = some(0).save(tmp_path/'s'),rnnlm.store._load
    def late(*args):
        monkeypatch.setattr(rnnlm.store, '_load', load)
        some(1).save(path)
        return load(*args)
    monkeypatch.setattr(rnnlm.store, '_load', late)
    same(TokenStream.open(path), some(1))

def hold(path, reached, go):
    def docs():
        yield 'first'
        reached.set(); go.wait(20)
        yield 'last'
    TokenStream.from_docs(docs(), path=path, progress=False)

def test_two_writers(tmp_path):
    path = some(0).save(tmp_path/'s')
    reached, go = fork.Event(), fork.Event()
    proc = made(hold, path, reached, go)
    try:
        assert reached.wait(20)
        for write in save, write_docs:
            with pytest.raises(RuntimeError, match='another process is writing .*s; '):
                write(path)
        same(TokenStream.open(path, verify=True), some(0))
    finally:
        go.set()
        proc.join()
    assert proc.exitcode == 0
    assert TokenStream.open(path, verify=True).decode() == 'first last'
    assert files(path) == whole

def test_two_writers_of_a_new_path(tmp_path):
    path, reached, go = tmp_path/'s', fork.Event(), fork.Event()
    proc = made(hold, path, reached, go)
    try:
        assert reached.wait(20)
        with pytest.raises(RuntimeError): some(1).save(path)
        with pytest.raises(FileNotFoundError): TokenStream.open(path)
    finally:
        go.set()
        proc.join()
    assert TokenStream.open(path, verify=True).decode() == 'first last'

full_disk = """
import errno, os, sys
from pathlib import Path
from rnnlm.text import TokenStream
disk = Path(sys.argv[1])
limit = len(sys.argv) > 2
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
def files(path): return sorted(p.name for p in path.rglob('*'))
path = TokenStream.from_docs(['a b c'], path=disk/'old', progress=False) and disk/'old'
before = files(disk)
big = TokenStream([0,1]*10**6, ['a','b'])
def docs():
    for i in range(10**4): yield 'a b '*1000
for write in (lambda: big.save(path), lambda: big.save(disk/'new'/'er'),
              lambda: TokenStream.from_docs(docs(), path=path),
              lambda: TokenStream.from_docs(docs(), path=disk/'new')):
    try: write()
    except OSError as e:
        assert e.errno == (errno.EFBIG if limit else errno.ENOSPC), e
        print(e)
    else: raise AssertionError('it fitted')
    assert files(disk) == before, files(disk)
    assert TokenStream.open(path, verify=True).decode() == 'a b c'
TokenStream.from_docs(['c b a'], path=path)
print('fine')
"""

def test_full_disk(tmp_path):
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', tmp_path]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try: out = run(full_disk, tmp_path)
        finally: subprocess.run(['umount', tmp_path], check=True)
    else:
        mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$0" -c "$2" "$1"'
        inside = ['unshare', '-rm', 'sh', '-c', mount]
        res = subprocess.run([*inside, sys.executable, tmp_path, full_disk],
                             capture_output=True, text=True)
        out = res.stdout if res.returncode == 0 else run(full_disk, tmp_path, 'limit')
    assert out.endswith('fine\n')
    assert 'No space left on device: ' in out or 'File too large' in out

# Worker processes

def lines(text): return text.splitlines()

@pytest.fixture(scope='module')
def bpe():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=['.']))
    return tok

@pytest.mark.parametrize('kwargs', [
    {}, dict(eos='.', min_freq=2), dict(tokenizer='chars'),
    dict(tokenizer=lines, max_vocab=50), dict(tokenizer='fastai'),
    dict(tokenizer=str.split, vocab=['w1','w2','<unk>']),
    dict(tokenizer='bpe', eos='.')],
    ids='words eos chars function fastai split bpe'.split())
def test_workers_give_the_same_ids(kwargs, tmp_path, monkeypatch, bpe):
    from fastai.text.core import SpacyTokenizer
    monkeypatch.setattr(rnnlm.pieces, '_BLOCK', 2000)  # some dozens of pieces
    tok = {'bpe': bpe, 'fastai': SpacyTokenizer()}.get(kwargs.get('tokenizer'))
    if tok: kwargs = kwargs | dict(tokenizer=tok)
    for i,text in enumerate(texts(100)): (tmp_path/f'{i:03}.txt').write_text(text+'\n')
    for method,source in ((TokenStream.from_docs, texts(100)),
                          (TokenStream.from_files, tmp_path)):
        read = partial(method, source, progress=False, **kwargs)
        for n_workers in 1,2: same(read(n_workers=n_workers), read())

def test_workers_started_anew():
    "Where processes are not forked, all that goes to them has to be picklable"
    code = ("import multiprocessing; from rnnlm.text import TokenStream\n"
            "if __name__ == '__main__':\n"
            "    multiprocessing.set_start_method('spawn')\n"
            "    for vocab in None, ['c','<unk>']:\n"
            "        stream = TokenStream.from_docs(['a b', 'b c'], n_workers=1,\n"
            "                                       vocab=vocab, progress=False)\n"
            "        print(stream.ids.tolist())")
    assert run(code) == '[0, 1, 1, 2]\n[1, 1, 1, 0]\n'

def test_documents_are_not_read_far_ahead():
    taken = itertools.count()
    pieces = ([(f'a{next(taken)}', True)] for _ in range(100))
    ids_of = NewIds()
    encoded = encode_all(pieces, prepare_tokenizer('words'), ids_of, n_workers=2)
    for i in range(3):
        next(encoded)
        assert [*ids_of] == [f'a{j}' for j in range(i+1)]
    assert next(taken) == 6  # four under way, less the one just given; two given before
    encoded.close()

def fail(text): raise ZeroDivisionError(f'no {text}')

def test_failures_in_workers_arrive(tmp_path):
    make = partial(TokenStream.from_docs, ['a b'], n_workers=2)
    with pytest.raises(ZeroDivisionError, match='no a'):
        make(tokenizer=fail, path=tmp_path/'s')
    with pytest.raises(ValueError, match="token 'b' is not in vocab"): make(vocab=['a'])
    with pytest.raises(TypeError, match='tokenizer must give strings'):
        make(tokenizer=str.encode)
    assert not [*tmp_path.iterdir()]

def endless():
    while True: yield 'some words '*1000

def tokenize_forever(path):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: TokenStream.from_docs(endless(), path=path, n_workers=2)
    except KeyboardInterrupt: os._exit(42)

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_stopped_with_workers(how, tmp_path, capfd):
    proc = made(tokenize_forever, tmp_path/'new'/'s')
    def workers(): return psutil.Process(proc.pid).children()
    def at_work(): return [o for o in workers() if o.cpu_times().user > .05]
    until(lambda: len(at_work()) == 2)
    left = workers()
    if how == signal.SIGINT: os.killpg(proc.pid, how)  # as Ctrl-C does: to all of them
    else: proc.kill()
    proc.join(20)
    def alive(o): return o.is_running() and o.status() != psutil.STATUS_ZOMBIE
    try: until(lambda: not any(map(alive, left)))
    finally:
        for o in left:
            if o.is_running(): o.kill()
    if how == signal.SIGINT:
        assert proc.exitcode == 42
        assert 'Traceback' not in capfd.readouterr().err
        assert not [*tmp_path.iterdir()]
    some(0).save(tmp_path/'new'/'s')  # no lock is held by those who live on
    assert files(tmp_path/'new'/'s') == whole

# Memory

def in_memory(path):
    "Bytes of the files in the folder `path` that this process has in memory, mapped"
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(o.rss for o in maps if o.path.startswith(str(path)))

def save_large(path):
    "A stream of 25 million ids, 50 MB, in the folder `path`"
    return TokenStream(torch.arange(25_000_000) % 300, [f'{i}' for i in range(300)]
                      ).save(path)

linux = pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux for the memory')

@linux
def test_memory_of_reading(tmp_path):
    stream = TokenStream.open(save_large(tmp_path/'s'))
    for release,low,high in (False, 40e6, 60e6), (True, 0, 8e6):
        stream.release()
        assert in_memory(tmp_path) == 0
        most = 0
        for i in range(0, len(stream), 10**6):
            part = stream[i:i+10**6]
            part.ids.int().sum()
            most = max(most, in_memory(tmp_path))
            if release: part.release()
        assert low < most < high  # a slice is 2 MB, and some pages around it

@linux
def test_larger_than_memory(tmp_path):
    if Path('/proc/sys/vm/overcommit_memory').read_text().strip() == '2':
        pytest.skip('this system refuses all maps larger than memory')
    size = 4*psutil.virtual_memory().total
    path = TokenStream([0,0], ['a','b']).save(tmp_path/'s')
    os.truncate(next(path.glob('ids-*')), size)  # a hole, which takes no room on disk
    file = path/'stream.json'
    header = json.loads(file.read_text().replace('"length": 2', f'"length": {size}'))
    header.pop('check')
    file.write_text(json.dumps(sealed(header)))
    stream = TokenStream.open(path)
    assert len(stream) == size and stream[size//2:][-2:].decode() == 'a a'

@linux
def test_no_file_is_left_open(tmp_path):
    process,path = psutil.Process(),some(0).save(tmp_path/'s')
    before = process.num_fds()
    for _ in range(3):
        save(path)
        write_docs(path)
        with pytest.raises(TypeError, match='must be strings'):
            TokenStream([0], [1]).save(path)
        TokenStream.open(path, verify=True)
    assert process.num_fds() == before

@linux
def test_memory_of_a_loader(tmp_path):
    from rnnlm.data import StreamDL
    stream = TokenStream.open(save_large(tmp_path/'s'))
    dl = StreamDL(stream, 2, 80_000, verbose=False)
    most = max(in_memory(tmp_path) for _ in dl)
    assert 0 < most < 25e6  # of the 50 MB it reads, it keeps some 4 and what is around

def test_memory_of_writing(tmp_path):
    code = ("import resource, sys; from rnnlm.text import TokenStream\n"
            "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3\n"
            "def docs(n):\n"
            "    for i in range(n): yield ' '.join(map(str, range(i % 7, 20_000)))\n"
            "def make(n):\n"
            "    return TokenStream.from_docs(docs(n), str.split, path=sys.argv[1])\n"
            "make(10); start = most()\n"
            "stream = make(200)\n"
            "print(len(stream)/1e6, most()-start)")
    tokens, grown = map(float, run(code, tmp_path/'s').split())
    assert tokens > 3.9 and grown < 12  # their ids would take 16 MB, the strings 200

# Batches of drawn lengths

def test_same_draws_in_every_process(tmp_path):
    TokenStream.from_tokens([f'w{i%90}' for i in range(20_000)]).save(tmp_path/'s')
    code = ("import sys, torch; from rnnlm.data import StreamDL, TokenStream\n"
            "torch.manual_seed(int(sys.argv[2]))\n"
            "stream = TokenStream.open(sys.argv[1])\n"
            "dl = StreamDL(stream, 8, 35, sl_std=5, shift=50, verbose=False)\n"
            "drawn = []\n"
            "for epoch in range(3):\n"
            "    dl.set_epoch(epoch)\n"
            "    drawn += [(x.shape[1], x[3,0].item()) for x,_ in dl]\n"
            "print(drawn)")
    one,other = (run(code, tmp_path/'s', seed, PYTHONHASHSEED=str(seed))
                 for seed in (1,2))
    assert one == other and len(set(eval(one))) > 20

# Progress, imports

def test_progress(tmp_path, capsys):
    (tmp_path/'a.txt').write_text('words '*1000)
    for make,source,show in (
        (TokenStream.from_docs, ['a','b'], True),
        (TokenStream.from_files, tmp_path, True),
        (TokenStream.from_docs, iter(['a','b']), False)  # how many come is not known
    ):
        make(source)
        out = capsys.readouterr().out
        assert ('100.00%' in out) == show and out.endswith('\r') == show
    TokenStream.from_docs(['a','b'], progress=False)
    assert capsys.readouterr().out == ''

def test_import_is_light():
    code = ("import sys, rnnlm.text\n"
            "heavy = 'fastai', 'spacy', 'tokenizers'\n"
            "found = [m for m in sys.modules if m.split('.')[0] in heavy]\n"
            "print(*found, 'rnnlm.data' in sys.modules)")
    assert run(code) == 'False\n'

@pytest.mark.parametrize('module', ['store', 'text', 'data'])
def test_saves_and_opens_after_any_import(module, tmp_path):
    code = (f"import sys; from rnnlm.{module} import TokenStream\n"
            "stream = TokenStream.from_tokens('abc')\n"
            "print(TokenStream.open(stream.save(sys.argv[1])).decode())")
    assert run(code, tmp_path/'s') == 'abc\n'

def test_decoding_without_tokenizers(bpe, monkeypatch):
    stream = TokenStream.from_docs(texts(3), bpe, progress=False)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    rnnlm.stream.hf_tokenizer.cache_clear()
    with pytest.raises(ImportError, match='pip install tokenizers'): stream.decode()
    assert stream.decode(sep='')

# fastai's datasets, as the notebook reads them

def archive(folder, name, texts):
    "A .tgz of `texts` (path: content) under a folder `name`, as a URL"
    for path,text in texts.items():
        (folder/name/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/name/path).write_text(text)
    with tarfile.open(folder/f'{name}.tgz', 'w:gz') as f: f.add(folder/name, name)
    shutil.rmtree(folder/name)
    return (folder/f'{name}.tgz').as_uri()

def shown(word):
    "The Python that the notebook's prose shows with `word` in it"
    cells = json.loads((root/'nbs'/'00b_text.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells)
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    return next(o for o in blocks if word in o)

def read(word, url, tmp_path):
    "What the notebook's lines about the dataset `word`, at `url`, print in a folder"
    (tmp_path/'work').mkdir()
    code = (f"import os; os.chdir({str(tmp_path/'work')!r})\n"
            "import re, pandas as pd; from fastai.data.external import URLs\n"
            "from rnnlm.all import *\n"
            f"URLs.{word} = {url!r}\n{shown(word)}"
            "for name,o in sorted(globals().items()):\n"
            "    if isinstance(o, TokenStream):\n"
            "        print(name, o.docs.tolist(), repr(o.decode()))")
    return run(code, FASTAI_HOME=str(tmp_path/'fastai')).splitlines()

def test_wikitext(tmp_path):
    row = '"\n = {} = \n \n The <unk> is "" here "" . \n"\n'
    url = archive(tmp_path, 'wikitext-2', {
        'train.csv': row.format('One') + row.format('Two'),
        'test.csv': row.format('Three')})
    text = "\\n = {} = \\n \\n The <unk> is \" here \" . \\n"
    assert read('WIKITEXT_TINY', url, tmp_path)[-2:] == [
        f"train [0, 14] '{text.format('One')} {text.format('Two')}'",
        f"valid [0] '{text.format('<unk>')}'"]
    written = (tmp_path/'work'/'wikitext').iterdir()
    assert sorted(p.name for p in written) == ['train', 'valid']

def test_imdb(tmp_path):
    url = archive(tmp_path, 'imdb', {
        'train/pos/0_9.txt': "It's good good", 'train/neg/0_1.txt': 'good, no',
        'unsup/0_0.txt': 'good. Was', 'train/labeledBow.feat': '9 0:1',
        'test/pos/1_8.txt': 'a test', 'README': 'reviews'})
    text = 'good <unk> <unk> <eos> <unk> good good <eos> good <unk> <unk> <eos>'
    assert read('IMDB', url, tmp_path)[-1] == f"stream [0, 4, 8] '{text}'"
    assert files(tmp_path/'work'/'imdb') == whole

def test_lines_of_a_packed_file(tmp_path):
    import gzip
    with gzip.open(tmp_path/'big.txt.gz', 'wt', encoding='utf-8') as f:
        f.write('a line\nand a line\n')
    out = run("import gzip, os; from rnnlm.text import TokenStream\n"
              f"os.chdir({str(tmp_path)!r})\n"
              f"{shown('gzip')}\nprint(stream.docs, stream.vocab)")
    assert out == "[0 2] ['<unk>', 'a', 'line', 'and']\n"
