"""Speed of training, decoding and planning against peers on the same rows: ``python -m bench``.

The engines take turns (A B A B ...) in one invocation, each in a process of its own that keeps its model loaded and
sleeps while another one works. Speeds are in real tokens a second: padding is work, not progress.

On a GPU (``--device auto`` takes it) the same engines run and peak memory is what torch held there; that is unmeasured
so far.
"""
