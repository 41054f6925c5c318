"""What the notebooks ask: ablations, statistics over seeds, figures, probes."""
