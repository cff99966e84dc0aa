import os

# Models this small gain nothing from threads, which wait for each other on busy cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# The benchmarks are run to see that they run, on small data; the table of 03_bptt is
# made from one seed instead of three.
os.environ.setdefault('RNNLM_BENCH', 'small')
