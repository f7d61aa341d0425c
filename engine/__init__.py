"""Everything but the algorithm: the command line, settings, files, the step loop, evaluation and the optimizer."""
