"""The papers' experiments again: `python -m tsae.reproduce tcsae` and `python -m tsae.reproduce tsae`."""
