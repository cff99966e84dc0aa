"Streams where a notebook cannot go: killed writers, full disks, several processes, memory, and archives of real corpora."
import itertools, json, multiprocessing as mp, os, random, re, shutil, signal, subprocess, sys, tarfile, time
from pathlib import Path
import numpy as np, psutil, pytest, torch
import rnnlm.stream, rnnlm.text
from rnnlm.text import TokenStream

root = Path(__file__).parent.parent
fork = mp.get_context('fork')  # a killed process is to be ready at once

def same(a, b):
    assert a.ids.long().equal(b.ids.long())
    assert (a.vocab, a.sep, a.tokenizer) == (b.vocab, b.sep, b.tokenizer)
    assert np.array_equal(a.docs, b.docs)

def files(path): return sorted(p.name.split('-')[0] for p in path.iterdir())
whole = ['docs', 'ids', 'stream.json']  # the files of a folder in which nothing is left over

def run(code, *args, **env):
    "What `code` prints in a new Python"
    res = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env=os.environ | env)
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
    return [' '.join(f'w{int(rng.paretovariate(.5)) % 5000}' for _ in range(rng.randint(0, 60))) for _ in range(n)]

# Old or new, whatever happens

def some(seed): return TokenStream.from_docs(texts(seed=seed), str.split, progress=False)

def write_forever(path):
    for seed in itertools.cycle((0,1)):
        some(seed).save(path)
        TokenStream.from_docs(texts(seed=1-seed), str.split, path=path, progress=False)

def test_killed_while_writing(tmp_path):
    path, prints = some(0).save(tmp_path/'s'), {some(0).fingerprint: 0, some(1).fingerprint: 0}
    rng, left_over = random.Random(0), 0
    for _ in range(60):
        proc = made(write_forever, path)
        time.sleep(rng.uniform(.005, .08))
        proc.kill(); proc.join()
        left_over += files(path) != whole
        prints[TokenStream.open(path, verify=True).fingerprint] += 1
    assert all(prints.values()) and left_over  # else this tested little
    some(1).save(path)  # the dead hold no lock, and what they left over goes
    same(TokenStream.open(path, verify=True), some(1))
    assert files(path) == whole

def test_reading_while_writing(tmp_path):
    path, prints = some(0).save(tmp_path/'s'), {some(0).fingerprint, some(1).fingerprint}
    old = TokenStream.open(path)
    proc, seen = made(write_forever, path), set()
    try:
        until(lambda: seen.add(TokenStream.open(path, verify=True).fingerprint) or len(seen) == 2)
        for _ in range(200): seen.add(TokenStream.open(path, verify=True).fingerprint)
    finally: proc.kill(); proc.join()
    assert seen == prints
    same(old, some(0))  # its file is long gone

def test_replaced_while_opening(tmp_path, monkeypatch):
    path, load = some(0).save(tmp_path/'s'), rnnlm.stream._load
    def late(*args):
        monkeypatch.setattr(rnnlm.stream, '_load', load)
        some(1).save(path)
        return load(*args)
    monkeypatch.setattr(rnnlm.stream, '_load', late)
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
        for write in lambda: some(1).save(path), lambda: TokenStream.from_docs(['a'], path=path):
            with pytest.raises(RuntimeError, match='another process is writing .*s; wait for it'): write()
        same(TokenStream.open(path, verify=True), some(0))
    finally: go.set(); proc.join()
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
    finally: go.set(); proc.join()
    assert TokenStream.open(path, verify=True).decode() == 'first last'

full_disk = """
import errno, os, sys
from pathlib import Path
from rnnlm.text import TokenStream
disk = Path(sys.argv[1])
limit = len(sys.argv) > 2
if limit: import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
def files(path): return sorted(p.name for p in path.rglob('*'))
path = TokenStream.from_docs(['a b c'], path=disk/'old', progress=False) and disk/'old'
before = files(disk)
big = TokenStream([0,1]*10**6, ['a','b'])
def docs():
    for i in range(10**4): yield 'a b '*1000
for write in (lambda: big.save(path), lambda: big.save(disk/'new'/'er'),
              lambda: TokenStream.from_docs(docs(), path=path), lambda: TokenStream.from_docs(docs(), path=disk/'new')):
    try: write()
    except OSError as e: assert e.errno == (errno.EFBIG if limit else errno.ENOSPC), e; print(e)
    else: raise AssertionError('it fitted')
    assert files(disk) == before, files(disk)
    assert TokenStream.open(path, verify=True).decode() == 'a b c'
TokenStream.from_docs(['c b a'], path=path)
print('fine')
"""

def test_full_disk(tmp_path):
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', tmp_path], capture_output=True).returncode == 0:
        try: out = run(full_disk, tmp_path)
        finally: subprocess.run(['umount', tmp_path], check=True)
    else:
        mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$0" -c "$2" "$1"'
        res = subprocess.run(['unshare', '-rm', 'sh', '-c', mount, sys.executable, tmp_path, full_disk],
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
    tok.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=['.']))
    return tok

@pytest.mark.parametrize('kwargs', [
    {}, dict(eos='.', min_freq=2), dict(tokenizer='chars'), dict(tokenizer=lines, max_vocab=50), dict(tokenizer='fastai'),
    dict(tokenizer=str.split, vocab=['w1','w2','<unk>']), dict(tokenizer='bpe', eos='.')], ids='words eos chars function fastai split bpe'.split())
def test_workers_give_the_same_ids(kwargs, tmp_path, monkeypatch, bpe):
    from fastai.text.core import SpacyTokenizer
    monkeypatch.setattr(rnnlm.text, '_BLOCK', 2000)  # some dozens of pieces
    if tok := {'bpe': bpe, 'fastai': SpacyTokenizer()}.get(kwargs.get('tokenizer')): kwargs = kwargs | dict(tokenizer=tok)
    for i,text in enumerate(texts(100)): (tmp_path/f'{i:03}.txt').write_text(text+'\n')
    for source,method in (texts(100), TokenStream.from_docs), (tmp_path, TokenStream.from_files):
        alone = method(source, progress=False, **kwargs)
        for n_workers in 1,2: same(method(source, progress=False, n_workers=n_workers, **kwargs), alone)

def test_workers_started_anew():
    "Where processes are not forked, all that goes to them has to be picklable"
    assert run("import multiprocessing; from rnnlm.text import TokenStream\n"
               "if __name__ == '__main__':\n"
               "    multiprocessing.set_start_method('spawn')\n"
               "    for vocab in None, ['c','<unk>']:\n"
               "        print(TokenStream.from_docs(['a b', 'b c'], n_workers=1, vocab=vocab, progress=False).ids.tolist())"
               ) == '[0, 1, 1, 2]\n[1, 1, 1, 0]\n'

def test_documents_are_not_read_far_ahead():
    taken = itertools.count()
    pieces = ([(f'a{next(taken)}', True)] for _ in range(100))
    encoded = rnnlm.text._encode_all(pieces, 2, (rnnlm.text._read_tokenizer('words')[0], None, None))
    for i in range(3): assert next(encoded)[2] == [f'a{i}']
    assert next(taken) == 6  # four under way, less the one just given; two given before
    encoded.close()

def fail(text): raise ZeroDivisionError(f'no {text}')

def test_failures_in_workers_arrive(tmp_path):
    with pytest.raises(ZeroDivisionError, match='no a'): TokenStream.from_docs(['a'], fail, n_workers=2, path=tmp_path/'s')
    with pytest.raises(ValueError, match="token 'b' is not in vocab"): TokenStream.from_docs(['a b'], n_workers=2, vocab=['a'])
    with pytest.raises(TypeError, match='tokenizer must give strings'): TokenStream.from_docs(['a b'], str.encode, n_workers=2)
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
    workers = lambda: psutil.Process(proc.pid).children()
    until(lambda: len(workers()) == 2 and all(o.cpu_times().user > .05 for o in workers()))
    left = workers()
    if how == signal.SIGINT: os.killpg(proc.pid, how)  # as Ctrl-C does: to all of them
    else: proc.kill()
    proc.join(20)
    try: until(lambda: not any(o.is_running() and o.status() != psutil.STATUS_ZOMBIE for o in left))
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

def test_memory_of_reading(tmp_path):
    path = TokenStream(torch.arange(25_000_000) % 300, [f'{i}' for i in range(300)]).save(tmp_path/'s')
    assert sum(p.stat().st_size for p in path.iterdir()) > 50e6
    code = ("import psutil, sys; from rnnlm.text import TokenStream\n"
            "stream, rss = TokenStream.open(sys.argv[1]), psutil.Process().memory_info\n"
            "for again in 0,1:\n"  # first to load and allocate all that the loop needs
            "    stream.release(); start, most = rss().rss, 0\n"
            "    for i in range(0, len(stream), 10**6):\n"
            "        part = stream[i:i+10**6]; part.ids.int().sum()\n"
            "        most = max(most, rss().rss-start)\n"
            "        if sys.argv[2] == 'release': part.release()\n"
            "print(most/1e6)")
    assert float(run(code, path, 'keep')) > 40
    assert float(run(code, path, 'release')) < 16  # one slice is 2 MB, and 4 as int32

def test_memory_of_writing(tmp_path):
    code = ("import resource, sys; from rnnlm.text import TokenStream\n"
            "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3\n"
            "def docs(n):\n"
            "    for i in range(n): yield ' '.join(map(str, range(i % 7, 20_000)))\n"
            "TokenStream.from_docs(docs(10), str.split, path=sys.argv[1]); start = most()\n"
            "stream = TokenStream.from_docs(docs(200), str.split, path=sys.argv[1])\n"
            "print(len(stream)/1e6, most()-start)")
    tokens, grown = map(float, run(code, tmp_path/'s').split())
    assert tokens > 3.9 and grown < 12  # their ids alone would take 16 MB, the strings 200

# Batches of drawn lengths

def test_same_draws_in_every_process(tmp_path):
    TokenStream.from_tokens([f'w{i%90}' for i in range(20_000)]).save(tmp_path/'s')
    code = ("import sys, torch; from rnnlm.data import StreamDL, TokenStream\n"
            "torch.manual_seed(int(sys.argv[2])); dl = StreamDL(TokenStream.open(sys.argv[1]), 8, 35, sl_std=5, shift=50, verbose=False)\n"
            "print([(x.shape[1], x[3,0].item()) for _ in range(3) for x,_ in dl])")
    one,other = (run(code, tmp_path/'s', seed, PYTHONHASHSEED=str(seed)) for seed in (1,2))
    assert one == other and len(set(eval(one))) > 20

# Progress, imports

def test_progress(tmp_path, capsys):
    (tmp_path/'a.txt').write_text('words '*1000)
    for make,source,show in ((TokenStream.from_docs, ['a','b'], True), (TokenStream.from_files, tmp_path, True),
                             (TokenStream.from_docs, iter(['a','b']), False)):  # how many are to come is not known
        make(source)
        out = capsys.readouterr().out
        assert ('100.00%' in out) == show and out.endswith('\r') == show
    TokenStream.from_docs(['a','b'], progress=False)
    assert capsys.readouterr().out == ''

def test_import_is_light():
    assert run("import sys, rnnlm.text\n"
               "heavy = 'fastai', 'spacy', 'tokenizers'\n"
               "print(*[m for m in sys.modules if m.split('.')[0] in heavy or m == 'rnnlm.data'])") == '\n'

def test_decoding_without_tokenizers(bpe, monkeypatch):
    stream = TokenStream.from_docs(texts(3), bpe, progress=False)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    rnnlm.stream._hf_tokenizer.cache_clear()
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
    blocks = re.findall(r'```python\n(.*?)```', '\n'.join(''.join(c['source']) for c in cells), re.DOTALL)
    return next(o for o in blocks if word in o)

def read(word, url, tmp_path):
    "What the notebook's lines about the dataset `word` print in a folder of their own, with the dataset at `url`"
    code = ("import re, pandas as pd; from fastai.data.external import URLs; from rnnlm.all import *\n"
            f"URLs.{word} = {url!r}\n{shown(word)}"
            "for o in sorted(globals().items()):\n"
            "    if isinstance(o[1], TokenStream): print(o[0], o[1].docs.tolist(), repr(o[1].decode()))")
    (tmp_path/'work').mkdir()
    return run(f'import os; os.chdir({str(tmp_path/"work")!r})\n{code}', FASTAI_HOME=str(tmp_path/'fastai')).splitlines()

def test_wikitext(tmp_path):
    row = '"\n = {} = \n \n The <unk> is "" here "" . \n"\n'
    url = archive(tmp_path, 'wikitext-2', {'train.csv': row.format('One') + row.format('Two'),
                                           'test.csv': row.format('Three')})
    text = "\\n = {} = \\n \\n The <unk> is \" here \" . \\n"
    assert read('WIKITEXT_TINY', url, tmp_path)[-2:] == [
        f"train [0, 14] '{text.format('One')} {text.format('Two')}'", f"valid [0] '{text.format('<unk>')}'"]
    assert sorted(p.name for p in (tmp_path/'work'/'wikitext').iterdir()) == ['train', 'valid']

def test_imdb(tmp_path):
    url = archive(tmp_path, 'imdb', {
        'train/pos/0_9.txt': "It's good good", 'train/neg/0_1.txt': 'good, no', 'unsup/0_0.txt': 'good. Was',
        'train/labeledBow.feat': '9 0:1', 'test/pos/1_8.txt': 'a test', 'README': 'reviews'})
    text = 'good <unk> <unk> <eos> <unk> good good <eos> good <unk> <unk> <eos>'
    assert read('IMDB', url, tmp_path)[-1] == f"stream [0, 4, 8] '{text}'"
    assert files(tmp_path/'work'/'imdb') == whole

def test_lines_of_a_packed_file(tmp_path):
    import gzip
    with gzip.open(tmp_path/'big.txt.gz', 'wt', encoding='utf-8') as f: f.write('a line\nand a line\n')
    out = run(f"import gzip, os; from rnnlm.text import TokenStream; os.chdir({str(tmp_path)!r})\n"
              f"{shown('gzip')}\nprint(stream.docs, stream.vocab)")
    assert out == "[0 3] ['<unk>', 'a', 'line', '\\n', 'and']\n"
