"""Texts as people have them: their files, encodings, tables and mistakes."""
import bz2, gzip, io, lzma, subprocess, sys, tarfile, warnings, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from fastcore.foundation import L
import rnnlm.pieces
from rnnlm.text import TokenStream

PACK = dict(gz=gzip.compress, bz2=bz2.compress, xz=lzma.compress)

def from_files(paths, **kwargs):
    return TokenStream.from_files(paths, progress=False, **kwargs)

def from_docs(docs, *args, **kwargs):
    return TokenStream.from_docs(docs, *args, progress=False, **kwargs)

def from_text(text, **kwargs):
    return TokenStream.from_text(text, progress=False, **kwargs)

def same(a, b):
    assert a.ids.equal(b.ids)
    assert list(a.vocab) == list(b.vocab)
    assert np.array_equal(a.docs, b.docs)

def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path

def tokens(stream): return [stream.vocab[i] for i in stream.ids]

# Byte order marks, encodings

def test_byte_order_mark_is_dropped_in_each_file(tmp_path):
    write(tmp_path/'1.txt', 'The one'.encode('utf-8-sig'))
    write(tmp_path/'2.txt', 'The two\nThe end'.encode('utf-8-sig'))
    write(tmp_path/'3.txt.gz', gzip.compress('The three'.encode('utf-8-sig')))
    stream = from_files(tmp_path)
    assert tokens(stream) == 'The one The two \n The end The three'.split(' ')
    assert tokens(from_files(tmp_path, by_line=True)) == [
        o for o in tokens(stream) if o != '\n']
    for encoding in 'utf-8-sig', 'UTF8':
        same(from_files(tmp_path, encoding=encoding), stream)

@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32'])
def test_utf_16_is_named_and_read(encoding, tmp_path):
    text = 'Ünder the 世界 sky\r\n'*60_000  # more than one block
    path = write(tmp_path/'a.txt', text.encode(encoding))
    with pytest.raises(ValueError, match=f"a.txt begins with the byte order mark of "
                       f"{encoding.upper()}; read it with encoding='{encoding}'"):
        from_files(path)
    stream = from_files(path, encoding=encoding, tokenizer='chars')
    same(stream, from_text(text.replace('\r\n', '\n'), tokenizer='chars'))
    bare = write(tmp_path/'bare.txt', text[1:].encode(f'{encoding}-le'))
    with pytest.raises(ValueError, match="bare.txt is no text in UTF-8: byte 1 is 0"):
        from_files(bare)
    with pytest.raises(ValueError, match=f"encoding='{encoding}-le' or"):
        from_files(bare, encoding=encoding)
    read = from_files(bare, encoding=f'{encoding}-le', tokenizer='chars')
    assert read.decode() == stream[1:].decode()

def test_utf_8_is_not_read_as_another_encoding(tmp_path):
    path = write(tmp_path/'a.txt', 'naïve'.encode('utf-8-sig'))
    with pytest.raises(ValueError, match="UTF-8; read it with encoding='utf-8'"):
        from_files(path, encoding='cp1252')

@pytest.mark.parametrize('encoding,word', [
    ('cp1252', '“été”'), ('latin-1', 'été'), ('shift_jis', '世界'),
    ('gb18030', '世界'), ('utf-16-be', '世😀')])
def test_other_encodings_in_blocks_of_any_size(encoding, word, tmp_path, monkeypatch):
    text = f'one two\r\n{word} three\r\n{word}'
    path = write(tmp_path/'a.txt', text.encode(encoding))
    for sz in 1,2,3,7,100:
        monkeypatch.setattr(rnnlm.pieces, '_BLOCK', sz)
        stream = from_files(path, encoding=encoding, tokenizer='chars')
        assert stream.decode() == text.replace('\r\n', '\n')

def test_bytes_of_another_encoding_are_named_with_their_place(tmp_path):
    path = write(tmp_path/'a.txt', b'a line\n'*200_000 + 'café'.encode('latin-1'))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8: byte 1400003 is 0xe9; "
                       "name the encoding that it is in, say encoding='cp1252'"):
        from_files(path)
    assert tokens(from_files(path, encoding='cp1252'))[-1] == 'café'
    with pytest.raises(ValueError, match="encoding must be a name that Python knows"):
        from_files(path, encoding='utf9')
    with pytest.raises(ValueError, match="a.txt is not ASCII: byte 1400003 is 0xe9"):
        from_files(path, encoding='ascii')

def test_line_ends_are_read_as_by_open(tmp_path):
    path = write(tmp_path/'a.txt', 'unix\nwindows\r\nold mac\rend')
    stream = from_files(path)
    assert tokens(stream) == 'unix \n windows \n old mac \n end'.split(' ')
    same(stream, from_text(path.read_text()))
    assert from_files(path, by_line=True).docs.tolist() == [0,1,2,4]

# Folders

def test_hidden_files_and_folders_are_skipped(tmp_path):
    for name in ('a.txt', 'b/c.TXT', '.ipynb_checkpoints/a-checkpoint.txt', '._a.txt',
                 'b/.git/x.txt', 'b/.ipynb_checkpoints/c.txt'):
        write(tmp_path/name, name[0])
    assert tokens(from_files(tmp_path)) == ['a', 'b']
    assert tokens(from_files(tmp_path/'._a.txt')) == ['.']  # named, so meant
    assert len(from_files(tmp_path/'.ipynb_checkpoints')) == 1

def test_no_file_of_a_folder_is_read_twice(tmp_path):
    write(tmp_path/'t/a.txt', 'a')
    write(tmp_path/'t/a.txt.gz', gzip.compress(b'a'))
    write(tmp_path/'t/b.txt.bz2', bz2.compress(b'b'))
    write(tmp_path/'t/empty.txt', '')
    write(tmp_path/'elsewhere/d.txt', 'd')
    (tmp_path/'t/link.txt').symlink_to('a.txt')
    (tmp_path/'t/circle').symlink_to('..')
    assert tokens(from_files(tmp_path/'t')) == ['a', 'b', 'd']  # links are followed
    (tmp_path/'t/gone.txt').symlink_to('nowhere')
    with pytest.raises(FileNotFoundError, match='gone.txt is a link to nothing'):
        from_files(tmp_path/'t')

# Packed files

@pytest.mark.parametrize('kind', PACK)
def test_packed_files_are_read_as_they_are(kind, tmp_path):
    text = 'some words of a line\r\n'*120_000
    plain = write(tmp_path/'plain.txt', text)
    packed = write(tmp_path/'named_as_text.txt', PACK[kind](text.encode()))
    same(from_files(packed), from_files(plain))
    assert packed.stat().st_size < 100_000

@pytest.mark.parametrize('kind,name', dict(gz='gzip', bz2='bzip2', xz='xz').items())
def test_a_truncated_archive_is_named(kind, name, tmp_path):
    noise = np.random.default_rng(0).integers(97, 123, 5000, np.uint8).tobytes()
    path = write(tmp_path/f'a.txt.{kind}', PACK[kind](noise)[:-600])
    with pytest.raises(ValueError, match=f'a.txt.{kind} is a damaged {name} file'):
        from_files(path, path=tmp_path/'stream')
    assert not (tmp_path/'stream').exists()

@pytest.mark.parametrize('kind,start', {
    'a zip archive': b'PK\x03\x04', 'packed with zstd': b'\x28\xb5\x2f\xfd',
    'a 7z archive': b'7z\xbc\xaf\x27\x1c', 'a PDF document': b'%PDF-1.7',
    'a Parquet table': b'PAR1\x15\x04', 'a pickle': b'\x80\x04\x95',
    'a NumPy array': b'\x93NUMPY', 'an image': b'\x89PNG\r\n'}.items())
def test_what_is_no_text_is_named(kind, start, tmp_path):
    path = write(tmp_path/'a.txt', start + bytes(50))
    with pytest.raises(ValueError, match=f'a.txt is {kind}'): from_files(path)
    with pytest.raises(ValueError, match=f'a.txt is {kind}'):
        from_files(path, encoding='latin-1')

@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:xz'])
def test_a_tar_archive_is_named(mode, tmp_path):
    write(tmp_path/'a.txt', 'text')
    with tarfile.open(tmp_path/'tar.txt', mode) as f: f.add(tmp_path/'a.txt', 'a.txt')
    with pytest.raises(ValueError, match='tar.txt is a tar archive; unpack it first'):
        from_files(tmp_path/'tar.txt')

def test_bar_counts_packed_bytes(tmp_path, capsys):
    write(tmp_path/'a.txt.gz', gzip.compress(b'some words\n'*300_000))
    write(tmp_path/'b.txt', 'words')
    TokenStream.from_files(tmp_path)
    assert '100.00%' in capsys.readouterr().out

# What is given instead of texts

class Split(list):  # as those of Hugging Face's `datasets`
    column_names = ['label', 'text']
    def __getitem__(self, name): return [o[name] for o in self]

rows = [dict(label=0, text='good'), dict(label=1, text='bad')]
df = pd.DataFrame(rows)

@pytest.mark.parametrize('docs,message', [
    (df, r"one DataFrame with the text columns 'text'; give one of them: "
     r"docs\['text'\]"),
    (df.set_axis([0, 1], axis=1), r"give one of them: docs\[1\]"),
    (Split(rows), r"one Split with the text columns 'text'; .*: docs\['text'\]"),
    (dict(train=Split(rows), test=Split(rows)), r"one dict with the splits 'train', "
     r"'test'; give a column of one of them: docs\['train'\]\['text'\]"),
    (dict(a='one', b='two'), r"one dict with the keys 'a', 'b'; .* docs.values\(\)"),
    (rows, r"got .* as number 0; give the text of each: \(o\['text'\] for o in docs\)"),
    ([(0, 'good')], r"give the text of each: \(o\[1\] for o in docs\)"),
    ([['a', 'b']], r"as number 0; if each is a list of tokens, join them"),
    (np.arange(3), r"as number 0; for ids use TokenStream\(ids, vocab\)"),
    (['a', float('nan')], r"got nan as number 1; a missing value; leave them out: "
     r".* in pandas docs.dropna\(\)"),
    (['a', None], "got None as number 1; a missing value"),
    ([b'a'], "decode them"), (b'a text', r"use from_text\(docs.decode"),
    (io.BytesIO(b'a\nb'), "as number 0; decode them"),
    ('a text', "got one string; use from_text"),
    ('book.txt', "got one string; use from_files"),
    (Path('a'), "got a path, a; use from_files"), ([Path('a')], "use from_files"),
    (L('a', Path('b')), "as number 1; for files use from_files"), (3, "got 3")],
    ids=lambda o: type(o).__name__)
def test_what_was_meant_is_named(docs, message):
    with pytest.raises(TypeError, match=message): from_docs(docs)

def test_real_datasets_are_named():
    datasets = pytest.importorskip('datasets')
    ds = datasets.Dataset.from_list(rows)
    for docs,message in ((ds, r"one Dataset with the text columns.*docs\['text'\]"),
                         (datasets.DatasetDict(train=ds), r"docs\['train'\]\['text'\]"),
                         (ds.to_iterable_dataset(), "one IterableDataset with the")):
        with pytest.raises(TypeError, match=message): from_docs(docs)
    same(from_docs(ds['text']), from_docs(['good', 'bad']))

def test_all_kinds_of_iterables_are_documents():
    want = from_docs(['good', 'bad'])
    for docs in (df['text'], np.array(['good', 'bad']), L('good', 'bad'),
                 ('good', 'bad'), iter(['good', 'bad']),
                 dict(a='good', b='bad').values(),
                 io.StringIO('good bad')):
        assert from_docs(docs).ids.tolist() == want.ids.tolist()

def test_names_of_files_are_no_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/'a book', 'text')
    for text in 'a book', 'missing.txt', str(tmp_path/'a book'), 'https://x.org/a':
        with pytest.raises(TypeError, match='got the name of a file'): from_text(text)
    with pytest.raises(TypeError, match="got names of files, 'a book' the first"):
        from_docs(['a book', 'b'])
    assert from_docs(iter(['a book'])).decode() == 'a book'
    assert len(from_text('see book.txt')) == 4
    assert len(from_text('a'*5000)) == 1  # too long a name for the system to ask
    with pytest.raises(TypeError, match='text must be a string'): from_text(['a'])

@pytest.mark.parametrize('paths,error,message', [
    ('missing.txt', FileNotFoundError, "paths must exist, got 'missing.txt'"),
    ('*.txt', FileNotFoundError, r"patterns: Path\(\).glob"),
    ('Call me Ishmael.\n'*9999, ValueError, 'a text itself goes to from_text'),
    ('a'*9999, ValueError, 'a text itself goes to from_text'),
    ('https://x.org/a.txt', ValueError, 'download it first'),
    (df, TypeError, 'texts go to from_docs'), (dict(a='b'), TypeError, 'from_docs'),
    (3, TypeError, 'paths must be paths, got 3'), ([b'a'], TypeError, "got b'a'"),
    (io.StringIO('a'), TypeError, 'give its lines to from_docs')])
def test_what_is_no_path_is_named(paths, error, message):
    with pytest.raises(error, match=message): from_files(paths)

# Long texts

def warned(f, *args, **kwargs):
    "What `f` gives, and its warnings"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        return f(*args, **kwargs), [str(o.message) for o in found]

def test_a_text_without_spaces_is_cut_with_one_warning(tmp_path):
    dna = 'ACGT'*750_000
    path = write(tmp_path/'dna.txt', dna)
    for make,source,name in ((from_files, path, path), (from_text, dna, 'document 0')):
        stream,said = warned(make, source)
        assert len(said) == 1 and said[0].startswith(f'{name} has 1,048,576 characters')
        assert "consider tokenizer='chars'" in said[0]
        assert ''.join(tokens(stream)) == dna and max(map(len, stream.vocab)) <= 2**20
        assert stream.docs.tolist() == [0]
        chars,said = warned(make, source, tokenizer='chars')
        assert len(chars) == 3_000_000 and not said

@pytest.fixture(scope='module')
def bpe():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(['the 世界 of words\n']*10, trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok

def test_chinese_is_cut_at_lines_and_gives_the_same_ids(bpe, tmp_path):
    text = '天地玄黄，宇宙洪荒。\n日月盈昃，辰宿列张。\n\n'*25_000
    path = write(tmp_path/'zh.txt', text)
    stream,said = warned(from_files, path, tokenizer=bpe)
    assert not said and stream.ids.tolist() == bpe.encode(text).ids

def test_a_tokenizer_with_a_space_before_each_text_is_not_cut_at_lines(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel({'天\n地': 0, '▁天\n地': 1, '?': 2}, '?'))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    text = '天\n地'*100_000 + ' 天\n地' + '天\n地'*300_000
    stream = from_files(write(tmp_path/'zh.txt', text), tokenizer=tok)
    assert stream.ids.tolist() == tok.encode(text).ids == [2, 2]

@pytest.mark.parametrize('kind', ['words', 'chars', 'bpe'])
def test_long_strings_are_cut_and_give_the_same_ids(kind, bpe, monkeypatch):
    text = 'the words, of the 世界\nand its  “words” of \n\n it\r\n'*40
    tok = bpe if kind == 'bpe' else kind
    whole = from_text(text, tokenizer=tok, by_line=False)
    lines = from_text(text, tokenizer=tok, by_line=True)
    assert len(lines.docs) == 120
    for sz in 1,10,100:
        monkeypatch.setattr(rnnlm.pieces, '_BLOCK', sz)
        same(from_text(text, tokenizer=tok), whole)
        same(from_text(text, tokenizer=tok, by_line=True), lines)
        same(from_docs([text], tok, n_workers=1), whole)

def test_fastai_gets_whole_documents(monkeypatch):
    from fastai.text.core import BaseTokenizer
    monkeypatch.setattr(rnnlm.pieces, '_BLOCK', 10)
    text = 'One line here\nand another line'
    assert tokens(from_text(text, tokenizer=BaseTokenizer())).count('xxbos') == 1
    stream = from_text(text, tokenizer=BaseTokenizer(), by_line=True)
    assert tokens(stream).count('xxbos') == len(stream.docs) == 2

MEMORY = '''
import resource, warnings, numpy as np
warnings.simplefilter('ignore')
from rnnlm.text import TokenStream
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
def read(n):
    rng = np.random.default_rng(n)
    with open('a.txt', 'wb') as f:
        for _ in range(n): f.write(np.frombuffer(b'ACGT', np.uint8)[rng.integers(
            4, size=10**6)].tobytes())
    TokenStream.from_files('a.txt', path='s', progress=False, vocab=['<unk>'])
read(4); start = most(); read(64)
print(most()-start)
'''

def test_memory_of_a_text_without_spaces(tmp_path):
    res = subprocess.run([sys.executable, '-c', MEMORY], cwd=tmp_path, text=True,
                         capture_output=True)
    assert res.returncode == 0, res.stderr
    assert float(res.stdout) < 50  # megabytes, of the 64 that the file has

# One document a line

def test_each_line_is_a_document(tmp_path):
    text = 'Ada\r\n\r\nGrace Hopper\r\n \t\r\nAlan'
    path = write(tmp_path/'names.txt', text)
    want = ['Ada', '.', 'Grace', 'Hopper', '.', 'Alan', '.']
    packed = write(tmp_path/'names.gz', gzip.compress(text.encode()))
    streams = [from_files(path, by_line=True, eos='.'),
               from_files(packed, by_line=True, eos='.'),
               from_text(text, by_line=True, eos='.'),
               from_docs([text], by_line=True, eos='.'),
               from_docs(text.split('\n'), by_line=True, eos='.')]
    with path.open() as f: streams.append(from_docs(f, by_line=True, eos='.'))
    for stream in streams:
        assert tokens(stream) == want and stream.docs.tolist() == [0,2,5]

def test_lines_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(rnnlm.pieces, '_BLOCK', 50)
    lines = [' '.join(f'w{i}' for i in range(n)) for n in (100, 1, 30, 2)]
    path = write(tmp_path/'a.txt', '\n'.join(lines))
    same(from_files(path, by_line=True, eos='.'), from_docs(lines, eos='.'))

def test_a_column_of_a_table_is_documents(tmp_path):
    write(tmp_path/'a.csv', 'label,text\n1,"good, really"\n0,bad\n')
    stream = from_docs(pd.read_csv(tmp_path/'a.csv')['text'])
    assert tokens(stream) == ['good', ',', 'really', 'bad']
    assert stream.docs.tolist() == [0,3]
