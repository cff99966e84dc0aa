"""Words of any script, the way back to a text, and tokenizers that a stream keeps."""
import json, os, pickle, random, subprocess, sys, unicodedata
import pytest, torch
from rnnlm.encode import prepare_tokenizer
from rnnlm.text import TokenStream
from rnnlm.words import WORDS, find_words, join_words
import rnnlm.encode, rnnlm.pieces

def made(docs, tokenizer='words', **kwargs):
    return TokenStream.from_docs(docs, tokenizer, progress=False, **kwargs)

# Words

@pytest.mark.parametrize('text,words', [
    ('हिन्दी में लिखो।', ['हिन्दी', 'में', 'लिखो', '।']),
    ('தமிழ் மொழி.', ['தமிழ்', 'மொழி', '.']),
    ('ภาษาไทย ดีที่สุด', ['ภาษาไทย', 'ดีที่สุด']),  # what stands between two spaces
    ('שָׁלוֹם, עוֹלָם', ['שָׁלוֹם', ',', 'עוֹלָם']),
    ('السَّلامُ عَلَيْكُم', ['السَّلامُ', 'عَلَيْكُم']),
    ('cafe\u0301 na\u0131\u0308ve', ['cafe\u0301', 'na\u0131\u0308ve']),
    ('می\u200cخواهم', ['می\u200cخواهم']),
    ('क\u094d\u200dष co\xadop a\u2060b', ['क\u094d\u200dष', 'co\xadop', 'a\u2060b'])],
    ids='Hindi Tamil Thai Hebrew Arabic accents Persian joiners'.split())
def test_marks_and_joiners_stay_with_their_word(text, words):
    assert find_words(text) == WORDS.findall(text) == words
    stream = made([text])
    assert stream.vocab == [*dict.fromkeys(words)]
    assert stream.encode(text).tolist() == stream.ids.tolist()

def test_an_emoji_is_one_token():
    emoji = ['👩‍🚀', '👍🏽', '🇩🇪', '🇫🇷', '❤️', '1️⃣', '👨‍👩‍👧', '🏴󠁧󠁢󠁥󠁮󠁧󠁿']
    assert find_words(' '.join(emoji)) == emoji
    assert find_words('🇩🇪🇫🇷') == ['🇩🇪', '🇫🇷']
    assert find_words('ok👍🏽!') == ['ok', '👍🏽', '!']

def test_a_mark_at_the_start_begins_a_word():
    assert find_words('\u0301a b') == ['\u0301a', 'b']
    assert find_words('x\n\u0301') == ['x', '\n', '\u0301']

def test_no_mark_is_cut_off_in_any_script():
    marks = [chr(i) for i in range(sys.maxunicode+1)
             if unicodedata.category(chr(i))[0] == 'M']
    assert len(marks) > 2000
    assert find_words(' '.join(f'a{o}b' for o in marks)) == [f'a{o}b' for o in marks]

def test_ascii_has_the_words_of_before():
    import re
    before = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\n")
    rng = random.Random(0)
    text = ''.join(rng.choices([chr(i) for i in range(128)] + [*"'''   ab"], k=20_000))
    assert find_words(text) == WORDS.findall(text) == before.findall(text)

# Back to a text

def test_words_are_joined_as_people_write():
    text = ('"Don\'t (ever) go," she said; nobody [did]: why?\n\n“Well” — it\'s\n'
            'three! Is it... {so}?')
    stream = made([text])
    assert stream.decode() == text
    assert stream.decode(sep=' ').startswith('" Don\'t ( ever ) go , " she')
    assert TokenStream.from_tokens(['a', ',']).decode() == 'a ,'  # not of 'words'

def test_decoded_words_give_the_same_ids():
    vocab = [*'abé"\'’“”.,:;!?()[]{}\n-19<>\u0301\u200d🇩👩🏽世…।', "it's", 'e\u0301x',
             '👩\u200d', '<eos>', ':)', "'s", '(<eos>', '...', '<unk>']
    stream = TokenStream([0], vocab)
    stream.tokenizer = 'words'
    rng = random.Random(0)
    for _ in range(2000):
        ids = rng.choices(range(len(vocab)), k=rng.randint(1, 12))
        assert stream.encode(stream.decode(ids)).tolist() == ids, stream.decode(ids)

def test_quotes_close_with_the_paragraph():
    assert join_words(['"', 'a', '\n', '\n', '"', 'b', '"']) == '"a\n\n"b"'

# A new text

@pytest.fixture(scope='module')
def bpe():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(['the cat sat on the mat']*3, trainers.BpeTrainer(
        vocab_size=270, show_progress=False, special_tokens=['<bos>', '<eos>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok

def tokenizers(bpe):
    from fastai.text.core import BaseTokenizer, SpacyTokenizer, Tokenizer
    class FromTransformers: backend_tokenizer = bpe
    rules = Tokenizer(SpacyTokenizer('de'), rules=[])
    return dict(words='words', chars='chars', base=BaseTokenizer(), rules=rules,
                spacy=SpacyTokenizer, bpe=bpe, transformers=FromTransformers())

names = 'words chars base spacy rules bpe transformers'.split()

@pytest.mark.parametrize('name', names)
def test_a_stream_encodes_a_new_text(name, bpe, tmp_path):
    tok = tokenizers(bpe)[name]
    docs = ['The cat sat on the mat. "No," said the CAT!']
    stream = made(docs, tok)
    saved = TokenStream.open(stream.save(tmp_path/'s'))
    written = made(docs, tok, path=tmp_path/'t')
    for o in stream, stream[2:5], saved, saved[1:3], written, pickle.loads(
            pickle.dumps(stream)), stream.new_empty():
        ids = o.encode(docs[0])
        assert ids.dtype == torch.int64 and ids.tolist() == stream.ids.tolist()
        empty = o.encode('')
        assert empty.dtype == torch.int64 and empty.shape == (0,)
    again = made(docs, stream.tokenizer)  # what is kept is a tokenizer, too
    assert again.ids.equal(stream.ids) and again.tokenizer == stream.tokenizer

def test_a_subword_tokenizer_is_kept(tmp_path, monkeypatch):
    pytest.importorskip('sentencepiece')
    from fastai.text.core import SubwordTokenizer
    monkeypatch.chdir(tmp_path)
    docs = [f'number {i} of the many numbers that are here' for i in range(300)]
    tok = SubwordTokenizer(vocab_sz=60)
    tok.setup(docs)
    stream = made(docs, tok)
    for p in (tmp_path/'tmp').iterdir(): p.unlink()
    saved = TokenStream.open(stream.save(tmp_path/'s'))
    first = stream[:stream.docs[1]]
    assert saved.encode(docs[0]).tolist() == first.ids.tolist()

def test_unknown_words_become_unk():
    stream = made(['a a b b c'], min_freq=2)
    assert stream.unk == '<unk>' and stream.encode('c b new').tolist() == [0, 2, 0]
    assert made(['a'], vocab=['a', '?'], unk='?').encode('b').tolist() == [1]
    every = made(['a b'])
    assert every.unk is None
    with pytest.raises(ValueError, match="text holds the token 'c', which is not in"):
        every.encode('a c')

def test_special_tokens_are_found_again(bpe):
    stream = made(['a b', 'c'], bos='<bos>', eos='<eos>')
    assert stream.encode(stream.decode()).tolist() == stream.ids.tolist()
    assert stream.decode() == '<bos> a b <eos> <bos> c <eos>'
    chars = made(['ab', 'c'], 'chars', eos='<eos>')
    assert chars.encode(chars.decode()).tolist() == chars.ids.tolist()
    by_hf = made(['the cat'], bpe, eos='<eos>')
    assert by_hf.encode(by_hf.decode()).tolist() == by_hf.ids.tolist()

def test_a_function_cannot_be_kept_but_given():
    from fastai.text.core import BaseTokenizer, Tokenizer
    own_rule = Tokenizer(BaseTokenizer(), rules=[lambda o: o.lower()])
    for stream in (made(['a b'], str.split), TokenStream.from_tokens(['a', 'b']),
                   made(['a b'], own_rule)):
        assert stream.tokenizer is None
        with pytest.raises(ValueError, match=r'encode\(text, tokenizer=f\)'):
            stream.encode('a')
        assert stream.encode('b a', tokenizer=str.split).tolist() == [1, 0]

def test_encode_takes_a_string_and_the_own_vocab(bpe):
    stream = made(['a b'])
    for wrong in ['a'], b'a', None, torch.tensor([0]):
        with pytest.raises(TypeError, match='text must be a string, got'):
            stream.encode(wrong)
    with pytest.raises(ValueError, match="tokenizer has a vocab of .* the stream's"):
        stream.encode('a', tokenizer=bpe)

def test_encoding_without_tokenizers(bpe, monkeypatch):
    stream = made(['the cat'], bpe)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    rnnlm.encode._stored.cache_clear()
    with pytest.raises(ImportError, match='pip install tokenizers'):
        stream.encode('the')

def test_old_headers_open(tmp_path):
    path = made(['a , b']).save(tmp_path/'s')
    header = json.loads((path/'stream.json').read_text())
    del header['unk'], header['check']
    header['version'] = 1
    header['tokenizer'] = None  # as before there were names
    (path/'stream.json').write_text(json.dumps(header))
    old = TokenStream.open(path, verify=True)
    assert (old.tokenizer, old.unk, old.decode()) == (None, None, 'a , b')
    assert old.encode('b', tokenizer='words').tolist() == [2]

# bos

@pytest.mark.parametrize('n_workers', [0, 2])
def test_bos_stands_before_each_document(n_workers, bpe, monkeypatch):
    monkeypatch.setattr(rnnlm.pieces, '_BLOCK', 4)  # documents in pieces of their own
    docs = ['a b', '', 'c']
    for tok in 'words', str.split:
        s = made(docs, tok, bos='^', eos='$', n_workers=n_workers)
        assert s.decode(sep=' ') == '^ a b $ ^ $ ^ c $' and s.vocab[0] == '^'
        assert s.docs.tolist() == [0, 4, 6]
    s = made(docs, bpe, bos='<bos>', n_workers=n_workers)
    assert s.decode() == '<bos>a b<bos><bos>c' and s.docs.tolist() == [0, 4, 5]

def test_bos_stands_once_in_a_file_of_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(rnnlm.pieces, '_BLOCK', 20)
    (tmp_path/'a.txt').write_text('some words\n'*20)
    for tok in 'words', str.split:
        s = TokenStream.from_files(tmp_path/'a.txt', tokenizer=tok, bos='^', eos='$',
                                   progress=False)
        assert s.decode(sep=' ').count('^') == 1 and s[0] == s.vocab.index('^')

def test_bos_is_kept_however_rare():
    for kwargs in dict(min_freq=3), dict(max_vocab=4):
        s = made(['b b b a', 'b'], bos='^', eos='$', **kwargs)
        assert s.vocab == ['<unk>', '^', 'b', '$']
    with pytest.raises(ValueError, match="bos must be a token of the vocab, got '.'"):
        made(['a'], vocab=['a'], bos='^')

# Workers that are spawned

SPAWN = '''
import functools, multiprocessing
from rnnlm.text import TokenStream
def own(text): return text.split()
class Own:
    def __call__(self, text): return text.split()
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    def never(*args): raise AssertionError('a process was started')
    part = functools.partial(own)
    for tok in (lambda o: o.split()), own, part, Own(), Own().__call__:
        start = multiprocessing.process.BaseProcess.start
        if {refused}: multiprocessing.process.BaseProcess.start = never
        try:
            s = TokenStream.from_docs(['a b'], tok, n_workers=1, progress=False)
            print(s.ids.tolist())
        except ValueError as e: print(e)
        multiprocessing.process.BaseProcess.start = start
    print(TokenStream.from_docs(['a b'], str.split, n_workers=1, progress=False))
'''

def run(*args):
    res = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return res.stdout.splitlines()

def test_a_tokenizer_that_cannot_be_sent_is_named_before_a_process_starts():
    out = run('-c', SPAWN.format(refused=True))  # no module to import: as in a notebook
    assert len(out) == 6 and out[-1].startswith('TokenStream(2 tokens')
    for line in out[:-1]:
        assert line.startswith('n_workers must be 0 for tokenizer ')
        assert 'define it in a module (a .py file) and import it, or leave' in line
    assert "it can't be pickled" in out[0]
    assert "a new process can't import 'own' from here" in out[1]
    assert "a new process can't import 'Own' from here" in out[3]

def test_a_function_of_a_script_can_be_sent(tmp_path):
    (tmp_path/'script.py').write_text(SPAWN.format(refused=False))
    out = run(tmp_path/'script.py')
    assert "it can't be pickled" in out[0]
    assert out[1:5] == ['[0, 1]']*4

def end(text): os._exit(3)

def test_a_worker_that_ends_is_a_clear_error(tmp_path):
    with pytest.raises(RuntimeError, match='a worker process ended before its'):
        made(['a'], end, n_workers=1, path=tmp_path/'s')
    assert not [*tmp_path.iterdir()]

# Floats

def test_floats_are_not_advised_to_be_rounded():
    for ids in [.5, 1.], torch.tensor([.5]), torch.tensor([1+1j]):
        with pytest.raises(TypeError, match='must be integer') as e:
            TokenStream(ids, ['a', 'b'])
        assert 'long()' not in str(e.value) and 'group_chunks' in str(e.value)
    for dtype in torch.uint8, torch.int32:
        assert TokenStream(torch.tensor([1], dtype=dtype), ['a', 'b'])[0] == 1
