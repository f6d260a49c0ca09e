"""The parts of `infer.py`, the script beside an artifact's files that runs them without deploykit.

`script.py` is the script. `run_NAME.py` says how the files of the exporter NAME are run: with a function ``open_model``
that goes into the script, the ``PACKAGES`` it needs and ``settings`` where it needs constants; where something has to
be done first, or no script can run them, with ``COMMANDS`` and a sentence ``ABOUT``. ``TIMING`` is the line that times
them, where that is not ``deploykit benchmark``.

The script runs on devices: it keeps to Python 3.7.
"""
