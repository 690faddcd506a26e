"""Speed and memory: what a decoded token costs, beside other libraries and beside the least that memory allows.

``systems``, ``models`` and ``shapes`` say what is run, ``plan`` in which order. A ``worker`` measures one system in a
process of its own, as ``protocol`` has it; ``session`` is the parent's side of that process. ``block`` and ``run`` make
``rows`` of the answers. ``roofline`` computes the floor, the least time that nothing can undercut, from the bandwidth
that ``hardware`` finds; ``sizes`` computes bytes before anything is run; ``plots`` draws.
"""
