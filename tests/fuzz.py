"""Readers of damaged folders, and what they make of them.

A `Kind` has two whole folders and a function that reads one. `trials` damages copies of
the first and says what came of reading them."""
import json, os, random, shutil, signal, sys, tempfile
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
import torch
from damage import damage
from rnnlm.checkpoints import read_checkpoint, write_checkpoint
from rnnlm.folder import load_figures, load_pretrained
from rnnlm.lm import RNNLM
from rnnlm.loader import StreamDL
from rnnlm.packing import dumps
from rnnlm.text import TokenStream

Kind = namedtuple('Kind', 'name whole other read is_altered', defaults=[None])
# `read(folder)` gives a dictionary, `other` is a folder from which files may be taken,
# `is_altered(a, b)`: is `a` what a reader that compares no checksums may make of `b`?

FINE = 'refused', 'right', 'as written'  # as written: changed with its checksums
BAD = 'wrong', 'link followed', 'foreign file', 'code', 'unclear', 'hang'

class Hang(BaseException): pass

def _too_late(*_): raise Hang

@contextmanager
def at_most(seconds):
    "Raise `Hang` if it takes longer"
    before = signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

COMMANDS = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork',
            'subprocess.Popen', 'pickle.find_class')
HARMLESS = sys.prefix, sys.base_prefix, '/proc/', '/sys/', '/dev/urandom', '/dev/null'
_watched = []  # the lists that get what happens

def _hook(event, args):
    if not _watched: return
    if event in COMMANDS: _watched[-1].append(('code', event))
    if event != 'open' or not isinstance(args[0], (str, bytes)): return
    if os.getpid() == _pid: _watched[-1].append(('file', os.fsdecode(args[0])))

_pid = os.getpid()
sys.addaudithook(_hook)

@contextmanager
def watched():
    "A list of what Python says that it opens and executes"
    events = []
    _watched.append(events)
    try: yield events
    finally: _watched.remove(events)

def _foreign(events, folder):
    "Was a file opened that does not lie in the folder, and is none of Python's own?"
    files = [os.path.abspath(name) for what,name in events if what == 'file']
    return [o for o in files if os.path.dirname(o) != str(folder)
            and not o.startswith(HARMLESS)]

def judge(kind, folder, want, done):
    "Read a damaged folder; gives the outcome and the message"
    with watched() as events:
        try:
            with at_most(20): got,error = kind.read(folder),None
        except Hang: return 'hang', ''
        except Exception as e: got,error = None,e
        except BaseException as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit)): raise
            got,error = None,e  # as a panic of Rust
    if any(what == 'code' for what,_ in events): return 'code', str(events)
    if _foreign(events, folder): return 'foreign file', str(_foreign(events, folder))
    if error is not None:
        is_clear = isinstance(error, (FileNotFoundError, ValueError))
        is_clear &= str(folder) in str(error)
        outcome = 'refused' if is_clear else 'unclear'
        return outcome, f'{type(error).__name__}: {error}'
    if any(p.is_symlink() for p in folder.iterdir()): return 'link followed', ''
    if got == want: return 'right', ''
    if 'sly' in done: return 'as written', ''
    if kind.is_altered and kind.is_altered(got, want): return 'altered', ''
    return 'wrong', ''

def trials(kind, seeds):
    "Of each seed: what was done to the folder, the outcome, the message"
    want = kind.read(kind.whole)
    with tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            rng = random.Random(f'{kind.name} {seed}')
            place = Path(work).resolve()/str(seed)
            shutil.copytree(kind.whole, place/'damaged')
            (place/'secret.bin').write_bytes(b'secret')
            done = damage(place/'damaged', kind.other, rng)
            yield done, *judge(kind, place/'damaged', want, done)
            shutil.rmtree(place)

# Kinds of folders

def read_stream(folder, verify=False):
    "All that a loader reads of it"
    stream = TokenStream.open(folder, verify)
    repr(stream)
    n = len(stream)
    if n < 2: stream.check_range()
    else:
        sl = min(n-1, 10_000 if n > 10**5 else 50)
        batches = [*StreamDL(stream, 1, sl, whole=True, verbose=False)]
        ids = torch.cat([x[0] for x,_ in batches] + [batches[-1][1][0,-1:]])
    docs = None if stream.docs is None else stream.docs.tolist()
    return dict(ids=ids.tolist(), vocab=[*stream.vocab], sep=stream.sep, docs=docs,
                tokenizer=stream.tokenizer, marks=(stream.unk, stream.bos, stream.eos))

def verified(folder): return read_stream(folder, verify=True)

def only_ids_differ(got, want):
    "And are they ids of the vocab?"
    return got | dict(ids=0) == want | dict(ids=0) and all(
        0 <= i < len(want['vocab']) for i in got['ids'])

def read_model(folder):
    model,stream = load_pretrained(folder)
    weights = {k: (v.dtype, v.shape, v.numpy().tobytes())
               for k,v in model.state_dict().items()}
    kept = stream is not None and (
        [*stream.vocab], stream.sep, stream.tokenizer, stream.unk)
    return dict(kind=type(model), config=model.config, weights=weights, stream=kept,
                figures=load_figures(folder))

def read_packed(folder): return dict(data=dumps(read_checkpoint(folder)))

def texts(seed, n=40):
    rng = random.Random(seed)
    words = [f'w{i}' for i in range(150)]
    return [' '.join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(n)]

def small_stream(seed):
    return TokenStream.from_docs(texts(seed), eos='.', min_freq=2, progress=False)

def bpe_stream(seed):
    "With a tokenizer in its header"
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(texts(seed), trainers.BpeTrainer(
        vocab_size=80, show_progress=False))
    return TokenStream.from_docs(texts(seed), tok, progress=False)

def long_stream(seed):
    torch.manual_seed(seed)
    vocab = [f'w{i}' for i in range(200)]
    ids = torch.randint(200, (2**17+1000,))
    return TokenStream(ids, vocab, docs=range(0, 2**17, 999))

def save_model(folder, seed):
    torch.manual_seed(seed)
    stream = small_stream(seed)
    model = RNNLM(len(stream.vocab), 8, n_layers=1+seed, cell='gru', tie_weights=True)
    return model.save_pretrained(folder, stream, dict(loss=1.5+seed))

def save_packed(folder, seed):
    torch.manual_seed(seed)
    data = dict(step=seed, losses=[*map(float, range(20))], name='a', state=(
        torch.randn(2, 3), [torch.randn(4), None]), settings=dict(bs=64, lr=1e-3))
    return write_checkpoint(folder, 5, data)

def kinds(work):
    "Folders of each kind, made in the folder `work`"
    work = Path(work)
    def two(name, save): return [save(work/name/str(seed), seed) for seed in (0, 1)]
    small = two('small', lambda path, seed: small_stream(seed).save(path))
    bpe = two('bpe', lambda path, seed: bpe_stream(seed).save(path))
    several = two('several', lambda path, seed:
                  long_stream(seed).save(path, file_tokens=2**16))
    model = two('model', save_model)
    packed = two('packed', save_packed)
    return [Kind('stream', *small, read_stream, only_ids_differ),
            Kind('stream, verify', *small, verified),
            Kind('with a tokenizer', *bpe, verified),
            Kind('several files', *several, read_stream, only_ids_differ),
            Kind('several files, verify', *several, verified),
            Kind('model folder', *model, read_model),
            Kind('checkpoint', *packed, read_packed)]
