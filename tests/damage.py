"""Folders damaged in every way: bits, lengths, names, links, pipes, what JSON says."""
import hashlib, json, os, socket
from rnnlm.sealed import sealed

# What is done to a file

def flip(file, rng, other):
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 8))):
        if data: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)

def cut(file, rng, other): os.truncate(file, rng.randint(0, file.stat().st_size))
def empty(file, rng, other): file.write_bytes(b'')
def grow(file, rng, other):
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice((1, 8, 5000))))
def sparse(file, rng, other): os.truncate(file, 10**rng.choice((8, 10, 12)))

def scribble(file, rng, other):
    data = bytearray(file.read_bytes())
    i,n = rng.randrange(len(data)+1),rng.choice((4, 64, 1024))
    end = min(len(data), i+n)
    data[i:end] = rng.choice((bytes(end-i), b'\xff'*(end-i), rng.randbytes(end-i)))
    file.write_bytes(data)

def swap(file, rng, other):
    "With another file of the folder"
    mate = rng.choice(plain_files(file.parent))
    data,file_data = mate.read_bytes(),file.read_bytes()
    mate.write_bytes(file_data)
    file.write_bytes(data)

def take(file, rng, other):
    "From another folder of the kind"
    file.write_bytes(rng.choice(plain_files(other)).read_bytes())

def nested(file, rng, other):
    bracket = rng.choice(('[', '{"a":'))
    file.write_bytes(bracket.encode()*rng.choice((990, 10**5)))

def delete(file, rng, other): file.unlink()
def rename(file, rng, other): file.rename(file.with_name(file.name + rng.choice('~0x')))

# What is put in its place

def pipe(file, rng, other):
    file.unlink()
    os.mkfifo(file)

def folder(file, rng, other):
    file.unlink()
    file.mkdir()

def unix_socket(file, rng, other):
    file.unlink()
    here = os.getcwd()
    os.chdir(file.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as s: s.bind(file.name)
    finally: os.chdir(here)

def link(file, rng, other):
    "To the file itself, moved out of the folder; to nothing; to a device; in a ring"
    away = file.parent.parent/f'{file.name}.away'
    file.rename(away)
    file.symlink_to(rng.choice((away, away, file.parent/'none', '/dev/zero', file)))

# What is changed in a JSON file

def values(rng):
    deep = []
    for _ in range(rng.choice((2, 900))): deep = [deep]
    return rng.choice((
        None, True, False, 0, 1, -1, 2, 255, 10**9, 2**31, 2**63, -2**63, 10**30,
        10**5000, 1.5, -0., 1e308, float('nan'), float('inf'), '', 'x', 'x'*10**5,
        '../../secret.bin', '/etc/passwd', '../secret.bin', '/dev/zero', 'ids.tmp',
        'ids-00000000.bin', '\0', '\ud800', [], {}, [1], [None], ['a', 'b'], {'a': 1},
        deep, '0'*64, '{"model": 1}', '{"fastai": 1}',
        '{"fastai": "run", "cmd": "touch pwned", "rules": [], "sep": ""}',
        'subprocess.Popen', 'os.system'))

def places(o, depth=0):
    "Every container in a JSON value, and each key or index of it"
    items = o.items() if isinstance(o, dict) else enumerate(o)
    for k,v in [*items]:
        yield o,k
        is_nest = isinstance(v, (dict, list)) and v
        if is_nest and depth < 20: yield from places(v, depth+1)

def change(config, rng):
    "Change one thing in a JSON value: anything as likely as the key above it"
    top = rng.choice([*config])
    below = [*places({0: config[top]})]
    o,k = rng.choice(below)
    if o == {0: config[top]} and k == 0: o,k = config,top
    old = o[k]
    what = rng.randrange(6)
    if what == 0: o.pop(k)
    elif what == 1 and isinstance(o, dict): o[f'{k}_'] = o.pop(k)
    elif what == 2 and type(old) in (int, float): o[k] = old + rng.choice((1, -1, .5))
    elif what == 2 and isinstance(old, list): rng.shuffle(old)
    elif what == 2 and isinstance(old, str): o[k] = old[::-1]
    elif what == 3:
        change = rng.choice((str, repr, lambda x: [x], lambda x: {'a': x}))
        o[k] = change(old)
    else: o[k] = values(rng)

def parsed(text):
    "The object that is JSON; None if it is none"
    try: o = json.loads(text)
    except (ValueError, RecursionError): return None
    return o if isinstance(o, dict) and o else None

def dump(file, config):
    try: text = json.dumps(config)
    except (ValueError, RecursionError): return  # as a number of 5,000 digits
    file.write_bytes(text.encode('utf-8', 'surrogatepass'))

def edit(file, rng, other):
    "What a JSON file says, or what JSON in it says, as a tokenizer does; or else a bit"
    config = parsed(file.read_bytes())
    if config is None: return flip(file, rng, other)
    for _ in range(rng.choice((1, 1, 3))):
        inner = {k: o for k,o in config.items() if isinstance(o, str) and parsed(o)}
        if inner and rng.random() < .5:
            k = rng.choice([*inner])
            o = parsed(config[k])
            change(o, rng)
            try: config[k] = json.dumps(o)
            except (ValueError, RecursionError): pass
        elif config: change(config, rng)
    dump(file, config)

def configs(folder):
    "The files of a folder that are checked by themselves, and what they say"
    files = [p for p in plain_files(folder) if p.name in ('stream.json', 'config.json')]
    return {p: config for p in files if (config := parsed(p.read_bytes()))}

def refit(folder):
    "Make all checksums and sizes in the config fit the files, as somebody sly would"
    here = {p.name: p for p in plain_files(folder)}
    for file,config in configs(folder).items():
        for o,k in [*places(config)]:
            entry = o[k]
            if not isinstance(entry, dict) or 'sha256' not in entry: continue
            name = entry.get('file', k)
            data = here.get(name) if isinstance(name, str) else None
            if data is None: continue
            entry['sha256'] = hashlib.sha256(data.read_bytes()).hexdigest()
            if 'bytes' in entry: entry['bytes'] = data.stat().st_size
        try: dump(file, sealed(config))
        except (ValueError, RecursionError): pass

def is_old(folder):
    "Does a config say that it is of version 1, which had no checksum of its own?"
    return any(o.get('version') == 1 and 'check' not in o
               for o in configs(folder).values())

ON_FILES = (flip, flip, flip, cut, empty, grow, sparse, scribble, scribble, swap, take,
            nested, delete, rename, pipe, folder, unix_socket, link, link)

def plain_files(folder):
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink()
                  and p.stat().st_size < 10**7)

def damage(folder, other, rng):
    "Change a folder in one to three ways; gives which, 'sly' if no checksum can tell"
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        files = plain_files(folder)
        if not files: break
        how = edit if rng.random() < .4 else rng.choice(ON_FILES)
        how(rng.choice(files), rng, other)
        done.append(how.__name__)
    if rng.random() < .5:
        refit(folder)
        done.append('sly')
    elif is_old(folder): done.append('sly')
    return done
