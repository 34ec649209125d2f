"""What train.py runs: configuration, data, checkpoints, the loop. ``docs/training.md`` is the manual.

Reading order: :mod:`config` (every option), :mod:`data`, :mod:`build` (model, task, optimizer), :mod:`engine` (the
loop), :mod:`checkpoint`, :mod:`distributed`, :mod:`report`, :mod:`cli`. Nothing is imported here, so that
``import visionattn`` stays quick.
"""
