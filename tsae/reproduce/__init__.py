"""Reproductions of the papers' experiments: `python -m tsae.reproduce tcsae` and `python -m tsae.reproduce tsae`."""
