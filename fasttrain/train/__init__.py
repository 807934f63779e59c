"""The training floor: parts that work alone in somebody else's loop, and one readable loop that uses them.

Nothing is imported here, so that the command line starts without waiting for torch. Read in this order: ``config``
(the options), ``text`` (what is learnt), ``model``, ``recipe`` (which optimizer, with which settings), ``loop``,
``rank`` (one process), ``launch`` (all of them), ``report`` and ``compare`` (what came out).
"""
