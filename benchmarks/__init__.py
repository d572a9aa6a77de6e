"""Side-by-side measurement of Galley and its peers: speed and accuracy on the same files.

``python -m benchmarks.speed`` and ``python -m benchmarks.accuracy`` each write a JSON file into
``benchmarks/results`` and a table into ``docs``. Nothing here is imported by the package.
"""
