"""What models write: the right tokens, at one step of work each, and nothing of the model
or of the random numbers changes."""
import itertools, math, warnings
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model
from fastai.torch_core import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from rnnlm.all import *
from rnnlm.prompts import LiveText
from rnnlm.steps import WINDOW

PROMPT = 'one . two . three .'

def numbers(): return human_numbers_stream()[:2000]

def opinionated(model, scale=3):
    "An untrained model that is sure of things"
    with torch.no_grad():
        for p in model.parameters(): p.mul_(scale)
    return model

@pytest.fixture
def stream(): return numbers()

@pytest.fixture
def model(stream):
    torch.manual_seed(0)
    return opinionated(RNNLM(len(stream.vocab), 16))

def greedy_by_hand(model, stream, prompt, n):
    "Read the whole text again for every token"
    model = model.eval()
    ids = stream.encode(prompt, str.split)[None]
    start = ids.shape[1]
    for _ in range(n):
        with torch.no_grad(): out,_ = model.read(ids, None)
        last = out[:,-1] if out.ndim > 2 else out
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ' '+stream.decode(ids[0,start:])

# the tokens

def test_temperature_0_is_greedy(model, stream):
    text = generate(model, stream, PROMPT, 12, temperature=0)
    assert text == greedy_by_hand(model, stream, PROMPT, 12)
    assert text == generate(model, stream, PROMPT, 12, top_k=1)
    assert text == generate(model, stream, PROMPT, 12, temperature=1e-9, seed=3)

def test_each_token_is_one_step_of_work(stream):
    read = []
    class Counts(RNNLM):
        def read(self, x, state, begins=None):
            read.append((tuple(x.shape), state is None))
            return super().read(x, state, begins)
    generate(Counts(len(stream.vocab), 8), stream, PROMPT, 5)
    # the size of the vocab is looked at once, then the prompt, then token by token
    assert read == [((1, 1), True), ((1, 6), True), *[((1, 1), False)]*4]

def test_same_seed_same_text_to_the_last_token(model, stream):
    write = partial(generate, model, stream, PROMPT, 60, temperature=2.)
    assert write(seed=1) == write(seed=1)
    assert write(seed=1) != write(seed=2)
    assert write() != write()  # without a seed other ones each time

def test_a_text_is_as_if_alone_in_its_batch(model, stream):
    prompts = ['one', PROMPT, 'two hundred', 'one hundred .', 'six']
    texts = generate(model, stream, prompts, 20, seed=5, temperature=1.5)
    alone = [generate(model, stream, o, 20, seed=5+i, temperature=1.5)
             for i,o in enumerate(prompts)]
    assert texts == alone
    assert generate(model, stream, ['one']*3, 20, seed=5)[0] != \
        generate(model, stream, ['one']*3, 20, seed=5)[1]

def test_a_long_prompt_is_read_in_windows(model, stream):
    prompt = stream.decode(stream.ids[:2*WINDOW+7])
    short = greedy_by_hand(model, stream, prompt, 5)
    assert generate(model, stream, prompt, 5, temperature=0) == short

def test_top_k_and_top_p_keep_what_hugging_face_keeps():
    torch.manual_seed(0)
    logits = torch.randn(50, 40)
    for p in .1, .5, .9, .999:
        # as in TopPLogitsWarper of transformers
        sorted_logits,indices = torch.sort(logits, descending=False)
        remove = sorted_logits.softmax(dim=-1).cumsum(dim=-1) <= 1-p
        remove[...,-1:] = False
        removed = remove.scatter(1, indices, remove)
        theirs = logits.masked_fill(removed, -math.inf)
        assert torch.equal(keep_top_p(logits, p), theirs)
    for k in 1, 7, 40, 99:
        removed = logits < torch.topk(logits, min(k, 40))[0][...,-1,None]
        assert torch.equal(keep_top_k(logits, k), logits.masked_fill(removed, -math.inf))

def test_nothing_improbable_is_drawn(model, stream):
    ids = stream.encode(PROMPT, str.split)[None]
    with torch.no_grad(): logits = model.eval().read(ids, None)[0][0,-1]
    likeliest = {' '+stream.vocab[i] for i in logits.topk(2).indices.tolist()}
    texts = generate(model, stream, [PROMPT]*200, 1, temperature=5., top_k=2, seed=0)
    assert {*texts} == likeliest

def test_draws_have_the_probabilities_of_the_model(model, stream):
    ids = stream.encode(PROMPT, str.split)[None]
    with torch.no_grad(): logits = model.eval().read(ids, None)[0][0,-1]
    n = 4000
    texts = generate(model, stream, [PROMPT]*n, 1, temperature=2., seed=0)
    for i,p in enumerate((logits/2).softmax(-1).tolist()):
        share = texts.count(' '+stream.vocab[i])/n
        assert abs(share-p) < 5*math.sqrt(p*(1-p)/n)+1e-9

def test_suppressed_tokens_are_not_written(model, stream):
    usual = generate(model, stream, PROMPT, 50, temperature=3., seed=0)
    assert ' .' in usual
    for args in dict(temperature=3.), dict(temperature=0), dict(num_beams=3):
        text = generate(model, stream, PROMPT, 50, seed=0, suppress=['.'], **args)
        assert ' .' not in text

def test_beams_find_the_likeliest_text():
    vocab,n = ['a', 'b', 'c', 'd'], 4
    for seed in range(5):
        torch.manual_seed(seed)
        model = opinionated(RNNLM(4, 8), 4).eval()
        texts = torch.tensor([*itertools.product(range(4), repeat=n)])
        x = torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), texts], 1)
        with torch.no_grad(): logprobs = model.read(x[:,:-1], None)[0].log_softmax(-1)
        scores = logprobs.gather(-1, x[:,1:,None]).sum((1, 2))
        likeliest = ''.join(vocab[i] for i in texts[scores.argmax()].tolist())
        assert generate(model, vocab, 'a', n, num_beams=4**3) == likeliest
        assert generate(model, vocab, ['b', 'a'], n, num_beams=64)[1] == likeliest
        greedy = generate(model, vocab, 'a', n, temperature=0)
        assert generate(model, vocab, 'a', n, num_beams=1, top_k=1) == greedy

# where it ends

def test_a_stop_ends_the_text_and_is_part_of_it(model, stream):
    text = generate(model, stream, PROMPT, 200, seed=0)
    assert '.' in text
    until = text[:text.index('.')+1]
    assert generate(model, stream, PROMPT, 200, seed=0, stop='.') == until
    i = stream.vocab.index('.')
    assert generate(model, stream, PROMPT, 200, seed=0, stop=[i, 'one']) == min(
        until, text[:text.find(' one')+4] if ' one' in text else until, key=len)
    live = generate_iter(model, stream, PROMPT, max_new_tokens=200, seed=0, stop='.')
    assert ''.join(live) == until

def test_a_stop_may_be_longer_than_a_token():
    chars = TokenStream.from_text('abcabcab', tokenizer='chars')
    torch.manual_seed(0)
    model = RNNLM(3, 8)
    text = generate(model, chars, 'a', 200, seed=0)
    until = text[:text.index('bca')+3]
    assert generate(model, chars, 'a', 200, seed=0, stop='bca') == until
    assert ''.join(generate_iter(model, chars, 'a', max_new_tokens=200, seed=0,
                                 stop='bca')) == until

def test_each_row_ends_by_itself(model, stream):
    texts = generate(model, stream, [PROMPT]*8, 50, seed=0, stop='.')
    assert len({*map(len, texts)}) > 1
    assert all(o.endswith('.') and o.count('.') == 1 for o in texts if '.' in o)

def test_eos_ends_a_text_and_is_no_part_of_it():
    stream = TokenStream.from_docs(['one two', 'two one'], bos='<bos>', eos='<eos>',
                                   progress=False)
    torch.manual_seed(0)
    model = RNNLM(len(stream.vocab), 8)
    texts = generate(model, stream, ['']*20, 50, seed=0)
    whole = generate(model, stream, ['']*20, 50, seed=0, stop=())
    assert not any('<eos>' in o for o in texts)
    assert any('<eos>' in o for o in whole)
    for text,more in zip(texts, whole): assert more.startswith(text.rstrip())

# models

def ladder():
    from rnnlm import ladder
    for i in range(1, 8):
        cls = getattr(ladder, f'LMModel{i}', None) or globals()[f'LMModel{i}']
        yield f'LMModel{i}', partial(cls, 30, 8)

MODELS = dict(ladder()) | {
    'rnn': partial(RNNLM, 30, 8, cell='rnn'), 'gru': partial(RNNLM, 30, 8, 2, cell='gru'),
    'mingru': partial(RNNLM, 30, 8, cell='mingru'),
    'tied': partial(RNNLM, 30, 8, 2, emb_sz=4, tie_weights=True, output_p=.5,
                    weight_p=.5, embed_p=.5, norm='layer', residual=True),
    'fastai': lambda: get_language_model(AWD_LSTM, 30),
    'AWDLM': lambda: AWDLM(get_language_model(AWD_LSTM, 30))}

@pytest.mark.parametrize('name', MODELS)
def test_models_of_all_kinds_write(name, stream):
    torch.manual_seed(0)
    model = MODELS[name]()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    prompts = [PROMPT, 'one . two', PROMPT]
    texts = generate(model, stream, prompts, 10, temperature=0)
    assert texts[0] == texts[2] == generate(model, stream, PROMPT, 10, temperature=0)
    assert texts[1] == generate(model, stream, 'one . two', 10, temperature=0)
    assert ''.join(generate_iter(model, stream, PROMPT, max_new_tokens=10,
                                 temperature=0)) == texts[0]
    assert len(generate(model, stream, PROMPT, 5, num_beams=3).split()) == 5
    assert model.training and all(o.training for o in model.modules())
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])

class ChapterModel(nn.Module):
    "A model of another library, which keeps its state in `h`"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn = nn.Embedding(30, 8),nn.GRU(8, 8, batch_first=True)
        self.out,self.h = nn.Linear(8, 30),None
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(self.emb(x), self.h)
        self.h = h.detach()
        return self.out(out)

def test_an_adapted_model_writes_and_keeps_its_state(stream):
    inner = ChapterModel()
    adapted = AdaptedLM(inner, 'h', batch_dim=1)
    inner.h = torch.ones(1, 4, 8)
    texts = generate(adapted, stream, [PROMPT, 'one'], 8, temperature=0)
    assert texts[1] == generate(adapted, stream, 'one', 8, temperature=0)
    assert torch.equal(inner.h, torch.ones(1, 4, 8))

def test_a_model_with_logits_in_an_object_writes(stream, model):
    class Output:
        def __init__(self, logits): self.logits = logits
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(30, 8),nn.Linear(8, 30)
        def forward(self, x): return Output(self.out(self.emb(x)))
    assert len(generate(Wrapped(), stream, PROMPT, 5).split()) == 5

def test_wrapped_and_compiled_models_write_the_same(model, stream):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
    text = generate(model, stream, PROMPT, 10, seed=0)
    assert generate(Wrapper(model), stream, PROMPT, 10, seed=0) == text
    compiled = torch.compile(model, backend='eager')
    assert generate(compiled, stream, PROMPT, 10, seed=0) == text
    with pytest.raises(TypeError, match='DataParallel'):
        generate(nn.DataParallel(model), stream, PROMPT)

def learner(stream, model=None):
    dls = stream.dataloaders(4, 8, verbose=False)
    set_seed(0)
    return rnn_learner(dls, model or RNNLM(len(stream.vocab), 8))

def test_a_learner_brings_model_and_stream(stream):
    learn = learner(stream)
    text = generate(learn, prompt=PROMPT, max_new_tokens=8, seed=0)
    assert text == generate(learn.model, stream, PROMPT, 8, seed=0)

def test_a_model_without_a_memory_is_shown_what_it_was_trained_with():
    learn = numbers_learner(LMModel2)
    text = generate(learn, prompt=PROMPT, max_new_tokens=8, temperature=0)
    vocab = learn.dls.vocab
    assert text == generate(learn.model, vocab, PROMPT, 8, temperature=0, sl=3)

# nothing changes

def test_state_mode_gradients_and_random_numbers_stay(model, stream):
    model(stream.ids[None,:10])
    held = [o.clone() for o in state_tensors(model.state)]
    model.h_o.eval()
    modes = [o.training for o in model.modules()]
    before = torch.get_rng_state()
    onednn = torch._C._get_mkldnn_enabled()
    pieces = generate_iter(model, stream, PROMPT, max_new_tokens=5)
    for _ in range(2):
        next(pieces)  # and in the middle of it
        assert [o.training for o in model.modules()] == modes
        assert torch.is_grad_enabled() and torch._C._get_mkldnn_enabled() == onednn
    pieces.close()
    generate(model, stream, [PROMPT]*2, 5)
    assert [o.training for o in model.modules()] == modes
    assert all(map(torch.equal, state_tensors(model.state), held))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch._C._get_mkldnn_enabled() == onednn

def test_a_failing_model_leaves_its_mode(stream):
    class Fails(RNNLM):
        def read(self, x, state, begins=None):
            if state is not None: raise RuntimeError('no more')
            return super().read(x, state, begins)
    model = Fails(30, 8)
    with pytest.raises(RuntimeError, match='no more'):
        generate(model, stream, PROMPT, 5)
    assert model.training and torch.is_grad_enabled()

def test_training_goes_on_as_if_nothing_was_written(stream):
    def weights(writes):
        learn = learner(stream[:500])
        class Writes(Callback):
            def after_batch(self):
                if writes: generate(self.learn, prompt=PROMPT, max_new_tokens=2)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Writes())
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(weights(True), weights(False))

# tokenizers

TEXT = 'The cat, the dog and 😀 the bird.\n"Well," said the cat, "it\'s the 🚀 end."\n' * 3

def byte_level_bpe():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, show_progress=False))
    return tok

def tokenizers():
    from fastai.text.core import BaseTokenizer
    from fastai.text.core import Tokenizer as FastaiTokenizer
    return {'words': 'words', 'chars': 'chars', 'split': str.split,
            'fastai': FastaiTokenizer(BaseTokenizer()), 'bpe': byte_level_bpe()}

@pytest.mark.parametrize('name', ['words', 'chars', 'split', 'fastai', 'bpe'])
def test_tokenizers_of_all_kinds_write(name):
    stream = TokenStream.from_text(TEXT, tokenizer=tokenizers()[name], progress=False)
    torch.manual_seed(0)
    model = RNNLM(len(stream.vocab), 8)
    prompt = 'The cat, the dog' if name != 'split' else 'The cat, the dog and'
    args = dict(max_new_tokens=80, seed=0)
    text = generate(model, stream, prompt, **args)
    assert text == ''.join(generate_iter(model, stream, prompt, **args))
    assert text == generate(model, stream.new_empty(), prompt, **args)
    if name in ('words', 'chars'):  # the prompt and the text are one text
        ids = stream.encode(prompt+text)
        assert len(ids) == len(stream.encode(prompt))+80

def test_tokenizers_may_be_given_alone():
    bpe = byte_level_bpe()
    stream = TokenStream.from_text(TEXT, tokenizer=bpe, progress=False)
    torch.manual_seed(0)
    model = RNNLM(len(stream.vocab), 8)
    text = generate(model, stream, 'The cat', 20, seed=0)
    assert generate(model, bpe, 'The cat', 20, seed=0) == text
    class OfTransformers:  # which holds the tokenizer that does the work
        backend_tokenizer,bos_token,eos_token = bpe,'T','!'
    assert generate(model, OfTransformers(), 'The cat', 20, seed=0, stop=()) == text
    assert generate(model, OfTransformers(), '', 3, seed=0, stop=())

def test_an_emoji_is_not_cut():
    bpe = byte_level_bpe()
    stream = TokenStream.from_text('😀 🚀'*9, tokenizer=bpe, progress=False)
    ids = stream.encode('a 😀 b 🚀🚀').tolist()
    assert len(ids) > len('a 😀 b 🚀🚀')
    live = LiveText(stream, [])
    pieces = [live.add(i) for i in ids] + [live.finish()]
    assert ''.join(pieces) == 'a 😀 b 🚀🚀'
    assert not any('\ufffd' in o for o in pieces)

def test_words_that_the_vocab_lacks_are_named():
    stream = TokenStream.from_docs(['one two . one two . three'], min_freq=2)
    model = RNNLM(len(stream.vocab), 8)
    with pytest.warns(UserWarning, match="'<unk>' for it: 'apple', 'three'$"):
        text = generate(model, stream, 'one apple . three apple', 5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same = generate(model, stream, 'one <unk> . <unk> <unk>', 5, seed=0)
    assert text.split() == same.split()

def test_words_that_a_vocab_without_unk_lacks_are_an_error(model, stream):
    with pytest.raises(ValueError, match="prompt holds 'apple', 'pear', and the vocab"):
        generate(model, stream, 'one apple pear')

def test_pieces_that_a_hugging_face_vocab_lacks_are_named():
    tok = Tokenizer(models.WordLevel({'[UNK]': 0, 'one': 1, 'two': 2}, '[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.warns(UserWarning, match="'apple'"):
        generate(RNNLM(3, 8), tok, 'one apple two', 2)

def test_an_empty_prompt_is_bos(tmp_path):
    docs = ['one two', 'two one']
    stream = TokenStream.from_docs(docs, bos='<bos>', progress=False)
    model = RNNLM(len(stream.vocab), 8)
    text = generate(model, stream, '', 5, seed=0)
    whole = generate(model, stream, '<bos>', 5, seed=0)
    assert text == whole.strip() or text.split() == whole.split()
    stored = TokenStream.from_docs(docs, bos='<bos>', path=tmp_path, progress=False)
    assert (stored.bos, stored.eos) == ('<bos>', None)  # kept on disk, too
    assert generate(model, stored, '', 5, seed=0) == text
    stored[:4].save(tmp_path/'again')
    assert TokenStream.open(tmp_path/'again').bos == '<bos>'

# predict

def test_predict_is_as_of_fastai(stream):
    learn = learner(stream)
    set_seed(3)
    text = learn.predict('one . two', 7, temperature=.75)
    assert text.startswith('one . two ') and len(text.split()) == 10
    set_seed(3)
    assert learn.predict('one . two', n_words=7, temperature=.75, no_bar=True,
                         only_last_word=True) == text
    assert len(learn.predict('one').split()) == 2

def test_predict_writes_no_unk():
    stream = TokenStream.from_docs(['one two . one two . three four five'], min_freq=2)
    learn = learner(TokenStream(stream.ids.repeat(30), stream.vocab))
    learn.dls.train.dataset.unk = '<unk>'
    learn.dls.train.dataset.tokenizer = 'words'
    assert '<unk>' not in learn.predict('one', n_words=200)
    assert '<unk>' in learn.predict('one', n_words=200, no_unk=False)
    with pytest.warns(UserWarning, match='min_p'): learn.predict('one', min_p=1.)

# bad input

BAD = [
    (dict(temperature=-1), ValueError, 'temperature must be 0 .* got -1'),
    (dict(temperature=math.nan), ValueError, 'temperature must be 0'),
    (dict(temperature='x'), TypeError, 'temperature must be a number'),
    (dict(top_p=0), ValueError, 'top_p must be above 0 and at most 1, got 0'),
    (dict(top_p=1.01), ValueError, 'top_p must be above 0 and at most 1, got 1.01'),
    (dict(top_k=0), ValueError, 'top_k must be at least 1, got 0'),
    (dict(top_k=1.5), TypeError, 'top_k must be a whole number'),
    (dict(prompt=''), ValueError, "prompt must hold a token, got '': .* no bos"),
    (dict(prompt=[]), ValueError, 'got an empty list'),
    (dict(prompt=3), TypeError, 'prompt must be a string'),
    (dict(prompt=['one', '']), ValueError, 'prompt must hold a token'),
    (dict(max_new_tokens=0), ValueError, 'max_new_tokens must be at least 1, got 0'),
    (dict(num_beams=0), ValueError, 'num_beams must be at least 1'),
    (dict(num_beams=2, temperature=.5), ValueError, 'leave out temperature=0.5'),
    (dict(num_beams=2, top_p=.5), ValueError, 'leave out top_p=0.5'),
    (dict(stop='zebra'), ValueError, "stop must be able to occur, got 'zebra'"),
    (dict(stop=''), ValueError, 'stop must hold something'),
    (dict(stop=99), ValueError, 'stop must be a token id from 0 to 29, got 99'),
    (dict(seed=-1), ValueError, 'seed must be from 0'),
    (dict(seed='x'), TypeError, 'seed must be a whole number'),
    (dict(suppress='zebra'), ValueError, "suppress must hold tokens of the vocab"),
    (dict(sl=0), ValueError, 'sl must be at least 1'),
    (dict(stream=None), TypeError, 'stream must be given'),
    (dict(stream='one'), TypeError, 'stream must be a TokenStream'),
    (dict(stream=['a', 'b']), ValueError, 'vocab of 2 tokens, .* gives 30 numbers'),
    (dict(model=None), TypeError, 'model must be'),
    (dict(model=nn.Embedding(30, 8)), ValueError, 'vocab of 30 tokens, .* gives 8'),
    (dict(model=nn.Identity()), TypeError, 'model must give logits'),
    (dict(model=RNNLM(29, 8)), ValueError, 'vocab of 30 tokens, .* gives 29')]

@pytest.mark.parametrize('args,error,message', BAD, ids=[str([*o[0]][0]) + str(i)
                                                         for i,o in enumerate(BAD)])
def test_bad_input_is_told_before_anything_is_written(args, error, message, model,
                                                      stream):
    args = dict(model=model, stream=stream, prompt=PROMPT) | args
    with pytest.raises(error, match=message): generate(**args)
    if not isinstance(args['prompt'], list):
        with pytest.raises(error, match=message if 'num_beams' not in args else 'num_b'):
            generate_iter(**args)  # and not when the first piece is asked for

def test_generate_iter_takes_one_prompt(model, stream):
    with pytest.raises(TypeError, match='prompt must be one string, got a list'):
        generate_iter(model, stream, ['one'])

def test_a_model_that_diverged_is_named(model, stream):
    with torch.no_grad(): model.h_o.weight.fill_(math.nan)
    with pytest.raises(ValueError, match='model gives NaN'):
        generate(model, stream, PROMPT)

def test_a_prompt_too_short_for_the_model_is_named(stream):
    with pytest.raises(ValueError, match='at least 3 tokens'):
        generate(MODELS['LMModel1'](), stream, 'one .')
