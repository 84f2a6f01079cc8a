"""Training: the loop, the optimizer, checkpoints, processes.

Reading order: `optimizer`, `inputs`, `distributed`, `health`, `state`, `checkpoint`, `save`, `display`, `drift`,
`evaluation`, `spikes`, `ahead`, `loop`, `rehearsal`, `needs`, `resume`, `record`, `finish`, `run`.
"""
