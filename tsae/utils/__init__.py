"""Parts that know nothing of autoencoders: command lines, signals, progress bars, atomic files, JSON."""
