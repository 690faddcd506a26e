"""Speed and memory: what a decoded token costs, beside other libraries and beside the least that memory allows.

``shapes`` and ``contenders`` say what is run, ``plan`` in which order. ``turns`` and ``child`` measure it in a process
of its own, which ``session`` talks to; ``block`` and ``run`` make rows of it. ``floor`` says what nothing can undercut.
"""
