def fingerprint(*a): return a
def agree(*a): pass
